"""Sizes of the tiles of attention's Triton kernels, by what ahead-of-time compilation says of registers and memory."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """Queries and keys of a program's tile, its warps, and the tiles that are loaded ahead."""

    queries: int
    keys: int
    warps: int
    stages: int


class Form(NamedTuple):
    """What the sizes depend on."""

    features: int  # the larger of those of a key and of a value
    kind: str  # "half", "tf32" or "fp32": which products
    dense: bool  # a mask or a bias is read
    capability: int


@functools.cache
def capability(device: torch.device) -> int:
    """Compute capability, 90 for sm_90; in the interpreter 80."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def wide(features: int, kind: str) -> int:
    """Features of a part of a row: the largest power of two, and in float32 products 32 at most."""
    padded = max(16, 1 << max(0, features - 1).bit_length())
    if kind == "fp32":
        return min(32, padded)
    whole = max(16, padded // 2)
    rest = max(16, 1 << max(0, features - whole - 1).bit_length())
    return whole if whole + rest < padded else padded


def forward(form: Form) -> Tile:
    return Tile(64, 32, 4, 2)


def query_grad(form: Form) -> Tile:
    return Tile(64, 32, 4, 2)


def key_grad(form: Form) -> Tile:
    return Tile(32, 64, 4, 2)


def jvp(form: Form) -> Tile:
    return Tile(64, 32, 4, 2)


def decode(form: Form) -> Tile:
    return Tile(1, 64, 4, 3)
