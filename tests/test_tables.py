"""Schedules and tables: values, the refusals with their reasons, and what a table says of itself."""

import math

import pytest
import torch

from dgm_kernels import SamplerTable, Schedule, tables
from dgm_kernels.sampler.table import SAMPLER_COLUMNS

VP, VE, FLOW = Schedule.linear(100), Schedule.karras(40), Schedule.flow(40)


def column(table: SamplerTable, name: str) -> torch.Tensor:
    return table.rows64[:, SAMPLER_COLUMNS.index(name)]


def test_schedules_hold_their_formulas():
    linear = Schedule.linear(1000)
    assert linear.betas is not None
    torch.testing.assert_close(linear.betas[[0, -1]], torch.tensor([1e-4, 0.02], dtype=torch.float64))
    torch.testing.assert_close(linear.alphas_cumprod, torch.cumprod(1 - linear.betas, 0))
    torch.testing.assert_close(linear.alpha_t**2 + linear.sigma_t**2, torch.ones(1000, dtype=torch.float64))
    scaled = Schedule.scaled_linear(10, 0.01, 0.04)
    torch.testing.assert_close(scaled.betas.sqrt(), torch.linspace(0.1, 0.2, 10, dtype=torch.float64))
    cosine = Schedule.cosine(1000)
    expected = math.cos((0.5 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert abs(float(cosine.alphas_cumprod[499]) - expected) < 1e-12
    karras = Schedule.karras(5, 0.01, 10.0, rho=2.0)
    torch.testing.assert_close(
        karras.sigma_t.sqrt().diff().std(), torch.tensor(0.0, dtype=torch.float64), atol=1e-12, rtol=0
    )
    torch.testing.assert_close(
        Schedule.geometric(3, 0.01, 1.0).sigma_t, torch.tensor([0.01, 0.1, 1.0], dtype=torch.float64)
    )
    torch.testing.assert_close(FLOW.alpha_t + FLOW.sigma_t, torch.ones(40, dtype=torch.float64))
    torch.testing.assert_close(linear.log_snr, (linear.alpha_t**2 / linear.sigma_t**2).log())


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([0.1, 1.0], r"betas\[1\] = 1: alphas_cumprod becomes 0"),
        ([0.1, 1.5], r"betas\[1\] = 1.5: sqrt\(1 - beta\) is the root of a negative number"),
        ([0.0, 0.1], r"betas\[0\] = 0: the step adds no noise"),
        ([0.1, 0.2, -0.1], r"betas\[2\] = -0.1: a variance cannot be negative"),
        ([math.nan], "it is not a number"),
        ([], "non-empty"),
        ([[0.1]], "non-empty sequence of numbers, got shape"),
    ],
)
def test_betas_outside_0_1_are_refused_with_the_reason(betas, message):
    with pytest.raises(ValueError, match=message):
        Schedule.from_betas(betas)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Schedule.linear(0), ValueError, "steps must be a positive int"),
        (lambda: Schedule.from_sigmas([1.0, 0.5]), ValueError, "sigmas must be a non-empty rising"),
        (lambda: Schedule.from_sigmas([0.0, 0.5]), ValueError, "sigmas must be a non-empty rising"),
        (lambda: Schedule.from_sigmas([0.1, math.inf]), ValueError, "finite"),
        (lambda: Schedule.karras(10, 2.0, 1.0), ValueError, "sigma_min < sigma_max"),
        (lambda: VE.alphas_cumprod, ValueError, "kind 've' has no betas"),
        (lambda: tables.ddpm(VE), ValueError, "ddpm takes a schedule of kind 'vp', got 've'"),
        (lambda: tables.ddpm([0.1]), TypeError, "schedule must be a Schedule"),
        (lambda: tables.flow_euler(VP), ValueError, "flow_euler takes a schedule of kind 'flow'"),
        (lambda: tables.ddim(VP, prediction="noise"), ValueError, "prediction must be one of"),
        (lambda: tables.ddim(VP, prediction="velocity"), ValueError, "'velocity' goes with Schedule.flow"),
        (lambda: tables.training(FLOW), ValueError, "'velocity' goes with Schedule.flow"),
        (lambda: tables.ddim(VP, 101), ValueError, r"steps must be an int in \[1, 100\]"),
        (lambda: tables.ddim(VP, 10, spacing="even"), ValueError, "spacing must be"),
        (lambda: tables.ddim(VP, 10, eta=-0.1), ValueError, "eta must be in"),
        (lambda: tables.ddim(VP, 10, eta=math.nan), ValueError, "eta must be in"),
        (lambda: tables.ddim(VP, 10, clip=-1.0), ValueError, "clip must be"),
        (lambda: tables.ddim(VP, 10, clip=(1.0, 0.0)), ValueError, "clip must be"),
        (lambda: tables.ddim(VP, 10, final="zero"), ValueError, "final must be"),
        (lambda: tables.ddim(VP, 10, dynamic_threshold=1.5), ValueError, "dynamic_threshold must be"),
        (lambda: tables.ddpm(VP, variance="learned"), ValueError, "variance must be"),
        (lambda: tables.euler_ancestral(VP, 10, eta=-1.0), ValueError, "eta must be non-negative"),
        (lambda: tables.annealed_langevin(VE, 0), ValueError, "steps_per_level must be"),
        (lambda: tables.annealed_langevin(VE, 1, step_size=1.0), ValueError, "step_size must be in"),
        (lambda: tables.predictor_corrector(VP, snr=0.0), ValueError, "snr must be in"),
        (lambda: tables.predictor_corrector(VP, corrector_steps=0), ValueError, "corrector_steps must be"),
        (lambda: tables.training(VP, weighting="snr"), ValueError, "weighting must be"),
        (lambda: tables.training(VP, weighting=torch.ones(3)), ValueError, "weighting must hold 100"),
        (lambda: tables.training(VP, weighting=-torch.ones(100)), ValueError, "weighting must hold 100"),
        (lambda: tables.training(VP, prediction="score", weighting="min_snr"), ValueError, "'min_snr' goes with"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_spacings():
    assert tables.ddim(VP, 4, spacing="leading").times.tolist() == [75, 50, 25, 0]
    assert tables.ddim(VP, 4, spacing="linspace").times.tolist() == [99, 66, 33, 0]
    assert tables.ddim(VP, 4, spacing="trailing").times.tolist() == [99, 74, 49, 24]
    assert tables.ddim(VP).times.tolist() == list(range(99, -1, -1))
    torch.testing.assert_close(
        tables.flow_euler(FLOW, 4).times, torch.tensor([0, 0.25, 0.5, 0.75], dtype=torch.float64)
    )


@pytest.mark.parametrize("name", [n for n in tables.__all__ if n != "training"])
def test_every_trajectory_ends_on_the_predicted_sample(name):
    """The last row draws no noise, and known pixels end as they were given."""
    schedule = {"annealed_langevin": VE, "flow_euler": FLOW, "flow_midpoint": FLOW}.get(name, VP)
    options = {"steps_per_level": 2, "step_size": 1e-6} if name == "annealed_langevin" else {"steps": 10}
    table = getattr(tables, name)(schedule, **options)
    assert float(column(table, "an")[-1]) == 0
    assert (float(column(table, "ak")[-1]), float(column(table, "sk")[-1])) == (1.0, 0.0)
    assert table.rows.dtype == torch.float32
    assert len(table.times) == len(table.input_scale) == len(table) == len(table.rows)
    assert table.stochastic == bool((column(table, "an") != 0).any())
    assert table.needs_history == tuple((column(table, "ah") != 0).tolist())
    assert any(table.needs_history) == (table.history is not None)


def test_predictions_of_the_same_sample_agree():
    """Every parametrisation of the same clean sample and noise gives the same step."""
    x0, eps = torch.randn(20, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    for row, time in ((3, 60), (9, 0)):
        alpha, sigma = float(VP.alpha_t[time]), float(VP.sigma_t[time])
        outputs = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "score": -eps / sigma}
        for build in (tables.ddim, tables.ddpm, tables.euler, tables.dpmpp_2m, tables.reverse_sde):
            steps = {}
            for prediction, m in outputs.items():
                table = build(VP, 10, prediction=prediction)
                x = (alpha * x0 + sigma * eps) / float(table.input_scale[row])
                c = dict(zip(SAMPLER_COLUMNS, table.rows64[row].tolist(), strict=True))
                clean = c["px"] * x + c["pm"] * m
                torch.testing.assert_close(clean, x0, rtol=1e-9, atol=1e-9)
                steps[prediction] = c["ax"] * x + c["a0"] * clean + c["am"] * m
            for step in steps.values():
                torch.testing.assert_close(step, steps["eps"], rtol=1e-9, atol=1e-9)


def test_corrector_steps_are_those_of_the_paper():
    """Song et al., Algorithm 5: 2 a_i (snr sigma_i)^2 with a_i = 1 - beta_i of the node that is corrected."""
    schedule, snr = Schedule.cosine(50), 0.16
    table = tables.predictor_corrector(schedule, snr=snr)
    size = 0.5 * column(table, "an")[1::2] ** 2
    expected = 2 * schedule.alphas * (snr * schedule.sigma_t) ** 2
    torch.testing.assert_close(size, expected[:-1].flip(0))


def test_min_snr_weights():
    """The same weight min(snr, gamma) of the clean sample's error, whatever is predicted (Hang et al., 2023)."""
    snr = VP.log_snr.exp()
    weight = {p: tables.training(VP, prediction=p, weighting="min_snr").rows64[:, 4] for p in ("x0", "eps", "v")}
    torch.testing.assert_close(weight["x0"], snr.clamp(max=5))
    torch.testing.assert_close(weight["eps"] * snr, weight["x0"])
    torch.testing.assert_close(weight["v"] * (snr + 1), weight["x0"])
