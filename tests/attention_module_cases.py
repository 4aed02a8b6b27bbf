"""What the tests of MultiheadAttention and of TransformerBlock share."""

import torch
from torch import Tensor

from dgm_kernels import masks

RASTER = masks.raster_2d(2, 3, 1, include_self=True)


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)
