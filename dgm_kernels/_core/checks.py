"""Checks of arguments, each with an error that names the argument, what was expected and what came."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def as_int(value: object) -> int | None:
    """The number as an int, NumPy's integers too; None for anything else, bool and tensors among it."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)  # an IntEnum, of which torch.compile cannot trace operator.index
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
        return None
    return operator.index(value)


def check_float(name: str, value: Tensor) -> None:
    """``value`` has one of the floating-point dtypes that the ops take."""
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} must be a floating-point tensor of 16, 32 or 64 bits, got {value.dtype}")


def check_batch(name: str, x: object) -> None:
    """``x`` is a floating-point tensor with a batch dimension."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    check_float(name, x)
    if x.dim() == 0:
        raise ValueError(f"{name} must have a batch dimension, got a tensor without dimensions")


def check_like(name: str, value: object, x: Tensor, like: str) -> None:
    """``value`` is a floating-point tensor of the shape and on the device of ``x``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.shape != x.shape:
        raise ValueError(f"{name} must have the shape of {like}, {tuple(x.shape)}, got {tuple(value.shape)}")
    check_device(name, value, x, like)
    check_float(name, value)


def check_device(name: str, value: Tensor, x: Tensor, like: str) -> None:
    """``value`` is on the device of ``x``."""
    if value.device != x.device:
        raise ValueError(f"{name} must be on the device of {like}, {x.device}, got {value.device}")


def check_index(name: str, value: object, x: Tensor, like: str, length: int, per_row: bool = False) -> int | Tensor:
    """``value`` indexes a table of ``length`` rows: an int in range, or an int64 tensor with one entry or one a row.

    Returns:
        The int, or the tensor made contiguous.
    """
    if isinstance(value, Tensor):
        if value.dtype != torch.int64:
            raise TypeError(f"{name} must be an int64 tensor, got {value.dtype}")
        shapes = ((x.shape[0],),) if per_row else ((), (x.shape[0],))
        if tuple(value.shape) not in shapes:
            raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}, got {tuple(value.shape)}")
        check_device(name, value, x, like)
        return value.contiguous()
    number = None if per_row else as_int(value)
    if number is None:
        kind = "an int64 tensor" if per_row else "an int or an int64 tensor"
        raise TypeError(f"{name} must be {kind}, got {type(value).__name__}")
    if not 0 <= number < length:
        raise ValueError(f"{name} must be in [0, {length}), the rows of the table, got {number}")
    return number


def values_known(x: Tensor) -> bool:
    """Whether the values of a tensor can be looked at now: not in compiled code, under vmap or without its device."""
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        return False
    return x.is_cpu and type(x) in (Tensor, torch.nn.Parameter)


def check_values(name: str, index: int | Tensor, length: int) -> None:
    """The entries of an index on the CPU are in range; another device is not awaited, and its kernels answer NaN."""
    if not isinstance(index, Tensor) or index.numel() == 0 or not values_known(index):
        return
    low, high = (int(bound) for bound in index.aminmax())
    if low < 0 or high >= length:
        raise ValueError(f"{name} must be in [0, {length}), the rows of the table, got {low if low < 0 else high}")
