"""What flows and mixtures share: exact densities of vectors, and grey levels that become continuous."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from dgm_kernels import NoiseKey

from .model import GenerativeModel, Stream, check_positive, check_sizes


class DequantizedModel(GenerativeModel):
    """An exact log-density, for grey levels that of one random dequantisation.

    Args:
        image_shape: of one sample.
        levels: grey levels of the data in [-1, 1], equally spaced; None for continuous data, which is taken as it is.
    """

    def __init__(self, image_shape: Sequence[int], levels: int | None) -> None:
        super().__init__()
        if levels is not None and check_positive("levels", levels) < 2:
            raise ValueError(f"levels must be at least 2, got {levels}")
        self.sample_shape = check_sizes("image_shape", image_shape)
        self.levels = levels
        self.exact_likelihood = levels is None

    @property
    def elements(self) -> int:
        """Numbers in one sample."""
        return math.prod(self.sample_shape)

    @abstractmethod
    def _log_prob(self, x: Tensor, noise: NoiseKey) -> Tensor:
        """Log-density of checked samples in nats, ``[batch]``; of grey levels per level, dequantised with the noise."""

    def _training_samples(self, x: Tensor, key: NoiseKey) -> Tensor:
        """What training sees of x."""
        return x

    def loss_parts(self, x: Tensor, cond: Tensor | None = None, *, key: NoiseKey | None = None) -> dict[str, Tensor]:
        """``nll``: the mean negative log-likelihood, in nats for each element of a sample."""
        self._check_batch(x)
        self._check_cond(cond, x.shape[0])
        key = NoiseKey.draw(device=x.device) if key is None else key
        x = self._training_samples(x, key)
        noise = dataclasses.replace(key, stream=Stream.TRAINING_NOISE)
        return {"nll": -self._log_prob(x, noise).mean() / self.elements}

    def log_prob(self, x: Tensor, cond: Tensor | None = None, *, seed: int = 0, first_sample: int = 0) -> Tensor:
        """Exact log-density in nats, ``[batch]``; that of grey levels after dequantisation with fixed noise.

        For grey levels the density is per level, so that its expectation over the noise is a lower bound of the
        log-probability; :meth:`elbo` with k > 1 is a tighter one.

        Args:
            x: ``[batch, *image_shape]``; on the grey levels unless ``levels`` is None.
            cond: None.
            seed, first_sample: name the noise of the dequantisation, as in ``sample``.
        """
        self._check_data(x)
        self._check_cond(cond, x.shape[0])
        with self._evaluating():
            return self._log_prob(x, NoiseKey(seed, first_sample, stream=Stream.BOUND))

    @torch.no_grad()
    def elbo(
        self, x: Tensor, k: int = 1, cond: Tensor | None = None, *, seed: int = 0, first_sample: int = 0
    ) -> Tensor:
        """A lower bound of the log-probability of grey levels in nats: log of the mean density of k dequantisations.

        Of continuous data it is the log-density itself. Arguments as in :meth:`log_prob`.
        """
        k = check_positive("k", k)
        if self.levels is None:
            return self.log_prob(x, cond)
        self._check_data(x)
        self._check_cond(cond, x.shape[0])
        with self._evaluating():
            key = NoiseKey(seed, first_sample, stream=Stream.BOUND)
            draws = torch.stack([self._log_prob(x, key.at(draw)) for draw in range(k)])
        return draws.logsumexp(0) - math.log(k)
