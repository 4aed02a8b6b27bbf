"""Small autoregressive networks for the tests of generation: every family, with random weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dgm_kernels
from dgm_kernels.nn import CausalConv1d, HorizontalConv2d, MaskedConv2d, MaskedLinear, VerticalConv2d


class PixelCNN(nn.Module):
    """A masked stack with residual blocks and dropout; ``groups`` colours that see each other in order."""

    def __init__(self, channels: int, outputs: int, groups: int = 1, width: int = 12, dilation: int = 1) -> None:
        super().__init__()
        self.first = MaskedConv2d(channels, width, (5, 3), mask_type="A", channel_groups=groups)
        settings = {"mask_type": "B", "channel_groups": groups}
        self.narrow = nn.ModuleList(MaskedConv2d(width, width, 1, **settings) for _ in range(2))
        self.wide = nn.ModuleList(MaskedConv2d(width, width, 3, dilation=dilation, **settings) for _ in range(2))
        self.dropout = nn.Dropout(0.5)
        self.last = MaskedConv2d(width, outputs, 1, **settings)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for narrow, wide in zip(self.narrow, self.wide, strict=True):
            x = x + wide(F.relu(self.dropout(narrow(F.silu(x)))))
        return self.last(torch.tanh(x))


class GatedPixelCNN(nn.Module):
    """Vertical and horizontal stacks, residuals, skips; a condition for each sample or each pixel."""

    def __init__(self, channels: int, outputs: int, conditions: int = 0, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        inputs = [channels] + [width] * (depth - 1)
        kinds = ["A"] + ["B"] * (depth - 1)
        self.vertical = nn.ModuleList(
            VerticalConv2d(i, 2 * width, 3, mask_type=kind) for i, kind in zip(inputs, kinds, strict=True)
        )
        self.horizontal = nn.ModuleList(
            HorizontalConv2d(i, 2 * width, 3, mask_type=kind, gated=True) for i, kind in zip(inputs, kinds, strict=True)
        )
        self.down = nn.ModuleList(nn.Conv2d(2 * width, 2 * width, 1) for _ in range(depth))
        self.residual = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(depth))
        self.skip = nn.ModuleList(nn.Conv2d(width, width, 1, bias=False) for _ in range(depth))
        self.embedding = nn.Sequential(nn.Linear(conditions, 2 * width), nn.Tanh()) if conditions else None
        first, last = nn.Conv2d(width, width, 1), nn.Conv2d(width, outputs, 1)
        self.last = nn.Sequential(nn.ReLU(inplace=True), first, nn.ELU(), last)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        shift = None
        if condition is not None:
            assert self.embedding is not None
            shift = self.embedding(condition.movedim(1, -1)).movedim(-1, 1)
        v = h = x
        skips = 0.0
        for place, vertical in enumerate(self.vertical):
            above = vertical(v)
            v = dgm_kernels.gated_activation(above, shift)
            gated = self.horizontal[place](h, self.down[place](above))
            skips = skips + self.skip[place](gated)
            h = self.residual[place](gated) if place == 0 else h + self.residual[place](gated)
        return self.last(skips)


def lively(network: nn.Module) -> nn.Module:
    """Larger weights: outputs that depend visibly on what was drawn before."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2.0)
    return network


def concat_elu(x: Tensor) -> Tensor:
    return F.elu(torch.cat([x, -x], dim=1))


class PixelCNNpp(nn.Module):
    """Two stacks with concat_elu and gates out of chunk, sigmoid and product, as PixelCNN++ at one resolution."""

    def __init__(self, channels: int, mixtures: int, width: int = 6) -> None:
        super().__init__()
        self.above = VerticalConv2d(channels + 1, width, (2, 3), mask_type="A")
        self.left = HorizontalConv2d(channels + 1, width, 2, mask_type="A")
        self.vertical = nn.ModuleList(VerticalConv2d(2 * width, 2 * width, (2, 3)) for _ in range(2))
        self.horizontal = nn.ModuleList(MaskedConv2d(2 * width, 2 * width, 3, mask_type="B") for _ in range(2))
        self.across = nn.ModuleList(nn.Conv2d(2 * width, 2 * width, 1) for _ in range(2))
        self.last = nn.Conv2d(2 * width, (10 if channels == 3 else 3) * mixtures, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        v, h = self.above(x), self.left(x)
        h = h + v
        for vertical, horizontal, across in zip(self.vertical, self.horizontal, self.across, strict=True):
            a, b = vertical(concat_elu(v)).chunk(2, dim=1)
            v = v + a * torch.sigmoid(b)
            pair = horizontal(concat_elu(h)) + across(concat_elu(v))
            h = h - 0.5 * (pair[:, : h.shape[1]] * pair[:, h.shape[1] :].sigmoid())
        return self.last(concat_elu(h))


class WaveNet(nn.Module):
    """Dilated causal convolutions with gates, residuals and skips; a condition for each step."""

    def __init__(
        self, levels: int, conditions: int = 0, width: int = 6, dilations: tuple[int, ...] = (1, 2, 4)
    ) -> None:
        super().__init__()
        self.first = CausalConv1d(1, width, 2, mask_type="A")
        self.layers = nn.ModuleList(CausalConv1d(width, 2 * width, 2, dilation=d, gated=True) for d in dilations)
        self.residual = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in dilations)
        self.skip = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in dilations)
        self.condition = nn.ModuleList(nn.Conv1d(conditions, 2 * width, 1) for _ in dilations) if conditions else None
        self.last = nn.Conv1d(width, levels, 1)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        x, total = self.first(x), None
        for place, layer in enumerate(self.layers):
            gated = layer(x, self.condition[place](condition) if self.condition is not None else None)
            x = x + self.residual[place](gated)
            skip = self.skip[place](gated)
            total = skip if total is None else total + skip
        return self.last(F.relu(total))


class MADE(nn.Module):
    """Masked dense layers over features in a random order, with hidden degrees in no order."""

    def __init__(self, features: int, levels: int = 2, hidden: int = 17, seed: int = 3) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        order = torch.randperm(features, generator=random) + 1
        inner = [torch.randint(0, features, (hidden,), generator=random) for _ in range(2)]
        self.first = MaskedLinear(order, inner[0])
        self.middle = MaskedLinear(inner[0], inner[1])
        self.last = MaskedLinear(inner[1], order.repeat_interleave(levels if levels > 2 else 1), strict=True)
        self.direct = MaskedLinear(order, self.last.out_degrees, strict=True, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.middle(F.relu(self.first(x))))) + self.direct(x)


class FVSBN(nn.Module):
    """Each feature is a logistic regression on those before it."""

    def __init__(self, features: int) -> None:
        super().__init__()
        degrees = torch.arange(features)
        self.layer = MaskedLinear(degrees, degrees, strict=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Operations(nn.Module):
    """A masked first layer, then some operations on its features."""

    def __init__(self, function: Callable[[Tensor, nn.ModuleDict], Tensor]) -> None:
        super().__init__()
        self.first = MaskedConv2d(1, 6, 3, mask_type="A")
        self.layers = nn.ModuleDict(
            {
                "conv": nn.Conv2d(6, 6, 1),
                "three": nn.Conv2d(3, 6, 1, padding="same"),
                "twice": nn.Conv2d(12, 6, 1),
                "masked": MaskedConv2d(6, 6, 3, mask_type="B"),
                "relu": nn.ReLU(inplace=True),
                "many": nn.Sequential(nn.Identity(), nn.Dropout(0.7), nn.SiLU(), nn.Sigmoid(), nn.Tanh(), nn.ELU()),
            }
        )
        self.scale = nn.Parameter(torch.rand(6, 1, 1) + 0.5)
        self.last = nn.Conv2d(6, 1, 1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x), self.layers))


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, the images it generates and a condition for a batch of 4."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    settings: dict[str, object]
    condition: tuple[int, ...] | None = None


_CATEGORICAL, _BERNOULLI = {"output": "categorical", "levels": 5}, {"output": "bernoulli"}
CASES: dict[str, Case] = {
    "pixelcnn": Case(lambda: PixelCNN(1, 1), (1, 6, 5), _BERNOULLI),
    "pixelcnn_dilated": Case(lambda: PixelCNN(2, 2, dilation=2), (2, 5, 7), _BERNOULLI),
    "pixelcnn_rgb": Case(lambda: PixelCNN(3, 15, groups=3), (3, 4, 5), _CATEGORICAL),
    "gated": Case(lambda: GatedPixelCNN(1, 1), (1, 6, 6), _BERNOULLI),
    "gated_sample_condition": Case(lambda: GatedPixelCNN(1, 5, 4), (1, 5, 6), _CATEGORICAL, (4, 4)),
    "gated_pixel_condition": Case(lambda: GatedPixelCNN(2, 10, 3), (2, 4, 3), _CATEGORICAL, (4, 3, 4, 3)),
    "pixelcnnpp": Case(lambda: PixelCNNpp(3, 2), (3, 4, 5), {"output": "logistic_mixture", "levels": 32}),
    "pixelcnnpp_grey": Case(lambda: PixelCNNpp(1, 3), (1, 5, 4), {"output": "logistic_mixture"}),
    "wavenet": Case(lambda: WaveNet(5), (1, 30), _CATEGORICAL),
    "wavenet_conditioned": Case(lambda: WaveNet(5, 3), (1, 20), _CATEGORICAL, (4, 3, 20)),
    "made": Case(lambda: MADE(9), (9,), _BERNOULLI),
    "made_categorical": Case(lambda: MADE(7, 5), (7,), _CATEGORICAL),
    "fvsbn": Case(lambda: FVSBN(8), (8,), _BERNOULLI),
}
