"""Checks of the arguments of the attention op."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._core.checks import check_device, check_float
from .masks import Mask
from .positions import ALiBi, Rotary


def check_operands(q: object, k: object, v: object, enable_gqa: bool) -> None:
    """q ``[..., heads, N, D]``, k ``[..., key heads, M, D]`` and v ``[..., key heads, M, Dv]`` fit together."""
    for name, value in (("q", q), ("k", k), ("v", v)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        check_float(name, value)
        if value.dim() < 2:
            raise ValueError(f"{name} must have shape [..., length, features], got {tuple(value.shape)}")
    assert isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)
    for name, value in (("k", k), ("v", v)):
        check_device(name, value, q, "q")
        if value.dim() != q.dim():
            raise ValueError(f"{name} must have as many dimensions as q, {q.dim()}, got {value.dim()}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k must have the head dimension of q, {q.shape[-1]}, got {k.shape[-1]}")
    if v.shape[-2] != k.shape[-2]:
        raise ValueError(f"v must have as many keys as k, {k.shape[-2]}, got {v.shape[-2]}")
    for name, value, other, like in (("k", k, q, "q"), ("v", v, k, "k"), ("v", v, q, "q")):
        last = -3 if like == "q" and enable_gqa else -2
        if not _broadcast(value.shape[:last], other.shape[:last]):
            raise ValueError(
                f"{name} must have the batch and the heads of {like}, {tuple(other.shape[:-2])}, "
                f"got {tuple(value.shape[:-2])}" + ("" if enable_gqa else "; enable_gqa=True lets heads share keys")
            )
    if enable_gqa:
        if q.dim() < 3:
            raise ValueError(f"q must have a dimension of heads with enable_gqa=True, got shape {tuple(q.shape)}")
        if k.shape[-3] == 0 or q.shape[-3] % k.shape[-3]:
            raise ValueError(f"k must have a number of heads that divides that of q, {q.shape[-3]}, got {k.shape[-3]}")
        if v.shape[-3] not in (1, k.shape[-3]):
            raise ValueError(f"v must have one head or as many as k, {k.shape[-3]}, got {v.shape[-3]}")


def _broadcast(a: torch.Size, b: torch.Size) -> bool:
    return a == b or all(m == n or m == 1 or n == 1 for m, n in zip(a, b, strict=True))


def check_mask(mask: object, queries: int, keys: int, shape: tuple[int, ...], q: Tensor) -> None:
    """A Mask made for this many tokens, or a tensor that broadcasts to the scores, ``shape``."""
    if isinstance(mask, Mask):
        length = mask.length
        if length is not None and (queries, keys) != (length, length):
            raise ValueError(f"mask {mask} is made for {length} tokens, got {queries} queries and {keys} keys")
    elif not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a Mask of dgm_kernels.masks, a tensor or None, got {type(mask).__name__}")
    else:
        if mask.dtype != torch.bool:
            check_float("mask", mask)
        check_scores("mask", mask, shape, q)


def check_bias(bias: object, shape: tuple[int, ...], q: Tensor) -> None:
    """ALiBi with a slope for each head, or a floating-point tensor that broadcasts to the scores, ``shape``."""
    if isinstance(bias, ALiBi):
        heads = shape[-3] if len(shape) > 2 else 1
        if bias.slopes.shape[0] != heads:
            raise ValueError(f"bias must have a slope for each of {heads} heads, got {bias.slopes.shape[0]}")
        check_device("bias", bias.slopes, q, "q")
    elif not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a tensor, ALiBi or None, got {type(bias).__name__}")
    else:
        check_float("bias", bias)
        check_scores("bias", bias, shape, q)


def check_scores(name: str, value: Tensor, shape: tuple[int, ...], q: Tensor) -> None:
    """``value`` broadcasts to ``shape``, that of the scores."""
    check_device(name, value, q, "q")
    padded = (1,) * (len(shape) - value.dim()) + tuple(value.shape)
    if len(padded) > len(shape) or any(n not in (1, size) for n, size in zip(padded, shape, strict=True)):
        raise ValueError(f"{name} must broadcast to {shape}, [..., queries, keys], got {tuple(value.shape)}")


def check_rope(rope: object, positions: int, features: int, q: Tensor) -> None:
    """Rotary positions for all tokens, of at most so many features."""
    if not isinstance(rope, Rotary):
        raise TypeError(f"rope must be a Rotary of dgm_kernels.positions or None, got {type(rope).__name__}")
    rows, pairs, _ = rope.table.shape
    if rows < positions:
        raise ValueError(f"rope must have at least {positions} positions, got {rows}")
    if 2 * pairs > features:
        raise ValueError(f"rope must turn at most the {features} features of q, got {2 * pairs}")
    check_device("rope", rope.table, q, "q")


def check_scale(scale: object) -> None:
    """A finite number, or None."""
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float))):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")


def check_dropout(dropout_p: object) -> None:
    """A probability below 1."""
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p must be a number, got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
