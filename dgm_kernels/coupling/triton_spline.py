"""Triton kernels of the rational-quadratic spline.

Raw parameters are read and gradients written in the order of memory; in between a thread has one element and keeps all
of its bins in registers. Sums over samples are as in ``triton_affine.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers that change from call to call: a kernel must not be compiled for their value.
_FREE = (
    "batch", "elements", "blocks", "end", "bound", "least_width", "least_height", "min_derivative",
)  # fmt: skip


@triton.jit
def _elements(batch, elements, blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows, places in the tensor and which of them exist, all of shape ``[ROWS * COLUMNS]``."""
    program = tl.program_id(0)
    row_block = program // blocks
    lane = tl.arange(0, ROWS * COLUMNS)
    row = row_block.to(tl.int64) * ROWS + lane // COLUMNS
    column = (program - row_block * blocks).to(tl.int64) * COLUMNS + lane % COLUMNS
    return row, row * elements + column, (row < batch) & (column < elements)


@triton.jit
def _store_logdet(logdet_ptr, log_slope, exists, batch, blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The tile's part of the sum over each of its samples."""
    program = tl.program_id(0)
    row_block = program // blocks
    row = row_block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.sum(tl.reshape(tl.where(exists, log_slope, 0.0), [ROWS, COLUMNS]), axis=1)
    tl.store(logdet_ptr + row * blocks + (program - row_block * blocks), total, row < batch)


@triton.jit
def _columns(tile, SIZE: tl.constexpr, LEVELS: tl.constexpr):
    """The columns of a tile ``[SIZE, 2 ** LEVELS]`` as a tuple: a thread that has an element gets all of its bins."""
    parts = (tile,)
    for level in tl.static_range(LEVELS):
        halves = ()
        for i in tl.static_range(1 << level):
            if level + 1 < LEVELS:
                pairs = tl.permute(tl.reshape(parts[i], [SIZE, 2, 1 << (LEVELS - level - 1)]), [0, 2, 1])
                low, high = tl.split(pairs)
            else:
                low, high = tl.split(parts[i])
            halves += (low, high)
        parts = halves
    return parts


@triton.jit
def _tile(columns, SIZE: tl.constexpr, LEVELS: tl.constexpr):
    """The inverse of ``_columns``."""
    parts = columns
    for level in tl.static_range(LEVELS):
        joined = ()
        for i in tl.static_range(1 << (LEVELS - level - 1)):
            joined += (tl.reshape(tl.join(parts[i], parts[i + (1 << (LEVELS - level - 1))]), [SIZE, 2 << level]),)
        parts = joined
    return parts[0]


@triton.jit
def _softmax(raw, total, K: tl.constexpr):
    """``total softmax(raw)`` of columns."""
    largest = raw[0]
    for j in tl.static_range(1, K):
        largest = tl.maximum(largest, raw[j])
    weights = ()
    weight_sum = tl.zeros_like(largest)
    for j in tl.static_range(K):
        weight = tl.exp(raw[j] - largest)
        weights += (weight,)
        weight_sum += weight
    factor = total / weight_sum
    shares = ()
    for j in tl.static_range(K):
        shares += (weights[j] * factor,)
    return shares


@triton.jit
def _shares(ptr, at, exists, least, STRIDE: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr, LEVELS: tl.constexpr):
    """What the bins of every element have of the domain beyond the least, from their raw sizes."""
    j = tl.arange(0, 1 << LEVELS)[None, :]
    there = exists[:, None] if 1 << LEVELS == K else exists[:, None] & (j < K)
    raw = tl.load((ptr + at * STRIDE)[:, None] + j, there, other=0.0).to(tl.float32)
    return _softmax(_columns(raw, SIZE, LEVELS), 1.0 - K * least, K)


@triton.jit
def _search(shares, least, u, bound, K: tl.constexpr):
    """The bin of u, its left end and its size; a bin has ``least`` of the domain and its share of the rest.

    These are added as whole numbers of 2^-30, from the middle of the domain: the sum is exact, and a knot is rounded
    once, where a sum of floats would lose what a steep bin makes much of.
    """
    whole = tl.zeros_like(u).to(tl.int32) - 0x20000000
    k = tl.zeros_like(u).to(tl.int32)
    left = tl.zeros_like(u) - bound
    share = shares[0]
    for j in tl.static_range(1, K):
        whole += ((least + shares[j - 1]) * 1073741824.0).to(tl.int32)
        knot = whole.to(tl.float32) * (bound * 1.862645149230957e-09)  # 2^-29
        past = u >= knot
        k = tl.where(past, j, k)
        left = tl.where(past, knot, left)
        share = tl.where(past, shares[j], share)
    return k, left, 2.0 * bound * (least + share)


@triton.jit
def _pick(shares, least, k, bound, K: tl.constexpr):
    """Left end and size of bin k, as ``_search`` finds them."""
    whole = tl.zeros_like(k) - 0x20000000
    place = whole
    share = shares[0]
    for j in tl.static_range(1, K):
        whole += ((least + shares[j - 1]) * 1073741824.0).to(tl.int32)
        place = tl.where(k >= j, whole, place)
        share = tl.where(k >= j, shares[j], share)
    return place.to(tl.float32) * (bound * 1.862645149230957e-09), 2.0 * bound * (least + share)


@triton.jit
def _slope_at(ptr, at, knot, exists, min_derivative, STRIDE: tl.constexpr, K: tl.constexpr, TAILS: tl.constexpr):
    """The derivative at a knot and its raw value. With tails those at the ends are 1 and not in memory."""
    if TAILS:
        inner = (knot > 0) & (knot < K)
        raw = tl.load(ptr + at * STRIDE + knot - 1, exists & inner, other=0.0).to(tl.float32)
        return tl.where(inner, min_derivative + _softplus(raw), 1.0), raw
    else:
        raw = tl.load(ptr + at * STRIDE + knot, exists, other=0.0).to(tl.float32)
        return min_derivative + _softplus(raw), raw


@triton.jit
def _softplus(a):
    """The logarithm of the rounded 1 + e is put right by the rounding's share: exact for small e too."""
    e = tl.exp(-tl.abs(a))
    rounded = 1.0 + e
    log1p = tl.where(rounded == 1.0, e, tl.log(rounded) * (e / (rounded - 1.0)))
    return tl.maximum(a, 0.0) + log1p


@triton.jit
def _clamp(value, low, high):
    """Like torch.clamp: NaN stays NaN."""
    value = tl.maximum(value, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(value, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _solve_bin(theta, s, d0, d1):
    """xi and 1 - xi from theta = (y - y_k) / h; see ``reference._inverse_bin``."""
    up = 1.0 - theta
    r = d0 * up - d1 * theta
    large = tl.sqrt(r * r + 4.0 * s * s * theta * up) + tl.abs(r)
    rising = r >= 0.0
    part = 2.0 * s * tl.where(rising, theta, up)
    share = part / (part + large)
    other = large / (part + large)
    return tl.where(rising, share, other), tl.where(rising, other, share)


@triton.jit
def _slope_terms(xi, rest, s, d0, d1):
    """N and D of the slope s^2 N / D^2; both are sums of positive terms."""
    mixed = xi * rest
    numerator = d1 * xi * xi + 2.0 * s * mixed + d0 * rest * rest
    return numerator, s * (1.0 - 2.0 * mixed) + (d0 + d1) * mixed


@triton.jit
def _find_bin(
    u, at, exists, widths, heights, derivatives_ptr, settings, DERIVATIVE_STRIDE: tl.constexpr, K: tl.constexpr,
    TAILS: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """The number k of the bin of u, the bin (x_k, y_k, w, h, d0, d1), and the place of u in it (xi, 1 - xi).

    For the gradients also the raw derivatives at both of its ends.
    """
    bound, least_width, least_height, min_derivative = settings
    if INVERSE:
        k, y_k, h = _search(heights, least_height, u, bound, K)
        x_k, w = _pick(widths, least_width, k, bound, K)
    else:
        k, x_k, w = _search(widths, least_width, u, bound, K)
        y_k, h = _pick(heights, least_height, k, bound, K)
    d0, raw0 = _slope_at(derivatives_ptr, at, k, exists, min_derivative, DERIVATIVE_STRIDE, K, TAILS)
    d1, raw1 = _slope_at(derivatives_ptr, at, k + 1, exists, min_derivative, DERIVATIVE_STRIDE, K, TAILS)
    if INVERSE:  # the clamps: rounding of the knots could leave the bin
        xi, rest = _solve_bin(_clamp((u - y_k) / h, 0.0, 1.0), h / w, d0, d1)
    else:
        xi = _clamp((u - x_k) / w, 0.0, 1.0)
        rest = 1.0 - xi
    return k, x_k, y_k, w, h, d0, d1, xi, rest, raw0, raw1


@triton.jit(do_not_specialize=_FREE)
def spline_kernel(
    out_ptr, logdet_ptr, x_ptr, widths_ptr, heights_ptr, derivatives_ptr, end: tl.float32,
    bound: tl.float32, least_width: tl.float32, least_height: tl.float32, min_derivative: tl.float32,
    batch: tl.int64, elements: tl.int64, blocks: tl.int32,
    WIDTH_STRIDE: tl.constexpr, HEIGHT_STRIDE: tl.constexpr, DERIVATIVE_STRIDE: tl.constexpr,
    K: tl.constexpr, LEVELS: tl.constexpr, TAILS: tl.constexpr, INVERSE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The spline or its inverse, and the tile's part of the log-determinant. ``end``: the bound in the dtype of y."""
    _, at, exists = _elements(batch, elements, blocks, ROWS, COLUMNS)
    x = tl.load(x_ptr + at, exists, other=0.0).to(tl.float32)
    inside = tl.abs(x) <= bound
    widths = _shares(widths_ptr, at, exists, least_width, WIDTH_STRIDE, K, ROWS * COLUMNS, LEVELS)
    heights = _shares(heights_ptr, at, exists, least_height, HEIGHT_STRIDE, K, ROWS * COLUMNS, LEVELS)
    u = tl.where(inside, x, 0.0)
    settings = (bound, least_width, least_height, min_derivative)
    _, x_k, y_k, w, h, d0, d1, xi, rest, _, _ = _find_bin(
        u, at, exists, widths, heights, derivatives_ptr, settings, DERIVATIVE_STRIDE, K, TAILS, INVERSE
    )
    s = h / w
    numerator, denominator = _slope_terms(xi, rest, s, d0, d1)
    log_slope = tl.log(numerator * (s / denominator) * (s / denominator))
    if INVERSE:
        y = x_k + w * xi
        log_slope = -log_slope
    else:
        y = y_k + h * xi * (s * xi + d0 * rest) / denominator
    outside = x if TAILS else tl.full(x.shape, float("nan"), tl.float32)
    tl.store(out_ptr + at, tl.where(inside, _clamp(y, -end, end), outside), exists)
    # A NaN is nowhere: it is not "outside", where a spline with tails has slope 1.
    log_slope = tl.where(inside, log_slope, tl.where(outside == outside, 0.0, outside))
    _store_logdet(logdet_ptr, log_slope, exists, batch, blocks, ROWS, COLUMNS)


# ---- Gradients


@triton.jit
def _store_columns(ptr, columns, at, exists, COUNT: tl.constexpr, SIZE: tl.constexpr, LEVELS: tl.constexpr):
    """The first COUNT of ``2 ** LEVELS`` columns, as rows of contiguous memory."""
    j = tl.arange(0, 1 << LEVELS)[None, :]
    there = exists[:, None] if 1 << LEVELS == COUNT else exists[:, None] & (j < COUNT)
    tl.store((ptr + at * COUNT)[:, None] + j, _tile(columns, SIZE, LEVELS), there)


@triton.jit
def _raw_size_gradients(shares, least, k, left, size, to_left, to_size, bound, K: tl.constexpr, LEVELS: tl.constexpr):
    """From the left end and the size of bin k to all raw sizes: the bins before it add up to its end; softmax."""
    before = (left + bound) / (2.0 * bound) - k.to(tl.float32) * least
    mean = (to_left * before + to_size * (size / (2.0 * bound) - least)) / (1.0 - K * least)
    columns = ()
    for j in tl.static_range(1 << LEVELS):
        if j < K:
            to_bin = tl.where(k > j, to_left, tl.where(k == j, to_size, 0.0))
            columns += (2.0 * bound * shares[j] * (to_bin - mean),)
        else:
            columns += (tl.zeros_like(mean),)
    return columns


@triton.jit
def _raw_slope_gradients(first, to_first, to_second, COUNT: tl.constexpr):
    """Those of two neighbours, 0 elsewhere."""
    columns = ()
    for j in tl.static_range(COUNT):
        columns += (tl.where(first == j, to_first, tl.where(first == j - 1, to_second, 0.0)),)
    return columns


@triton.jit
def _bin_gradients(a, b, h, w, d0, d1, xi, rest):
    """Gradients of ``a y + b log dy/dx``: with respect to x, s = h / w, d0, d1, and h by way of y alone; then dy/dx."""
    s = h / w
    mixed = xi * rest
    turn = rest - xi  # d mixed / d xi
    numerator, denominator = _slope_terms(xi, rest, s, d0, d1)
    ratio = s / denominator
    slope = numerator * ratio * ratio
    to_log = 2.0 * ((d1 * xi + s * turn - d0 * rest) / numerator - (d0 + d1 - 2.0 * s) * turn / denominator)
    to_x = a * slope + b * to_log / w
    part = xi * (s * xi + d0 * rest) / denominator  # (y - y_k) / h
    scaled = a * h * mixed / denominator
    to_s = scaled * (d1 * xi * xi - d0 * rest * rest) / denominator
    to_s += 2.0 * b * (mixed / numerator + 1.0 / s - (1.0 - 2.0 * mixed) / denominator)
    common = 2.0 * b * mixed / denominator
    to_d0 = scaled * (1.0 - part) + b * rest * rest / numerator - common
    to_d1 = b * xi * xi / numerator - scaled * part - common
    return to_x, to_s, to_d0, to_d1, a * part, slope


@triton.jit(do_not_specialize=_FREE)
def spline_backward_kernel(
    to_x_ptr, to_widths_ptr, to_heights_ptr, to_derivatives_ptr, grad_ptr, grad_logdet_ptr,
    x_ptr, widths_ptr, heights_ptr, derivatives_ptr,
    bound: tl.float32, least_width: tl.float32, least_height: tl.float32, min_derivative: tl.float32,
    batch: tl.int64, elements: tl.int64, blocks: tl.int32,
    WIDTH_STRIDE: tl.constexpr, HEIGHT_STRIDE: tl.constexpr, DERIVATIVE_STRIDE: tl.constexpr,
    K: tl.constexpr, LEVELS: tl.constexpr, TAILS: tl.constexpr, INVERSE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of x and of the raw parameters.

    The inverse x(y, p) of y(x, p) with slope f has dx/dp = -(dy/dp) / f and dx/dy = 1 / f: what reaches x, by way of
    log f too, reaches y divided by f, and the parameters as by way of y(x, p) with the sign turned.
    """
    row, at, exists = _elements(batch, elements, blocks, ROWS, COLUMNS)
    widths = _shares(widths_ptr, at, exists, least_width, WIDTH_STRIDE, K, ROWS * COLUMNS, LEVELS)
    heights = _shares(heights_ptr, at, exists, least_height, HEIGHT_STRIDE, K, ROWS * COLUMNS, LEVELS)
    g = tl.load(grad_ptr + at, exists, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at, exists, other=0.0).to(tl.float32)
    inside = tl.abs(x) <= bound
    b = tl.zeros_like(g)
    if grad_logdet_ptr is not None:
        b = tl.load(grad_logdet_ptr + row, exists & inside, other=0.0)
    u = tl.where(inside, x, 0.0)
    settings = (bound, least_width, least_height, min_derivative)
    k, x_k, y_k, w, h, d0, d1, xi, rest, raw0, raw1 = _find_bin(
        u, at, exists, widths, heights, derivatives_ptr, settings, DERIVATIVE_STRIDE, K, TAILS, INVERSE
    )
    a = tl.where(inside, g, 0.0)
    if INVERSE:
        to_left = a
        bend, _, _, _, _, slope = _bin_gradients(0.0, b, h, w, d0, d1, xi, rest)
        a = (bend - a) / slope
        b = -b
        to_input = -a
        _, to_s, to_d0, to_d1, to_h, _ = _bin_gradients(a, b, h, w, d0, d1, xi, rest)
    else:
        to_input, to_s, to_d0, to_d1, to_h, _ = _bin_gradients(a, b, h, w, d0, d1, xi, rest)
        to_left = -to_input
    outside = g if TAILS else tl.full(g.shape, float("nan"), tl.float32)
    tl.store(to_x_ptr + at, tl.where(inside, to_input, outside), exists)
    of_widths = _raw_size_gradients(
        widths, least_width, k, x_k, w, to_left, to_left * xi - to_s * (h / w) / w, bound, K, LEVELS
    )
    _store_columns(to_widths_ptr, of_widths, at, exists, K, ROWS * COLUMNS, LEVELS)
    of_heights = _raw_size_gradients(heights, least_height, k, y_k, h, a, to_h + to_s / w, bound, K, LEVELS)
    _store_columns(to_heights_ptr, of_heights, at, exists, K, ROWS * COLUMNS, LEVELS)
    SLOPE_LEVELS: tl.constexpr = LEVELS if TAILS or K + 1 <= 1 << LEVELS else LEVELS + 1
    of_slopes = _raw_slope_gradients(
        k - 1 if TAILS else k, to_d0 * tl.sigmoid(raw0), to_d1 * tl.sigmoid(raw1), 1 << SLOPE_LEVELS
    )
    _store_columns(to_derivatives_ptr, of_slopes, at, exists, K - 1 if TAILS else K + 1, ROWS * COLUMNS, SLOPE_LEVELS)
