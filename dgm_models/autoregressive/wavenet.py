"""WaveNet: dilated causal convolutions with gates over a sequence, such as sound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from dgm_kernels.nn import CausalConv1d

from ..flows.conditioners import check_dropout
from ..model import check_positive, check_sizes
from ..registry import register_model
from .base import Autoregressive, check_output, class_bias, output_channels


@register_model("wavenet")
class WaveNet(Autoregressive):
    """A stack of causal convolutions whose dilation doubles from layer to layer: it sees far back at little cost.

    The numbers of a sample are one sequence, channel by channel in a step: ``(channels, steps)`` for sound, or a
    picture in raster order.

    Args:
        image_shape: of one sample, channels first.
        width: features of a layer.
        depth: number of dilated layers.
        cycle: the dilations are 1, 2, 4, ..., ``2 ** (cycle - 1)``, and again from 1.
        kernel_size: taps of a layer, 2 or more.
        dropout: share of a layer's features that is dropped in training.
        output: ``"bernoulli"``, ``"categorical"`` or ``"logistic_mixture"``; None for the first at 2 levels and for
            the second at more.
        levels: of the data in [-1, 1], equally spaced; 256 for sound.
        mixtures: components of a mixture of logistics.
        networks: how many are trained, each by itself; the model is the mean of their probabilities.
        num_classes: classes to condition on; None for none.

    Source: van den Oord et al., "WaveNet: A Generative Model for Raw Audio", 2016.
    """

    default_settings: ClassVar = {"steps": 1500, "batch_size": 32, "lr": 3e-3, "validation_draws": 1}

    def __init__(
        self,
        image_shape: Sequence[int] = (1, 8, 8),
        width: int = 48,
        depth: int = 12,
        cycle: int = 6,
        kernel_size: int = 3,
        dropout: float = 0.3,
        output: str | None = None,
        levels: int = 17,
        mixtures: int = 5,
        networks: int = 1,
        num_classes: int | None = None,
    ) -> None:
        shape = check_sizes("image_shape", image_shape)
        if len(shape) < 2:
            raise ValueError(f"image_shape must be (channels, steps) or (channels, height, width), got {shape}")
        output = check_output(output, levels)
        if check_positive("kernel_size", kernel_size) < 2:
            raise ValueError(f"kernel_size must be at least 2, got {kernel_size}")
        check_positive("cycle", cycle)
        mixture = [
            WaveNetNetwork(
                output_channels(output, 1, levels, mixtures),
                width=check_positive("width", width),
                dilations=[2 ** (place % cycle) for place in range(check_positive("depth", depth))],
                kernel_size=kernel_size,
                dropout=check_dropout(dropout),
                num_classes=num_classes,
            )
            for _ in range(check_positive("networks", networks))
        ]
        super().__init__(image_shape, mixture, (1, math.prod(shape)), output, levels, num_classes)

    def _to_network(self, x: Tensor) -> Tensor:
        """Channels innermost: those of a step stand next to each other in the sequence."""
        return x.flatten(2).transpose(1, 2).reshape(x.shape[0], *self.network_shape)

    def _from_network(self, x: Tensor) -> Tensor:
        channels = self.sample_shape[0]
        return x.view(x.shape[0], -1, channels).transpose(1, 2).reshape(x.shape[0], *self.sample_shape)


class WaveNetNetwork(nn.Module):
    """The network of :class:`WaveNet`: ``[batch, 1, length]`` to ``[batch, outputs, length]``.

    Args:
        outputs: numbers a step.
        dilations: of the layers.
        width, kernel_size, dropout, num_classes: as in :class:`WaveNet`.
    """

    def __init__(
        self,
        outputs: int,
        *,
        width: int,
        dilations: Sequence[int],
        kernel_size: int,
        dropout: float,
        num_classes: int | None,
    ) -> None:
        super().__init__()
        self.first = CausalConv1d(1, width, kernel_size + 1, mask_type="A")  # the tap that it hides is not one to count
        self.layers = nn.ModuleList(
            DilatedLayer(width, kernel_size, dilation, dropout, num_classes, last=place == len(dilations) - 1)
            for place, dilation in enumerate(dilations)
        )
        self.last = nn.ModuleList(nn.Conv1d(width, size, 1) for size in (width, outputs))

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:
        """``[batch, outputs, length]``."""
        x = skips = self.first(x)
        for layer in self.layers:
            x, skip = layer(x, classes)
            skips = skips + skip
        hidden, out = self.last
        return out(F.relu(hidden(F.relu(skips))))


class DilatedLayer(nn.Module):
    """A gated dilated convolution, residual unless it is the last, with a skip connection to the output layers."""

    def __init__(
        self, width: int, kernel_size: int, dilation: int, dropout: float, num_classes: int | None, *, last: bool
    ) -> None:
        super().__init__()
        self.dilated = CausalConv1d(width, 2 * width, kernel_size, dilation=dilation, gated=True)
        self.residual = None if last else nn.Conv1d(width, width, 1)
        self.skip = nn.Conv1d(width, width, 1)
        self.class_bias = class_bias(num_classes, 2 * width)
        self.dropout = nn.Dropout1d(dropout)

    def forward(self, x: Tensor, classes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The next layer's input and what the output layers add up, both like x."""
        condition = None if self.class_bias is None else self.class_bias(classes)
        hidden = self.dropout(self.dilated(x, condition))
        return x if self.residual is None else x + self.residual(hidden), self.skip(hidden)
