"""Triton kernels of masked convolutions: implicit matrix products over pixels, output channels and live taps alone.

A convolution is three launches. The live weights are packed tap after tap, with zeros for those that a group hides, so
that what a masked weight holds never counts. The image is brought to channels-last, whose rows of channels are 16-byte
accesses at every tap (a shifted row of pixels is not aligned). Then a program computes one tile of output channels by
pixels: live taps come first in raster order, so its sum is one loop over a range of steps, and the range leaves out the
channels that groups hide from the whole tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_pixel import gate, multiple_of, sample_and_place

# Numbers that change from call to call: a kernel must not be compiled for their value.
_FREE = (
    "pixels", "plane", "width", "rows", "inner", "outputs", "inputs", "groups", "padded_rows", "padded",
    "taps", "size", "step_y", "step_x", "centre_y", "centre_x", "splits", "steps",
)  # fmt: skip
# taps.Rule, of the last live tap; all others are FULL.
_LESS = tl.constexpr(2)
_LESS_EQUAL = tl.constexpr(3)


@triton.jit
def _nearest_tf32(x):
    """Rounds to the 10 bits that a tf32 product reads; the hardware would cut the others off."""
    bits = x.to(tl.int32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, (bits + 0x1000) & -0x2000, bits).to(tl.float32, bitcast=True)


@triton.jit
def _counts(before, after, RULE: tl.constexpr):
    """Whether an input of group ``before`` counts for an output of group ``after``."""
    return before < after if RULE == _LESS else before <= after


@triton.jit
def _in_plane(first, pixels, plane, PIXELS: tl.constexpr, VECTOR: tl.constexpr):
    """Of the tile of pixels from ``first`` on the first sample, samples after it, places in the planes; which exist."""
    sample, after, place = sample_and_place(first, plane, PIXELS)
    exists = tl.arange(0, PIXELS) < tl.minimum(multiple_of(pixels, VECTOR) - first, PIXELS).to(tl.int32)
    return sample, after, place, exists


@triton.jit
def _offsets(after, place, stride, VECTOR: tl.constexpr):
    """From the tile's first sample to each pixel in NCHW; VECTOR pixels are in one plane and adjacent."""
    at = after.to(tl.int64) * stride + place
    return tl.max_contiguous(tl.multiple_of(at, VECTOR), VECTOR) if VECTOR > 1 else at


@triton.jit
def _shift(tap, step_y, step_x, centre_y, centre_x, WIDTH: tl.constexpr):
    """Rows and columns from the pixel to the one that the tap reads."""
    row = tap // WIDTH
    return row * step_y - centre_y, (tap - row * WIDTH) * step_x - centre_x


@triton.jit
def _visible(y, x, dy, dx, height, width):
    """Whether a shifted pixel is in the image."""
    return ((y + dy).to(tl.uint32) < height.to(tl.uint32)) & ((x + dx).to(tl.uint32) < width.to(tl.uint32))


@triton.jit(do_not_specialize=_FREE)
def pack_kernel(
    packed_ptr, weight_ptr, outputs: tl.int32, inputs: tl.int32, groups: tl.int32, taps: tl.int32, size: tl.int32,
    padded_rows: tl.int32, padded: tl.int32,
    RULE: tl.constexpr, TURNED: tl.constexpr, GATED: tl.constexpr, TF32: tl.constexpr,
    ROWS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """The live weights as ``[taps, padded_rows, padded]``: rows of the product by channels that it sums over.

    TURNED exchanges outputs and inputs; GATED makes two such parts, of the halves of each group of outputs.
    """
    rows = inputs if TURNED else outputs // 2 if GATED else outputs
    inner = outputs if TURNED else inputs
    blocks = padded // INNER
    row_blocks = padded_rows // ROWS
    block = tl.program_id(0) // blocks
    k = (tl.program_id(0) - block * blocks) * INNER + tl.arange(0, INNER)[None, :]
    part = block // row_blocks
    row = (block - part * row_blocks) * ROWS + tl.arange(0, ROWS)[:, None]
    half = part // taps
    tap = part - half * taps
    live = (row < rows) & (k < inner)
    o = k if TURNED else row
    i = row if TURNED else k
    if GATED:
        channels = rows // groups
        o += (row // channels + half) * channels
    if RULE >= _LESS:
        live &= (tap < taps - 1) | _counts(i // (inputs // groups), o // (outputs // groups), RULE)
    w = tl.load(weight_ptr + (o.to(tl.int64) * inputs + i) * size + tap, live, other=0.0)
    at = (part.to(tl.int64) * padded_rows + row) * padded + k
    tl.store(packed_ptr + at, _nearest_tf32(w) if TF32 else w)


@triton.jit(do_not_specialize=_FREE)
def channels_last_kernel(
    out_ptr, x_ptr, pixels: tl.int64, plane: tl.int32, inner: tl.int32, padded: tl.int32,
    TF32: tl.constexpr, VECTOR: tl.constexpr, PIXELS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """``[pixels, padded]`` from NCHW: the channels of a pixel one after the other, then zeros."""
    plane = multiple_of(plane, VECTOR)
    blocks = padded // INNER
    block = tl.program_id(0) // blocks
    k = (tl.program_id(0) - block * blocks) * INNER + tl.arange(0, INNER)[None, :]
    first = block.to(tl.int64) * PIXELS
    sample, after, place, exists = _in_plane(first, pixels, plane, PIXELS, VECTOR)
    stride = inner.to(tl.int64) * plane
    at = _offsets(after, place, stride, VECTOR)[:, None] + k.to(tl.int64) * plane
    x = tl.load(x_ptr + sample * stride + at, exists[:, None] & (k < inner), other=0.0)
    to = tl.arange(0, PIXELS)[:, None] * (blocks * INNER) + k
    tl.store(out_ptr + first * (blocks * INNER) + to, _nearest_tf32(x) if TF32 else x, exists[:, None])


@triton.jit
def _live_steps(row, rows, inner, blocks, groups, taps, RULE: tl.constexpr, TURNED: tl.constexpr,
                ROWS: tl.constexpr, INNER: tl.constexpr):  # fmt: skip
    """First step and end of the sum over taps and blocks of channels, for the rows from ``row`` on.

    Groups cut the last tap's channels off behind those that the tile's last row sees. TURNED, the taps run backwards
    and the range begins with the channels that see the tile's first row.
    """
    begin = 0
    end = taps * blocks
    if RULE >= _LESS:
        if TURNED:
            group = row * groups // rows + (1 if RULE == _LESS else 0)
            begin = group * (inner // groups) // INNER
        else:
            group = (tl.minimum(row + ROWS, rows) - 1) * groups // rows + (0 if RULE == _LESS else 1)
            end += tl.cdiv(group * (inner // groups), INNER) - blocks
    return begin, end


@triton.jit(do_not_specialize=_FREE)
def conv_kernel(
    out_ptr, pre_ptr, x_ptr, packed_ptr, bias_ptr, condition_ptr,
    pixels: tl.int64, plane: tl.int32, width: tl.int32, rows: tl.int32, inner: tl.int32, groups: tl.int32,
    padded_rows: tl.int32, taps: tl.int32, step_y: tl.int32, step_x: tl.int32, centre_y: tl.int32, centre_x: tl.int32,
    WIDTH: tl.constexpr, RULE: tl.constexpr, TURNED: tl.constexpr, GATED: tl.constexpr, PER_PIXEL: tl.constexpr,
    DIRECT: tl.constexpr, TF32: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
    ROWS: tl.constexpr, PIXELS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """ROWS channels of the result by PIXELS; ``x`` is channels-last, or NCHW if DIRECT, for a tap on the pixel itself.

    GATED, both halves of the channels are computed and ``pre``, if it is there, gets them as they are.
    """
    plane = multiple_of(plane, VECTOR)
    row_blocks = tl.cdiv(rows, ROWS)  # programs side by side read the same pixels
    pixel_block = tl.program_id(0) // row_blocks
    row = (tl.program_id(0) - pixel_block * row_blocks) * ROWS
    first = pixel_block.to(tl.int64) * PIXELS
    sample, after, place, exists = _in_plane(first, pixels, plane, PIXELS, VECTOR)
    y = place // width
    x = place - y * width
    y = tl.where(exists, y, -(1 << 30))  # in no image, whatever the tap
    height = plane // width

    blocks = tl.cdiv(inner, INNER)
    k = tl.arange(0, INNER)
    if DIRECT:
        stride = inner.to(tl.int64) * plane
        at = _offsets(after, place, stride, VECTOR)[:, None] + k[None, :].to(tl.int64) * plane
        x_ptr += sample * stride
    else:
        at = tl.arange(0, PIXELS)[:, None] * (blocks * INNER) + k[None, :]
    w_at = tl.arange(0, ROWS)[None, :] * (blocks * INNER) + k[:, None]
    total = tl.zeros((PIXELS, ROWS), tl.float32)
    if GATED:
        gates = tl.zeros((PIXELS, ROWS), tl.float32)
    begin, end = _live_steps(row, rows, inner, blocks, groups, taps, RULE, TURNED, ROWS, INNER)
    for step in tl.range(begin, end, num_stages=STAGES):
        tap = step // blocks
        block = (step - tap * blocks).to(tl.int64)
        if TURNED:
            tap = taps - 1 - tap
        if DIRECT:
            seen = exists[:, None] & (block * INNER + k < inner)[None, :]
            pixel_ptr = x_ptr + block * INNER * plane
        else:
            dy, dx = _shift(tap, step_y, step_x, centre_y, centre_x, WIDTH)
            if TURNED:
                dy, dx = -dy, -dx
            seen = _visible(y, x, dy, dx, height, width)[:, None]
            pixel_ptr = x_ptr + ((first + dy.to(tl.int64) * width + dx) * blocks + block) * INNER
        values = tl.load(pixel_ptr + at, seen, other=0.0)
        w_ptr = packed_ptr + ((tap.to(tl.int64) * padded_rows + row) * blocks + block) * INNER
        total = tl.dot(values, tl.load(w_ptr + w_at), total, input_precision="tf32" if TF32 else "ieee")
        if GATED:
            w_ptr += taps.to(tl.int64) * padded_rows * blocks * INNER
            gates = tl.dot(values, tl.load(w_ptr + w_at), gates, input_precision="tf32" if TF32 else "ieee")

    row += tl.arange(0, ROWS)[None, :]
    inside = exists[:, None] & (row < rows)
    if GATED:
        total = _gated(
            total, gates, pre_ptr, bias_ptr, condition_ptr, sample, after, place, row, inside, plane, rows, groups,
            PER_PIXEL, VECTOR,
        )  # fmt: skip
    elif bias_ptr is not None:
        total += tl.load(bias_ptr + row, row < rows, other=0.0).to(tl.float32)
    stride = rows.to(tl.int64) * plane
    to = _offsets(after, place, stride, VECTOR)[:, None] + row.to(tl.int64) * plane
    tl.store(out_ptr + sample * stride + to, total.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _gated(
    a, b, pre_ptr, bias_ptr, condition_ptr, sample, after, place, row, inside, plane, rows, groups,
    PER_PIXEL: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The gated activation of both halves, after their bias and condition."""
    channels = rows // groups
    in_a = row + row // channels * channels  # among the convolution's channels
    live = row < rows
    if bias_ptr is not None:
        a += tl.load(bias_ptr + in_a, live, other=0.0).to(tl.float32)
        b += tl.load(bias_ptr + in_a + channels, live, other=0.0).to(tl.float32)
    stride = 2 * rows.to(tl.int64) * plane
    at = sample * stride + _offsets(after, place, stride, VECTOR)[:, None] + in_a.to(tl.int64) * plane
    to_b = channels.to(tl.int64) * plane
    if pre_ptr is not None:
        tl.store(pre_ptr + at, a.to(pre_ptr.dtype.element_ty), inside)
        tl.store(pre_ptr + at + to_b, b.to(pre_ptr.dtype.element_ty), inside)
    if condition_ptr is not None:
        if not PER_PIXEL:
            at = (sample + after.to(tl.int64))[:, None] * (2 * rows) + in_a
            to_b = channels.to(tl.int64)
        a += tl.load(condition_ptr + at, inside, other=0.0).to(tl.float32)
        b += tl.load(condition_ptr + at + to_b, inside, other=0.0).to(tl.float32)
    tanh, sigmoid = gate(a, b)
    return tanh * sigmoid


@triton.jit(do_not_specialize=_FREE)
def weight_grad_kernel(
    partial_ptr, grad_ptr, x_ptr, pixels: tl.int64, plane: tl.int32, width: tl.int32,
    outputs: tl.int32, inputs: tl.int32, groups: tl.int32, padded: tl.int32, taps: tl.int32,
    step_y: tl.int32, step_x: tl.int32, centre_y: tl.int32, centre_x: tl.int32, steps: tl.int32,
    WIDTH: tl.constexpr, RULE: tl.constexpr, LAST: tl.constexpr, TF32: tl.constexpr, VECTOR: tl.constexpr,
    STAGES: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """``[splits, taps, outputs, inputs]``: one tile of one tap, summed over one split's ``steps`` tiles of pixels.

    ``x`` is channels-last; so is ``grad`` if LAST, otherwise it is NCHW.
    """
    plane = multiple_of(plane, VECTOR)
    in_blocks = padded // IN
    out_blocks = tl.cdiv(outputs, OUT)
    block = tl.program_id(0) // in_blocks
    i = (tl.program_id(0) - block * in_blocks) * IN
    part = block // out_blocks
    o = (block - part * out_blocks) * OUT
    split = part // taps
    tap = part - split * taps
    begin = split * steps
    end = tl.minimum(begin + steps, tl.cdiv(pixels, PIXELS).to(tl.int32))
    if RULE >= _LESS:  # nothing to add up where the first input is hidden from the last output
        last = (tl.minimum(o + OUT, outputs) - 1) // (outputs // groups)
        end = tl.where((tap < taps - 1) | _counts(i // (inputs // groups), last, RULE), end, begin)
    dy, dx = _shift(tap, step_y, step_x, centre_y, centre_x, WIDTH)
    height = plane // width
    o += tl.arange(0, OUT)[None, :]
    stride = outputs.to(tl.int64) * plane
    at = tl.arange(0, PIXELS)[None, :] * (in_blocks * IN) + i + tl.arange(0, IN)[:, None]
    if LAST:
        g_at = tl.arange(0, PIXELS)[:, None] * (out_blocks * OUT) + o
    size = tl.full((), PIXELS, tl.int64)
    total = tl.zeros((IN, OUT), tl.float32)
    for step in tl.range(begin, end, num_stages=STAGES):
        first = step * size
        sample, after, place, exists = _in_plane(first, pixels, plane, PIXELS, VECTOR)
        y = place // width
        seen = _visible(tl.where(exists, y, -(1 << 30)), place - y * width, dy, dx, height, width)
        pixel_ptr = x_ptr + (first + dy.to(tl.int64) * width + dx) * (in_blocks * IN)
        values = tl.load(pixel_ptr + at, seen[None, :], other=0.0)
        if LAST:
            g = tl.load(grad_ptr + first * (out_blocks * OUT) + g_at, exists[:, None], other=0.0)
        else:
            g_at = _offsets(after, place, stride, VECTOR)[:, None] + o.to(tl.int64) * plane
            g = tl.load(grad_ptr + sample * stride + g_at, exists[:, None] & (o < outputs), other=0.0)
            if TF32:
                g = _nearest_tf32(g)
        total = tl.dot(values, g, total, input_precision="tf32" if TF32 else "ieee")
    i += tl.arange(0, IN)[:, None]
    to = partial_ptr + part.to(tl.int64) * outputs * inputs
    tl.store(to + (o * inputs + i), total, (o < outputs) & (i < inputs))


@triton.jit(do_not_specialize=_FREE)
def weight_sum_kernel(
    out_ptr, partial_ptr, outputs: tl.int32, inputs: tl.int32, groups: tl.int32, taps: tl.int32, size: tl.int32,
    splits: tl.int32, RULE: tl.constexpr, PAIRS: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """The splits added up in order: ``[outputs, inputs, size]``, 0 where the weight does not count."""
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)[:, None]
    tap = tl.arange(0, TAPS)[None, :]
    o = pair // inputs
    live = (o < outputs) & (tap < taps)
    if RULE >= _LESS:
        i = pair - o * inputs
        live &= (tap < taps - 1) | _counts(i // (inputs // groups), o // (outputs // groups), RULE)
    pairs = outputs.to(tl.int64) * inputs
    at = tap * pairs + pair
    total = tl.zeros((PAIRS, TAPS), tl.float32)
    for split in range(splits):
        total += tl.load(partial_ptr + split * (taps * pairs) + at, live, other=0.0)
    to = pair.to(tl.int64) * size + tap
    tl.store(out_ptr + to, total.to(out_ptr.dtype.element_ty), (o < outputs) & (tap < size))
