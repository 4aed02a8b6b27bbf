"""PixelCNN: a stack of masked convolutions, type A first, then residual blocks of type B."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from dgm_kernels.nn import MaskedConv2d

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


@register_model("pixelcnn")
class PixelCNN(Autoregressive):
    """Masked convolutions over the picture; a pixel sees those before it in raster order, but for a blind spot.

    Right above a pixel, beyond the first layer's kernel, lie pixels that no path of type-B layers reaches;
    ``gated_pixelcnn`` has none of them.

    Args:
        image_shape: channels, height and width of a sample. The colours of a pixel come one after the other.
        width: features inside a residual block; twice as many between the blocks. A multiple of the channels.
        depth: number of residual blocks.
        first_kernel_size: of the first layer, odd.
        kernel_size: of the others, odd.
        dropout: share of the features inside a block that is dropped in training.
        output: ``"bernoulli"``, ``"categorical"`` or ``"logistic_mixture"``; None for the first at 2 levels and for
            the second at more.
        levels: of the data in [-1, 1], equally spaced.
        mixtures: components of a mixture of logistics.
        networks: how many are trained, each by itself; the model is the mean of their probabilities.
        num_classes: classes to condition on; None for none.

    Source: van den Oord et al., "Pixel Recurrent Neural Networks", 2016.
    """

    default_settings: ClassVar = {"steps": 1200, "batch_size": 32, "lr": 3e-3, "validation_draws": 1}

    def __init__(
        self,
        image_shape: Sequence[int] = (1, 8, 8),
        width: int = 32,
        depth: int = 3,
        first_kernel_size: int = 7,
        kernel_size: int = 5,
        dropout: float = 0.15,
        output: str | None = None,
        levels: int = 2,
        mixtures: int = 5,
        networks: int = 4,
        num_classes: int | None = None,
    ) -> None:
        channels, _, _ = check_image(image_shape)
        output = check_output(output, levels)
        groups = colour_groups(output, channels, width=width)
        mixture = [
            PixelCNNNetwork(
                channels,
                output_channels(output, channels, levels, mixtures),
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


class PixelCNNNetwork(nn.Module):
    """The network of :class:`PixelCNN`: ``[batch, channels, height, width]`` to ``outputs`` numbers a pixel.

    Args:
        channels: of the picture.
        outputs: numbers a pixel.
        width, depth, dropout, num_classes: as in :class:`PixelCNN`.
        kernel_sizes: of the first layer and of the others.
        groups: colour groups of the features.
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        *,
        width: int,
        depth: int,
        kernel_sizes: tuple[int, int],
        groups: int,
        dropout: float,
        num_classes: int | None,
    ) -> None:
        super().__init__()
        first, later = kernel_sizes
        self.first = MaskedConv2d(channels, 2 * width, first, mask_type="A", channel_groups=groups)
        self.blocks = nn.ModuleList(ResidualBlock(width, later, groups, dropout, num_classes) for _ in range(depth))
        self.last = nn.ModuleList(
            MaskedConv2d(2 * width, size, 1, mask_type="B", channel_groups=groups) for size in (2 * width, outputs)
        )
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:
        """``[batch, outputs, height, width]``."""
        x = self.first(x)
        for block in self.blocks:
            x = block(x, classes)
        hidden, out = self.last
        return out(F.relu(hidden(self.dropout(F.relu(x)))))


class ResidualBlock(nn.Module):
    """``x + conv1x1(relu(conv(relu(conv1x1(relu(x))))))``, the inner convolution with half the features."""

    def __init__(self, width: int, kernel_size: int, groups: int, dropout: float, num_classes: int | None) -> None:
        super().__init__()
        self.narrow = MaskedConv2d(2 * width, width, 1, mask_type="B", channel_groups=groups)
        self.inner = MaskedConv2d(width, width, kernel_size, mask_type="B", channel_groups=groups)
        self.widen = MaskedConv2d(width, 2 * width, 1, mask_type="B", channel_groups=groups)
        self.class_bias = class_bias(num_classes, width)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:
        """Like x."""
        condition = None if self.class_bias is None else self.class_bias(classes)
        hidden = self.dropout(F.relu(self.narrow(self.dropout(F.relu(x)))))
        hidden = self.dropout(F.relu(self.inner(hidden, condition)))
        return x + self.widen(hidden)
