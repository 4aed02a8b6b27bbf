"""Triton kernel of rotary positions: queries and keys turned before attention, and their gradients turned back."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import multiple_of, of_head

# Numbers that change from call to call: a kernel must not be compiled for their value.
_FREE = ("length", "heads", "first", "to_b", "to_h", "to_i", "x_b", "x_h", "x_i")


@triton.jit(do_not_specialize=_FREE)
def rotate_kernel(
    to_ptr, x_ptr, table_ptr, length: tl.int32, heads: tl.int32, first: tl.int32,
    to_b: tl.int64, to_h: tl.int64, to_i: tl.int64, x_b: tl.int64, x_h: tl.int64, x_i: tl.int64,
    D: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, BACK: tl.constexpr, VECTOR: tl.constexpr,
    ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of a head, at positions from ``first`` on; BACK: turned the other way.

    A kernel of its own, because a tile of keys is read by many programs: each would turn it again, and the tile could
    not go to shared memory past the registers. Here it is read and written once, which is linear in the tokens.
    """
    tiles = tl.cdiv(length, ROWS)
    at = tl.program_id(0) // tiles
    row = (tl.program_id(0) - at * tiles) * ROWS + tl.arange(0, ROWS)[:, None]
    feature = tl.arange(0, WIDE)[None, :]
    if INTERLEAVED:
        pair, second, step = feature // 2, feature % 2 == 1, 1
    else:
        pair, second, step = feature % PAIRS, feature >= PAIRS, PAIRS
    partner = tl.where(second, feature - step, feature + step)
    exists = (row < length) & (feature < D)
    turned = exists & (feature < 2 * PAIRS)
    x_ptr = of_head(x_ptr, at // heads, at % heads, x_b, x_h, VECTOR) + row.to(tl.int64) * multiple_of(x_i, VECTOR)
    x = tl.load(x_ptr + feature, exists, other=0.0).to(tl.float32)
    other = tl.load(x_ptr + partner, turned, other=0.0).to(tl.float32)
    angle_ptr = table_ptr + ((first + row).to(tl.int64) * PAIRS + pair) * 2
    cos = tl.load(angle_ptr, turned, other=1.0)
    sin = tl.load(angle_ptr + 1, turned, other=0.0)
    y = x * cos + tl.where(second != BACK, other, -other) * sin
    to_ptr = of_head(to_ptr, at // heads, at % heads, to_b, to_h, VECTOR) + row.to(tl.int64) * multiple_of(to_i, VECTOR)
    tl.store(to_ptr + feature, y.to(to_ptr.dtype.element_ty), exists)
