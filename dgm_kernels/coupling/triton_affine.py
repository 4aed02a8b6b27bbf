"""Triton kernels of affine coupling layers and base densities.

A program works on a part of one long sample or on several short ones, as a tile of rows and columns. Its sum over a
sample is that of the sample, or one of its parts, which are added up in a fixed order: there are no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers that change from call to call: a kernel must not be compiled for their value.
_FREE = (
    "batch", "elements", "blocks", "start", "stop", "period",
    "x_stride", "shift_stride", "log_scale_stride", "fixed_stride", "grad_stride", "output_stride",
)  # fmt: skip


@triton.jit
def _multiple_of_8(number, ALIGNED: tl.constexpr):
    """Changes nothing, but tells the compiler that rows begin at 16 bytes."""
    return number // 8 * 8 if ALIGNED else number


@triton.jit
def _tile(batch, elements, blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows ``[ROWS, 1]``, first column, places in the tile ``[1, COLUMNS]``, which of them exist, and which rows do.

    Rows beyond the batch are the last one again, so that what belongs to a row can be loaded without a mask.
    """
    program = tl.program_id(0)
    row_block = program // blocks
    column = (program - row_block * blocks).to(tl.int64) * COLUMNS
    row = row_block.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    place = tl.arange(0, COLUMNS)[None, :]
    exists = place < _in_tile(elements - column, COLUMNS)
    in_batch = row < batch
    if ROWS > 1:
        exists &= in_batch
        row = tl.minimum(row, batch - 1)
    return row, column, place, exists, in_batch


@triton.jit
def _in_tile(place, COLUMNS: tl.constexpr):
    """A place relative to the tile, as 32 bits; before it is 0, behind it COLUMNS."""
    return tl.minimum(tl.maximum(place, 0), COLUMNS).to(tl.int32)


@triton.jit
def _load(ptr, place, exists):
    return tl.load(ptr + place, exists, other=0.0).to(tl.float32)


@triton.jit
def _moved(
    fixed_ptr, inside, row, column, place, fixed_stride, period,
    PERIODIC: tl.constexpr, PARITY: tl.constexpr, WIDTH: tl.constexpr, HEIGHT: tl.constexpr,
):  # fmt: skip
    """Which of the elements ``inside`` the channels are transformed.

    The images of a checkerboard are WIDTH by HEIGHT, known when the kernel is compiled: divisions by numbers that are
    not would take longer than the memory. WIDTH is 0 where a sample is one row.
    """
    if fixed_ptr is not None:
        if PERIODIC:
            at = ((column % period).to(tl.uint32) + place.to(tl.uint32)) % period.to(tl.uint32)
        else:
            at = row * fixed_stride + column + place
        inside &= tl.load(fixed_ptr + at, inside, other=0) == 0
    if PARITY >= 0 and WIDTH == 0:
        inside &= (place & 1) != PARITY  # tiles begin at even elements
    elif PARITY >= 0:
        first = (column % (WIDTH * HEIGHT)).to(tl.uint32)
        pixel = first % WIDTH + place.to(tl.uint32)
        h = (first // WIDTH + pixel // WIDTH) % HEIGHT
        inside &= ((h + pixel % WIDTH) & 1).to(tl.int32) != PARITY
    return inside


@triton.jit
def _log_of_scale(a, MAP: tl.constexpr):
    """s and ds / da; MAP counts ``reference.SCALE_MAPS``."""
    if MAP == 1:
        e = tl.exp(-2.0 * tl.abs(a))
        s = (1.0 - e) / (1.0 + e)
        return tl.where(a < 0.0, -s, s), 4.0 * e / ((1.0 + e) * (1.0 + e))
    elif MAP == 2:
        b = a + 2.0
        e = tl.exp(-tl.abs(b))
        return tl.minimum(b, 0.0) - tl.log(1.0 + e), tl.where(b < 0.0, 1.0, e) / (1.0 + e)
    elif MAP == 3:
        d = 1.0 + tl.abs(a) * 0.14476482730108395  # 1 / ln 1000
        return a / d, 1.0 / (d * d)
    else:
        return a, tl.full(a.shape, 1.0, tl.float32)


@triton.jit(do_not_specialize=_FREE)
def affine_kernel(
    out_ptr, logdet_ptr, x_ptr, shift_ptr, log_scale_ptr, fixed_ptr,
    x_stride: tl.int64, shift_stride: tl.int64, log_scale_stride: tl.int64, fixed_stride: tl.int64,
    start: tl.int64, stop: tl.int64, period: tl.int64,
    batch: tl.int64, elements: tl.int64, blocks: tl.int32,
    MAP: tl.constexpr, INVERSE: tl.constexpr, PERIODIC: tl.constexpr, PARITY: tl.constexpr,
    WIDTH: tl.constexpr, HEIGHT: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y, and the tile's part of the log-determinant unless there is no log_scale."""
    elements, period = _multiple_of_8(elements, ALIGNED), _multiple_of_8(period, ALIGNED)
    start, stop = _multiple_of_8(start, ALIGNED), _multiple_of_8(stop, ALIGNED)
    row, column, place, exists, in_batch = _tile(batch, elements, blocks, ROWS, COLUMNS)
    x = _load(x_ptr + (row * _multiple_of_8(x_stride, ALIGNED) + column), place, exists)
    inside = exists & (place >= _in_tile(start - column, COLUMNS)) & (place < _in_tile(stop - column, COLUMNS))
    at = column - start
    y = _load(shift_ptr + (row * _multiple_of_8(shift_stride, ALIGNED) + at), place, inside)
    moved = _moved(
        fixed_ptr, inside, row, column, place, _multiple_of_8(fixed_stride, ALIGNED), period,
        PERIODIC, PARITY, WIDTH, HEIGHT,
    )  # fmt: skip
    if log_scale_ptr is None:
        y = x - y if INVERSE else x + y
    else:
        a = _load(log_scale_ptr + (row * _multiple_of_8(log_scale_stride, ALIGNED) + at), place, inside)
        s, _ = _log_of_scale(a, MAP)
        s = -s if INVERSE else s
        y = (x - y) * tl.exp(s) if INVERSE else x * tl.exp(s) + y
        logdet = tl.sum(tl.where(moved, s, 0.0), axis=1, keep_dims=True)
        tl.store(logdet_ptr + row * blocks + column // COLUMNS, logdet, in_batch)
    tl.store(out_ptr + (row * elements + column) + place, tl.where(moved, y, x), exists)


@triton.jit(do_not_specialize=_FREE)
def affine_backward_kernel(
    to_x_ptr, to_shift_ptr, to_scale_ptr, grad_ptr, grad_logdet_ptr, output_ptr, shift_ptr, log_scale_ptr, fixed_ptr,
    grad_stride: tl.int64, output_stride: tl.int64,
    shift_stride: tl.int64, log_scale_stride: tl.int64, fixed_stride: tl.int64,
    start: tl.int64, stop: tl.int64, period: tl.int64,
    batch: tl.int64, elements: tl.int64, blocks: tl.int32,
    MAP: tl.constexpr, INVERSE: tl.constexpr, PERIODIC: tl.constexpr, PARITY: tl.constexpr,
    WIDTH: tl.constexpr, HEIGHT: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The formulas are those of ``op._affine_backward``."""
    elements, period = _multiple_of_8(elements, ALIGNED), _multiple_of_8(period, ALIGNED)
    start, stop = _multiple_of_8(start, ALIGNED), _multiple_of_8(stop, ALIGNED)
    row, column, place, exists, _ = _tile(batch, elements, blocks, ROWS, COLUMNS)
    g = _load(grad_ptr + (row * _multiple_of_8(grad_stride, ALIGNED) + column), place, exists)
    inside = exists & (place >= _in_tile(start - column, COLUMNS)) & (place < _in_tile(stop - column, COLUMNS))
    at = column - start
    a = _load(log_scale_ptr + (row * _multiple_of_8(log_scale_stride, ALIGNED) + at), place, inside)
    y = _load(output_ptr + (row * _multiple_of_8(output_stride, ALIGNED) + column), place, inside)
    moved = _moved(
        fixed_ptr, inside, row, column, place, _multiple_of_8(fixed_stride, ALIGNED), period,
        PERIODIC, PARITY, WIDTH, HEIGHT,
    )  # fmt: skip
    s, slope = _log_of_scale(a, MAP)
    to_x = g * tl.exp(-s if INVERSE else s)
    if INVERSE:
        to_shift = -to_x
        to_scale = g * y
    else:
        to_shift = g
        to_scale = g * (y - _load(shift_ptr + (row * _multiple_of_8(shift_stride, ALIGNED) + at), place, inside))
    if grad_logdet_ptr is not None:
        to_scale += tl.load(grad_logdet_ptr + row)
    to_scale *= -slope if INVERSE else slope
    tl.store(to_x_ptr + (row * elements + column) + place, tl.where(moved, to_x, g), exists)
    at += row * (stop - start)
    tl.store(to_scale_ptr + at + place, tl.where(moved, to_scale, 0.0), inside)
    if to_shift_ptr is not None:
        tl.store(to_shift_ptr + at + place, tl.where(moved, to_shift, 0.0), inside)


@triton.jit(do_not_specialize=_FREE)
def log_prob_kernel(
    out_ptr, z_ptr, x_stride: tl.int64, batch: tl.int64, elements: tl.int64, blocks: tl.int32,
    LOGISTIC: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The tile's part of the sum of log-densities."""
    elements = _multiple_of_8(elements, ALIGNED)
    row, column, place, exists, in_batch = _tile(batch, elements, blocks, ROWS, COLUMNS)
    z = _load(z_ptr + (row * _multiple_of_8(x_stride, ALIGNED) + column), place, exists)
    half_ln_2_pi = 0.9189385332046727
    each = -tl.abs(z) - 2.0 * tl.log(1.0 + tl.exp(-tl.abs(z))) if LOGISTIC else -0.5 * (z * z) - half_ln_2_pi
    total = tl.sum(tl.where(exists, each, 0.0), axis=1, keep_dims=True)
    tl.store(out_ptr + row * blocks + column // COLUMNS, total, in_batch)
