"""Operands of a product in one dtype, as autocast and PyTorch's own products want them."""

from __future__ import annotations

from torch import Tensor

from .._core.autocast import autocast_dtype, cast_for_product


def in_one_dtype(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocast makes of the operands of a convolution or dense layer; then they must be of one dtype."""
    dtype = autocast_dtype(x.device)
    x, weight = cast_for_product(x, dtype), cast_for_product(weight, dtype)
    bias = None if bias is None else cast_for_product(bias, dtype)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != x.dtype:
            raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {value.dtype}")
    return x, weight, bias
