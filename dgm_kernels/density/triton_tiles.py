"""What the Triton kernels of the density op share: rows about a middle, tiles of scores, sums of weighted rows.

Rows behind the last are read as the last one, so that only features need masks; what is made of them is not used.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers that change from call to call: a kernel must not be compiled for their value.
FREE = ("points", "components", "each", "inv_step", "offset_step", "count", "factor", "constant")


@triton.jit
def features_of(ptr, row, start, middle_ptr, D: tl.constexpr, WIDE: tl.constexpr):
    """WIDE features from ``start`` on of rows, minus those of the middle; 0 behind the last."""
    feature = start + tl.arange(0, WIDE)
    at = ptr + row.to(tl.int64)[:, None] * D + feature[None, :]
    values = tl.load(at, (feature < D)[None, :], other=0.0)
    if middle_ptr is not None:
        values -= tl.load(middle_ptr + feature, feature < D, other=0.0)[None, :]
    return values


@triton.jit
def product(a, b, c, IEEE: tl.constexpr):
    """``a b + c`` in float32: ordinary instructions, or three products of tensor cores."""
    return tl.dot(a, b, c, input_precision="ieee" if IEEE else "tf32x3")


@triton.jit
def squared_lengths(ptr, row, middle_ptr, inv_ptr, D: tl.constexpr, WIDE: tl.constexpr):
    """``|A (row - middle)|^2``, A the diagonals ``inv`` or 1."""
    total = tl.zeros(row.shape, tl.float32)
    for start in tl.range(0, D, WIDE):
        values = features_of(ptr, row, start, middle_ptr, D, WIDE)
        if inv_ptr is not None:
            values *= features_of(inv_ptr, row, start, None, D, WIDE)
        total += tl.sum(values * values, 1)
    return total


@triton.jit
def first_features(x_ptr, n, middle_ptr, D: tl.constexpr, WIDE: tl.constexpr):
    """All features of the points, read once, if they fit into WIDE; else None: they are read with each tile."""
    return features_of(x_ptr, n, 0, middle_ptr, D, WIDE) if D <= WIDE else None


@triton.jit
def add_products(
    total, x, y_ptr, m, start, inv_ptr, middle_ptr,
    D: tl.constexpr, WIDE: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """``total`` plus ``x.y`` over WIDE features, or with diagonals A ``|A x|^2 - 2 (A x).(A y)``."""
    y = features_of(y_ptr, m, start, middle_ptr, D, WIDE)
    if inv_ptr is None:
        total = product(x, tl.trans(y), total, IEEE)
    else:
        p = features_of(inv_ptr, m, start, None, D, WIDE)
        p *= p
        total = product(x * x, tl.trans(p), total, IEEE)
        total = product(x, tl.trans(-2.0 * p * y), total, IEEE)
    return total


@triton.jit
def products(
    x, x_ptr, n, y_ptr, m, inv_ptr, x_middle_ptr, middle_ptr,
    D: tl.constexpr, WIDE: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """``add_products`` over all features; ``x`` are ``first_features``."""
    total = tl.zeros((n.shape[0], m.shape[0]), tl.float32)
    if D <= WIDE:
        total = add_products(total, x, y_ptr, m, 0, inv_ptr, middle_ptr, D, WIDE, IEEE)
    else:
        for start in tl.range(0, D, WIDE):
            part = features_of(x_ptr, n, start, x_middle_ptr, D, WIDE)
            total = add_products(total, part, y_ptr, m, start, inv_ptr, middle_ptr, D, WIDE, IEEE)
    return total


@triton.jit
def distances(x, lengths, x_ptr, n, y_ptr, y_lengths_ptr, m, middle_ptr,
              D: tl.constexpr, WIDE: tl.constexpr, IEEE: tl.constexpr):  # fmt: skip
    """``|x - y|^2``, never negative."""
    total = products(x, x_ptr, n, y_ptr, m, None, middle_ptr, middle_ptr, D, WIDE, IEEE)
    squares = lengths[:, None] - 2.0 * total + tl.load(y_lengths_ptr + m)[None, :]
    return tl.where(squares < 0.0, 0.0, squares)  # a maximum would lose NaN


@triton.jit
def scores(
    x, lengths, q, x_ptr, n, y_ptr, y_lengths_ptr, m, inv_ptr, offset_ptr, middle_ptr, inv_step, offset_step,
    DIAGONAL: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """``offset_m - q_n |A_m (x_n - y_m)|^2 / 2``; ``inv_ptr`` is None where A is 1."""
    if DIAGONAL:
        squares = products(x, x_ptr, n, y_ptr, m, inv_ptr, middle_ptr, middle_ptr, D, WIDE, IEEE)
        squares += tl.load(y_lengths_ptr + m)[None, :]
        squares = tl.where(squares < 0.0, 0.0, squares)
    else:
        squares = distances(x, lengths, x_ptr, n, y_ptr, y_lengths_ptr, m, middle_ptr, D, WIDE, IEEE)
        if inv_ptr is not None:
            inv = tl.load(inv_ptr + m * inv_step)
            squares *= (inv * inv)[None, :]
    if q is not None:
        squares *= q[:, None]
    return tl.load(offset_ptr + m * offset_step)[None, :] - 0.5 * squares


@triton.jit
def load_q(q_ptr, n):
    """The factors of the points; None where they are 1."""
    return None if q_ptr is None else tl.load(q_ptr + n)


@triton.jit
def lengths_of(x_ptr, n, middle_ptr, DIAGONAL: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr):
    """Those of the points, which diagonals do not need."""
    return None if DIAGONAL else squared_lengths(x_ptr, n, middle_ptr, None, D, WIDE)


@triton.jit
def softmax_step(s, largest, total):
    """Weights relative to the largest score so far, that score, their total, and what brings old sums to it."""
    new = tl.maximum(largest, tl.max(s, 1))
    base = tl.where(new == float("-inf"), 0.0, new)
    weights = tl.exp(s - base[:, None])
    shrink = tl.exp(largest - base)
    return weights, new, total * shrink + tl.sum(weights, 1), shrink


@triton.jit
def lse_of(largest, total):
    """The log of the sum of the exponentials of all scores."""
    return tl.where(largest == float("-inf"), 0.0, largest) + tl.log(total)


@triton.jit
def load_lse(lse_ptr, n):
    """The log-probability; infinity where it is minus infinity, so that all weights are 0."""
    lse = tl.load(lse_ptr + n)
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def add_weighted(
    sums, weights, y_ptr, m, first, middle_ptr, inv_ptr, CENTERS: tl.constexpr,
    D: tl.constexpr, WIDE: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """``sums`` plus WIDE features of weighted rows: of y; with diagonals of p y, p = inv^2, or not CENTERS: of p."""
    if inv_ptr is None:
        rows = features_of(y_ptr, m, first, middle_ptr, D, WIDE)
    else:
        rows = features_of(inv_ptr, m, first, None, D, WIDE)
        rows *= rows
        if CENTERS:
            rows *= features_of(y_ptr, m, first, middle_ptr, D, WIDE)
    return product(weights, rows, sums, IEEE)
