"""A denoiser for vectors and small images: residual blocks of linear layers that are shifted by the time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..model import check_positive
from .embedding import Condition


class MLP(nn.Module):
    """``depth`` blocks ``h + W2 silu(W1 norm(h) + c)``, with ``c`` a linear map of the time and the class.

    Args:
        shape: of one sample.
        width: of the hidden layers; even.
        depth: number of blocks.
        num_classes: of the labels, or None.
    """

    def __init__(self, shape: Sequence[int], width: int, depth: int, num_classes: int | None = None) -> None:
        super().__init__()
        check_positive("depth", depth)
        if check_positive("width", width) % 2:
            raise ValueError(f"width must be even, got {width}")
        elements = math.prod(shape)
        self.condition = Condition(width, num_classes)
        self.inward = nn.Linear(elements, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.outward = nn.Linear(width, elements)

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        """``x``: ``[batch, *shape]``; ``time``, ``label``: ``[batch]``. Returns a tensor like ``x``."""
        condition = self.condition(time, label)
        h = self.inward(x.flatten(1))
        for block in self.blocks:
            h = block(h, condition)
        return self.outward(F.silu(h)).reshape(x.shape)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first = nn.Linear(width, width)
        self.shift = nn.Linear(width, width)
        self.second = nn.Linear(width, width)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        return h + self.second(F.silu(self.first(self.norm(h)) + self.shift(F.silu(condition))))
