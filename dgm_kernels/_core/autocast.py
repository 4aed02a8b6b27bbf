"""What autocast makes of the operands of a product."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of products under autocast on this device; None where autocast is off."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def cast_for_product(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``x`` in the dtype of :func:`autocast_dtype`; float64 stays."""
    return x if dtype is None or x.dtype == torch.float64 else x.to(dtype)


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Products inside keep the dtype of their operands, whatever autocast would make of them."""
    if autocast_dtype(device) is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def elementwise_dtype(*tensors: Tensor) -> torch.dtype:
    """What eager PyTorch gives: promotion, and float32 at least under CUDA's autocast, where exp is computed so."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    if tensors[0].is_cuda and torch.is_autocast_enabled("cuda"):
        dtype = torch.promote_types(dtype, torch.float32)
    return dtype
