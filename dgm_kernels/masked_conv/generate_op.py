"""Schemas of the C++ executor of programs, which draws the samples of an autoregressive network."""

from __future__ import annotations

import torch
from torch import Tensor

from .._core import noise, ops

_TRITON = "dgm_kernels.masked_conv.triton"

# All weights as the executor reads them, in one float32 tensor.
pack = ops.define(
    "masked_conv_pack",
    "(Tensor program, Tensor[] weights, Tensor[] degrees) -> Tensor",
    lambda program, weights, degrees: program.new_empty(
        (torch.library.get_ctx().new_dynamic_size(),), dtype=torch.float32
    ),
    _TRITON,
    backends=("cpp",),
)


def _fake_generate(program: Tensor, packed: Tensor, constants: list[Tensor], given: Tensor, *args: object) -> Tensor:
    return given.new_empty(given.shape)


# Levels [batch, channels, height, width]; where `known` they are those of `given`.
generate = ops.define(
    "masked_conv_generate",
    "(Tensor program, Tensor packed, Tensor[] constants, Tensor given, Tensor known, "
    f"{noise.SCHEMA}, float scale, float offset) -> Tensor",
    _fake_generate,
    _TRITON,
    backends=("cpp",),
)
