"""The rest of the contract of the norm op: layouts, threads, compilation, transforms, autocast, instruction sets."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dgm_kernels import layer_norm, modulated_layer_norm, use_backend
from dgm_kernels.norm import op
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
    in_every_layout,
    stacked,
    sum_of_sines,
    tensors_of,
)
from tests.gradients import assert_any_subset_of_gradients, with_grads
from tests.norm_cases import CASES, GROUP_CASES, MODULATED_CASES, ROWS_CASES, NormCase

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
on_every_native = pytest.mark.parametrize("backend", NATIVE)
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def opcheck_cases() -> list[Any]:
    x, r, w, b = torch.randn(3, 4, 6), torch.randn(3, 4, 6), torch.randn(6), torch.randn(6)
    s, t, g = torch.randn(3, 18).split(6, 1)
    grad = lambda *tensors: [tensor.clone().requires_grad_() for tensor in tensors]  # noqa: E731
    f32, bf16 = torch.float32, torch.bfloat16
    mean, rstd = torch.randn(12), torch.rand(12)
    images, c, d = torch.randn(2, 4, 3, 5), torch.randn(2, 4), torch.randn(4)
    return [
        (op.rows, (x, None, None, w, b, None, None, 6, False, 1e-5, f32, f32)),
        (op.rows, (*grad(x), None, None, *grad(w), None, None, None, 6, True, 1e-5, f32, f32)),
        (op.rows, (*grad(x, r, g), None, None, *grad(s, t), 6, False, 1e-5, f32, f32)),
        (op.rows, (x.bfloat16(), r.bfloat16(), g, w, b, s.half(), t, 6, False, 1e-5, f32, bf16)),
        (op.rows_backward, (x, None, x, None, None, w, b, None, False, mean, rstd, 6, False)),
        (op.rows_backward, (x, r.bfloat16(), x.bfloat16(), r, g, None, None, s, True, mean, rstd, 6, False)),
        (op.rows_backward, (x, None, x, None, None, None, None, None, False, mean[:0], rstd, 6, True)),
        (op.group_silu, (*grad(images, d, d, c, c), 2, 1e-5, f32)),
        (op.group_silu, (images.half(), None, None, None, c, 4, 1e-5, f32)),
        (op.group_silu_backward, (images, images, d, d, c, c, mean[:4], rstd[:4], 2)),
        (op.group_silu_backward, (images, images.half(), None, d, None, c, mean[:8], rstd[:8], 4)),
    ]


@on_every_native
@pytest.mark.parametrize("index", range(11))
def test_opcheck(backend, index):
    overloads, args = opcheck_cases()[index]
    torch.library.opcheck(overloads[backend], args)


def _shape(case: NormCase) -> tuple[int, ...]:
    return (2, 4, 3, 5) if case in GROUP_CASES else (2, 3, 4, 5)


@on_every_backend
@every_case
def test_strides_and_offsets(case, backend):
    """Every operand in every layout: the outputs and gradients of contiguous operands."""
    operands = case.make(_shape(case))
    tolerance = 0.0 if backend in NATIVE else 2e-5
    with use_backend(backend):
        expected = with_grads(case.call, operands)
        for given in in_every_layout(operands):
            torch.testing.assert_close(with_grads(case.call, given), expected, rtol=tolerance, atol=tolerance)


@on_every_backend
def test_parts_of_one_output_are_read_where_they_are(backend):
    """The six modulations of a DiT block are views of one tensor; expanded ones need no copy either."""
    x, residual, modulation = torch.randn(3, 5, 32), torch.randn(3, 5, 32), torch.randn(3, 6 * 32)
    parts = modulation.chunk(6, 1)
    with use_backend(backend), assert_inputs_unchanged(x, residual, modulation):
        y, h = modulated_layer_norm(x, parts[1], parts[0], gate=parts[2], residual=residual)
        same, kept = modulated_layer_norm(
            x, parts[1].clone(), parts[0].clone(), gate=parts[2].clone(), residual=residual
        )
    assert torch.equal(y, same)
    assert torch.equal(h, kept)


@on_every_backend
@every_case
def test_inputs_unchanged_and_repeatable(case, backend):
    operands = case.make((2, 4, 7, 10))
    with use_backend(backend):
        with assert_inputs_unchanged(*operands):
            with_grads(case.call, operands)
        assert_bitwise_repeatable(lambda: with_grads(case.call, operands))


@on_every_native
@every_case
def test_the_number_of_threads_changes_no_bit(case, backend, thread_counts):
    """Few long samples and many short ones: however the work is cut."""
    shapes = ((2, 4, 90, 90), (999, 4, 6)) if case in GROUP_CASES else ((3, 500, 70), (700, 2, 34), (2, 3, 9001))
    for shape in shapes:
        operands = case.make(shape)
        with use_backend(backend):
            assert_threads_agree(lambda operands=operands: with_grads(case.call, operands), thread_counts)


@on_every_native
@pytest.mark.parametrize("case", [ROWS_CASES[0], MODULATED_CASES[3], GROUP_CASES[3]], ids=str)
def test_large_tensors_are_stored_past_the_caches(case, backend):
    """Another kind of store from 2^21 elements on, in rows of whole cache lines and not: the same numbers."""
    for shape in ((2, 4, 266240), (2, 4, 266243), (2, 4096, 272), (2, 4096, 259)):
        if (case in GROUP_CASES) != (shape[1] == 4):
            continue
        operands = case.make(shape)
        with use_backend(backend):
            actual = with_grads(case.call, operands)
            parts = [[o[i : i + 1] if o.shape[0] == shape[0] else o for o in operands] for i in range(shape[0])]
            small = [case.call(*(p.contiguous() for p in part)) for part in parts]
        outputs = zip(*map(tensors_of, small), strict=True)
        for ours, pieces in zip(actual, outputs, strict=False):
            torch.testing.assert_close(ours, torch.cat(pieces), rtol=0, atol=0)
        with use_backend("reference"):
            torch.testing.assert_close(actual, with_grads(case.call, operands), rtol=1e-3, atol=2e-3)


COMPILED = (*ROWS_CASES[::3], MODULATED_CASES[1], MODULATED_CASES[3], GROUP_CASES[0], GROUP_CASES[3])


@on_every_native
@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_compiles_once_for_two_sizes(case, backend):
    small, large = ((3, 4, 6), (5, 8, 10)) if case in GROUP_CASES else ((3, 4, 6), (5, 7, 10))
    with use_backend(backend):
        assert_compiles(case.call, case.make(small, grad=True), case.make(large, grad=True), backend="aot_eager")


@pytest.mark.parametrize("case", [ROWS_CASES[0], MODULATED_CASES[3], GROUP_CASES[3]], ids=str)
def test_the_reference_compiles(case):
    with use_backend("reference"):
        assert_compiles(
            case.call, case.make((3, 4, 6), grad=True), case.make((5, 8, 10), grad=True), backend="aot_eager"
        )


@pytest.mark.parametrize("backend", NATIVE or ["reference"])
def test_a_block_compiles_with_inductor(backend):
    net, modulation = nn.Linear(8, 8), nn.Linear(4, 24)

    def block(x: Tensor, condition: Tensor) -> Tensor:
        scale, shift, gate = modulation(condition).chunk(3, 1)
        y, h = modulated_layer_norm(net(x), scale, shift, gate=gate, residual=x)
        return y.square().mean() + h.mean()

    args = lambda batch, tokens: [torch.randn(batch, tokens, 8, requires_grad=True), torch.randn(batch, 4)]  # noqa: E731
    with use_backend(backend):
        assert_compiles(block, args(3, 5), args(6, 9))


@on_every_backend
@every_case
def test_autocast_leaves_dtypes_alone(case, backend):
    """As that of the CPU does to F.layer_norm and F.group_norm: a network's bfloat16 output stays bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        operands = case.make(_shape(case), dtype)
        with use_backend(backend):
            expected = case.call(*operands)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                torch.testing.assert_close(case.call(*operands), expected, rtol=0, atol=0)
    x = torch.randn(3, 8)
    linear, norm = nn.Linear(8, 8), nn.LayerNorm(8)
    with use_backend(backend):
        assert_autocast_like(
            lambda x: layer_norm(linear(x), (8,), norm.weight, norm.bias), lambda x: norm(linear(x)), (x,)
        )


@every_case
def test_vmap(case):
    """Over an added dimension of every operand; over that of x alone."""
    operands = stacked(lambda: case.make((2, 4, 5)))
    assert_vmap(case.call, operands)
    assert_vmap_of_one(case.call, operands, 0)


@every_case
def test_functional_transforms(case):
    """torch.func's gradient and directional derivative are those of autograd; so is forward mode in float32."""
    tolerances = ((torch.float64, 1e-9), (torch.float32, 1e-3))
    assert_functional_transforms(case.call, case.make((2, 4, 3), torch.float64), tolerances)


ISA_SCRIPT = """
from tests.norm_cases import CASES
outputs = []
for case in CASES:
    for dtype in (torch.float32, torch.bfloat16):
        leaves = case.make((3, 4, 38), dtype, grad=True)
        result = case.call(*leaves)
        result = result if isinstance(result, tuple) else (result,)
        sum(r.float().square().sum() for r in result).backward()
        outputs.append([t.detach() for t in result] + [leaf.grad for leaf in leaves])
"""


@on_every_native
def test_instruction_sets_agree(backend, tmp_path):
    assert_instruction_sets_agree(ISA_SCRIPT, tmp_path, float32=1e-4, others=2e-2)


@on_every_native
def test_direct_calls_are_checked(backend):
    """Below the public functions the kernels refuse what they would misread."""
    x, w, rows = torch.randn(2, 3, 8), torch.randn(8), torch.randn(2, 8)
    settings = (False, 1e-5, torch.float32, torch.float32)
    none = [None] * 6
    wrong: list[Any] = [
        lambda: op.rows[backend](x, *none, 5, *settings),
        lambda: op.rows[backend](x.transpose(0, 1), *none, 8, *settings),
        lambda: op.rows[backend](x, None, None, w[:4], None, None, None, 8, *settings),
        lambda: op.rows[backend](x, None, rows, None, None, None, None, 8, *settings),
        lambda: op.rows[backend](x, None, None, None, None, rows[:1], rows, 8, *settings),
        lambda: op.rows[backend](x, None, None, None, None, rows.T.contiguous().T, rows, 8, *settings),
        lambda: op.rows[backend](x, x.double(), *none[1:], 8, *settings),
        lambda: op.rows_backward[backend](x, None, x, *none[:5], False, w[:5], w[:6], 8, False),
        lambda: op.group_silu[backend](x, None, None, None, None, 2, 1e-5, torch.float32),
        lambda: op.group_silu[backend](x, w, None, None, None, 3, 1e-5, torch.float32),
    ]
    for call in wrong:
        with pytest.raises((ValueError, TypeError)):
            call()


@every_case
def test_operands_without_gradients(case):
    """Any subset of the operands: each gets the gradient that it gets when all ask for one, the others none."""
    assert_any_subset_of_gradients(lambda *leaves: sum_of_sines(case.call(*leaves)), case.make((2, 4, 3)))
