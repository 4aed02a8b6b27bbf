"""The drop-in schedulers in use: what is left to diffusers, configuration, pipelines, tensors on a device."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import logging
import pickle
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import DDIMPipeline, DDPMPipeline, DiffusionPipeline, UNet2DModel

from dgm_kernels.integrations import diffusers as fast
from dgm_kernels.integrations.diffusers import FastDDIMScheduler, FastDDPMScheduler
from tests.contract import assert_never_waits
from tests.diffusers_pairs import PAIRS, SHAPE, assert_same, check_against_diffusers, pair, spy


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the fused ops that the schedulers call."""
    return spy(monkeypatch)


LEFT_TO_DIFFUSERS = {
    "churn": ("euler", {}, {"s_churn": 5.0, "s_noise": 1.1}, "s_churn"),
    "zero_snr_epsilon": ("ddpm", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, {}, "not finite"),
    "zero_snr_epsilon_ddim": ("ddim", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, {}, "finite"),
    "eta_above_1": ("ddim", {}, {"eta": 3.0}, "not finite"),
    "fixed_large_log": ("ddpm", {"variance_type": "fixed_large_log"}, {}, "fixed_large_log"),
    "zero_range": ("ddpm", {"clip_sample_range": 0.0}, {}, "clip_sample_range"),
}


@pytest.mark.parametrize("case", LEFT_TO_DIFFUSERS)
def test_left_to_diffusers(case: str, calls: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """What has no table runs diffusers' own step, and the log says so, once."""
    name, config, options, reason = LEFT_TO_DIFFUSERS[case]
    fast._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="dgm_kernels"):
        check_against_diffusers(*pair(name, **config), **options)
    assert calls == []
    messages = [r.getMessage() for r in caplog.records if "runs the code of diffusers" in r.getMessage()]
    assert len(messages) == 1
    assert reason in messages[0]


@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler"])
def test_float64_is_left_to_diffusers(name: str, calls: list[str]) -> None:
    """float64 has no native backend, so nothing is gained."""
    theirs, ours = pair(name)
    x, m = torch.randn(2, *SHAPE, dtype=torch.float64)
    for scheduler in (theirs, ours):
        scheduler.scale_model_input(x, scheduler.timesteps[2])
    results = [s.step(m, s.timesteps[2], x, generator=torch.Generator().manual_seed(0)) for s in (theirs, ours)]
    assert torch.equal(results[1].prev_sample, results[0].prev_sample)
    assert calls == []


def test_bad_input() -> None:
    """Errors are those of diffusers."""
    x = torch.randn(SHAPE)
    ddpm, ddim, euler = (PAIRS[name][1]() for name in PAIRS)
    with pytest.raises(ValueError, match="run 'set_timesteps'"):
        ddim.step(x, 3, x)
    for scheduler in (ddpm, ddim, euler):
        scheduler.set_timesteps(10)
    with pytest.raises(IndexError):
        ddpm.step(x, 123, x)  # not on the schedule
    with pytest.raises(IndexError):
        ddim.step(x, 1000, x)
    with pytest.raises(ValueError, match="Passing integer indices"):
        euler.step(x, 3, x)
    for scheduler, t in ((ddpm, 100), (ddim, 100), (euler, euler.timesteps[0])):
        with pytest.raises(RuntimeError, match="size of tensor"):
            scheduler.step(torch.randn(2, 5, 8, 8), t, x)
    learned = FastDDPMScheduler(variance_type="learned_range")
    with pytest.raises(TypeError):
        learned.step(x, 500, x)  # no channels for the variance
    unknown = FastDDIMScheduler(prediction_type="score")
    unknown.set_timesteps(10)
    with pytest.raises(ValueError, match="prediction_type given as score"):
        unknown.step(x, 100, x)
    with pytest.raises(IndexError):
        for _ in range(11):
            euler.scale_model_input(x, euler.timesteps[0])
            euler.step(x, euler.timesteps[0], x)


def test_changes_are_seen() -> None:
    """Replacing or writing to what the coefficients come from takes effect at the next step."""
    for change in ("write", "replace", "config"):
        theirs, ours = pair("ddim")
        x, m = torch.randn(2, *SHAPE)
        ours.step(m, ours.timesteps[1], x)
        for scheduler in (theirs, ours):
            if change == "write":
                scheduler.alphas_cumprod[:] *= 0.9
            elif change == "replace":
                scheduler.alphas_cumprod = scheduler.alphas_cumprod * 0.9
            else:
                scheduler.register_to_config(prediction_type="v_prediction")
        expected, result = (s.step(m, s.timesteps[1], x).prev_sample for s in (theirs, ours))
        assert_same(result, expected)


def test_inference_mode() -> None:
    """Timesteps made in inference mode have no version counter."""
    with torch.inference_mode():
        check_against_diffusers(*pair("ddpm"))


# Configuration and pipelines.


@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler"])
def test_configuration(name: str, tmp_path: Any) -> None:
    """from_config both ways, save_config, from_pretrained, copies and the signatures that pipelines look at."""
    own, ours = PAIRS[name]
    theirs = own(prediction_type="v_prediction", beta_end=0.03, timestep_spacing="trailing")
    scheduler = ours.from_config(theirs.config)
    assert scheduler.config.prediction_type == "v_prediction"
    assert torch.equal(scheduler.alphas_cumprod, theirs.alphas_cumprod)
    scheduler.save_config(tmp_path)
    for again in (
        ours.from_pretrained(tmp_path),
        own.from_config(scheduler.config),
        ours.from_config(scheduler.config),
    ):
        assert again.config.beta_end == 0.03
        assert again.config.timestep_spacing == "trailing"
    assert inspect.signature(own.step).parameters.keys() == inspect.signature(ours.step).parameters.keys()
    assert isinstance(scheduler, own)
    for s in (theirs, scheduler):
        s.set_timesteps(3)
    check_against_diffusers(theirs, scheduler)
    for copied in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        for s in (theirs, copied):
            s.set_timesteps(3)
        check_against_diffusers(theirs, copied)


@pytest.fixture(scope="module")
def unet() -> UNet2DModel:
    """A U-Net of some thousand parameters."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return UNet2DModel(8, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4, **blocks).eval()


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_pipelines(name: str, unet: UNet2DModel, calls: list[str]) -> None:
    """The pipelines of diffusers give the same images."""
    pipeline, options = (DDPMPipeline, {}) if name == "ddpm" else (DDIMPipeline, {"eta": 0.5})
    images = []
    for kind in PAIRS[name]:
        pipe = pipeline(unet, kind(num_train_timesteps=100))
        pipe.scheduler = kind.from_config(pipe.scheduler.config)  # DDIMPipeline made a DDIMScheduler of ours
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(torch.from_numpy(pipe(2, generator, num_inference_steps=6, output_type="np", **options).images))
    assert calls == ["sampler_step"] * 6
    torch.testing.assert_close(images[1], images[0], rtol=0.0, atol=1e-5)


def test_saved_pipeline(unet: UNet2DModel, tmp_path: Any) -> None:
    """A pipeline is saved and loaded with our scheduler in it."""
    DDPMPipeline(unet, FastDDPMScheduler(num_train_timesteps=100)).save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, unet=unet)
    assert type(loaded.scheduler) is FastDDPMScheduler
    assert loaded.scheduler.config.num_train_timesteps == 100


def test_without_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the package that is missing."""
    for module in [name for name in sys.modules if name.split(".")[0] == "diffusers"]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "dgm_kernels.integrations.diffusers")
    with pytest.raises(ImportError, match="needs the package diffusers"):
        importlib.import_module("dgm_kernels.integrations.diffusers")


# Device tensors.


@pytest.mark.parametrize(
    ("name", "config", "options"),
    [
        ("ddpm", {}, {}),
        ("ddpm", {"variance_type": "learned_range", "thresholding": True}, {}),
        ("ddim", {}, {"eta": 1.0}),
        ("ddim", {"thresholding": True}, {}),
        ("euler", {}, {}),
    ],
)
def test_no_step_reads_a_tensor(name: str, config: dict, options: dict, calls: list[str]) -> None:
    """Meta tensors have no values: a step that asked for one would raise. (DDPM at timestep 0: see the GPU test.)"""
    ours = PAIRS[name][1](**config)
    ours.set_timesteps(**({"timesteps": [900, 500, 100]} if name == "ddpm" else {"num_inference_steps": 3}))
    x = torch.empty(SHAPE, device="meta")
    m = torch.cat([x, x], dim=1) if "variance_type" in config else x
    if name == "euler":
        ours.set_begin_index(0)
    for _ in range(3):
        t = torch.empty((), dtype=torch.float32 if name == "euler" else torch.int64, device="meta")
        ours.scale_model_input(x, t)
        new, x0 = ours.step(m, t, x, return_dict=False, **options)
        assert new.shape == x0.shape == x.shape
    assert calls == ["sampler_step"] * 3


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "options"), [("ddpm", {}), ("ddim", {"eta": 1.0}), ("ddim", {}), ("euler", {})])
def test_no_step_waits_for_the_gpu(name: str, options: dict) -> None:
    """After the first step nothing synchronizes; the numbers are those of diffusers on the same device."""
    device = torch.device("cuda")
    theirs, ours = pair(name, {"num_inference_steps": 6, "device": device})
    inputs = torch.randn(6, 2, *SHAPE, device=device)
    results = []
    for scheduler in (theirs, ours):
        generator, trajectory = torch.Generator(device).manual_seed(2), []
        for step, (t, (x, m)) in enumerate(zip(scheduler.timesteps, inputs, strict=True)):
            with assert_never_waits() if scheduler is ours and step else contextlib.nullcontext():
                scheduler.scale_model_input(x, t)
                trajectory.append(scheduler.step(m, t, x, generator=generator, **options))
        results.append((trajectory, generator.get_state()))
    for theirs_, ours_ in zip(results[0][0], results[1][0], strict=True):
        assert_same(ours_.prev_sample, theirs_.prev_sample)
        assert_same(ours_.pred_original_sample, theirs_.pred_original_sample)
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.gpu
def test_timestep_copied_on_the_gpu(caplog: pytest.LogCaptureFixture) -> None:
    """A timestep that is no element of scheduler.timesteps costs DDPM a wait, never another draw from the generator."""
    device = torch.device("cuda")
    _, ours = pair("ddpm", {"num_inference_steps": 4, "device": device})
    x = torch.randn(SHAPE, device=device)
    generator = torch.Generator(device).manual_seed(0)
    state = generator.get_state()
    fast._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="dgm_kernels"):
        ours.step(x, ours.timesteps[-1].clone(), x, generator=generator)
    assert int(ours.timesteps[-1]) == 0
    assert torch.equal(generator.get_state(), state)
    assert any("waits for the device" in r.getMessage() for r in caplog.records)


def test_elements_are_told_by_their_address() -> None:
    """Only elements of the very tensor count: neither equal values nor other tensors."""
    values = torch.tensor([900, 500, 0])
    assert [fast._element(values, t) for t in values] == [0, 1, 2]
    assert [fast._element(values, t) for t in values[1:]] == [1, 2]
    assert fast._element(values, values[2:3].reshape(())) == 2
    for other in (values[0].clone(), torch.tensor(500), values[0].int(), values.flip(0)[0]):
        assert fast._element(values, other) is None
    assert fast._element(values[::2], values[1]) is None
    _, ours = pair("ddpm", 4)
    drawn = [ours._draws(ours._steps(), t) for t in ours.timesteps]
    assert drawn == [True, True, True, False]
