"""The fully visible sigmoid belief network: a logistic regression for each pixel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from ..registry import register_model
from .base import Autoregressive, check_shape
from .made import MaskedMLP, natural_order


@register_model("fvsbn")
class FVSBN(Autoregressive):
    """The first pixel is a free Bernoulli parameter, each later one a logistic regression on those before it.

    Args:
        image_shape: of one sample, of 2 levels. Raster order, the colours of a pixel one after the other.
        num_classes: classes to condition on, which add to the logits; None for none.

    Source: Frey, "Graphical Models for Machine Learning and Digital Communication", 1998.
    """

    default_settings: ClassVar = {"steps": 2000, "lr": 5e-3, "weight_decay": 0.15, "validation_draws": 1}

    def __init__(self, image_shape: Sequence[int] = (1, 8, 8), num_classes: int | None = None) -> None:
        shape = check_shape(image_shape)
        network = MaskedMLP(natural_order(shape), (), 1, num_classes=num_classes)
        super().__init__(image_shape, [network], (math.prod(shape),), "bernoulli", 2, num_classes)
