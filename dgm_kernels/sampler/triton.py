"""The sampler op in Triton: fused steps, the forward process and its loss, with Philox noise drawn in registers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._core.triton import TILE, Grid, Spec, cut, launch, spec
from .._core.triton_noise import draw, key_of

# Numbers that change from call to call: a kernel must not be compiled for their value.
_FREE = (
    "batch", "elements", "blocks", "rows", "step", "step_stride", "guidance_scale",
    "seed", "key_step", "key_step_stride", "first_sample", "stream",
)  # fmt: skip


@triton.jit
def _tile(batch, elements, blocks, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows ``[ROWS, 1]``, first column, offsets ``[ROWS, COLUMNS]``, which of them exist, and which rows do.

    Rows beyond the batch are the last one again, so that what belongs to a row can be loaded without a mask.
    """
    program = tl.program_id(0)
    row_block = program // blocks
    column = (program - row_block * blocks).to(tl.int64) * COLUMNS
    row = row_block.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    elements = elements.to(tl.int64)
    if ALIGNED:
        elements = elements // 8 * 8  # changes nothing, but tells the compiler that rows begin at 16 bytes
    place = tl.arange(0, COLUMNS)[None, :]
    exists = place < tl.minimum(elements - column, COLUMNS).to(tl.int32)
    in_batch = row < batch
    if ROWS > 1:
        exists &= in_batch
        row = tl.minimum(row, batch - 1)
    return row, column, row * elements + column + place, exists, in_batch


@triton.jit
def _table_row(rows_ptr, rows, index, WIDTH: tl.constexpr):
    """A row of the table as (where it begins, whether it exists)."""
    valid = (index >= 0) & (index < rows)
    return rows_ptr + tl.where(valid, index, 0) * WIDTH, valid


@triton.jit
def _column(table_row, COLUMN: tl.constexpr):
    """A coefficient; NaN where the index is out of range."""
    begin, valid = table_row
    return tl.load(begin + COLUMN, mask=valid, other=float("nan"))


@triton.jit
def _clamp(value, low, high):
    """Like torch.clamp: NaN stays NaN."""
    value = tl.maximum(value, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(value, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _load(ptr, at, exists):
    return tl.load(ptr + at, exists, other=0.0).to(tl.float32)


@triton.jit
def _term(coefficient, operand, DRAWN: tl.constexpr):
    """``coefficient * operand``, 0 where the coefficient is 0 even if the operand is NaN; drawn noise never is.

    A given operand is loaded all the same: a load that waits for the coefficient would delay every other step.
    """
    return coefficient * (operand if DRAWN else tl.where(coefficient != 0.0, operand, 0.0))


@triton.jit(do_not_specialize=_FREE)
def _noise_kernel(
    out_ptr, seed_ptr, key_step_ptr, samples_ptr,
    seed: tl.int64, key_step: tl.int64, key_step_stride: tl.int64, first_sample: tl.int64, stream: tl.int64,
    batch: tl.int64, elements: tl.int64, blocks: tl.int32,
    KIND: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Normals (KIND 0), uniforms (1) or words (2)."""
    PAIRS: tl.constexpr = COLUMNS > 4 and out_ptr.dtype.element_ty.primitive_bitwidth == 16
    row, column, at, exists, _ = _tile(batch, elements, blocks, ALIGNED, ROWS, COLUMNS)
    key = (seed_ptr, key_step_ptr, samples_ptr, seed, key_step, key_step_stride, first_sample, stream)
    noise = draw(row, column, 0, key, KIND, COLUMNS, PAIRS)
    if KIND == 2:
        noise = noise.to(tl.int32, bitcast=True)
    tl.store(out_ptr + at, noise, exists)


@triton.jit(do_not_specialize=_FREE)
def _step_kernel(
    out_ptr, clean_ptr, x_ptr, model_output_ptr, noise_ptr, history_ptr, unconditional_ptr, known_ptr, mask_ptr,
    threshold_ptr, rows_ptr, step_ptr, seed_ptr, key_step_ptr, samples_ptr,
    guidance_scale: tl.float32, rows: tl.int64, step: tl.int64, step_stride: tl.int64,
    seed: tl.int64, key_step: tl.int64, key_step_stride: tl.int64, first_sample: tl.int64, stream: tl.int64,
    batch: tl.int64, elements: tl.int64, blocks: tl.int32,
    DRAWN: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The columns of a row: px pm lo hi ax a0 am ah an ak sk; the formula is that of reference.py."""
    PAIRS: tl.constexpr = COLUMNS > 4 and out_ptr.dtype.element_ty.primitive_bitwidth == 16
    row, column, at, exists, _ = _tile(batch, elements, blocks, ALIGNED, ROWS, COLUMNS)
    x = _load(x_ptr, at, exists)
    m = _load(model_output_ptr, at, exists)
    if unconditional_ptr is not None:
        mu = _load(unconditional_ptr, at, exists)
        m = mu + guidance_scale * (m - mu)
    # The coefficients are scalars when the host names the step, [ROWS, 1] when the device does.
    index = step if step_ptr is None else tl.load(step_ptr + row * step_stride)
    c = _table_row(rows_ptr, rows, index, 12)
    x0 = _column(c, 0) * x + _column(c, 1) * m
    if threshold_ptr is None:
        x0 = _clamp(x0, _column(c, 2), _column(c, 3))
    else:
        s = tl.load(threshold_ptr + row)
        x0 = _clamp(x0, -s, s) / s
    if clean_ptr is not None:
        tl.store(clean_ptr + at, x0, exists)
    new = _column(c, 4) * x + _column(c, 5) * x0 + _column(c, 6) * m
    if history_ptr is not None:
        new += _term(_column(c, 7), _load(history_ptr, at, exists), False)
    noise = tl.zeros([ROWS, COLUMNS], tl.float32)
    if DRAWN:
        needed = _column(c, 8) != 0.0
        if known_ptr is not None:
            needed |= _column(c, 10) != 0.0
        if step_ptr is not None:
            needed = tl.max(needed.to(tl.int32)) != 0
        if needed:
            key = (seed_ptr, key_step_ptr, samples_ptr, seed, key_step, key_step_stride, first_sample, stream)
            noise = draw(row, column, index, key, 0, COLUMNS, PAIRS)
    elif noise_ptr is not None:
        noise = _load(noise_ptr, at, exists)
    if DRAWN or noise_ptr is not None:
        new += _term(_column(c, 8), noise, DRAWN)
    if known_ptr is not None:
        goal = _column(c, 9) * _load(known_ptr, at, exists) + _term(_column(c, 10), noise, DRAWN)
        share = _load(mask_ptr, at, exists)
        new = share * goal + (1.0 - share) * new
    tl.store(out_ptr + at, new, exists)


@triton.jit(do_not_specialize=_FREE)
def _add_noise_kernel(
    out_ptr, x0_ptr, noise_ptr, rows_ptr, t_ptr, seed_ptr, key_step_ptr, samples_ptr, rows: tl.int64,
    seed: tl.int64, key_step: tl.int64, key_step_stride: tl.int64, first_sample: tl.int64, stream: tl.int64,
    batch: tl.int64, elements: tl.int64, blocks: tl.int32,
    DRAWN: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The columns of a row: alpha sigma."""
    PAIRS: tl.constexpr = COLUMNS > 4 and out_ptr.dtype.element_ty.primitive_bitwidth == 16
    row, column, at, exists, _ = _tile(batch, elements, blocks, ALIGNED, ROWS, COLUMNS)
    x0 = _load(x0_ptr, at, exists)
    c = _table_row(rows_ptr, rows, tl.load(t_ptr + row), 8)
    if DRAWN:
        key = (seed_ptr, key_step_ptr, samples_ptr, seed, key_step, key_step_stride, first_sample, stream)
        noise = draw(row, column, 0, key, 0, COLUMNS, PAIRS)
    else:
        noise = _load(noise_ptr, at, exists)
    tl.store(out_ptr + at, _column(c, 0) * x0 + _column(c, 1) * noise, exists)


@triton.jit(do_not_specialize=_FREE)
def _loss_kernel(
    partial_ptr, residual_ptr, model_output_ptr, x0_ptr, noise_ptr, rows_ptr, t_ptr,
    seed_ptr, key_step_ptr, samples_ptr, rows: tl.int64,
    seed: tl.int64, key_step: tl.int64, key_step_stride: tl.int64, first_sample: tl.int64, stream: tl.int64,
    batch: tl.int64, elements: tl.int64, blocks: tl.int32,
    DRAWN: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The columns of a row: alpha sigma cx cn weight. Writes ``weight / elements * sum of squares`` of every tile."""
    PAIRS: tl.constexpr = COLUMNS > 4 and model_output_ptr.dtype.element_ty.primitive_bitwidth == 16
    row, column, at, exists, in_batch = _tile(batch, elements, blocks, ALIGNED, ROWS, COLUMNS)
    m = _load(model_output_ptr, at, exists)
    x0 = _load(x0_ptr, at, exists)
    c = _table_row(rows_ptr, rows, tl.load(t_ptr + row), 8)
    if DRAWN:
        key = (seed_ptr, key_step_ptr, samples_ptr, seed, key_step, key_step_stride, first_sample, stream)
        noise = draw(row, column, 0, key, 0, COLUMNS, PAIRS)
    else:
        noise = _load(noise_ptr, at, exists)
    residual = m - (_column(c, 2) * x0 + _column(c, 3) * noise)
    if residual_ptr is not None:
        tl.store(residual_ptr + at, residual, exists)
    squares = tl.sum(tl.where(exists, residual * residual, 0.0), axis=1, keep_dims=True)
    scale = _column(c, 4) / elements.to(tl.float32)
    tl.store(partial_ptr + row * blocks + column // COLUMNS, scale * squares, in_batch)


@functools.lru_cache(maxsize=1024)
def _grid(batch: int, elements: int) -> Grid:
    columns = 4 if elements <= 4 else 64 if elements <= 64 else TILE  # short samples share a program
    return cut(batch, elements, columns)


def _stride(index: Tensor | None) -> int:
    """1 if there is an entry a row, 0 if there is one for all rows."""
    return int(index is not None and index.numel() != 1)


def _launch(
    kernel: Any,
    like: Tensor,
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[int | float, ...],
    constant: bool | int,
) -> None:
    """Cuts ``like`` into programs and launches the kernel, which has one constant of its own."""
    if not all(t is None or t.is_contiguous() for t in tensors):
        raise ValueError(
            f"the kernels take contiguous tensors, got strides {[t.stride() for t in tensors if t is not None]}"
        )
    elements = like.numel() // like.shape[0]
    launch(kernel, _grid(like.shape[0], elements), tensors, numbers, (constant, elements % 8 == 0))


def noise_like(like: Tensor, noise: Tensor | None, *args: Any) -> Tensor:
    """``dgm::noise_like.triton``; see :func:`dgm_kernels.noise_like`."""
    *key_args, kind = args
    out = torch.empty(like.shape, dtype=torch.int32 if kind == 2 else like.dtype, device=like.device)
    if out.numel():
        key = key_of(noise, key_args)
        if not key.drawn:
            raise ValueError("noise_like needs a key, got none")
        _launch(_noise_kernel, out, (out, *key.tensors), key.numbers, kind)
    return out


def sampler_step(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """``dgm::sampler_step.triton``; see :func:`dgm_kernels.sampler_step`."""
    *inputs, return_x0 = args
    out = torch.empty_like(x)
    x0 = torch.empty_like(x) if return_x0 else None
    sampler_step_out(x, *inputs, out, x0)
    return out, x.new_empty(0) if x0 is None else x0


def sampler_step_out(
    x: Tensor,
    model_output: Tensor,
    rows: Tensor,
    step_tensor: Tensor | None,
    step: int,
    noise: Tensor | None,
    *args: Any,
) -> None:
    """``dgm::sampler_step_out.triton``: the step into given tensors, ``out`` and perhaps ``x0_out``."""
    *key_args, history, unconditional, guidance_scale, known, mask, threshold, _, out, x0_out = args
    if x.numel() == 0:
        return
    key = key_of(noise, key_args)
    given = (out, x0_out, x, model_output, noise, history, unconditional, known, mask, threshold, rows, step_tensor)
    numbers = (guidance_scale, rows.shape[0], step, _stride(step_tensor), *key.numbers)
    _launch(_step_kernel, x, (*given, *key.tensors), numbers, key.drawn)


def _check_training(x0: Tensor, t: Tensor, noise: Tensor | None, key: Any) -> None:
    if t.shape != x0.shape[:1]:
        raise ValueError(f"t must have shape {tuple(x0.shape[:1])}, got {tuple(t.shape)}")
    if noise is None and not key.drawn:
        raise ValueError("noise must be a tensor or a key, got neither")


def add_noise(x0: Tensor, rows: Tensor, t: Tensor, noise: Tensor | None, *key_args: Any) -> Tensor:
    """``dgm::add_noise.triton``; see :func:`dgm_kernels.add_noise`."""
    out = torch.empty_like(x0)
    if out.numel():
        key = key_of(noise, key_args)
        _check_training(x0, t, noise, key)
        tensors = (out, x0, noise, rows, t, *key.tensors)
        _launch(_add_noise_kernel, x0, tensors, (rows.shape[0], *key.numbers), key.drawn)
    return out


def denoising_loss(
    model_output: Tensor, x0: Tensor, rows: Tensor, t: Tensor, noise: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor]:
    """``dgm::denoising_loss.triton``; see :func:`dgm_kernels.denoising_loss`.

    One partial sum a tile, then a sum over the tiles of a sample, both in a fixed order.
    """
    *key_args, with_residual = args
    residual = torch.empty_like(model_output) if with_residual else None
    if x0.numel():
        key = key_of(noise, key_args)
        _check_training(x0, t, noise, key)
        batch, _, blocks = _grid(x0.shape[0], x0.numel() // x0.shape[0]).numbers
        partial = torch.empty((batch, blocks), dtype=torch.float32, device=x0.device)
        tensors = (partial, residual, model_output, x0, noise, rows, t, *key.tensors)
        _launch(_loss_kernel, x0, tensors, (rows.shape[0], *key.numbers), key.drawn)
        loss = partial.sum(1)
    else:  # the mean of nothing is 0 / 0
        loss = torch.full(x0.shape[:1], float("nan"), dtype=torch.float32, device=x0.device)
    return loss, model_output.new_empty(0) if residual is None else residual


def aot_specs() -> Iterator[Spec]:
    """Forms of the kernels to compile ahead of time: the common ones, and those with every option."""
    for name, dtype in (("fp32", "*fp32"), ("bf16", "*bf16")):
        yield spec(f"noise_like_{name}", _noise_kernel, {"out": dtype}, KIND=0)
        step = {"out": dtype, "x": dtype, "model_output": dtype, "rows": "*fp32"}
        key = {"seed": "*i64", "key_step": "*i64", "samples": "*i64"}
        more = dict.fromkeys(("clean", "history", "unconditional", "known"), dtype)
        every = {**step, **key, **more, "mask": "*i1", "threshold": "*fp32", "step": "*i64"}
        forms: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
            "step": (step, {"DRAWN": False}),
            "step_drawn": (step, {"DRAWN": True}),
            "step_drawn_64_columns": (step, {"DRAWN": True, "ROWS": 16, "COLUMNS": 64}),
            "step_drawn_unaligned": (step, {"DRAWN": True, "ALIGNED": False}),
            "step_every_option": (every, {"DRAWN": True}),
        }
        for form, (pointers, constants) in forms.items():
            yield spec(f"{form}_{name}", _step_kernel, pointers, **constants)
        training = {"x0": dtype, "rows": "*fp32", "t": "*i64"}
        yield spec(f"add_noise_{name}", _add_noise_kernel, {"out": dtype, **training}, DRAWN=True)
        loss = {"partial": "*fp32", "residual": dtype, "model_output": dtype, **training}
        yield spec(f"denoising_loss_{name}", _loss_kernel, loss, DRAWN=True)
