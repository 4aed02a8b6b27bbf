"""Gradients of the density op: checked numerically in float64, native ones against float64, and second derivatives."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from dgm_kernels import empirical_denoiser, kde_log_prob, mixture_em_statistics, mixture_log_prob, mmd, use_backend
from tests.cases import BACKENDS, NATIVE
from tests.contract import assert_close_by_size
from tests.density_cases import (
    DENOISER_CASES,
    DIFFERENTIABLE_CASES,
    KDE_CASES,
    MIXTURE_CASES,
    SIZES,
    SMALL,
    DensityCase,
    Sizes,
    as_tuple,
)
from tests.density_errors import Draw, assert_parity_of_draws
from tests.gradients import in_every_incoming_layout, incoming_gradients

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
on_native = pytest.mark.parametrize("backend", NATIVE)
every_case = pytest.mark.parametrize("case", DIFFERENTIABLE_CASES, ids=str)
STREAMED = [case for case in (*MIXTURE_CASES, *KDE_CASES) if not case.options]


@every_case
def test_gradcheck_float64(case):
    operands = case.make(Sizes(3, 2, 2), torch.float64, grad=True)
    assert gradcheck(case.call_free, operands, check_forward_ad=True, check_batched_grad=True)


@every_case
def test_gradgradcheck_float64(case):
    operands = case.make(Sizes(2, 2, 2), torch.float64, grad=True)
    assert gradgradcheck(case.call_free, operands, check_fwd_over_rev=True)


def gradients(function: Any, leaves: list[Tensor], **more: Any) -> tuple[Tensor, ...]:
    """Of every leaf that asks for one."""
    outputs = as_tuple(function(*leaves, **more))
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found = torch.autograd.grad(outputs, wanted, incoming_gradients(outputs), allow_unused=True, materialize_grads=True)
    return tuple(gradient.detach() for gradient in found)


def check_parity(case: DensityCase, sizes: Sizes, backend: str) -> None:
    def draw() -> Draw:
        leaves = case.leaves(case.make(sizes), backend)
        wide = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in leaves]
        exact = gradients(case.call_eager, wide)
        forms = [gradients(case.call_eager, leaves, differences=differences) for differences in case.forms(sizes)]
        with use_backend(backend):
            return gradients(case.call, leaves), forms, exact

    leaves = case.leaves(case.make(SMALL), backend)
    names = [name for name, leaf in zip(case.names, leaves, strict=True) if leaf.requires_grad]
    sums = [name for name, leaf in zip(case.names, leaves, strict=True) if leaf.numel() == 1]
    assert_parity_of_draws(draw, sizes, names, slack=2.0, sums=sums)


@on_every_backend
@every_case
def test_gradients_parity(case, backend):
    for sizes in filter(case.takes, SIZES):
        if math.prod(sizes) < 2e6:
            check_parity(case, sizes, backend)


@on_every_backend
@pytest.mark.parametrize("case", [case for case in STREAMED if not case.is_full], ids=str)
def test_gradients_at_the_size_of_a_picture(case, backend):
    check_parity(case, Sizes(113, 31, 784), backend)


def total_of(outputs: Any) -> Tensor:
    """A sum whose second derivatives by the outputs are none of them 0."""
    return sum((0.3 * output).sin().sum() for output in as_tuple(outputs))


@on_every_backend
@every_case
def test_second_derivatives_in_float32(case, backend):
    """``create_graph=True`` on the native path gives float64's second derivatives to the tolerance of float32."""
    operands = case.make(Sizes(5, 4, 3))

    def first_and_second(function: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = case.leaves([operand.to(dtype) for operand in operands], backend)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        first = torch.autograd.grad(total_of(function(*leaves)), wanted, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted)
        return [g.detach().double() for g in (*first, *second)]

    with use_backend(backend):
        actual = first_and_second(case.call, torch.float32)
    expected = first_and_second(case.call_eager, torch.float64)
    for a, e in zip(actual, expected, strict=True):
        scale = max(1.0, float(e.abs().max()))
        torch.testing.assert_close(a / scale, e / scale, rtol=1e-4, atol=1e-4)


@on_every_backend
@pytest.mark.parametrize("case", [c for c in DIFFERENTIABLE_CASES if True in c.options.values()], ids=str)
def test_one_output_used_alone(case, backend):
    """The gradients of each output alone add up to that of both."""
    operands = case.make(Sizes(59, 5, 3))

    def grads(which: tuple[int, ...]) -> tuple[Tensor, ...]:
        leaves = case.leaves(operands, backend)
        outputs = as_tuple(case.call(*leaves))
        chosen, seeds = zip(*((outputs[i], incoming_gradients(outputs)[i]) for i in which), strict=True)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return torch.autograd.grad(chosen, wanted, seeds, allow_unused=True, materialize_grads=True)

    if case.name.startswith("mmd"):
        pytest.skip("has one output")
    with use_backend(backend):
        first, second, both = grads((0,)), grads((1,)), grads((0, 1))
    for a, b, sums in zip(first, second, both, strict=True):
        size = max(1.0, float(sums.abs().max()))
        torch.testing.assert_close((a + b) / size, sums / size, rtol=1e-5, atol=1e-5)


@on_every_backend
@every_case
def test_some_operands_need_no_gradient(case, backend):
    """Any subset of the operands: each gets its gradient on the reference, the others none."""
    operands = case.make(Sizes(59, 5, 3))
    with use_backend("reference"):
        expected = gradients(case.call, case.leaves(operands))
    native = use_backend("auto" if case in DENOISER_CASES and backend != "reference" else backend)
    with native:
        for wanted in itertools.product((False, True), repeat=len(operands)):
            leaves = [operand.clone().requires_grad_(w) for operand, w in zip(operands, wanted, strict=True)]
            outputs = as_tuple(case.call(*leaves))
            assert any(o.requires_grad for o in outputs) == any(wanted)
            used = [(o, s) for o, s in zip(outputs, incoming_gradients(outputs), strict=True) if o.requires_grad]
            if used:
                torch.autograd.backward([o for o, _ in used], [s for _, s in used])
            for leaf, want, gradient in zip(leaves, wanted, expected, strict=True):
                assert (leaf.grad is not None) == want
                if want:
                    size = max(1.0, float(gradient.abs().max()))
                    torch.testing.assert_close(leaf.grad / size, gradient / size, rtol=2e-5, atol=2e-5)


@on_every_backend
@every_case
def test_incoming_gradients_of_any_layout(case, backend):
    """Expanded (as ``sum`` gives), transposed, and with gaps."""
    operands = case.make(Sizes(9, 5, 3))
    count = case.trained if backend != "reference" else None
    with use_backend(backend):
        for actual, expected in in_every_incoming_layout(case.call, operands, count):
            # PyTorch's sums around the kernels depend on the layout.
            assert_close_by_size(actual, expected, 2e-6)


@on_every_backend
def test_gradients_where_a_weight_is_zero(backend):
    """Finite; those of the other components are what they are without it."""
    x, means, scale = torch.randn(59, 3), torch.randn(5, 3), 0.5 + torch.rand(5, 3)
    weights = torch.tensor([0.25, 0.0, 0.5, 0.0, 0.25])
    kept = weights > 0

    def grads(*operands: Tensor) -> tuple[Tensor, ...]:
        leaves = [operand.clone().requires_grad_() for operand in operands]
        log_prob = mixture_log_prob(leaves[0], leaves[1], scale=leaves[2], weights=leaves[3])
        return torch.autograd.grad(log_prob.sum(), leaves)

    with use_backend(backend):
        full, part = grads(x, means, scale, weights), grads(x, means[kept], scale[kept], weights[kept])
    torch.testing.assert_close(full[0], part[0], rtol=1e-5, atol=1e-5)
    for a, b in zip(full[1:], part[1:], strict=True):
        assert not a[~kept].any()
        torch.testing.assert_close(a[kept], b, rtol=1e-5, atol=1e-4)


@on_every_backend
@pytest.mark.parametrize("shape", [(1,), (31,), (31, 3)], ids=str)
def test_gradients_far_from_all_components(shape, backend):
    """40 standard deviations away, where every density underflows: those of a single Gaussian at a distance."""
    means, scale = torch.randn(31, 3), 0.5 + torch.rand(shape)
    x = 40.0 * torch.nn.functional.normalize(torch.randn(59, 3), dim=1)

    def grads(dtype: torch.dtype, function: Any) -> tuple[Tensor, ...]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, means, scale)]
        return torch.autograd.grad(function(leaves[0], leaves[1], scale=leaves[2]).sum(), leaves)

    with use_backend(backend):
        actual = grads(torch.float32, mixture_log_prob)
    with use_backend("reference"):
        exact = grads(torch.float64, mixture_log_prob)
    for a, e in zip(actual, exact, strict=True):
        size = float(e.abs().max())
        torch.testing.assert_close(a.double() / size, e / size, rtol=1e-3, atol=1e-3)


@on_every_backend
def test_a_loss_that_falls(backend):
    """Gradient descent on a mixture finds the clusters: -log-prob falls to that of the true one."""
    centres = torch.tensor([[3.0, 0.0], [-3.0, 1.0], [0.0, -3.0]])
    x = centres[torch.randint(3, (300,))] + 0.3 * torch.randn(300, 2)
    parameters = [
        torch.tensor([[2.0, 0.5], [-2.0, 0.5], [0.5, -2.0]]).requires_grad_(),
        torch.zeros(3, 2).requires_grad_(),
        torch.zeros(3).requires_grad_(),
    ]
    optimizer = torch.optim.Adam(parameters, lr=0.1)
    with use_backend(backend):
        for _ in range(60):
            optimizer.zero_grad()
            means, log_scale, logits = parameters
            loss = -mixture_log_prob(x, means, scale=log_scale.exp(), logits=logits).mean()
            loss.backward()
            optimizer.step()
        best = -mixture_log_prob(x, centres, scale=torch.full((3,), 0.3)).mean()
    assert float(loss.detach()) < float(best) + 0.05
    assert float((parameters[0].detach() - centres).abs().max()) < 0.15


@on_every_backend
def test_the_score_points_at_the_data(backend):
    """Langevin steps without noise: every point climbs to a mode of the kernel estimate."""
    data = 4.0 * torch.eye(3)
    x = data[torch.randint(3, (50,))] + torch.randn(50, 3)
    with use_backend(backend):
        for _ in range(100):
            x = x + 0.2 * empirical_denoiser(x, data, 1.0, 1.0, prediction="score")
    assert float(torch.cdist(x, data).min(1).values.max()) < 1e-2


@on_every_backend
def test_statistics_have_no_gradients(backend):
    x, means, scale = (t.requires_grad_() for t in (torch.randn(9, 3), torch.randn(5, 3), 0.5 + torch.rand(5)))
    with use_backend(backend):
        assert not any(t.requires_grad for t in mixture_em_statistics(x, means, scale=scale))


def test_statistics_are_the_gradients():
    """d/d mean_k = first / scale^2, d/d log weight_k = counts - N weight_k: the identity behind the EM algorithm."""
    x, means, logits = torch.randn(59, 3).double(), torch.randn(5, 3).double(), torch.randn(5).double()
    scale = (0.5 + torch.rand(5, 3)).double()
    leaves = [t.clone().requires_grad_() for t in (means, logits)]
    log_prob = mixture_log_prob(x, leaves[0], scale=scale, logits=leaves[1])
    to_means, to_logits = torch.autograd.grad(log_prob.sum(), leaves)
    sums = mixture_em_statistics(x, means, scale=scale, logits=logits)
    torch.testing.assert_close(to_means, sums.first / scale.square(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(to_logits, sums.counts - 59 * logits.softmax(0), rtol=1e-10, atol=1e-10)


@on_native
@pytest.mark.parametrize("case", [*STREAMED, *DENOISER_CASES[:1]], ids=str)
def test_what_is_saved_is_linear(case, backend):
    """Autograd keeps the operands and numbers a point: no matrix of points and components."""
    points, components, features = Sizes(300, 200, 2)
    operands = case.leaves(case.make(Sizes(points, components, features)), backend)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with use_backend(backend), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        case.call(*operands)
    assert sum(kept.values()) < 12 * features**2 * (points + components)


@on_every_backend
def test_gradients_of_data_of_the_denoiser_are_those_of_the_reference(backend):
    """Asked for, they are there, whatever the backend: refused where one is forced that has none."""
    x, data = torch.randn(9, 3), torch.randn(5, 3).requires_grad_()
    if backend == "reference":
        with use_backend(backend):
            assert empirical_denoiser(x, data, 0.7, 0.5).requires_grad
        return
    with use_backend(backend), pytest.raises(ValueError, match="derivatives by data, weights, alpha or sigma"):
        empirical_denoiser(x, data, 0.7, 0.5)
    automatic = torch.autograd.grad(empirical_denoiser(x, data, 0.7, 0.5).sum(), data)
    with use_backend("reference"):
        expected = torch.autograd.grad(empirical_denoiser(x, data, 0.7, 0.5).sum(), data)
    torch.testing.assert_close(automatic, expected)


@on_every_backend
def test_one_tensor_as_both_arguments(backend):
    """Points that are their own data, of a kernel estimate and of MMD: both shares of the gradient count."""
    x = torch.randn(31, 3)

    def grads(function: Any, dtype: torch.dtype) -> Tensor:
        leaf = x.to(dtype).requires_grad_()
        return torch.autograd.grad(function(leaf), leaf)[0].double()

    functions = (lambda x: kde_log_prob(x, x, 0.5).sum(), lambda x: mmd(x, 2.0 * x, bandwidth=[0.5, 1.0]))
    for function in functions:
        with use_backend(backend):
            actual = grads(function, torch.float32)
        with use_backend("reference"):
            torch.testing.assert_close(actual, grads(function, torch.float64), rtol=1e-4, atol=1e-5)
