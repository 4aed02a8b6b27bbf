"""What autocast makes of the operands of a product."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of products under autocast on this device; None where autocast is off."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def cast_for_product(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``x`` in the dtype of :func:`autocast_dtype`; float64 stays."""
    return x if dtype is None or x.dtype == torch.float64 else x.to(dtype)
