"""Triton kernels of the normalisations over rows.

A tile holds whole rows where they are short enough. A longer one is gone through in tiles: for the mean, for the
squares about it, and to be written; from the second time on it comes from the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers that change from call to call: a kernel must not be compiled for their value.
_FREE = ("gate_stride", "scale_stride", "shift_stride", "eps", "rows", "elements", "tokens", "part", "parts", "blocks")


@triton.jit
def _multiple_of_8(number, ALIGNED: tl.constexpr):
    """Changes nothing, but tells the compiler that rows begin at 16 bytes."""
    return number // 8 * 8 if ALIGNED else number


@triton.jit
def _load(ptr, at, exists):
    return tl.load(ptr + at, exists, other=0.0).to(tl.float32)


@triton.jit
def _load_h(x_ptr, residual_ptr, gate_ptr, h_ptr, at, at_gate, exists):
    """``residual + gate x``, rounded to the dtype that it is kept in."""
    h = _load(x_ptr, at, exists)
    if residual_ptr is not None:
        if gate_ptr is not None:
            h *= _load(gate_ptr, at_gate, exists)
        h += _load(residual_ptr, at, exists)
        h = h.to(h_ptr.dtype.element_ty).to(tl.float32)
    return h


@triton.jit
def _finish_row(
    y_ptr, h_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, h, mean, rstd, at, column, at_scale, at_shift, exists
):  # fmt: skip
    """Writes y, and h if it is kept."""
    if h_ptr is not None:
        tl.store(h_ptr + at, h, exists)
    y = (h - mean) * rstd
    if weight_ptr is not None:
        y *= _load(weight_ptr, column, exists)
    if bias_ptr is not None:
        y += _load(bias_ptr, column, exists)
    if scale_ptr is not None:
        y += y * _load(scale_ptr, at_scale, exists)
    if shift_ptr is not None:
        y += _load(shift_ptr, at_shift, exists)
    tl.store(y_ptr + at, y, exists)


@triton.jit(do_not_specialize=_FREE)
def rows_kernel(
    y_ptr, h_ptr, mean_ptr, rstd_ptr, x_ptr, residual_ptr, gate_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
    gate_stride: tl.int64, scale_stride: tl.int64, shift_stride: tl.int64, eps: tl.float32,
    rows: tl.int64, elements: tl.int64, tokens: tl.int64,
    RMS: tl.constexpr, ONE: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y, h, mean and 1 / deviation of ROWS rows; ONE: a tile holds whole rows."""
    elements = _multiple_of_8(elements, ALIGNED)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    in_rows = row < rows
    row = tl.minimum(row, rows - 1)
    sample = row // tokens
    place = tl.arange(0, COLUMNS)[None, :]
    row_at = row * elements
    gate_at, scale_at = sample * _multiple_of_8(gate_stride, ALIGNED), sample * _multiple_of_8(scale_stride, ALIGNED)
    shift_at = sample * _multiple_of_8(shift_stride, ALIGNED)
    if ONE:
        exists = in_rows & (place < elements)
        h = _load_h(x_ptr, residual_ptr, gate_ptr, h_ptr, row_at + place, gate_at + place, exists)
        mean = tl.sum(h, axis=1, keep_dims=True) / elements * (0.0 if RMS else 1.0)
        apart = tl.where(exists, h - mean, 0.0)
        squares = tl.sum(apart * apart, axis=1, keep_dims=True)
    else:
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, 0 if RMS else elements, COLUMNS):
            column = start + place
            exists = in_rows & (column < elements)
            total += _load_h(x_ptr, residual_ptr, gate_ptr, h_ptr, row_at + column, gate_at + column, exists)
        mean = tl.sum(total, axis=1, keep_dims=True) / elements
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, elements, COLUMNS):
            column = start + place
            exists = in_rows & (column < elements)
            h = _load_h(x_ptr, residual_ptr, gate_ptr, h_ptr, row_at + column, gate_at + column, exists)
            apart = tl.where(exists, h - mean, 0.0)
            total += apart * apart
        squares = tl.sum(total, axis=1, keep_dims=True)
    rstd = 1.0 / tl.sqrt(squares / elements + eps)
    if not RMS:
        tl.store(mean_ptr + row, mean, in_rows)
    tl.store(rstd_ptr + row, rstd, in_rows)
    if ONE:
        _finish_row(
            y_ptr, h_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, h, mean, rstd,
            row_at + place, place, scale_at + place, shift_at + place, exists,
        )  # fmt: skip
    else:
        for start in range(0, elements, COLUMNS):
            column = start + place
            exists = in_rows & (column < elements)
            h = _load_h(x_ptr, residual_ptr, gate_ptr, h_ptr, row_at + column, gate_at + column, exists)
            _finish_row(
                y_ptr, h_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, h, mean, rstd,
                row_at + column, column, scale_at + column, shift_at + column, exists,
            )  # fmt: skip


@triton.jit
def _factor(weight_ptr, scale_ptr, column, at_scale, exists, like):
    """``weight (1 + scale)``."""
    factor = tl.full(like.shape, 1.0, tl.float32)
    if weight_ptr is not None:
        factor *= _load(weight_ptr, column, exists)
    if scale_ptr is not None:
        factor += factor * _load(scale_ptr, at_scale, exists)
    return factor


@triton.jit(do_not_specialize=_FREE)
def row_means_kernel(
    means_ptr, grad_ptr, h_ptr, weight_ptr, scale_ptr, mean_ptr, rstd_ptr, scale_stride: tl.int64,
    rows: tl.int64, elements: tl.int64, tokens: tl.int64,
    RMS: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of a row too long for a tile the means of g and of g n, see ``op._rows_backward``."""
    elements = _multiple_of_8(elements, ALIGNED)
    row = tl.program_id(0).to(tl.int64)
    scale_at = row // tokens * _multiple_of_8(scale_stride, ALIGNED)
    mean = 0.0 if RMS else tl.load(mean_ptr + row)
    first, second = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, elements, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        exists = column < elements
        g = _load(grad_ptr, row * elements + column, exists)
        g *= _factor(weight_ptr, scale_ptr, column, scale_at + column, exists, g)
        first += g
        second += g * (_load(h_ptr, row * elements + column, exists) - mean)
    tl.store(means_ptr + 2 * row, tl.sum(first, axis=0) / elements * (0.0 if RMS else 1.0))
    tl.store(means_ptr + 2 * row + 1, tl.sum(second, axis=0) / elements * tl.load(rstd_ptr + row))


@triton.jit(do_not_specialize=_FREE)
def rows_backward_kernel(
    to_h_ptr, to_x_ptr, sums_ptr, grad_ptr, grad_h_ptr, h_ptr, x_ptr, gate_ptr, weight_ptr, scale_ptr,
    mean_ptr, rstd_ptr, means_ptr, gate_stride: tl.int64, scale_stride: tl.int64, tokens: tl.int64, part: tl.int64,
    parts: tl.int64, elements: tl.int64, blocks: tl.int64,
    RMS: tl.constexpr, SUMS: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of the rows of one part of a sample, and its part of the sums over tokens; in a block of columns."""
    elements = _multiple_of_8(elements, ALIGNED)
    program = tl.program_id(0).to(tl.int64)
    unit = program // blocks
    sample, first_row = unit // parts, unit % parts * part
    column = (program % blocks) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    exists_column = column < elements
    factor = _factor(
        weight_ptr, scale_ptr, column, sample * _multiple_of_8(scale_stride, ALIGNED) + column, exists_column, column
    )
    if gate_ptr is not None:
        gate = _load(gate_ptr, sample * _multiple_of_8(gate_stride, ALIGNED) + column, exists_column)
    plain, normalized = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    with_x = tl.zeros((ROWS, COLUMNS), tl.float32)
    for token in range(first_row, tl.minimum(first_row + part, tokens), ROWS):
        own = token + tl.arange(0, ROWS)[:, None]
        in_part = own < tl.minimum(first_row + part, tokens)
        row = sample * tokens + tl.minimum(own, tokens - 1)
        exists = in_part & exists_column
        at = row * elements + column
        rstd = tl.load(rstd_ptr + row)
        mean = tl.zeros_like(rstd) if RMS else tl.load(mean_ptr + row)
        grad = _load(grad_ptr, at, exists)
        n = tl.where(exists, (_load(h_ptr, at, exists) - mean) * rstd, 0.0)
        g = grad * factor
        if means_ptr is not None:
            first, second = tl.load(means_ptr + 2 * row), tl.load(means_ptr + 2 * row + 1)
        else:
            first = tl.sum(g, axis=1, keep_dims=True) / elements * (0.0 if RMS else 1.0)
            second = tl.sum(g * n, axis=1, keep_dims=True) / elements
        to_h = rstd * (g - first - n * second)
        if grad_h_ptr is not None:
            to_h += _load(grad_h_ptr, at, exists)
        tl.store(to_h_ptr + at, to_h, exists)
        if SUMS > 0:
            plain += grad
            normalized += grad * n
        if gate_ptr is not None:
            with_x += to_h * _load(x_ptr, at, exists)
            tl.store(to_x_ptr + at, to_h * gate, exists)
    if SUMS > 0:
        to = sums_ptr + unit * SUMS * elements + column
        tl.store(to, tl.sum(plain, axis=0, keep_dims=True), exists_column)
        tl.store(to + elements, tl.sum(normalized, axis=0, keep_dims=True), exists_column)
        if SUMS > 2:
            tl.store(to + 2 * elements, tl.sum(with_x, axis=0, keep_dims=True), exists_column)
