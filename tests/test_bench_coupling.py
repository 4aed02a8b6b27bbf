"""The contenders of the coupling op's benchmark compute one function, shown at small sizes and without compiling."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import bench_coupling, flow_baselines
from bench.compare import Case, Setup, check, make_input_sets
from dgm_kernels import logistic_log_prob
from tests.cases import NATIVE
from tests.coupling_cases import eager_spline

SETUP = Setup(torch.device("cpu"), torch.get_num_threads())
SMALL = {
    "FLAT_SHAPE": (9, 10),
    "SPLINE_SHAPE": (64, 16),
    "MADE_LAYERS": 2,
    "MADE_FEATURES": 6,
    "MADE_HIDDEN": (11, 13),
    "FLOW_LAYERS": 4,
    "FLOW_FEATURES": 6,
    "FLOW_HIDDEN": 8,
    "FLOW_BATCH": 16,
}
PEERS = {"nflows", "zuko"}


@pytest.fixture(autouse=True)
def small_and_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(bench_coupling, name, value)
    monkeypatch.setattr(bench_coupling, "variants", lambda function, setup: {"eager": function})


def check_case(case: Case) -> set[str]:
    """Names of the contenders that gave the right result; a wrong one raises."""
    errors, unavailable = check(case, make_input_sets(case, SETUP.device)[0])
    assert unavailable == {}
    return set(errors) - {case.ours}


@pytest.mark.parametrize(
    ("build", "peers"),
    [
        (lambda: bench_coupling.affine(SETUP, (9, 10), peers=True), PEERS),
        (lambda: bench_coupling.affine(SETUP, (9, 10), scale_map="exp"), set()),
        (lambda: bench_coupling.affine(SETUP, (9, 10), inverse=True, peers=False), set()),
        (lambda: bench_coupling.affine(SETUP, (3, 4, 5, 6), mask="checkerboard"), set()),
        (lambda: bench_coupling.affine(SETUP, (9, 10), train=True), set()),
        (lambda: bench_coupling.affine(SETUP, (9, 10), dtype=torch.bfloat16), set()),
        (lambda: bench_coupling.spline(SETUP), PEERS),
        (lambda: bench_coupling.spline(SETUP, inverse=True), PEERS),
        (lambda: bench_coupling.spline(SETUP, train=True), {"nflows"}),
        (lambda: bench_coupling.log_prob(SETUP, "logistic", logistic_log_prob, flow_baselines.plain_logistic), set()),
        (lambda: bench_coupling.maf_inverse(SETUP, batch=5), {"zuko"}),
        (lambda: bench_coupling.maf_inverse(SETUP, batch=1), {"zuko"}),
        (lambda: bench_coupling.reversible(SETUP), set()),
    ],
)
def test_contenders_agree(build: Callable[[], Case], peers: set[str]) -> None:
    for peer in peers:
        pytest.importorskip(peer)
    case = build()
    assert check_case(case) == {"eager"} | peers
    assert case.ours == f"dgm {(*NATIVE, 'reference')[0]}"


def test_spelled_out_sums_are_those_of_the_spline() -> None:
    raw = torch.randn(3, 4, 8, dtype=torch.float64)
    torch.testing.assert_close(flow_baselines.spelled_out_sums(raw), raw.cumsum(-1))


@pytest.mark.parametrize("inverse", [False, True])
def test_baseline_of_the_bench_is_that_of_the_tests(inverse: bool) -> None:
    x, *raw = (torch.randn(shape, dtype=torch.float64) for shape in ((6, 5), (6, 5, 8), (6, 5, 8), (6, 5, 7)))
    for sums in (flow_baselines.spelled_out_sums, lambda t: t.cumsum(-1)):
        ours = flow_baselines.plain_spline(2 * x, *raw, bound=3.0, inverse=inverse, sums=sums)
        torch.testing.assert_close(ours, eager_spline(2 * x, *raw, inverse=inverse))


def test_passes_invert_the_network() -> None:
    """Feature by feature, the slow way: x is what the pass computes from x itself."""
    network = flow_baselines.made(6, (11, 13), reverse=True, device=SETUP.device).double()
    z = torch.randn(4, 6, dtype=torch.float64)
    x, _ = flow_baselines.inverse_by_passes(flow_baselines.made_pass, z, [network.masked()])
    masked: list[Any] = [w * m for w, m in zip(network.weights, network.masks(), strict=True)]
    again, _ = flow_baselines.made_pass(x, z, masked, network.biases)
    torch.testing.assert_close(again, x)

    def inverse(z: Tensor) -> Tensor:
        return flow_baselines.inverse_by_passes(flow_baselines.made_pass, z, [network.masked()])[0]

    slope = torch.autograd.functional.jacobian(inverse, z[0:1])[0, :, 0]
    order = network.degrees[0].argsort()
    assert torch.equal(slope[order][:, order].triu(1), torch.zeros(6, 6, dtype=torch.float64))
    assert (slope.diagonal() > 0).all()
