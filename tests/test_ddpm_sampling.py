"""Row F2 of docs/models.md, sampling of ``ddpm``: samplers, guidance, inpainting; noise, times and dtypes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import dgm_kernels
from dgm_kernels import NoiseKey, noise_like, tables
from dgm_models.data import Dataset, Split, digits
from dgm_models.ddpm import SAMPLERS
from dgm_models.train import Settings, Trainer
from tests.ddpm_models import gaussian_model, small_model


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_F2_samplers_draw_from_the_data_distribution(sampler: str) -> None:
    """With the best denoiser; the tolerance covers the error of the steps and of 2000 samples of 2 elements."""
    x = gaussian_model(timesteps=1000, schedule="linear").sample(2000, seed=1, sampler=sampler)
    assert abs(float(x.mean()) - 0.3) < 0.05
    assert abs(float(x.std()) - 0.7) < 0.05
    assert abs(float(torch.corrcoef(x.T)[0, 1])) < 0.1


def test_F2_probability_flow_wants_small_betas() -> None:
    """What the note on SAMPLERS says."""
    options = {"n": 4000, "seed": 3}
    for schedule, sampler, std in (
        ("linear", "probability_flow", 0.71),
        ("cosine", "probability_flow", 1.41),
        ("cosine", "ddim", 0.70),
    ):
        x = gaussian_model(timesteps=1000, schedule=schedule).sample(sampler=sampler, **options)
        assert float(x.std()) == pytest.approx(std, rel=0.04), (schedule, sampler)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m", "heun"])
@pytest.mark.parametrize("guidance", [0.0, 2.5])
def test_F2_guidance_extrapolates_between_the_two_predictions(sampler: str, guidance: float) -> None:
    model, label = small_model(num_classes=3), torch.tensor([0, 2, 1, 1])

    def mixed(x: Tensor, time: Tensor) -> Tensor:
        with_class, without = model.denoise(x, time, label), model.denoise(x, time)
        return without + guidance * (with_class - without)

    table = model.sampler_table(sampler)
    start = noise_like(torch.empty(4, 1, 8, 8), NoiseKey(6, stream=1)) * table.initial_sigma
    with torch.no_grad():
        expected = dgm_kernels.sample(mixed, start, table, noise=NoiseKey(6))
    samples = model.sample(4, seed=6, cond=label, sampler=sampler, guidance=guidance)
    torch.testing.assert_close(samples, expected, rtol=1e-5, atol=1e-5)
    assert (samples - model.sample(4, seed=6, cond=label, sampler=sampler)).abs().max() > 1e-3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_F2_known_pixels_are_kept(sampler: str) -> None:
    model, known = small_model(), digits().test.x[:5]
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, :4] = True
    options = {"seed": 2, "sampler": sampler}
    samples = model.sample(5, known=known, mask=mask, **options)
    torch.testing.assert_close(samples[:, :, :4], known[:, :, :4], rtol=0, atol=0)
    assert samples.isfinite().all()
    assert not torch.equal(samples[:, :, 4:], known[:, :, 4:])
    assert not torch.equal(samples[:, :, 4:], model.sample(5, **options)[:, :, 4:]), "the rest is painted to go with it"
    in_parts = model.sample(5, batch_size=2, known=known, mask=mask.expand(1, 1, 8, 8), **options)
    torch.testing.assert_close(in_parts, samples, rtol=1e-4, atol=1e-4)
    last = model.trajectory(5, known=known, mask=mask, **options)[-1][1]
    assert torch.equal(last, samples)


def test_F2_known_pixels_refuse_bad_input() -> None:
    model, known = small_model(), torch.zeros(2, 1, 8, 8)
    with pytest.raises(ValueError, match="known must have one entry for each of the 4 samples, or one"):
        model.sample(4, batch_size=2, known=known, mask=torch.ones(8, 8))
    with pytest.raises(ValueError, match="known and mask go together"):
        model.sample(2, known=known)
    with pytest.raises(TypeError, match="mask must be a tensor, got int"):
        model.sample(2, known=known, mask=1)


def test_F2_sample_options() -> None:
    model = small_model()
    table = tables.ddim(model.schedule, 5, clip=1.0)
    assert torch.equal(model.sample(2, sampler=table), model.sample(2, sampler="ddim", steps=5))
    assert model.sample(8, sampler="ddim", steps=5).abs().max() <= 1.0
    thresholded = tables.ddim(model.schedule, 5, dynamic_threshold=0.995)
    expected = model.sample(2, sampler=thresholded)
    assert torch.equal(model.sample(2, sampler="ddim", steps=5, dynamic_threshold=0.995), expected)
    assert not torch.equal(model.sample(2, sampler="ddim", steps=5, dynamic_threshold=None), expected)
    with pytest.raises(ValueError, match="give one of them"):
        model.sample(2, sampler="ddim", clip=1.0, dynamic_threshold=0.995)
    with pytest.raises(ValueError, match=r"sampler must be a table or one of ddim, ddpm, .* got 'leapfrog'"):
        model.sample(2, sampler="leapfrog")
    with pytest.raises(ValueError, match="sampler must be a table for prediction 'eps', got 'v'"):
        model.sample(2, sampler=tables.ddim(model.schedule, 5, prediction="v"))
    with pytest.raises(ValueError, match="steps and options belong to a sampler given by its name"):
        model.sample(2, sampler=table, steps=3)


def test_F2_unknown_options_are_named_with_those_there_are() -> None:
    model = small_model()
    own = "n, seed, cond, first_sample, batch_size, sampler, steps, guidance, known, mask, callback"
    expected = f"^sample with sampler 'ddpm' has no option 'foo'; its options are {own}, variance, clip, "
    with pytest.raises(TypeError, match=expected):
        model.sample(2, foo=1)
    with pytest.raises(TypeError, match=r"^sample with sampler 'ddim' has no option 'variance'; .*, eta, clip, "):
        model.sample(2, sampler="ddim", variance="fixed_large")
    expected = r"^trajectory with sampler 'ddpm' has no option 'batch_size'; its options are n, .*, frames, .*, clip, "
    with pytest.raises(TypeError, match=expected):
        model.trajectory(2, batch_size=1)
    expected = "^sampler_table with sampler 'euler' has no option 'prediction'; its options are sampler, steps, clip, "
    with pytest.raises(TypeError, match=expected):
        model.sampler_table("euler", prediction="v")


@pytest.mark.parametrize("sampler", ["ddpm", "euler", "heun"])
def test_F2_trajectory_goes_from_the_noise_to_the_sample(sampler: str) -> None:
    model = small_model()
    frames = model.trajectory(3, seed=4, first_sample=2, sampler=sampler, frames=5)
    labels, states = zip(*frames, strict=True)
    assert len(frames) == 5
    assert labels[0] == "t = 20"
    assert labels[-1] == "t = 0"
    noise = noise_like(torch.empty(3, 1, 8, 8), NoiseKey(4, first_sample=2, stream=1))
    tolerance = 0.02  # the scaled state of euler and heun starts with sigma_T, not 1
    torch.testing.assert_close(states[0], noise, rtol=tolerance, atol=tolerance)
    assert torch.equal(states[-1], model.sample(3, seed=4, first_sample=2, sampler=sampler))


# Noise and times


def correlation(a: Tensor, b: Tensor) -> float:
    return abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]))


def test_training_sampling_and_the_bound_share_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """From one seed: step 7 of training, validation and the bound, row 7 of a sampler, and where the paths start."""
    model = small_model(clip=None, levels=None, prediction="x0")
    x, seen = torch.zeros(64, 1, 8, 8), []

    def zeros(x: Tensor, time: Tensor, label: Tensor | None) -> Tensor:
        seen.append(x / model.schedule.sigma_t[time.long()].float()[:, None, None, None])
        return torch.zeros_like(x)

    monkeypatch.setattr(model.denoiser, "forward", zeros)

    def noise_of(call: Callable[[], object], place: int = 0) -> Tensor:
        seen.clear()
        call()
        return seen[place]

    split = Split(x, torch.zeros(64, dtype=torch.int64))
    trainer = Trainer(model, Dataset(split, split, split), Settings(validation_draws=8))
    states = [torch.zeros_like(x)] * 8
    model.sample(64, callback=lambda step, state: states.__setitem__(step % 8, state) if step <= 7 else None)
    row = model.sampler_table("ddpm").rows64[7].float()
    noises = {
        "sampler": (states[7] - row[4] * states[6]) / row[8],
        "initial state": noise_of(lambda: model.sample(64)),
        "training": noise_of(lambda: model.loss(x, key=NoiseKey(0, step=7))),
        "validation": noise_of(trainer.validation_loss, 7),
        "bound": noise_of(lambda: model.elbo(x, times=20), 6),
        "bound, step 20": noise_of(lambda: model.elbo(x, times=20), 19),
        "paths, step 20": noise_of(lambda: model.elbo(x[:32], k=2)),
    }
    for name, noise in noises.items():
        assert float(noise.std()) == pytest.approx(1.0, abs=0.05), name
        for other, values in noises.items():
            assert name == other or correlation(noise, values) < 0.08, (name, other)
    expected = noise_like(x, NoiseKey(0, step=7))
    torch.testing.assert_close(noises["sampler"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_times_do_not_depend_on_the_dtype(dtype: torch.dtype) -> None:
    x, times = torch.zeros(20_000, 2), {}
    for kind in (torch.float32, dtype):
        model = small_model(image_shape=(2,), timesteps=1000, num_classes=3).to(kind)
        seen: list[Tensor] = []
        model.denoiser.forward = lambda x, time, label, seen=seen: (seen.append((time, label)), x)[1]
        model.loss(x.to(kind), torch.ones(20_000, dtype=torch.int64), key=NoiseKey(1))
        times[kind] = seen[0]
    (time, label), (expected, expected_label) = times[dtype], times[torch.float32]
    assert time.dtype == torch.float32
    assert torch.equal(time, expected)
    assert torch.equal(label, expected_label)
    assert torch.bincount(time.long(), minlength=1000).min() > 0, "every time is reached"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_embedding_of_a_time_does_not_depend_on_the_dtype(dtype: torch.dtype) -> None:
    model = small_model(timesteps=1000).to(dtype)
    seen: list[Tensor] = []
    model.denoiser.condition.first.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    time = torch.tensor([997, 996])
    model.denoise(torch.zeros(2, 1, 8, 8, dtype=dtype), time)
    frequencies = 10_000.0 ** (-torch.arange(16, dtype=torch.float64) / 16)
    angles = time[:, None] * frequencies
    expected = torch.cat([angles.cos(), angles.sin()], 1)
    torch.testing.assert_close(seen[0].double(), expected, rtol=0, atol=torch.finfo(dtype).eps)
    seen.clear()
    model.sample(1, sampler="ddim", steps=250)
    first = model.sampler_table("ddim", 250).times[:1] * frequencies
    expected = torch.cat([first.cos(), first.sin()])
    torch.testing.assert_close(seen[0][0].double(), expected, rtol=0, atol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("k", [1, 4])
def test_the_bound_of_a_16_bit_model_is_that_of_its_weights(k: int) -> None:
    """Near that in float32; its own noise and its sums are not in 16 bits."""
    model, x = small_model(timesteps=50), digits().test.x[:20]
    half = small_model(timesteps=50).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    found, expected = half.elbo(x.to(torch.bfloat16), k=k), model.elbo(x, k=k)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.0)
