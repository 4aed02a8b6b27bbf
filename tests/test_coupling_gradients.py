"""Gradients of the coupling op: checked numerically in float64, native ones against float64, and second derivatives."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from dgm_kernels import additive_coupling, affine_coupling, standard_normal_log_prob, use_backend
from tests.cases import BACKENDS, DTYPES, NATIVE
from tests.contract import assert_parity, sum_of_sines, tensors_of
from tests.coupling_cases import (
    ACTNORM_CASES,
    AFFINE_CASES,
    CASES,
    MAP_CASES,
    MASKS,
    SCALE_MAPS,
    SHAPES,
    SPLINE_CASES,
    CouplingCase,
    mask_of,
    moved_shape,
    unchanged,
)
from tests.gradients import assert_any_subset_of_gradients, in_every_incoming_layout, incoming_gradients

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
on_native = pytest.mark.parametrize("backend", NATIVE)
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@every_case
def test_gradcheck_float64(case):
    operands = case.make((1, 3) if case in SPLINE_CASES else (2, 2, 3), torch.float64, grad=True)
    assert gradcheck(case.call, operands, check_forward_ad=True, check_batched_grad=True)


@every_case
def test_gradgradcheck_float64(case):
    operands = case.make((1, 2) if case in SPLINE_CASES else (2, 2, 2), torch.float64, grad=True)
    assert gradgradcheck(case.call, operands, check_fwd_over_rev=True)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("scale_map", SCALE_MAPS)
@pytest.mark.parametrize("mask", MASKS)
def test_affine_gradcheck_of_every_mask_and_map(mask, scale_map, inverse):
    shape = (2, 2, 3)
    leaves = [
        torch.randn(s, dtype=torch.float64, requires_grad=True)
        for s in (shape, moved_shape(mask, shape), moved_shape(mask, shape))
    ]
    options = {"mask": mask_of(mask, shape), "scale_map": scale_map, "inverse": inverse}
    assert gradcheck(lambda *a: affine_coupling(*a, **options), leaves, fast_mode=True)


def gradients(function: Any, operands: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Of every operand, computed in ``dtype``."""
    leaves = [operand.detach().to(dtype).requires_grad_() for operand in operands]
    outputs = tensors_of(function(*leaves))
    pairs = [(o, w) for o, w in zip(outputs, incoming_gradients(outputs), strict=True) if o.requires_grad]
    return torch.autograd.grad([o for o, _ in pairs], leaves, [w for _, w in pairs])


@on_every_backend
@every_case
def test_gradients_parity(case, backend):
    """Against float64, at most twice as far off as eager float32; in 16 bits as eager of the same dtype."""
    for shape, dtype in itertools.product(filter(case.takes, SHAPES), DTYPES):
        operands = case.make(shape, dtype)
        exact = gradients(case.call_eager, operands, torch.float64)
        with use_backend(backend):
            actual = gradients(case.call, operands, dtype)
        if dtype == torch.float32 or case in SPLINE_CASES:  # a quadratic formula in 16 bits is off by any number
            eager = tuple(g.to(dtype) for g in gradients(case.call_eager, operands, torch.float32))
        else:
            eager = gradients(case.call_eager, operands, dtype)
        size = max((float(e.abs().max()) for e in exact if e.numel()), default=1.0)
        tiny = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
        if case in SPLINE_CASES:  # the largest error is that of one needle of a bin, and chance: see the next test
            tiny = max(tiny, 4e-3)
        assert_parity(actual, eager, exact, tiny=tiny * max(1.0, size))


@on_every_backend
@pytest.mark.parametrize("case", SPLINE_CASES, ids=str)
def test_spline_gradients_are_as_exact_as_those_of_eager(case, backend):
    """By the quantiles of the relative error, which an ill-conditioned element does not decide."""
    operands = case.make((2000, 5))
    exact = gradients(case.call_eager, operands, torch.float64)
    eager = gradients(case.call_eager, operands, torch.float32)
    with use_backend(backend):
        actual = gradients(case.call, operands, torch.float32)
    quantiles = torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)
    for a, e, x in zip(actual, eager, exact, strict=True):
        ours, theirs = (((g.double() - x).abs() / x.abs().clamp(min=1.0)).quantile(quantiles) for g in (a, e))
        assert bool((ours <= 2 * theirs + 2e-7).all()), f"{ours.tolist()}, eager: {theirs.tolist()}"


def total_of(outputs: Any, which: tuple[int, ...] = (0, 1)) -> Tensor:
    return sum_of_sines([output for i, output in enumerate(tensors_of(outputs)) if i in which])


@on_every_backend
@every_case
def test_second_derivatives_in_float32(case, backend):
    """``create_graph=True`` on the native path gives float64's second derivatives to the tolerance of float32."""
    operands = case.make((2, 4, 3))

    def first_and_second(function: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [operand.to(dtype).requires_grad_() for operand in operands]
        first = torch.autograd.grad(total_of(function(*leaves)), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        return [g.detach().double() for g in (*first, *second)]

    with use_backend(backend):
        actual = first_and_second(case.call, torch.float32)
    expected = first_and_second(case.call_eager, torch.float64)
    for a, e in zip(actual, expected, strict=True):
        scale = max(1.0, float(e.abs().max()))
        tolerance = 1e-3 if case in SPLINE_CASES else 1e-4
        torch.testing.assert_close(a / scale, e / scale, rtol=tolerance, atol=tolerance)


@on_every_backend
@pytest.mark.parametrize("case", MAP_CASES, ids=str)
def test_one_output_used_alone(case, backend):
    """The gradient of y alone and of logdet alone add up to that of both."""
    operands = case.make((2, 4, 3))

    def grads(which: tuple[int, ...]) -> list[Tensor]:
        leaves = [operand.clone().requires_grad_() for operand in operands]
        found = torch.autograd.grad(
            total_of(case.call(*leaves), which), leaves, allow_unused=True, materialize_grads=True
        )
        return list(found)

    with use_backend(backend):
        alone = grads((0,))
        both = grads((0, 1))
        depends = case.name.split()[0] != "additive"
        logdet = grads((1,)) if depends else [torch.zeros_like(o) for o in operands]
    for y, of_logdet, sums in zip(alone, logdet, both, strict=True):
        torch.testing.assert_close(y + of_logdet, sums, rtol=1e-5, atol=1e-5)
    if case in AFFINE_CASES:
        assert not logdet[0].any()
        assert not logdet[1].any()


@on_every_backend
@every_case
def test_some_operands_need_no_gradient(case, backend):
    """Any subset of the operands: each gets the gradient that it gets when all ask for one, the others none."""
    with use_backend(backend):
        assert_any_subset_of_gradients(lambda *leaves: sum_of_sines(case.call(*leaves)), case.make((2, 4, 3)))


@on_every_backend
@every_case
def test_incoming_gradients_of_any_layout(case, backend):
    """Expanded (as ``sum`` gives), transposed, and with gaps."""
    # PyTorch's sums, which actnorm is made of, depend on the layout.
    tolerance = 1e-6 if case in ACTNORM_CASES else 0
    with use_backend(backend):
        for actual, expected in in_every_incoming_layout(case.call, case.make((2, 4, 3)), constant=True):
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@on_every_backend
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("scale_map", SCALE_MAPS)
@pytest.mark.parametrize("mask", ["checkerboard", "checkerboard_flipped", "random", "row"])
def test_what_is_unchanged_reads_no_parameters(mask, scale_map, inverse, garbage, backend):
    """Whatever shift and log_scale hold there: the same result, the gradient 0, second derivatives finite."""
    x, shift, log_scale = (torch.randn(2, 3, 5) for _ in range(3))
    argument = mask_of(mask, x.shape)
    keep = unchanged(argument, x.shape)

    def run(fill: float) -> list[Tensor]:
        leaves = [t.requires_grad_() for t in (x.clone(), *(p.masked_fill(keep, fill) for p in (shift, log_scale)))]
        outputs = affine_coupling(*leaves, mask=argument, scale_map=scale_map, inverse=inverse)
        first = torch.autograd.grad(total_of(outputs), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        added = [t.requires_grad_() for t in (x.clone(), shift.masked_fill(keep, fill))]
        y, _ = additive_coupling(*added, mask=argument, inverse=inverse)
        return [*outputs, *first, *second, y, *torch.autograd.grad(y.sin().sum(), added)]

    with use_backend(backend):
        clean, dirty = run(0.0), run(garbage)
    torch.testing.assert_close(dirty, clean, rtol=0, atol=0)
    for of_parameter in (*dirty[3:5], *dirty[6:8], dirty[-1]):
        assert not of_parameter[keep].any()
        assert of_parameter.isfinite().all()


@on_every_backend
def test_gradients_accumulate_in_leaves_of_any_layout(backend):
    """A parameter in channels-last gets a gradient of its shape and values."""
    x = torch.randn(2, 4, 3, 5).to(memory_format=torch.channels_last).requires_grad_()
    shift, log_scale = (torch.randn(2, 4, 3, 5).transpose(1, 3).transpose(1, 3).requires_grad_() for _ in range(2))
    with use_backend(backend):
        for _ in range(2):
            y, logdet = affine_coupling(x, shift, log_scale)
            (y.sum() + logdet.sum()).backward()
    torch.testing.assert_close(x.grad, 2 * log_scale.detach().exp())
    torch.testing.assert_close(shift.grad, torch.full_like(shift, 2.0))
    torch.testing.assert_close(log_scale.grad, 2 * (x * log_scale.exp() + 1).detach())


@on_native
@pytest.mark.parametrize("case", AFFINE_CASES, ids=str)
def test_affine_layers_do_not_save_their_input(case, backend):
    """Autograd keeps the output and the parameters; x may be freed, or be overwritten."""
    operands = case.make((2, 8, 16), grad=True)
    x = operands[0]
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with use_backend(backend), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        inner = x.clone()  # not a leaf
        pointer = inner.data_ptr()
        case.call(inner, *operands[1:])
    assert pointer not in kept


def chain(case: CouplingCase, operands: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    leaves = [operand.detach().to(dtype).requires_grad_() for operand in operands]
    y, logdet = case.call(*leaves)
    return list(torch.autograd.grad(standard_normal_log_prob(y, logdet).mean(), leaves))


@on_native
@pytest.mark.parametrize("case", MAP_CASES, ids=str)
def test_the_loss_of_a_flow(case, backend):
    operands = case.make((3, 4, 5))
    with use_backend("reference"):
        expected = chain(case, operands, torch.float64)
    with use_backend(backend):
        actual = chain(case, operands, torch.float32)
    for a, e in zip(actual, expected, strict=True):
        scale = max(1.0, float(e.abs().max()))
        torch.testing.assert_close(a.double() / scale, e / scale, rtol=1e-3, atol=1e-5)
