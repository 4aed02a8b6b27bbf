"""Triton kernels of the density op that make a row for a point or a component: means, gradients, moments.

Means and gradients by the points divide by the sum of their own weights and do not read the log-probability: where
components are narrow, its scores and those of another kernel differ by roundings that the exponential makes large.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_forward import power, rbf
from .triton_tiles import (
    FREE,
    add_weighted,
    distances,
    features_of,
    first_features,
    lengths_of,
    load_q,
    lse_of,
    products,
    scores,
    softmax_step,
)


@triton.jit
def _store(out_ptr, i, points, first, values, D: tl.constexpr, WIDE: tl.constexpr):
    """WIDE features of rows of a result."""
    feature = first + tl.arange(0, WIDE)
    at = i.to(tl.int64)[:, None] * D + feature[None, :]
    tl.store(out_ptr + at, values, (i < points)[:, None] & (feature < D)[None, :])


@triton.jit
def _place(points, components, each, D: tl.constexpr, WIDE_OUT: tl.constexpr, SIZE: tl.constexpr):
    """The rows of a program, the first of its features, its split, and where that ends.

    Rows come first, so that programs that run together read the same components.
    """
    blocks = tl.cdiv(points, SIZE)
    at = tl.program_id(0) // blocks
    slices = tl.cdiv(D, WIDE_OUT)
    i = tl.program_id(0) % blocks * SIZE + tl.arange(0, SIZE)
    split = at // slices
    return i, at % slices * WIDE_OUT, split, tl.minimum((split + 1) * each, components)


@triton.jit(do_not_specialize=FREE)
def mean_kernel(
    out_ptr, lse_ptr, x_ptr, y_ptr, q_ptr, offset_ptr, y_lengths_ptr, middle_ptr,
    points: tl.int32, components: tl.int32, each: tl.int32, offset_step: tl.int32,
    D: tl.constexpr, WIDE: tl.constexpr, IEEE: tl.constexpr, STAGES: tl.constexpr, WIDE_OUT: tl.constexpr,
    POINTS: tl.constexpr, COMPONENTS: tl.constexpr,
):  # fmt: skip
    """``sum_m r_nm y_m`` of POINTS points over one split, and its log-probability, to ``[splits, points]``."""
    i, first, split, stop = _place(points, components, each, D, WIDE_OUT, POINTS)
    n = tl.minimum(i, points - 1)
    lengths = lengths_of(x_ptr, n, middle_ptr, False, D, WIDE)
    x, q = first_features(x_ptr, n, middle_ptr, D, WIDE), load_q(q_ptr, n)
    largest = tl.full((POINTS,), float("-inf"), tl.float32)
    total = tl.zeros((POINTS,), tl.float32)
    sums = tl.zeros((POINTS, WIDE_OUT), tl.float32)
    for step in tl.range(split * each, stop, COMPONENTS, num_stages=STAGES):
        j = step + tl.arange(0, COMPONENTS)
        m = tl.minimum(j, components - 1)
        s = scores(
            x, lengths, q, x_ptr, n, y_ptr, y_lengths_ptr, m, None, offset_ptr, middle_ptr, 0, offset_step,
            False, D, WIDE, IEEE,
        )  # fmt: skip
        s = tl.where((j < stop)[None, :], s, float("-inf"))
        weights, largest, total, shrink = softmax_step(s, largest, total)
        sums *= shrink[:, None]
        sums = add_weighted(sums, weights, y_ptr, m, first, middle_ptr, None, True, D, WIDE_OUT, IEEE)
    row = split.to(tl.int64) * points
    tl.store(lse_ptr + row + i, lse_of(largest, total), i < points)
    feature = first + tl.arange(0, WIDE_OUT)
    middle = tl.load(middle_ptr + feature, feature < D, other=0.0)
    sums = sums / tl.where(total == 0.0, 1.0, total)[:, None] + middle[None, :]
    _store(out_ptr + row * D, i, points, first, sums, D, WIDE_OUT)


@triton.jit(do_not_specialize=FREE)
def weighted_rows_kernel(
    out_ptr, total_ptr, weights_ptr, y_ptr, middle_ptr, points: tl.int32, components: tl.int32, each: tl.int32,
    D: tl.constexpr, IEEE: tl.constexpr, STAGES: tl.constexpr, WIDE_OUT: tl.constexpr,
    POINTS: tl.constexpr, COMPONENTS: tl.constexpr,
):  # fmt: skip
    """``sum_m w_nm (y_m - middle)`` and ``sum_m w_nm`` of POINTS points over one split, from weights in memory."""
    i, first, split, stop = _place(points, components, each, D, WIDE_OUT, POINTS)
    row = tl.minimum(i, points - 1).to(tl.int64)[:, None] * components
    sums = tl.zeros((POINTS, WIDE_OUT), tl.float32)
    total = tl.zeros((POINTS,), tl.float32)
    for step in tl.range(split * each, stop, COMPONENTS, num_stages=STAGES):
        j = step + tl.arange(0, COMPONENTS)
        weights = tl.load(weights_ptr + row + j[None, :], (j < stop)[None, :], other=0.0)
        m = tl.minimum(j, components - 1)
        sums = add_weighted(sums, weights, y_ptr, m, first, middle_ptr, None, True, D, WIDE_OUT, IEEE)
        total += tl.sum(weights, 1)
    tl.store(total_ptr + split.to(tl.int64) * points + i, total, (i < points) & (first == 0))
    _store(out_ptr + split.to(tl.int64) * points * D, i, points, first, sums, D, WIDE_OUT)


@triton.jit(do_not_specialize=FREE)
def grad_x_kernel(
    out_ptr, lse_ptr, grad_ptr, x_ptr, y_ptr, inv_ptr, q_ptr, offset_ptr, y_lengths_ptr, middle_ptr,
    points: tl.int32, components: tl.int32, each: tl.int32, inv_step: tl.int32, offset_step: tl.int32,
    DIAGONAL: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, IEEE: tl.constexpr, STAGES: tl.constexpr,
    WIDE_OUT: tl.constexpr, POINTS: tl.constexpr, COMPONENTS: tl.constexpr,
):  # fmt: skip
    """``grad_n q_n sum_m r_nm p_m (y_m - x_n)``, p the squares of A, of POINTS points over one split."""
    i, first, split, stop = _place(points, components, each, D, WIDE_OUT, POINTS)
    n = tl.minimum(i, points - 1)
    lengths = lengths_of(x_ptr, n, middle_ptr, DIAGONAL, D, WIDE)
    x, q = first_features(x_ptr, n, middle_ptr, D, WIDE), load_q(q_ptr, n)
    outer = tl.load(grad_ptr + n)
    if q is not None:
        outer *= q
    largest = tl.full((POINTS,), float("-inf"), tl.float32)
    total = tl.zeros((POINTS,), tl.float32)
    sums = tl.zeros((POINTS, WIDE_OUT), tl.float32)
    totals = tl.zeros((POINTS, WIDE_OUT if DIAGONAL else 1), tl.float32)
    for step in tl.range(split * each, stop, COMPONENTS, num_stages=STAGES):
        j = step + tl.arange(0, COMPONENTS)
        m = tl.minimum(j, components - 1)
        s = scores(
            x, lengths, q, x_ptr, n, y_ptr, y_lengths_ptr, m, inv_ptr, offset_ptr, middle_ptr, inv_step, offset_step,
            DIAGONAL, D, WIDE, IEEE,
        )  # fmt: skip
        s = tl.where((j < stop)[None, :], s, float("-inf"))
        weights, largest, total, shrink = softmax_step(s, largest, total)
        sums *= shrink[:, None]
        totals *= shrink[:, None]
        if DIAGONAL:
            sums = add_weighted(sums, weights, y_ptr, m, first, middle_ptr, inv_ptr, True, D, WIDE_OUT, IEEE)
            totals = add_weighted(totals, weights, y_ptr, m, first, middle_ptr, inv_ptr, False, D, WIDE_OUT, IEEE)
        else:
            inv = tl.load(inv_ptr + m * inv_step)
            weights *= (inv * inv)[None, :]
            sums = add_weighted(sums, weights, y_ptr, m, first, middle_ptr, None, True, D, WIDE_OUT, IEEE)
            totals += tl.sum(weights, 1)[:, None]
    row = split.to(tl.int64) * points
    tl.store(lse_ptr + row + i, lse_of(largest, total), i < points)
    own = features_of(x_ptr, n, first, middle_ptr, D, WIDE_OUT)
    values = (outer / tl.where(total == 0.0, 1.0, total))[:, None] * (sums - own * totals)
    _store(out_ptr + row * D, i, points, first, values, D, WIDE_OUT)


@triton.jit(do_not_specialize=FREE)
def mean_grad_kernel(
    out_ptr, lse_ptr, grad_ptr, shift_ptr, x_ptr, y_ptr, q_ptr, offset_ptr, y_lengths_ptr, middle_ptr,
    points: tl.int32, components: tl.int32, each: tl.int32, offset_step: tl.int32,
    D: tl.constexpr, WIDE: tl.constexpr, IEEE: tl.constexpr, STAGES: tl.constexpr, WIDE_OUT: tl.constexpr,
    POINTS: tl.constexpr, COMPONENTS: tl.constexpr,
):  # fmt: skip
    """``q_n sum_m r_nm (g_n.(y_m - middle) + shift_n) (y_m - x_n)`` of POINTS points over one split."""
    i, first, split, stop = _place(points, components, each, D, WIDE_OUT, POINTS)
    n = tl.minimum(i, points - 1)
    lengths = lengths_of(x_ptr, n, middle_ptr, False, D, WIDE)
    x, q = first_features(x_ptr, n, middle_ptr, D, WIDE), tl.load(q_ptr + n)
    grad = first_features(grad_ptr, n, None, D, WIDE)
    shift = tl.load(shift_ptr + n)
    largest = tl.full((POINTS,), float("-inf"), tl.float32)
    total, slopes = tl.zeros((POINTS,), tl.float32), tl.zeros((POINTS,), tl.float32)
    sums = tl.zeros((POINTS, WIDE_OUT), tl.float32)
    for step in tl.range(split * each, stop, COMPONENTS, num_stages=STAGES):
        j = step + tl.arange(0, COMPONENTS)
        m = tl.minimum(j, components - 1)
        s = scores(
            x, lengths, q, x_ptr, n, y_ptr, y_lengths_ptr, m, None, offset_ptr, middle_ptr, 0, offset_step,
            False, D, WIDE, IEEE,
        )  # fmt: skip
        slope = products(grad, grad_ptr, n, y_ptr, m, None, None, middle_ptr, D, WIDE, IEEE)
        s = tl.where((j < stop)[None, :], s, float("-inf"))
        weights, largest, total, shrink = softmax_step(s, largest, total)
        weights *= slope + shift[:, None]
        sums *= shrink[:, None]
        sums = add_weighted(sums, weights, y_ptr, m, first, middle_ptr, None, True, D, WIDE_OUT, IEEE)
        slopes = slopes * shrink + tl.sum(weights, 1)
    row = split.to(tl.int64) * points
    tl.store(lse_ptr + row + i, lse_of(largest, total), i < points)
    own = features_of(x_ptr, n, first, middle_ptr, D, WIDE_OUT)
    values = (q / tl.where(total == 0.0, 1.0, total))[:, None] * (sums - own * slopes[:, None])
    _store(out_ptr + row * D, i, points, first, values, D, WIDE_OUT)


@triton.jit(do_not_specialize=FREE)
def kernel_grad_kernel(
    out_ptr, x_ptr, y_ptr, y_lengths_ptr, middle_ptr, numbers_ptr,
    points: tl.int32, components: tl.int32, each: tl.int32, count: tl.int32, factor: tl.float32, constant: tl.float32,
    SAME: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, IEEE: tl.constexpr, STAGES: tl.constexpr,
    WIDE_OUT: tl.constexpr, POINTS: tl.constexpr, COMPONENTS: tl.constexpr,
):  # fmt: skip
    """The derivative of what ``kernel_sum_kernel`` sums by x_n, of POINTS points over one split."""
    i, first, split, stop = _place(points, components, each, D, WIDE_OUT, POINTS)
    n = tl.minimum(i, points - 1)
    lengths = lengths_of(x_ptr, n, middle_ptr, numbers_ptr is None, D, WIDE)
    x = first_features(x_ptr, n, middle_ptr, D, WIDE)
    sums = tl.zeros((POINTS, WIDE_OUT), tl.float32)
    total = tl.zeros((POINTS,), tl.float32)
    for step in tl.range(split * each, stop, COMPONENTS, num_stages=STAGES):
        j = step + tl.arange(0, COMPONENTS)
        m = tl.minimum(j, components - 1)
        if numbers_ptr is None:
            base = factor * products(x, x_ptr, n, y_ptr, m, None, None, None, D, WIDE, IEEE) + constant
            weights = count.to(tl.float32) * factor * power(base, count - 1)
        else:
            squares = distances(x, lengths, x_ptr, n, y_ptr, y_lengths_ptr, m, middle_ptr, D, WIDE, IEEE)
            weights = rbf(squares, numbers_ptr, count, True)
        counts = (j < stop)[None, :]
        if SAME:
            counts = counts & (i[:, None] != j[None, :])
        weights = tl.where(counts, weights, 0.0)
        sums = add_weighted(sums, weights, y_ptr, m, first, middle_ptr, None, True, D, WIDE_OUT, IEEE)
        total += tl.sum(weights, 1)
    if numbers_ptr is not None:
        sums -= features_of(x_ptr, n, first, middle_ptr, D, WIDE_OUT) * total[:, None]
    _store(out_ptr + split.to(tl.int64) * points * D, i, points, first, sums, D, WIDE_OUT)


# ---- Sums over points for each component


@triton.jit
def _add_points(
    count, first, second, y, weights_ptr, x_ptr, q_ptr, m, feature, begin, end, components,
    D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The sums of w, w q t and w q t^2, t = x_n - y_m, go on over the points from ``begin`` to ``end``."""
    for n in tl.range(begin, end, loop_unroll_factor=UNROLL):
        row = tl.cast(n, tl.int64)
        w = tl.load(weights_ptr + row * components + m)
        t = tl.load(x_ptr + row * D + feature, feature < D, other=0.0)[None, :] - y
        count += w
        if q_ptr is not None:
            w *= tl.load(q_ptr + n)
        wt = w[:, None] * t
        first += wt
        second += wt * t
    return count, first, second


@triton.jit(do_not_specialize=FREE)
def moments_kernel(
    count_ptr, first_ptr, second_ptr, weights_ptr, x_ptr, y_ptr, q_ptr,
    points: tl.int32, components: tl.int32, each: tl.int32,
    D: tl.constexpr, UNROLL: tl.constexpr, CHAIN: tl.constexpr, FEATURES: tl.constexpr, COMPONENTS: tl.constexpr,
):  # fmt: skip
    """Sums over one part, ``each`` of the points, for COMPONENTS components and FEATURES features, to ``[parts, ...]``.

    By differences and not by products: with these the digits of a narrow component's spread would cancel. Sums of CHAIN
    points are added to those before, so that chains of additions stay short.
    """
    blocks, slices = tl.cdiv(components, COMPONENTS), tl.cdiv(D, FEATURES)
    at = tl.program_id(0) // blocks
    part = at // slices
    j = tl.program_id(0) % blocks * COMPONENTS + tl.arange(0, COMPONENTS)
    m = tl.minimum(j, components - 1)
    feature = at % slices * FEATURES + tl.arange(0, FEATURES)
    inside = (feature < D)[None, :]
    y = tl.load(y_ptr + m.to(tl.int64)[:, None] * D + feature[None, :], inside, other=0.0)
    count = tl.zeros((COMPONENTS,), tl.float32)
    first = tl.zeros((COMPONENTS, FEATURES), tl.float32)
    second = tl.zeros((COMPONENTS, FEATURES), tl.float32)
    stop = tl.minimum((part + 1) * each, points)
    for begin in range(part * each, stop, CHAIN):
        a, b, c = _add_points(
            tl.zeros_like(count), tl.zeros_like(first), tl.zeros_like(second), y, weights_ptr, x_ptr, q_ptr, m,
            feature, begin, tl.minimum(begin + CHAIN, stop), components, D, UNROLL,
        )  # fmt: skip
        count, first, second = count + a, first + b, second + c
    row = part.to(tl.int64) * components + j
    exists = j < components
    if at % slices == 0:
        tl.store(count_ptr + row, count, exists)
    place = row[:, None] * D + feature[None, :]
    tl.store(first_ptr + place, first, exists[:, None] & inside)
    tl.store(second_ptr + place, second, exists[:, None] & inside)
