"""Counter-based noise inside Triton kernels: Philox4x32-10 and Box-Muller; the layout is in docs/design.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Key(NamedTuple):
    """The arguments of a noise key as the kernels take them."""

    tensors: tuple[Tensor | None, ...]  # seed, step, samples
    numbers: tuple[int, ...]  # seed, step, stride of the step tensor, first sample, stream
    drawn: bool


def key_of(noise: Tensor | None, args: Sequence[Any]) -> Key:
    """From the arguments of an op; a given tensor takes the place of the key."""
    seed_tensor, seed, step_tensor, step, samples, first_sample, stream = args
    if noise is not None or stream < 0:
        return Key((None, None, None), (0, 0, 0, 0, 0), False)
    step_stride = int(step_tensor is not None and step_tensor.numel() != 1)
    return Key((seed_tensor, step_tensor, samples), (seed, step, step_stride, first_sample, stream), True)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Ten rounds of Philox4x32. A widening product is one instruction where umulhi and a product are two."""
    for _ in tl.static_range(10):
        p0 = tl.mul(c0.to(tl.uint64), 0xD2511F53, sanitize_overflow=False)
        p1 = tl.mul(c2.to(tl.uint64), 0xCD9E8D57, sanitize_overflow=False)
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def uniform(word):
    """``float32(word) 2^-32 + 2^-33``, in (0, 1]."""
    return word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10


@triton.jit
def minus_two_log(u):
    """``-2 ln(u)`` for u in (0, 1]: a polynomial of its own range, and none of the special cases of ``tl.log``."""
    bits = u.to(tl.int32, bitcast=True)
    offset = bits - 0x3F3504F3  # of sqrt(1/2): u = 2^e (1 + f) with 1 + f from there to sqrt(2)
    e = (offset >> 23).to(tl.float32)
    f = (bits - (offset & -0x800000)).to(tl.float32, bitcast=True) - 1.0
    p = f * 0.08700435608625412 - 0.14267486333847046
    p = p * f + 0.14914767444133759
    p = p * f - 0.1657758504152298
    p = p * f + 0.19963063299655914
    p = p * f - 0.2500133812427521
    p = p * f + 0.3333390951156616
    p = p * f - 0.5
    p = p * (f * f) + f
    return e * -1.3862943611198906 - p * 2.0


@triton.jit
def cos_sin(quarters):
    """Cosine and sine of 0 to 4 quarter turns; polynomials of csrc/common/philox.h."""
    shifted = quarters + 12582912.0  # 1.5 * 2^23: rounds to an integer and leaves it in the low bits
    whole = shifted.to(tl.int32, bitcast=True)
    r = quarters - (shifted - 12582912.0)
    z = r * r
    s = r * (1.5707963705062866 + z * (-0.6459634900093079 + z * (0.07968003302812576 + z * -0.00460165785625577)))
    c = 1.0 + z * (-1.2336976528167725 + z * (0.2536032199859619 + z * -0.020417282357811928))
    odd = (whole & 1) != 0
    cosine = tl.where(odd, s, c)
    sine = tl.where(odd, c, s)
    return tl.where(((whole + 1) & 2) != 0, -cosine, cosine), tl.where((whole & 2) != 0, -sine, sine)


@triton.jit
def normals(w0, w1, w2, w3):
    """Box-Muller: radius from words 0 and 2, angle from words 1 and 3, cosine first."""
    r0 = tl.sqrt(minus_two_log(uniform(w0)))
    r1 = tl.sqrt(minus_two_log(uniform(w2)))
    cos0, sin0 = cos_sin(uniform(w1) * 4.0)
    cos1, sin1 = cos_sin(uniform(w3) * 4.0)
    return r0 * cos0, r0 * sin0, r1 * cos1, r1 * sin1


@triton.jit
def group(c0, c1, c2, c3, k0, k1, KIND: tl.constexpr):
    """Four tensors: normals (KIND 0), uniforms (1) or words (2) of the groups of four elements that ``c0`` counts."""
    w0, w1, w2, w3 = philox(c0, c1, c2, c3, k0, k1)
    if KIND == 0:
        return normals(w0, w1, w2, w3)
    elif KIND == 1:
        return uniform(w0), uniform(w1), uniform(w2), uniform(w3)
    else:
        return w0, w1, w2, w3


@triton.jit
def draw(row, column, step, key, KIND: tl.constexpr, COLUMNS: tl.constexpr, PAIRS: tl.constexpr):
    """The noise of ``COLUMNS`` elements of every row, from ``column`` on.

    Every thread ends up with the elements that it loads and stores, 4 in a row, or 8 with PAIRS (two groups of four):
    nothing goes through shared memory.
    """
    seed_ptr, key_step_ptr, samples_ptr, seed, key_step, key_step_stride, first_sample, stream = key
    k = seed.to(tl.int64) if seed_ptr is None else tl.load(seed_ptr)
    k0 = k.to(tl.uint32)
    k1 = (k >> 32).to(tl.uint32)
    c1 = key_step + step
    if key_step_ptr is not None:
        c1 += tl.load(key_step_ptr + row * key_step_stride)
    c1 = c1.to(tl.uint32)
    sample = first_sample + row if samples_ptr is None else tl.load(samples_ptr + row)
    c2 = sample.to(tl.uint32)
    c3 = (stream << 24 | (sample >> 32 & 0xFFFFFF)).to(tl.uint32)
    first = (column // 4).to(tl.uint32)
    if PAIRS:
        c0 = first + 2 * tl.arange(0, COLUMNS // 8)[None, :].to(tl.uint32)
        a0, a1, a2, a3 = group(c0, c1, c2, c3, k0, k1, KIND)
        b0, b1, b2, b3 = group(c0 + 1, c1, c2, c3, k0, k1, KIND)
        even = tl.interleave(tl.interleave(a0, b0), tl.interleave(a2, b2))
        odd = tl.interleave(tl.interleave(a1, b1), tl.interleave(a3, b3))
    else:
        c0 = first + tl.arange(0, COLUMNS // 4)[None, :].to(tl.uint32)
        a0, a1, a2, a3 = group(c0, c1, c2, c3, k0, k1, KIND)
        even = tl.interleave(a0, a2)
        odd = tl.interleave(a1, a3)
    return tl.interleave(even, odd)
