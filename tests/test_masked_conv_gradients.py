"""Gradients of masked convolutions: numerically in float64, native ones against float64, and masked weights."""

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from dgm_kernels import use_backend
from tests.cases import DTYPES
from tests.contract import assert_parity
from tests.gradients import in_every_incoming_layout, incoming_gradient, saved_bytes
from tests.masked_conv_cases import BACKENDS, CASES, NATIVE, SIZES, SMALL_SIZE, ConvCase

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_case = pytest.mark.parametrize("case", CASES, ids=str)
TINY = (2, 1, 1, 2, 3)


@every_case
def test_gradcheck_float64(case):
    operands = case.make(TINY, torch.float64, grad=True)
    assert gradcheck(case.call, operands, check_forward_ad=True, check_batched_grad=True, fast_mode=True)


@every_case
def test_gradgradcheck_float64(case):
    operands = case.make(TINY, torch.float64, grad=True)
    assert gradgradcheck(case.call, operands, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("case", CASES[::6], ids=str)
def test_gradcheck_element_by_element(case):
    operands = case.make(TINY, torch.float64, grad=True)
    assert gradcheck(case.call, operands, check_forward_ad=True)
    assert gradgradcheck(case.call, operands)


def gradients(function: Callable[..., Tensor], operands: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Of every operand, computed in ``dtype``."""
    leaves = [operand.detach().to(dtype).requires_grad_() for operand in operands]
    y = function(*leaves)
    return list(torch.autograd.grad(y, leaves, incoming_gradient(y)))


def check_parity(case: ConvCase, size: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    """At most twice as far off as eager, each gradient by itself; in 16 bits a gate's input is rounded once more."""
    operands = case.make(size, dtype)
    exact = gradients(case.call_eager, operands, torch.float64)
    eager = gradients(case.call_eager, operands, dtype)
    with use_backend(backend):
        actual = gradients(case.call, operands, dtype)
    rounding = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps * (1.0 if case.gated else 0.5)
    for ours, theirs, best in zip(actual, eager, exact, strict=True):
        assert_parity(ours, theirs, best, tiny=rounding * max(1.0, float(best.abs().max())))


@on_every_backend
@every_case
def test_parity_float32(case, backend):
    for size in SIZES:
        check_parity(case, size, torch.float32, backend)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@every_case
def test_parity_16_bits(case, dtype, backend):
    for size in SIZES[1:9:2]:
        check_parity(case, size, dtype, backend)


@on_every_backend
@every_case
def test_second_derivatives_in_float32(case, backend):
    """``create_graph=True`` on any backend gives float64's second derivatives to the tolerance of float32."""
    operands = case.make(SMALL_SIZE)

    def first_and_second(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [operand.to(dtype).requires_grad_() for operand in operands]
        first = torch.autograd.grad(function(*leaves).sin().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        return [g.detach().double() for g in (*first, *second)]

    with use_backend(backend):
        actual = first_and_second(case.call, torch.float32)
    for a, e in zip(actual, first_and_second(case.call_eager, torch.float64), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5 * max(1.0, float(e.abs().max())))


def outputs_and_derivatives(case: ConvCase, operands: Sequence[Tensor]) -> list[Tensor]:
    """The result, first and second derivatives."""
    leaves = [operand.detach().requires_grad_() for operand in operands]
    y = case.call(*leaves)
    plain = torch.autograd.grad(y, leaves, incoming_gradient(y), retain_graph=True)
    first = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    return [t.detach() for t in (y, *plain, *first, *second)]


@on_every_backend
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
@every_case
def test_masked_weights_are_not_read(case, garbage, backend):
    """Whatever they hold: the same result and gradients, theirs exactly 0; and they go on holding it."""
    operands = case.make(SMALL_SIZE)
    live = case.live(operands[1])
    dirty = [operands[0], operands[1].masked_fill(~live, garbage), *operands[2:]]
    with use_backend(backend):
        expected = outputs_and_derivatives(case, [operands[0], operands[1].masked_fill(~live, 0.0), *operands[2:]])
        actual = outputs_and_derivatives(case, dirty)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    count = len(operands)
    for of_weight in actual[2::count]:
        assert torch.equal(of_weight[~live], torch.zeros(int((~live).sum())))
    assert bool((dirty[1][~live].isnan() if garbage != garbage else dirty[1][~live] == garbage).all())


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_masked_weights_are_not_read_in_16_bits(case, dtype, backend):
    operands = case.make(SMALL_SIZE, dtype)
    live = case.live(operands[1])
    with use_backend(backend):
        expected, actual = (
            gradients(case.call, [operands[0], operands[1].masked_fill(~live, fill), *operands[2:]], dtype)
            for fill in (0.0, torch.nan)
        )
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert not actual[1][~live].any()


@on_every_backend
def test_masked_weights_stay_in_training(backend):
    """A step of an optimiser with momentum and weight decay off: what is masked keeps its bits."""
    case = CASES[3]
    x, weight, bias = case.make(SMALL_SIZE)
    parameter, before = torch.nn.Parameter(weight), weight.clone()
    optimiser = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    with use_backend(backend):
        for _ in range(3):
            optimiser.zero_grad()
            case.call(x, parameter, bias).square().sum().backward()
            optimiser.step()
    live = case.live(weight)
    assert torch.equal(parameter.detach()[~live], before[~live])
    assert bool((parameter.detach()[live] != before[live]).all())


@on_every_backend
@every_case
def test_some_operands_need_no_gradient(case, backend):
    """Any subset of the operands: each gets the gradient that it gets when all ask for one, the others none."""
    operands = case.make((2, 3, 4, 3, 5))
    with use_backend(backend):
        expected = gradients(case.call, operands, torch.float32)
        for wanted in itertools.product((False, True), repeat=len(operands)):
            leaves = [operand.clone().requires_grad_(w) for operand, w in zip(operands, wanted, strict=True)]
            y = case.call(*leaves)
            assert y.requires_grad == any(wanted)
            if y.requires_grad:
                y.backward(incoming_gradient(y))
            for leaf, want, gradient in zip(leaves, wanted, expected, strict=True):
                assert (leaf.grad is not None) == want
                if want:
                    torch.testing.assert_close(leaf.grad, gradient, rtol=1e-5, atol=1e-5)


@on_every_backend
@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_incoming_gradients_of_any_layout(case, backend):
    """Expanded (as ``sum`` gives), transposed, channels-last and with gaps."""
    operands = case.make(SMALL_SIZE)

    channels_last = lambda y: torch.ones(y.shape[0], *y.shape[2:], y.shape[1]).movedim(-1, 1)  # noqa: E731
    with use_backend(backend):
        for actual, expected in in_every_incoming_layout(case.call, operands, more=[channels_last]):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", NATIVE)
@every_case
def test_memory_saved_for_the_backward_pass(case, backend):
    """Nothing but the operands; with a gate also what it is applied to, but not tanh, sigmoid or a masked weight."""
    operands = case.make((2, 4, 6, 9, 11), grad=True)
    with use_backend(backend):
        saved, y = saved_bytes(case.call, operands)
    allowed = 2 * y.numel() * y.element_size() if case.gated else 0
    assert saved <= allowed, f"{saved} bytes are kept, expected {allowed}"


@on_every_backend
def test_gradients_accumulate_in_leaves_of_any_layout(backend):
    """A weight in channels-last gets a gradient of its shape and values, twice those of one call."""
    case = CASES[3]
    x, weight, bias = case.make(SMALL_SIZE)
    leaf = weight.to(memory_format=torch.channels_last).requires_grad_()
    with use_backend(backend):
        for _ in range(2):
            y = case.call(x, leaf, bias)
            y.backward(incoming_gradient(y))
    expected = gradients(case.call_eager, (x, weight, bias), torch.float64)[1]
    torch.testing.assert_close(leaf.grad.double(), 2 * expected, rtol=1e-5, atol=1e-5)


@on_every_backend
def test_a_parameter_that_was_written_to_is_an_error(backend):
    """As for PyTorch's convolution: gradients of overwritten operands would be wrong."""
    x, weight, bias = CASES[0].make(SMALL_SIZE, grad=True)
    with use_backend(backend):
        y = CASES[0].call(x, weight, bias)
        with torch.no_grad():
            x.mul_(2.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
