"""The contenders of the density op's benchmark compute one function, shown at small sizes and without compiling."""

from collections.abc import Callable

import pytest
import torch

from bench import bench_density, density_baselines
from bench.compare import Case, Setup, check, make_input_sets
from dgm_kernels import kde_log_prob
from tests.cases import NATIVE
from tests.density_cases import eager_kde, eager_mixture

SETUP = Setup(torch.device("cpu"), torch.get_num_threads())
SMALL = {
    "MIXTURE": (40, 5, 7),
    "EM": (200, 4, 3),
    "KDE": (90, 4, 130),
    "KDE_TRAINING": (20, 4, 30),
    "DENOISER": (9, 25, 40),
    "MMD": (30, 5, 20),
    "CHUNK": 30,
    "CHECKED": 8,
    "SKLEARN_QUERIES": 3,
    "BROADCAST_CHUNK": 7,
    "BROADCAST_PARTS": 4,
}


@pytest.fixture(autouse=True)
def small_and_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(bench_density, name, value)
    monkeypatch.setattr(bench_density, "variants", lambda function, setup: {"eager": function})


def check_case(case: Case) -> set[str]:
    """Names of the contenders that gave the right result; a wrong one raises."""
    inputs = make_input_sets(case, SETUP.device)[0]
    errors, unavailable = check(case, inputs)
    assert unavailable == {}
    for contender in case.contenders.values():  # what is timed runs too
        with torch.set_grad_enabled(case.grad), contender.context():
            contender.run(inputs)
    return set(errors) - {case.ours}


@pytest.mark.parametrize(
    ("build", "others"),
    [
        (lambda: bench_density.mixture(SETUP, (40, 5, 7), peers=True), {"broadcast", "sklearn"}),
        (lambda: bench_density.mixture(SETUP, (40, 2, 3)), set()),
        (lambda: bench_density.mixture_training(SETUP), set()),
        (lambda: bench_density.em(SETUP), {"sklearn"}),
        (lambda: bench_density.kde(SETUP), {"products", "sklearn"}),
        (lambda: bench_density.kde_training(SETUP), set()),
        (lambda: bench_density.denoiser(SETUP, 0.8, 0.6), {"distances"}),
        (lambda: bench_density.denoiser(SETUP, 0.1, 1.0), {"distances"}),
        (lambda: bench_density.mmd_training(SETUP), set()),
    ],
)
def test_contenders_agree(build: Callable[[], Case], others: set[str]) -> None:
    case = build()
    assert check_case(case) == {"eager"} | others
    assert case.ours == f"dgm {(*NATIVE, 'reference')[0]}"


def test_a_part_stands_for_the_whole() -> None:
    """What a contender's time is multiplied by makes up the work of all points."""
    case = bench_density.kde(SETUP)
    queries, chunk = SMALL["KDE"][0], SMALL["CHUNK"]
    assert case.contenders["eager"].repeats * chunk == queries
    assert case.contenders["sklearn"].repeats * SMALL["SKLEARN_QUERIES"] == queries
    assert bench_density.mixture(SETUP, (40, 5, 7), peers=True).contenders["broadcast"].repeats == 4
    inputs = make_input_sets(case, SETUP.device)[0]
    assert case.contenders["eager"].run(inputs).shape == (chunk,)


def test_without_sklearn_the_other_contenders_compete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_density, "without_sklearn", lambda setup: {"sklearn": "not installed"})
    for build in (bench_density.em, bench_density.kde):
        case = build(SETUP)
        assert "sklearn" not in check_case(case)
        assert case.missing["sklearn"] == "not installed"


def test_baselines_are_those_of_the_tests() -> None:
    x, data = torch.randn(20, 3).double(), torch.randn(30, 3).double()
    expected = eager_kde(x, data, 0.7)
    for function in (density_baselines.kde_of_distances, density_baselines.kde_of_products):
        torch.testing.assert_close(function(x, data, 0.7), expected)
        torch.testing.assert_close(
            density_baselines.in_chunks(lambda part, f=function: f(part, data, 0.7), x, 7), expected
        )
    torch.testing.assert_close(kde_log_prob(x, data, 0.7), expected)


def test_the_em_step_of_the_bench_has_its_fixed_point() -> None:
    """Of one component the step ends at the mean and covariance of the points, whatever it began with."""
    x = torch.randn(200, 3).double() @ torch.randn(3, 3).double()
    old = density_baselines.Parameters(
        torch.ones(1).double(), torch.randn(1, 3).double(), torch.eye(3).double()[None] * 2
    )
    for step in (density_baselines.em_step, bench_density.fused_em_step):
        likelihood, weights, means, covariances = step(x, old)
        torch.testing.assert_close(weights, torch.ones(1).double())
        torch.testing.assert_close(means[0], x.mean(0))
        torch.testing.assert_close(covariances[0], torch.cov(x.T, correction=0))
        expected = eager_mixture(x, old.means, covariance=old.covariances).mean()
        torch.testing.assert_close(likelihood, expected)


def test_pictures_are_mostly_background() -> None:
    data = bench_density.pictures(300, 784)
    assert data.shape == (300, 784) and float(data.min()) == -1.0 and float(data.max()) == 1.0
    assert 0.1 < float((data == -1.0).float().mean()) < 0.9
    distances = torch.cdist(data, data)
    nearest = distances.fill_diagonal_(torch.inf).min(1).values
    assert float(nearest.median()) < 0.8 * float(torch.pdist(data).median())  # alike within a kind
