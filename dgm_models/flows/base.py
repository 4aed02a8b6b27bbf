"""What all flows share: dequantised levels, exact densities, sampling in one inverse pass."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

import dgm_kernels
from dgm_kernels import NoiseKey, noise_like
from dgm_kernels.nn import Reversible

from ..dequantized import DequantizedModel
from ..model import (
    Stream,
    check_batch,
    check_flag,
    check_number,
    check_positive_number,
    check_sizes,
)
from .layers import Standardization

BASES = ("normal", "logistic")


class Flow(DequantizedModel):
    """An invertible map f from data to noise: ``log p(x) = log base(f(x)) + log abs(det df/dx)``.

    This is the base class of the families, and no model by itself: a family is a subclass whose arguments are JSON
    values (see :class:`.GenerativeModel`), from which it makes the layers that it hands to this constructor.

    Grey levels are dequantised: level l of L becomes v = (l + u) / L with u uniform in (0, 1], new in every step of
    training, and f begins with ``logit(margin + (1 - 2 margin) v)``, whose log-determinant counts like any other. Then
    comes a learnt scale and shift of every element, which :meth:`prepare` sets at first.

    Args:
        image_shape: of one sample.
        layers: further invertible layers on ``[batch, elements]``, from the data to the noise.
        base: density of the noise, ``"normal"`` or ``"logistic"``, of independent elements.
        levels: grey levels of the data in [-1, 1], equally spaced; None for continuous data, which is taken as it is.
        margin: see above.
        level_noise: share of the pixels above the lowest level for which training draws a move by one level, up or
            down with equal chances; a move beyond the highest level is cut off.
        reversible: train in memory constant in the number of layers, at the price of more arithmetic.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        layers: Iterable[nn.Module],
        *,
        base: str = "normal",
        levels: int | None = None,
        margin: float = 1e-3,
        level_noise: float = 0.0,
        reversible: bool = False,
    ) -> None:
        super().__init__(image_shape, levels)
        if base not in BASES:
            raise ValueError(f"base must be one of {', '.join(BASES)}, got {base!r}")
        if not 0 < check_number("margin", margin) < 0.5:
            raise ValueError(f"margin must be in (0, 0.5), got {margin!r}")
        if not 0 <= check_number("level_noise", level_noise) <= 1:
            raise ValueError(f"level_noise must be in [0, 1], got {level_noise!r}")
        self.base, self.margin, self.level_noise = base, margin, level_noise
        chain = [Standardization(self.elements), *layers]
        self.flow = Reversible(chain) if check_flag("reversible", reversible) else Chain(chain)

    @property
    def standardization(self) -> Standardization:
        """The first layer."""
        return cast(Standardization, self.flow.layers[0])

    def transform(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Data to noise: ``[batch, elements]``, and log abs(det) of the map, ``[batch]``.

        Args:
            v: ``[batch, *image_shape]``: in [0, 1] if the data has levels (see :meth:`dequantize`), else the data.
        """
        check_batch("v", v, self.sample_shape)
        y, before = self._unbounded(v)
        z, logdet = self.flow(y)
        return z, logdet if before is None else before + logdet

    def invert(self, z: Tensor) -> Tensor:
        """Noise ``[batch, elements]`` to the v of :meth:`transform`."""
        check_batch("z", z, (self.elements,))
        x, _ = self.flow.inverse(z)
        if self.levels is not None:
            x = (torch.sigmoid(x) - self.margin) / (1 - 2 * self.margin)
        return x.view(-1, *self.sample_shape)

    def dequantize(self, x: Tensor, key: NoiseKey) -> Tensor:
        """Points of the unit cube, drawn uniformly from the cells of the levels in ``x``."""
        if self.levels is None:
            raise ValueError("levels must be given to the model to dequantize its data, got None")
        return (self._level(x, self.levels) + noise_like(x, key, distribution="uniform")) / self.levels

    def log_density(self, v: Tensor) -> Tensor:
        """Exact log-density in nats at points v, ``[batch]``; v as in :meth:`transform`."""
        check_batch("v", v, self.sample_shape)
        # Looking at the values of a tensor on another device would wait for it.
        if self.levels is not None and v.device.type == "cpu" and not bool(((v >= 0) & (v <= 1)).all()):
            raise ValueError(f"v must be in [0, 1], got values from {float(v.min())} to {float(v.max())}")
        return self._log_density(v)

    def _log_density(self, v: Tensor) -> Tensor:
        z, logdet = self.transform(v)
        if self.base == "logistic":
            return dgm_kernels.logistic_log_prob(z, logdet)
        return dgm_kernels.standard_normal_log_prob(z, logdet)

    def _training_samples(self, x: Tensor, key: NoiseKey) -> Tensor:
        """x with some of its levels moved."""
        if self.levels is None or not self.training or not self.level_noise:
            return x
        return self._move_levels(x, self.levels, dataclasses.replace(key, stream=Stream.LEVEL_NOISE))

    def _sample(  # type: ignore[override]
        self, n: int, seed: int, cond: Tensor | None, first_sample: int, *, temperature: float = 1.0
    ) -> Tensor:
        """Samples in one inverse pass.

        Args:
            n, seed, cond, first_sample: see ``sample``.
            temperature: factor on the noise, positive; less than 1 stays nearer to the modes.
        """
        temperature = check_positive_number("temperature", temperature)
        like = torch.empty(n, self.elements, device=self.device, dtype=self.dtype)
        key = NoiseKey(seed, first_sample, stream=Stream.INITIAL_STATE)
        if self.base == "logistic":
            u = noise_like(like, key, distribution="uniform")
            z = torch.logit(u, eps=torch.finfo(u.dtype).eps / 2)
        else:
            z = noise_like(like, key)
        v = self.invert(temperature * z)
        if self.levels is None:
            return v
        level = (v * self.levels).floor().clamp(0, self.levels - 1)
        return level / (self.levels - 1) * 2 - 1

    def prepare(self, x: Tensor) -> None:
        """Sets the scale and shift that f begins with, so that the data have mean 0 and variance 1.

        If they were set or trained before, and so are no longer those of the identity, they stay as they are.
        """
        self._check_batch(x)
        v = x if self.levels is None else self.dequantize(x, NoiseKey(0, stream=Stream.TRAINING_NOISE))
        self.standardization.fit(self._unbounded(v)[0])

    def _unbounded(self, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """Data with levels from the unit cube to all real numbers, ``[batch, elements]``, and the log-determinant."""
        v = v.flatten(1)
        if self.levels is None:
            return v, None
        squeezed = self.margin + (1 - 2 * self.margin) * v
        logdet = math.log(1 - 2 * self.margin) - torch.log(squeezed) - torch.log1p(-squeezed)
        return torch.logit(squeezed), logdet.sum(1)

    def _log_prob(self, x: Tensor, noise: NoiseKey) -> Tensor:
        if self.levels is None:
            return self._log_density(x)
        return self._log_density(self.dequantize(x, noise)) - self.elements * math.log(self.levels)

    @staticmethod
    def _level(x: Tensor, levels: int) -> Tensor:
        """Grey levels 0 .. levels - 1 as floating-point numbers."""
        return ((x + 1) / 2 * (levels - 1)).round()

    def _move_levels(self, x: Tensor, levels: int, key: NoiseKey) -> Tensor:
        level, u = self._level(x, levels), noise_like(x, key, distribution="uniform")
        step = (u < self.level_noise).to(x.dtype) - 2 * (u < self.level_noise / 2).to(x.dtype)
        return torch.where(level > 0, level + step, level).clamp(0, levels - 1) / (levels - 1) * 2 - 1


def elements(image_shape: Sequence[int]) -> int:
    """Numbers in one sample."""
    return math.prod(check_sizes("image_shape", image_shape))


class Chain(nn.Module):
    """Invertible layers one after the other."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z and the log-determinant."""
        return _compose(x, self.layers)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x and the log-determinant of the inverse."""
        return _compose(z, [layer.inverse for layer in reversed(self.layers)])


def _compose(x: Tensor, maps: Iterable[Any]) -> tuple[Tensor, Tensor]:
    logdets = []
    for apply in maps:
        x, logdet = apply(x)
        logdets.append(logdet)
    return x, torch.stack(logdets).sum(0)
