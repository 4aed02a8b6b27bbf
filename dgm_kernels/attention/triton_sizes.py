"""Sizes of the tiles of attention's Triton kernels.

Chosen by what ahead-of-time compilation says (``python -m bench.aot``): no registers spilled, shared memory within that
of the device, and of what is left the tiles that read keys and queries least often. Not measured on a GPU.
"""

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
    kind: str  # "half" or "tf32": products on tensor cores; "fp32": ordinary instructions
    dense: int  # 1 with a mask or a bias that is read in long pieces, 2 with one that is not
    near: bool  # columns of pictures count
    capability: int  # 90 for sm_90


@functools.cache
def capability(device: torch.device) -> int:
    """That of the device; in the interpreter 80."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def wide(features: int, kind: str) -> int:
    """Features of a part of a row: the largest power of two that saves padding, and of ordinary instructions 32."""
    padded = max(16, 1 << max(0, features - 1).bit_length())
    if kind == "fp32":
        return min(32, padded)
    whole = max(16, padded // 2)
    rest = max(16, 1 << max(0, features - whole - 1).bit_length())
    return whole if whole + rest < padded else padded


def forward(form: Form) -> Tile:
    if form.kind == "fp32":
        return Tile(64, 32, 4, 2) if form.features <= 64 else Tile(32, 32, 4 if form.features <= 128 else 8, 2)
    if form.dense > 1:
        return Tile(32, 32, 4 if form.features <= 128 else 8, 2)
    if form.kind == "tf32":
        return Tile(64, 32, 4 if form.features <= 128 else 8, 2)
    new = form.capability >= 90
    if form.features > 128:
        return Tile(128 if new and not form.dense else 64, 32, 8, 2)
    if new:
        return Tile(128, 64 if form.dense or form.near else 128, 8, 2)
    if form.features > 64:
        return Tile(64, 32, 4, 2) if form.dense else Tile(128, 64, 8, 3)
    return Tile(128, 64, 8, 2)


def query_grad(form: Form) -> Tile:
    if form.kind == "fp32":
        return Tile(32, 32, 4 if form.features <= 64 else 8, 2)
    if form.dense > 1:
        return Tile(32, 32, 4 if form.features <= 128 else 8, 2)
    if form.features > 128:
        return Tile(64, 32, 8, 2)
    if form.kind == "tf32":
        return Tile(64, 32, 4, 2)
    if form.capability >= 90:
        return Tile(128, 64, 8, 2)
    return Tile(128, 64, 8, 2) if form.features <= 64 and not form.dense else Tile(64, 32, 4, 2)


def key_grad(form: Form) -> Tile:
    if form.kind == "fp32":
        return Tile(32 if form.features <= 64 else 16, 32, 8, 2)
    if form.features > 128:
        return Tile(32, 32, 8, 1 if form.dense > 1 else 2)
    if form.dense > 1 or form.kind == "tf32":
        return Tile(32, 32, 8, 2)
    new = form.capability >= 90
    if form.features <= 64:
        if form.near and not form.dense:
            return Tile(64, 64, 8, 2)
        return Tile(32 if form.dense else 64, 128, 8, 1 if form.dense and not new else 2)
    return Tile(16 if form.dense else 32, 64, 8, 2) if new else Tile(64, 64, 8, 2)


def jvp(form: Form) -> Tile:
    if form.kind == "fp32":
        return Tile(32, 16, 4, 2)
    if form.dense > 1:
        return Tile(32, 16, 8 if form.features > 128 else 4, 2)
    if form.features > 128:
        return Tile(32, 32, 8, 2)
    if form.kind == "tf32":
        return Tile(64, 32, 4, 2)
    new = form.capability >= 90
    if form.features <= 64:
        return Tile(64, 32, 4, 2) if form.dense and not new else Tile(128, 64, 8, 2)
    return Tile(128, 64 if new and not form.dense else 32, 8, 2)


def decode(form: Form) -> Tile:
    return Tile(1, 64, 4, 3)
