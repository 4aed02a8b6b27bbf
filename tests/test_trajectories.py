"""Whole trajectories: distributions, orders of convergence, and the same samples from the same seed."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dgm_kernels import (
    NoiseKey,
    Schedule,
    noise_like,
    sample,
    sampler_step,
    tables,
    use_backend,
)
from tests.cases import BACKENDS, NATIVE, VP


def gaussian_denoiser(schedule: Schedule, prediction: str, mean: float = 0.5, std: float = 0.3) -> Any:
    """The best prediction for data from N(mean, std^2)."""

    def denoiser(x: Tensor, time: Tensor) -> Tensor:
        index = int((schedule.times - float(time[0])).abs().argmin())
        alpha, sigma = float(schedule.alpha_t[index]), float(schedule.sigma_t[index])
        x0 = mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean)
        eps = (x - alpha * x0) / sigma
        outputs = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "score": -eps / sigma, "velocity": x0 - eps}
        return outputs[prediction]

    return denoiser


LONG = Schedule.linear(1000)
TRAJECTORIES = {
    "ddpm": (LONG, tables.ddpm(LONG)),
    "ddpm v": (LONG, tables.ddpm(LONG, prediction="v", variance="fixed_large")),
    "ddim": (LONG, tables.ddim(LONG, 200, prediction="score")),
    "ddim eta": (LONG, tables.ddim(LONG, 500, eta=1.0, prediction="x0", spacing="trailing")),
    "euler": (LONG, tables.euler(LONG, 200)),
    "euler ancestral": (LONG, tables.euler_ancestral(LONG, 500, prediction="v")),
    "heun": (LONG, tables.heun(LONG, 50)),
    "dpmpp_2m": (LONG, tables.dpmpp_2m(LONG, 100, spacing="trailing")),
    "reverse sde": (LONG, tables.reverse_sde(LONG)),
    "probability flow": (LONG, tables.probability_flow(LONG)),
    "predictor corrector": (LONG, tables.predictor_corrector(LONG, 200)),
    "flow euler": (Schedule.flow(200), tables.flow_euler(Schedule.flow(200))),
    "flow midpoint": (Schedule.flow(400), tables.flow_midpoint(Schedule.flow(400), 100)),
    "langevin": (Schedule.geometric(30, 0.01, 5.0), tables.annealed_langevin(Schedule.geometric(30, 0.01, 5.0), 100)),
}


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_every_sampler_reaches_the_data_distribution(name):
    """With the exact denoiser of N(0.5, 0.3^2), 4096 samples have its mean and standard deviation to 5 %."""
    schedule, table = TRAJECTORIES[name]
    x = noise_like(torch.empty(4096, 1), NoiseKey(1, stream=1)) * table.initial_sigma
    x = sample(gaussian_denoiser(schedule, table.prediction), x, table, noise=NoiseKey(1))
    assert abs(float(x.mean()) - 0.5) < 0.025
    assert abs(float(x.std()) / 0.3 - 1) < 0.05


def test_heun_and_dpmpp_2m_are_second_order():
    """Halving the step divides the error by about 4 (Euler: by 2), against a fine Euler solution, in float64."""
    schedule = Schedule.karras(1 << 12, sigma_min=0.05, sigma_max=10.0)
    x = torch.linspace(-20, 20, 41, dtype=torch.float64)[:, None]
    solve = lambda build, n: sample(gaussian_denoiser(schedule, "x0"), x, build(schedule, n, prediction="x0"))  # noqa: E731
    # exact: the ODE scales the deviation from the mean; the last node is sigma_min, then one Euler step to 0
    exact = lambda sigma: 0.5 + (x - 0.5) * math.sqrt((0.09 + sigma**2) / (0.09 + 100.0))  # noqa: E731
    at_min = exact(0.05)
    final = 0.5 + 0.09 / (0.09 + 0.05**2) * (at_min - 0.5)
    for build, order in ((tables.euler, 1), (tables.heun, 2), (tables.dpmpp_2m, 2)):
        errors = [float((solve(build, n) - final).abs().max()) for n in (33, 65, 129)]
        rates = [math.log2(errors[i] / errors[i + 1]) for i in (0, 1)]
        assert order - 0.35 < rates[1] < order + 0.6, (build.__name__, errors, rates)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_seed_same_samples(backend):
    """Batch 1 against 64, a shuffled batch, one thread against two: the same trajectory, bit for bit."""
    schedule = Schedule.linear(20)
    table = tables.ddpm(schedule, clip=3.0)
    denoise = gaussian_denoiser(schedule, "eps")

    def run(key: NoiseKey, rows: int) -> Tensor:
        x = noise_like(torch.empty(rows, 3, 37), dataclasses.replace(key, stream=1))
        return sample(denoise, x, table, noise=key)

    threads = torch.get_num_threads()
    try:
        with use_backend(backend):
            torch.set_num_threads(2)
            whole = run(NoiseKey(4), 64)
            for row in (0, 17, 63):
                assert torch.equal(run(NoiseKey(4, first_sample=row), 1)[0], whole[row])
            order = torch.randperm(64)
            assert torch.equal(run(NoiseKey(4, samples=order), 64), whole[order])
            torch.set_num_threads(1)
            assert torch.equal(run(NoiseKey(4), 64), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", NATIVE)
def test_reference_and_native_trajectories_agree(backend):
    schedule = Schedule.linear(50)
    table = tables.ddpm(schedule)
    results = []
    for name in ("reference", backend):
        with use_backend(name):
            x = noise_like(torch.empty(8, 100), NoiseKey(4, stream=1))
            results.append(sample(gaussian_denoiser(schedule, "eps"), x, table, noise=NoiseKey(4)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_torch_manual_seed_and_generators_govern_unkeyed_noise():
    table, x, m = tables.ddpm(VP), torch.randn(2, 50), torch.randn(2, 50)
    torch.manual_seed(1)
    first, second = (sampler_step(x, m, table, 50) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(sampler_step(x, m, table, 50), first)
    assert not torch.equal(first, second)


def test_inpainting_keeps_known_pixels():
    """At the end the known pixels are exactly the given ones, and the others still follow the model."""
    schedule = Schedule.linear(100)
    table = tables.ddpm(schedule)
    known, mask = torch.full((1, 8), 2.0), torch.arange(8) < 4
    x = noise_like(torch.empty(2000, 8), NoiseKey(1, stream=1))
    x = sample(gaussian_denoiser(schedule, "eps"), x, table, noise=NoiseKey(1), known=known, mask=mask)
    assert torch.equal(x[:, :4], torch.full((2000, 4), 2.0))
    assert abs(float(x[:, 4:].mean()) - 0.5) < 0.03
