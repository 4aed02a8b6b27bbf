"""Triton kernels of vector quantisation: distances as products of tiles that never leave the registers."""

from __future__ import annotations

import triton
import triton.language as tl

_FREE = ("rows", "features", "codes", "x_stride", "grad_stride", "splits")


@triton.jit
def _load(ptr, at, exists):
    return tl.load(ptr + at, exists, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=_FREE)
def nearest_kernel(
    indices_ptr, x_ptr, codebook_ptr, mean_ptr, x_stride: tl.int64, rows: tl.int64, features: tl.int64,
    codes: tl.int32, ROWS: tl.constexpr, CODES: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """The index of the least ``|e|^2 / 2 - x.e``, both less the mean of the codes; the lowest of equal ones."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_batch = row < rows
    least = tl.full([ROWS], float("inf"), tl.float32)
    nearest = tl.zeros([ROWS], tl.int32)
    for first in range(0, codes, CODES):
        code = first + tl.arange(0, CODES)
        products = tl.zeros([ROWS, CODES], tl.float32)
        halves = tl.zeros([CODES], tl.float32)
        for begin in range(0, features, FEATURES):
            feature = begin + tl.arange(0, FEATURES)
            inside = feature < features
            mean = _load(mean_ptr, feature, inside)
            x = _load(x_ptr, row[:, None] * x_stride + feature[None, :], in_batch[:, None] & inside[None, :])
            there = (code < codes)[None, :] & inside[:, None]
            e = _load(codebook_ptr, code[None, :].to(tl.int64) * features + feature[:, None], there)
            x = tl.where(inside[None, :], x - mean[None, :], 0.0)
            e = tl.where(there, e - mean[:, None], 0.0)
            products = tl.dot(x, e, products, input_precision="tf32x3")
            halves += 0.5 * tl.sum(e * e, axis=0)
        distance = tl.where((code < codes)[None, :], halves[None, :] - products, float("inf"))
        best = tl.min(distance, axis=1)
        at = tl.min(tl.where(distance == best[:, None], code[None, :], 2147483647), axis=1)
        nearer = best < least  # a later code must be nearer, so that the first of equal ones stays
        least = tl.where(nearer, best, least)
        nearest = tl.where(nearer, at, nearest)
    tl.store(indices_ptr + row, nearest.to(tl.int64), in_batch)


@triton.jit(do_not_specialize=_FREE)
def gather_kernel(
    out_ptr, partial_ptr, counts_ptr, x_ptr, codebook_ptr, indices_ptr,
    x_stride: tl.int64, rows: tl.int64, features: tl.int64, ROWS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """The chosen codes, the program's sum of squared distances, and how often each code was chosen.

    Counts are whole numbers: their sum does not depend on the order of the atomic additions.
    """
    program = tl.program_id(0).to(tl.int64)
    row = program * ROWS + tl.arange(0, ROWS)[:, None]
    in_batch = row < rows
    index = tl.load(indices_ptr + row, in_batch, other=0)
    squares = tl.zeros([ROWS, FEATURES], tl.float32)
    for begin in range(0, features, FEATURES):
        feature = begin + tl.arange(0, FEATURES)[None, :]
        there = in_batch & (feature < features)
        e = _load(codebook_ptr, index * features + feature, there)
        difference = _load(x_ptr, row * x_stride + feature, there) - e
        squares += difference * difference
        tl.store(out_ptr + row * features + feature, e, there)
    tl.store(partial_ptr + program, tl.sum(squares))
    tl.atomic_add(counts_ptr + index, tl.full([ROWS, 1], 1, tl.int64), in_batch)


@triton.jit(do_not_specialize=_FREE)
def row_gradient_kernel(
    to_x_ptr, grad_ptr, grad_losses_ptr, x_ptr, codebook_ptr, indices_ptr,
    grad_stride: tl.int64, x_stride: tl.int64, rows: tl.int64, features: tl.int64,
    ROWS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """``g + 2 l (x - e) / n`` with l the gradient of the commitment loss, a mean over n elements."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    in_batch = row < rows
    index = tl.load(indices_ptr + row, in_batch, other=0)
    factor = tl.load(grad_losses_ptr + 1) * 2.0 / (rows * features).to(tl.float32)
    for begin in range(0, features, FEATURES):
        feature = begin + tl.arange(0, FEATURES)[None, :]
        there = in_batch & (feature < features)
        difference = _load(x_ptr, row * x_stride + feature, there)
        difference -= _load(codebook_ptr, index * features + feature, there)
        to_x = factor * difference
        if grad_ptr is not None:
            to_x += _load(grad_ptr, row * grad_stride + feature, there)
        tl.store(to_x_ptr + row * features + feature, to_x, there)


@triton.jit(do_not_specialize=_FREE)
def code_gradient_kernel(
    partial_ptr, x_ptr, codebook_ptr, indices_ptr, x_stride: tl.int64, rows: tl.int64, features: tl.int64,
    codes: tl.int32, splits: tl.int32, ROWS: tl.constexpr, CODES: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """``sum (e - x)`` over the rows of each code, of one of ``splits`` parts of the rows: a product with 0 and 1.

    A sum in a fixed order, where atomic additions would give other bits in every run.
    """
    split, code_blocks = tl.program_id(0) % splits, tl.cdiv(codes, CODES)
    block = tl.program_id(0) // splits
    code = (block % code_blocks) * CODES + tl.arange(0, CODES)
    feature = (block // code_blocks).to(tl.int64) * FEATURES + tl.arange(0, FEATURES)
    inside = feature < features
    sums = tl.zeros([CODES, FEATURES], tl.float32)
    for first in range(split.to(tl.int64) * ROWS, rows, splits.to(tl.int64) * ROWS):
        row = first + tl.arange(0, ROWS)
        in_batch = row < rows
        index = tl.load(indices_ptr + row, in_batch, other=-1)
        there = in_batch[:, None] & inside[None, :]
        e = _load(codebook_ptr, index[:, None] * features + feature[None, :], there)
        difference = e - _load(x_ptr, row[:, None] * x_stride + feature[None, :], there)
        chosen = (index[None, :] == code[:, None]).to(tl.float32)
        sums = tl.dot(chosen, difference, sums, input_precision="tf32x3")
    at = (split.to(tl.int64) * codes + code[:, None]) * features + feature[None, :]
    tl.store(partial_ptr + at, sums, (code < codes)[:, None] & inside[None, :])
