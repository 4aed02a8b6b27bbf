"""Importance weighted autoencoder: trained on the bound of several draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

import dgm_kernels
from dgm_kernels import NoiseKey

from ..model import check_positive
from ..registry import register_model
from .base import LatentVariable


@register_model("iwae")
class IWAE(LatentVariable):
    """An encoder and a decoder that raise ``E[log mean_j p(x, z_j) / q(z_j | x)]`` over k draws z_j from q.

    The bound is that of the VAE for k = 1, and rises with k.

    Args:
        image_shape: of one sample, channels first.
        latent: dimensions of z.
        samples: k, draws of z for each sample in training.
        network, hidden, width, depth, dropout, posterior, output, levels, mixtures, num_classes: see :class:`.VAE`.

    Source: Burda et al., "Importance weighted autoencoders", 2016.
    """

    default_settings: ClassVar = {"steps": 2500, "batch_size": 100, "validation_draws": 1}

    def __init__(
        self,
        image_shape: Sequence[int] = (1, 8, 8),
        latent: int = 16,
        samples: int = 8,
        network: str = "dense",
        hidden: Sequence[int] = (256, 256),
        width: int = 32,
        depth: int = 2,
        dropout: float = 0.1,
        posterior: str = "diagonal",
        output: str | None = None,
        levels: int | None = 17,
        mixtures: int = 1,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(
            image_shape,
            latent=latent,
            network=network,
            hidden=hidden,
            width=width,
            depth=depth,
            dropout=dropout,
            posterior=posterior,
            output=output,
            levels=levels,
            mixtures=mixtures,
            num_classes=num_classes,
        )
        self.samples = check_positive("samples", samples)

    def _loss_parts(self, x: Tensor, cond: Tensor | None, key: NoiseKey) -> dict[str, Tensor]:
        """``bound``: the negative one of all draws."""
        # Each step of training has the noise of as many steps of the key as there are draws.
        weights = self.log_weights(x, cond, self.samples, key.at(key.step * self.samples))
        return {"bound": -dgm_kernels.importance_bound(weights)}
