"""Triton kernels of attention's gradients: one of queries, one of keys and values, and two small ones before them.

Both recompute the probabilities from the log of the softmax's denominator. A program owns the rows that it writes, so
nothing is added up between programs and every run gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import (
    add_weighted,
    cut,
    hull,
    load_bounds,
    load_lse,
    load_rows,
    near,
    of_head,
    products,
    scaled,
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
    "to_q_b", "to_q_h", "to_q_i", "to_k_b", "to_k_h", "to_k_j", "to_v_b", "to_v_h", "to_v_j",
    "q_b", "q_h", "q_i", "k_b", "k_h", "k_j", "v_b", "v_h", "v_j", "grad_b", "grad_h", "grad_i",
    "out_b", "out_h", "out_i",
    "keep_b", "keep_h", "keep_i", "keep_j", "bias_b", "bias_h", "bias_i", "bias_j",
)  # fmt: skip


@triton.jit(do_not_specialize=_FREE)
def delta_kernel(
    delta_ptr, grad_ptr, out_ptr, grad_lse_ptr, queries: tl.int32, heads: tl.int32,
    grad_b: tl.int64, grad_h: tl.int64, grad_i: tl.int64, out_b: tl.int64, out_h: tl.int64, out_i: tl.int64,
    DV: tl.constexpr, WIDE_V: tl.constexpr, VECTOR: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """What the gradient of every score of a query loses: the product of result and gradient, less that of the lse."""
    tiles = tl.cdiv(queries, QUERIES)
    at = tl.program_id(0) // tiles
    batch, head = at // heads, at % heads
    i = (tl.program_id(0) - at * tiles) * QUERIES + tl.arange(0, QUERIES)
    exists = i < queries
    of_grad = of_head(grad_ptr, batch, head, grad_b, grad_h, VECTOR)
    grad = load_rows(of_grad, i, exists, grad_i, DV, WIDE_V, VECTOR, True)
    out = load_rows(of_head(out_ptr, batch, head, out_b, out_h, VECTOR), i, exists, out_i, DV, WIDE_V, VECTOR, True)
    delta = tl.zeros((QUERIES,), tl.float32)
    for x in tl.static_range(len(grad)):
        delta += tl.sum(grad[x].to(tl.float32) * out[x].to(tl.float32), 1)
    place = at.to(tl.int64) * queries + i
    if grad_lse_ptr is not None:
        delta -= tl.load(grad_lse_ptr + place, exists, other=0.0)
    tl.store(delta_ptr + place, delta, exists)


@triton.jit(do_not_specialize=_FREE)
def ranges_kernel(
    ranges_ptr, bounds_ptr, queries: tl.int32, keys: tl.int32, KEYS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """For a tile of keys four numbers, as ``hull`` returns: the first query that sees any of it and the end of them;
    between these the range of queries that see all of it, empty unless it is without a gap.
    """
    key = tl.program_id(0) * KEYS
    last = tl.minimum(key + KEYS, keys)
    lane = tl.arange(0, STEP)
    low, high = tl.zeros_like(lane) + queries, tl.zeros_like(lane)
    full_low, full_high, count = low, high, high
    for step in range(0, queries, STEP):
        i = step + lane
        exists = i < queries
        begin, end = load_bounds(bounds_ptr, i, queries, keys)
        some = exists & (begin < tl.minimum(end, last)) & (end > key)
        whole = exists & (begin <= key) & (end >= last)
        low, high = tl.minimum(low, tl.where(some, i, queries)), tl.maximum(high, tl.where(some, i + 1, 0))
        full_low = tl.minimum(full_low, tl.where(whole, i, queries))
        full_high = tl.maximum(full_high, tl.where(whole, i + 1, 0))
        count += whole.to(tl.int32)
    start, stop = tl.min(full_low, 0), tl.max(full_high, 0)
    to = ranges_ptr + tl.program_id(0) * 4
    tl.store(to, tl.min(low, 0))
    tl.store(to + 1, start)
    tl.store(to + 2, tl.where(stop - start == tl.sum(count, 0), stop, 0))
    tl.store(to + 3, tl.max(high, 0))


# ---- Gradient of the queries


@triton.jit
def _over_keys(
    sums, q, grad, lse, delta, i, begin, end, low, high, cuts, steps, k_ptr, v_ptr, k_j, v_j,
    keep_ptr, keep_i, keep_j, bias_ptr, bias_i, bias_j, slope, queries, keys, first, width, radius, scale,
    D: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr, MASKED: tl.constexpr,
    NEAR: tl.constexpr, KEEP: tl.constexpr, BIAS: tl.constexpr, TF32: tl.constexpr,
    VECTOR: tl.constexpr, STAGES: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """``sums`` of keys, weighted by the gradients of their scores, over the tiles that need masks or that need none."""
    for step in tl.range(0, steps, num_stages=STAGES):
        j = token(step, cuts, width, MASKED, NEAR, KEYS)
        exists = (j >= low) & (j < high)
        seen = sees(i[:, None], j[None, :], begin[:, None], end[:, None], first, width, radius, NEAR)
        k = load_rows(k_ptr, j, exists, k_j, D, WIDE, VECTOR, MASKED)
        v = load_rows(v_ptr, j, exists, v_j, DV, WIDE_V, VECTOR, MASKED)
        distance = (first + i)[:, None] - j[None, :]
        weights = weights_of(
            products(q, k, TF32), lse[:, None], scale, i[:, None], j[None, :], distance, seen, queries, keys,
            keep_ptr, keep_i, keep_j, bias_ptr, bias_i, bias_j, slope, MASKED, KEEP, BIAS,
        )  # fmt: skip
        sums = add_weighted(sums, weights * (products(grad, v, TF32) - delta[:, None]), k, TF32)
    return sums


@triton.jit(do_not_specialize=_FREE)
def query_grad_kernel(
    to_q_ptr, grad_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, bounds_ptr, keep_ptr, bias_ptr, slopes_ptr,
    queries: tl.int32, keys: tl.int32, heads: tl.int32, group: tl.int32, first: tl.int32, width: tl.int32,
    radius: tl.int32, scale: tl.float32, factor: tl.float32,
    to_q_b: tl.int64, to_q_h: tl.int64, to_q_i: tl.int64, grad_b: tl.int64, grad_h: tl.int64, grad_i: tl.int64,
    q_b: tl.int64, q_h: tl.int64, q_i: tl.int64, k_b: tl.int64, k_h: tl.int64, k_j: tl.int64,
    v_b: tl.int64, v_h: tl.int64, v_j: tl.int64,
    keep_b: tl.int64, keep_h: tl.int64, keep_i: tl.int64, keep_j: tl.int64,
    bias_b: tl.int64, bias_h: tl.int64, bias_i: tl.int64, bias_j: tl.int64,
    D: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr, NEAR: tl.constexpr,
    KEEP: tl.constexpr, BIAS: tl.constexpr, TF32: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Gradient of QUERIES queries of a head. ``factor`` is the scale, ``scale`` that of scores in powers of 2."""
    tiles = tl.cdiv(queries, QUERIES)
    at = tl.program_id(0) // tiles
    tile = tiles - 1 - (tl.program_id(0) - at * tiles)  # the last queries first: with causal masks they take longest
    i = tile * QUERIES + tl.arange(0, QUERIES)
    exists = i < queries
    batch, head = at // heads, at % heads
    q = load_rows(of_head(q_ptr, batch, head, q_b, q_h, VECTOR), i, exists, q_i, D, WIDE, VECTOR, True)
    of_grad = of_head(grad_ptr, batch, head, grad_b, grad_h, VECTOR)
    grad = load_rows(of_grad, i, exists, grad_i, DV, WIDE_V, VECTOR, True)
    lse = load_lse(lse_ptr + at.to(tl.int64) * queries, i, exists)
    delta = tl.load(delta_ptr + at.to(tl.int64) * queries + i, exists, other=0.0)
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
    sums = zero_rows(QUERIES, D, WIDE)
    if NEAR:
        cuts = near(first + tile * QUERIES, first + (tile + 1) * QUERIES, low, high, width, radius)
        steps = tl.cdiv(cuts[2], KEYS)
    else:
        cuts = cut(low, full_low, full_high, high, KEYS)
        steps = cuts[1] + cuts[4]
        sums = _over_keys(
            sums, q, grad, lse, delta, i, begin, end, low, high, cuts, cuts[3], k_ptr, v_ptr, k_j, v_j,
            keep_ptr, keep_i, keep_j, bias_ptr, bias_i, bias_j, slope, queries, keys, first, width, radius, scale,
            D, DV, WIDE, WIDE_V, False, NEAR, KEEP, BIAS, TF32, VECTOR, STAGES, KEYS,
        )  # fmt: skip
    sums = _over_keys(
        sums, q, grad, lse, delta, i, begin, end, low, high, cuts, steps, k_ptr, v_ptr, k_j, v_j,
        keep_ptr, keep_i, keep_j, bias_ptr, bias_i, bias_j, slope, queries, keys, first, width, radius, scale,
        D, DV, WIDE, WIDE_V, True, NEAR, KEEP, BIAS, TF32, VECTOR, STAGES, KEYS,
    )  # fmt: skip
    to_q_ptr = of_head(to_q_ptr, batch, head, to_q_b, to_q_h, VECTOR)
    store_rows(to_q_ptr, i, exists, to_q_i, scaled(sums, factor), D, WIDE, VECTOR)


# ---- Gradients of the keys and values


@triton.jit
def _over_queries(
    to_k, to_v, k, v, j, batch, head, low, high, cuts, steps, q_ptr, grad_ptr, lse_ptr, delta_ptr,
    bounds_ptr, keep_ptr, bias_ptr, slopes_ptr, q_b, q_h, q_i, grad_b, grad_h, grad_i,
    keep_b, keep_h, keep_i, keep_j, bias_b, bias_h, bias_i, bias_j,
    queries, keys, heads, group, first, width, radius, scale,
    D: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr, MASKED: tl.constexpr,
    NEAR: tl.constexpr, KEEP: tl.constexpr, BIAS: tl.constexpr, TF32: tl.constexpr,
    VECTOR: tl.constexpr, STAGES: tl.constexpr,
    QUERIES: tl.constexpr,
):  # fmt: skip
    """Adds the shares of the tiles of queries that need masks, or that need none, of the group from ``head`` on.

    Scores have keys along rows, so that the weights are the left operand of both sums as they are.
    """
    for step in tl.range(0, group * steps, num_stages=STAGES):
        member = step // tl.maximum(steps, 1)
        i = token(step - member * steps, cuts, width, MASKED, NEAR, QUERIES)
        if NEAR:  # tokens are positions, at least 0
            i = tl.where(i < 0, -1, i - first)
        exists = (i >= low) & (i < high)
        of = head + member
        q = load_rows(of_head(q_ptr, batch, of, q_b, q_h, VECTOR), i, exists, q_i, D, WIDE, VECTOR, MASKED)
        grad_at = of_head(grad_ptr, batch, of, grad_b, grad_h, VECTOR)
        grad = load_rows(grad_at, i, exists, grad_i, DV, WIDE_V, VECTOR, MASKED)
        row = (batch * heads + of).to(tl.int64) * queries
        lse = load_lse(lse_ptr + row, i, exists)
        delta = tl.load(delta_ptr + row + i, exists, other=0.0)
        begin, end = load_bounds(bounds_ptr, tl.maximum(i, 0), queries, keys)
        seen = sees(i[None, :], j[:, None], begin[None, :], end[None, :], first, width, radius, NEAR)
        keep_at = keep_ptr
        if keep_ptr is not None:
            keep_at = of_head(keep_ptr, batch, of, keep_b, keep_h, KEEP)
        bias_at = bias_ptr
        if bias_ptr is not None:
            bias_at = of_head(bias_ptr, batch, of, bias_b, bias_h, BIAS)
        slope = slopes_ptr
        if slopes_ptr is not None:
            slope = slope_of(slopes_ptr, of)
        weights = weights_of(
            products(k, q, TF32), lse[None, :], scale, i[None, :], j[:, None], (first + i)[None, :] - j[:, None],
            seen, queries, keys, keep_at, keep_i, keep_j, bias_at, bias_i, bias_j, slope,
            MASKED, KEEP, BIAS,
        )  # fmt: skip
        to_v = add_weighted(to_v, weights, grad, TF32)
        to_k = add_weighted(to_k, weights * (products(v, grad, TF32) - delta[None, :]), q, TF32)
    return to_k, to_v


@triton.jit(do_not_specialize=_FREE)
def key_grad_kernel(
    to_k_ptr, to_v_ptr, grad_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, bounds_ptr, ranges_ptr, keep_ptr, bias_ptr,
    slopes_ptr, queries: tl.int32, keys: tl.int32, heads: tl.int32, group: tl.int32, first: tl.int32, width: tl.int32,
    radius: tl.int32, scale: tl.float32, factor: tl.float32,
    to_k_b: tl.int64, to_k_h: tl.int64, to_k_j: tl.int64, to_v_b: tl.int64, to_v_h: tl.int64, to_v_j: tl.int64,
    grad_b: tl.int64, grad_h: tl.int64, grad_i: tl.int64, q_b: tl.int64, q_h: tl.int64, q_i: tl.int64,
    k_b: tl.int64, k_h: tl.int64, k_j: tl.int64, v_b: tl.int64, v_h: tl.int64, v_j: tl.int64,
    keep_b: tl.int64, keep_h: tl.int64, keep_i: tl.int64, keep_j: tl.int64,
    bias_b: tl.int64, bias_h: tl.int64, bias_i: tl.int64, bias_j: tl.int64,
    D: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr, NEAR: tl.constexpr,
    KEEP: tl.constexpr, BIAS: tl.constexpr, TF32: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Gradients of KEYS keys and values of a key head, from all ``group`` heads that read it."""
    tiles = tl.cdiv(keys, KEYS)
    at = tl.program_id(0) // tiles
    tile = tl.program_id(0) - at * tiles
    j = tile * KEYS + tl.arange(0, KEYS)
    exists = j < keys
    batch, key_head = at // (heads // group), at % (heads // group)
    k = load_rows(of_head(k_ptr, batch, key_head, k_b, k_h, VECTOR), j, exists, k_j, D, WIDE, VECTOR, True)
    v = load_rows(of_head(v_ptr, batch, key_head, v_b, v_h, VECTOR), j, exists, v_j, DV, WIDE_V, VECTOR, True)
    low, full_low, full_high, high = 0, 0, queries, queries
    if ranges_ptr is not None:
        ranges_ptr += tile * 4
        low, full_low = tl.load(ranges_ptr), tl.load(ranges_ptr + 1)
        full_high, high = tl.load(ranges_ptr + 2), tl.load(ranges_ptr + 3)
    to_k, to_v = zero_rows(KEYS, D, WIDE), zero_rows(KEYS, DV, WIDE_V)
    if NEAR:
        cuts = near(tile * KEYS, (tile + 1) * KEYS, first + low, first + high, width, radius)
        steps = tl.cdiv(cuts[2], QUERIES)
    else:
        cuts = cut(low, full_low, full_high, high, QUERIES)
        steps = cuts[1] + cuts[4]
        to_k, to_v = _over_queries(
            to_k, to_v, k, v, j, batch, key_head * group, low, high, cuts, cuts[3], q_ptr, grad_ptr, lse_ptr,
            delta_ptr, bounds_ptr, keep_ptr, bias_ptr, slopes_ptr, q_b, q_h, q_i, grad_b, grad_h, grad_i,
            keep_b, keep_h, keep_i, keep_j, bias_b, bias_h, bias_i, bias_j,
            queries, keys, heads, group, first, width, radius, scale,
            D, DV, WIDE, WIDE_V, False, NEAR, KEEP, BIAS, TF32, VECTOR, STAGES, QUERIES,
        )  # fmt: skip
    to_k, to_v = _over_queries(
        to_k, to_v, k, v, j, batch, key_head * group, low, high, cuts, steps, q_ptr, grad_ptr, lse_ptr,
        delta_ptr, bounds_ptr, keep_ptr, bias_ptr, slopes_ptr, q_b, q_h, q_i, grad_b, grad_h, grad_i,
        keep_b, keep_h, keep_i, keep_j, bias_b, bias_h, bias_i, bias_j,
        queries, keys, heads, group, first, width, radius, scale,
        D, DV, WIDE, WIDE_V, True, NEAR, KEEP, BIAS, TF32, VECTOR, STAGES, QUERIES,
    )  # fmt: skip
    to_k_ptr = of_head(to_k_ptr, batch, key_head, to_k_b, to_k_h, VECTOR)
    store_rows(to_k_ptr, j, exists, to_k_j, scaled(to_k, factor), D, WIDE, VECTOR)
    store_rows(of_head(to_v_ptr, batch, key_head, to_v_b, to_v_h, VECTOR), j, exists, to_v_j, to_v, DV, WIDE_V, VECTOR)
