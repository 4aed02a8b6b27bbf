"""Invertible linear maps with their log-determinants: PyTorch's matrix products are the fast form of these."""

from __future__ import annotations

import functools
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.backends import is_traced
from .._core.checks import check_batch, check_device, check_float
from .checks import check_channels, check_permutation, values_known
from .reference import work_dtype


def actnorm(x: Tensor, shift: Tensor, log_scale: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """Affine map per channel: ``y = x exp(log_scale) + shift``, ``logdet = pixels * sum(log_scale)``.

    The inverse is ``x = (y - shift) exp(-log_scale)``. Saves its output in place of ``x``.
    :class:`dgm_kernels.nn.ActNorm` sets the parameters from the first batch.

    Args:
        x: ``[batch, channels, ...]``; with ``inverse`` the y.
        shift: ``[channels]``.
        log_scale: ``[channels]``.
        inverse: computes x from y.

    Returns:
        y like ``x`` (dtype: PyTorch's promotion of the three), and logdet ``[batch]`` in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device; the message names it.

    Source: Kingma and Dhariwal, "Glow", 2018.
    """
    check_batch("x", x)
    check_channels("shift", shift, x)
    check_channels("log_scale", log_scale, x)
    work = work_dtype(x, shift, log_scale)
    dtype = _promoted(x, shift, log_scale)
    wide = shift.to(work), log_scale.to(work)  # x exp(log_scale) + shift is rounded to 16 bits once
    y = (_per_channel if is_traced() else _ActNorm.apply)(x, *wide, inverse, dtype)
    pixels = math.prod(x.shape[2:])
    total = log_scale.to(work).sum() * (-pixels if inverse else pixels)
    return y, total.expand(x.shape[0]).clone()


def _per_pixel(parameter: Tensor, x: Tensor) -> Tensor:
    return parameter.view(-1, *[1] * (x.dim() - 2))


def _per_channel(x: Tensor, shift: Tensor, log_scale: Tensor, inverse: bool, dtype: torch.dtype) -> Tensor:
    scale, shift = (_per_pixel(t, x) for t in (torch.exp(-log_scale if inverse else log_scale), shift))
    return ((x - shift) * scale if inverse else torch.addcmul(shift, x, scale)).to(dtype)


class _ActNorm(torch.autograd.Function):
    """One pass forward; saves the output, from which x exp(log_scale) = y - shift."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, log_scale: Tensor, inverse: bool, dtype: torch.dtype) -> Tensor:
        y = _per_channel(x, shift, log_scale, inverse, dtype)
        ctx.save_for_backward(y, shift, log_scale)
        ctx.inverse, ctx.dtype = inverse, x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, shift, log_scale = ctx.saved_tensors
        dims = (0, *range(2, y.dim()))
        scaled = grad * _per_pixel(torch.exp(-log_scale if ctx.inverse else log_scale), y)
        if ctx.inverse:
            to_shift, to_scale = -scaled.sum(dims), -(grad * y).sum(dims, dtype=shift.dtype)
        else:
            to_shift = grad.sum(dims, dtype=shift.dtype)
            to_scale = (grad * (y - _per_pixel(shift, y))).sum(dims)
        return scaled.to(ctx.dtype), to_shift, to_scale, None, None


def triangular_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    lower: bool = True,
    negative_slope: float = 1.0,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Layer of an invertible MLP: ``y = leaky_relu(x W^T + bias)`` with triangular W.

    ``logdet = sum log abs(w_ii) + log(negative_slope) * (number of negative outputs)``. The inverse is a triangular
    solve. Saves ``x``, not y, for the backward pass: rebuilding x by a solve would multiply rounding errors by the
    condition number of W.

    Args:
        x: ``[batch, D]``; with ``inverse`` the y.
        weight: ``[D, D]``, of which only the lower triangle is read (the upper one with ``lower=False``).
        bias: ``[D]`` or None.
        lower: which triangle.
        negative_slope: of the leaky ReLU; positive, for ReLU itself (slope 0) is not injective. 1 is no activation.
        inverse: computes x from y.

    Returns:
        y like ``x`` (dtype: PyTorch's promotion), and logdet ``[batch]`` in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value, such as a diagonal with a zero or
            non-finite entry (looked at on the CPU only; on a GPU logdet is then -inf or NaN).
    """
    check_batch("x", x)
    if x.dim() != 2:
        raise ValueError(f"x must have shape [batch, features], got {tuple(x.shape)}")
    _check_matrix("weight", weight, (x.shape[1], x.shape[1]), x)
    if bias is not None:
        _check_matrix("bias", bias, (x.shape[1],), x)
    if not isinstance(negative_slope, (int, float)):
        raise TypeError(f"negative_slope must be a number, got {type(negative_slope).__name__}")
    if not 0 < negative_slope < math.inf:
        raise ValueError(f"negative_slope must be positive (a slope of 0 is not injective), got {negative_slope!r}")
    diagonal = weight.diagonal()
    if values_known(weight):
        bad = ~(diagonal.isfinite() & (diagonal != 0))
        if bad.any():
            i = int(bad.nonzero()[0])
            raise ValueError(f"weight must have a finite, non-zero diagonal, got {float(diagonal[i])} at {i}")
    work = work_dtype(x, weight, bias)
    dtype = _promoted(x, weight) if bias is None else _promoted(x, weight, bias)
    triangle = weight.tril() if lower else weight.triu()
    total = diagonal.to(work).abs().log().sum()
    if inverse:
        h = x.to(work) if negative_slope == 1 else F.leaky_relu(x.to(work), 1 / negative_slope)
        h = h if bias is None else h - bias.to(work)
        y = torch.linalg.solve_triangular(triangle.to(work).T, h, upper=lower, left=False).to(dtype)
        return y, -total - _log_slopes(x, negative_slope, work)
    h = F.linear(x.to(dtype), triangle.to(dtype), None if bias is None else bias.to(dtype))
    y = h if negative_slope == 1 else F.leaky_relu(h, negative_slope)
    return y, total + _log_slopes(h, negative_slope, work)


def _log_slopes(x: Tensor, negative_slope: float, dtype: torch.dtype) -> Tensor:
    """Of the leaky ReLU, summed up over every sample."""
    return (x < 0).sum(1).to(dtype) * math.log(negative_slope)


def invertible_conv1x1(
    x: Tensor,
    lower: Tensor,
    upper: Tensor,
    log_abs_diagonal: Tensor,
    sign: Tensor,
    permutation: Tensor,
    *,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Invertible 1x1 convolution by its LU decomposition: ``y = W x`` for every pixel, ``W = P L U``.

    L has ones on its diagonal and ``lower`` below it; U has ``sign exp(log_abs_diagonal)`` on its diagonal and
    ``upper`` above it; ``(P v)_i = v_permutation[i]``. ``logdet = pixels * sum(log_abs_diagonal)``. Saves ``x``, for
    the reason that :func:`triangular_linear` gives.

    Args:
        x: ``[batch, C, ...]``; with ``inverse`` the y.
        lower: ``[C, C]``, of which the part below the diagonal is read.
        upper: ``[C, C]``, of which the part above the diagonal is read.
        log_abs_diagonal: ``[C]``.
        sign: ``[C]``, 1 or -1.
        permutation: int64 ``[C]``.
        inverse: computes x from y.

    Returns:
        y like ``x`` (dtype: PyTorch's promotion), and logdet ``[batch]`` in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value, such as a non-finite
            ``log_abs_diagonal`` (looked at on the CPU only).

    Source: Kingma and Dhariwal, "Glow: Generative Flow with Invertible 1x1 Convolutions", 2018, section 3.2.
    """
    check_batch("x", x)
    check_channels("log_abs_diagonal", log_abs_diagonal, x)
    check_channels("sign", sign, x)
    check_permutation("permutation", permutation, x)
    channels = x.shape[1]
    for name, value in (("lower", lower), ("upper", upper)):
        _check_matrix(name, value, (channels, channels), x)
    if values_known(log_abs_diagonal) and not log_abs_diagonal.isfinite().all():
        raise ValueError("log_abs_diagonal must be finite: W would be singular")
    if values_known(sign) and not (sign.abs() == 1).all():
        raise ValueError("sign must hold 1 and -1 only")
    work = work_dtype(x, lower, upper, log_abs_diagonal)
    unit = torch.eye(channels, dtype=work, device=x.device)
    low = lower.to(work).tril(-1) + unit
    up = upper.to(work).triu(1) + torch.diag(sign.to(work) * torch.exp(log_abs_diagonal.to(work)))
    if inverse:
        matrix = torch.linalg.solve_triangular(low, unit, upper=False, unitriangular=True)
        matrix = torch.linalg.solve_triangular(up, matrix, upper=True)[:, permutation]
    else:
        with _no_autocast(x.device):
            matrix = (low @ up)[permutation]
    total = log_abs_diagonal.to(work).sum() * (math.prod(x.shape[2:]) * (-1 if inverse else 1))
    return _mix(x, matrix, _promoted(x, lower, upper, log_abs_diagonal)), total.expand(x.shape[0]).clone()


def householder(x: Tensor, vectors: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """Product of Householder reflections over the channels: ``y = H_k ... H_1 x``, ``H_i = I - 2 v v^T / v^T v``.

    Orthogonal: logdet = 0, and the inverse applies the reflections in the other order.

    Args:
        x: ``[batch, C, ...]``; with ``inverse`` the y.
        vectors: ``[k, C]``; any number of them.
        inverse: computes x from y.

    Returns:
        y like ``x`` (dtype: PyTorch's promotion), and logdet ``[batch]``, zeros in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value, such as a vector of length 0
            (looked at on the CPU only).

    Source: Tomczak and Welling, "Improving Variational Auto-Encoders using Householder Flow", 2016.
    """
    check_batch("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must have shape [batch, channels, ...], got {tuple(x.shape)}")
    shape = (*getattr(vectors, "shape", ())[:1], x.shape[1])
    _check_matrix("vectors", vectors, shape, x)
    work = work_dtype(x, vectors)
    squares = vectors.to(work).square().sum(1)
    if values_known(vectors) and not ((squares > 0) & squares.isfinite()).all():
        raise ValueError("vectors must be finite and not have length 0")
    matrix = torch.eye(x.shape[1], dtype=work, device=x.device)
    with _no_autocast(x.device):
        for v, square in zip(vectors.to(work), squares, strict=True):
            matrix = matrix - torch.outer(v * (2 / square), v @ matrix)
    matrix = matrix.T if inverse else matrix
    return _mix(x, matrix, _promoted(x, vectors)), x.new_zeros(x.shape[0], dtype=work)


def permute_channels(x: Tensor, permutation: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """Permutation of the channels: ``y[:, i] = x[:, permutation[i]]``, logdet = 0.

    Args:
        x: ``[batch, C, ...]``; with ``inverse`` the y.
        permutation: int64 ``[C]``.
        inverse: computes x from y.

    Returns:
        y like ``x``, and logdet ``[batch]``, zeros in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value; the message names it.
    """
    check_batch("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must have shape [batch, channels, ...], got {tuple(x.shape)}")
    check_permutation("permutation", permutation, x)
    order = permutation.argsort() if inverse else permutation
    return x.index_select(1, order), x.new_zeros(x.shape[0], dtype=work_dtype(x))


def _promoted(*tensors: Tensor) -> torch.dtype:
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def _mix(x: Tensor, matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix applied to the channels of every pixel."""
    x, matrix = x.to(dtype), matrix.to(dtype)
    if x.dim() == 4 and x.numel():  # convolutions take no empty images
        return F.conv2d(x, matrix[:, :, None, None])
    return torch.matmul(matrix, x.flatten(2)).view(x.shape) if x.dim() > 2 else F.linear(x, matrix)


def _no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """For the making of a matrix, which is then rounded once."""
    known = torch.amp.is_autocast_available(device.type)  # not so for the meta device
    if known and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _check_matrix(name: str, value: object, shape: tuple[int, ...], x: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, for x of {tuple(x.shape)}, got {tuple(value.shape)}")
    check_device(name, value, x, "x")
    check_float(name, value)
