"""Encoders and decoders: dense and convolutional."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autoregressive.base import check_image
from ..flows.conditioners import check_dropout
from ..model import check_positive, check_sizes

NETWORKS = ("dense", "conv")


class Dense(nn.Module):
    """Linear layers with SiLU and dropout between them; what they are conditioned on comes in beside the input.

    Args:
        features: of the input.
        hidden: sizes of the hidden layers.
        shape: of the output.
        classes: of a condition; 0 for none.
        dropout: share of the hidden units that is dropped in training.

    Shape:
        ``[batch, ...]`` with ``features`` numbers each to ``[batch, *shape]``.
    """

    def __init__(
        self, features: int, hidden: Sequence[int], shape: Sequence[int], classes: int = 0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        sizes = [features + classes, *check_sizes("hidden", hidden), math.prod(shape)]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(sizes))
        self.classes, self.shape = classes, tuple(shape)
        self.dropout = nn.Dropout(check_dropout(dropout))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """``[batch, *shape]``."""
        x = _beside(x.flatten(1), labels, self.classes)
        for layer in self.layers[:-1]:
            x = self.dropout(F.silu(layer(x)))
        return self.layers[-1](x).unflatten(1, self.shape)


class ConvEncoder(nn.Module):
    """Convolutions, each but the first at half the resolution with twice the features, and a dense layer.

    Args:
        shape: of the picture.
        width: features at full resolution.
        depth: number of halvings.
        outputs: size of the output.
        classes, dropout: see :class:`Dense`; whole features are dropped.
    """

    def __init__(
        self, shape: Sequence[int], width: int, depth: int, outputs: int, classes: int = 0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        channels, inner = _inner(shape, width, depth)
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.ModuleList(
            nn.Conv2d(width << place, width << place + 1, 4, stride=2, padding=1) for place in range(depth)
        )
        self.last = Dense(math.prod(inner), (), (outputs,), classes)
        self.dropout = nn.Dropout2d(check_dropout(dropout))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """``[batch, channels, height, width]`` to ``[batch, outputs]``."""
        for layer in (self.first, *self.down):
            x = self.dropout(F.silu(layer(x)))
        return self.last(x, labels)


class ConvDecoder(nn.Module):
    """The way back of :class:`ConvEncoder`: a dense layer, and transposed convolutions.

    Args:
        features: of the input.
        shape: of the picture.
        channels: of the output, in place of those of the picture.
        width, depth, classes, dropout: see :class:`ConvEncoder`.
    """

    def __init__(
        self,
        features: int,
        shape: Sequence[int],
        channels: int,
        width: int,
        depth: int,
        classes: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _, inner = _inner(shape, width, depth)
        self.first = Dense(features, (), inner, classes)
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(width << place + 1, width << place, 4, stride=2, padding=1)
            for place in reversed(range(depth))
        )
        self.last = nn.Conv2d(width, channels, 3, padding=1)
        self.dropout = nn.Dropout2d(check_dropout(dropout))

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """``[batch, features]`` to ``[batch, channels, height, width]``."""
        x = self.dropout(F.silu(self.first(z, labels)))
        for layer in self.up:
            x = self.dropout(F.silu(layer(x)))
        return self.last(x)


def _beside(x: Tensor, labels: Tensor | None, classes: int) -> Tensor:
    """``[batch, features + classes]``: with the class as zeros and a one."""
    if not classes or labels is None:
        return x
    return torch.cat([x, F.one_hot(labels, classes).to(x.dtype)], dim=1)


def _inner(shape: Sequence[int], width: int, depth: int) -> tuple[int, tuple[int, int, int]]:
    """Channels of the picture, and the shape of the features at the lowest resolution."""
    channels, height, across = check_image(shape)
    check_positive("width", width)
    factor = 1 << check_positive("depth", depth)
    if height % factor or across % factor:
        raise ValueError(f"image_shape must have a height and a width divisible by 2**depth = {factor}, got {shape}")
    return channels, (width << depth, height // factor, across // factor)
