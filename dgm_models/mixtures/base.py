"""What mixtures and kernel estimates share: densities of vectors, grey levels that become continuous, one whole fit."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from dgm_kernels import NoiseKey, noise_like

from ..model import FittedModel, Stream, check_positive, check_sizes


class DensityModel(FittedModel):
    """An exact density of vectors, fitted to all data at once.

    Grey levels are dequantised: level l of L becomes ``y = l + u`` with u uniform in (0, 1], and the density of y is
    one per level. Continuous data are taken as they are.

    Args:
        image_shape: of one sample.
        levels: grey levels of the data in [-1, 1], equally spaced; None for continuous data.
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
        """Numbers in one sample, D."""
        return math.prod(self.sample_shape)

    @abstractmethod
    def log_density(self, y: Tensor) -> Tensor:
        """Exact log-density in nats at points ``[N, D]``, ``[N]``: of grey levels in the unit of a level, see above."""

    def points(self, x: Tensor, key: NoiseKey) -> Tensor:
        """Samples as points ``[batch, D]``: of grey levels one dequantisation, whose noise the key names."""
        flat = x.flatten(1)
        if self.levels is None:
            return flat
        return self._grid(flat).round().to(x.dtype) + noise_like(flat, key, distribution="uniform")

    def loss_parts(self, x: Tensor, cond: Tensor | None = None, *, key: NoiseKey | None = None) -> dict[str, Tensor]:
        """``nll``: the mean negative log-likelihood, in nats for each element of a sample."""
        self._check_batch(x)
        self._check_cond(cond, x.shape[0])
        key = NoiseKey.draw(device=x.device) if key is None else key
        noise = NoiseKey(key.seed, key.first_sample, key.step, Stream.TRAINING_NOISE, key.samples)
        return {"nll": -self.log_density(self.points(x, noise)).mean() / self.elements}

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
        return self.log_density(self.points(x, NoiseKey(seed, first_sample, stream=Stream.BOUND)))

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
        key = NoiseKey(seed, first_sample, stream=Stream.BOUND)
        draws = torch.stack([self.log_density(self.points(x, key.at(draw))) for draw in range(k)])
        return draws.logsumexp(0) - math.log(k)

    def _samples(self, y: Tensor) -> Tensor:
        """Points as samples: of grey levels the nearest cell's, those beyond the last ones cut off."""
        y = y.view(-1, *self.sample_shape)
        if self.levels is None:
            return y
        return y.floor().clamp(0, self.levels - 1) / (self.levels - 1) * 2 - 1
