"""What a denoiser is told beside the noisy sample: the time and the class, as one vector."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoidal_embedding(time: Tensor, size: int, max_period: float = 10000.0) -> Tensor:
    """``[cos(time w_i), sin(time w_i)]`` with ``size / 2`` frequencies ``w_i`` from 1 to ``1 / max_period``.

    Source: Vaswani et al., "Attention is all you need", 2017; for diffusion times, Ho et al., 2020.
    """
    half = size // 2
    frequencies = torch.exp(-math.log(max_period) / half * torch.arange(half, device=time.device, dtype=time.dtype))
    angles = time[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Condition(nn.Module):
    """Time and label to a vector: an MLP on the sinusoidal embedding, plus a learnt vector for every class.

    The time is float32 or float64 whatever the weights are: 16 bits do not tell 997 from 996. Label ``num_classes``
    stands for "no class".
    """

    def __init__(self, size: int, num_classes: int | None) -> None:
        super().__init__()
        self.size = size
        self.first = nn.Linear(size, size)
        self.second = nn.Linear(size, size)
        self.label = None if num_classes is None else nn.Embedding(num_classes + 1, size)

    def forward(self, time: Tensor, label: Tensor | None) -> Tensor:
        angles = sinusoidal_embedding(time, self.size).to(self.first.weight.dtype)
        vector = self.second(F.silu(self.first(angles)))
        return vector if self.label is None else vector + self.label(label)
