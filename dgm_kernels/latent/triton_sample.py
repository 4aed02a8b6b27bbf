"""Triton kernels of samples with their KL, of a KL alone, and of importance samples.

A program works on a part of one long sample or on several short ones, as a tile of rows and columns. Its sum over a
sample is that of the sample, or one of its parts, which are added up in a fixed order: there are no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._core.triton_noise import draw

# Numbers that change from call to call: a kernel must not be compiled for their value.
_FREE = (
    "batch", "elements", "blocks", "free_bits", "prior_mu", "prior_log_var", "inverse_sigma", "draws", "programs",
    "mu_stride", "log_var_stride", "prior_mu_stride", "prior_log_var_stride", "grad_stride",
    "seed", "key_step", "key_step_stride", "first_sample", "stream",
)  # fmt: skip


@triton.jit
def _tile(program, batch, elements, blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows ``[ROWS, 1]``, first column, columns ``[1, COLUMNS]``, which elements exist, and which rows do.

    Rows beyond the batch are the last one again, so that what belongs to a row can be loaded without a mask.
    """
    row_block = program // blocks
    first = (program - row_block * blocks).to(tl.int64) * COLUMNS
    row = row_block.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    place = tl.arange(0, COLUMNS)[None, :]
    exists = place < tl.minimum(elements - first, COLUMNS).to(tl.int32)
    in_batch = row < batch
    if ROWS > 1:
        exists &= in_batch
        row = tl.minimum(row, batch - 1)
    return row, first, first + place, exists, in_batch


@triton.jit
def _aligned(number, ALIGNED: tl.constexpr):
    """Changes nothing, but tells the compiler that rows begin at 16 bytes."""
    return number // 8 * 8 if ALIGNED else number


@triton.jit
def _load(ptr, at, exists):
    return tl.load(ptr + at, exists, other=0.0).to(tl.float32)


@triton.jit
def _load_or_zero(ptr, at, exists):
    if ptr is None:
        return tl.zeros(exists.shape, tl.float32)
    else:
        return tl.load(ptr + at, exists, other=0.0).to(tl.float32)


@triton.jit
def _exp_minus_one(x):
    """Keeps its digits where x is small: there a polynomial, whose error is below a unit in the last place."""
    p = x * 0.0014 + 0.008333333
    p = p * x + 0.041666668
    p = p * x + 0.16666667
    p = p * x + 0.5
    return tl.where(tl.abs(x) < 0.1, (p * x) * x + x, tl.exp(x) - 1.0)


@triton.jit
def _inverse_sigma(log_var):
    """Finite where its square, the precision, may not be."""
    return tl.exp(tl.minimum(-0.5 * log_var, 88.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _noise(
    noise_ptr, key, row, first, at, exists, step,
    DRAWN: tl.constexpr, COLUMNS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Drawn, or read from a tensor."""
    if DRAWN:
        return draw(row, first, step, key, 0, COLUMNS, PAIRS)
    else:
        return _load(noise_ptr, at, exists)


@triton.jit(do_not_specialize=_FREE)
def sample_kernel(
    out_ptr, partial_ptr, mu_ptr, log_var_ptr, noise_ptr, seed_ptr, key_step_ptr, samples_ptr,
    mu_stride: tl.int64, log_var_stride: tl.int64,
    free_bits: tl.float32, prior_mu: tl.float32, prior_log_var: tl.float32, inverse_sigma: tl.float32,
    seed: tl.int64, key_step: tl.int64, key_step_stride: tl.int64, first_sample: tl.int64, stream: tl.int64,
    batch: tl.int64, elements: tl.int64, blocks: tl.int32,
    DRAWN: tl.constexpr, LOG_NORMAL: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """z, and the tile's part of the KL."""
    PAIRS: tl.constexpr = COLUMNS > 4 and mu_ptr.dtype.element_ty.primitive_bitwidth == 16
    elements = _aligned(elements, ALIGNED)
    row, first, column, exists, in_batch = _tile(tl.program_id(0), batch, elements, blocks, ROWS, COLUMNS)
    at = row * elements + column
    mu = _load(mu_ptr, row * _aligned(mu_stride, ALIGNED) + column, exists)
    log_var = _load(log_var_ptr, row * _aligned(log_var_stride, ALIGNED) + column, exists)
    key = (seed_ptr, key_step_ptr, samples_ptr, seed, key_step, key_step_stride, first_sample, stream)
    u = mu + tl.exp(0.5 * log_var) * _noise(noise_ptr, key, row, first, at, exists, 0, DRAWN, COLUMNS, PAIRS)
    tl.store(out_ptr + at, tl.exp(u) if LOG_NORMAL else u, exists)
    d = (mu - prior_mu) * inverse_sigma
    a = log_var - prior_log_var
    kl = 0.5 * (_exp_minus_one(a) - a + d * d)
    kl = tl.where(kl < free_bits, free_bits, kl)
    total = tl.sum(tl.where(exists, kl, 0.0), axis=1, keep_dims=True)
    tl.store(partial_ptr + row * blocks + first // COLUMNS, total, in_batch)


@triton.jit(do_not_specialize=_FREE)
def sample_backward_kernel(
    to_mu_ptr, to_log_var_ptr, grad_ptr, grad_kl_ptr, mu_ptr, log_var_ptr, noise_ptr,
    seed_ptr, key_step_ptr, samples_ptr, grad_stride: tl.int64, mu_stride: tl.int64, log_var_stride: tl.int64,
    free_bits: tl.float32, prior_mu: tl.float32, prior_log_var: tl.float32, inverse_sigma: tl.float32,
    seed: tl.int64, key_step: tl.int64, key_step_stride: tl.int64, first_sample: tl.int64, stream: tl.int64,
    batch: tl.int64, elements: tl.int64, blocks: tl.int32,
    DRAWN: tl.constexpr, LOG_NORMAL: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The formulas are those of ``op._sample_backward``."""
    PAIRS: tl.constexpr = COLUMNS > 4 and mu_ptr.dtype.element_ty.primitive_bitwidth == 16
    elements = _aligned(elements, ALIGNED)
    row, first, column, exists, _ = _tile(tl.program_id(0), batch, elements, blocks, ROWS, COLUMNS)
    at = row * elements + column
    mu = _load(mu_ptr, row * _aligned(mu_stride, ALIGNED) + column, exists)
    log_var = _load(log_var_ptr, row * _aligned(log_var_stride, ALIGNED) + column, exists)
    d = (mu - prior_mu) * inverse_sigma
    to_mu = tl.zeros(exists.shape, tl.float32)
    to_log_var = tl.zeros(exists.shape, tl.float32)
    if grad_kl_ptr is not None:
        a = log_var - prior_log_var
        slope = _exp_minus_one(a)
        kl = 0.5 * (slope - a + d * d)
        k = tl.where(kl < free_bits, 0.0, tl.load(grad_kl_ptr + row))
        to_mu += k * (d * inverse_sigma)
        to_log_var += k * slope
    if grad_ptr is not None:
        key = (seed_ptr, key_step_ptr, samples_ptr, seed, key_step, key_step_stride, first_sample, stream)
        moved = tl.exp(0.5 * log_var)
        moved *= _noise(noise_ptr, key, row, first, at, exists, 0, DRAWN, COLUMNS, PAIRS)
        g = _load(grad_ptr, row * _aligned(grad_stride, ALIGNED) + column, exists)
        if LOG_NORMAL:
            g *= tl.exp(mu + moved)
        to_mu += g
        to_log_var += g * moved
    tl.store(to_mu_ptr + at, to_mu, exists)
    tl.store(to_log_var_ptr + at, 0.5 * to_log_var, exists)


@triton.jit(do_not_specialize=_FREE)
def kl_kernel(
    partial_ptr, mu_ptr, log_var_ptr, prior_mu_ptr, prior_log_var_ptr,
    mu_stride: tl.int64, log_var_stride: tl.int64, prior_mu_stride: tl.int64, prior_log_var_stride: tl.int64,
    free_bits: tl.float32, batch: tl.int64, elements: tl.int64, blocks: tl.int32,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The tile's part of the KL of two diagonal Gaussians."""
    elements = _aligned(elements, ALIGNED)
    row, first, column, exists, in_batch = _tile(tl.program_id(0), batch, elements, blocks, ROWS, COLUMNS)
    b = _load_or_zero(prior_log_var_ptr, row * _aligned(prior_log_var_stride, ALIGNED) + column, exists)
    a = _load(log_var_ptr, row * _aligned(log_var_stride, ALIGNED) + column, exists) - b
    d = _load(mu_ptr, row * _aligned(mu_stride, ALIGNED) + column, exists)
    d -= _load_or_zero(prior_mu_ptr, row * _aligned(prior_mu_stride, ALIGNED) + column, exists)
    d *= _inverse_sigma(b)
    kl = 0.5 * (_exp_minus_one(a) - a + d * d)
    kl = tl.where(kl < free_bits, free_bits, kl)
    total = tl.sum(tl.where(exists, kl, 0.0), axis=1, keep_dims=True)
    tl.store(partial_ptr + row * blocks + first // COLUMNS, total, in_batch)


@triton.jit(do_not_specialize=_FREE)
def kl_backward_kernel(
    to_mu_ptr, to_log_var_ptr, to_prior_mu_ptr, to_prior_log_var_ptr, grad_ptr,
    mu_ptr, log_var_ptr, prior_mu_ptr, prior_log_var_ptr,
    mu_stride: tl.int64, log_var_stride: tl.int64, prior_mu_stride: tl.int64, prior_log_var_stride: tl.int64,
    free_bits: tl.float32, batch: tl.int64, elements: tl.int64, blocks: tl.int32,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The formulas are those of ``op._kl_backward``."""
    elements = _aligned(elements, ALIGNED)
    row, _, column, exists, _ = _tile(tl.program_id(0), batch, elements, blocks, ROWS, COLUMNS)
    at = row * elements + column
    b = _load_or_zero(prior_log_var_ptr, row * _aligned(prior_log_var_stride, ALIGNED) + column, exists)
    a = _load(log_var_ptr, row * _aligned(log_var_stride, ALIGNED) + column, exists) - b
    d = _load(mu_ptr, row * _aligned(mu_stride, ALIGNED) + column, exists)
    d -= _load_or_zero(prior_mu_ptr, row * _aligned(prior_mu_stride, ALIGNED) + column, exists)
    inverse_sigma = _inverse_sigma(b)
    d *= inverse_sigma
    slope = _exp_minus_one(a)
    kl = 0.5 * (slope - a + d * d)
    k = tl.where(kl < free_bits, 0.0, tl.load(grad_ptr + row))
    tl.store(to_mu_ptr + at, k * (d * inverse_sigma), exists)
    tl.store(to_log_var_ptr + at, 0.5 * k * slope, exists)
    if to_prior_mu_ptr is not None:
        tl.store(to_prior_mu_ptr + at, -k * (d * inverse_sigma), exists)
    if to_prior_log_var_ptr is not None:
        tl.store(to_prior_log_var_ptr + at, -0.5 * k * (slope + d * d), exists)


# ---- Importance samples: ``programs`` programs a draw


@triton.jit(do_not_specialize=_FREE)
def importance_kernel(
    out_ptr, partial_ptr, mu_ptr, log_var_ptr, noise_ptr, seed_ptr, key_step_ptr, samples_ptr,
    mu_stride: tl.int64, log_var_stride: tl.int64, programs: tl.int32,
    seed: tl.int64, key_step: tl.int64, key_step_stride: tl.int64, first_sample: tl.int64, stream: tl.int64,
    batch: tl.int64, elements: tl.int64, blocks: tl.int32,
    DRAWN: tl.constexpr, LOG_NORMAL: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One draw of a tile, and its part of the log-ratio."""
    PAIRS: tl.constexpr = COLUMNS > 4 and mu_ptr.dtype.element_ty.primitive_bitwidth == 16
    elements = _aligned(elements, ALIGNED)
    program = tl.program_id(0)
    draw_index = (program // programs).to(tl.int64)
    row, first, column, exists, in_batch = _tile(program % programs, batch, elements, blocks, ROWS, COLUMNS)
    at = (draw_index * batch + row) * elements + column
    mu = _load(mu_ptr, row * _aligned(mu_stride, ALIGNED) + column, exists)
    log_var = _load(log_var_ptr, row * _aligned(log_var_stride, ALIGNED) + column, exists)
    key = (seed_ptr, key_step_ptr, samples_ptr, seed, key_step, key_step_stride, first_sample, stream)
    eps = _noise(noise_ptr, key, row, first, at, exists, draw_index, DRAWN, COLUMNS, PAIRS)
    u = mu + tl.exp(0.5 * log_var) * eps
    tl.store(out_ptr + at, tl.exp(u) if LOG_NORMAL else u, exists)
    ratio = 0.5 * (eps * eps + log_var - u * u)
    total = tl.sum(tl.where(exists, ratio, 0.0), axis=1, keep_dims=True)
    tl.store(partial_ptr + (draw_index * batch + row) * blocks + first // COLUMNS, total, in_batch)


@triton.jit(do_not_specialize=_FREE)
def importance_backward_kernel(
    to_mu_ptr, to_log_var_ptr, grad_ptr, grad_ratio_ptr, mu_ptr, log_var_ptr, noise_ptr,
    seed_ptr, key_step_ptr, samples_ptr, mu_stride: tl.int64, log_var_stride: tl.int64, draws: tl.int32,
    seed: tl.int64, key_step: tl.int64, key_step_stride: tl.int64, first_sample: tl.int64, stream: tl.int64,
    batch: tl.int64, elements: tl.int64, blocks: tl.int32,
    DRAWN: tl.constexpr, LOG_NORMAL: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """All draws of a tile, one after the other; the formulas are those of ``op._importance_backward``."""
    PAIRS: tl.constexpr = COLUMNS > 4 and mu_ptr.dtype.element_ty.primitive_bitwidth == 16
    elements = _aligned(elements, ALIGNED)
    row, first, column, exists, _ = _tile(tl.program_id(0), batch, elements, blocks, ROWS, COLUMNS)
    mu = _load(mu_ptr, row * _aligned(mu_stride, ALIGNED) + column, exists)
    log_var = _load(log_var_ptr, row * _aligned(log_var_stride, ALIGNED) + column, exists)
    sigma = tl.exp(0.5 * log_var)
    key = (seed_ptr, key_step_ptr, samples_ptr, seed, key_step, key_step_stride, first_sample, stream)
    to_mu = tl.zeros(exists.shape, tl.float32)
    to_log_var = tl.zeros(exists.shape, tl.float32)
    for draw_index in range(draws):
        sample = batch * draw_index + row
        at = sample * elements + column
        moved = sigma * _noise(noise_ptr, key, row, first, at, exists, draw_index, DRAWN, COLUMNS, PAIRS)
        u = mu + moved
        g = _load_or_zero(grad_ptr, at, exists)
        if LOG_NORMAL:
            g *= tl.exp(u)
        if grad_ratio_ptr is not None:
            to_ratio = tl.load(grad_ratio_ptr + sample)
            g -= to_ratio * u
            to_log_var += to_ratio
        to_mu += g
        to_log_var += g * moved
    at = row * elements + column
    tl.store(to_mu_ptr + at, to_mu, exists)
    tl.store(to_log_var_ptr + at, 0.5 * to_log_var, exists)
