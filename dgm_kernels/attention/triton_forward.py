"""Triton kernel of attention: a tile of queries against the keys that it sees, with an online softmax."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import (
    LN2,
    add_weighted,
    cut,
    hull,
    load_bounds,
    load_rows,
    masked_scores,
    near,
    of_head,
    products,
    scaled,
    sees,
    slope_of,
    store_rows,
    token,
    zero_rows,
)

# Numbers that change from call to call: a kernel must not be compiled for their value.
_FREE = (
    "queries", "keys", "heads", "group", "first", "width", "radius", "scale",
    "out_b", "out_h", "out_i", "q_b", "q_h", "q_i", "k_b", "k_h", "k_j", "v_b", "v_h", "v_j",
    "keep_b", "keep_h", "keep_i", "keep_j", "bias_b", "bias_h", "bias_i", "bias_j",
)  # fmt: skip


@triton.jit
def _softmax_step(
    scores, largest, scale, i, j, distance, seen, queries, keys, keep_ptr, keep_i, keep_j,
    bias_ptr, bias_i, bias_j, slope,
    MASKED: tl.constexpr, KEEP: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Weights of a tile relative to the largest score so far, that score, and the factor that brings old sums to it."""
    if not MASKED and keep_ptr is None and bias_ptr is None and slope is None:
        # All scores are finite and nothing is added to them, so that scaling and subtracting are one instruction.
        new = tl.maximum(largest, tl.max(scores, 1) * scale)
        base = new
        weights = tl.exp2(scores * scale - base[:, None])
    else:
        scores = masked_scores(
            scores * scale, i, j, distance, seen, queries, keys, keep_ptr, keep_i, keep_j,
            bias_ptr, bias_i, bias_j, slope,
            MASKED, KEEP, BIAS,
        )  # fmt: skip
        new = tl.maximum(largest, tl.max(scores, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(scores - base[:, None])
    return weights, new, tl.exp2(largest - base)


@triton.jit
def _over_keys(
    sums, largest, total, q, i, begin, end, low, high, cuts, steps, k_ptr, v_ptr, k_j, v_j,
    keep_ptr, keep_i, keep_j, bias_ptr, bias_i, bias_j, slope, queries, keys, first, width, radius, scale,
    D: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr, MASKED: tl.constexpr,
    NEAR: tl.constexpr, KEEP: tl.constexpr, BIAS: tl.constexpr, TF32: tl.constexpr,
    VECTOR: tl.constexpr, STAGES: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """The softmax goes on over the tiles that need masks, or those that need none.

    ``sums`` are those of weighted values and ``total`` that of the weights, relative to the largest score.
    """
    for step in tl.range(0, steps, num_stages=STAGES):
        j = token(step, cuts, width, MASKED, NEAR, KEYS)
        exists = (j >= low) & (j < high)
        seen = sees(i[:, None], j[None, :], begin[:, None], end[:, None], first, width, radius, NEAR)
        k = load_rows(k_ptr, j, exists, k_j, D, WIDE, VECTOR, MASKED)
        v = load_rows(v_ptr, j, exists, v_j, DV, WIDE_V, VECTOR, MASKED)
        distance = (first + i)[:, None] - j[None, :]
        weights, largest, shrink = _softmax_step(
            products(q, k, TF32), largest, scale, i[:, None], j[None, :], distance, seen, queries, keys,
            keep_ptr, keep_i, keep_j, bias_ptr, bias_i, bias_j, slope, MASKED, KEEP, BIAS,
        )  # fmt: skip
        sums = add_weighted(scaled(sums, shrink[:, None]), weights, v, TF32)
        total = total * shrink + tl.sum(weights, 1)
    return sums, largest, total


@triton.jit(do_not_specialize=_FREE)
def forward_kernel(
    out_ptr, lse_ptr, q_ptr, k_ptr, v_ptr, bounds_ptr, keep_ptr, bias_ptr, slopes_ptr,
    queries: tl.int32, keys: tl.int32, heads: tl.int32, group: tl.int32, first: tl.int32, width: tl.int32,
    radius: tl.int32, scale: tl.float32,
    out_b: tl.int64, out_h: tl.int64, out_i: tl.int64, q_b: tl.int64, q_h: tl.int64, q_i: tl.int64,
    k_b: tl.int64, k_h: tl.int64, k_j: tl.int64, v_b: tl.int64, v_h: tl.int64, v_j: tl.int64,
    keep_b: tl.int64, keep_h: tl.int64, keep_i: tl.int64, keep_j: tl.int64,
    bias_b: tl.int64, bias_h: tl.int64, bias_i: tl.int64, bias_j: tl.int64,
    D: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr, NEAR: tl.constexpr,
    NEGATIVE: tl.constexpr, KEEP: tl.constexpr, BIAS: tl.constexpr, TF32: tl.constexpr,
    VECTOR: tl.constexpr, STAGES: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """QUERIES queries of a head. ``scale`` is that of scores in powers of 2; NEGATIVE: with the sign turned."""
    tiles = tl.cdiv(queries, QUERIES)
    at = tl.program_id(0) // tiles
    tile = tiles - 1 - (tl.program_id(0) - at * tiles)  # the last queries first: with causal masks they take longest
    i = tile * QUERIES + tl.arange(0, QUERIES)
    batch, head = at // heads, at % heads
    q = load_rows(of_head(q_ptr, batch, head, q_b, q_h, VECTOR), i, i < queries, q_i, D, WIDE, VECTOR, True)
    if NEGATIVE:
        q = scaled(q, -1)
    k_ptr = of_head(k_ptr, batch, head // group, k_b, k_h, VECTOR)
    v_ptr = of_head(v_ptr, batch, head // group, v_b, v_h, VECTOR)
    if keep_ptr is not None:
        keep_ptr = of_head(keep_ptr, batch, head, keep_b, keep_h, KEEP)
    if bias_ptr is not None:
        bias_ptr = of_head(bias_ptr, batch, head, bias_b, bias_h, BIAS)
    slope = slopes_ptr
    if slopes_ptr is not None:
        slope = slope_of(slopes_ptr, head)
    begin, end = load_bounds(bounds_ptr, i, queries, keys)
    low, full_low, full_high, high = hull(begin, end, keys)
    sums = zero_rows(QUERIES, DV, WIDE_V)
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    if NEAR:
        cuts = near(first + tile * QUERIES, first + (tile + 1) * QUERIES, low, high, width, radius)
        steps = tl.cdiv(cuts[2], KEYS)
    else:
        cuts = cut(low, full_low, full_high, high, KEYS)
        steps = cuts[1] + cuts[4]
        sums, largest, total = _over_keys(
            sums, largest, total, q, i, begin, end, low, high, cuts, cuts[3], k_ptr, v_ptr, k_j, v_j,
            keep_ptr, keep_i, keep_j, bias_ptr, bias_i, bias_j, slope, queries, keys, first, width, radius, scale,
            D, DV, WIDE, WIDE_V, False, NEAR, KEEP, BIAS, TF32, VECTOR, STAGES, KEYS,
        )  # fmt: skip
    sums, largest, total = _over_keys(
        sums, largest, total, q, i, begin, end, low, high, cuts, steps, k_ptr, v_ptr, k_j, v_j,
        keep_ptr, keep_i, keep_j, bias_ptr, bias_i, bias_j, slope, queries, keys, first, width, radius, scale,
        D, DV, WIDE, WIDE_V, True, NEAR, KEEP, BIAS, TF32, VECTOR, STAGES, KEYS,
    )  # fmt: skip
    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    sums = scaled(sums, (1.0 / total)[:, None])
    store_rows(of_head(out_ptr, batch, head, out_b, out_h, VECTOR), i, i < queries, out_i, sums, DV, WIDE_V, VECTOR)
    lse = tl.where(blind, float("-inf"), (largest + tl.log2(total)) * LN2)
    tl.store(lse_ptr + at.to(tl.int64) * queries + i, lse, i < queries)
