"""The rest of the contract of the coupling op: layouts, threads, compilation, transforms, dtypes, instruction sets."""

from pathlib import Path
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
    assert_inputs_unchanged,
    assert_vmap,
    results_of_instruction_sets,
    strided_variants,
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

ROOT = Path(__file__).resolve().parents[1]
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def with_grads(case: CouplingCase, operands: list[Tensor]) -> list[Tensor]:
    """Outputs, and the gradients of a sum that weighs every element of every output differently."""
    leaves = [operand.detach().requires_grad_() for operand in operands]
    outputs = case.call(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    wanted = [output for output in outputs if output.requires_grad]
    weights = [torch.linspace(-1, 2, output.numel()).view(output.shape).to(output) for output in wanted]
    return [o.detach() for o in outputs] + list(torch.autograd.grad(wanted, leaves, weights))


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
        expected = with_grads(case, operands)
        for index, operand in enumerate(operands):
            for variant in strided_variants(operand):
                actual = with_grads(case, [*operands[:index], variant, *operands[index + 1 :]])
                check_equal(actual, expected, case, backend)


@on_every_backend
@pytest.mark.parametrize("case", MAP_CASES, ids=str)
def test_expanded_operands(case, backend):
    """One sample, one channel, or one value for all, without a copy of it in memory."""
    operands = case.make((3, 4, 5))
    with use_backend(backend):
        for index, operand in enumerate(operands):
            for dim in range(operand.dim()):
                wide = operand.narrow(dim, 0, 1).expand(operand.shape)
                actual = with_grads(case, [*operands[:index], wide, *operands[index + 1 :]])
                expected = with_grads(case, [*operands[:index], wide.clone(), *operands[index + 1 :]])
                check_equal(actual, expected, case, backend)


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
                with_grads(case, operands)
            assert_bitwise_repeatable(lambda operands=operands: with_grads(case, operands))


@pytest.mark.parametrize("backend", NATIVE)
@every_case
def test_the_number_of_threads_changes_no_bit(case, backend, thread_counts):
    """Few long samples, many short ones, one: however the work is cut."""
    shapes = ((2, 12, 40, 40), (999, 34), (1, 20000)) if case not in SPLINE_CASES else ((3, 700), (999, 2))
    for shape in shapes:
        operands = case.make(shape)
        with use_backend(backend):
            results = []
            for threads in thread_counts:
                torch.set_num_threads(threads)
                results.append(with_grads(case, operands))
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=0, atol=0)


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
    stacked = [torch.stack(parts) for parts in zip(*(case.make((2, 4, 5), dtype) for _ in range(3)), strict=True)]
    assert_vmap(case.call, stacked)
    x, *rest = stacked
    assert_vmap(case.call, [x, *(p[0] for p in rest)], (0, *[None] * len(rest)))


@every_case
def test_functional_transforms(case):
    """torch.func's gradient and directional derivative are those of autograd."""
    operands = case.make((2, 4, 3), torch.float64)

    def total(*operands: Tensor) -> Tensor:
        outputs = case.call(*operands)
        return sum(output.sin().sum() for output in (outputs if isinstance(outputs, tuple) else (outputs,)))

    leaves = [operand.clone().requires_grad_() for operand in operands]
    expected = torch.autograd.grad(total(*leaves), leaves)
    actual = torch.func.grad(total, argnums=tuple(range(len(operands))))(*operands)
    torch.testing.assert_close(actual, expected)
    tangents = tuple(torch.randn_like(operand) for operand in operands)
    _, derivative = torch.func.jvp(total, tuple(operands), tangents)
    along = sum((g * t).sum() for g, t in zip(expected, tangents, strict=True))
    torch.testing.assert_close(derivative, along)


@every_case
def test_forward_mode_in_float32(case):
    """Dual numbers take the reference by themselves."""
    operands = case.make((2, 4, 3))
    tangents = [torch.randn_like(operand) for operand in operands]
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(o, t) for o, t in zip(operands, tangents, strict=True)]
        outputs = case.call(*duals)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        actual = [torch.autograd.forward_ad.unpack_dual(o).tangent for o in outputs]
    wide = tuple(o.double() for o in operands)
    _, expected = torch.func.jvp(case.call_eager, wide, tuple(t.double() for t in tangents))
    for a, e in zip(actual, expected if isinstance(expected, tuple) else (expected,), strict=True):
        torch.testing.assert_close(torch.zeros_like(e) if a is None else a.double(), e, rtol=1e-3, atol=1e-3)


ISA_SCRIPT = """
import sys, torch
from dgm_kernels import backends
from tests.coupling_cases import CASES
torch.manual_seed(0)
outputs = []
for case in CASES:
    for dtype in (torch.float32, torch.bfloat16):
        leaves = case.make((3, 38), dtype, grad=True)
        result = case.call(*leaves)
        result = result if isinstance(result, tuple) else (result,)
        sum(r.float().square().sum() for r in result if r.requires_grad).backward()
        outputs.append([t.detach() for t in result] + [leaf.grad for leaf in leaves])
torch.save(outputs, sys.argv[1])
print(backends()["cpp"])
"""


@pytest.mark.parametrize("backend", NATIVE)
def test_instruction_sets_agree(backend, tmp_path):
    results = results_of_instruction_sets(ISA_SCRIPT, tmp_path)
    for outputs in results.values():
        for ours, theirs in zip(outputs, results["default"], strict=True):
            for a, b in zip(ours, theirs, strict=True):
                tolerance, size = 1e-4 if a.dtype == torch.float32 else 2e-2, max(1.0, float(b.abs().max()))
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * size)


def test_the_eager_yardstick_has_the_published_checkerboard():
    """Even places pass unchanged: the top left pixel does."""
    x = torch.zeros(1, 1, 2, 3)
    y, _ = eager_affine(x, torch.ones_like(x), torch.zeros_like(x), mask="checkerboard")
    assert y.tolist() == [[[[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]]]
