"""The rest of the contract of the coupling op: layouts, threads, compilation, transforms, dtypes, instruction sets."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dgm_kernels import affine_coupling, rational_quadratic_spline, standard_normal_log_prob, use_backend
from dgm_kernels.coupling import op
from dgm_kernels.coupling.region import resolve
from tests.cases import BACKENDS, NATIVE
from tests.contract import (
    assert_autocast_like,
    assert_bitwise_repeatable,
    assert_compiles,
    assert_functional_transforms,
    assert_inputs_unchanged,
    assert_instruction_sets_agree,
    assert_threads_agree,
    assert_vmap,
    assert_vmap_of_one,
    expanded_and_dense,
    in_every_layout,
    stacked,
    strided_variants,
    tangents_of,
)
from tests.coupling_cases import (
    ACTNORM_CASES,
    AFFINE_CASES,
    CASES,
    LOG_PROB_CASES,
    MAP_CASES,
    SPLINE_CASES,
    CouplingCase,
    eager_affine,
    eager_spline,
    spline_operands,
)
from tests.gradients import with_grads

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def results(case: CouplingCase, operands: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients; the log-determinant of an additive layer depends on nothing."""
    return with_grads(case.call, operands, constant=True)


def check_equal(actual: list[Tensor], expected: list[Tensor], case: CouplingCase, backend: str) -> None:
    """Bit by bit, but for sums by PyTorch, whose order depends on the layout."""
    tolerance = 0.0 if backend in NATIVE and case not in ACTNORM_CASES else 2e-5
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def _shape(case: CouplingCase) -> tuple[int, ...]:
    return (2, 4, 3, 5) if case not in SPLINE_CASES else (2, 3, 5)


def opcheck_cases() -> list[Any]:
    x, t, a = torch.randn(3, 4, 5), torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    flat, w, h, d = spline_operands((3, 4), 5, "linear", 3.0)
    parts = (x[:, 2:], t[:, :2], a[:, :2])
    region = lambda mask: resolve(mask, x).op_args(x)  # noqa: E731
    grad = lambda *tensors: [tensor.clone().requires_grad_() for tensor in tensors]  # noqa: E731
    board, row, halves = region("checkerboard"), region(torch.rand(5) < 0.5), region("channels")
    settings, f32 = (3.0, True, 1e-3, 1e-3, 1e-3), torch.float32
    made = ([torch.randn(6, 3), torch.randn(6, 6)], [torch.randn(6), torch.randn(6)])
    degrees = [torch.tensor([2, 1, 3]), torch.tensor([1, 2, 3, 1, 2, 0])]
    return [
        (op.affine, (x, t, a, *region(None), 0, False, f32)),
        (op.affine, (*grad(x, t, a), *board, 1, True, f32)),
        (op.affine, (*grad(x.bfloat16(), t), None, *row, 0, False, f32)),
        (op.affine, (*grad(x, *parts[1:]), *halves, 3, False, f32)),
        (op.affine_backward, (x, None, t, t, a, *board, 2, False, True, f32)),
        (op.affine_backward, (x.half(), torch.randn(3), t.half(), *parts[1:], *halves, 0, True, False, f32)),
        (op.spline, (flat, w, h, d, *settings, False, f32)),
        (op.spline, (*grad(flat, w, h, d), *settings, True, f32)),
        (op.spline_backward, (torch.randn(3, 4), torch.randn(3), flat, w, h, d, *settings, True)),
        (op.log_prob, (*grad(x, torch.randn(3)), True)),
        (op.log_prob, (x.half(), None, False)),
        (op.made_inverse, (x[:, 0, :3].contiguous(), *made, degrees, 0, 0, 1, *settings[:1], *settings[2:])),
    ]


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("index", range(12))
def test_opcheck(backend, index):
    overloads, args = opcheck_cases()[index]
    torch.library.opcheck(overloads[backend], args)


@on_every_backend
@every_case
def test_strides_and_offsets(case, backend):
    """Every operand in every layout: the outputs and gradients of contiguous operands."""
    operands = case.make(_shape(case))
    with use_backend(backend):
        expected = results(case, operands)
        for given in in_every_layout(operands):
            check_equal(results(case, given), expected, case, backend)


@on_every_backend
@pytest.mark.parametrize("case", MAP_CASES, ids=str)
def test_expanded_operands(case, backend):
    """One sample, one channel, or one value for all, without a copy of it in memory."""
    operands = case.make((3, 4, 5))
    with use_backend(backend):
        for wide, dense in expanded_and_dense(operands):
            check_equal(results(case, wide), results(case, dense), case, backend)


@on_every_backend
@pytest.mark.parametrize("inverse", [False, True])
def test_masks_of_every_shape_and_layout(inverse, backend):
    x, shift, log_scale = (torch.randn(2, 3, 4, 5) for _ in range(3))
    shapes = [(), (1,), (5,), (4, 1), (4, 5), (3, 1, 1), (1, 4, 1), (3, 1, 5), (1, 3, 1, 1), (1, 3, 4, 5), (2, 1, 1, 1)]
    shapes += [(1, 1, 4, 1), (1, 1, 1, 5), (2, 3, 1, 1), (2, 1, 4, 5), (2, 3, 4, 1), (2, 3, 4, 5)]
    with use_backend(backend):
        for mask in (torch.rand(shape) < 0.5 for shape in shapes):
            full = mask.expand(x.shape).contiguous()
            expected = affine_coupling(x, shift, log_scale, mask=full, inverse=inverse)
            for other in (mask, *strided_variants(mask)):
                actual = affine_coupling(x, shift, log_scale, mask=other, inverse=inverse)
                torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@on_every_backend
@every_case
def test_inputs_unchanged_and_repeatable(case, backend):
    for shape in ((3, 14), (2, 4, 7, 10)):
        operands = case.make(shape)
        with use_backend(backend):
            with assert_inputs_unchanged(*operands):
                results(case, operands)
            assert_bitwise_repeatable(lambda operands=operands: results(case, operands))


@pytest.mark.parametrize("backend", NATIVE)
@every_case
def test_the_number_of_threads_changes_no_bit(case, backend, thread_counts):
    """Few long samples, many short ones, one: however the work is cut."""
    shapes = ((2, 12, 40, 40), (999, 34), (1, 20000)) if case not in SPLINE_CASES else ((3, 700), (999, 2))
    for shape in shapes:
        operands = case.make(shape)
        with use_backend(backend):
            assert_threads_agree(lambda operands=operands: results(case, operands), thread_counts)


COMPILED = (
    *AFFINE_CASES[1::2],
    *(c for c in MAP_CASES if c.name in ("additive checkerboard", "actnorm")),
    *SPLINE_CASES[::3],
    *LOG_PROB_CASES[1:3],
)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_compiles_once_for_two_sizes(case, backend):
    with use_backend(backend):
        assert_compiles(
            case.call, case.make((3, 4, 6), grad=True), case.make((5, 4, 10), grad=True), backend="aot_eager"
        )


@pytest.mark.parametrize("case", [AFFINE_CASES[6], SPLINE_CASES[0], LOG_PROB_CASES[1]], ids=str)
def test_the_reference_compiles(case):
    with use_backend("reference"):
        assert_compiles(
            case.call, case.make((3, 4, 6), grad=True), case.make((5, 4, 10), grad=True), backend="aot_eager"
        )


@pytest.mark.parametrize("backend", NATIVE or ["reference"])
def test_a_flow_compiles_with_inductor(backend):
    """A coupling layer with its network and the base density, in one graph."""
    net = nn.Linear(4, 8)

    def loss(x: Tensor) -> Tensor:
        shift, log_scale = net(x[:, :4]).chunk(2, 1)
        z, logdet = affine_coupling(x, shift, log_scale, mask="channels", scale_map="tanh")
        return -standard_normal_log_prob(z, logdet).mean()

    args = lambda batch: [torch.randn(batch, 8, requires_grad=True)]  # noqa: E731
    with use_backend(backend):
        assert_compiles(loss, args(3), args(9))


@on_every_backend
@pytest.mark.parametrize("case", AFFINE_CASES, ids=str)
def test_autocast_promotes(case, backend):
    """A network's output in bfloat16 and x in float32: float32, as PyTorch promotes; and so is the log-determinant."""
    x, hidden, _ = case.make((3, 4))
    net = nn.Linear(hidden.shape[1], 2 * hidden.shape[1])

    def ours(x: Tensor, hidden: Tensor) -> Any:
        parameters = net(hidden).chunk(2, 1)
        assert parameters[0].dtype == torch.bfloat16
        return case.call(x, *parameters)

    def eager(x: Tensor, hidden: Tensor) -> Any:
        return case.call_eager(x, *(p.float() for p in net(hidden).chunk(2, 1)))

    with use_backend(backend):
        assert_autocast_like(ours, eager, (x, hidden))


def test_autocast_leaves_float32_alone():
    operands = AFFINE_CASES[0].make((3, 4))
    expected = affine_coupling(*operands)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(affine_coupling(*operands), expected, rtol=0, atol=0)
    w = SPLINE_CASES[0].make((3, 4))
    assert_autocast_like(lambda *a: rational_quadratic_spline(*a), lambda *a: eager_spline(*a), w)


@every_case
def test_vmap(case):
    """Over an added dimension of every operand; over that of x alone."""
    # float64 for splines: vmap takes the reference, and rounding must not count where a bin is steep.
    dtype = torch.float64 if case in SPLINE_CASES else torch.float32
    operands = stacked(lambda: case.make((2, 4, 5), dtype))
    assert_vmap(case.call, operands)
    assert_vmap_of_one(case.call, operands, 0)


@every_case
def test_functional_transforms(case):
    """torch.func's gradient and directional derivative are those of autograd."""
    assert_functional_transforms(case.call, case.make((2, 4, 3), torch.float64))


@every_case
def test_forward_mode_in_float32(case):
    """Dual numbers take the reference by themselves."""
    actual, expected = tangents_of(case.call, case.call_eager, case.make((2, 4, 3)))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


ISA_SCRIPT = """
from tests.coupling_cases import CASES
outputs = []
for case in CASES:
    for dtype in (torch.float32, torch.bfloat16):
        leaves = case.make((3, 38), dtype, grad=True)
        result = case.call(*leaves)
        result = result if isinstance(result, tuple) else (result,)
        sum(r.float().square().sum() for r in result if r.requires_grad).backward()
        outputs.append([t.detach() for t in result] + [leaf.grad for leaf in leaves])
"""


@pytest.mark.parametrize("backend", NATIVE)
def test_instruction_sets_agree(backend, tmp_path):
    assert_instruction_sets_agree(ISA_SCRIPT, tmp_path, float32=1e-4, others=2e-2)


def test_the_eager_yardstick_has_the_published_checkerboard():
    """Even places pass unchanged: the top left pixel does."""
    x = torch.zeros(1, 1, 2, 3)
    y, _ = eager_affine(x, torch.ones_like(x), torch.zeros_like(x), mask="checkerboard")
    assert y.tolist() == [[[[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]]]
