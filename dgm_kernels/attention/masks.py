"""Which keys a query sees, as a description from which kernels skip work: no matrix of queries by keys is stored."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._core.checks import as_int

__all__ = ["Mask", "causal", "document", "neighborhood_2d", "prefix", "raster_2d", "sliding_window"]

_CELLS = 64  # of a picture, along a side


class Columns(NamedTuple):
    """Keys are seen whose column in a picture of this width is at most ``radius`` away; width 0 stands for all keys."""

    width: int
    radius: int


class Region(NamedTuple):
    """What kernels read of a mask: of keys in ``[bounds[i, 0], bounds[i, 1])`` query i sees those in ``columns``."""

    bounds: Tensor  # int32 [queries, 2]
    columns: Columns


@dataclasses.dataclass(frozen=True)
class _Causal:
    offset: int

    def sees(self, i: Tensor, j: Tensor) -> Tensor:
        return j <= i + self.offset

    def interval(self, i: Tensor, keys: int) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(i), i + (self.offset + 1)

    def __str__(self) -> str:
        return f"causal({self.offset})"


@dataclasses.dataclass(frozen=True)
class _Prefix:
    length: int

    def sees(self, i: Tensor, j: Tensor) -> Tensor:
        return (j < self.length) | (j <= i)

    def interval(self, i: Tensor, keys: int) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(i), (i + 1).clamp(min=self.length)

    def __str__(self) -> str:
        return f"prefix({self.length})"


@dataclasses.dataclass(frozen=True)
class _SlidingWindow:
    left: int | None
    right: int | None

    def sees(self, i: Tensor, j: Tensor) -> Tensor:
        seen = (j == j) & (i == i)
        if self.left is not None:
            seen = seen & (j >= i - self.left)
        return seen if self.right is None else seen & (j <= i + self.right)

    def interval(self, i: Tensor, keys: int) -> tuple[Tensor, Tensor]:
        begin = torch.zeros_like(i) if self.left is None else i - self.left
        return begin, torch.full_like(i, keys) if self.right is None else i + (self.right + 1)

    def __str__(self) -> str:
        return f"sliding_window({self.left}, {self.right})"


@dataclasses.dataclass(frozen=True)
class _Neighborhood2d:
    height: int
    width: int
    radius: tuple[int, int]  # in rows, in columns
    past: bool = False  # only pixels before this one
    include_self: bool = True

    @property
    def length(self) -> int:
        return self.height * self.width

    @property
    def columns(self) -> Columns:
        return Columns(self.width, min(self.radius[1], self.width))

    def sees(self, i: Tensor, j: Tensor) -> Tensor:
        rows = (i // self.width - j // self.width).abs() <= self.radius[0]
        seen = rows & ((i % self.width - j % self.width).abs() <= self.radius[1])
        if not self.include_self:
            seen = seen & (i != j)
        return seen & (j <= i) if self.past else seen

    def interval(self, i: Tensor, keys: int) -> tuple[Tensor, Tensor]:
        row, column = i // self.width, i % self.width
        rows, columns = min(self.radius[0], self.height), min(self.radius[1], self.width)  # more reaches no further
        # Below 0 or beyond the last row there is no key, so rows need no bounds of their own.
        begin = (row - rows) * self.width + (column - columns).clamp(min=0)
        if self.past:
            return begin, i + int(self.include_self)
        last = (column + columns).clamp(max=self.width - 1)
        return begin, (row + rows) * self.width + last + 1

    def __str__(self) -> str:
        radius = self.radius[0] if self.radius[0] == self.radius[1] else self.radius
        if not self.past:
            return f"neighborhood_2d({self.height}, {self.width}, {radius})"
        suffix = ", include_self=True" if self.include_self else ""
        return f"raster_2d({self.height}, {self.width}, {radius}{suffix})"


@dataclasses.dataclass(frozen=True)
class _Document:
    lengths: tuple[int, ...]

    @property
    def length(self) -> int:
        return sum(self.lengths)

    def _ends(self, device: torch.device) -> Tensor:
        return torch.tensor(list(itertools.accumulate(self.lengths)), dtype=torch.int64, device=device)

    def sees(self, i: Tensor, j: Tensor) -> Tensor:
        ends = self._ends(i.device)
        return torch.bucketize(i, ends, right=True) == torch.bucketize(j, ends, right=True)

    def interval(self, i: Tensor, keys: int) -> tuple[Tensor, Tensor]:
        ends = self._ends(i.device)
        of = torch.bucketize(i, ends, right=True)
        return torch.cat([ends.new_zeros(1), ends])[of], ends[of]

    def __str__(self) -> str:
        return f"document({list(self.lengths)})"


Term = _Causal | _Prefix | _SlidingWindow | _Neighborhood2d | _Document


@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys each query sees; made by the functions of :mod:`dgm_kernels.masks`, and combined with ``&``.

    Queries and keys are counted from 0: query i and key i stand for the same token. ``print(mask.show(16))`` draws it.
    """

    terms: tuple[Term, ...]

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        return Mask(self.terms + other.terms)

    def __str__(self) -> str:
        return " & ".join(map(str, self.terms))

    __repr__ = __str__

    @property
    def length(self) -> int | None:
        """The number of tokens that the mask is made for; None if for any.

        Raises:
            ValueError: its parts are made for different numbers of tokens.
        """
        lengths = {term.length for term in self.terms if isinstance(term, (_Neighborhood2d, _Document))}
        if len(lengths) > 1:
            raise ValueError(f"mask {self} combines masks for {' and '.join(map(str, sorted(lengths)))} tokens")
        return next(iter(lengths), None)

    def _check_tokens(self, *ends: int) -> None:
        """A mask that is made for some tokens says nothing of others."""
        if (length := self.length) is not None and max(ends) > length:
            raise ValueError(f"mask {self} is made for {length} tokens, got {max(ends)}")

    @property
    def columns_agree(self) -> bool:
        """Whether all pictures in the mask have one width, so that it has a :meth:`region`."""
        return len({term.width for term in self.terms if isinstance(term, _Neighborhood2d)}) <= 1

    def dense(
        self, queries: int, keys: int | None = None, *, first: int = 0, device: torch.device | str | None = None
    ) -> Tensor:
        """The mask as a bool matrix ``[queries, keys]``, True where a key is seen, for queries from ``first`` on."""
        keys = queries if keys is None else keys
        self._check_tokens(first + queries, keys)
        i, j = torch.arange(first, first + queries, device=device)[:, None], torch.arange(keys, device=device)
        return functools.reduce(torch.logical_and, [term.sees(i, j) for term in self.terms])

    def region(
        self, queries: int, keys: int, *, first: int = 0, device: torch.device | str | None = None
    ) -> Region | None:
        """The mask as kernels read it; None for a combination of pictures of different widths, which they cannot."""
        self._check_tokens(first + queries, keys)
        if not self.columns_agree:
            return None
        pictures = [term.columns for term in self.terms if isinstance(term, _Neighborhood2d)]
        columns = Columns(pictures[0].width, min(p.radius for p in pictures)) if pictures else Columns(0, 0)
        i = torch.arange(first, first + queries, device=device)
        begins, ends = zip(*(term.interval(i, keys) for term in self.terms), strict=True)
        begin = functools.reduce(torch.maximum, begins).clamp(0, keys)
        end = functools.reduce(torch.minimum, ends).clamp(0, keys)
        return Region(torch.stack([begin, torch.maximum(begin, end)], dim=1).to(torch.int32), columns)

    def show(self, queries: int | None = None, keys: int | None = None) -> str:
        """A picture: a row for each query, two characters for each key, ``██`` where it is seen.

        Args:
            queries, keys: how many; by default the tokens that the mask is made for, or 16. Of more than 64 a cell
                stands for several, and its shade for the share that is seen.
        """
        queries = queries or self.length or 16
        seen = self.dense(queries, keys or queries).float()
        if max(seen.shape) > _CELLS:
            size = (min(_CELLS, seen.shape[0]), min(_CELLS, seen.shape[1]))
            seen = torch.nn.functional.adaptive_avg_pool2d(seen[None], size)[0]
        levels = (seen * 4).ceil().to(torch.int64)  # a cell of which anything is seen shows it
        return "\n".join("".join(2 * "·░▒▓█"[level] for level in row) for row in levels.tolist())


def causal(offset: int = 0) -> Mask:
    """Query i sees the keys ``j <= i + offset``; -1 leaves the token itself out, as models of images want it.

    A query that sees no key has the result 0. With M keys before N queries, ``causal(M - N)`` aligns the last ones.
    """
    return Mask((_Causal(_int("offset", offset)),))


def prefix(length: int) -> Mask:
    """A prefix language model: every query sees the first ``length`` keys, and all keys ``j <= i``."""
    return Mask((_Prefix(_at_least("length", length, 0)),))


def sliding_window(left: int | None, right: int | None = 0) -> Mask:
    """Query i sees the keys ``i - left <= j <= i + right``; None is without end on that side."""
    sides = [None if side is None else _at_least(name, side, 0) for name, side in (("left", left), ("right", right))]
    return Mask((_SlidingWindow(*sides),))


def raster_2d(height: int, width: int, radius: int | tuple[int, int], *, include_self: bool = False) -> Mask:
    """Tokens are the pixels of a picture in raster order; each sees those before it that are near.

    Args:
        height, width: of the picture.
        radius: the greatest distance, in rows and in columns or one for both.
        include_self: whether a pixel sees itself, as it may where the input is shifted by one.

    Source: Parmar et al., "Image Transformer", 2018.
    """
    grid = _grid(height, width, radius)
    return Mask((_Neighborhood2d(*grid, past=True, include_self=bool(include_self)),))


def neighborhood_2d(height: int, width: int, radius: int | tuple[int, int]) -> Mask:
    """Tokens are the pixels of a picture; each sees those at most ``radius`` rows and columns away, and itself.

    At the border of the picture the neighbourhood is cut off (NATTEN shifts it inside instead).

    Source: Hassani et al., "Neighborhood Attention Transformer", 2023.
    """
    return Mask((_Neighborhood2d(*_grid(height, width, radius)),))


def document(lengths: Sequence[int]) -> Mask:
    """Several sequences packed into one, one after the other: tokens see those of their own sequence.

    Args:
        lengths: of the sequences; their sum is the number of tokens.
    """
    if isinstance(lengths, Tensor):
        lengths = lengths.tolist()
    if not isinstance(lengths, Sequence) or not lengths:
        raise ValueError(f"lengths must be a sequence of at least one int, got {lengths!r}")
    return Mask((_Document(tuple(_at_least(f"lengths[{n}]", length, 0) for n, length in enumerate(lengths))),))


def _grid(height: object, width: object, radius: object) -> tuple[int, int, tuple[int, int]]:
    pair = radius if isinstance(radius, (tuple, list)) else (radius, radius)
    if len(pair) != 2:
        raise ValueError(f"radius must be an int or two, got {radius!r}")
    rows, columns = (_at_least("radius", r, 0) for r in pair)
    return _at_least("height", height, 1), _at_least("width", width, 1), (rows, columns)


def _int(name: str, value: object) -> int:
    number = as_int(value)
    if number is None:
        raise TypeError(f"{name} must be an int, got {value!r}")
    return number


def _at_least(name: str, value: object, least: int) -> int:
    number = _int(name, value)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number
