"""Cases of the density op that were wrong once: data far from 0, derivatives on the reference, numbers out of range."""

import pytest
import torch
from torch import Tensor

from dgm_kernels import empirical_denoiser, kde_log_prob, mixture_log_prob, mmd, use_backend
from dgm_kernels.density import reference
from tests.cases import BACKENDS
from tests.contract import max_error

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)

DIFFERENTIATED = {
    "kde": lambda x, y: kde_log_prob(x, y, 0.5).sum(),
    "spherical": lambda x, y: mixture_log_prob(x, y, scale=torch.full((len(y),), 0.5, dtype=x.dtype)).sum(),
    "denoiser": lambda x, y: empirical_denoiser(x, y.detach(), 1.0, 0.5).sin().sum(),
    "rbf": lambda x, y: mmd(x, y, bandwidth=2.0),
}


@on_every_backend
@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_gradients_of_data_far_from_zero(name, backend):
    """As exact as near 0, but for the rounding of the result of the denoiser itself, which sine sees."""
    function, offset = DIFFERENTIATED[name], 1024.0  # adding it leaves float32 16 bits behind the point
    x, y = (torch.randint(-8192, 8192, (rows, 8)) / 4096 + offset for rows in (59, 113))

    def gradients(x: Tensor, y: Tensor) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, y)]
        found = torch.autograd.grad(function(*leaves), leaves, allow_unused=True)
        return [g for g in found if g is not None]

    with use_backend(backend):
        actual = gradients(x, y)
    tolerance = 2e-3 if name == "denoiser" else 2e-5
    for ours, exact in zip(actual, gradients(x.double(), y.double()), strict=True):
        assert max_error(ours, exact) <= tolerance * float(exact.abs().max())


@on_every_backend
def test_derivatives_of_narrow_components_far_apart(backend):
    """Of responsibilities, and with create_graph: they run on the reference."""
    means = torch.tensor([[100.0, -70.0], [100.0078125, -70.0], [-130.0, 40.0]])
    x = means[torch.tensor([0, 0, 1, 2])] + torch.tensor([[0.0, 0.0078125], [0.00390625, 0.0], [0.0, 0.0], [0.0, 0.0]])

    def results(dtype: torch.dtype) -> list[Tensor]:
        scale = torch.full((3, 2), 0.015625, dtype=dtype, requires_grad=True)
        points = x.to(dtype).requires_grad_()
        log_prob, r = mixture_log_prob(points, means.to(dtype), scale=scale, return_responsibilities=True)
        (of_r,) = torch.autograd.grad(r[:, 0].sum(), points, retain_graph=True)
        first = torch.autograd.grad(log_prob.sum(), (points, scale), create_graph=True)
        return [of_r, *(t.detach() for t in first)]

    with use_backend(backend):
        actual = results(torch.float32)
    for ours, exact in zip(actual, results(torch.float64), strict=True):
        assert max_error(ours, exact) <= 1e-4 * float(exact.abs().max())


@pytest.mark.parametrize("function", ["log_prob", "mean", "kernel_sum"])
def test_the_reference_keeps_no_piece(function, monkeypatch):
    """Bytes kept for the backward pass are fewer than points times components, and the gradients stay what they are."""
    x, y = torch.randn(200, 3, dtype=torch.float64), torch.randn(300, 3, dtype=torch.float64)
    q, offset = torch.ones(200, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)

    def total(x: Tensor) -> Tensor:
        if function == "kernel_sum":
            return reference.kernel_sum(x, y, "rbf", [0.5, 2.0], False)
        if function == "mean":
            return reference.mean(x, y, q, offset)[0].sin().sum()
        return reference.log_prob(x, y, torch.ones(1, dtype=torch.float64), None, offset).sum()

    def run() -> tuple[int, Tensor, Tensor]:
        leaf, kept = x.clone().requires_grad_(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            result = total(leaf)
        (first,) = torch.autograd.grad(result, leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        return sum(kept), first.detach(), second

    whole, *expected = run()
    monkeypatch.setattr(reference, "_PIECE", 300 * 20)
    kept, *actual = run()
    assert kept < x.shape[0] * y.shape[0] * 8 < whole
    torch.testing.assert_close(actual, expected)


@on_every_backend
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x: mmd(x, x, bandwidth=1e-170), "bandwidth"),
        (lambda x: mmd(x, x, bandwidth=1e-25), "bandwidth"),
        (lambda x: mmd(x, x, bandwidth=[1.0] * 33), "bandwidth"),
        (lambda x: kde_log_prob(x, x, 1e-50), "bandwidth"),
        (lambda x: kde_log_prob(x, x, 1e-25), "bandwidth"),
        (lambda x: empirical_denoiser(x, x, 1.0, 1e-30), "sigma"),
        (lambda x: empirical_denoiser(x, x, 1.0, 1e-50), "sigma"),
        (lambda x: mixture_log_prob(x, x, scale=torch.full((5,), 1e-25)), "scale"),
    ],
)
def test_numbers_whose_squares_are_out_of_range(call, name, backend):
    with use_backend(backend), pytest.raises(ValueError, match=f"^{name} must"):
        call(torch.randn(5, 3))


def test_a_bandwidth_that_sees_no_distance():
    assert mmd(torch.randn(5, 3), torch.randn(4, 3), bandwidth=1e200) == 0


def test_data_of_another_size_are_compared_with_x_t():
    with pytest.raises(ValueError, match=r"^data must have shape \[rows, 3\] as x_t has it"):
        empirical_denoiser(torch.randn(5, 3), torch.randn(4, 2), 1.0, 1.0)
