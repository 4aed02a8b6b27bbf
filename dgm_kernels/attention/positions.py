"""Positions that attention applies in its kernels: rotations of queries and keys, biases that fall with distance."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from .._core.checks import as_int

__all__ = ["ALiBi", "Rotary", "alibi", "rotary", "rotary_2d"]


@dataclasses.dataclass(frozen=True, eq=False)
class Rotary:
    """Rotary positions: at position p the r-th pair of features (a, b) becomes ``(a c - b s, a s + b c)``.

    Args:
        table: float32 ``[positions, pairs, 2]``: cosine c and sine s of each position and pair. Features beyond the
            first ``2 pairs`` pass unchanged.
        interleaved: pairs are features ``2 r`` and ``2 r + 1``; otherwise ``r`` and ``r + pairs``.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
    """

    table: Tensor
    interleaved: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.table, Tensor):
            raise TypeError(f"table must be a tensor, got {type(self.table).__name__}")
        if self.table.dim() != 3 or self.table.shape[2] != 2:
            raise ValueError(f"table must have shape [positions, pairs, 2], got {tuple(self.table.shape)}")
        if self.table.dtype != torch.float32:
            raise TypeError(f"table must be float32, got {self.table.dtype}")

    def to(self, device: torch.device | str) -> Rotary:
        """The same on another device."""
        return Rotary(self.table.to(device), self.interleaved)

    def apply(self, x: Tensor, first: int = 0) -> Tensor:
        """``x [..., length, features]`` rotated, for positions from ``first`` on; computed in float32 at least."""
        table = self.table[first : first + x.shape[-2]]
        pairs = table.shape[1]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        turned, rest = wide[..., : 2 * pairs], wide[..., 2 * pairs :]
        a, b = turned.unflatten(-1, (pairs, 2)).unbind(-1) if self.interleaved else turned.chunk(2, dim=-1)
        cos, sin = table.to(wide.dtype).unbind(-1)
        both = (a * cos - b * sin, a * sin + b * cos)
        turned = torch.stack(both, -1).flatten(-2) if self.interleaved else torch.cat(both, -1)
        return torch.cat([turned, rest], -1).to(x.dtype)


def rotary(
    length: int, dim: int, *, base: float = 10000.0, interleaved: bool = False, device: torch.device | str | None = None
) -> Rotary:
    """Rotary positions ``0 .. length - 1`` for ``dim`` features: pair r turns by ``position * base^(-2 r / dim)``."""
    _check(2, dim, base, length=length)
    angles = _angles(_range(length), dim // 2, base)
    return Rotary(_table(angles, device), interleaved)


def rotary_2d(
    height: int,
    width: int,
    dim: int,
    *,
    base: float = 10000.0,
    interleaved: bool = False,
    device: torch.device | str | None = None,
) -> Rotary:
    """Axial rotary positions of pixels in raster order: half of the pairs turn by row, the others by column."""
    _check(4, dim, base, height=height, width=width)
    rows, columns = (_angles(_range(n), dim // 4, base) for n in (height, width))
    both = (rows[:, None].expand(height, width, -1), columns[None].expand(height, width, -1))
    return Rotary(_table(torch.cat(both, -1).flatten(0, 1), device), interleaved)


@dataclasses.dataclass(frozen=True, eq=False)
class ALiBi:
    """Adds ``-slopes[h] |i - j|`` to the scores of head h, for query i and key j.

    Args:
        slopes: float32 ``[heads]``.

    Source: Press et al., "Train Short, Test Long: Attention with Linear Biases", 2022.
    """

    slopes: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.slopes, Tensor):
            raise TypeError(f"slopes must be a tensor, got {type(self.slopes).__name__}")
        if self.slopes.dim() != 1 or self.slopes.dtype != torch.float32:
            raise ValueError(f"slopes must be float32 [heads], got {self.slopes.dtype} {tuple(self.slopes.shape)}")

    def bias(self, queries: int, keys: int, first: int = 0) -> Tensor:
        """As a tensor ``[heads, queries, keys]``."""
        i = torch.arange(first, first + queries, device=self.slopes.device)[:, None]
        distance = (i - torch.arange(keys, device=self.slopes.device)).abs()
        return -self.slopes[:, None, None] * distance


def alibi(heads: int, *, device: torch.device | str | None = None) -> ALiBi:
    """The slopes of the paper: a geometric sequence from ``2^(-8 / n)`` on, for n heads, a power of two.

    For other numbers of heads every second slope of the next power of two follows those of the power below.
    """
    number = as_int(heads)
    if number is None or number < 1:
        raise ValueError(f"heads must be a positive int, got {heads!r}")
    below = 1 << (number.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (h + 1) / below) for h in range(below)]
    slopes += [2.0 ** (-4.0 * (2 * h + 1) / below) for h in range(number - below)]
    return ALiBi(torch.tensor(slopes, dtype=torch.float32, device=device))


def _range(count: int) -> Tensor:
    """On the CPU whatever the default device is: a model that is built without memory still has its positions."""
    return torch.arange(count, dtype=torch.float64, device="cpu")


def _angles(positions: Tensor, pairs: int, base: float) -> Tensor:
    return positions[:, None] * base ** (-_range(pairs) / max(1, pairs))


def _table(angles: Tensor, device: torch.device | str | None) -> Tensor:
    table = torch.stack([angles.cos(), angles.sin()], -1).to(torch.float32)
    return table.to(torch.get_default_device() if device is None else device)


def _check(divisor: int, dim: object, base: object, **extents: object) -> None:
    for name, value, multiple in (*((name, extent, 1) for name, extent in extents.items()), ("dim", dim, divisor)):
        number = as_int(value)
        if number is None:
            raise TypeError(f"{name} must be an int, got {value!r}")
        if number < 1 or number % multiple:
            raise ValueError(f"{name} must be positive and divisible by {multiple}, got {number}")
    if not isinstance(base, (int, float)) or not 0 < base < math.inf:
        raise ValueError(f"base must be a positive number, got {base!r}")
