"""Triton kernels of Gaussians with full covariance: a program has a few rows of one sample's triangular factor."""

from __future__ import annotations

import triton
import triton.language as tl

from .._core.triton_noise import draw

_FREE = (
    "features", "blocks", "mu_stride", "factor_stride", "grad_stride",
    "seed", "key_step", "key_step_stride", "first_sample", "stream",
)  # fmt: skip


@triton.jit
def _noise(noise_ptr, key, sample, features, first, exists, DRAWN: tl.constexpr, COLUMNS: tl.constexpr):
    """``[1, COLUMNS]`` of the sample, from ``first`` on."""
    if DRAWN:
        return draw(sample, features * 0 + first, 0, key, 0, COLUMNS, False)  # to the interpreter `first` is an int
    else:
        column = first + tl.arange(0, COLUMNS)[None, :]
        return tl.load(noise_ptr + sample * features + column, exists, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=_FREE)
def tril_kernel(
    out_ptr, partial_ptr, mu_ptr, factor_ptr, noise_ptr, seed_ptr, key_step_ptr, samples_ptr,
    mu_stride: tl.int64, factor_stride: tl.int64,
    seed: tl.int64, key_step: tl.int64, key_step_stride: tl.int64, first_sample: tl.int64, stream: tl.int64,
    batch: tl.int64, features: tl.int64, blocks: tl.int32,
    DRAWN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``z = mu + L eps`` of some rows of L, and their part of the KL."""
    program = tl.program_id(0)
    sample = (program // blocks).to(tl.int64)
    begin = (program % blocks).to(tl.int64) * ROWS
    row = begin + tl.arange(0, ROWS)[:, None]
    there = row < features
    key = (seed_ptr, key_step_ptr, samples_ptr, seed, key_step, key_step_stride, first_sample, stream)
    one = sample + tl.zeros([1, 1], tl.int64)
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, tl.minimum(begin + ROWS, features), COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        below = there & (column <= row)
        factor = tl.load(factor_ptr + sample * factor_stride + row * features + column, below, other=0.0)
        factor = factor.to(tl.float32)
        product += factor * _noise(noise_ptr, key, one, features, first, column < features, DRAWN, COLUMNS)
        squares += factor * factor
    mu = tl.load(mu_ptr + sample * mu_stride + row, there, other=0.0).to(tl.float32)
    diagonal = tl.load(factor_ptr + sample * factor_stride + row * (features + 1), there, other=1.0).to(tl.float32)
    tl.store(out_ptr + sample * features + row, mu + tl.sum(product, axis=1, keep_dims=True), there)
    kl = 0.5 * (tl.sum(squares, axis=1, keep_dims=True) + mu * mu - 1.0) - tl.log(diagonal)
    tl.store(partial_ptr + program, tl.sum(tl.where(there, kl, 0.0)))


@triton.jit(do_not_specialize=_FREE)
def tril_backward_kernel(
    to_mu_ptr, to_factor_ptr, grad_ptr, grad_kl_ptr, mu_ptr, factor_ptr, noise_ptr,
    seed_ptr, key_step_ptr, samples_ptr, grad_stride: tl.int64, mu_stride: tl.int64, factor_stride: tl.int64,
    seed: tl.int64, key_step: tl.int64, key_step_stride: tl.int64, first_sample: tl.int64, stream: tl.int64,
    batch: tl.int64, features: tl.int64, blocks: tl.int32,
    DRAWN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The formulas are those of ``op._tril_backward``; zeros above the diagonal."""
    program = tl.program_id(0)
    sample = (program // blocks).to(tl.int64)
    row = (program % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    there = row < features
    key = (seed_ptr, key_step_ptr, samples_ptr, seed, key_step, key_step_stride, first_sample, stream)
    one = sample + tl.zeros([1, 1], tl.int64)
    g = tl.zeros([ROWS, 1], tl.float32)
    if grad_ptr is not None:
        g = tl.load(grad_ptr + sample * grad_stride + row, there, other=0.0).to(tl.float32)
    k = 0.0
    if grad_kl_ptr is not None:
        k = tl.load(grad_kl_ptr + sample)
    mu = tl.load(mu_ptr + sample * mu_stride + row, there, other=0.0).to(tl.float32)
    tl.store(to_mu_ptr + sample * features + row, g + k * mu, there)
    for first in range(0, features, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        inside = there & (column < features)
        below = inside & (column <= row)
        factor = tl.load(factor_ptr + sample * factor_stride + row * features + column, below, other=1.0)
        factor = factor.to(tl.float32)
        to_factor = g * _noise(noise_ptr, key, one, features, first, column < features, DRAWN, COLUMNS) + k * factor
        if grad_kl_ptr is not None:
            to_factor -= tl.where(column == row, k / factor, 0.0)
        at = (sample * features + row) * features + column
        tl.store(to_factor_ptr + at, tl.where(below, to_factor, 0.0), inside)
