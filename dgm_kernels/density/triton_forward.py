"""Triton kernels of the density op that make one number a point or a pair: lengths, log-probabilities, kernel sums."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import (
    FREE,
    distances,
    first_features,
    lengths_of,
    load_lse,
    load_q,
    lse_of,
    products,
    scores,
    softmax_step,
    squared_lengths,
)


@triton.jit(do_not_specialize=FREE)
def lengths_kernel(
    out_ptr, y_ptr, middle_ptr, inv_ptr, components: tl.int32, D: tl.constexpr, WIDE: tl.constexpr,
    COMPONENTS: tl.constexpr,
):  # fmt: skip
    """``|A (y - middle)|^2`` of COMPONENTS rows, A the diagonals ``inv`` or 1."""
    m = tl.program_id(0) * COMPONENTS + tl.arange(0, COMPONENTS)
    exists = m < components
    lengths = squared_lengths(y_ptr, tl.minimum(m, components - 1), middle_ptr, inv_ptr, D, WIDE)
    tl.store(out_ptr + m, lengths, exists)


@triton.jit(do_not_specialize=FREE)
def log_prob_kernel(
    lse_ptr, x_ptr, y_ptr, inv_ptr, q_ptr, offset_ptr, y_lengths_ptr, middle_ptr,
    points: tl.int32, components: tl.int32, each: tl.int32, inv_step: tl.int32, offset_step: tl.int32,
    DIAGONAL: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, IEEE: tl.constexpr, STAGES: tl.constexpr,
    POINTS: tl.constexpr, COMPONENTS: tl.constexpr,
):  # fmt: skip
    """``log sum_m exp(s_nm)`` of POINTS points over one split, ``each`` of the components, to ``[splits, points]``."""
    blocks = tl.cdiv(points, POINTS)
    split = tl.program_id(0) // blocks
    i = tl.program_id(0) % blocks * POINTS + tl.arange(0, POINTS)
    n = tl.minimum(i, points - 1)
    lengths = lengths_of(x_ptr, n, middle_ptr, DIAGONAL, D, WIDE)
    x, q = first_features(x_ptr, n, middle_ptr, D, WIDE), load_q(q_ptr, n)
    largest = tl.full((POINTS,), float("-inf"), tl.float32)
    total = tl.zeros((POINTS,), tl.float32)
    stop = tl.minimum((split + 1) * each, components)
    for step in tl.range(split * each, stop, COMPONENTS, num_stages=STAGES):
        j = step + tl.arange(0, COMPONENTS)
        m = tl.minimum(j, components - 1)
        s = scores(
            x, lengths, q, x_ptr, n, y_ptr, y_lengths_ptr, m, inv_ptr, offset_ptr, middle_ptr, inv_step, offset_step,
            DIAGONAL, D, WIDE, IEEE,
        )  # fmt: skip
        s = tl.where((j < stop)[None, :], s, float("-inf"))
        _, largest, total, _ = softmax_step(s, largest, total)
    tl.store(lse_ptr + split.to(tl.int64) * points + i, lse_of(largest, total), i < points)


@triton.jit(do_not_specialize=FREE)
def weights_kernel(
    weights_ptr, lse_ptr, factors_ptr, x_ptr, y_ptr, inv_ptr, q_ptr, offset_ptr, y_lengths_ptr, middle_ptr,
    points: tl.int32, components: tl.int32, inv_step: tl.int32, offset_step: tl.int32,
    DIAGONAL: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, IEEE: tl.constexpr,
    POINTS: tl.constexpr, COMPONENTS: tl.constexpr,
):  # fmt: skip
    """A tile of the responsibilities ``exp(s_nm - lse_n)``, times ``factors_n`` if these are given."""
    blocks = tl.cdiv(points, POINTS)
    i = tl.program_id(0) % blocks * POINTS + tl.arange(0, POINTS)
    j = tl.program_id(0) // blocks * COMPONENTS + tl.arange(0, COMPONENTS)
    n, m = tl.minimum(i, points - 1), tl.minimum(j, components - 1)
    lengths = lengths_of(x_ptr, n, middle_ptr, DIAGONAL, D, WIDE)
    x, q = first_features(x_ptr, n, middle_ptr, D, WIDE), load_q(q_ptr, n)
    s = scores(
        x, lengths, q, x_ptr, n, y_ptr, y_lengths_ptr, m, inv_ptr, offset_ptr, middle_ptr, inv_step, offset_step,
        DIAGONAL, D, WIDE, IEEE,
    )  # fmt: skip
    weights = tl.exp(s - load_lse(lse_ptr, n)[:, None])
    if factors_ptr is not None:
        weights *= tl.load(factors_ptr + n)[:, None]
    at = i.to(tl.int64)[:, None] * components + j[None, :]
    tl.store(weights_ptr + at, weights, (i < points)[:, None] & (j < components)[None, :])


# ---- Sums of a kernel over all pairs


@triton.jit
def rbf(squares, numbers_ptr, count, SLOPE: tl.constexpr):
    """The sum over the ``count`` numbers f of ``exp(-f squares)``; SLOPE: of 2 f times that."""
    total = tl.zeros_like(squares)
    for k in range(count):
        f = tl.load(numbers_ptr + k)
        value = tl.exp(-f * squares)
        if SLOPE:
            value *= 2.0 * f
        total += value
    return total


@triton.jit
def power(base, degree):
    """``base^degree`` by multiplication."""
    result = tl.full(base.shape, 1.0, tl.float32)
    for _ in range(degree):
        result *= base
    return result


@triton.jit(do_not_specialize=FREE)
def kernel_sum_kernel(
    out_ptr, x_ptr, y_ptr, y_lengths_ptr, middle_ptr, numbers_ptr,
    points: tl.int32, components: tl.int32, each: tl.int32, count: tl.int32, factor: tl.float32, constant: tl.float32,
    SAME: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, IEEE: tl.constexpr, STAGES: tl.constexpr,
    POINTS: tl.constexpr, COMPONENTS: tl.constexpr,
):  # fmt: skip
    """The sum of k(x_n, y_m) over POINTS points and one split of the y, in float64 between tiles; SAME: not n = m.

    rbf with ``numbers``, else ``(factor x.y + constant)^count``.
    """
    blocks = tl.cdiv(points, POINTS)
    split = tl.program_id(0) // blocks
    i = tl.program_id(0) % blocks * POINTS + tl.arange(0, POINTS)
    n = tl.minimum(i, points - 1)
    lengths = lengths_of(x_ptr, n, middle_ptr, numbers_ptr is None, D, WIDE)
    x = first_features(x_ptr, n, middle_ptr, D, WIDE)
    total = tl.zeros((POINTS,), tl.float64)
    stop = tl.minimum((split + 1) * each, components)
    for step in tl.range(split * each, stop, COMPONENTS, num_stages=STAGES):
        j = step + tl.arange(0, COMPONENTS)
        m = tl.minimum(j, components - 1)
        if numbers_ptr is None:
            k = power(factor * products(x, x_ptr, n, y_ptr, m, None, None, None, D, WIDE, IEEE) + constant, count)
        else:
            squares = distances(x, lengths, x_ptr, n, y_ptr, y_lengths_ptr, m, middle_ptr, D, WIDE, IEEE)
            k = rbf(squares, numbers_ptr, count, False)
        counts = (j < stop)[None, :]
        if SAME:
            counts = counts & (i[:, None] != j[None, :])
        total += tl.sum(tl.where(counts, k, 0.0), 1).to(tl.float64)
    tl.store(out_ptr + tl.program_id(0), tl.sum(tl.where(i < points, total, 0.0), 0))
