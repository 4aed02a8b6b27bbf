"""Shapes, calls and eager yardsticks of the norm op that tests and bench share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dgm_kernels import group_norm_silu, layer_norm, modulated_layer_norm, rms_norm

# Ragged first: no multiple of a vector, a part of rows or a tile; one element a row; then few long rows; then none.
SHAPES = ((1, 2), (3, 59), (2, 3, 113), (5, 1023), (2, 70, 7), (3, 1), (2, 5003), (0, 4), (2, 0, 6))
GROUP_SHAPES = ((1, 4), (3, 8, 5), (2, 6, 7, 9), (2, 4, 113), (1, 2, 3, 2, 5), (2, 4, 1031), (0, 4, 3), (2, 4, 0))
TOKENS_SHAPE = (4096, 1024)
DIT_SHAPE = (8, 256, 1152)
IMAGE_SHAPE = (16, 128, 32, 32)
IMAGE_GROUPS = 32
SMALL_SHAPE = (8, 64)


def over_tokens(x: Tensor, dim: int) -> Tensor:
    """``[batch, D]`` as what broadcasts to a tensor of ``dim`` dimensions, the last of which is D."""
    return x.view(x.shape[0], *[1] * (dim - 2), x.shape[1])


def eager_modulated(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """``modulated_layer_norm`` as a user writes it."""
    h = x
    if residual is not None:
        h = residual + (x if gate is None else over_tokens(gate, x.dim()) * x)
    y = F.layer_norm(h, h.shape[-1:], weight, bias, eps)
    y = y * (1 + over_tokens(scale, x.dim())) + over_tokens(shift, x.dim())
    return y if residual is None else (y, h)


def eager_group(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``group_norm_silu`` as a user writes it, and in batches of one element a group, which F.group_norm refuses."""
    ones = [1] * (x.dim() - 2)
    grouped = x.reshape(x.shape[0], groups, -1) if x.numel() else x.flatten(1)[:, :0].unflatten(1, (groups, 0))
    y = ((grouped - grouped.mean(-1, keepdim=True)) * _rstd(grouped, eps)).reshape(x.shape) if x.numel() else x
    y = y if weight is None else y * weight.view(-1, *ones)
    y = y if bias is None else y + bias.view(-1, *ones)
    if scale is not None:
        y = y * (1 + scale.view(*scale.shape, *ones))
    if shift is not None:
        y = y + shift.view(*shift.shape, *ones)
    return F.silu(y)


def _rstd(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.var(-1, correction=0, keepdim=True) + eps)


@dataclasses.dataclass(frozen=True)
class NormCase:
    """One way to call a function of the op: its operands, all differentiable, x first."""

    name: str
    call: Callable[..., Any]
    call_eager: Callable[..., Any]
    operands: Callable[[tuple[int, ...]], tuple[Tensor, ...]]
    shapes: tuple[tuple[int, ...], ...] = SHAPES

    def __str__(self) -> str:
        return self.name

    def make(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, grad: bool = False) -> list[Tensor]:
        """Random operands."""
        return [operand.to(dtype).requires_grad_(grad) for operand in self.operands(shape)]


def _rows_case(name: str, call: Callable[..., Any], eager: Callable[..., Any], dims: int, parameters: int) -> NormCase:
    def operands(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        return torch.randn(shape) + 0.5, *(1 + 0.5 * torch.randn(shape[-dims:]) for _ in range(parameters))

    return NormCase(name, call, eager, operands)


def _modulated_case(residual: bool, gate: bool, affine: bool) -> NormCase:
    names = [*["gate"] * gate, *["residual"] * residual, *["weight", "bias"] * affine]

    def call(x: Tensor, scale: Tensor, shift: Tensor, *more: Tensor) -> Any:
        return modulated_layer_norm(x, scale, shift, **dict(zip(names, more, strict=True)))

    def eager(x: Tensor, scale: Tensor, shift: Tensor, *more: Tensor) -> Any:
        return eager_modulated(x, scale, shift, **dict(zip(names, more, strict=True)))  # type: ignore[arg-type]

    def operands(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        row = (shape[0], shape[-1])
        shapes = {"gate": row, "residual": shape, "weight": shape[-1:], "bias": shape[-1:]}
        return torch.randn(shape), *torch.randn(2, *row).unbind(), *(torch.randn(shapes[name]) for name in names)

    return NormCase(" ".join(["modulated", *names]), call, eager, operands)


def _group_case(affine: bool, modulated: bool, groups: int = 2) -> NormCase:
    def split(more: tuple[Tensor, ...]) -> dict[str, Tensor]:
        names = [*["weight", "bias"] * affine, *["scale", "shift"] * modulated]
        return dict(zip(names, more, strict=True))

    def operands(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        parameters = [torch.randn(shape[1]) for _ in range(2 * affine)]
        return torch.randn(shape) + 0.5, *parameters, *(torch.randn(shape[:2]) for _ in range(2 * modulated))

    return NormCase(
        " ".join(["group silu", *["affine"] * affine, *["modulated"] * modulated]),
        lambda x, *more: group_norm_silu(x, groups, **split(more)),  # type: ignore[arg-type]
        lambda x, *more: eager_group(x, groups, **split(more)),  # type: ignore[arg-type]
        operands,
        GROUP_SHAPES,
    )


RMS_EPS = 1e-5
ROWS_CASES = (
    _rows_case(
        "layer norm affine",
        lambda x, w, b: layer_norm(x, x.shape[-1:], w, b),
        lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b),
        1,
        2,
    ),
    _rows_case(
        "layer norm", lambda x: layer_norm(x, x.shape[-1:]), lambda x: F.layer_norm(x, x.shape[-1:]), 1, 0
    ),
    _rows_case(
        "layer norm over two dimensions, no bias",
        lambda x, w: layer_norm(x, w.shape, w),
        lambda x, w: F.layer_norm(x, w.shape, w),
        2,
        1,
    ),
    _rows_case(
        "rms norm weight",
        lambda x, w: rms_norm(x, x.shape[-1:], w, RMS_EPS),
        lambda x, w: F.rms_norm(x, x.shape[-1:], w, RMS_EPS),
        1,
        1,
    ),
    _rows_case(
        "rms norm",
        lambda x: rms_norm(x, x.shape[-1:], eps=RMS_EPS),
        lambda x: F.rms_norm(x, x.shape[-1:], eps=RMS_EPS),
        1,
        0,
    ),
)  # fmt: skip
MODULATED_CASES = (
    _modulated_case(False, False, False),
    _modulated_case(False, False, True),
    _modulated_case(True, False, False),
    _modulated_case(True, True, False),
    _modulated_case(True, True, True),
)
GROUP_CASES = tuple(_group_case(affine, modulated) for affine in (False, True) for modulated in (False, True))
CASES = (*ROWS_CASES, *MODULATED_CASES, *GROUP_CASES)
