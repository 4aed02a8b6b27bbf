"""Masked autoregressive flows: MAF, and IAF, which is MAF the other way round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from ..model import check_positive
from ..registry import register_model
from .base import Flow, elements
from .conditioners import check_dropout
from .layers import AffineAutoregressive, Inverse


@register_model("maf")
class MAF(Flow):
    """Affine autoregressive layers, in turn from the first pixel to the last and back.

    The density takes one pass over each network. A sample goes pixel by pixel, which ``dgm_kernels.made_inverse`` does
    at the cost of about one pass too. With ``fast="sampling"`` the layers are those of the inverse autoregressive flow:
    a sample takes one plain pass, but the density, and so training, goes pixel by pixel.

    Args:
        image_shape: of one sample.
        depth: number of autoregressive layers.
        hidden: sizes of the hidden layers of their networks.
        activation: of the networks: ``"relu"``, ``"tanh"``, ``"elu"`` or ``"silu"``.
        dropout: of the networks' hidden units; None for 0.2, and with ``fast="sampling"`` for 0, the only value there:
            pixel by pixel, every unit is computed when the pixels that it reads are known, and none is dropped.
        scale_map: how the networks' output becomes the scale: see ``dgm_kernels.affine_coupling``.
        fast: ``"density"`` for MAF, ``"sampling"`` for IAF.
        base, levels, margin, level_noise: see :class:`.Flow`. (Rebuilding activations, as ``reversible`` does, would
            go pixel by pixel.)

    Source: Papamakarios et al., "Masked Autoregressive Flow for Density Estimation", 2017; Kingma et al., "Improving
    Variational Inference with Inverse Autoregressive Flow", 2016.
    """

    default_settings: ClassVar = {"steps": 10000, "batch_size": 100, "weight_decay": 1.0}

    def __init__(
        self,
        image_shape: Sequence[int] = (1, 8, 8),
        depth: int = 5,
        hidden: Sequence[int] = (512,),
        activation: str = "relu",
        dropout: float | None = None,
        scale_map: str = "tanh",
        fast: str = "density",
        base: str = "logistic",
        levels: int | None = 17,
        margin: float = 1e-3,
        level_noise: float = 0.6,
    ) -> None:
        if fast not in ("density", "sampling"):
            raise ValueError(f"fast must be 'density' (MAF) or 'sampling' (IAF), got {fast!r}")
        if dropout is None:
            dropout = 0.2 if fast == "density" else 0.0
        if fast == "sampling" and check_dropout(dropout) > 0:
            raise ValueError(
                "dropout must be 0 with fast 'sampling', where training inverts the networks pixel by pixel, which "
                f"drops no units; got {dropout!r}"
            )
        features = elements(image_shape)

        def layer(place: int) -> nn.Module:
            made = AffineAutoregressive(
                features, place % 2 == 1, scale_map, hidden=hidden, activation=activation, dropout=dropout
            )
            return made if fast == "density" else Inverse(made)

        super().__init__(
            image_shape,
            map(layer, range(check_positive("depth", depth))),
            base=base,
            levels=levels,
            margin=margin,
            level_noise=level_noise,
        )
