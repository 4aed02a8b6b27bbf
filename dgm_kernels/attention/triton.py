"""Launchers of the attention op's Triton kernels, and the forms of them to compile ahead of time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .._core.triton import Grid, launch
from . import triton_sizes as sizes
from .op import Settings, empty_like_queries, last_contiguous
from .triton_backward import delta_kernel, key_grad_kernel, query_grad_kernel, ranges_kernel
from .triton_decode import combine_kernel, decode_kernel
from .triton_forms import aot_specs as aot_specs
from .triton_forward import forward_kernel
from .triton_jvp import jvp_kernel
from .triton_rotate import rotate_kernel
from .triton_sizes import Form, Tile

_LOG2E = 1.4426950408889634
_LARGEST = 1 << 30  # widths and radii from here on reach all tokens
_ROWS = 32  # of the kernel that sums over results
_STEP = 1024  # queries at a time, whose bounds are read
_PROGRAMS = 512  # of a decoding step: enough for the largest GPUs, and the same on all
_MOST_SPLITS = 128
_LEAST_KEYS = 128  # of a split


def _programs(count: int) -> Grid:
    """Programs of a kernel that takes its own numbers and tile sizes."""
    return Grid((count, 1, 1), (), ())  # type: ignore[arg-type]


def _is_tf32(x: Tensor) -> bool:
    """Whether a product of float32 matrices would use tf32."""
    return x.is_cuda and x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def _kind(x: Tensor) -> str:
    if x.dtype != torch.float32:
        return "half"
    return "tf32" if _is_tf32(x) else "fp32"


def _vector(tensors: Sequence[Tensor]) -> int:
    """Elements up to 16 bytes of which all distances between rows are a multiple."""
    return math.gcd(16 // tensors[0].element_size(), *(n for t in tensors for n in _used_steps(t)))


def _used_steps(x: Tensor) -> list[int]:
    """Distances along all dimensions but the last that have more than one entry."""
    return [step for step, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]


def _steps(tensors: Sequence[Tensor]) -> list[int]:
    """Distances of batches, heads and rows."""
    return [step for t in tensors for step in t.stride()[:3]]


class _Call(NamedTuple):
    """What the kernels take of a call, whichever they are."""

    tensors: tuple[Tensor | None, ...]  # bounds, mask, bias, slopes
    sizes: tuple[int, ...]
    scale: float  # in powers of 2
    steps: tuple[int, ...]  # of mask and bias
    near: bool
    how: tuple[int, int]  # mask and bias are read, see load_dense
    form: Form
    parts: tuple[int, ...]

    def tile(self, table: Callable[[Form], Tile]) -> Tile:
        return table(self.form)


def _call(q: Tensor, k: Tensor, v: Tensor, s: Settings) -> _Call:
    keep, bias = s.keep, s.bias
    steps = tuple(step for t in (keep, bias) for step in ((0,) * 4 if t is None else t.stride()))
    near = s.bounds is not None and s.width > 0
    how = (_how(keep, near), _how(bias, near))
    width = min(s.width, _LARGEST)
    kind = _kind(q)
    features = (q.shape[3], v.shape[3])
    form = Form(max(features), kind, _density(keep, bias, how), near, sizes.capability(q.device))
    return _Call(
        (None if s.bounds is None else s.bounds.contiguous(), keep, bias, s.slopes),
        (q.shape[2], k.shape[2], q.shape[1], q.shape[1] // k.shape[1], s.first, width, min(s.radius, width)),
        s.scale * _LOG2E,
        steps,
        near,
        how,
        form,
        (*features, *(sizes.wide(n, kind) for n in features)),
    )


def _how(x: Tensor | None, near: bool) -> int:
    """How the kernels read a mask or a bias; see ``load_dense``."""
    if x is None or (x.stride(3) != 1 and x.shape[3] > 1):
        return -1
    if x.stride(2) == 0 or x.shape[2] == 1:
        return 0
    return -1 if near else math.gcd(16 // x.element_size(), x.shape[3], *_used_steps(x))


def _density(keep: Tensor | None, bias: Tensor | None, how: tuple[int, int]) -> int:
    """0 without a mask and a bias, 1 with some that are read in long pieces, 2 otherwise."""
    return max((0 if x is None else 2 if n in (-1, 1, 2) else 1) for x, n in zip((keep, bias), how, strict=True))


def _rotated(x: Tensor, s: Settings, first: int) -> Tensor:
    """``x`` at its positions from ``first`` on."""
    if s.rope is None or s.rope.shape[1] == 0:
        return x
    return _turn(empty_like_queries(x, x.shape[3]), x, s, first, back=False)


def _turn(to: Tensor, x: Tensor, s: Settings, first: int, back: bool) -> Tensor:
    assert s.rope is not None
    if to.numel():
        length, features = x.shape[2:]
        numbers = (length, x.shape[1], first, *_steps((to, x)))
        wide = triton.next_power_of_2(features)
        rows = max(1, 4096 // wide)
        constants = (features, s.rope.shape[1], s.interleaved, back, _vector((to, x)), rows, wide)
        grid = _programs(-(-length // rows) * x.shape[0] * x.shape[1])
        launch(rotate_kernel, grid, (to, x, s.rope.contiguous()), numbers, constants)
    return to


def attention(q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    """``dgm::attention.triton``; see :func:`dgm_kernels.attention`."""
    s = Settings(*settings)
    out = empty_like_queries(q, v.shape[3])
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse
    q, k, v = _rotated(last_contiguous(q), s, s.first), _rotated(last_contiguous(k), s, 0), last_contiguous(v)
    call = _call(q, k, v, s)
    tile = call.tile(sizes.forward)
    rows = (out, q, k, v)
    numbers = (*call.sizes, abs(call.scale), *_steps(rows), *call.steps)
    flags = (call.near, call.scale < 0, *call.how, call.form.kind == "tf32", _vector(rows))
    constants = (*call.parts, *flags, tile.stages, tile.queries, tile.keys)
    grid = _programs(-(-q.shape[2] // tile.queries) * q.shape[0] * q.shape[1])
    launch(forward_kernel, grid, (out, lse, q, k, v, *call.tensors), numbers, constants, tile.warps)
    return out, lse


def attention_backward(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """``dgm::attention_backward.triton``: gradients of q, k and v."""
    s = Settings(*settings)
    results = tuple(empty_like_queries(t, t.shape[3]) for t in (q, k, v))
    if 0 in (q.shape[0], q.shape[1]):
        return tuple(t.zero_() for t in results)  # type: ignore[return-value]
    grad, q, k, v, out = (last_contiguous(t) for t in (grad, q, k, v, out))
    turned = s.rope is not None and s.rope.shape[1] > 0
    q, k, lse = _rotated(q, s, s.first), _rotated(k, s, 0), lse.contiguous()
    to_q, to_k, to_v = (torch.empty_like(results[0]), torch.empty_like(results[1]), results[2]) if turned else results
    call = _call(q, k, v, s)
    delta = _delta(grad, grad_lse, out, lse, call)
    bounds, *dense = call.tensors
    flags = (call.near, *call.how, call.form.kind == "tf32")
    if q.shape[2]:
        tile, rows = call.tile(sizes.query_grad), (to_q, grad, q, k, v)
        grid = _programs(-(-q.shape[2] // tile.queries) * q.shape[0] * q.shape[1])
        numbers = (*call.sizes, call.scale, s.scale, *_steps(rows), *call.steps)
        constants = (*call.parts, *flags, _vector(rows), tile.stages, tile.queries, tile.keys)
        launch(query_grad_kernel, grid, (*rows, lse, delta, *call.tensors), numbers, constants, tile.warps)
    if k.shape[2]:
        tile, read = call.tile(sizes.key_grad), (to_k, to_v, grad, q, k, v)
        blocks = -(-k.shape[2] // tile.keys)
        ranges = _ranges(bounds, q.shape[2], k.shape[2], tile.keys, blocks)
        tensors = (*read, lse, delta, bounds, ranges, *dense)
        numbers = (*call.sizes, call.scale, s.scale, *_steps(read), *call.steps)
        constants = (*call.parts, *flags, _vector(read), tile.stages, tile.queries, tile.keys)
        launch(key_grad_kernel, _programs(blocks * k.shape[0] * k.shape[1]), tensors, numbers, constants, tile.warps)
    if turned:
        _turn(results[0], to_q, s, s.first, back=True)
        _turn(results[1], to_k, s, 0, back=True)
    return results  # type: ignore[return-value]


def _delta(grad: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, call: _Call) -> Tensor:
    delta = torch.empty(grad.shape[:3], dtype=torch.float32, device=grad.device)
    if delta.numel():
        rows = (grad, out)
        numbers = (grad.shape[2], grad.shape[1], *_steps(rows))
        constants = (call.parts[1], call.parts[3], _vector(rows), _ROWS)
        grid = _programs(-(-grad.shape[2] // _ROWS) * grad.shape[0] * grad.shape[1])
        if grad_lse is not None:  # that of a query without keys does not count, whatever it is
            grad_lse = torch.where(lse == -math.inf, 0.0, grad_lse.to(torch.float32)).contiguous()
        launch(delta_kernel, grid, (delta, *rows, grad_lse), numbers, constants)
    return delta


def _ranges(bounds: Tensor | None, queries: int, keys: int, size: int, blocks: int) -> Tensor | None:
    """For each tile of keys which queries see it."""
    if bounds is None:
        return None
    ranges = torch.empty((blocks, 4), dtype=torch.int32, device=bounds.device)
    launch(ranges_kernel, _programs(blocks), (ranges, bounds), (queries, keys), (size, _STEP))
    return ranges


def attention_jvp(
    q: Tensor, k: Tensor, v: Tensor, tq: Tensor, tk: Tensor, tv: Tensor, out: Tensor, lse: Tensor, *settings: Any
) -> tuple[Tensor, Tensor]:
    """``dgm::attention_jvp.triton``: the derivatives of the result and of the log of the softmax's denominator."""
    s = Settings(*settings)
    to = empty_like_queries(q, v.shape[3])
    mean = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if mean.numel() == 0:
        return to, mean
    q, k, v, tq, tk, tv, out = (last_contiguous(t) for t in (q, k, v, tq, tk, tv, out))
    q, tq, k, tk = _rotated(q, s, s.first), _rotated(tq, s, s.first), _rotated(k, s, 0), _rotated(tk, s, 0)
    call = _call(q, k, v, s)
    tile = call.tile(sizes.jvp)
    rows = (q, tq, k, tk, v, tv, out)
    numbers = (*call.sizes, call.scale, s.scale, *_steps((to, *rows)), *call.steps)
    flags = (call.near, *call.how, call.form.kind == "tf32", _vector((to, *rows)))
    constants = (*call.parts, *flags, tile.stages, tile.queries, tile.keys)
    grid = _programs(-(-q.shape[2] // tile.queries) * q.shape[0] * q.shape[1])
    launch(jvp_kernel, grid, (to, mean, *rows, lse.contiguous(), *call.tensors), numbers, constants, tile.warps)
    return to, mean


# ---- Decoding


def attention_decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    begin: int,
    end: int,
    width: int,
    radius: int,
    slopes: Tensor | None,
    position: int,
    scale: float,
) -> Tensor:
    """``dgm::attention_decode.triton``; see :func:`dgm_kernels.attention_decode`."""
    batch, heads = q.shape[:2]
    features, value_features = q.shape[3], values.shape[3]
    out = q.new_empty((batch, heads, 1, value_features))
    if out.numel() == 0:
        return out
    q, keys, values = q.contiguous(), last_contiguous(keys), last_contiguous(values)
    key_heads = keys.shape[1]
    group = heads // key_heads
    start, run, count = _runs(begin, end, min(width, _LARGEST), radius, position)
    form = Form(max(features, value_features), _kind(q), 0, width > 0, sizes.capability(q.device))
    tile = sizes.decode(form)
    splits = max(1, min(_MOST_SPLITS, _PROGRAMS // (batch * key_heads), count // _LEAST_KEYS))
    each = -(-count // (splits * tile.keys)) * tile.keys
    splits = max(1, -(-count // max(each, 1)))
    shape = (batch * heads, splits)
    sums, largest, total = (
        torch.empty(extra, dtype=torch.float32, device=q.device) if splits > 1 else None
        for extra in ((*shape, value_features), shape, shape)
    )
    rows = (keys, values)
    wide, wide_values = (max(16, triton.next_power_of_2(n)) for n in (features, value_features))
    counts = (heads, group, begin, end, min(width, _LARGEST), radius, position, start, run, count, splits, each)
    constants = (
        *(features, value_features, 0 < 2 * radius + 1 < width, group == 1, _is_tf32(q), _vector(rows), tile.stages),
        *(1 if group == 1 else max(16, triton.next_power_of_2(group)), tile.keys, wide, wide_values),
    )
    tensors = (out, sums, largest, total, q, keys, values, slopes)
    numbers = (*counts, scale * _LOG2E, *_steps(rows))
    launch(decode_kernel, _programs(batch * key_heads * splits), tensors, numbers, constants, tile.warps)
    if splits > 1:
        padded = triton.next_power_of_2(splits)
        part = max(16, min(wide_values, 4096 // padded))
        grid = _programs(batch * heads * -(-value_features // part))
        launch(combine_kernel, grid, tensors[:4], (splits,), (value_features, padded, part))
    return out


def _runs(begin: int, end: int, width: int, radius: int, position: int) -> tuple[int, int, int]:
    """The first key to read, how many in a row, and how many in all; runs begin ``width`` after each other.

    With a width those within ``radius`` of the query once moved by whole rows, as ``near`` in the kernels says.
    """
    run = 2 * radius + 1
    if not width or run >= width:
        return begin, max(1, end - begin), max(0, end - begin)
    least, most = (begin - position - 1 - radius) // width + 1, (end - 1 - position + radius) // width
    return position - radius + least * width, run, max(0, most - least + 1) * run if end > begin else 0
