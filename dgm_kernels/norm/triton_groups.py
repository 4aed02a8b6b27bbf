"""Triton kernels of group norm with SiLU.

A tile has channels as rows and their elements as columns, so that what belongs to a channel is found without a division
for every element.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_rows import _load, _multiple_of_8

_FREE = ("scale_stride", "shift_stride", "eps", "batch", "channels", "elements", "groups")


@triton.jit
def _slope_and_offset(
    weight_ptr, bias_ptr, scale_ptr, shift_ptr, sample, channel, scale_stride, shift_stride, exists
):  # fmt: skip
    """``weight (1 + scale)`` and ``bias (1 + scale) + shift``."""
    factor = tl.full(channel.shape, 1.0, tl.float32)
    offset = tl.zeros(channel.shape, tl.float32)
    if weight_ptr is not None:
        factor *= _load(weight_ptr, channel, exists)
    if bias_ptr is not None:
        offset += _load(bias_ptr, channel, exists)
    if scale_ptr is not None:
        scale = 1.0 + _load(scale_ptr, sample * scale_stride + channel, exists)
        factor *= scale
        offset *= scale
    if shift_ptr is not None:
        offset += _load(shift_ptr, sample * shift_stride + channel, exists)
    return factor, offset


@triton.jit
def _silu(z):
    return z / (1.0 + tl.exp(-z))


@triton.jit(do_not_specialize=_FREE)
def group_silu_kernel(
    y_ptr, mean_ptr, rstd_ptr, x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
    scale_stride: tl.int64, shift_stride: tl.int64, eps: tl.float32, groups: tl.int64,
    batch: tl.int64, channels: tl.int64, elements: tl.int64,
    ONE: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y, mean and 1 / deviation of one group; ONE: a tile holds all of it."""
    elements = _multiple_of_8(elements, ALIGNED)
    unit = tl.program_id(0).to(tl.int64)
    count = channels // groups
    sample, first = unit // groups, unit % groups * count
    base = (sample * channels + first) * elements
    row, place = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    size = count * elements
    if ONE:
        exists = (row < count) & (place < elements)
        x = _load(x_ptr + base, row * elements + place, exists)
        mean = tl.sum(tl.sum(x, axis=1), axis=0) / size
        apart = tl.where(exists, x - mean, 0.0)
        squares = tl.sum(tl.sum(apart * apart, axis=1), axis=0)
    else:
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for channel in range(0, count, ROWS):
            for start in range(0, elements, COLUMNS):
                exists = (channel + row < count) & (start + place < elements)
                total += _load(x_ptr + base, (channel + row) * elements + (start + place), exists)
        mean = tl.sum(tl.sum(total, axis=1), axis=0) / size
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for channel in range(0, count, ROWS):
            for start in range(0, elements, COLUMNS):
                exists = (channel + row < count) & (start + place < elements)
                x = _load(x_ptr + base, (channel + row) * elements + (start + place), exists)
                apart = tl.where(exists, x - mean, 0.0)
                total += apart * apart
        squares = tl.sum(tl.sum(total, axis=1), axis=0)
    rstd = 1.0 / tl.sqrt(squares / size + eps)
    tl.store(mean_ptr + unit, mean)
    tl.store(rstd_ptr + unit, rstd)
    for channel in range(0, ROWS if ONE else count, ROWS):
        in_group = channel + row < count
        factor, offset = _slope_and_offset(
            weight_ptr,
            bias_ptr,
            scale_ptr,
            shift_ptr,
            sample,
            first + channel + row,
            scale_stride,
            shift_stride,
            in_group,
        )
        for start in range(0, COLUMNS if ONE else elements, COLUMNS):
            exists = in_group & (start + place < elements)
            at = (channel + row) * elements + (start + place)
            z = (_load(x_ptr + base, at, exists) - mean) * (rstd * factor) + offset
            tl.store(y_ptr + base + at, _silu(z), exists)


@triton.jit
def _inner_gradient(grad, n, factor, offset):
    """That of what SiLU gets."""
    z = n * factor + offset
    s = 1.0 / (1.0 + tl.exp(-z))
    return grad * s * (1.0 + z * (1.0 - s))


@triton.jit
def _channels(
    weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean_ptr, rstd_ptr, scale_stride, shift_stride,
    number, groups, batch, channels, exists,
):  # fmt: skip
    """Group, mean, 1 / deviation, factor and offset of channels with these numbers in the whole batch."""
    sample, channel = number // channels, number % channels
    group = sample * groups + channel // (channels // groups)
    mean, rstd = _load(mean_ptr, group, exists), _load(rstd_ptr, group, exists)
    factor, offset = _slope_and_offset(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, sample, channel, scale_stride, shift_stride, exists
    )
    return group, mean, rstd, factor, offset


@triton.jit(do_not_specialize=_FREE)
def channel_sums_kernel(
    sums_ptr, grad_ptr, x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean_ptr, rstd_ptr,
    scale_stride: tl.int64, shift_stride: tl.int64, groups: tl.int64,
    batch: tl.int64, channels: tl.int64, elements: tl.int64,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sums over ROWS channels of the gradient of what SiLU gets, and those with the normalised x."""
    elements = _multiple_of_8(elements, ALIGNED)
    number = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    in_batch = number < batch * channels
    _, mean, rstd, factor, offset = _channels(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean_ptr, rstd_ptr, scale_stride, shift_stride,
        number, groups, batch, channels, in_batch,
    )  # fmt: skip
    plain, normalized = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, elements, COLUMNS):
        place = start + tl.arange(0, COLUMNS)[None, :]
        exists = in_batch & (place < elements)
        n = (_load(x_ptr, number * elements + place, exists) - mean) * rstd
        g = _inner_gradient(_load(grad_ptr, number * elements + place, exists), n, factor, offset)
        plain += g
        normalized += g * n
    at = number // channels * 2 * channels + number % channels
    tl.store(sums_ptr + at, tl.sum(plain, axis=1, keep_dims=True), in_batch)
    tl.store(sums_ptr + at + channels, tl.sum(normalized, axis=1, keep_dims=True), in_batch)


@triton.jit(do_not_specialize=(*_FREE, "blocks"))
def group_silu_backward_kernel(
    to_x_ptr, means_ptr, grad_ptr, x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean_ptr, rstd_ptr,
    scale_stride: tl.int64, shift_stride: tl.int64, groups: tl.int64, blocks: tl.int64,
    batch: tl.int64, channels: tl.int64, elements: tl.int64,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of elements of ROWS channels, from the means over their groups."""
    elements = _multiple_of_8(elements, ALIGNED)
    program = tl.program_id(0).to(tl.int64)
    number = program // blocks * ROWS + tl.arange(0, ROWS)[:, None]
    in_batch = number < batch * channels
    group, mean, rstd, factor, offset = _channels(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean_ptr, rstd_ptr, scale_stride, shift_stride,
        number, groups, batch, channels, in_batch,
    )  # fmt: skip
    place = program % blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    exists = in_batch & (place < elements)
    at = number * elements + place
    n = (_load(x_ptr, at, exists) - mean) * rstd
    g = _inner_gradient(_load(grad_ptr, at, exists), n, factor, offset) * factor
    first, second = _load(means_ptr, 2 * group, in_batch), _load(means_ptr, 2 * group + 1, in_batch)
    tl.store(to_x_ptr + at, rstd * (g - first - n * second), exists)
