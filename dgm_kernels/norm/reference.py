"""The norm op in plain PyTorch: the specification, and what runs where no native backend does."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def work_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of arithmetic: float64 if one of the tensors is, else float32."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def norm_rows(
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    rms: bool,
    eps: float,
    dtype: torch.dtype,
    h_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """``y = (N(h) weight + bias) (1 + scale) + shift`` over the last dimension, ``h = residual + gate x``.

    ``N(h)`` is ``(h - mean) / sqrt(variance + eps)``, or with ``rms`` ``h / sqrt(mean of h^2 + eps)``. x and residual
    are ``[batch, tokens, D]``; gate, scale and shift ``[batch, D]``; weight and bias ``[D]``. Returns y in ``dtype``
    and h in ``h_dtype``, from which the statistics are taken, or None without a residual.
    """
    work = work_dtype(x, residual, gate, weight, bias, scale, shift)
    h, rounded = x.to(work), None
    if residual is not None:
        h = residual.to(work) + (h if gate is None else gate.to(work)[:, None] * h)
        rounded = h.to(h_dtype)
        h = rounded.to(work)
    y = _normalize(h, rms, eps)
    y = y if weight is None else y * weight.to(work)
    y = y if bias is None else y + bias.to(work)
    y = y if scale is None else y * (1 + scale.to(work)[:, None])
    y = y if shift is None else y + shift.to(work)[:, None]
    return y.to(dtype), rounded


def _normalize(h: Tensor, rms: bool, eps: float) -> Tensor:
    """Over the last dimension. The mean is taken twice: what rounding left of it is subtracted, too."""
    if not rms:
        h = h - h.mean(-1, keepdim=True)
        h = h - h.mean(-1, keepdim=True)
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)


def group_norm_silu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """``y = silu((N(x) weight + bias) (1 + scale) + shift)``, N over each of the groups of channels.

    x is ``[batch, channels, elements]``; scale and shift ``[batch, channels]``; weight and bias ``[channels]``.
    """
    work = work_dtype(x, weight, bias, scale, shift)
    z = _normalize(x.to(work).unflatten(1, (groups, -1)).flatten(2), False, eps).view(x.shape)
    z = z if weight is None else z * weight.to(work)[:, None]
    z = z if bias is None else z + bias.to(work)[:, None]
    z = z if scale is None else z * (1 + scale.to(work)[:, :, None])
    z = z if shift is None else z + shift.to(work)[:, :, None]
    return F.silu(z).to(dtype)
