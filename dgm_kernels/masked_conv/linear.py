"""Dense layers of which only the weights between increasing degrees count, as in MADE."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.checks import check_batch, check_device, check_float
from .checks import check_bias
from .operands import in_one_dtype
from .overridable import overridable


@overridable
def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    in_degrees: Tensor | None = None,
    out_degrees: Tensor | None = None,
    *,
    strict: bool = False,
) -> Tensor:
    """``linear(x, weight * mask, bias)`` where a weight counts if the degree of its output is at least its input's.

    What the other weights hold, NaN too, is not used, and their gradient is 0. Differentiable to any order.

    Args:
        x: ``[..., inputs]``.
        weight: ``[outputs, inputs]``. It is never written to.
        bias: ``[outputs]``.
        in_degrees, out_degrees: int64 ``[inputs]`` and ``[outputs]``: of the features, their places in the order; of
            hidden units, the last place that they may see.
        strict: the degree of the output must be greater, as in the last layer of a MADE (or in its first).

    Returns:
        ``[..., outputs]`` in the dtype of ``x``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device; the message names it.

    Source: Germain et al., "MADE: Masked Autoencoder for Distribution Estimation", 2015.
    """
    check_batch("x", x)
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight must have shape [outputs, {x.shape[-1]}], got {tuple(weight.shape)}")
    check_float("weight", weight)
    check_device("weight", weight, x, "x")
    check_bias(bias, weight, x)
    x, weight, bias = in_one_dtype(x, weight, bias)
    mask = degree_mask(in_degrees, out_degrees, weight, strict)
    return F.linear(x, weight.where(mask, 0.0), bias)


def degree_mask(in_degrees: object, out_degrees: object, weight: Tensor, strict: bool) -> Tensor:
    """Which weights ``[outputs, inputs]`` count."""
    for name, value, size in (("out_degrees", out_degrees, 0), ("in_degrees", in_degrees, 1)):
        if not isinstance(value, Tensor) or value.dtype != torch.int64:
            raise TypeError(f"{name} must be an int64 tensor, got {getattr(value, 'dtype', type(value).__name__)}")
        if tuple(value.shape) != (weight.shape[size],):
            raise ValueError(f"{name} must have shape {(weight.shape[size],)}, got {tuple(value.shape)}")
        check_device(name, value, weight, "weight")
    assert isinstance(in_degrees, Tensor) and isinstance(out_degrees, Tensor)
    return out_degrees[:, None] > in_degrees if strict else out_degrees[:, None] >= in_degrees
