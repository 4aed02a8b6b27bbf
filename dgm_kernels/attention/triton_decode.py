"""Triton kernels of decoding: one query of each head against the cache, split along keys, and the sum of the splits."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import LOG2E, multiple_of, of_head

# Numbers that change from call to call: a kernel must not be compiled for their value.
_FREE = (
    "heads", "group", "begin", "end", "width", "radius", "position", "start", "run", "count", "splits", "each", "scale",
    "k_b", "k_h", "k_j", "v_b", "v_h", "v_j", "rows",
)  # fmt: skip


@triton.jit
def _scores(q, k, ONE: tl.constexpr, TF32: tl.constexpr):
    """Products ``[heads, keys]``; of one head alone in ordinary instructions, which the cache's bandwidth hides."""
    if ONE:
        scores = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)[None, :]
    else:
        scores = tl.dot(q, tl.trans(k), input_precision="tf32" if TF32 else "ieee")
    return scores


@triton.jit
def _weighted(weights, v, ONE: tl.constexpr, TF32: tl.constexpr):
    """Sums ``[heads, features]`` of values."""
    if ONE:
        sums = tl.sum(tl.trans(weights) * v.to(tl.float32), 0)[None, :]
    else:
        sums = tl.dot(weights.to(v.dtype), v, input_precision="tf32" if TF32 else "ieee")
    return sums


@triton.jit(do_not_specialize=_FREE)
def decode_kernel(
    out_ptr, sums_ptr, largest_ptr, total_ptr, q_ptr, k_ptr, v_ptr, slopes_ptr,
    heads: tl.int32, group: tl.int32, begin: tl.int32, end: tl.int32, width: tl.int32, radius: tl.int32,
    position: tl.int32, start: tl.int32, run: tl.int32, count: tl.int32, splits: tl.int32, each: tl.int32,
    scale: tl.float32,
    k_b: tl.int64, k_h: tl.int64, k_j: tl.int64, v_b: tl.int64, v_h: tl.int64, v_j: tl.int64,
    D: tl.constexpr, DV: tl.constexpr, NEAR: tl.constexpr, ONE: tl.constexpr, TF32: tl.constexpr,
    VECTOR: tl.constexpr, STAGES: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, WIDE: tl.constexpr,
    WIDE_V: tl.constexpr,
):  # fmt: skip
    """One split, ``each`` of ``count`` keys, for the heads that read a key head; of a lone split the result.

    The keys are those from ``start`` on, if NEAR in runs of ``run`` that begin ``width`` keys after each other.

    Otherwise sums relative to the split's largest score, that score in powers of 2, and the total of the weights.
    """
    split = tl.program_id(0) % splits
    at = tl.program_id(0) // splits
    key_heads = heads // group
    member = tl.arange(0, HEADS)
    feature, value = tl.arange(0, WIDE)[None, :], tl.arange(0, WIDE_V)[None, :]
    row = (at * group).to(tl.int64) + member  # of [batch * heads]
    q = tl.load(q_ptr + row[:, None] * D + feature, (member < group)[:, None] & (feature < D), other=0.0)
    k_ptr = of_head(k_ptr, at // key_heads, at % key_heads, k_b, k_h, VECTOR)
    v_ptr = of_head(v_ptr, at // key_heads, at % key_heads, v_b, v_h, VECTOR)
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + at % key_heads * group + member, member < group, other=0.0) * LOG2E
    largest = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    sums = tl.zeros((HEADS, WIDE_V), tl.float32)
    stop = tl.minimum((split + 1) * each, count)
    for step in tl.range(split * each, stop, KEYS, num_stages=STAGES):
        n = step + tl.arange(0, KEYS)
        if NEAR:
            j = start + n // run * width + n % run
            seen = (n < stop) & (j >= begin) & (j < end) & (tl.abs(position % width - j % width) <= radius)
        else:
            j = start + n
            seen = n < stop
        at_key = j.to(tl.int64)[:, None]
        k = tl.load(k_ptr + at_key * multiple_of(k_j, VECTOR) + feature, seen[:, None] & (feature < D), other=0.0)
        v = tl.load(v_ptr + at_key * multiple_of(v_j, VECTOR) + value, seen[:, None] & (value < DV), other=0.0)
        scores = _scores(q, k, ONE, TF32) * scale
        if slopes_ptr is not None:
            scores -= slope[:, None] * tl.abs(position - j).to(tl.float32)[None, :]
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(largest - base)
        sums = sums * shrink[:, None] + _weighted(weights, v, ONE, TF32)
        total = total * shrink + tl.sum(weights, 1)
        largest = new
    exists = (member < group)[:, None] & (value < DV)
    if sums_ptr is None:
        sums = sums / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out_ptr + row[:, None] * DV + value, sums.to(out_ptr.dtype.element_ty), exists)
    else:
        place = row * splits + split
        tl.store(sums_ptr + place[:, None] * DV + value, sums, exists)
        tl.store(largest_ptr + place, largest, member < group)
        tl.store(total_ptr + place, total, member < group)


@triton.jit(do_not_specialize=_FREE)
def combine_kernel(
    out_ptr, sums_ptr, largest_ptr, total_ptr, splits: tl.int32,
    DV: tl.constexpr, SPLITS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """VALUES features of one head's result, from all splits."""
    blocks = tl.cdiv(DV, VALUES)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    value = tl.program_id(0) % blocks * VALUES + tl.arange(0, VALUES)
    split = tl.arange(0, SPLITS)
    exists = split < splits
    largest = tl.load(largest_ptr + row * splits + split, exists, other=float("-inf"))
    base = tl.max(largest, 0)
    weights = tl.exp2(largest - tl.where(base == float("-inf"), 0.0, base))
    total = tl.sum(weights * tl.load(total_ptr + row * splits + split, exists, other=0.0), 0)
    at = (row * splits + split)[:, None] * DV + value[None, :]
    sums = tl.load(sums_ptr + at, exists[:, None] & (value < DV)[None, :], other=0.0)
    result = tl.sum(weights[:, None] * sums, 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + row * DV + value, result.to(out_ptr.dtype.element_ty), value < DV)
