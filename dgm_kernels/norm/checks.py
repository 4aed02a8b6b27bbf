"""Checks of the arguments of the norm op."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from .._core.checks import as_int, check_batch, check_device, check_float, check_like


def check_normalized_shape(normalized_shape: object, x: Tensor) -> tuple[int, ...]:
    """``normalized_shape`` is the end of the shape of ``x``, which is a floating-point tensor; returned as a tuple."""
    check_batch("x", x)
    given = normalized_shape if isinstance(normalized_shape, (Sequence, tuple)) else (normalized_shape,)
    shape = []
    for size in given:
        number = as_int(size)
        if number is None:
            raise TypeError(f"normalized_shape must be an int or ints, got {normalized_shape!r}")
        shape.append(number)
    if not shape:
        raise ValueError("normalized_shape must name at least one dimension, got none")
    if len(shape) > x.dim() or tuple(x.shape[x.dim() - len(shape) :]) != tuple(shape):
        raise ValueError(f"normalized_shape must be the end of the shape of x, {tuple(x.shape)}, got {tuple(shape)}")
    return tuple(shape)


def check_parameter(name: str, value: object, shape: Sequence[int], x: Tensor, what: str) -> None:
    """``value`` is None or a floating-point tensor of this shape, described by ``what``, on the device of ``x``."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {type(value).__name__}")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must have the shape of {what}, {tuple(shape)}, got {tuple(value.shape)}")
    check_device(name, value, x, "x")
    check_float(name, value)


def check_eps(eps: object) -> float:
    """``eps`` is a number that may be added to a variance."""
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a number, got {type(eps).__name__}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and not negative, got {eps}")
    return float(eps)


def check_groups(num_groups: object, x: object) -> int:
    """``x`` is ``[batch, channels, ...]``, and ``num_groups`` divides its channels."""
    check_batch("x", x)
    assert isinstance(x, Tensor)
    if x.dim() < 2:
        raise ValueError(f"x must have shape [batch, channels, ...], got {tuple(x.shape)}")
    number = as_int(num_groups)
    if number is None:
        raise TypeError(f"num_groups must be an int, got {num_groups!r}")
    if number < 1 or x.shape[1] % number:
        raise ValueError(f"num_groups must be positive and divide the channels of x, {x.shape[1]}, got {number}")
    return number


def check_modulated(x: object, residual: object, gate: object) -> int:
    """x, residual and gate of an adaptive layer norm fit together; returns the size of a row."""
    check_batch("x", x)
    assert isinstance(x, Tensor)
    if x.dim() < 2:
        raise ValueError(f"x must have shape [batch, ..., D], got {tuple(x.shape)}")
    if residual is not None:
        check_like("residual", residual, x, "x")
    elif gate is not None:
        raise ValueError("gate must be None without a residual: h = residual + gate x")
    return x.shape[-1]


def per_sample(name: str, value: object, x: Tensor, dim: int) -> Tensor:
    """``value``, of one number for each sample and each place in dimension ``dim`` of ``x``, as ``[batch, places]``.

    It may have that shape, or any that broadcasts to ``x`` and varies along these two dimensions alone.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    check_device(name, value, x, "x")
    check_float(name, value)
    dim = dim % x.dim()
    batch, places = x.shape[0], x.shape[dim]
    if value.dim() == x.dim():
        others = [size for d, size in enumerate(value.shape) if d not in (0, dim)]
        fits = all(size == 1 for size in others)
        flat = value.reshape(value.shape[0], value.shape[dim]) if fits else value
    else:
        flat = value[None] if value.dim() == 1 else value
        fits = flat.dim() == 2
    if not (fits and flat.shape[0] in (1, batch) and flat.shape[1] in (1, places)):
        ones = ["batch", *["1"] * (x.dim() - 1)]
        ones[dim] = str(places)
        raise ValueError(
            f"{name} must have shape {(batch, places)}, or broadcast to it, or as [{', '.join(ones)}] to x, "
            f"got {tuple(value.shape)}"
        )
    return flat if tuple(flat.shape) == (batch, places) else flat.expand(batch, places)
