"""Modules of the norm op, with the parameters of PyTorch's normalisation layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..norm import group_norm_silu, layer_norm, modulated_layer_norm, rms_norm


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` on :func:`dgm_kernels.layer_norm`: the same constructor, state dict and results.

    Source: Ba, Kiros and Hinton, "Layer Normalization", 2016.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``x``: ``[..., *normalized_shape]``. Returns a tensor like ``x``."""
        return layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """``nn.RMSNorm`` on :func:`dgm_kernels.rms_norm`: the same constructor, state dict and results.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``x``: ``[..., *normalized_shape]``. Returns a tensor like ``x``."""
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)


class ModulatedLayerNorm(nn.LayerNorm):
    """Layer norm with scale and shift of each sample: :func:`dgm_kernels.modulated_layer_norm` as a module.

    Unlike ``nn.LayerNorm`` it has no parameters of its own unless asked for, as in DiT.

    Args:
        width: size of the last dimension of the input, D.
        eps: added to the variance.
        elementwise_affine: whether there are a weight and, with ``bias``, a bias of each feature.
        bias: see there.
        device, dtype: of the parameters.

    Source: Peebles and Xie, "Scalable Diffusion Models with Transformers", 2023.
    """

    def __init__(
        self,
        width: int | Sequence[int],
        eps: float = 1e-6,
        elementwise_affine: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(width, eps, elementwise_affine, bias, device, dtype)
        if len(self.normalized_shape) != 1:
            raise ValueError(f"width must be the size of one dimension, got {width!r}")

    def forward(  # type: ignore[override]
        self, x: Tensor, scale: Tensor, shift: Tensor, *, gate: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """y, or with a residual y and h; arguments as in :func:`dgm_kernels.modulated_layer_norm`."""
        if x.shape[-1:] != self.normalized_shape:
            raise ValueError(f"x must have shape [batch, ..., {self.normalized_shape[0]}], got {tuple(x.shape)}")
        return modulated_layer_norm(
            x, scale, shift, weight=self.weight, bias=self.bias, gate=gate, residual=residual, eps=self.eps
        )


class GroupNormSiLU(nn.GroupNorm):
    """``nn.GroupNorm`` and SiLU in one: constructor and state dict of ``nn.GroupNorm``.

    Source: Wu and He, "Group Normalization", 2018.
    """

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """``silu(GN(x) (1 + scale) + shift)``; arguments as in :func:`dgm_kernels.group_norm_silu`."""
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps, scale=scale, shift=shift)
