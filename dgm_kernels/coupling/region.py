"""Which elements of a sample a coupling layer transforms, and which pass unchanged."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._core.checks import check_device

NAMES = ("channels", "channels_flipped", "checkerboard", "checkerboard_flipped")


class Region(NamedTuple):
    """Channels ``[start, stop)`` of dimension 1 are transformed, but for the elements that pass unchanged.

    Those are given by ``fixed`` (a bool tensor that broadcasts to x, True where x passes) or by the parity of the sum
    of an element's spatial indices (-1: none is fixed).
    """

    start: int | None = None
    stop: int | None = None
    fixed: Tensor | None = None
    parity: int = -1

    @property
    def whole(self) -> bool:
        """Every element is transformed."""
        return self.start is None and self.fixed is None and self.parity < 0

    def op_args(self, x: Tensor) -> tuple[Tensor | None, int, int, int, int, int]:
        """The region as native ops take it: fixed, start and stop (elements of a sample), parity, row width, plane."""
        sample, pixels = math.prod(x.shape[1:]), math.prod(x.shape[2:])
        start, stop = (0, sample) if self.start is None or self.stop is None else (self.start, self.stop)
        if self.start is not None:
            start, stop = start * pixels, stop * pixels
        fixed = None if self.fixed is None else _repeating(self.fixed, x)
        if x.dim() == 2:  # the features are the only "spatial" dimension
            return fixed, start, stop, self.parity, sample, sample
        return fixed, start, stop, self.parity, x.shape[-1] if x.dim() > 2 else 1, pixels

    def fixed_mask(self, x: Tensor) -> Tensor | None:
        """True where x passes unchanged, broadcastable to x; None if there is no such element in the channels."""
        if self.parity < 0:
            return self.fixed
        dims = range(2, x.dim()) if x.dim() > 2 else range(1, x.dim())
        total = torch.zeros((), dtype=torch.int64, device=x.device)
        for dim in dims:
            shape = [1] * x.dim()
            shape[dim] = x.shape[dim]
            total = total + torch.arange(x.shape[dim], device=x.device).view(shape)
        return total % 2 == self.parity


def _repeating(fixed: Tensor, x: Tensor) -> Tensor:
    """A mask as the native ops read it: contiguous, its elements those of the batch, or of the end of every sample."""
    per_sample = fixed.dim() == x.dim() and fixed.shape[0] != 1
    sizes = fixed.shape[fixed.dim() - min(fixed.dim(), x.dim() - 1) :]
    while sizes and sizes[0] == 1:
        sizes = sizes[1:]
    if not per_sample and sizes == x.shape[x.dim() - len(sizes) :]:
        return fixed.reshape(-1).contiguous()
    return (
        (fixed if per_sample else fixed.view(sizes))
        .expand(x.shape if per_sample else x.shape[1:])
        .reshape(-1)
        .contiguous()
    )


def resolve(mask: Tensor | str | None, x: Tensor) -> Region:
    """Checks the argument ``mask`` of the coupling functions."""
    if mask is None:
        return Region()
    if isinstance(mask, Tensor):
        return _given(mask, x)
    if not isinstance(mask, str):
        raise TypeError(f"mask must be None, a bool tensor or one of {', '.join(NAMES)}, got {type(mask).__name__}")
    if mask not in NAMES:
        raise ValueError(f"mask must be a bool tensor or one of {', '.join(map(repr, NAMES))}, got {mask!r}")
    if x.dim() < 2:
        raise ValueError(f"mask={mask!r} needs x of shape [batch, channels, ...], got {tuple(x.shape)}")
    if mask.startswith("checkerboard"):
        if x.dim() > 4:
            raise ValueError(f"mask={mask!r} needs x of at most 4 dimensions, got {tuple(x.shape)}")
        return Region(parity=int(mask.endswith("_flipped")))
    channels = x.shape[1]
    if channels % 2:
        raise ValueError(f"mask={mask!r} splits dimension 1 of x into halves: its size must be even, got {channels}")
    half = channels // 2
    return Region(0, half) if mask.endswith("_flipped") else Region(half, channels)


def _given(mask: Tensor, x: Tensor) -> Region:
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, True where x passes unchanged, got {mask.dtype}")
    check_device("mask", mask, x, "x")
    try:
        fits = torch.broadcast_shapes(mask.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"mask must broadcast to the shape of x, {tuple(x.shape)}, got {tuple(mask.shape)}")
    return Region(fixed=mask)


def flat_region(x: Tensor, fixed: Tensor | None, start: int, stop: int, parity: int, width: int, plane: int) -> Region:
    """What :meth:`Region.op_args` says, as a region of samples flattened to one dimension."""
    if x.dim() == 1:
        return Region(fixed=fixed)
    elements = math.prod(x.shape[1:])
    if parity >= 0:
        place = torch.arange(elements, device=x.device) % max(plane, 1)
        fixed = (place // max(width, 1) + place % max(width, 1)) % 2 == parity
    elif fixed is not None:
        fixed = (
            fixed.view(x.shape[0], elements) if fixed.numel() == x.numel() else fixed.repeat(elements // fixed.numel())
        )
    whole = stop - start == elements
    return Region(None if whole else start, None if whole else stop, fixed)
