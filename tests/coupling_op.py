"""Calls of the coupling op's native kernels, and what they must give, on any device."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dgm_kernels import use_backend
from dgm_kernels.coupling.reference import SCALE_MAPS
from dgm_kernels.coupling.region import resolve
from tests.contract import assert_parity
from tests.coupling_cases import SPLINE_CASES, CouplingCase, mask_of
from tests.gradients import values_and_gradients

# One element, ragged, several short samples a program, several programs a sample, images of even and odd sides.
SHAPES = [(1, 1), (3, 59), (300, 2), (70, 16), (2, 1030), (2, 2, 113), (2, 8, 4, 16), (2, 4, 7, 9)]
SPLINE_SHAPES = [(1, 1), (3, 59), (130, 2), (9, 16), (2, 130), (2, 4, 5, 3)]


def check_case(
    backend: str,
    case: CouplingCase,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    which: Sequence[int] = (0, 1),
    coarse: bool = False,
) -> None:
    """Values and gradients against float64: at most twice as far off as eager.

    In 16 bits eager's values are computed in float32 and rounded once, as are the gradients of splines; those of an
    affine layer come from its rounded output, so that eager is computed in 16 bits there. ``coarse`` allows one unit in
    the last place: Triton's interpreter truncates what it stores in bfloat16.
    """
    spline = case in SPLINE_CASES
    operands = case.make(shape)
    if spline:  # of two bins of which one is a needle the errors of two formulas are no measure of each other
        operands[1:] = [0.5 * operand for operand in operands[1:]]
    operands = [operand.to(dtype) for operand in operands]
    call = case.call
    if isinstance(mask := mask_of(case.options.get("mask"), shape), Tensor):
        call = functools.partial(case.call, mask=mask.to(device))
    with use_backend(backend):
        actual = values_and_gradients(call, [operand.to(device) for operand in operands], which)
    actual = [a.cpu() for a in actual]
    exact = values_and_gradients(case.call_eager, [operand.double() for operand in operands], which)
    eager = values_and_gradients(case.call_eager, [operand.float() for operand in operands], which)
    count = len(exact) - len(operands)
    if not spline and dtype != torch.float32:
        eager[count:] = values_and_gradients(case.call_eager, operands, which)[count:]
    eager = [e.to(a.dtype) for e, a in zip(eager, actual, strict=True)]
    size = max((float(e.abs().max()) for e in exact if e.numel()), default=1.0)
    rounding = 5e-6 if spline else 1e-6
    of_values = torch.finfo(dtype).eps if coarse else rounding
    of_gradients = torch.finfo(dtype).eps if coarse else max(rounding, 0.5 * torch.finfo(dtype).eps)
    for part, tiny in ((slice(0, count), of_values), (slice(count, None), of_gradients)):
        assert_parity(actual[part], eager[part], exact[part], tiny=tiny * max(1.0, size))


def affine_args(
    x: Tensor,
    shift: Tensor,
    log_scale: Tensor | None,
    mask: str | Tensor | None = None,
    scale_map: str = "exp",
    inverse: bool = False,
) -> tuple[Any, ...]:
    """Arguments of ``dgm::coupling_affine``."""
    region = resolve(mask, x).op_args(x)
    return (x, shift, log_scale, *region, tuple(SCALE_MAPS).index(scale_map), inverse, x.dtype)


def spline_args(x: Tensor, *raw: Tensor, bound: float = 3.0, tails: bool = True, inverse: bool = False) -> Any:
    """Arguments of ``dgm::coupling_spline``."""
    return (x, *raw, bound, tails, 1e-3, 1e-3, 1e-3, inverse, x.dtype)
