"""Checks of the arguments of the coupling op."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._core.checks import as_int, check_batch, check_device, check_float, values_known
from .reference import SCALE_MAPS, work_dtype


def check_same(name: str, value: object, shape: Sequence[int], x: Tensor, what: str) -> None:
    """``value`` is a floating-point tensor of this shape on the device of ``x``; ``what`` describes the shape."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.shape != torch.Size(shape):
        raise ValueError(f"{name} must have the shape of {what}, {tuple(shape)}, got {tuple(value.shape)}")
    check_device(name, value, x, "x")
    check_float(name, value)


def check_scale_map(scale_map: object) -> None:
    """``scale_map`` is one of those there are."""
    if scale_map not in SCALE_MAPS:
        raise ValueError(f"scale_map must be one of {', '.join(map(repr, SCALE_MAPS))}, got {scale_map!r}")


def check_spline_settings(bins: int, bound: float, mins: tuple[float, float, float]) -> None:
    """A spline with these settings exists."""
    if bins < 2:
        raise ValueError(f"widths must hold at least 2 bins in its last dimension, got {bins}")
    if not (isinstance(bound, (int, float)) and 0 < bound < math.inf):
        raise ValueError(f"bound must be a positive number, got {bound!r}")
    for name, value in zip(("min_bin_width", "min_bin_height", "min_derivative"), mins, strict=True):
        if not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    for name, value in zip(("min_bin_width", "min_bin_height"), mins, strict=False):
        if not 2**-24 <= value < 1 / bins:
            raise ValueError(
                f"{name} must be at least 2**-24, the rounding of float32, and below {1 / bins:g}, to leave room for "
                f"{bins} bins, got {value!r}"
            )
    if not 0 < mins[2] < math.inf:
        raise ValueError(f"min_derivative must be a positive number, got {mins[2]!r}")


def check_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    bound: float,
    tails: str | None,
    mins: tuple[float, float, float],
) -> None:
    """The arguments of a spline fit together."""
    check_batch("x", x)
    if tails not in ("linear", None):
        raise ValueError(f"tails must be 'linear' or None, got {tails!r}")
    if not isinstance(widths, Tensor):
        raise TypeError(f"widths must be a tensor, got {type(widths).__name__}")
    if widths.dim() != x.dim() + 1:
        raise ValueError(
            f"widths must have the shape of x, {tuple(x.shape)}, and one of the bins, got {tuple(widths.shape)}"
        )
    bins = widths.shape[-1]
    check_spline_settings(bins, bound, mins)
    check_same("widths", widths, (*x.shape, bins), x, "x and the number of bins")
    check_same("heights", heights, (*x.shape, bins), x, "x and the number of bins")
    knots = bins - 1 if tails else bins + 1
    check_same("derivatives", derivatives, (*x.shape, knots), x, f"x and bins {'- 1' if tails else '+ 1'}")


def check_domain(x: Tensor, bound: float) -> None:
    """A CPU tensor is inside the domain of a spline without tails, or NaN. A GPU is not awaited: it answers NaN."""
    if not values_known(x):
        return
    magnitude = x.detach().to(work_dtype(x)).abs()
    outside = (magnitude > bound).sum()
    if outside:
        worst = magnitude.nan_to_num(0.0).max()
        raise ValueError(
            f"x must be in [-{bound:g}, {bound:g}] without tails, got {int(outside)} values outside, up to {worst:g}"
        )


def check_channels(name: str, value: object, x: Tensor) -> None:
    """``value`` holds one number a channel of ``x``."""
    if x.dim() < 2:
        raise ValueError(f"x must have shape [batch, channels, ...], got {tuple(x.shape)}")
    check_same(name, value, (x.shape[1],), x, "the channels of x")


def check_permutation(name: str, value: object, x: Tensor) -> None:
    """``value`` is a permutation of the channels of ``x``."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        raise TypeError(f"{name} must be an int64 tensor, got {getattr(value, 'dtype', type(value).__name__)}")
    if value.shape != (x.shape[1],):
        raise ValueError(f"{name} must have the shape of the channels of x, {(x.shape[1],)}, got {tuple(value.shape)}")
    check_device(name, value, x, "x")
    if values_known(value) and not torch.equal(value.sort().values, torch.arange(x.shape[1])):
        raise ValueError(f"{name} must hold each of 0 .. {x.shape[1] - 1} once")


def check_count(name: str, value: object, least: int) -> int:
    """``value`` is an int from ``least`` on."""
    number = as_int(value)
    if number is None or number < least:
        raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
    return number
