"""Triton kernels of what follows a masked convolution: the gated activation, and log-probabilities of its outputs."""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers that change from call to call: a kernel must not be compiled for their value.
_FREE = ("pixels", "plane", "channels", "mixtures", "levels", "half", "batch", "elements", "blocks")


@triton.jit
def multiple_of(number, DIVISOR: tl.constexpr):
    """Changes nothing, but tells the compiler that the number is a multiple."""
    return number // DIVISOR * DIVISOR if DIVISOR > 1 else number


@triton.jit
def sample_and_place(first, plane, PIXELS: tl.constexpr):
    """The sample of pixel ``first``; of the PIXELS from there on how many samples later they are, and where in theirs.

    All but the first sample is in 32 bits, whose division is a fifth of that in 64.
    """
    sample = first // plane
    place = (first - sample * plane).to(tl.int32) + tl.arange(0, PIXELS)
    after = place // plane
    return sample, after, place - after * plane


# ---- Gated activation: a row is a channel of the result


@triton.jit
def _tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    magnitude = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0.0, -magnitude, magnitude)


@triton.jit
def gate(a, b):
    """tanh(a) and sigmoid(b)."""
    return _tanh(a), 1.0 / (1.0 + tl.exp(-b))


@triton.jit
def _halves(
    x_ptr, condition_ptr, channels, batch, elements, blocks,
    PER_PIXEL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """tanh and sigmoid; where the program's elements are in the result, and in x from those to its two halves.

    Rows beyond the batch are the last one again, so that what belongs to a row can be loaded without a mask.
    """
    block = tl.program_id(0) // blocks
    column_block = tl.program_id(0) - block * blocks
    row = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    in_batch = row < batch
    row = tl.minimum(row, batch - 1)
    column = column_block.to(tl.int64) * COLUMNS
    place = tl.arange(0, COLUMNS)[None, :]
    exists = (place < tl.minimum(elements - column, COLUMNS).to(tl.int32)) & in_batch
    in_a = row + row // channels * channels  # rows of x
    at = in_a * elements + column + place
    to_b = channels * elements
    a = tl.load(x_ptr + at, exists, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + at + to_b, exists, other=0.0).to(tl.float32)
    if condition_ptr is not None:
        if PER_PIXEL:
            a += tl.load(condition_ptr + at, exists, other=0.0).to(tl.float32)
            b += tl.load(condition_ptr + at + to_b, exists, other=0.0).to(tl.float32)
        else:
            a += tl.load(condition_ptr + in_a).to(tl.float32)
            b += tl.load(condition_ptr + in_a + channels).to(tl.float32)
    tanh, sigmoid = gate(a, b)
    return tanh, sigmoid, row * elements + column + place, at, to_b, exists, in_a * blocks + column_block, in_batch


@triton.jit(do_not_specialize=_FREE)
def gate_kernel(
    out_ptr, x_ptr, condition_ptr, channels: tl.int64, batch: tl.int64, elements: tl.int64, blocks: tl.int32,
    PER_PIXEL: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """tanh(a) sigmoid(b)."""
    elements = multiple_of(elements, VECTOR)
    tanh, sigmoid, to, _, _, exists, _, _ = _halves(
        x_ptr, condition_ptr, channels, batch, elements, blocks, PER_PIXEL, ROWS, COLUMNS
    )
    tl.store(out_ptr + to, tanh * sigmoid, exists)


@triton.jit(do_not_specialize=_FREE)
def gate_backward_kernel(
    to_x_ptr, sums_ptr, grad_ptr, x_ptr, condition_ptr,
    channels: tl.int64, batch: tl.int64, elements: tl.int64, blocks: tl.int32,
    PER_PIXEL: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of both halves, and of a condition of each sample the program's part of their sums over pixels."""
    elements = multiple_of(elements, VECTOR)
    tanh, sigmoid, at, to, to_b, exists, sum_at, in_batch = _halves(
        x_ptr, condition_ptr, channels, batch, elements, blocks, PER_PIXEL, ROWS, COLUMNS
    )
    g = tl.load(grad_ptr + at, exists, other=0.0).to(tl.float32)
    a = g * sigmoid * (1.0 - tanh * tanh)
    b = g * tanh * sigmoid * (1.0 - sigmoid)
    tl.store(to_x_ptr + to, a, exists)
    tl.store(to_x_ptr + to + to_b, b, exists)
    if sums_ptr is not None:
        tl.store(sums_ptr + sum_at, tl.sum(a, axis=1, keep_dims=True), in_batch)
        tl.store(sums_ptr + sum_at + channels * blocks, tl.sum(b, axis=1, keep_dims=True), in_batch)


# ---- Mixture of discretized logistics: a tile is all components of some pixels


@triton.jit
def _softplus_sigmoid(x):
    """log(1 + exp(x)) and its derivative."""
    e = tl.exp(-tl.abs(x))
    return tl.maximum(x, 0.0) + tl.log(1.0 + e), tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def _one_minus_exp(d):
    """1 - exp(-d) of d >= 0, to the digits of d."""
    p = 1.0 - d * 0.125
    for n in tl.static_range(7, 1, -1):
        p = 1.0 - d * p * (1.0 / n)
    return tl.where(d < 0.5, d * p, 1.0 - tl.exp(-d))


@triton.jit
def _logistic(x, mean, log_scale, half):
    """Log-probability of the level of x, and its derivatives by the mean and the log-scale; see ``reference``."""
    inverse = tl.exp(-tl.maximum(log_scale, -7.0))  # reference.MIN_LOG_SCALE
    upper = inverse * (x - mean + half)
    lower = inverse * (x - mean - half)
    soft_upper, beyond = _softplus_sigmoid(-upper)
    soft_lower, before = _softplus_sigmoid(lower)
    width = 2.0 * half * inverse
    inside = _one_minus_exp(width)
    lowest = x < half - 1.0
    highest = x > 1.0 - half
    end = lowest | highest
    beyond = tl.where(highest, 0.0, beyond)
    before = tl.where(lowest, 0.0, before)
    value = tl.where(end, 0.0, tl.log(inside)) - tl.where(highest, 0.0, soft_upper) - tl.where(lowest, 0.0, soft_lower)
    to_mean = inverse * (before - beyond)
    to_scale = before * lower - beyond * upper - tl.where(end, 0.0, width * tl.exp(-width) / inside)
    return value, to_mean, tl.where(log_scale < -7.0, 0.0, to_scale)


@triton.jit
def _log_sum_exp(x):
    """Over the components."""
    top = tl.max(x, axis=1)
    top = tl.where(top == -float("inf"), 0.0, top)
    return top + tl.log(tl.sum(tl.exp(x - top[:, None]), axis=1))


@triton.jit
def _pixels(x_ptr, parameters_ptr, pixels, plane, mixtures, CHANNELS: tl.constexpr,
            MIXTURES: tl.constexpr, PIXELS: tl.constexpr):  # fmt: skip
    """x's channels, the place of the first parameter of each component, from one parameter to the next; what exists."""
    first = tl.program_id(0).to(tl.int64) * PIXELS
    sample, after, place = sample_and_place(first, plane, PIXELS)
    sample += after
    pixel = first + tl.arange(0, PIXELS)
    exists = pixel < pixels
    k = tl.arange(0, MIXTURES)[None, :]
    step = mixtures.to(tl.int64) * plane
    numbers: tl.constexpr = 10 if CHANNELS == 3 else 3
    at = (sample * numbers * step + place)[:, None] + k.to(tl.int64) * plane
    x_at = x_ptr + sample * CHANNELS * plane + place
    red = tl.load(x_at, exists, other=0.0).to(tl.float32)[:, None]
    green = red
    blue = red
    if CHANNELS == 3:
        green = tl.load(x_at + plane, exists, other=0.0).to(tl.float32)[:, None]
        blue = tl.load(x_at + 2 * plane.to(tl.int64), exists, other=0.0).to(tl.float32)[:, None]
    return red, green, blue, at, step, exists, exists[:, None] & (k < mixtures), k < mixtures, pixel


@triton.jit
def _number(ptr, at, exists):
    return tl.load(ptr + at, exists, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=_FREE)
def mixture_kernel(
    out_ptr, x_ptr, parameters_ptr, half: tl.float32, pixels: tl.int64, plane: tl.int32, mixtures: tl.int32,
    CHANNELS: tl.constexpr, MIXTURES: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Log-probability of each pixel."""
    red, green, blue, at, step, exists, inside, counts, pixel = _pixels(
        x_ptr, parameters_ptr, pixels, plane, mixtures, CHANNELS, MIXTURES, PIXELS
    )
    logits = tl.where(counts, _number(parameters_ptr, at, inside), -float("inf"))
    mean = _number(parameters_ptr + step, at, inside)
    joint, _, _ = _logistic(red, mean, _number(parameters_ptr + 2 * step, at, inside), half)
    if CHANNELS == 3:
        mean = _number(parameters_ptr + 4 * step, at, inside)
        mean += _tanh(_number(parameters_ptr + 3 * step, at, inside)) * red
        value, _, _ = _logistic(green, mean, _number(parameters_ptr + 5 * step, at, inside), half)
        joint += value
        mean = _number(parameters_ptr + 7 * step, at, inside)
        mean += _tanh(_number(parameters_ptr + 6 * step, at, inside)) * red
        mean += _tanh(_number(parameters_ptr + 9 * step, at, inside)) * green
        value, _, _ = _logistic(blue, mean, _number(parameters_ptr + 8 * step, at, inside), half)
        joint += value
    tl.store(out_ptr + pixel, _log_sum_exp(joint + logits) - _log_sum_exp(logits), exists)


@triton.jit(do_not_specialize=_FREE)
def mixture_backward_kernel(
    to_parameters_ptr, grad_ptr, x_ptr, parameters_ptr, half: tl.float32,
    pixels: tl.int64, plane: tl.int32, mixtures: tl.int32,
    CHANNELS: tl.constexpr, MIXTURES: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """g times the component's share of the pixel, times the derivative of its log-probability; parameters read once."""
    red, green, blue, at, step, exists, inside, counts, pixel = _pixels(
        x_ptr, parameters_ptr, pixels, plane, mixtures, CHANNELS, MIXTURES, PIXELS
    )
    logits = tl.where(counts, _number(parameters_ptr, at, inside), -float("inf"))
    mean = _number(parameters_ptr + step, at, inside)
    joint, by_mean, by_scale = _logistic(red, mean, _number(parameters_ptr + 2 * step, at, inside), half)
    if CHANNELS == 3:
        c0 = _tanh(_number(parameters_ptr + 3 * step, at, inside))
        c1 = _tanh(_number(parameters_ptr + 6 * step, at, inside))
        c2 = _tanh(_number(parameters_ptr + 9 * step, at, inside))
        mean = _number(parameters_ptr + 4 * step, at, inside) + c0 * red
        value, by_green, by_green_scale = _logistic(green, mean, _number(parameters_ptr + 5 * step, at, inside), half)
        joint += value
        mean = _number(parameters_ptr + 7 * step, at, inside) + c1 * red + c2 * green
        value, by_blue, by_blue_scale = _logistic(blue, mean, _number(parameters_ptr + 8 * step, at, inside), half)
        joint += value
    joint += logits
    g = tl.load(grad_ptr + pixel, exists, other=0.0)[:, None]
    share = g * tl.exp(joint - _log_sum_exp(joint)[:, None])
    to = to_parameters_ptr
    tl.store(to + at, share - g * tl.exp(logits - _log_sum_exp(logits)[:, None]), inside)
    tl.store(to + step + at, share * by_mean, inside)
    tl.store(to + 2 * step + at, share * by_scale, inside)
    if CHANNELS == 3:
        tl.store(to + 3 * step + at, share * by_green * red * (1.0 - c0 * c0), inside)
        tl.store(to + 4 * step + at, share * by_green, inside)
        tl.store(to + 5 * step + at, share * by_green_scale, inside)
        tl.store(to + 6 * step + at, share * by_blue * red * (1.0 - c1 * c1), inside)
        tl.store(to + 7 * step + at, share * by_blue, inside)
        tl.store(to + 8 * step + at, share * by_blue_scale, inside)
        tl.store(to + 9 * step + at, share * by_blue * green * (1.0 - c2 * c2), inside)


# ---- Categorical: logits [outer, levels, plane]


@triton.jit(do_not_specialize=_FREE)
def categorical_kernel(
    out_ptr, normaliser_ptr, x_ptr, logits_ptr, pixels: tl.int64, plane: tl.int32, levels: tl.int32,
    LAST: tl.constexpr, PIXELS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Log-probability of x and log sum exp of the logits, LEVELS at a time; LAST: the plane is one pixel."""
    pixel, exists, at, x = _positions(x_ptr, pixels, plane, levels, LAST, PIXELS)
    top = tl.full((PIXELS,), -float("inf"), tl.float32)
    total = tl.zeros((PIXELS,), tl.float32)
    chosen = tl.zeros((PIXELS,), tl.float32)
    for start in range(0, levels, LEVELS):
        level = start + tl.arange(0, LEVELS)[None, :]
        logits = _logits(logits_ptr, at, level, plane, levels, exists, LAST)
        higher = tl.maximum(top, tl.max(logits, axis=1))
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(logits - shift[:, None]), axis=1)
        chosen += tl.sum(tl.where(level == x[:, None], logits, 0.0), axis=1)
        top = higher
    normaliser = tl.where(top == -float("inf"), 0.0, top) + tl.log(total)
    valid = (x >= 0) & (x < levels)
    tl.store(out_ptr + pixel, tl.where(valid, chosen - normaliser, float("nan")), exists)
    tl.store(normaliser_ptr + pixel, normaliser, exists)


@triton.jit
def _positions(x_ptr, pixels, plane, levels, LAST: tl.constexpr, PIXELS: tl.constexpr):
    """Pixels of the program, which exist, where their first logit is, and x."""
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    if LAST:
        at = pixel * levels
    else:
        sample, after, place = sample_and_place(tl.program_id(0).to(tl.int64) * PIXELS, plane, PIXELS)
        at = (sample + after) * levels * plane + place
    exists = pixel < pixels
    return pixel, exists, at, tl.load(x_ptr + pixel, exists, other=0)


@triton.jit
def _logits(logits_ptr, at, level, plane, levels, exists, LAST: tl.constexpr):
    """Tile ``[pixels, levels]``; -inf beyond the last level."""
    place = at[:, None] + (level if LAST else level.to(tl.int64) * plane)
    return tl.load(logits_ptr + place, exists[:, None] & (level < levels), other=-float("inf")).to(tl.float32)


@triton.jit(do_not_specialize=_FREE)
def categorical_backward_kernel(
    to_logits_ptr, grad_ptr, x_ptr, logits_ptr, normaliser_ptr, pixels: tl.int64, plane: tl.int32, levels: tl.int32,
    LAST: tl.constexpr, PIXELS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """g (one-hot of x - softmax)."""
    pixel, exists, at, x = _positions(x_ptr, pixels, plane, levels, LAST, PIXELS)
    g = tl.load(grad_ptr + pixel, exists, other=0.0)
    g = tl.where((x >= 0) & (x < levels), g, float("nan"))[:, None]
    normaliser = tl.load(normaliser_ptr + pixel, exists, other=0.0)[:, None]
    for start in range(0, levels, LEVELS):
        level = start + tl.arange(0, LEVELS)[None, :]
        logits = _logits(logits_ptr, at, level, plane, levels, exists, LAST)
        gradient = g * (tl.where(level == x[:, None], 1.0, 0.0) - tl.exp(logits - normaliser))
        to = at[:, None] + (level if LAST else level.to(tl.int64) * plane)
        tl.store(to_logits_ptr + to, gradient, exists[:, None] & (level < levels))
