"""Gated PixelCNN: a vertical and a horizontal stack without a blind spot; with mixtures of logistics, PixelCNN++."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_kernels import gated_activation
from dgm_kernels.nn import HorizontalConv2d, MaskedConv2d, VerticalConv2d

from ..flows.conditioners import check_dropout
from ..model import check_positive
from ..registry import register_model
from .base import (
    Autoregressive,
    check_image,
    check_odd,
    check_output,
    class_bias,
    colour_groups,
    output_channels,
)

BLOCKS = ("gated", "concat_elu")


@register_model("gated_pixelcnn")
class GatedPixelCNN(Autoregressive):
    """A vertical stack sees the rows above, a horizontal one the rest of the row: every pixel before, and no other.

    With ``block="concat_elu"`` and ``output="logistic_mixture"`` it is PixelCNN++ at one resolution: its residual
    blocks, its mixture, its two streams, without the strided U-Net.

    Args:
        image_shape: channels, height and width of a sample. The colours of a pixel come one after the other.
        width: features of each stack. A multiple of the channels.
        depth: number of blocks after the first layer.
        first_kernel_size: of the first layer, odd: its stacks read the upper half of such a square.
        kernel_size: of the others, odd.
        block: ``"gated"``, or ``"concat_elu"`` for the residual blocks of PixelCNN++.
        dropout: share of a block's features that is dropped in training.
        output: ``"bernoulli"``, ``"categorical"`` or ``"logistic_mixture"``; None for the first at 2 levels and for
            the second at more.
        levels: of the data in [-1, 1], equally spaced.
        mixtures: components of a mixture of logistics.
        networks: how many are trained, each by itself; the model is the mean of their probabilities.
        num_classes: classes to condition on; None for none.

    Source: van den Oord et al., "Conditional Image Generation with PixelCNN Decoders", 2016; Salimans et al.,
    "PixelCNN++", 2017.
    """

    default_settings: ClassVar = {"steps": 1300, "batch_size": 32, "lr": 3e-3, "validation_draws": 1}

    def __init__(
        self,
        image_shape: Sequence[int] = (1, 8, 8),
        width: int = 24,
        depth: int = 3,
        first_kernel_size: int = 7,
        kernel_size: int = 5,
        block: str = "gated",
        dropout: float = 0.2,
        output: str | None = None,
        levels: int = 2,
        mixtures: int = 5,
        networks: int = 10,
        num_classes: int | None = None,
    ) -> None:
        channels, _, _ = check_image(image_shape)
        output = check_output(output, levels)
        if block not in BLOCKS:
            raise ValueError(f"block must be one of {', '.join(BLOCKS)}, got {block!r}")
        groups = colour_groups(output, channels, width=width)
        if block == "concat_elu" and groups > 1:
            raise ValueError(
                f"block must be 'gated' for {channels} colours with output {output!r}: 'concat_elu' keeps no order "
                "of them (with 'logistic_mixture' it need not)"
            )
        mixture = [
            GatedPixelCNNNetwork(
                channels,
                output_channels(output, channels, levels, mixtures),
                block=GatedBlock if block == "gated" else ConcatEluBlock,
                width=width,
                depth=check_positive("depth", depth),
                kernel_sizes=(check_odd("first_kernel_size", first_kernel_size), check_odd("kernel_size", kernel_size)),
                groups=groups,
                dropout=check_dropout(dropout),
                num_classes=num_classes,
            )
            for _ in range(check_positive("networks", networks))
        ]
        super().__init__(image_shape, mixture, None, output, levels, num_classes)


class GatedPixelCNNNetwork(nn.Module):
    """The network of :class:`GatedPixelCNN`: ``[batch, channels, height, width]`` to ``outputs`` numbers a pixel.

    Args:
        channels: of the picture.
        outputs: numbers a pixel.
        block: class of the blocks.
        width, depth, dropout, num_classes: as in :class:`GatedPixelCNN`.
        kernel_sizes: of the first layer and of the others.
        groups: colour groups of the features.
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        *,
        block: type[GatedBlock] | type[ConcatEluBlock],
        width: int,
        depth: int,
        kernel_sizes: tuple[int, int],
        groups: int,
        dropout: float,
        num_classes: int | None,
    ) -> None:
        super().__init__()
        first, later = kernel_sizes
        self.vertical = VerticalConv2d(channels, width, first, mask_type="A")
        self.horizontal = HorizontalConv2d(channels, width, first // 2 + 1, mask_type="A", channel_groups=groups)
        self.blocks = nn.ModuleList(
            block(width, later, groups, dropout, num_classes, last=place == depth - 1) for place in range(depth)
        )
        self.last = nn.ModuleList(
            MaskedConv2d(width, size, 1, mask_type="B", channel_groups=groups) for size in (width, outputs)
        )

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:
        """``[batch, outputs, height, width]``."""
        vertical = self.vertical(x)
        horizontal = skips = self.horizontal(x)
        for block in self.blocks:
            vertical, horizontal, skip = block(vertical, horizontal, classes)
            skips = skips + skip
        hidden, out = self.last
        return out(F.relu(hidden(F.relu(skips))))


class GatedBlock(nn.Module):
    """One layer of both stacks, each ``tanh(a) * sigmoid(b)`` of a masked convolution.

    The vertical stack's convolution enters the horizontal one's gate; the horizontal stack is residual. The last block
    has but a skip connection: nothing reads its stacks.
    """

    def __init__(
        self, width: int, kernel_size: int, groups: int, dropout: float, num_classes: int | None, *, last: bool
    ) -> None:
        super().__init__()
        self.groups, self.is_last = groups, last
        self.vertical = VerticalConv2d(width, 2 * width, kernel_size)
        self.horizontal = HorizontalConv2d(width, 2 * width, kernel_size // 2 + 1, channel_groups=groups)
        self.link = nn.Conv2d(2 * width, 2 * width, 1)
        self.skip = MaskedConv2d(width, width, 1, mask_type="B", channel_groups=groups)
        if not last:
            self.residual = MaskedConv2d(width, width, 1, mask_type="B", channel_groups=groups)
            self.vertical_class_bias = class_bias(num_classes, 2 * width)
        self.horizontal_class_bias = class_bias(num_classes, 2 * width)
        self.dropout = nn.Dropout2d(dropout)

    def forward(
        self, vertical: Tensor, horizontal: Tensor, classes: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The two stacks and what the output layers add up, all ``[batch, width, height, width of the picture]``."""
        above = self.vertical(vertical)
        both = self.horizontal(horizontal) + self.link(above)
        hidden = gated_activation(both, _bias(self.horizontal_class_bias, classes), channel_groups=self.groups)
        hidden = self.dropout(hidden)
        if self.is_last:
            return vertical, horizontal, self.skip(hidden)
        vertical = self.dropout(gated_activation(above, _bias(self.vertical_class_bias, classes)))
        return vertical, horizontal + self.residual(hidden), self.skip(hidden)


class ConcatEluBlock(nn.Module):
    """One residual layer of both streams of PixelCNN++: ``x + a * sigmoid(b)``, with elu of x and of -x."""

    def __init__(
        self, width: int, kernel_size: int, groups: int, dropout: float, num_classes: int | None, *, last: bool
    ) -> None:
        super().__init__()
        columns = kernel_size // 2 + 1
        self.vertical = nn.ModuleList(
            [VerticalConv2d(2 * width, width, kernel_size), VerticalConv2d(2 * width, 2 * width, kernel_size)]
        )
        self.horizontal = nn.ModuleList(
            [HorizontalConv2d(2 * width, width, columns), HorizontalConv2d(2 * width, 2 * width, columns)]
        )
        self.link = nn.Conv2d(2 * width, width, 1)
        self.vertical_class_bias = class_bias(num_classes, 2 * width)
        self.horizontal_class_bias = class_bias(num_classes, 2 * width)
        self.dropout = nn.Dropout2d(dropout)

    def forward(
        self, vertical: Tensor, horizontal: Tensor, classes: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The two streams and the horizontal one's update, all ``[batch, width, height, width of the picture]``."""
        first, second = self.vertical
        hidden = self.dropout(concat_elu(first(concat_elu(vertical))))
        vertical = vertical + _sigmoid_gate(second(hidden, _bias(self.vertical_class_bias, classes)))
        first, second = self.horizontal
        hidden = first(concat_elu(horizontal)) + self.link(concat_elu(vertical))
        hidden = second(self.dropout(concat_elu(hidden)), _bias(self.horizontal_class_bias, classes))
        update = _sigmoid_gate(hidden)
        return vertical, horizontal + update, update


def concat_elu(x: Tensor) -> Tensor:
    """``[elu(x), elu(-x)]``, twice the channels."""
    return F.elu(torch.cat([x, -x], dim=1))


def _sigmoid_gate(x: Tensor) -> Tensor:
    features, gate = x.chunk(2, dim=1)
    return features * torch.sigmoid(gate)


def _bias(module: nn.Module | None, classes: Tensor | None) -> Tensor | None:
    return None if module is None else module(classes)
