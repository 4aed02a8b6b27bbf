"""Checks of the sampler op's own arguments."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .._core.checks import check_batch, check_device, check_index, check_like
from .._core.noise import NoiseKey, OpArgs, noise_args
from .table import SamplerTable, TrainingTable


def check_guidance(guidance: tuple[Tensor, float] | None, x: Tensor) -> tuple[Tensor | None, float]:
    """The unconditional output and the scale."""
    if guidance is None:
        return None, 1.0
    if not isinstance(guidance, tuple) or len(guidance) != 2:
        raise TypeError("guidance must be a pair (unconditional model output, scale)")
    check_like("guidance[0]", guidance[0], x, "x")
    if not isinstance(guidance[1], (Real, torch.SymFloat)) or isinstance(guidance[1], bool):
        raise TypeError(f"guidance[1], the scale, must be a number, got {type(guidance[1]).__name__}")
    return guidance[0], float(guidance[1])


def check_history(history: Tensor | None, table: SamplerTable, step: int | Tensor, x: Tensor) -> None:
    """History is there where the step uses it. A step that only the device knows may use it."""
    if history is not None:
        check_like("history", history, x, "x")
    elif table.history is not None and (isinstance(step, Tensor) or table.needs_history[step]):
        what = "state the step before started from" if table.history == "x" else "x0 the step before predicted"
        raise ValueError(f"history must be given for step {step} of table {table.name!r}: the {what}")


def check_known(known: Tensor | None, mask: Tensor | None, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Both or neither, expanded to the shape of ``x``."""
    if known is None and mask is None:
        return None, None
    if known is None or mask is None:
        raise ValueError("known and mask go together, got only one of them")
    if isinstance(known, Tensor) and not known.is_floating_point():
        raise TypeError(f"known must be a floating-point tensor, got {known.dtype}")
    if isinstance(mask, Tensor) and not (mask.is_floating_point() or mask.dtype == torch.bool):
        raise TypeError(f"mask must be a bool or floating-point tensor, got {mask.dtype}")
    return _expanded("known", known, x), _expanded("mask", mask, x)


def _expanded(name: str, value: Tensor, x: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    check_device(name, value, x, "x")
    if value.shape == x.shape:
        return value
    try:
        return value.expand(x.shape)
    except RuntimeError:
        expected, got = tuple(x.shape), tuple(value.shape)
        raise ValueError(f"{name} must broadcast to the shape of x, {expected}, got {got}") from None


def check_out(out: Any, x: Tensor, return_x0: bool, grad: bool) -> None:
    """``out`` is what the call returns: a tensor like ``x``, or a pair of them."""
    if grad:
        raise ValueError("out does not support gradients: an input requires them")
    if isinstance(out, tuple) != return_x0 or (return_x0 and len(out) != 2):
        raise ValueError(f"out must be {'a pair of tensors' if return_x0 else 'a tensor'}, got {type(out).__name__}")
    for tensor in out if return_x0 else (out,):
        check_like("out", tensor, x, "x")
        if tensor.dtype != x.dtype:
            raise TypeError(f"out must have the dtype of x, {x.dtype}, got {tensor.dtype}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError("out does not support gradients: out itself requires them")
    if return_x0 and _overlap(*out):
        raise ValueError("out must be two tensors that do not overlap in memory")


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the spans of memory of two dense tensors meet; under torch.compile, which copies, never."""
    if torch.compiler.is_compiling() or a.numel() == 0 or b.numel() == 0:
        return False
    first = [t.data_ptr() for t in (a, b)]
    elements = [1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in (a, b)]
    ends = [p + n * t.element_size() for p, n, t in zip(first, elements, (a, b), strict=True)]
    return max(first) < min(ends)


def writable(out: Tensor | tuple[Tensor, Tensor], tensors: list[Any]) -> bool:
    """Whether a kernel may write to ``out`` directly: dense, and each input is that very memory or none of it."""
    for target in out if isinstance(out, tuple) else (out,):
        if not target.is_contiguous():
            return False
        for tensor in tensors:
            if tensor is None or not _overlap(target, tensor):
                continue
            if tensor.data_ptr() != target.data_ptr() or tensor.dtype != target.dtype or isinstance(out, tuple):
                return False
    return True


def check_training(x0: Tensor, table: TrainingTable, t: Tensor, noise: NoiseKey | Tensor) -> tuple[Tensor, OpArgs]:
    """The arguments that the forward process and its loss share; returns t and the noise as the op takes them."""
    check_batch("x0", x0)
    if not isinstance(table, TrainingTable):
        raise TypeError(f"table must be a TrainingTable (see tables.training), got {type(table).__name__}")
    index = check_index("t", t, x0, "x0", len(table), per_row=True)
    if noise is None:
        raise TypeError("noise must be a NoiseKey or a tensor, got None: the loss has to draw the same noise again")
    return index, noise_args(noise, x0)  # type: ignore[return-value]
