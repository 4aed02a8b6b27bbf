"""Normalisations of deep networks, each with what follows it in the same pass: modulation, residual, SiLU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._core import layout, ops
from .._core.backends import select
from . import op, reference
from .checks import (
    check_eps,
    check_groups,
    check_modulated,
    check_normalized_shape,
    check_parameter,
    per_sample,
)

__all__ = ["group_norm_silu", "layer_norm", "modulated_layer_norm", "rms_norm"]


def layer_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer normalisation: ``y = (x - mean) / sqrt(variance + eps) * weight + bias``; as ``F.layer_norm``.

    Mean and variance are those of the last dimensions; the variance is taken about the mean. 16-bit tensors are worked
    on in float32. Differentiable to any order; saves ``x``, the weight, and mean and 1 / deviation of every row.

    Args:
        x: ``[..., *normalized_shape]``.
        normalized_shape: the sizes of the dimensions to normalise over, the last ones of ``x``.
        weight: ``normalized_shape``; None for 1.
        bias: likewise; None for 0.
        eps: added to the variance.

    Returns:
        y like ``x``, contiguous (under CUDA's autocast float32).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value; the message names the argument.

    Source: Ba, Kiros and Hinton, "Layer Normalization", 2016.
    """
    shape = check_normalized_shape(normalized_shape, x)
    check_parameter("weight", weight, shape, x, "normalized_shape")
    check_parameter("bias", bias, shape, x, "normalized_shape")
    dtype = _at_least_float32_under_autocast(x, x.dtype)
    return _rows(x, shape, weight=weight, bias=bias, eps=check_eps(eps), dtype=dtype)[0]


def rms_norm(
    x: Tensor, normalized_shape: int | Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Root-mean-square normalisation: ``y = x / sqrt(mean of x^2 + eps) * weight``; as ``F.rms_norm``.

    16-bit tensors are worked on in float32. Differentiable to any order; saves ``x``, the weight, and one number a row.

    Args:
        x: ``[..., *normalized_shape]``.
        normalized_shape: the sizes of the dimensions to normalise over, the last ones of ``x``.
        weight: ``normalized_shape``; None for 1.
        eps: added to the mean of the squares; None for the rounding of the dtype of the arithmetic, that is 1.2e-7, or
            2.2e-16 for float64.

    Returns:
        y like ``x``, contiguous (under CUDA's autocast float32).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value; the message names the argument.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    shape = check_normalized_shape(normalized_shape, x)
    check_parameter("weight", weight, shape, x, "normalized_shape")
    number = torch.finfo(reference.work_dtype(x)).eps if eps is None else check_eps(eps)
    dtype = _at_least_float32_under_autocast(x, x.dtype)
    return _rows(x, shape, weight=weight, rms=True, eps=number, dtype=dtype)[0]


def modulated_layer_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """Adaptive layer normalisation (adaLN): ``y = LN(h) (1 + scale) + shift`` over the last dimension.

    ``h = x``, or with a residual ``h = residual + gate x``: the end of one branch of a transformer and the beginning of
    the next. ``LN(h) = (h - mean) / sqrt(variance + eps) * weight + bias``. 16-bit tensors are worked on in float32.
    Differentiable to any order; saves h (in place of the residual; with a gate x too), the parameters, and mean and
    1 / deviation of every row.

    Args:
        x: ``[batch, ..., D]``; with a residual what a branch gives.
        scale: ``[batch, D]``, one for all the tokens of a sample, or what broadcasts as ``[batch, 1.., D]`` to ``x``. A
            view, such as a part of a network's output, is read where it is.
        shift: like ``scale``.
        weight: ``[D]``; None for 1.
        bias: ``[D]``; None for 0.
        gate: like ``scale``; None for 1. Only with a residual.
        residual: like ``x``; None for none.
        eps: added to the variance.

    Returns:
        y like ``x``, contiguous; with a residual y and h. Dtypes are those of PyTorch's promotion.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value, or there is a gate without a
            residual; the message names the argument.

    Source: Peebles and Xie, "Scalable Diffusion Models with Transformers", 2023, section 3.2.
    """
    shape = (check_modulated(x, residual, gate),)
    check_parameter("weight", weight, shape, x, "the last dimension of x")
    check_parameter("bias", bias, shape, x, "the last dimension of x")
    rows = [per_sample(name, value, x, -1) for name, value in (("scale", scale), ("shift", shift))]
    gate = None if gate is None else per_sample("gate", gate, x, -1)
    h_dtype = _promoted(*(tensor for tensor in (x, residual, gate) if tensor is not None))
    dtype = _promoted(*rows, start=_at_least_float32_under_autocast(x, h_dtype))
    y, h = _rows(
        x, shape, residual, gate, weight, bias, *rows, eps=check_eps(eps), dtype=dtype, h_dtype=h_dtype
    )  # fmt: skip
    return y if h is None else (y, h)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Group normalisation and SiLU: ``y = silu(GN(x) (1 + scale) + shift)``, ``silu(z) = z / (1 + exp(-z))``.

    ``GN(x) = (x - mean) / sqrt(variance + eps) * weight + bias`` with mean and variance of a group of channels of one
    sample, as ``F.group_norm``; scale and shift are the time embedding of a U-Net. 16-bit tensors are worked on in
    float32. Differentiable to any order; saves ``x``, the parameters, and mean and 1 / deviation of every group.

    Args:
        x: ``[batch, channels, ...]``.
        num_groups: divides the channels.
        weight: ``[channels]``; None for 1.
        bias: ``[channels]``; None for 0.
        eps: added to the variance.
        scale: ``[batch, channels]``, or what broadcasts as ``[batch, channels, 1..]`` to ``x``; None for 0. A view,
            such as a half of a network's output, is read where it is.
        shift: likewise.

    Returns:
        y like ``x``, in its memory format. Dtypes are those of PyTorch's promotion.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value; the message names the argument.

    Source: Wu and He, "Group Normalization", 2018; Elfwing, Uchibe and Doya, "Sigmoid-weighted linear units", 2018;
        scale and shift: Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021.
    """
    groups = check_groups(num_groups, x)
    check_parameter("weight", weight, x.shape[1:2], x, "the channels of x")
    check_parameter("bias", bias, x.shape[1:2], x, "the channels of x")
    scale = None if scale is None else per_sample("scale", scale, x, 1)
    shift = None if shift is None else per_sample("shift", shift, x, 1)
    number = check_eps(eps)
    modulation = [tensor for tensor in (scale, shift) if tensor is not None]
    dtype = _promoted(*modulation, start=_at_least_float32_under_autocast(x, x.dtype))
    given = (x, weight, bias, scale, shift)
    backend = "reference" if x.shape[1] == 0 else select(x.device, given, natives=op.BACKENDS)
    if backend == "reference":
        y = reference.group_norm_silu(op.as_channels(x), weight, bias, scale, shift, groups, number, dtype)
        y = y.reshape(x.shape)
    else:
        y = ops.call(
            op.group_silu[backend],
            _needs_grad(given),
            x.contiguous(),
            *(None if tensor is None else tensor.contiguous() for tensor in (weight, bias)),
            *(None if tensor is None else layout.rows(tensor) for tensor in (scale, shift)),
            groups,
            number,
            dtype,
        )[0]
    return _in_format_of(x, y)


def _in_format_of(x: Tensor, y: Tensor) -> Tensor:
    """``y`` with the channels last if those of ``x`` are, else contiguous."""
    last = x.dim() in (4, 5) and x.shape[1] > 1 and x.stride(1) == 1 and x.stride(-1) == x.shape[1]
    if not last:
        return y.contiguous()
    return y.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def _promoted(*tensors: Tensor, start: torch.dtype | None = None) -> torch.dtype:
    dtype = tensors[0].dtype if start is None else start
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _at_least_float32_under_autocast(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Under CUDA's autocast PyTorch normalises in float32; that of the CPU leaves the dtype as it is."""
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        return torch.promote_types(dtype, torch.float32)
    return dtype


def _needs_grad(tensors: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _rows(
    x: Tensor,
    shape: tuple[int, ...],
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    rms: bool = False,
    eps: float,
    dtype: torch.dtype,
    h_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Normalises over the last ``len(shape)`` dimensions; gate, scale and shift are ``[batch, D]``."""
    h_dtype = x.dtype if h_dtype is None else h_dtype
    given = (x, residual, gate, weight, bias, scale, shift)
    size = 1
    for length in shape:
        size *= length
    backend = "reference" if size == 0 else select(x.device, given, natives=op.BACKENDS)
    if backend == "reference":
        batch = 1 if scale is None else x.shape[0]
        wide = None if residual is None else op.as_rows(residual, batch, size)
        w, b = (None if t is None else t.reshape(size) for t in (weight, bias))
        settings = (rms, eps, dtype, h_dtype)
        y, h = reference.norm_rows(op.as_rows(x, batch, size), wide, gate, w, b, scale, shift, *settings)
        return y.reshape(x.shape).contiguous(), None if h is None else h.reshape(x.shape).contiguous()
    y, h, *_ = ops.call(
        op.rows[backend],
        _needs_grad(given),
        x.contiguous(),
        None if residual is None else residual.contiguous(),
        None if gate is None else layout.rows(gate),
        *(None if tensor is None else tensor.contiguous() for tensor in (weight, bias)),
        *(None if tensor is None else layout.rows(tensor) for tensor in (scale, shift)),
        size,
        rms,
        eps,
        dtype,
        h_dtype,
    )
    return y, None if residual is None else h
