"""Which taps of a masked kernel are live: the one place that the reference, the kernels and the generator ask."""

from __future__ import annotations

import dataclasses
import enum

import torch
from torch import Tensor


class Layout(enum.IntEnum):
    """Where the centre of a kernel of ``kh x kw`` taps is, and what lies beyond it."""

    RASTER = 0  # centre (kh // 2, kw // 2); later pixels in raster order are masked
    VERTICAL = 1  # centre (kh - 1, kw // 2); every tap is above or in the centre's row
    HORIZONTAL = 2  # kh = 1, centre (0, kw - 1); every tap is at the centre or left of it


class Rule(enum.IntEnum):
    """Which channels a tap connects, given the groups of its output and its input channel."""

    DEAD = 0
    FULL = 1
    LESS = 2  # group of the input < group of the output
    LESS_EQUAL = 3


@dataclasses.dataclass(frozen=True)
class Tap:
    """One live tap: its place in the kernel, the offset of the pixel that it reads, and its rule."""

    row: int
    column: int
    dy: int
    dx: int
    rule: Rule


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The geometry of a masked kernel.

    Args:
        strict: mask type A, which hides the centre (all of the centre's row with ``Layout.VERTICAL``).
    """

    layout: Layout
    strict: bool
    groups: int
    height: int
    width: int
    dilation: tuple[int, int]

    @property
    def centre(self) -> tuple[int, int]:
        """Row and column of the tap that reads the pixel itself."""
        if self.layout == Layout.RASTER:
            return self.height // 2, self.width // 2
        return self.height - 1, self.width // 2 if self.layout == Layout.VERTICAL else self.width - 1

    def rule(self, row: int, column: int) -> Rule:
        """The rule of the tap at this place."""
        centre_row, centre_column = self.centre
        if row != centre_row:
            return Rule.FULL if row < centre_row else Rule.DEAD
        if self.layout == Layout.VERTICAL:
            return Rule.DEAD if self.strict else Rule.FULL
        if column != centre_column:
            return Rule.FULL if column < centre_column else Rule.DEAD
        if self.groups > 1:
            return Rule.LESS if self.strict else Rule.LESS_EQUAL
        return Rule.DEAD if self.strict else Rule.FULL

    def taps(self) -> list[Tap]:
        """The live taps in raster order."""
        (centre_row, centre_column), (step_y, step_x) = self.centre, self.dilation
        return [
            Tap(row, column, (row - centre_row) * step_y, (column - centre_column) * step_x, rule)
            for row in range(self.height)
            for column in range(self.width)
            if (rule := self.rule(row, column)) != Rule.DEAD
        ]

    def mask(self, outputs: int, inputs: int, device: torch.device | None = None) -> Tensor:
        """Which weights count: bool ``[outputs, inputs, height, width]``."""
        after = torch.arange(outputs, device=device) * self.groups // max(outputs, 1)
        before = torch.arange(inputs, device=device) * self.groups // max(inputs, 1)
        channels = {
            Rule.DEAD: torch.zeros(outputs, inputs, dtype=torch.bool, device=device),
            Rule.FULL: torch.ones(outputs, inputs, dtype=torch.bool, device=device),
            Rule.LESS: before < after[:, None],
            Rule.LESS_EQUAL: before <= after[:, None],
        }
        rows = [
            torch.stack([channels[self.rule(row, column)] for column in range(self.width)], dim=-1)
            for row in range(self.height)
        ]
        return torch.stack(rows, dim=-2)
