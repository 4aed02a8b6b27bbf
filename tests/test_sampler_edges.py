"""Edges of the sampler op: odd layouts of every argument, aliasing, unread operands, NumPy numbers, refusals."""

import copy
import enum
import logging
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dgm_kernels import (
    NoiseKey,
    Schedule,
    add_noise,
    denoising_loss,
    noise_like,
    sample,
    sampler_step,
    tables,
    use_backend,
)
from dgm_kernels._core import backends as registry
from dgm_kernels._core.noise import NO_NOISE
from dgm_kernels.sampler import op
from tests.cases import BACKENDS, NATIVE, STEP_CASES, VP
from tests.contract import strided_variants

EVERYTHING = next(c for c in STEP_CASES if c.name == "ddpm everything")
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


@on_every_backend
@pytest.mark.parametrize("name", ["noise", "history", "guidance", "known", "mask"])
def test_options_may_have_any_strides(backend, name):
    case = next(c for c in STEP_CASES if c.history) if name == "history" else EVERYTHING
    x, m = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    options: dict[str, Any] = case.options(x)
    with use_backend(backend):
        expected = sampler_step(x, m, case.table, case.step, **options)
        value = options[name]
        for variant in strided_variants(value[0] if name == "guidance" else value):
            options[name] = (variant, value[1]) if name == "guidance" else variant
            actual = sampler_step(x, m, case.table, case.step, **options)
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@on_every_backend
def test_training_operands_may_have_any_strides(backend):
    table = tables.training(VP, prediction="v")
    x0, m, n = (torch.randn(4, 3, 5) for _ in range(3))
    t = torch.tensor([7, 7, 7, 7])
    with use_backend(backend):
        for noise in (NoiseKey(1), n):
            noised, loss = add_noise(x0, table, t, noise), denoising_loss(m, x0, table, t, noise, reduction="none")
            for x0_, m_ in zip(strided_variants(x0), strided_variants(m), strict=True):
                torch.testing.assert_close(add_noise(x0_, table, t, noise), noised, rtol=0, atol=0)
                again = denoising_loss(m_, x0_, table, t, noise, reduction="none")
                torch.testing.assert_close(again, loss, rtol=0, atol=0)


@on_every_backend
def test_index_tensors_may_have_any_strides(backend):
    table, train, x = tables.ddpm(VP), tables.training(VP), torch.randn(4, 9)
    with use_backend(backend):
        for index in (torch.tensor([5, 5, 5, 5]), torch.tensor([1, 3, 5, 60])):
            steps = sampler_step(x, x, table, index, noise=NoiseKey(1, step=index, samples=index))
            noised = add_noise(x, train, index, NoiseKey(1))
            for other in strided_variants(index):
                again = sampler_step(x, x, table, other, noise=NoiseKey(1, step=other, samples=other))
                assert torch.equal(again, steps)
                assert torch.equal(add_noise(x, train, other, NoiseKey(1)), noised)


@on_every_backend
def test_out_may_be_an_input_or_overlap_it(backend):
    table, key, buffer = tables.ddpm(VP), NoiseKey(0), torch.randn(401)
    m = torch.randn(4, 100)
    with use_backend(backend):
        for start in (0, 1):
            x, out = buffer[:400].view(4, 100).clone(), None
            expected = sampler_step(x, m, table, 50, noise=key)
            shared = torch.cat([x.flatten(), torch.zeros(1)])
            out = shared[start : start + 400].view(4, 100)
            assert sampler_step(shared[:400].view(4, 100), m, table, 50, noise=key, out=out) is out
            assert torch.equal(out, expected)
        pair = (torch.empty(4, 100), torch.empty(4, 100))
        assert sampler_step(m, m, table, 50, noise=key, out=pair, return_x0=True) is pair
        with pytest.raises(ValueError, match="out must be two tensors that do not overlap"):
            sampler_step(m, m, table, 50, noise=key, out=(pair[0], pair[0]), return_x0=True)
        with pytest.raises(ValueError, match="out itself requires"):
            sampler_step(m, m, table, 50, noise=key, out=torch.empty(4, 100, requires_grad=True))


@on_every_backend
def test_autograd_sees_that_out_was_written(backend):
    """A backward pass that needs the old values of an overwritten tensor is an error, not a wrong gradient."""
    y, w = torch.randn(2, 50), torch.randn(2, 50, requires_grad=True)
    total = (w * y).sum()
    with use_backend(backend), torch.no_grad():
        sampler_step(y, torch.randn(2, 50), tables.ddim(VP, 10), 3, out=y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@on_every_backend
def test_operands_with_coefficient_0_are_not_read(backend):
    """A trajectory driven by a device-side step may pass an uninitialised history to the step that does not use it."""
    x, nothing = torch.randn(2, 40), torch.full((2, 40), math.nan)
    table, ddpm, first = tables.dpmpp_2m(VP, 10), tables.ddpm(VP), torch.tensor(0)
    with use_backend(backend):
        assert torch.equal(sampler_step(x, x, table, first, history=nothing), sampler_step(x, x, table, 0))
        assert sampler_step(x, x, table, torch.tensor(1), history=nothing).isnan().all()
        last = len(ddpm) - 1
        assert sampler_step(x, x, ddpm, last, noise=nothing).isfinite().all()
        assert sampler_step(x, x, ddpm, last, noise=nothing, known=x, mask=x > 0).isfinite().all()


@on_every_backend
@pytest.mark.parametrize("index", [-1, 100])
def test_index_values_are_checked_on_the_cpu(backend, index):
    x, bad = torch.randn(2, 5), torch.tensor([3, index])
    table, train = tables.ddpm(VP), tables.training(VP)
    with use_backend(backend):
        for call in (
            lambda: sampler_step(x, x, table, bad, noise=NoiseKey(0)),
            lambda: sampler_step(x, x, table, torch.tensor(index), noise=NoiseKey(0)),
            lambda: add_noise(x, train, bad, NoiseKey(0)),
            lambda: denoising_loss(x, x, train, bad, NoiseKey(0)),
        ):
            with pytest.raises(ValueError, match=rf"must be in \[0, 100\).*got {index}"):
                call()


@pytest.mark.parametrize("backend", ["auto"])
def test_float64_operands_go_to_the_reference(backend):
    """A float64 mask or noise with a float32 state works, in float64 arithmetic, and returns float32."""
    x, options = torch.randn(2, 30), EVERYTHING.options(torch.randn(2, 30))
    expected = sampler_step(x, x, EVERYTHING.table, EVERYTHING.step, **options)
    for name in ("noise", "known", "mask"):
        wide = {**options, name: options[name].double()}
        actual = sampler_step(x, x, EVERYTHING.table, EVERYTHING.step, **wide)
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        sampler_step(x, x.double(), EVERYTHING.table, EVERYTHING.step, **options), expected, rtol=1e-5, atol=1e-5
    )


def test_one_seed_a_trajectory(monkeypatch):
    """Without a key a run draws one seed, for known pixels of a deterministic sampler too."""
    drawn, draw = [], NoiseKey.draw
    monkeypatch.setattr(NoiseKey, "draw", lambda *a, **k: drawn.append(1) or draw(*a, **k))
    x = torch.randn(2, 8)
    denoiser = lambda x, time: x  # noqa: E731
    sample(denoiser, x, tables.ddim(VP, 10), known=x, mask=x > 0)
    assert len(drawn) == 1
    sample(denoiser, x, tables.ddpm(VP, 10))
    assert len(drawn) == 2
    sample(denoiser, x, tables.ddim(VP, 10))
    assert len(drawn) == 2


@pytest.mark.parametrize("backend", NATIVE)
def test_a_mask_with_a_gradient_takes_the_reference_and_says_so(backend, caplog):
    x, mask = torch.randn(2, 30), torch.rand(2, 30, requires_grad=True)
    table = tables.ddim(VP, 10)
    registry._log_once.cache_clear()  # another test may have had it logged
    with caplog.at_level(logging.INFO, logger="dgm_kernels"):
        new = sampler_step(x, x, table, 3, noise=NoiseKey(0), known=x, mask=mask)
    assert torch.autograd.grad(new.sum(), mask)[0].abs().sum() > 0
    assert "gradient of a mask" in caplog.text
    with use_backend(backend), pytest.raises(ValueError, match="gradient of a mask"):
        sampler_step(x, x, table, 3, noise=NoiseKey(0), known=x, mask=mask)
    with use_backend(backend), torch.no_grad():
        torch.testing.assert_close(sampler_step(x, x, table, 3, noise=NoiseKey(0), known=x, mask=mask), new)


def test_tables_made_in_inference_mode_serve_training():
    with torch.inference_mode():
        table, train = tables.ddim(VP, 10, clip=1.0), tables.training(VP)
    x, m = torch.randn(2, 5), torch.randn(2, 5, requires_grad=True)
    loss = denoising_loss(m, x, train, torch.tensor([1, 2]), NoiseKey(0)) + sampler_step(x, m, table, 3).sum()
    loss.backward()
    assert m.grad is not None


def test_numpy_numbers():
    x, table = torch.randn(2, 5), tables.ddpm(VP, np.int64(10))
    key = NoiseKey(np.uint64(3), first_sample=np.int32(1), step=np.int64(2))
    assert torch.equal(noise_like(x, key), noise_like(x, NoiseKey(3, 1, 2)))
    new = sampler_step(x, x, table, np.int64(3), noise=key, guidance=(x, np.float32(2.0)))
    assert torch.equal(new, sampler_step(x, x, table, 3, noise=NoiseKey(3, 1, 2), guidance=(x, 2.0)))
    for steps in (True, 2.0, "3"):
        with pytest.raises(ValueError, match="steps must be an int"):
            tables.ddpm(VP, steps)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: sampler_step(x, x, tables.ddim(VP), 0, noise="abc"), TypeError, "noise must be a NoiseKey"),
        (lambda x: sampler_step(x, x, tables.ddim(VP), 0, noise=x[0]), ValueError, "noise must have the shape"),
        (lambda x: sampler_step(x, x, tables.ddim(VP), True), TypeError, "step must be an int"),
        (lambda x: sampler_step(x.to(torch.float8_e4m3fn), x, tables.ddim(VP), 0), TypeError, "16, 32 or 64 bits"),
        (lambda x: NoiseKey(0, stream=torch.tensor(3)), TypeError, "stream must be an int, got"),
        (lambda x: NoiseKey(0, first_sample=torch.tensor(3)), TypeError, "first_sample must be an int, got"),
        (lambda x: tables.ddim(VP, clip=1.0, dynamic_threshold=0.9), ValueError, "dynamic_threshold and clip both"),
        (lambda x: tables.ddim(VP, clip="1"), ValueError, "clip must be"),
        (lambda x: tables.ddim(VP, clip=("1", "2")), ValueError, "clip must be"),
        (lambda x: tables.ddim(VP, eta="1"), TypeError, "eta must be a number"),
        (lambda x: tables.ddim(VP, dynamic_threshold="a"), ValueError, "dynamic_threshold must be"),
        (lambda x: tables.ddim(VP, dynamic_threshold=(0.9, 2, 3)), ValueError, "dynamic_threshold must be"),
        (lambda x: tables.euler_ancestral(VP, 9, eta=math.inf), ValueError, "eta must be non-negative and finite"),
        (lambda x: tables.predictor_corrector(VP, snr=1.0), ValueError, r"snr must be in \(0, 1\)"),
        (lambda x: tables.training(VP, weighting=torch.full((100,), math.inf)), ValueError, "weighting must hold"),
        (lambda x: NoiseKey(0, samples=[0, 1]), TypeError, "samples must be an int64 tensor, got list"),
        (lambda x: Schedule.from_betas("abc"), TypeError, "betas must be a sequence of numbers"),
        (lambda x: Schedule.from_betas([0.999] * 200), ValueError, "no signal is left"),
        (lambda x: Schedule.from_betas([1e-17, 1e-3]), ValueError, r"betas\[0\] = 1e-17 is too small"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(2, 5))


def test_dynamic_threshold_is_dynamic():
    """A sample beyond 1 is divided by its own quantile; a cap of 1 would make it a plain clip."""
    x, m = torch.zeros(2, 1000), torch.stack([torch.linspace(-3, 3, 1000), torch.linspace(-0.5, 0.5, 1000)])
    _, x0 = sampler_step(x, m, tables.ddim(VP, 10, prediction="x0", dynamic_threshold=0.9), 3, return_x0=True)
    s = torch.quantile(m[0].abs(), 0.9)
    torch.testing.assert_close(x0[0], m[0].clamp(-s, s) / s)
    torch.testing.assert_close(x0[1], m[1])


def test_tables_stay_finite():
    """Rounding on a repeated last node must not make a variance negative; one step starts from the noisiest level."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        schedule = Schedule.from_betas(torch.rand(3, generator=generator, dtype=torch.float64) * 0.5 + 1e-3)
        assert tables.ddim(schedule, eta=1.0, final="first").rows64[:, 4:].isfinite().all()
    ladder = Schedule.karras(100)
    assert tables.euler(ladder, 1).initial_sigma == pytest.approx(80.0)
    assert tables.euler(Schedule.geometric(5, 1e-5, 1e-3)).initial_sigma == pytest.approx(1e-3)


def test_noise_keys_compare_by_identity():
    key: NoiseKey = NoiseKey(0, samples=torch.arange(3))
    assert key in [key]
    assert len({key, NoiseKey(0, samples=torch.arange(3))}) == 2


def test_no_elements() -> None:
    table = tables.ddim(VP, 10, dynamic_threshold=0.9)
    for shape in ((2, 0), (0, 3), (2, 0, 3)):
        x: Tensor = torch.empty(shape)
        assert sampler_step(x, x, table, 3).shape == shape


@pytest.mark.parametrize("backend", NATIVE)
def test_direct_calls_of_the_ops_are_checked(backend):
    """What the public functions never pass is refused, not dereferenced."""
    x, rows, train, t = torch.randn(2, 5), tables.ddpm(VP).rows, tables.training(VP).rows, torch.tensor([1, 2])
    nothing = NO_NOISE
    step = (x, x, rows, None, 3, *nothing, None, None, 1.0)
    for call, message in (
        (lambda: op.sampler_step[backend](*step, x, None, None, False, False), "known and mask go together"),
        (lambda: op.add_noise[backend](x, train, t, *nothing), "noise must be a tensor or a key"),
        (lambda: op.denoising_loss[backend](x, x, train, t, *nothing, False), "noise must be a tensor or a key"),
        (lambda: op.noise_like[backend](x, *nothing[:-1], 256, 0), r"stream must be in \[0, 256\)"),
        (lambda: op.add_noise[backend](x, train[:, :4], t, *nothing), r"rows must be \[steps, 8\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="model_output must be a floating-point tensor"):
        op.sampler_step[backend](x, x > 0, rows, None, 3, *nothing, None, None, 1.0, None, None, None, False, False)


@on_every_backend
def test_masks_of_any_true_byte(backend):
    """A bool tensor that was made from other bytes than 0 and 1 is True where it is not 0."""
    x, mask = torch.zeros(1, 4), torch.tensor([[0, 1, 255, 2]], dtype=torch.uint8).view(torch.bool)
    with use_backend(backend):
        new = sampler_step(x, x, tables.ddpm(VP), 99, noise=NoiseKey(0), known=torch.ones(1, 4), mask=mask)
    assert new.tolist() == [[0.0, 1.0, 1.0, 1.0]]


@on_every_backend
def test_a_nan_in_the_data_reaches_the_loss(backend):
    x0 = torch.randn(2, 5)
    x0[0, 3] = math.nan
    with use_backend(backend):
        loss = denoising_loss(
            torch.randn(2, 5), x0, tables.training(VP), torch.tensor([1, 2]), NoiseKey(0), reduction="none"
        )
    assert loss.isnan().tolist() == [True, False]


def test_partial_overlap_across_dtypes_is_seen():
    """The last element of `out` and the first one of an input share two bytes."""
    buffer = torch.zeros(600)
    m = buffer.view(torch.bfloat16)[599:899].view(1, 300)
    m.fill_(0.5)
    x, out = torch.randn(1, 300), buffer[:300].view(1, 300)
    expected = sampler_step(x, m.clone(), tables.ddim(VP, 10), 3)
    assert torch.equal(sampler_step(x, m, tables.ddim(VP, 10), 3, out=out), expected)


def test_pickles_leave_device_copies_behind():
    table = tables.ddim(VP, 10)
    table._on_device[torch.device("meta")] = table.rows.to("meta")
    again = pickle.loads(pickle.dumps(table))
    assert set(again._on_device) == {torch.device("cpu")}
    assert torch.equal(again.rows, table.rows)
    assert torch.equal(copy.deepcopy(table).rows64, table.rows64)


def test_the_loop_compiles_and_checks_its_arguments():
    table, key = tables.heun(VP, 4), NoiseKey(0)
    x = noise_like(torch.empty(2, 8), NoiseKey(0, stream=1))
    run = lambda x: sample(lambda x, time: 0.1 * x * time[:, None], x, table, noise=key)  # noqa: E731
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))
    with pytest.raises(TypeError, match="noise must be a NoiseKey, new noise for every step"):
        sample(lambda x, time: x, x, table, noise=x)
    with pytest.raises(TypeError, match="table must be a SamplerTable"):
        sample(lambda x, time: x, x, tables.training(VP))
    with pytest.raises(TypeError, match="x must be a tensor"):
        sample(lambda x, time: x, [1.0], table)


class _Stream(enum.IntEnum):
    OWN = 3


def test_enums_are_numbers():
    x = torch.randn(2, 4)
    expected = noise_like(x, NoiseKey(0, stream=3))
    assert torch.equal(noise_like(x, NoiseKey(0, stream=_Stream.OWN)), expected)
    compiled = torch.compile(lambda x: noise_like(x, NoiseKey(0, stream=_Stream.OWN)), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), expected)
