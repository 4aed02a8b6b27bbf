"""Calls of the masked_conv op's Triton kernels, and what they must give, on any device."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import dgm_kernels as dgm
from tests.contract import assert_parity
from tests.gradients import values_and_gradients

Function = Callable[..., Tensor]


def results(function: Function, operands: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The output, then the gradient of every operand, computed in ``dtype``."""
    return values_and_gradients(function, [operand.to(dtype) for operand in operands])


def check(function: Function, eager: Function, operands: Sequence[Tensor], tiny: float = 1e-6) -> None:
    """Output and gradients: at most twice as far off as eager on the same device, and on the device of the operands."""
    dtype = operands[0].dtype
    with dgm.use_backend("triton"):
        actual = results(function, operands, dtype)
    exact, same = results(eager, operands, torch.float64), results(eager, operands, dtype)
    for a, s, e in zip(actual, same, exact, strict=True):
        assert a.device == operands[0].device
        assert_parity(a.to(s.dtype), s, e, tiny * max(1.0, float(e.abs().max()) if e.numel() else 0.0))
