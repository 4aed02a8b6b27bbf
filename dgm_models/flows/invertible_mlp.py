"""The invertible MLP: triangular matrices and leaky ReLUs, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ..model import check_positive, check_positive_number
from ..registry import register_model
from .base import Flow, elements
from .layers import TriangularLinear


@register_model("invertible_mlp")
class InvertibleMLP(Flow):
    """Dense layers ``leaky_relu(W x + b)`` with W lower and upper triangular in turn.

    ``logdet = sum of log abs(w_ii) + log(negative_slope) * (number of negative outputs)`` a layer; the last layer has
    no activation. Sampling solves a triangular system a layer.

    Args:
        image_shape: of one sample.
        depth: number of layers.
        negative_slope: of the leaky ReLU, positive: with 0, the ReLU, the map would not be injective.
        base, levels, margin, level_noise, reversible: see :class:`.Flow`.
    """

    default_settings: ClassVar = {"steps": 5000, "batch_size": 100, "weight_decay": 2.0}

    def __init__(
        self,
        image_shape: Sequence[int] = (1, 8, 8),
        depth: int = 4,
        negative_slope: float = 0.5,
        base: str = "logistic",
        levels: int | None = 17,
        margin: float = 1e-3,
        level_noise: float = 0.6,
        reversible: bool = False,
    ) -> None:
        features, negative_slope = elements(image_shape), check_positive_number("negative_slope", negative_slope)
        layers = [
            TriangularLinear(features, place % 2 == 0, negative_slope if place + 1 < depth else 1.0)
            for place in range(check_positive("depth", depth))
        ]
        super().__init__(
            image_shape,
            layers,
            base=base,
            levels=levels,
            margin=margin,
            level_noise=level_noise,
            reversible=reversible,
        )
