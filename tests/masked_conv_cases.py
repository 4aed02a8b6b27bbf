"""Calls of the four masked convolutions, and what they mean, written from the definition and not from the op's taps."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dgm_kernels import causal_conv1d, horizontal_conv2d, masked_conv2d, vertical_conv2d
from tests.cases import NATIVE

BACKENDS = ["reference", *NATIVE]

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "raster": masked_conv2d,
    "vertical": vertical_conv2d,
    "horizontal": horizontal_conv2d,
    "causal": causal_conv1d,
}

Size = tuple[int, int, int, int, int]  # batch, inputs, outputs, height, width; a sequence has height * width steps

# Ragged first: no multiple of a vector, a tile or a block; then few channels in many pixels; then round numbers.
SIZES: tuple[Size, ...] = (
    *((1, 1, 1, 1, 1), (2, 3, 1, 1, 3), (1, 1, 3, 5, 1), (3, 2, 2, 3, 4), (2, 3, 59, 7, 9), (1, 59, 3, 5, 6)),
    *(
        (1, 113, 59, 4, 3),
        (2, 5, 113, 3, 5),
        (1, 2, 5, 1, 113),
        (1, 2, 3, 113, 1),
        (2, 1, 1, 3, 59),
        (1, 17, 33, 2, 31),
    ),
    *((1, 1, 2, 31, 33), (2, 16, 32, 8, 16)),
)
SMALL_SIZE: Size = (2, 4, 6, 4, 5)
EMPTY_SIZES: tuple[Size, ...] = ((0, 3, 4, 5, 6), (2, 0, 3, 4, 5), (2, 3, 0, 4, 5), (2, 3, 4, 0, 5), (2, 3, 4, 5, 0))


def centre(kind: str, height: int, width: int) -> tuple[int, int]:
    """Row and column of the tap that reads the pixel itself."""
    if kind == "raster":
        return height // 2, width // 2
    return (height - 1, width // 2) if kind == "vertical" else (0, width - 1)


def sees(kind: str, mask_type: str, dy: int, dx: int, of: Tensor, to: Tensor) -> Tensor:
    """Whether channel group ``to`` of a pixel may depend on group ``of`` of the pixel ``(dy, dx)`` away from it."""
    if kind == "vertical":
        return (of == of) & (to == to) & (dy < 0 or (dy == 0 and mask_type == "B"))
    if (dy, dx) == (0, 0):
        return of < to if mask_type == "A" else of <= to
    return (of == of) & (to == to) & ((dy, dx) < (0, 0))


def group_of(channels: int, groups: int) -> Tensor:
    """The colour group of each channel."""
    return torch.arange(channels) // max(1, channels // groups)


def live_weights(kind: str, mask_type: str, groups: int, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Which weights ``[outputs, inputs, height, width]`` count."""
    outputs, inputs, height, width = shape
    row, column = centre(kind, height, width)
    of, to = group_of(inputs, groups), group_of(outputs, groups)[:, None]
    mask = torch.zeros(shape, dtype=torch.bool)
    for i, j in itertools.product(range(height), range(width)):
        mask[:, :, i, j] = sees(kind, mask_type, i - row, j - column, of, to)
    return mask


def eager_conv(
    kind: str, x: Tensor, weight: Tensor, bias: Tensor | None, mask_type: str, groups: int, dilation: tuple[int, int]
) -> Tensor:
    """``conv2d(x, weight * mask)``, the kernel embedded in one of odd sides with the pixel itself in the middle."""
    weight = weight * live_weights(kind, mask_type, groups, weight.shape).to(weight)
    below = weight.shape[2] - 1 if kind == "vertical" else 0
    right = weight.shape[3] - 1 if kind in ("horizontal", "causal") else 0
    weight = F.pad(weight, (0, right, 0, below))
    padding = tuple(side // 2 * step for side, step in zip(weight.shape[2:], dilation, strict=True))
    return F.conv2d(x, weight, bias, padding=padding, dilation=dilation)


def eager_gate(y: Tensor, groups: int) -> Tensor:
    """``tanh`` of the first half of each group's channels times ``sigmoid`` of the second."""
    halves = y.unflatten(1, (groups, 2, y.shape[1] // (2 * groups)))
    return (torch.tanh(halves[:, :, 0]) * torch.sigmoid(halves[:, :, 1])).flatten(1, 2)


@dataclasses.dataclass(frozen=True)
class ConvCase:
    """One way to call one of the four functions.

    Args:
        condition: ``"sample"`` for ``[batch, outputs]``, ``"ones"`` for ``[batch, outputs, 1, 1]``, ``"map"`` for the
            shape of the result.
    """

    kind: str
    mask_type: str
    kernel: tuple[int, int]
    groups: int = 1
    dilation: tuple[int, int] = (1, 1)
    bias: bool = True
    gated: bool = False
    condition: str | None = None

    def __str__(self) -> str:
        parts = [self.kind, self.mask_type, "x".join(map(str, self.kernel))]
        parts += [f"groups {self.groups}"] * (self.groups > 1) + [f"dilation {self.dilation}"] * (
            max(self.dilation) > 1
        )
        parts += ["no bias"] * (not self.bias) + ["gated"] * self.gated
        return " ".join(parts + [f"condition {self.condition}"] * (self.condition is not None))

    @property
    def names(self) -> tuple[str, ...]:
        """The operands."""
        return ("x", "weight", *["bias"] * self.bias, *["condition"] * (self.condition is not None))

    def fit(self, size: Size) -> Size:
        """The size with numbers of channels that the groups and halves divide."""
        batch, inputs, outputs, height, width = size
        whole = self.groups * (2 if self.gated else 1)
        return batch, -(-inputs // self.groups) * self.groups, -(-outputs // whole) * whole, height, width

    def make(self, size: Size, dtype: torch.dtype = torch.float32, grad: bool = False) -> list[Tensor]:
        """Random operands; results are of the order of 1."""
        batch, inputs, outputs, height, width = self.fit(size)
        one = self.kind == "causal"
        pixels = (height * width,) if one else (height, width)
        shapes = {
            "x": (batch, inputs, *pixels),
            "weight": (outputs, inputs, *(self.kernel[1:] if one else self.kernel)),
            "bias": (outputs,),
            "condition": (
                batch,
                outputs,
                *{"map": pixels, "ones": [1] * len(pixels), "sample": (), None: ()}[self.condition],
            ),
        }
        operands = [torch.randn(shapes[name]) for name in self.names]
        operands[1] /= math.sqrt(max(1, inputs * math.prod(self.kernel)))
        return [operand.to(dtype).requires_grad_(grad) for operand in operands]

    def call(self, *operands: Tensor) -> Tensor:
        """The op."""
        options: dict[str, object] = {"mask_type": self.mask_type}
        if self.kind in ("raster", "horizontal"):
            options["channel_groups"] = self.groups
        options["dilation"] = self.dilation if self.kind in ("raster", "vertical") else self.dilation[1]
        if self.gated:
            options["gated"] = True
        named = dict(zip(self.names[2:], operands[2:], strict=True))
        return FUNCTIONS[self.kind](*operands[:2], **named, **options)

    def call_eager(self, *operands: Tensor) -> Tensor:
        """The op as a user writes it."""
        named = dict(zip(self.names, operands, strict=True))
        x, weight, condition = named["x"], named["weight"], named.get("condition")
        if self.kind == "causal":
            x, weight = x.unsqueeze(2), weight.unsqueeze(2)
        y = eager_conv(self.kind, x, weight, named.get("bias"), self.mask_type, self.groups, self.dilation)
        y = y.squeeze(2) if self.kind == "causal" else y
        if condition is not None:
            y = y + condition.view(*condition.shape, *[1] * (y.dim() - condition.dim()))
        return eager_gate(y, self.groups) if self.gated else y

    def live(self, weight: Tensor) -> Tensor:
        """Which weights count, in the shape of ``weight``."""
        shape = (*weight.shape[:2], *self.kernel)
        return live_weights(self.kind, self.mask_type, self.groups, shape).view(weight.shape)


RASTER_CASES = (
    *(ConvCase("raster", mask_type, kernel) for kernel in ((3, 3), (7, 7), (1, 1), (5, 3)) for mask_type in "AB"),
    *(ConvCase("raster", mask_type, (3, 5), groups=3) for mask_type in "AB"),
    *(ConvCase("raster", mask_type, (1, 1), groups=2) for mask_type in "AB"),
    ConvCase("raster", "A", (1, 7), groups=2, bias=False),
    ConvCase("raster", "B", (5, 1), dilation=(3, 1)),
    ConvCase("raster", "B", (3, 3), groups=3, dilation=(1, 2), bias=False),
    ConvCase("raster", "A", (3, 3), dilation=(2, 70)),
    ConvCase("raster", "B", (3, 3), gated=True),
    ConvCase("raster", "A", (5, 5), groups=3, gated=True, condition="sample"),
    ConvCase("raster", "B", (3, 3), gated=True, bias=False, condition="ones"),
    ConvCase("raster", "B", (3, 3), groups=2, condition="map"),
)
VERTICAL_CASES = (
    ConvCase("vertical", "A", (2, 3)),
    ConvCase("vertical", "B", (2, 3)),
    ConvCase("vertical", "B", (4, 5), dilation=(2, 3)),
    ConvCase("vertical", "A", (1, 3)),
    ConvCase("vertical", "B", (1, 1), bias=False),
    ConvCase("vertical", "A", (3, 1), gated=True, condition="map"),
    ConvCase("vertical", "B", (3, 5), condition="sample"),
)
HORIZONTAL_CASES = (
    ConvCase("horizontal", "A", (1, 2)),
    ConvCase("horizontal", "B", (1, 4)),
    ConvCase("horizontal", "A", (1, 3), groups=3),
    ConvCase("horizontal", "B", (1, 2), groups=2, dilation=(1, 3), bias=False),
    ConvCase("horizontal", "A", (1, 1), groups=3),
    ConvCase("horizontal", "B", (1, 3), groups=3, gated=True, condition="map"),
)
CAUSAL_CASES = (
    ConvCase("causal", "A", (1, 1)),
    ConvCase("causal", "A", (1, 3), dilation=(1, 2)),
    ConvCase("causal", "B", (1, 2), dilation=(1, 8)),
    ConvCase("causal", "B", (1, 5), bias=False),
    ConvCase("causal", "B", (1, 2), dilation=(1, 4), gated=True, condition="sample"),
    ConvCase("causal", "A", (1, 4), gated=True, condition="map"),
)
CASES = (*RASTER_CASES, *VERTICAL_CASES, *HORIZONTAL_CASES, *CAUSAL_CASES)
