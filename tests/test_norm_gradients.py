"""Gradients of the norm op: against finite differences, eager and float64; second derivatives; incoming gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dgm_kernels import layer_norm, modulated_layer_norm, use_backend
from tests.cases import BACKENDS, NATIVE
from tests.contract import assert_parity, tensors_of
from tests.gradients import in_every_incoming_layout, incoming_gradients
from tests.norm_cases import CASES, GROUP_CASES, MODULATED_CASES, ROWS_CASES, NormCase

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def gradients(call: Any, operands: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """For fixed gradients of the outputs that 16 bits hold exactly."""
    leaves = [operand.detach().to(dtype).requires_grad_() for operand in operands]
    outputs = tensors_of(call(*leaves))
    return list(torch.autograd.grad(outputs, leaves, incoming_gradients(outputs)))


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_case
def test_gradients_have_eagers_error(case, dtype, backend):
    """16-bit eager is computed in float32 and rounded once, which is stricter than eager in 16 bits."""
    for shape in case.shapes:
        if shape[-1] in (1, 2) and case not in GROUP_CASES:
            continue  # of two numbers the gradient is what rounding leaves: see test_gradients_of_tiny_rows
        operands = [operand.to(dtype) for operand in case.make(shape)]
        exact = gradients(case.call_eager, operands, torch.float64)
        eager = [g.to(dtype) for g in gradients(case.call_eager, operands, torch.float32)]
        with use_backend(backend):
            actual = gradients(case.call, operands, dtype)
        # A 16-bit h is rounded before it is normalised, so that a row of small deviation moves by that.
        rounded = case in MODULATED_CASES[2:] and dtype != torch.float32
        for index, (a, e, x) in enumerate(zip(actual, eager, exact, strict=True)):
            size = max(1.0, float(x.abs().max())) if x.numel() else 1.0
            share = 3e-6 if not rounded else 4 * torch.finfo(dtype).eps
            try:
                assert_parity(a, e, x, tiny=share * size)
            except AssertionError as error:
                raise AssertionError(f"{case}, {shape}, operand {index}") from error


@on_every_backend
def test_gradients_of_tiny_rows(backend):
    """Rows of two numbers lie on two points: their gradient is 0 but for eps; rows of one have none."""
    x = torch.tensor([[1.0, 3.0], [-2.0, 5.0]], requires_grad=True)
    with use_backend(backend):
        (gradient,) = torch.autograd.grad(layer_norm(x, (2,), eps=1e-5).square().sum(), x)
        torch.testing.assert_close(gradient, torch.zeros(2, 2), rtol=0, atol=1e-4)


@every_case
def test_gradcheck(case):
    operands = case.make((2, 4, 3), torch.float64, grad=True)
    assert torch.autograd.gradcheck(case.call, operands)


@every_case
def test_gradgradcheck(case):
    operands = case.make((2, 2, 3), torch.float64, grad=True)
    assert torch.autograd.gradgradcheck(case.call, operands)


@pytest.mark.parametrize("backend", NATIVE)
@every_case
def test_second_derivatives_of_the_kernels(case, backend):
    """The kernels' gradient differentiated again: that of float64, a penalty on the gradient as an example."""

    def penalty(operands: list[Tensor]) -> list[Tensor]:
        leaves = [operand.detach().requires_grad_() for operand in operands]
        total = sum(output.sin().sum() for output in tensors_of(case.call(*leaves)))
        first = torch.autograd.grad(total, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        return [*(g.detach() for g in first), *second]

    operands = case.make((2, 4, 6))
    with use_backend(backend):
        actual = penalty(operands)
    for a, e in zip(actual, penalty([operand.double() for operand in operands]), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-3, atol=1e-4 * max(1.0, float(e.abs().max())))


@on_every_backend
@pytest.mark.parametrize("case", MODULATED_CASES[2:], ids=str)
def test_gradients_of_one_output(case, backend):
    """Of y alone, of h alone; together they are those of both. Second derivatives too."""
    operands = case.make((2, 3, 5))
    with use_backend(backend):
        leaves = [operand.clone().requires_grad_() for operand in operands]
        y, h = case.call(*leaves)
        options: dict[str, bool] = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
        of_y = torch.autograd.grad(y.sin().sum(), leaves, **options)
        of_h = torch.autograd.grad(h.sin().sum(), leaves, **options)
        both = torch.autograd.grad(y.sin().sum() + h.sin().sum(), leaves, create_graph=True, retain_graph=True)
        alone = torch.autograd.grad(h.sin().sum(), leaves, create_graph=True, allow_unused=True)
    for a, b, c in zip(of_y, of_h, both, strict=True):
        torch.testing.assert_close(a + b, c, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(alone[0], of_h[0], rtol=1e-6, atol=1e-6)


@on_every_backend
@pytest.mark.parametrize("case", [ROWS_CASES[0], MODULATED_CASES[3], GROUP_CASES[3]], ids=str)
def test_incoming_gradients_of_any_layout(case, backend):
    """Expanded (as ``sum`` gives), transposed, and with gaps."""
    tolerance = 0.0 if backend in NATIVE else 1e-6
    with use_backend(backend):
        for actual, expected in in_every_incoming_layout(case.call, case.make((2, 4, 6))):
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_what_is_saved():
    """h in place of the residual, and x only with a gate; never the normalised rows."""
    x, residual = (torch.randn(4, 100, 64, requires_grad=True) for _ in range(2))
    scale, shift, gate = torch.randn(3, 4, 64).unbind()
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for more, large in (({}, 1), ({"residual": residual}, 1), ({"residual": residual, "gate": gate}, 2)):
            saved.clear()
            modulated_layer_norm(x, scale, shift, **more)
            if NATIVE:
                assert sum(count == x.numel() for count in saved) == large


def test_weights_train_in_a_loop():
    """Some steps of gradient descent with kernels and with the reference reach the same weights."""
    case: NormCase = MODULATED_CASES[4]
    results = []
    for backend in BACKENDS:
        torch.manual_seed(3)
        x, *parameters = case.make((4, 6, 16))
        with use_backend(backend):
            leaves = [p.clone().requires_grad_() for p in parameters]
            for _ in range(5):
                y, h = case.call(x, *leaves)
                grads = torch.autograd.grad((y - 1).square().mean() + h.square().mean(), leaves)
                leaves = [(p - 0.1 * g).detach().requires_grad_() for p, g in zip(leaves, grads, strict=True)]
        results.append([leaf.detach() for leaf in leaves])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-5)
