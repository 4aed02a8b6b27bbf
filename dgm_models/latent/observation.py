"""What a decoder's outputs mean: the distribution of a sample given them."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dgm_kernels
from dgm_kernels import NoiseKey, noise_like

from ..autoregressive.base import output_channels
from ..model import Stream, check_positive

OUTPUTS = ("bernoulli", "categorical", "logistic_mixture", "gaussian")


class Observation(nn.Module):
    """Independent pixels given the outputs of a decoder, ``p(x | z) = prod_i p(x_i | outputs_i)``.

    ``bernoulli``: of two levels, each by a logit. ``categorical``: each level has a logit of its own.
    ``logistic_mixture``: see ``dgm_kernels.discretized_logistic_mixture``; the colours of a pixel are drawn together.
    ``gaussian``: of continuous data, with the output as the mean and a learnt standard deviation of each element.

    Args:
        shape: of a sample, channels first.
        output: one of the four; None for ``gaussian`` without levels, ``bernoulli`` at two and ``logistic_mixture`` at
            more.
        levels: of the data in [-1, 1], equally spaced; None for continuous data.
        mixtures: components of a mixture of logistics.
    """

    def __init__(self, shape: tuple[int, ...], output: str | None, levels: int | None, mixtures: int) -> None:
        super().__init__()
        self.shape, self.output, self.levels = shape, check_output(output, levels), levels
        self.channels = shape[0]
        if self.output == "gaussian":
            self.log_scale = nn.Parameter(torch.zeros(shape))
        else:
            assert levels is not None
            self.channels = output_channels(self.output, shape[0], levels, mixtures)

    @property
    def parameters_shape(self) -> tuple[int, ...]:
        """The shape of a decoder's outputs for one sample."""
        return (self.channels, *self.shape[1:])

    def log_prob(self, x: Tensor, outputs: Tensor) -> Tensor:
        """Log-probability (grey levels) or log-density (continuous data) of samples in nats, ``[batch]``.

        Args:
            x: ``[batch, *shape]``.
            outputs: ``[batch, *parameters_shape]``.
        """
        if self.output == "gaussian":
            z = (x - outputs) * (-self.log_scale).exp()
            return -(0.5 * z.square() + self.log_scale + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)
        if self.output == "bernoulli":
            each = F.logsigmoid(x * outputs)  # sigmoid(-logit) is the probability of level 0
        elif self.output == "categorical":
            level = self._grid(x).round().to(torch.int64)
            each = dgm_kernels.categorical_log_prob(level, self._logits(outputs), dim=2)
        else:
            each = dgm_kernels.discretized_logistic_mixture(x, outputs, levels=self._levels)
        return each.flatten(1).sum(1)

    def sample(self, outputs: Tensor, key: NoiseKey) -> Tensor:
        """Draws of x, ``[batch, *shape]``; the key names their noise, but for its stream."""
        key = dataclasses.replace(key, stream=Stream.OBSERVATIONS)
        like = outputs.new_empty(len(outputs), *self.shape)
        if self.output == "gaussian":
            return outputs + self.log_scale.exp() * noise_like(like, key)
        if self.output == "logistic_mixture":
            like = outputs.new_empty(len(outputs), 1 + self.shape[0], *self.shape[1:])
        u = noise_like(like, key, distribution="uniform")
        if self.output == "bernoulli":
            level = (u > torch.sigmoid(-outputs)).to(outputs.dtype)
        elif self.output == "categorical":
            level = dgm_kernels.categorical_sample(self._logits(outputs).transpose(1, 2), u)
        else:
            level = dgm_kernels.discretized_logistic_mixture_sample(outputs, u, levels=self._levels)
        return (level * (2 / (self._levels - 1)) - 1).to(outputs.dtype)

    @property
    def _levels(self) -> int:
        assert self.levels is not None
        return self.levels

    def _grid(self, x: Tensor) -> Tensor:
        return (x.to(torch.promote_types(x.dtype, torch.float32)) + 1) / 2 * (self._levels - 1)

    def _logits(self, outputs: Tensor) -> Tensor:
        """``[batch, channels, levels, ...]``."""
        return outputs.unflatten(1, (self.shape[0], self._levels))


def check_output(output: str | None, levels: int | None) -> str:
    """The name of the distribution of data with such levels, or an error."""
    if levels is not None and check_positive("levels", levels) < 2:
        raise ValueError(f"levels must be at least 2, got {levels}")
    if output is None:
        return "gaussian" if levels is None else "bernoulli" if levels == 2 else "logistic_mixture"
    if output not in OUTPUTS:
        raise ValueError(f"output must be one of {', '.join(OUTPUTS)}, got {output!r}")
    if (output == "gaussian") != (levels is None):
        raise ValueError(f"levels must be None with output 'gaussian' and a number else, got {levels} with {output!r}")
    if output == "bernoulli" and levels != 2:
        raise ValueError(f"levels must be 2 with output 'bernoulli', got {levels}")
    return output
