"""MADE: masked dense networks in several orders of the pixels, and the mixture of their distributions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_kernels import NoiseKey, noise_like
from dgm_kernels.nn import MaskedLinear

from ..flows.conditioners import check_dropout, hidden_degrees
from ..model import check_positive, check_sizes
from ..registry import register_model
from .base import Autoregressive, check_output, check_shape, class_bias

ORDERS = ("random", "natural")


@register_model("made")
class MADE(Autoregressive):
    """Masked dense networks whose outputs for a number see only those before it, in an order of each network's own.

    Args:
        image_shape: of one sample.
        hidden: sizes of the hidden layers of each network.
        networks: how many are trained, each by itself; the model is the mean of their probabilities.
        order: ``"random"``, another one for each network, or ``"natural"``: raster order, in a pixel colour by colour.
        dropout: share of the hidden units that is dropped in training.
        levels: of the data in [-1, 1], equally spaced: with 2 the distributions are Bernoulli, with more categorical.
        num_classes: classes to condition on; None for none.

    Source: Germain et al., "MADE: Masked Autoencoder for Distribution Estimation", 2015.
    """

    default_settings: ClassVar = {"steps": 2500, "validation_draws": 1}

    def __init__(
        self,
        image_shape: Sequence[int] = (1, 8, 8),
        hidden: Sequence[int] = (512,),
        networks: int = 16,
        order: str = "random",
        dropout: float = 0.5,
        levels: int = 2,
        num_classes: int | None = None,
    ) -> None:
        output = check_output(None, levels)
        if order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
        shape = check_shape(image_shape)
        numbers = 1 if output == "bernoulli" else levels
        mixture = [
            MaskedMLP(
                natural_order(shape) if order == "natural" else random_order(math.prod(shape), place),
                check_sizes("hidden", hidden),
                numbers,
                dropout=check_dropout(dropout),
                num_classes=num_classes,
            )
            for place in range(check_positive("networks", networks))
        ]
        super().__init__(image_shape, mixture, (math.prod(shape),), output, levels, num_classes)


class MaskedMLP(nn.Module):
    """A dense network whose outputs for a number see only the numbers before it; without hidden layers, a linear map.

    Args:
        order: int64 ``[numbers]``, a permutation of 1 .. numbers: the place of each in the order.
        hidden: sizes of the hidden layers.
        outputs: of each number.
        dropout: share of the hidden units that is dropped in training.
        num_classes: classes to condition on; None for none.

    Shape:
        ``[batch, numbers]`` to ``[batch, numbers * outputs]``, those of the first number first.
    """

    def __init__(
        self,
        order: Tensor,
        hidden: Sequence[int],
        outputs: int,
        *,
        dropout: float = 0.0,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        degrees = [order, *(hidden_degrees(size, len(order)) for size in hidden)]
        layers = [MaskedLinear(before, after) for before, after in itertools.pairwise(degrees)]
        last = MaskedLinear(degrees[-1], order.repeat_interleave(outputs), strict=True)
        nn.init.normal_(last.weight, std=0.01)
        layers.append(last)
        biases = [class_bias(num_classes, layer.out_features) for layer in layers]
        for layer in layers:
            nn.init.zeros_(layer.bias)
        self.layers = nn.ModuleList(layers)
        self.class_biases = nn.ModuleList(bias for bias in biases if bias is not None)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:
        """``[batch, numbers * outputs]``."""
        for place, layer in enumerate(self.layers):
            if place > 0:
                x = self.dropout(F.relu(x))
            x = layer(x)
            if self.class_biases:
                x = x + self.class_biases[place](classes)
        return x


def natural_order(shape: Sequence[int]) -> Tensor:
    """The place of each number of a sample in raster order, 1 .. their number; the colours of a pixel one by one."""
    channels, pixels = shape[0], math.prod(shape[1:])
    return (torch.arange(channels)[:, None] + channels * torch.arange(pixels)).flatten() + 1


def random_order(numbers: int, seed: int) -> Tensor:
    """A random permutation of 1 .. numbers; the same for a seed on every machine, so that it need not be saved."""
    # The default dtype and device may be others, the order may not.
    like = torch.empty(1, numbers, dtype=torch.float32, device="cpu")
    u = noise_like(like, NoiseKey(seed), distribution="uniform")[0]
    return u.argsort(stable=True).to(torch.get_default_device()) + 1
