"""The networks that compute a flow layer's parameters: a masked autoregressive one and a plain MLP."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model import check_number, check_sizes

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "tanh": torch.tanh, "elu": F.elu, "silu": F.silu}


class MLP(nn.Module):
    """Linear layers with activation and dropout between them; its output starts near 0.

    Args:
        features: size of the input.
        hidden: sizes of the hidden layers.
        outputs: size of the output.
        activation: one of ``ACTIVATIONS``.
        dropout: share of the hidden units that is dropped in training.

    Shape:
        ``[batch, features]`` to ``[batch, outputs]``.
    """

    def __init__(
        self, features: int, hidden: Sequence[int], outputs: int, activation: str = "relu", dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.activation = _activation(activation)
        sizes = [features, *check_sizes("hidden", hidden), outputs]
        layers = [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
        nn.init.normal_(layers[-1].weight, std=0.01)
        nn.init.zeros_(layers[-1].bias)
        self.layers = nn.ModuleList(layers)
        self.dropout = nn.Dropout(check_dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, outputs]``."""
        for layer in self.layers[:-1]:
            x = self.dropout(self.activation(layer(x)))
        return self.layers[-1](x)


class MADE(nn.Module):
    """A masked MLP whose outputs for a feature see only the features before it; they start near 0.

    Args:
        degrees: int64 ``[features]``, a permutation of 1 .. features: the place of each feature in the order.
        hidden: sizes of the hidden layers.
        parameters: outputs a feature.
        feature_major: the order of the outputs: those of the first feature, then those of the second, ...; else the
            first output of all features, then the second, ...
        activation: one of ``ACTIVATIONS``.
        dropout: share of the hidden units that is dropped in training.

    Shape:
        ``[batch, features]`` to ``[batch, features * parameters]``.

    Source: Germain et al., "MADE: Masked Autoencoder for Distribution Estimation", 2015.
    """

    def __init__(
        self,
        degrees: Tensor,
        hidden: Sequence[int],
        parameters: int,
        *,
        feature_major: bool,
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        features = len(degrees)
        self.activation_name, self.activation = activation, _activation(activation)
        self.dropout = nn.Dropout(check_dropout(dropout))
        inner = [hidden_degrees(size, features) for size in check_sizes("hidden", hidden)]
        outputs = degrees.repeat_interleave(parameters) if feature_major else degrees.repeat(parameters)
        before = [degrees, *inner]
        masks = [after[:, None] >= seen for seen, after in zip(before, inner, strict=False)]
        masks.append(outputs[:, None] > before[-1])
        layers = [MaskedLinear(mask) for mask in masks]
        nn.init.normal_(layers[-1].weight, std=0.01)
        self.layers = nn.ModuleList(layers)
        for place, degrees in enumerate(before):
            self.register_buffer(f"degrees{place}", degrees.clone(), persistent=False)

    @property
    def degrees(self) -> list[Tensor]:
        """Of the inputs of each layer, as ``dgm_kernels.made_inverse`` takes them."""
        return [self.get_buffer(f"degrees{place}") for place in range(len(self.layers))]

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, features * parameters]``."""
        for place, layer in enumerate(self.layers):
            if place > 0:
                x = self.dropout(self.activation(x))
            x = layer(x)
        return x


class MaskedLinear(nn.Linear):
    """A dense layer of which only some weights count; it starts as one with as many inputs as each output sees.

    Args:
        mask: bool ``[outputs, inputs]``, True where the weight counts.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask.to(self.weight.dtype), persistent=False)
        with torch.no_grad():
            inputs = self.mask.sum(1, keepdim=True).clamp(min=1)
            self.weight.normal_().mul_(math.sqrt(2.0) * inputs.rsqrt())
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, outputs]``."""
        return F.linear(x, self.weight * self.mask, self.bias)


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


def hidden_degrees(size: int, features: int) -> Tensor:
    """Degrees from 1 to features - 1, so that every unit is read by some output.

    Each of them in turn; if there are fewer units, evenly spaced up to the last, which the last feature needs in order
    to see all the others.
    """
    last = max(features - 1, 1)
    if size >= last:
        return torch.arange(size) % last + 1
    return torch.arange(1, size + 1) * last // size


def check_dropout(share: float) -> float:
    """``share`` if it is a number in [0, 1), else an error."""
    if not 0 <= check_number("dropout", share) < 1:
        raise ValueError(f"dropout must be in [0, 1), got {share!r}")
    return share
