"""Variational autoencoders: plain, beta-weighted, with free bits, conditional."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from dgm_kernels import NoiseKey

from ..registry import register_model
from .base import LatentVariable, check_weight


@register_model("vae")
class VAE(LatentVariable):
    """An encoder and a decoder that raise ``E_q[log p(x | z)] - KL(q(z | x) || p(z))``, with a standard normal prior.

    Args:
        image_shape: of one sample, channels first.
        latent: dimensions of z.
        network: ``"dense"`` or ``"conv"``.
        hidden: sizes of the hidden layers of dense networks, those of the decoder the other way round.
        width: features of convolutional networks at full resolution.
        depth: number of halvings in convolutional networks.
        dropout: share of the hidden units that is dropped in training.
        posterior: ``"diagonal"`` or ``"full"``: the covariance of q.
        beta: weight of the divergence in the loss; 1 is the bound, more makes a beta-VAE.
        free_bits: nats that each dimension of z may carry for free: its divergence counts as so much at least. With a
            diagonal posterior only.
        output: ``"bernoulli"``, ``"categorical"``, ``"logistic_mixture"`` or ``"gaussian"``: the distribution of a
            pixel; see :class:`.Observation`. None for what suits the levels.
        levels: grey levels of the data in [-1, 1], equally spaced; None for continuous data.
        mixtures: components of a mixture of logistics.
        num_classes: classes to condition on; None for none.

    Source: Kingma and Welling, "Auto-encoding variational Bayes", 2014; beta: Higgins et al., 2017; free bits: Kingma
    et al., 2016; conditional: Sohn et al., 2015.
    """

    default_settings: ClassVar = {"steps": 2500, "batch_size": 100, "validation_draws": 1}

    def __init__(
        self,
        image_shape: Sequence[int] = (1, 8, 8),
        latent: int = 16,
        network: str = "dense",
        hidden: Sequence[int] = (256, 256),
        width: int = 32,
        depth: int = 2,
        dropout: float = 0.1,
        posterior: str = "diagonal",
        beta: float = 1.0,
        free_bits: float = 0.0,
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
        self.beta, self.free_bits = check_weight("beta", beta), check_weight("free_bits", free_bits)
        if posterior == "full" and free_bits:
            raise ValueError(f"free_bits must be 0 with posterior 'full', got {free_bits!r}")

    def _loss_parts(self, x: Tensor, cond: Tensor | None, key: NoiseKey) -> dict[str, Tensor]:
        """``reconstruction`` and ``kl``, the latter times beta."""
        z, kl = self._draw(self.posterior(x, cond), key, self.free_bits)
        return {"reconstruction": -self._log_likelihood(x, z[None], cond)[0], "kl": self.beta * kl}
