"""Checks of arguments, each with an error that names the argument, what was expected and what came."""

from __future__ import annotations

import torch
from torch import Tensor


def check_batch(name: str, x: object) -> None:
    """``x`` is a floating-point tensor with a batch dimension."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}")
    if x.dim() == 0:
        raise ValueError(f"{name} must have a batch dimension, got a tensor without dimensions")


def check_like(name: str, value: object, x: Tensor, like: str) -> None:
    """``value`` is a floating-point tensor of the shape and on the device of ``x``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.shape != x.shape:
        raise ValueError(f"{name} must have the shape of {like}, {tuple(x.shape)}, got {tuple(value.shape)}")
    check_device(name, value, x, like)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")


def check_device(name: str, value: Tensor, x: Tensor, like: str) -> None:
    """``value`` is on the device of ``x``."""
    if value.device != x.device:
        raise ValueError(f"{name} must be on the device of {like}, {x.device}, got {value.device}")


def check_index(name: str, value: object, x: Tensor, like: str, length: int, per_row: bool = False) -> None:
    """``value`` indexes a table of ``length`` rows: an int in range, or an int64 tensor with one entry or one a row."""
    if isinstance(value, Tensor):
        if value.dtype != torch.int64:
            raise TypeError(f"{name} must be an int64 tensor, got {value.dtype}")
        shapes = ((x.shape[0],),) if per_row else ((), (x.shape[0],))
        if tuple(value.shape) not in shapes:
            raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}, got {tuple(value.shape)}")
        check_device(name, value, x, like)
    elif per_row or isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        kind = "an int64 tensor" if per_row else "an int or an int64 tensor"
        raise TypeError(f"{name} must be {kind}, got {type(value).__name__}")
    elif not 0 <= value < length:
        raise ValueError(f"{name} must be in [0, {length}), the rows of the table, got {value}")
