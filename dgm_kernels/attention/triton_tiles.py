"""What the Triton kernels of attention share: rows in parts, which keys are seen of a tile, scores.

A tile of rows is a tuple of parts of WIDE features and a narrower last one, since sizes are powers of two: 72 features
are 64 and 16 and not 128. Float32 products that are ordinary instructions take fewer features a part, because a thread
holds whole rows of a part in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.constexpr_function
def count_parts(features, wide):
    """Parts of a row."""
    return max(1, -(-features // wide))


@triton.constexpr_function
def part_width(features, wide, part):
    """Features of a part, padded to a power of two of at least 16, the least that a product takes."""
    left = features - part * wide
    return wide if left >= wide else max(16, 1 << max(0, left - 1).bit_length())


@triton.jit
def multiple_of(number, DIVISOR: tl.constexpr):
    """Changes nothing, but tells the compiler that the number is a multiple."""
    return number // DIVISOR * DIVISOR if DIVISOR > 1 else number


@triton.jit
def of_head(ptr, batch, head, to_batch, to_head, VECTOR: tl.constexpr):
    """Where a head begins."""
    return ptr + batch.to(tl.int64) * multiple_of(to_batch, VECTOR) + head.to(tl.int64) * multiple_of(to_head, VECTOR)


@triton.jit
def load_rows(
    ptr, row, exists, stride, D: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr, MASKED: tl.constexpr
):
    """Rows as parts ``[rows, features]``, 0 in the padding and in rows that do not exist; not MASKED: all do."""
    at = ptr + row.to(tl.int64)[:, None] * multiple_of(stride, VECTOR)
    parts = ()
    for x in tl.static_range(count_parts(D, WIDE)):
        feature = x * WIDE + tl.arange(0, part_width(D, WIDE, x))[None, :]
        if x * WIDE + part_width(D, WIDE, x) > D:
            inside = exists[:, None] & (feature < D) if MASKED else feature < D
            parts += (tl.load(at + feature, inside, other=0.0),)
        elif MASKED:
            parts += (tl.load(at + feature, exists[:, None], other=0.0),)
        else:
            parts += (tl.load(at + feature),)
    return parts


@triton.jit
def store_rows(ptr, row, exists, stride, parts, D: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr):
    """The inverse of ``load_rows``."""
    at = ptr + row.to(tl.int64)[:, None] * multiple_of(stride, VECTOR)
    for x in tl.static_range(count_parts(D, WIDE)):
        feature = x * WIDE + tl.arange(0, part_width(D, WIDE, x))[None, :]
        inside = exists[:, None] & (feature < D) if x * WIDE + part_width(D, WIDE, x) > D else exists[:, None]
        tl.store(at + feature, parts[x].to(ptr.dtype.element_ty), inside)


@triton.jit
def zero_rows(ROWS: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr):
    """Sums to add products to."""
    parts = ()
    for x in tl.static_range(count_parts(D, WIDE)):
        parts += (tl.zeros((ROWS, part_width(D, WIDE, x)), tl.float32),)
    return parts


@triton.jit
def dot(a, b, c, TF32: tl.constexpr):
    """``a b + c``."""
    return tl.dot(a, b, c, input_precision="tf32" if TF32 else "ieee")


@triton.jit
def products(a, b, TF32: tl.constexpr):
    """The products ``[rows of a, rows of b]`` of all rows."""
    total = tl.zeros((a[0].shape[0], b[0].shape[0]), tl.float32)
    for x in tl.static_range(len(a)):
        total = dot(a[x], tl.trans(b[x]), total, TF32)
    return total


@triton.jit
def add_weighted(sums, weights, rows, TF32: tl.constexpr):
    """``sums`` plus the rows, weighted and added up."""
    parts = ()
    for x in tl.static_range(len(sums)):
        parts += (dot(weights.to(rows[x].dtype), rows[x], sums[x], TF32),)
    return parts


@triton.jit
def scaled(sums, factor):
    """The parts times a factor."""
    parts = ()
    for x in tl.static_range(len(sums)):
        parts += (sums[x] * factor,)
    return parts


# ---- Which keys a query sees


@triton.jit
def load_bounds(bounds_ptr, i, queries, keys):
    """The keys that each query sees, from ``begin`` to before ``end``; queries behind the last see what it does."""
    begin = tl.zeros_like(i)
    end = begin + keys
    if bounds_ptr is not None:
        at = bounds_ptr + 2 * tl.minimum(i, queries - 1).to(tl.int64)
        begin = tl.maximum(tl.load(at), 0)
        end = tl.minimum(tl.load(at + 1), keys)
    return begin, end


@triton.jit
def hull(begin, end, keys):
    """Of what a tile of queries sees: the first key, the range that all of them see whole, and the end."""
    blind = begin >= end
    low, high = tl.min(tl.where(blind, keys, begin), 0), tl.max(tl.where(blind, 0, end), 0)
    return low, tl.max(begin, 0), tl.min(end, 0), high


@triton.jit
def cut(low, full_low, full_high, high, SIZE: tl.constexpr):
    """Tiles of the tokens from ``low`` to ``high``, in the order in which ``token`` counts them.

    Returns where those that need masks begin, how many of them come before those that need none, where the latter
    begin, how many there are, and how many that need masks follow.
    """
    first = low // SIZE * SIZE
    full = tl.cdiv(full_low, SIZE) * SIZE
    middle = tl.maximum(full_high // SIZE * SIZE - full, 0) // SIZE
    full = tl.where(middle > 0, full, first)
    right = tl.cdiv(tl.maximum(high - full - middle * SIZE, 0), SIZE)
    return first, (full - first) // SIZE, full, middle, right


@triton.jit
def floor_div(a, b):
    """Rounded down, of a negative number too; what ``//`` makes of one differs between compiler and interpreter."""
    quotient = a // b
    return tl.where(a - quotient * b < 0, quotient - 1, quotient)


@triton.jit
def near(begin, end, low, high, width, radius):
    """Tokens of ``[low, high)`` whose column may be near that of one of ``[begin, end)``.

    A token that is near another in columns is within ``radius`` of it once it is moved by whole rows: so these are the
    tokens from ``begin - radius`` to ``end + radius``, moved by any number of rows. Where these runs would overlap, all
    tokens are taken. Returns the first token, the length of a run and the number of tokens.
    """
    run = end - begin + 2 * radius
    every = run >= width
    least = floor_div(low - end - radius, width) + 1
    most = floor_div(high - 1 - begin + radius, width)
    first = tl.where(every, low, begin - radius + least * width)
    total = tl.where(every, high - low, (most - least + 1) * run)
    return first, tl.where(every, tl.maximum(high - low, 1), run), tl.where(high > low, tl.maximum(total, 0), 0)


@triton.jit
def token(step, cuts, width, MASKED: tl.constexpr, NEAR: tl.constexpr, SIZE: tl.constexpr):
    """The tokens of the tile ``step`` of those that need masks, or of those that need none.

    ``cuts`` is what ``cut`` or, if NEAR, ``near`` returned; -1 stands behind the last of the latter.
    """
    n = step * SIZE + tl.arange(0, SIZE)
    if NEAR:
        row = n // cuts[1]
        n = tl.where(n < cuts[2], cuts[0] + row * width + (n - row * cuts[1]), -1)
    elif MASKED:
        n += tl.where(step < cuts[1], cuts[0], cuts[2] + (cuts[3] - cuts[1]) * SIZE)
    else:
        n += cuts[2]
    return n


@triton.jit
def sees(i, j, begin, end, first, width, radius, NEAR: tl.constexpr):
    """Whether the key is within the query's bounds, and near in columns."""
    seen = (j >= begin) & (j < end)
    if NEAR:
        seen &= tl.abs((first + i) % width - j % width) <= radius
    return seen


# ---- Scores, in powers of 2


@triton.jit
def load_dense(ptr, i, j, step_i, step_j, queries, keys, HOW: tl.constexpr):
    """Entries of a mask or of a bias for queries i and keys j, of shapes that broadcast.

    HOW: 0, all queries have the same, keys adjacent; above 0, keys are adjacent, and their number and the beginnings of
    rows multiples of HOW, so that as many are read at a time; -1, any distances, and numbers that are negative.
    """
    if HOW == 0:
        values = tl.load(ptr + j, (j >= 0) & (j < keys), other=0)
    elif HOW > 0:
        at = ptr + i.to(tl.int64) * multiple_of(step_i, HOW) + j
        values = tl.load(at, (i < queries) & (multiple_of(j, HOW) < keys), other=0)
    else:
        at = ptr + i.to(tl.int64) * step_i + j.to(tl.int64) * step_j
        values = tl.load(at, (i >= 0) & (i < queries) & (j >= 0) & (j < keys), other=0)
    return values


@triton.jit
def masked_scores(
    scores, i, j, distance, seen, queries, keys, keep_ptr, keep_i, keep_j, bias_ptr, bias_i, bias_j, slope,
    MASKED: tl.constexpr, KEEP: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """The scores with bias and ALiBi, minus infinity where a key is not seen, as ``seen`` says if MASKED."""
    if bias_ptr is not None:
        bias = load_dense(bias_ptr, i, j, bias_i, bias_j, queries, keys, BIAS)
        scores += bias.to(tl.float32) * LOG2E
    if slope is not None:
        scores -= tl.abs(distance).to(tl.float32) * slope
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    if keep_ptr is not None:
        keep = load_dense(keep_ptr, i, j, keep_i, keep_j, queries, keys, KEEP)
        scores = tl.where(keep != 0, scores, float("-inf"))
    return scores


@triton.jit
def weights_of(
    scores, lse, scale, i, j, distance, seen, queries, keys, keep_ptr, keep_i, keep_j, bias_ptr, bias_i, bias_j, slope,
    MASKED: tl.constexpr, KEEP: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """The probabilities, from products of rows and the log of the softmax's denominator as ``load_lse`` reads it."""
    scores *= scale
    if MASKED or keep_ptr is not None or bias_ptr is not None or slope is not None:
        scores = masked_scores(
            scores, i, j, distance, seen, queries, keys, keep_ptr, keep_i, keep_j, bias_ptr, bias_i, bias_j, slope,
            MASKED, KEEP, BIAS,
        )  # fmt: skip
    return tl.exp2(scores - lse)


@triton.jit
def load_lse(lse_ptr, i, exists):
    """The log of the softmax's denominator in powers of 2; of a query that sees nothing infinity: all weights are 0."""
    lse = tl.load(lse_ptr + i, exists, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit
def slope_of(slopes_ptr, head):
    """The slope of ALiBi; None without."""
    return tl.load(slopes_ptr + head) * LOG2E
