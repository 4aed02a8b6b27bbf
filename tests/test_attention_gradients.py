"""Gradients of attention: numerically in float64, native ones against float64, those of biases, second ones."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from dgm_kernels import attention, masks, positions, use_backend
from tests.attention_cases import (
    BACKENDS,
    CASES,
    CAUSAL,
    HEAD_DIMS,
    NATIVE,
    OPTION_CASES,
    PLAIN,
    SIZES,
    SMALL_SIZE,
    SOME_CASES,
    AttentionCase,
    Size,
    causal_case,
    finite,
)
from tests.cases import DTYPES
from tests.contract import assert_parity
from tests.gradients import in_every_incoming_layout, incoming_gradient, saved_bytes

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_case = pytest.mark.parametrize("case", CASES, ids=str)
some_cases = pytest.mark.parametrize("case", SOME_CASES, ids=str)
TINY = Size(1, 2, 4, 4, 4, 3)


# ---- Numerically, of the reference.


@every_case
def test_gradcheck_float64(case):
    """The result and lse, by q, k, v, a float mask and a bias; backward, forward mode and a batch of both."""
    operands = case.make(TINY, torch.float64, grad=True)
    assert gradcheck(finite(case.call), operands, check_forward_ad=True, check_batched_grad=True, fast_mode=True)


@every_case
def test_gradgradcheck_float64(case):
    operands = case.make(TINY, torch.float64, grad=True)
    assert gradgradcheck(finite(case.call), operands, check_fwd_over_rev=True, fast_mode=True)


@some_cases
def test_gradcheck_element_by_element(case):
    operands = case.make(Size(1, 2, 3, 3, 4, 2), torch.float64, grad=True)
    assert gradcheck(finite(case.call), operands, check_forward_ad=True)
    assert gradgradcheck(finite(case.call), operands)


# ---- Native ones against float64.


def cast(operand: Tensor, dtype: torch.dtype) -> Tensor:
    return operand.detach() if operand.dtype == torch.bool else operand.detach().to(dtype)


def gradients(
    function: Callable[..., Any], operands: Sequence[Tensor], dtype: torch.dtype, count: int = 3, lse: bool = True
) -> list[Tensor]:
    """Of the first operands, computed in ``dtype``; from the result, and if asked for from lse."""
    given = [cast(operand, dtype) for operand in operands]
    leaves = [operand.requires_grad_() for operand in given[:count] if operand.is_floating_point()]
    outputs = function(*given)
    outputs = outputs if lse else outputs[:1]
    seeds = [incoming_gradient(y, index) for index, y in enumerate(outputs)]
    return list(torch.autograd.grad(outputs, leaves, seeds))


def check_parity(
    case: AttentionCase, size: Size, dtype: torch.dtype, backend: str, lse: bool = True, count: int = 3
) -> None:
    operands = case.make(size, dtype)
    exact = gradients(case.call_eager, operands, torch.float64, count, lse)
    eager = gradients(case.call_eager, operands, dtype, count, lse)
    with use_backend(backend):
        actual = gradients(case.call, operands, dtype, count, lse)
    for ours, theirs, best, more in zip(actual, eager, exact, slack(case, operands, dtype, count), strict=True):
        assert_parity(ours, theirs, best, tiny=1e-6 * max(1.0, float(best.abs().max())) + more)


def slack(case: AttentionCase, operands: Sequence[Tensor], dtype: torch.dtype, count: int) -> list[float]:
    """What may come on top of eager's error, for each gradient.

    A backward pass that stores no probabilities reads the result O and lse as they were rounded. That of O enters
    through ``sum(dO O)`` of each query, in the place where a gradient of lse does: so it is what such a gradient makes
    of it, for half a unit in the last place. That of lse, and of the scores that are computed again, is a share of
    everything. In 16 bits what enters a product is rounded: probabilities and rotated features, by each in its own way.
    """
    given = [cast(operand, torch.float64) for operand in operands]
    leaves = [operand.requires_grad_() for operand in given[:count] if operand.is_floating_point()]
    out, lse = case.call_eager(*given)
    ulp, seed = torch.finfo(dtype).eps / 2, incoming_gradient(out, 0)
    exact = torch.autograd.grad(out, leaves, seed, retain_graph=True, allow_unused=True, materialize_grads=True)
    of_sums = torch.autograd.grad(
        lse, leaves, ulp * (seed * out).abs().sum(-1), allow_unused=True, materialize_grads=True
    )
    share = 2 * torch.finfo(torch.float32).eps * lse[lse.isfinite()].abs().amax() if lse.isfinite().any() else 0.0
    rounded = ulp if dtype != torch.float32 else 0.0
    largest = [float(g.abs().max()) if g.numel() else 0.0 for g in exact]
    return [
        float(more.abs().max()) + (float(share) + rounded) * max(1.0, size)
        for more, size in zip(of_sums, largest, strict=True)
    ]


@on_every_backend
@every_case
def test_parity_float32(case, backend):
    for index, size in enumerate(SIZES):
        check_parity(case, size, torch.float32, backend, lse=index % 2 == 0)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@every_case
def test_parity_16_bits(case, dtype, backend):
    for index, size in enumerate((SIZES[0], *SIZES[3:6])):
        check_parity(case, size, dtype, backend, lse=index % 2 == 1)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", HEAD_DIMS)
def test_parity_of_head_dims(features, dtype, backend):
    for case in SOME_CASES:
        for values in (features, 5):
            check_parity(case, Size(1, 2, 19, 37, features, values), dtype, backend)


@on_every_backend
@some_cases
def test_parity_of_long_sequences(case, backend):
    """Sums over many keys and many queries."""
    check_parity(case, Size(1, 2, 515, 515, 24), torch.float32, backend)
    check_parity(case, Size(1, 2, 515, 515, 24), torch.bfloat16, backend)


@on_every_backend
@some_cases
def test_gradients_of_lse_alone(case, backend):
    """``softmax(scores)`` times its keys; those of v are 0 or none."""
    operands = case.make(Size(2, 2, 17, 17, 8))

    def of_lse(function: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        given = [cast(operand, dtype) for operand in operands]
        leaves = [operand.requires_grad_() for operand in given[:3]]
        lse = function(*given)[1]
        return list(torch.autograd.grad(lse, leaves, incoming_gradient(lse), allow_unused=True, materialize_grads=True))

    with use_backend(backend):
        actual = of_lse(case.call, torch.float32)
    eager, exact = of_lse(case.call_eager, torch.float32), of_lse(case.call_eager, torch.float64)
    assert not actual[2].any()
    assert_parity(actual, eager, exact)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blind_rows_have_no_gradient(dtype, backend):
    """Exactly 0, whatever comes in, and nothing of them reaches keys and values."""
    q, k, v = (torch.randn(1, 2, 20, 16).to(dtype).requires_grad_() for _ in range(3))
    seen = torch.rand(20, 20) < 0.5
    seen[3:7] = False
    with use_backend(backend):
        for mask in (seen, torch.zeros(20, 20).masked_fill(~seen, -torch.inf), masks.causal(-4)):
            out, lse = attention(q, k, v, mask=mask, return_lse=True)
            blind = lse[0, 0] == -torch.inf
            assert int(blind.sum()) == 4
            weights, of_lse = incoming_gradient(out), incoming_gradient(lse)
            of_q, of_k, of_v = torch.autograd.grad((out, lse), (q, k, v), (weights, of_lse), retain_graph=True)
            assert not of_q[:, :, blind].any() and not of_q.isnan().any()
            loud = [t.masked_fill(blind.view(20, *[1] * (t.dim() - 3)), 1e4) for t in (weights, of_lse)]
            others = torch.autograd.grad((out, lse), (q, k, v), loud)
            torch.testing.assert_close(others, (of_q, of_k, of_v), rtol=0, atol=0)


# ---- Second derivatives, biases.


def first_and_second(function: Callable[..., Any], operands: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Of q, k and v; of a function of the result and lse that is bent, so that second ones are not 0."""
    given = [cast(operand, dtype) for operand in operands]
    leaves = [operand.requires_grad_() for operand in given[:3]]
    out, lse = finite(function)(*given)
    first = torch.autograd.grad(out.sin().sum() + lse.cos().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    return [g.detach().double() for g in (*first, *second)]


@on_every_backend
@every_case
def test_second_derivatives_in_float32(case, backend):
    """``create_graph=True`` on any backend gives float64's second derivatives to the tolerance of float32."""
    operands = case.make(SMALL_SIZE)
    with use_backend(backend):
        actual = first_and_second(case.call, operands, torch.float32)
    for a, e in zip(actual, first_and_second(case.call, operands, torch.float64), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5 * max(1.0, float(e.abs().max())))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in OPTION_CASES if sum(case.differentiable) > 3], ids=str)
def test_gradients_of_masks_and_biases(case, dtype):
    """In their shape, of whichever dimensions broadcast; without a backend forced, that which can is chosen."""
    for size in (SIZES[0], SIZES[3], SMALL_SIZE):
        check_parity(case, size, dtype, "auto", count=len(case.names))


@on_every_backend
def test_a_bias_and_slopes_with_gradients(backend):
    """Those of ALiBi's slopes are the sum of distances; a native backend that is forced refuses."""
    q, k, v = (torch.randn(2, 3, 7, 8) for _ in range(3))
    bias, slopes = torch.randn(3, 7, 7, requires_grad=True), positions.alibi(3).slopes.requires_grad_()
    if backend in NATIVE:
        for added, name in ((bias, "bias"), (positions.ALiBi(slopes), "slopes")):
            with use_backend(backend), pytest.raises(ValueError, match=f"{name} with a derivative"):
                attention(q, k, v, bias=added)
        return
    out = attention(q, k, v, bias=positions.ALiBi(slopes))
    (actual,) = torch.autograd.grad(out, slopes, incoming_gradient(out))
    distance = (torch.arange(7)[:, None] - torch.arange(7)).abs()
    written = slopes.detach().clone().requires_grad_()
    out = attention(q, k, v, bias=-written[:, None, None] * distance)
    (expected,) = torch.autograd.grad(out, written, incoming_gradient(out))
    torch.testing.assert_close(actual, expected)


@on_every_backend
def test_a_rotary_table_with_a_gradient(backend):
    """Learned frequencies have one, or a native backend that is forced refuses; no silent loss."""
    q, k, v = (torch.randn(1, 2, 7, 8) for _ in range(3))
    table = positions.rotary(7, 8).table.requires_grad_()
    if backend in NATIVE:
        with use_backend(backend), pytest.raises(ValueError, match="rope with a derivative"):
            attention(q, k, v, rope=positions.Rotary(table))
        return
    out = attention(q, k, v, rope=positions.Rotary(table))
    (actual,) = torch.autograd.grad(out, table, incoming_gradient(out))
    wide = table.detach().double().requires_grad_()

    def turned(x: Tensor) -> Tensor:
        a, b = x.double().chunk(2, -1)
        cos, sin = wide.unbind(-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    exact = torch.nn.functional.scaled_dot_product_attention(turned(q), turned(k), v.double())
    (expected,) = torch.autograd.grad(exact, wide, incoming_gradient(exact))
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


# ---- What autograd is told.


@on_every_backend
@some_cases
def test_some_operands_need_no_gradient(case, backend):
    """Any subset of q, k and v: each gets the gradient that it gets when all ask for one, the others none."""
    operands = case.make(Size(2, 2, 6, 6, 8))
    with use_backend(backend):
        expected = gradients(case.call, operands, torch.float32)
        for wanted in itertools.product((False, True), repeat=3):
            leaves = [t.clone().requires_grad_(w) for t, w in zip(operands[:3], wanted, strict=True)]
            out, lse = case.call(*leaves, *operands[3:])
            assert out.requires_grad == any(wanted)
            if any(wanted):  # lse does not depend on v
                outputs = [(y, incoming_gradient(y, index)) for index, y in enumerate((out, lse)) if y.requires_grad]
                torch.autograd.backward(*zip(*outputs, strict=True))
            for leaf, want, gradient in zip(leaves, wanted, expected, strict=True):
                assert (leaf.grad is not None) == want
                if want:
                    torch.testing.assert_close(leaf.grad, gradient, rtol=1e-5, atol=1e-5)


@on_every_backend
@some_cases
def test_incoming_gradients_of_any_layout(case, backend):
    """Expanded (as ``sum`` gives), transposed, in the order of tokens first, and with gaps; of lse too."""
    operands = case.make(SMALL_SIZE)

    tokens_first = lambda y: torch.ones(y.shape[0], y.shape[2], y.shape[1], *y.shape[3:]).transpose(1, 2)  # noqa: E731
    with use_backend(backend):
        for actual, expected in in_every_incoming_layout(case.call, operands, 3, [tokens_first]):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@on_every_backend
def test_gradients_lie_in_memory_as_their_operands_do(backend):
    """``[batch, N, heads, D]`` seen as ``[batch, heads, N, D]``."""
    leaves = [torch.randn(2, 9, 3, 16).transpose(1, 2).requires_grad_() for _ in range(3)]
    with use_backend(backend):
        out = attention(*leaves)
        for grad in torch.autograd.grad(out, leaves, incoming_gradient(out)):
            assert grad.shape == (2, 3, 9, 16)
            if backend in NATIVE:
                assert grad.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("case", [*SOME_CASES, CAUSAL, AttentionCase("rope", rope="1d")], ids=str)
def test_memory_saved_for_the_backward_pass(case, backend):
    """The operands, the result and lse; of masks and positions what their size is: never a number for each score."""
    operands = case.make(Size(2, 4, 60, 60, 8))
    leaves = [t.requires_grad_(index < 3) for index, t in enumerate(operands)]
    with use_backend(backend):
        saved, (out, lse) = saved_bytes(case.call, leaves)
    per_token = 60 * (2 * 4 + 8 * 4) + 4 * 4  # bounds, a table of rotary positions, slopes
    allowed = out.numel() * 4 + lse.numel() * 4 + per_token
    assert saved <= allowed, f"{saved} bytes are kept, expected {allowed}"


@on_every_backend
def test_an_operand_that_was_written_to_is_an_error(backend):
    """As for PyTorch's operations: gradients of overwritten operands would be wrong."""
    for index in range(3):
        leaves = [t.requires_grad_() for t in PLAIN.make(SMALL_SIZE)]
        with use_backend(backend):
            out, _ = PLAIN.call(*leaves)
            with torch.no_grad():
                leaves[index].mul_(2.0)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.sum().backward()


@on_every_backend
def test_a_shared_operand_gets_the_sum(backend):
    """q, k and v as one tensor, and as parts of one projection."""
    x = torch.randn(2, 2, 9, 8)
    with use_backend(backend):
        one = x.clone().requires_grad_()
        out = attention(one, one, one, mask=masks.causal())
        (actual,) = torch.autograd.grad(out, one, incoming_gradient(out))
        apart = gradients(AttentionCase("apart", mask=causal_case(0)).call, [x, x, x], torch.float32, lse=False)
        # The incoming gradient has the seed 1 here and 0 there.
        out = attention(one, one, one, mask=masks.causal())
        (actual,) = torch.autograd.grad(out, one, incoming_gradient(out, 0))
        torch.testing.assert_close(actual, sum(apart), rtol=1e-5, atol=1e-5)
        packed = torch.randn(2, 9, 3, 2, 8, requires_grad=True)
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        out = attention(q, k, v)
        (of_packed,) = torch.autograd.grad(out, packed, incoming_gradient(out, 0))
        parts = gradients(PLAIN.call, [q, k, v], torch.float32, lse=False)
        torch.testing.assert_close(of_packed.permute(2, 0, 3, 1, 4), torch.stack(parts), rtol=1e-5, atol=1e-5)
