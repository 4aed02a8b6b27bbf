"""The sampler tables against the schedulers of diffusers: whole trajectories, the same denoiser and the same noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)

from dgm_kernels import SamplerTable, Schedule, sampler_step, tables

PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
# Both schedulers on the schedule in float64 with a denoiser that answers to the state; and diffusers as it comes, in
# float32, with the same model outputs for both.
MODELS = ("denoiser", "given")
SPACINGS = ("leading", "linspace", "trailing")
STEPS = 10  # linspace over 1000 entries: every 111th, so that no timestep is rounded
SHAPE = (8, 3, 2, 2)
SCHEDULE = Schedule.linear()
Model = Callable[[Tensor, float], Tensor]
BOUNDS = {
    "free": ({}, {"clip_sample": False}),
    "clip": ({"clip": 0.8}, {"clip_sample": True, "clip_sample_range": 0.8}),
    "threshold": (
        {"dynamic_threshold": (0.9, 1.2)},
        {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.2},
    ),
}


def given() -> Model:
    """Model outputs that do not depend on the state."""
    return lambda x, t: torch.randn(x.shape, generator=torch.Generator().manual_seed(int(t)))


def denoiser(prediction: str) -> Model:
    """Predicts a bounded function of the state as the clean sample, and says it as eps, x0 or v."""
    weight = torch.randn(12, 12, generator=torch.Generator().manual_seed(1)) / 12**0.5

    def predict(x: Tensor, t: float) -> Tensor:
        alpha, sigma = float(SCHEDULE.alpha_t[int(t)]), float(SCHEDULE.sigma_t[int(t)])
        x0 = 1.3 * torch.tanh(x.flatten(1) @ weight + t / 1000).view_as(x)
        eps = (x - alpha * x0) / sigma
        return {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[prediction]

    return predict


def run_diffusers(scheduler: Any, x: Tensor, predict: Model, **options: Any) -> Tensor:
    """The last state of diffusers' scheduler."""
    for t in scheduler.timesteps:
        m = predict(scheduler.scale_model_input(x, t), float(t))
        x = scheduler.step(m, t, x, **options).prev_sample
    return x


def run_table(table: SamplerTable, x: Tensor, predict: Model, generator: torch.Generator | None = None) -> Tensor:
    """The last state of a table; noise is drawn as diffusers draws it."""
    previous = None
    for step in range(len(table)):
        m = predict(x * float(table.input_scale[step]), float(table.times[step]))
        last_of_ddpm = table.name == "ddpm" and table.times[step] == 0
        noise = torch.randn(x.shape, generator=generator) if table.stochastic and not last_of_ddpm else None
        history = previous if table.needs_history[step] else None
        new, x0 = sampler_step(x, m, table, step, noise=noise, history=history, return_x0=True)
        previous = x0 if table.history == "x0" else x
        x = new
    return x


def prepared(kind: Any, model: str, prediction: str, spacing: str, **config: Any) -> tuple[Any, Model]:
    """A scheduler of diffusers on the linear schedule, and the model to run it with.

    Its own alphas_cumprod are float32, and 1 - alphas_cumprod has lost four digits at the clean end: enough to move the
    last steps by 1e-4 if the model answers to the state. The tables are exact, so diffusers is given the exact numbers.
    """
    scheduler = kind(prediction_type=prediction, timestep_spacing=spacing, beta_start=1e-4, beta_end=0.02, **config)
    if model == "given":
        return scheduler, given()
    scheduler.alphas_cumprod = SCHEDULE.alphas_cumprod
    if not config.get("set_alpha_to_one", True):
        scheduler.final_alpha_cumprod = SCHEDULE.alphas_cumprod[0]
    return scheduler, denoiser(PREDICTIONS[prediction])


def start(scheduler: Any) -> tuple[Tensor, torch.Generator, torch.Generator]:
    """An initial state, and two equal generators.

    The state is scaled as diffusers wants it: tables of the unscaled state begin at sigma, diffusers with 'leading' at
    sqrt(sigma^2 + 1).
    """
    generators = (torch.Generator().manual_seed(2) for _ in range(2))
    return torch.randn(SHAPE) * float(scheduler.init_noise_sigma), *generators


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Equal to 1e-5 (of the largest number, if that is above 1)."""
    size = float(theirs.abs().max())
    assert size > 0.3
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * max(size, 1.0))


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize(
    ("spacing", "variance"),
    # 'trailing' ends at timestep 99, where diffusers adds noise to the clean sample; our last step adds none.
    [("leading", "fixed_small"), ("leading", "fixed_large"), ("linspace", "fixed_large"), ("trailing", "fixed_small")],
)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("model", MODELS)
def test_ddpm(model: str, prediction: str, spacing: str, variance: str, bounds: str) -> None:
    """Ancestral sampling."""
    ours, config = BOUNDS[bounds]
    theirs, predict = prepared(DDPMScheduler, model, prediction, spacing, variance_type=variance, **config)
    theirs.set_timesteps(STEPS)
    name = PREDICTIONS[prediction]
    table = tables.ddpm(SCHEDULE, STEPS, prediction=name, variance=variance, spacing=spacing, **ours)
    x, ours_generator, generator = start(theirs)
    assert_same(run_table(table, x, predict, ours_generator), run_diffusers(theirs, x, predict, generator=generator))


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("final", ["one", "first"])
@pytest.mark.parametrize(("eta", "clipped"), [(0.0, False), (0.5, False), (0.5, True), (1.0, False)])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])  # from 999, 'linspace' of diffusers steps to 899, not 888
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("model", MODELS)
def test_ddim(model: str, prediction: str, spacing: str, eta: float, clipped: bool, final: str, bounds: str) -> None:
    """Implicit sampling."""
    ours, config = BOUNDS[bounds]
    theirs, predict = prepared(DDIMScheduler, model, prediction, spacing, set_alpha_to_one=final == "one", **config)
    theirs.set_timesteps(STEPS)
    name = PREDICTIONS[prediction]
    options: dict[str, Any] = {"eta": eta, "use_clipped_model_output": clipped}
    table = tables.ddim(SCHEDULE, STEPS, prediction=name, final=final, spacing=spacing, **options, **ours)
    x, ours_generator, generator = start(theirs)
    expected = run_diffusers(theirs, x, predict, generator=generator, **options)
    assert_same(run_table(table, x, predict, ours_generator), expected)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("kind", "build"), [(EulerDiscreteScheduler, tables.euler), (HeunDiscreteScheduler, tables.heun)]
)
def test_euler_and_heun(
    kind: Any, build: Callable[..., SamplerTable], model: str, prediction: str, spacing: str
) -> None:
    """First and second order steps on the unscaled state."""
    theirs, predict = prepared(kind, model, prediction, spacing)
    theirs.set_timesteps(STEPS)
    name = PREDICTIONS[prediction]
    x, *_ = start(theirs)
    table = build(SCHEDULE, STEPS, prediction=name, spacing=spacing)
    assert_same(run_table(table, x, predict), run_diffusers(theirs, x, predict))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])  # diffusers has no 'sample' here
@pytest.mark.parametrize("model", MODELS)
def test_euler_ancestral(model: str, prediction: str, spacing: str) -> None:
    """Euler steps with noise."""
    theirs, predict = prepared(EulerAncestralDiscreteScheduler, model, prediction, spacing)
    theirs.set_timesteps(STEPS)
    name = PREDICTIONS[prediction]
    table = tables.euler_ancestral(SCHEDULE, STEPS, prediction=name, spacing=spacing)
    x, ours_generator, generator = start(theirs)
    assert_same(run_table(table, x, predict, ours_generator), run_diffusers(theirs, x, predict, generator=generator))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(  # diffusers' solver has no clipping; in float32 its bounded samples are off by 3e-5
    ("model", "bounds"), [("denoiser", "free"), ("denoiser", "threshold"), ("given", "free")]
)
def test_dpmpp_2m(model: str, prediction: str, spacing: str, bounds: str) -> None:
    """DPM-Solver++; on the timesteps of the table, for diffusers' solver spaces its own in another way."""
    ours, config = BOUNDS[bounds]
    config = {key: value for key, value in config.items() if key != "clip_sample"}
    name = PREDICTIONS[prediction]
    table = tables.dpmpp_2m(SCHEDULE, STEPS, prediction=name, spacing=spacing, **ours)
    theirs, predict = prepared(
        DPMSolverMultistepScheduler, model, prediction, spacing, final_sigmas_type="zero", **config
    )
    theirs.set_timesteps(timesteps=table.times.long().tolist())
    x, *_ = start(theirs)
    assert_same(run_table(table, x, predict), run_diffusers(theirs, x, predict))


@pytest.mark.parametrize("steps", [1, 7, 10, 999, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps(spacing: str, steps: int) -> None:
    """The spacings are those of diffusers, also for numbers of steps that do not divide the schedule."""
    scheduler = DDPMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    expected = scheduler.timesteps
    if (spacing, steps) == ("linspace", 1):  # diffusers takes time 0, from which no sample can be made
        expected = torch.tensor([999])
    assert torch.equal(tables.ddpm(Schedule.linear(1000), steps, spacing=spacing).times.long(), expected)
