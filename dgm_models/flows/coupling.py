"""Flows of coupling layers: NICE and RealNVP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import nn

from ..model import check_positive
from ..registry import register_model
from .base import Flow, elements
from .layers import Affine, AffineCoupling, Permutation, check_scale_map


def alternating(features: int, depth: int, layer: Callable[[bool], nn.Module]) -> list[nn.Module]:
    """``depth`` coupling layers that transform one half of the features, then the other; then come new random halves.

    Args:
        features: D.
        depth: number of coupling layers.
        layer: makes one; is told whether it is the first half that it transforms.
    """
    layers: list[nn.Module] = []
    for place in range(check_positive("depth", depth)):
        if place % 2 == 0:
            layers.append(Permutation(features))
        layers.append(layer(place % 2 == 1))
    return layers


@register_model("realnvp")
class RealNVP(Flow):
    """Affine coupling layers: one half of the pixels is scaled and shifted by functions of the other half.

    Args:
        image_shape: of one sample; an even number of elements.
        depth: number of coupling layers.
        hidden: sizes of the hidden layers of their networks.
        activation: of the networks: ``"relu"``, ``"tanh"``, ``"elu"`` or ``"silu"``.
        dropout: of the networks' hidden units.
        scale_map: how the networks' output becomes the scale: see ``dgm_kernels.affine_coupling``.
        base, levels, margin, level_noise, reversible: see :class:`.Flow`.

    Source: Dinh et al., "Density estimation using Real NVP", 2017.
    """

    default_settings: ClassVar = {"steps": 10000, "batch_size": 100, "weight_decay": 1.0}

    def __init__(
        self,
        image_shape: Sequence[int] = (1, 8, 8),
        depth: int = 12,
        hidden: Sequence[int] = (256,),
        activation: str = "relu",
        dropout: float = 0.2,
        scale_map: str = "tanh",
        base: str = "normal",
        levels: int | None = 17,
        margin: float = 1e-3,
        level_noise: float = 0.6,
        reversible: bool = False,
    ) -> None:
        features, scale_map = elements(image_shape), check_scale_map(scale_map)

        def coupling(flipped: bool) -> nn.Module:
            return AffineCoupling(features, flipped, scale_map, hidden=hidden, activation=activation, dropout=dropout)

        super().__init__(
            image_shape,
            alternating(features, depth, coupling),
            base=base,
            levels=levels,
            margin=margin,
            level_noise=level_noise,
            reversible=reversible,
        )


@register_model("nice")
class NICE(Flow):
    """Additive coupling layers, which preserve volume, between two learnt scales of every pixel.

    Args:
        image_shape: of one sample; an even number of elements.
        depth: number of coupling layers.
        hidden: sizes of the hidden layers of their networks.
        activation: of the networks: ``"relu"``, ``"tanh"``, ``"elu"`` or ``"silu"``.
        dropout: of the networks' hidden units.
        base, levels, margin, level_noise, reversible: see :class:`.Flow`.

    Source: Dinh et al., "NICE: Non-linear Independent Components Estimation", 2015.
    """

    default_settings: ClassVar = {"steps": 10000, "batch_size": 100, "weight_decay": 1.0}

    def __init__(
        self,
        image_shape: Sequence[int] = (1, 8, 8),
        depth: int = 8,
        hidden: Sequence[int] = (256,),
        activation: str = "relu",
        dropout: float = 0.2,
        base: str = "logistic",
        levels: int | None = 17,
        margin: float = 1e-3,
        level_noise: float = 0.6,
        reversible: bool = False,
    ) -> None:
        features = elements(image_shape)

        def coupling(flipped: bool) -> nn.Module:
            return AffineCoupling(features, flipped, None, hidden=hidden, activation=activation, dropout=dropout)

        super().__init__(
            image_shape,
            [*alternating(features, depth, coupling), Affine(features)],
            base=base,
            levels=levels,
            margin=margin,
            level_noise=level_noise,
            reversible=reversible,
        )
