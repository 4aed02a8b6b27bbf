"""The sampler op in Triton: fused steps, the forward process and its loss, with Philox noise drawn in registers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 1024  # elements of a program: two 16-byte accesses of a thread and float32 tensor, one of a 16-bit tensor
_WARPS = 4
_TILES = ((4, 256), (64, 16), (_TILE, 1))  # (columns, rows): short samples share a program
_STEP_COLUMNS, _TRAINING_COLUMNS = 12, 8

# Numbers that change from call to call: a kernel compiled for one value of them would not be used again.
_FREE = ("batch", "elements", "seed", "step", "key_step", "first_sample", "steps", "stream")


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    """Ten rounds of Philox4x32. One widening product costs half of the pair (umulhi, mul) on the device."""
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _uniform(word):
    """A word to a number in (0, 1]."""
    return word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10


@triton.jit
def _sincos(turns):
    """``sin(2 pi u), cos(2 pi u)`` for u in [0, 1]; the reduction is exact, the polynomials are those of Cephes."""
    quarter = tl.floor(turns * 4.0 + 0.5)
    q = quarter.to(tl.int32)
    a = (turns * 4.0 - quarter) * 1.5707963267948966
    z = a * a
    s = a + a * z * (-1.6666654611e-1 + z * (8.3321608736e-3 + z * -1.9515295891e-4))
    c = 1.0 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
    odd = (q & 1) != 0
    sine = tl.where(odd, c, s)
    cosine = tl.where(odd, s, c)
    return tl.where((q & 2) != 0, -sine, sine), tl.where(((q + 1) & 2) != 0, -cosine, cosine)


@triton.jit
def _box_muller(radius_word, angle_word):
    radius = tl.sqrt(-2.0 * tl.log(_uniform(radius_word)))
    sine, cosine = _sincos(_uniform(angle_word))
    return radius * cosine, radius * sine


@triton.jit
def _in_order(g0, g1, g2, g3):
    """Four ``[rows, groups]`` to ``[rows, 4 groups]``: element e is entry e // 4 of ``g[e % 4]``."""
    return tl.interleave(tl.interleave(g0, g2), tl.interleave(g1, g3))


@triton.jit
def _words(
    row, first_group, step, seed_ptr, seed, key_step_ptr, key_step, samples_ptr, first_sample, stream,
    KEY_STEP_PER_ROW: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The Philox words of ``GROUPS`` groups of four elements of every row, from ``first_group`` on."""
    seed = seed.to(tl.int64) if seed_ptr is None else tl.load(seed_ptr)
    c1 = key_step + step
    if key_step_ptr is not None:
        c1 += tl.load(key_step_ptr + row) if KEY_STEP_PER_ROW else tl.load(key_step_ptr)
    sample = first_sample + row if samples_ptr is None else tl.load(samples_ptr + row)
    c0 = (first_group + tl.arange(0, GROUPS)[None, :]).to(tl.uint32)
    c3 = (stream << 24) | ((sample >> 32) & 0xFFFFFF)
    return _philox(
        c0, c1.to(tl.uint32), sample.to(tl.uint32), c3.to(tl.uint32), seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    )


@triton.jit
def _normal(
    row, first_group, step, seed_ptr, seed, key_step_ptr, key_step, samples_ptr, first_sample, stream,
    KEY_STEP_PER_ROW: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    w0, w1, w2, w3 = _words(
        row, first_group, step, seed_ptr, seed, key_step_ptr, key_step, samples_ptr, first_sample, stream,
        KEY_STEP_PER_ROW, GROUPS,
    )  # fmt: skip
    n0, n1 = _box_muller(w0, w1)
    n2, n3 = _box_muller(w2, w3)
    return _in_order(n0, n1, n2, n3)
