"""Triton kernel of attention's directional derivative: forward-mode AD in one pass over the keys.

With P the probabilities and S' = scale (Q' K^T + Q K'^T): O' = (P (S' - m)) V + P V' with m = sum P S'. S' is taken
relative to that of one key from the start, since what all keys of a query have in common would otherwise be subtracted
at the end from sums of rounded products.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import (
    add_weighted,
    cut,
    dot,
    hull,
    load_bounds,
    load_lse,
    load_rows,
    near,
    of_head,
    sees,
    slope_of,
    store_rows,
    token,
    weights_of,
    zero_rows,
)

# Numbers that change from call to call: a kernel must not be compiled for their value.
_FREE = (
    "queries", "keys", "heads", "group", "first", "width", "radius", "scale", "factor",
    "to_b", "to_h", "to_i", "q_b", "q_h", "q_i", "tq_b", "tq_h", "tq_i", "out_b", "out_h", "out_i",
    "k_b", "k_h", "k_j", "tk_b", "tk_h", "tk_j", "v_b", "v_h", "v_j", "tv_b", "tv_h", "tv_j",
    "keep_b", "keep_h", "keep_i", "keep_j", "bias_b", "bias_h", "bias_i", "bias_j",
)  # fmt: skip


@triton.jit
def _moved_by(q, tq, k_ptr, tk_ptr, k_j, tk_j, j, keys, D: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr):
    """How the products of all queries with key ``j`` change; 0 if there is no such key."""
    row = j + tl.arange(0, 1)
    k = load_rows(k_ptr, row, row < keys, k_j, D, WIDE, VECTOR, True)
    tk = load_rows(tk_ptr, row, row < keys, tk_j, D, WIDE, VECTOR, True)
    total = tl.zeros((q[0].shape[0],), tl.float32)
    for x in tl.static_range(len(q)):
        changes = tq[x].to(tl.float32) * k[x].to(tl.float32) + q[x].to(tl.float32) * tk[x].to(tl.float32)
        total += tl.sum(changes, 1)
    return total


@triton.jit
def _scores(q, tq, k, tk, TF32: tl.constexpr):
    """The products of all rows and how they change; part by part, so that no more than a part is in registers."""
    scores = tl.zeros((q[0].shape[0], k[0].shape[0]), tl.float32)
    moved = tl.zeros((q[0].shape[0], k[0].shape[0]), tl.float32)
    for x in tl.static_range(len(q)):
        scores = dot(q[x], tl.trans(k[x]), scores, TF32)
        moved = dot(tq[x], tl.trans(k[x]), moved, TF32)
        moved = dot(q[x], tl.trans(tk[x]), moved, TF32)
    return scores, moved


@triton.jit
def _over_keys(
    sums, mean, q, tq, lse, base, i, begin, end, low, high, cuts, steps, k_ptr, tk_ptr, v_ptr, tv_ptr,
    k_j, tk_j, v_j, tv_j, keep_ptr, keep_i, keep_j, bias_ptr, bias_i, bias_j, slope,
    queries, keys, first, width, radius, scale, factor,
    D: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr, MASKED: tl.constexpr,
    NEAR: tl.constexpr, KEEP: tl.constexpr, BIAS: tl.constexpr, TF32: tl.constexpr,
    VECTOR: tl.constexpr, STAGES: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """``sums``, P (S' - base) V + P V', and ``mean``, P (S' - base), over tiles that need masks or that need none."""
    for step in tl.range(0, steps, num_stages=STAGES):
        j = token(step, cuts, width, MASKED, NEAR, KEYS)
        exists = (j >= low) & (j < high)
        seen = sees(i[:, None], j[None, :], begin[:, None], end[:, None], first, width, radius, NEAR)
        k = load_rows(k_ptr, j, exists, k_j, D, WIDE, VECTOR, MASKED)
        tk = load_rows(tk_ptr, j, exists, tk_j, D, WIDE, VECTOR, MASKED)
        distance = (first + i)[:, None] - j[None, :]
        scores, moved = _scores(q, tq, k, tk, TF32)
        weights = weights_of(
            scores, lse[:, None], scale, i[:, None], j[None, :], distance, seen, queries, keys,
            keep_ptr, keep_i, keep_j, bias_ptr, bias_i, bias_j, slope, MASKED, KEEP, BIAS,
        )  # fmt: skip
        moved = weights * (moved * factor - base[:, None])
        mean += tl.sum(moved, 1)
        sums = add_weighted(sums, moved, load_rows(v_ptr, j, exists, v_j, DV, WIDE_V, VECTOR, MASKED), TF32)
        sums = add_weighted(sums, weights, load_rows(tv_ptr, j, exists, tv_j, DV, WIDE_V, VECTOR, MASKED), TF32)
    return sums, mean


@triton.jit(do_not_specialize=_FREE)
def jvp_kernel(
    to_ptr, mean_ptr, q_ptr, tq_ptr, k_ptr, tk_ptr, v_ptr, tv_ptr, out_ptr, lse_ptr, bounds_ptr, keep_ptr, bias_ptr,
    slopes_ptr, queries: tl.int32, keys: tl.int32, heads: tl.int32, group: tl.int32, first: tl.int32, width: tl.int32,
    radius: tl.int32, scale: tl.float32, factor: tl.float32,
    to_b: tl.int64, to_h: tl.int64, to_i: tl.int64, q_b: tl.int64, q_h: tl.int64, q_i: tl.int64,
    tq_b: tl.int64, tq_h: tl.int64, tq_i: tl.int64, k_b: tl.int64, k_h: tl.int64, k_j: tl.int64,
    tk_b: tl.int64, tk_h: tl.int64, tk_j: tl.int64, v_b: tl.int64, v_h: tl.int64, v_j: tl.int64,
    tv_b: tl.int64, tv_h: tl.int64, tv_j: tl.int64, out_b: tl.int64, out_h: tl.int64, out_i: tl.int64,
    keep_b: tl.int64, keep_h: tl.int64, keep_i: tl.int64, keep_j: tl.int64,
    bias_b: tl.int64, bias_h: tl.int64, bias_i: tl.int64, bias_j: tl.int64,
    D: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr, NEAR: tl.constexpr,
    KEEP: tl.constexpr, BIAS: tl.constexpr, TF32: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The derivative of QUERIES results of a head. ``factor`` is the scale, ``scale`` that of scores in powers of 2."""
    tiles = tl.cdiv(queries, QUERIES)
    at = tl.program_id(0) // tiles
    tile = tiles - 1 - (tl.program_id(0) - at * tiles)  # the last queries first: with causal masks they take longest
    i = tile * QUERIES + tl.arange(0, QUERIES)
    exists = i < queries
    batch, head = at // heads, at % heads
    q = load_rows(of_head(q_ptr, batch, head, q_b, q_h, VECTOR), i, exists, q_i, D, WIDE, VECTOR, True)
    tq = load_rows(of_head(tq_ptr, batch, head, tq_b, tq_h, VECTOR), i, exists, tq_i, D, WIDE, VECTOR, True)
    lse = load_lse(lse_ptr + at.to(tl.int64) * queries, i, exists)
    k_ptr = of_head(k_ptr, batch, head // group, k_b, k_h, VECTOR)
    tk_ptr = of_head(tk_ptr, batch, head // group, tk_b, tk_h, VECTOR)
    v_ptr = of_head(v_ptr, batch, head // group, v_b, v_h, VECTOR)
    tv_ptr = of_head(tv_ptr, batch, head // group, tv_b, tv_h, VECTOR)
    if keep_ptr is not None:
        keep_ptr = of_head(keep_ptr, batch, head, keep_b, keep_h, KEEP)
    if bias_ptr is not None:
        bias_ptr = of_head(bias_ptr, batch, head, bias_b, bias_h, BIAS)
    slope = slopes_ptr
    if slopes_ptr is not None:
        slope = slope_of(slopes_ptr, head)
    begin, end = load_bounds(bounds_ptr, i, queries, keys)
    low, full_low, full_high, high = hull(begin, end, keys)
    base = _moved_by(q, tq, k_ptr, tk_ptr, k_j, tk_j, low, keys, D, WIDE, VECTOR) * factor
    sums = zero_rows(QUERIES, DV, WIDE_V)
    mean = tl.zeros((QUERIES,), tl.float32)
    if NEAR:
        cuts = near(first + tile * QUERIES, first + (tile + 1) * QUERIES, low, high, width, radius)
        steps = tl.cdiv(cuts[2], KEYS)
    else:
        cuts = cut(low, full_low, full_high, high, KEYS)
        steps = cuts[1] + cuts[4]
        sums, mean = _over_keys(
            sums, mean, q, tq, lse, base, i, begin, end, low, high, cuts, cuts[3], k_ptr, tk_ptr, v_ptr, tv_ptr,
            k_j, tk_j, v_j, tv_j, keep_ptr, keep_i, keep_j, bias_ptr, bias_i, bias_j, slope,
            queries, keys, first, width, radius, scale, factor,
            D, DV, WIDE, WIDE_V, False, NEAR, KEEP, BIAS, TF32, VECTOR, STAGES, KEYS,
        )  # fmt: skip
    sums, mean = _over_keys(
        sums, mean, q, tq, lse, base, i, begin, end, low, high, cuts, steps, k_ptr, tk_ptr, v_ptr, tv_ptr,
        k_j, tk_j, v_j, tv_j, keep_ptr, keep_i, keep_j, bias_ptr, bias_i, bias_j, slope,
        queries, keys, first, width, radius, scale, factor,
        D, DV, WIDE, WIDE_V, True, NEAR, KEEP, BIAS, TF32, VECTOR, STAGES, KEYS,
    )  # fmt: skip
    out = load_rows(of_head(out_ptr, batch, head, out_b, out_h, VECTOR), i, exists, out_i, DV, WIDE_V, VECTOR, True)
    moved = ()
    for x in tl.static_range(len(sums)):
        moved += (sums[x] - mean[:, None] * out[x].to(tl.float32),)
    store_rows(of_head(to_ptr, batch, head, to_b, to_h, VECTOR), i, exists, to_i, moved, DV, WIDE_V, VECTOR)
    mean = tl.where(lse == float("inf"), 0.0, mean + base)
    tl.store(mean_ptr + at.to(tl.int64) * queries + i, mean, exists)
