"""The kernel of the importance-weighted bound."""

import math
from collections.abc import Callable

import pytest
import torch

from dgm_kernels import importance_bound, use_backend
from tests.cases import BACKENDS, NATIVE
from tests.contract import (
    assert_bitwise_repeatable,
    assert_compiles,
    assert_parity,
    assert_vmap,
    strided_variants,
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 59), (50, 113), (7, 0), (5, 33), (4, 3, 7), (9,)])
def test_the_bound_and_its_gradients(backend, shape):
    weights = 5 * torch.randn(shape)
    seed = torch.randn(shape[1:])

    def results(w: torch.Tensor, bound: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        w = w.clone().requires_grad_()
        value = bound(w)
        (gradient,) = torch.autograd.grad(value, w, seed.to(w), create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), w)
        (first_order,) = torch.autograd.grad(bound(w), w, seed.to(w))
        return [value.detach(), gradient.detach(), second, first_order]

    def eager(w: torch.Tensor) -> torch.Tensor:
        return torch.logsumexp(w, 0) - math.log(shape[0])

    with use_backend(backend):
        actual = results(weights, importance_bound)
    assert_parity(actual, results(weights, eager), results(weights.double(), eager), tiny=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_bound_of_weights_without_a_size(backend):
    weights = torch.tensor([[-math.inf, 1.0, math.inf, math.nan], [-math.inf, -math.inf, 0.0, 0.0]])
    with use_backend(backend):
        bound = importance_bound(weights)
    torch.testing.assert_close(bound, torch.tensor([-math.inf, 1 - math.log(2), math.inf, math.nan]), equal_nan=True)


@pytest.mark.parametrize("backend", NATIVE)
def test_the_bound_keeps_the_contract_of_an_op(backend):
    weights = torch.randn(3, 37, requires_grad=True)
    torch.library.opcheck(getattr(torch.ops.dgm.latent_bound, backend), (weights,))
    inputs = (torch.randn(37), weights.detach(), torch.randn(37))
    torch.library.opcheck(getattr(torch.ops.dgm.latent_bound_backward, backend), inputs)
    assert_bitwise_repeatable(lambda: importance_bound(weights))
    for variant in strided_variants(weights):
        assert torch.equal(importance_bound(variant), importance_bound(weights))
    assert_vmap(importance_bound, (torch.randn(2, 3, 5),))
    rows = torch.randn(3, 37, requires_grad=True), torch.randn(5, 41, requires_grad=True)
    assert_compiles(importance_bound, rows[:1], rows[1:], backend="aot_eager")
