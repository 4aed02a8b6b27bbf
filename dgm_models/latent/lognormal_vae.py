"""A VAE whose latent variables are positive: log-normal prior and posterior."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import dgm_kernels
from dgm_kernels import NoiseKey

from ..registry import register_model
from .base import Posterior
from .vae import VAE


@register_model("lognormal_vae")
class LogNormalVAE(VAE):
    """``z = exp(mu(x) + sigma(x) eps)`` with the prior ``log z ~ N(0, I)``.

    The logarithm has an inverse and no parameters, so ``KL(q(z | x) || p(z))`` is that of the two normal distributions
    of log z.

    Args:
        image_shape: of one sample, channels first.
        latent: dimensions of z.
        posterior: ``"lognormal"``; a ``"normal"`` one is refused: it gives negative z a probability, the prior gives
            them none, and so its divergence from the prior is infinite.
        network, hidden, width, depth, dropout, beta, free_bits, output, levels, mixtures, num_classes: see
            :class:`.VAE`.

    Source: Kingma and Welling, "Auto-encoding variational Bayes", 2014, section 2.4 (log-normal variables as functions
    of normal ones).
    """

    def __init__(
        self,
        image_shape: Sequence[int] = (1, 8, 8),
        latent: int = 16,
        posterior: str = "lognormal",
        network: str = "dense",
        hidden: Sequence[int] = (256, 256),
        width: int = 32,
        depth: int = 2,
        dropout: float = 0.1,
        beta: float = 1.0,
        free_bits: float = 0.0,
        output: str | None = None,
        levels: int | None = 17,
        mixtures: int = 1,
        num_classes: int | None = None,
    ) -> None:
        if posterior == "normal":
            raise ValueError(
                "posterior must be 'lognormal', got 'normal': a normal posterior gives negative z a positive "
                "probability, where a log-normal prior gives them none, so the KL divergence is infinite"
            )
        if posterior != "lognormal":
            raise ValueError(f"posterior must be 'lognormal', got {posterior!r}")
        super().__init__(
            image_shape,
            latent=latent,
            network=network,
            hidden=hidden,
            width=width,
            depth=depth,
            dropout=dropout,
            posterior="diagonal",
            beta=beta,
            free_bits=free_bits,
            output=output,
            levels=levels,
            mixtures=mixtures,
            num_classes=num_classes,
        )

    def latents(self, u: Tensor) -> Tensor:
        """``exp(u)``."""
        return torch.exp(u)

    def _draw(self, posterior: Posterior, key: NoiseKey, free_bits: float = 0.0) -> tuple[Tensor, Tensor]:
        """Both in one pass."""
        assert posterior.log_var is not None
        return dgm_kernels.lognormal_sample_kl(posterior.mu, posterior.log_var, key, free_bits=free_bits)
