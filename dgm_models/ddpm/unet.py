"""A small U-Net denoiser: residual blocks, self-attention at the lowest resolution, skip connections."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_kernels.nn import GroupNormSiLU

from ..model import check_positive
from .embedding import Condition

_GROUPS = 8


class UNet(nn.Module):
    """The network of Ho et al., "Denoising Diffusion Probabilistic Models", 2020, at any size.

    Args:
        shape: ``(channels, height, width)`` of one image; height and width divide by ``2 ** (len(multipliers) - 1)``.
        width: channels at the highest resolution; a multiple of 8.
        depth: residual blocks at each resolution.
        multipliers: of ``width``, one for each resolution, highest first.
        num_classes: of the labels, or None.
    """

    def __init__(
        self,
        shape: Sequence[int],
        width: int,
        depth: int,
        multipliers: Sequence[int] = (1, 2),
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        _check(shape, width, depth, multipliers)
        widths = [width * m for m in multipliers]
        size = 4 * width
        self.condition = Condition(size, num_classes)
        self.inward = nn.Conv2d(shape[0], width, 3, padding=1)
        self.down = nn.ModuleList(_Down(a, b, size, depth) for a, b in zip([width, *widths], widths, strict=False))
        self.middle = _Middle(widths[-1], size)
        # A level of the way up takes what the level below gives, and the skips of its own resolution.
        below = [*widths[1:], widths[-1]]
        self.up = nn.ModuleList(_Up(a, b, size, depth) for a, b in zip(below[::-1], widths[::-1], strict=True))
        self.norm = GroupNormSiLU(_GROUPS, width * multipliers[0])
        self.outward = nn.Conv2d(width * multipliers[0], shape[0], 3, padding=1)
        for parameter in self.outward.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        """``x``: ``[batch, *shape]``; ``time``, ``label``: ``[batch]``. Returns a tensor like ``x``."""
        condition = self.condition(time, label)
        h = self.inward(x)
        skips = []
        for level, down in enumerate(self.down):
            h = down(F.avg_pool2d(h, 2) if level else h, condition)
            skips.append(h)
        h = self.middle(h, condition)
        for level, up in enumerate(self.up):
            h = up(F.interpolate(h, scale_factor=2.0) if level else h, skips.pop(), condition)
        return self.outward(self.norm(h))


def _check(shape: Sequence[int], width: int, depth: int, multipliers: Sequence[int]) -> None:
    if len(shape) != 3:
        raise ValueError(f"the U-Net takes images of shape (channels, height, width), got {tuple(shape)}")
    if not multipliers:
        raise ValueError("multipliers must name at least one resolution, got none")
    factor = 2 ** (len(multipliers) - 1)
    if shape[1] % factor or shape[2] % factor:
        raise ValueError(
            f"height and width must divide by {factor}, that is halve {len(multipliers) - 1} times, got {shape}"
        )
    if check_positive("width", width) % _GROUPS:
        raise ValueError(f"width must be a multiple of {_GROUPS}, the groups of the normalisation, got {width}")
    for value in (depth, *multipliers):
        check_positive("depth and multipliers", value)


class _Residual(nn.Module):
    """``skip(x) + conv(silu(norm(conv(silu(norm(x))) + condition)))``."""

    def __init__(self, inputs: int, outputs: int, condition: int) -> None:
        super().__init__()
        self.norm1 = GroupNormSiLU(_GROUPS, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.shift = nn.Linear(condition, outputs)
        self.norm2 = GroupNormSiLU(_GROUPS, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x)) + self.shift(F.silu(condition))[:, :, None, None]
        return self.skip(x) + self.conv2(self.norm2(h))


class _Attention(nn.Module):
    """``x + W attention(norm(x))`` over the pixels, in one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(_GROUPS, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.outward = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)  # [batch, pixels, 3 channels]
        h = F.scaled_dot_product_attention(*pixels.chunk(3, dim=2))
        return x + self.outward(h.transpose(1, 2).reshape(x.shape))


class _Down(nn.Module):
    def __init__(self, inputs: int, outputs: int, condition: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Residual(outputs if i else inputs, outputs, condition) for i in range(depth))

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h, condition)
        return h


class _Middle(nn.Module):
    def __init__(self, channels: int, condition: int) -> None:
        super().__init__()
        self.first = _Residual(channels, channels, condition)
        self.attention = _Attention(channels)
        self.second = _Residual(channels, channels, condition)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        return self.second(self.attention(self.first(h, condition)), condition)


class _Up(nn.Module):
    """The skip connection, then residual blocks."""

    def __init__(self, inputs: int, outputs: int, condition: int, depth: int) -> None:
        super().__init__()
        widths = [inputs + outputs] + [outputs] * (depth - 1)
        self.blocks = nn.ModuleList(_Residual(width, outputs, condition) for width in widths)

    def forward(self, h: Tensor, skip: Tensor, condition: Tensor) -> Tensor:
        h = torch.cat([h, skip], dim=1)
        for block in self.blocks:
            h = block(h, condition)
        return h
