"""What mixtures and kernel estimates share: densities of vectors, grey levels that become continuous, one whole fit."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from dgm_kernels import NoiseKey, noise_like

from ..dequantized import DequantizedModel
from ..model import FittedModel


class DensityModel(DequantizedModel, FittedModel):
    """An exact density of vectors, fitted to all data at once.

    Grey levels are dequantised: level l of L becomes ``y = l + u`` with u uniform in (0, 1], and the density of y is
    one per level. Continuous data are taken as they are.

    Args:
        image_shape: of one sample.
        levels: grey levels of the data in [-1, 1], equally spaced; None for continuous data.
    """

    @abstractmethod
    def log_density(self, y: Tensor) -> Tensor:
        """Exact log-density in nats at points ``[N, D]``, ``[N]``: of grey levels in the unit of a level, see above."""

    def points(self, x: Tensor, key: NoiseKey) -> Tensor:
        """Samples as points ``[batch, D]``: of grey levels one dequantisation, whose noise the key names."""
        flat = x.flatten(1)
        if self.levels is None:
            return flat
        return self._grid(flat).round().to(x.dtype) + noise_like(flat, key, distribution="uniform")

    def _log_prob(self, x: Tensor, noise: NoiseKey) -> Tensor:
        return self.log_density(self.points(x, noise))

    def _samples(self, y: Tensor) -> Tensor:
        """Points as samples: of grey levels the nearest cell's, those beyond the last ones cut off."""
        y = y.view(-1, *self.sample_shape)
        if self.levels is None:
            return y
        return y.floor().clamp(0, self.levels - 1) / (self.levels - 1) * 2 - 1
