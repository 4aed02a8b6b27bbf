"""The drop-in schedulers against the schedulers of diffusers: the same numbers from the same noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from diffusers.schedulers import scheduling_ddim, scheduling_ddpm
from diffusers.utils.torch_utils import randn_tensor

from dgm_kernels import use_backend
from tests.diffusers_pairs import PAIRS, SHAPE, assert_same, check_against_diffusers, pair, spy

PREDICTIONS = ("epsilon", "sample", "v_prediction")
SPACINGS = (
    {"timestep_spacing": "leading"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "linspace"},
    {"timestep_spacing": "trailing"},
)
BOUNDS = (
    {"clip_sample": False},
    {"clip_sample": True, "clip_sample_range": 0.7},
    {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.95},
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the fused ops that the schedulers call."""
    return spy(monkeypatch)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large", "learned_range", "learned"])
@pytest.mark.parametrize("bounds", BOUNDS, ids=["free", "clip", "threshold"])
@pytest.mark.parametrize("spacing", SPACINGS, ids=["leading", "offset", "linspace", "trailing"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm(prediction: str, spacing: dict, bounds: dict, variance: str, calls: list[str]) -> None:
    """Predictions x spacings x bounds on x0 x variances."""
    schedulers = pair("ddpm", prediction_type=prediction, variance_type=variance, **spacing, **bounds)
    check_against_diffusers(*schedulers, channels=2 if variance.startswith("learned") else 1)
    assert calls == ["sampler_step"] * 7


@pytest.mark.parametrize("options", [{}, {"eta": 0.4}, {"eta": 1.0}, {"eta": 0.4, "use_clipped_model_output": True}])
@pytest.mark.parametrize("bounds", BOUNDS, ids=["free", "clip", "threshold"])
@pytest.mark.parametrize("spacing", SPACINGS, ids=["leading", "offset", "linspace", "trailing"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim(prediction: str, spacing: dict, bounds: dict, options: dict, calls: list[str]) -> None:
    """Predictions x spacings x bounds on x0 x noise."""
    to_one = spacing["timestep_spacing"] != "linspace"
    check_against_diffusers(
        *pair("ddim", prediction_type=prediction, set_alpha_to_one=to_one, **spacing, **bounds), **options
    )
    assert calls == ["sampler_step"] * 7


@pytest.mark.parametrize(
    "sigmas",
    [
        {},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        {"interpolation_type": "log_linear"},
        {"final_sigmas_type": "sigma_min"},
        {"timestep_type": "continuous", "use_karras_sigmas": True, "sigma_min": 0.01, "sigma_max": 50.0},
        {"rescale_betas_zero_snr": True},
    ],
    ids=lambda config: "-".join(config) or "plain",
)
@pytest.mark.parametrize("spacing", SPACINGS, ids=["leading", "offset", "linspace", "trailing"])
@pytest.mark.parametrize("prediction", [*PREDICTIONS, "original_sample"])
def test_euler(prediction: str, spacing: dict, sigmas: dict, calls: list[str]) -> None:
    """Predictions x spacings x sigmas."""
    if "use_beta_sigmas" in sigmas:
        pytest.importorskip("scipy")
    check_against_diffusers(*pair("euler", prediction_type=prediction, **spacing, **sigmas))
    assert calls == ["sampler_step"] * 7


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
@pytest.mark.parametrize(
    "betas",
    [
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": torch.linspace(1e-3, 0.3, 60).tolist(), "num_train_timesteps": 60},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        {"rescale_betas_zero_snr": True, "prediction_type": "sample", "timestep_spacing": "trailing"},
    ],
    ids=["scaled_linear", "cosine", "trained", "zero_snr_v", "zero_snr_sample"],
)
def test_beta_schedules(name: str, betas: dict, calls: list[str]) -> None:
    """The coefficients come from the scheduler's own alphas_cumprod, whatever made it."""
    check_against_diffusers(*pair(name, **betas))
    assert calls == ["sampler_step"] * 7


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_steps_with_small_betas(variance: str, calls: list[str]) -> None:
    """Where beta is small, the float32 arithmetic of diffusers is off by 1e-4; its numbers are met nevertheless."""
    theirs, ours = pair("ddpm", 1000, variance_type=variance, clip_sample=False)
    theirs.timesteps, ours.timesteps = theirs.timesteps[-40:], ours.timesteps[-40:]
    check_against_diffusers(theirs, ours)
    assert calls == ["sampler_step"] * 40


def test_all_training_timesteps_without_set_timesteps() -> None:
    """DDPM steps from t to t - 1 before set_timesteps is called."""
    theirs, ours = (kind() for kind in PAIRS["ddpm"])
    x, m = torch.randn(2, *SHAPE)
    for t in (999, 500, 1, 0):
        torch.manual_seed(t)
        expected = theirs.step(m, t, x)
        torch.manual_seed(t)
        result = ours.step(m, t, x)
        assert_same(result.prev_sample, expected.prev_sample)


@pytest.mark.parametrize("name", ["ddpm", "euler"])
def test_custom_timesteps(name: str, calls: list[str]) -> None:
    """Timesteps of the user's own, and that a second set_timesteps call is seen."""
    theirs, ours = pair(name, {"timesteps": [901, 700, 333, 20, 3]})
    check_against_diffusers(theirs, ours)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(timesteps=[700, 20])
    check_against_diffusers(theirs, ours)
    assert calls == ["sampler_step"] * 7


def test_custom_sigmas(calls: list[str]) -> None:
    """Euler with sigmas of the user's own."""
    check_against_diffusers(*pair("euler", {"sigmas": [14.6, 6.3, 2.2, 0.9, 0.2, 0.0]}))
    assert calls == ["sampler_step"] * 5


@pytest.mark.parametrize(
    "seed",
    [
        lambda: torch.Generator().manual_seed(5),
        lambda: [torch.Generator().manual_seed(5 + i) for i in range(SHAPE[0])],
        lambda: [torch.Generator().manual_seed(5)],
    ],
    ids=["one", "list", "list_of_one"],
)
@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_generators(name: str, seed: Callable[[], Any]) -> None:
    """One generator, or one a sample; afterwards they are in the state that diffusers leaves them in."""
    check_against_diffusers(*pair(name), seed=seed, **({"eta": 1.0} if name == "ddim" else {}))


@pytest.mark.parametrize(("name", "options"), [("ddpm", {}), ("ddim", {"eta": 1.0}), ("ddim", {}), ("euler", {})])
def test_global_seed(name: str, options: dict) -> None:
    """Without a generator torch.manual_seed gives the same sequence, and the same random numbers afterwards."""
    theirs, ours = pair(name)
    results = []
    for scheduler in (theirs, ours):
        torch.manual_seed(11)
        x = torch.randn(SHAPE) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            m = torch.tanh(scheduler.scale_model_input(x, t) + 0.1)
            x = scheduler.step(m, t, x, **options).prev_sample
        results.append((x, torch.rand(3)))
    assert_same(results[1][0], results[0][0])
    assert torch.equal(results[1][1], results[0][1])


def test_variance_noise(calls: list[str]) -> None:
    """DDIM takes its noise from the caller; together with a generator that is an error, as in diffusers."""
    theirs, ours = pair("ddim")
    x, m, noise = torch.randn(3, *SHAPE)
    t = ours.timesteps[2]
    expected = theirs.step(m, t, x, eta=0.7, variance_noise=noise)
    result = ours.step(m, t, x, eta=0.7, variance_noise=noise)
    assert_same(result.prev_sample, expected.prev_sample)
    assert calls == ["sampler_step"]
    with pytest.raises(ValueError, match="Cannot pass both generator and variance_noise"):
        ours.step(m, t, x, eta=0.7, variance_noise=noise, generator=torch.Generator())


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler"])
def test_16_bit(name: str, dtype: torch.dtype, prediction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """16-bit tensors give diffusers' float32 result of the same inputs and noise, rounded once."""

    def widened(*args: Any, **kwargs: Any) -> Tensor:
        return randn_tensor(*args, **{**kwargs, "dtype": dtype}).float()

    for module in (scheduling_ddpm, scheduling_ddim):
        monkeypatch.setattr(module, "randn_tensor", widened)
    theirs, ours = pair(name, prediction_type=prediction)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    options = {"eta": 0.5} if name == "ddim" else {}
    for t in theirs.timesteps:
        x, m = torch.randn(2, *SHAPE).to(dtype)
        for scheduler in (theirs, ours):
            scheduler.scale_model_input(x, t)
        new, x0 = theirs.step(m.float(), t, x.float(), generator=generators[0], return_dict=False, **options)
        our_new, our_x0 = ours.step(m, t, x, generator=generators[1], return_dict=False, **options)
        assert our_new.dtype == dtype
        assert our_x0.dtype == (torch.float32 if name == "euler" and prediction != "sample" else dtype)
        for result, expected in ((our_new, new), (our_x0, x0)):
            rounding = torch.finfo(dtype).eps / 2
            size = float(expected.abs().max())
            torch.testing.assert_close(result.float(), expected, rtol=1.01 * rounding, atol=1e-5 * size)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)])
@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler"])
def test_mixed_dtypes(name: str, dtypes: tuple[torch.dtype, torch.dtype], prediction: str, calls: list[str]) -> None:
    """The dtypes of the results are those of diffusers when sample and model output differ."""
    theirs, ours = pair(name, prediction_type=prediction)
    x, m = (torch.randn(SHAPE, dtype=dtype) for dtype in dtypes)
    t = ours.timesteps[-1]
    results = []
    for scheduler in (theirs, ours):
        scheduler.scale_model_input(x, t)
        results.append(scheduler.step(m, t, x, return_dict=False))
    for ours_, theirs_ in zip(results[1], results[0], strict=True):
        assert ours_.dtype == theirs_.dtype
        torch.testing.assert_close(ours_, theirs_, rtol=2e-2, atol=2e-2)
    assert calls == ["sampler_step"]


@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler"])
def test_return_types(name: str) -> None:
    """The output class of diffusers, or the pair (prev_sample, pred_original_sample)."""
    theirs, ours = pair(name)
    x, m = torch.randn(2, *SHAPE)
    for scheduler in (theirs, ours):
        scheduler.scale_model_input(x, scheduler.timesteps[0])
    expected = theirs.step(m, theirs.timesteps[0], x, generator=torch.Generator().manual_seed(0))
    result = ours.step(m, ours.timesteps[0], x, generator=torch.Generator().manual_seed(0))
    assert type(result) is type(expected)
    assert_same(result.prev_sample, expected.prev_sample)
    assert_same(result.pred_original_sample, expected.pred_original_sample)


@pytest.mark.parametrize("kind", [int, "numpy", "scalar", "one_element", "int32"])
@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_forms_of_a_timestep(name: str, kind: Any, calls: list[str]) -> None:
    """A timestep may be an int, an integer of numpy, or a tensor with one element."""
    theirs, ours = pair(name)
    t = ours.timesteps[3]
    forms = {int: int(t), "numpy": t.numpy()[()], "scalar": t, "one_element": t[None], "int32": t.int()}
    x, m = torch.randn(2, *SHAPE)
    expected, result = (
        s.step(m, forms[kind], x, generator=torch.Generator().manual_seed(0)).prev_sample for s in (theirs, ours)
    )
    assert_same(result, expected)
    assert calls == ["sampler_step"]


@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_strides_and_shapes(name: str, backend: str) -> None:
    """Channels-last, sliced, and two-dimensional samples; inputs are not written to."""
    dense = torch.randn(2, 3, 4, 5)
    inputs = [dense.to(memory_format=torch.channels_last), torch.randn(3, 9, 4)[:, ::2], torch.randn(4, 5)]
    with use_backend(backend):
        for x in inputs:
            before = x.clone()
            theirs, ours = pair(name)
            for scheduler in (theirs, ours):
                scheduler.scale_model_input(x, scheduler.timesteps[2])
            m = torch.randn_like(x)
            results = [
                s.step(m, s.timesteps[2], x, generator=torch.Generator().manual_seed(0)).prev_sample
                for s in (theirs, ours)
            ]
            assert_same(results[1], results[0])
            assert torch.equal(x, before)


@pytest.mark.parametrize("start", [0, 3])
def test_euler_begin_index(start: int, calls: list[str]) -> None:
    """Euler counts its steps from set_begin_index, and from the timestep without it."""
    for begins in (True, False):
        theirs, ours = pair("euler")
        if begins:
            for scheduler in (theirs, ours):
                scheduler.set_begin_index(start)
        theirs.timesteps, ours.timesteps = theirs.timesteps[start:], ours.timesteps[start:]
        if not begins:
            theirs.sigmas, ours.sigmas = theirs.sigmas[start:], ours.sigmas[start:]
        check_against_diffusers(theirs, ours)
        assert theirs.step_index == ours.step_index
    assert len(calls) == 2 * (7 - start)


def test_euler_restarts_after_set_timesteps() -> None:
    """A second trajectory begins at its first step."""
    theirs, ours = pair("euler")
    check_against_diffusers(theirs, ours)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(4)
    check_against_diffusers(theirs, ours)


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
@pytest.mark.parametrize("count", [1, 4], ids=["one_timestep", "one_a_sample"])
def test_add_noise(name: str, count: int, calls: list[str]) -> None:
    """The forward process."""
    theirs, ours = pair(name)
    x0, noise = torch.randn(2, 4, 3, 8, 8)
    t = torch.randint(0, 1000, (count,), dtype=torch.int32)
    assert_same(ours.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t))
    half = ours.add_noise(x0.bfloat16(), noise.bfloat16(), t)
    expected = theirs.add_noise(x0.bfloat16().float(), noise.bfloat16().float(), t)
    torch.testing.assert_close(half.float(), expected, rtol=2**-8, atol=1e-5)
    assert calls == ["add_noise"] * 2
    assert_same(ours.add_noise(x0.double(), noise.double(), t), theirs.add_noise(x0.double(), noise.double(), t))
    assert_same(ours.add_noise(x0, noise[:1], t), theirs.add_noise(x0, noise[:1], t))
    assert calls == ["add_noise"] * 2, "float64 and broadcasting belong to diffusers"


def test_gradients() -> None:
    """A step is differentiable as diffusers' step is: by sample, model output and learned variance."""
    theirs, ours = pair("ddpm", variance_type="learned_range", clip_sample=False)
    weight = torch.randn(SHAPE)
    grads = []
    for scheduler in (theirs, ours):
        torch.manual_seed(4)
        x = torch.randn(SHAPE, requires_grad=True)
        m = torch.randn(SHAPE[0], 6, *SHAPE[2:], requires_grad=True)
        new, x0 = scheduler.step(m, scheduler.timesteps[1], x, return_dict=False)
        grads.append(torch.autograd.grad(((new + 0.1 * x0) * weight).sum(), (x, m)))
    for result, expected in zip(grads[1], grads[0], strict=True):
        assert_same(result, expected)


def test_cases_are_not_vacuous() -> None:
    """Without bounds x0 is far larger than the bounds of the cases."""
    for bounds in BOUNDS:
        _, scheduler = pair("ddpm", **bounds)
        x, m = torch.randn(2, *SHAPE)
        x0 = scheduler.step(m, scheduler.timesteps[0], x).pred_original_sample
        assert (float(x0.abs().max()) > 1.5) == (bounds.get("clip_sample") is False)
