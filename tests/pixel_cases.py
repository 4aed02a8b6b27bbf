"""Calls of gate, mixture and categorical distribution of masked_conv, and the same as a user writes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dgm_kernels import categorical_log_prob, discretized_logistic_mixture, gated_activation
from dgm_kernels.masked_conv import op, reference
from tests.cases import NATIVE

BACKENDS = ["reference", *NATIVE]

Size = tuple[int, ...]  # batch, then pixels

# Ragged first: no multiple of a vector, a tile or a block; samples of one pixel or few; then round numbers.
SIZES: tuple[Size, ...] = ((1, 1), (3, 59), (2, 113), (5, 1, 1), (70,), (130, 3), (2, 7, 9), (1, 1023), (2, 16, 16))
SMALL_SIZE: Size = (3, 4, 5)
EMPTY_SIZES: tuple[Size, ...] = ((0,), (0, 4), (3, 0), (2, 0, 5))


@dataclasses.dataclass(frozen=True)
class PixelCase:
    """One way to call one of the functions.

    Args:
        draw: operands for a size, in float32.
        call: the op.
        call_eager: the same in PyTorch, in the dtype of its operands.
        differentiable: operands that the native backends take a gradient of.
        one_dtype: whether the result has the dtype of the operands; else it is float32 at least.
    """

    name: str
    draw: Callable[[Size], list[Tensor]]
    call: Callable[..., Tensor]
    call_eager: Callable[..., Tensor]
    differentiable: tuple[int, ...]
    one_dtype: bool = False

    def __str__(self) -> str:
        return self.name

    def make(self, size: Size, dtype: torch.dtype = torch.float32, grad: bool = False) -> list[Tensor]:
        """Random operands; those that are levels stay integers."""
        operands = [o.to(dtype) if o.is_floating_point() else o for o in self.draw(size)]
        return [o.requires_grad_(grad and i in self.differentiable) for i, o in enumerate(operands)]

    def results(self, function: Callable[..., Tensor], operands: Sequence[Tensor]) -> list[Tensor]:
        """The value, and the gradients of a sum that weighs each of its elements differently."""
        leaves = [o.detach().requires_grad_(i in self.differentiable) for i, o in enumerate(operands)]
        y = function(*leaves)
        weights = (torch.arange(y.numel()) * 7 % 17 - 8).view(y.shape).to(y) / 4  # exact in 16 bits
        return [y.detach(), *torch.autograd.grad(y, [leaves[i] for i in self.differentiable], weights)]


# ---- Gate


def eager_gate(x: Tensor, condition: Tensor | None = None, groups: int = 1) -> Tensor:
    """``tanh`` of the first half of each group's channels times ``sigmoid`` of the second."""
    if condition is not None:
        x = x + condition.reshape(*condition.shape[:2], *(condition.shape[2:] or [1] * (x.dim() - 2)))
    halves = x.unflatten(1, (groups, 2, x.shape[1] // (2 * groups)))
    return (torch.tanh(halves[:, :, 0]) * torch.sigmoid(halves[:, :, 1])).flatten(1, 2)


def gate_case(name: str, channels: int, condition: str | None = None, groups: int = 1) -> PixelCase:
    """A gate of ``channels`` results; a condition for each ``"sample"``, with ``"ones"`` for pixels, or a ``"map"``."""

    def draw(size: Size) -> list[Tensor]:
        batch, *pixels = size
        x = 2 * torch.randn(batch, 2 * channels, *pixels)
        shape = {"sample": (), "ones": [1] * len(pixels), "map": pixels}
        return [x] if condition is None else [x, torch.randn(batch, 2 * channels, *shape[condition])]

    def call(*operands: Tensor) -> Tensor:
        return gated_activation(*operands, channel_groups=groups)

    def eager(*operands: Tensor) -> Tensor:
        return eager_gate(*operands, groups=groups)

    return PixelCase(name, draw, call, eager, (0,) if condition is None else (0, 1), one_dtype=True)


GATE_CASES = (
    gate_case("gate", 3),
    gate_case("gate, condition a sample", 4, "sample"),
    gate_case("gate, condition with ones", 2, "ones"),
    gate_case("gate, condition a map", 2, "map"),
    gate_case("gate, groups and condition", 6, "sample", groups=3),
    gate_case("gate, one channel", 1, "sample"),
)


# ---- Mixture of discretized logistics


def draw_levels(shape: Sequence[int], levels: int) -> Tensor:
    """Random levels ``2 i / (levels - 1) - 1``, the lowest and the highest more often than others."""
    index = torch.randint(-(levels // 4) - 1, levels + levels // 4 + 1, shape).clamp(0, levels - 1)
    return index * (2.0 / (levels - 1)) - 1


def mixture_case(name: str, channels: int, mixtures: int, levels: int = 256) -> PixelCase:
    """A mixture of ``mixtures`` components; the operands are x and the parameters."""
    numbers = 10 if channels == 3 else 3

    def draw(size: Size) -> list[Tensor]:
        batch, *pixels = size
        return [draw_levels((batch, channels, *pixels), levels), torch.randn(batch, numbers * mixtures, *pixels)]

    def call(x: Tensor, parameters: Tensor) -> Tensor:
        return discretized_logistic_mixture(x, parameters, levels=levels)

    def eager(x: Tensor, parameters: Tensor) -> Tensor:
        wide = torch.float64 if torch.float64 in (x.dtype, parameters.dtype) else torch.float32
        return reference.discretized_logistic_mixture(x.to(wide), parameters.to(wide), levels)

    return PixelCase(name, draw, call, eager, (1,))


MIXTURE_CASES = (
    mixture_case("mixture of colours", 3, 10),
    mixture_case("one logistic of colours", 3, 1),
    mixture_case("mixture of grey", 1, 5),
    mixture_case("mixture of 2 levels", 1, 2, levels=2),
    mixture_case("mixture of 3 levels of colours", 3, 3, levels=3),
    mixture_case("mixture of 65536 levels", 1, 3, levels=65536),
)


# ---- Categorical


def categorical_case(name: str, levels: int, dim: int = 1) -> PixelCase:
    """The operands are x and the logits, whose dimension ``dim`` is the levels (-1: the last)."""

    def draw(size: Size) -> list[Tensor]:
        at = dim % (len(size) + 1)
        logits = 3 * torch.randn(*size[:at], levels, *size[at:])
        return [torch.randint(0, levels, size), logits]

    def call(x: Tensor, logits: Tensor) -> Tensor:
        return categorical_log_prob(x, logits, dim=dim)

    def eager(x: Tensor, logits: Tensor) -> Tensor:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return torch.log_softmax(wide, dim).gather(dim, x.unsqueeze(dim)).squeeze(dim)

    return PixelCase(name, draw, call, eager, (1,))


CATEGORICAL_CASES = (
    categorical_case("categorical", 17),
    categorical_case("categorical of 256 levels", 256),
    categorical_case("categorical of 2 levels", 2),
    categorical_case("categorical of 1 level", 1),
    categorical_case("categorical, levels first", 9, dim=0),
    categorical_case("categorical, levels last", 21, dim=-1),
    categorical_case("categorical, 1000 levels last", 1000, dim=-1),
    categorical_case("categorical, 5 levels last", 5, dim=-1),
)

CASES = (*GATE_CASES, *MIXTURE_CASES, *CATEGORICAL_CASES)


def opcheck_cases() -> list[Any]:
    """Ops and arguments for ``torch.library.opcheck``."""
    x, condition = torch.randn(2, 6, 4, 5), torch.randn(2, 6)
    grad = torch.randn(2, 3, 4, 5)
    colours, parameters = draw_levels((2, 3, 4), 256), torch.randn(2, 20, 4)
    levels, logits = torch.randint(0, 7, (2, 5)), torch.randn(2, 7, 5)
    leaf = lambda t: t.clone().requires_grad_()  # noqa: E731
    return [
        (op.gate, (x, None)),
        (op.gate, (leaf(x), leaf(condition))),
        (op.gate, (leaf(x.bfloat16()), leaf(x.bfloat16()))),
        (op.gate_backward, (grad, x, None)),
        (op.gate_backward, (grad.half(), x.half(), condition.half())),
        (op.gate_backward, (grad, x, x)),
        (op.mixture, (colours, leaf(parameters), 256)),
        (op.mixture, (colours[:, :1].contiguous(), parameters[:, :6].half().contiguous(), 16)),
        (op.mixture_backward, (torch.randn(2, 4), colours, parameters, 256)),
        (op.categorical, (levels, leaf(logits))),
        (op.categorical, (levels, logits.bfloat16())),
        (op.categorical_backward, (torch.randn(2, 5), levels, logits, torch.rand(2, 5))),
    ]
