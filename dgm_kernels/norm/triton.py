"""Launchers of the norm op's Triton kernels, and the forms of them to compile ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from .._core.triton import Grid, Spec, launch, spec
from .triton_groups import channel_sums_kernel, group_silu_backward_kernel, group_silu_kernel
from .triton_rows import row_means_kernel, rows_backward_kernel, rows_kernel

_TILE = 1024  # elements of a tile of short rows
_LONGEST = 4096  # a row up to this length is held in registers
_LOOP = 2048  # elements of a tile of a longer one


def _columns(size: int) -> tuple[bool, int, int, int]:
    """Whether a tile holds whole rows, its rows and columns, and warps: 8 elements a thread."""
    if size > _LONGEST:
        return False, 1, _LOOP, 8
    columns = max(16, triton.next_power_of_2(size))
    rows = max(1, _TILE // columns)
    return True, rows, columns, max(4, rows * columns // 256)


def _stride(x: Tensor | None) -> int:
    """Elements from one sample to the next."""
    return x.stride(0) if x is not None and x.shape[0] > 1 else 0


def _aligned(*numbers: int) -> bool:
    return all(number % 8 == 0 for number in numbers)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _check_samples(batch: int, size: int, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.shape != (batch, size) or (size > 1 and tensor.stride(1) != 1):
            raise ValueError(f"{name} must be [{batch}, {size}] with contiguous rows, got {tuple(tensor.shape)}")


# ---- Rows


def norm_rows(
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    size: int,
    rms: bool,
    eps: float,
    dtype: torch.dtype,
    h_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``dgm::norm_rows.triton``; see :func:`dgm_kernels.modulated_layer_norm`."""
    rows = x.numel() // size
    modulated = gate is not None or scale is not None or shift is not None
    batch = x.shape[0] if modulated else 1
    _check_samples(batch, size, gate=gate, scale=scale, shift=shift)
    mean, rstd = (torch.empty(n, dtype=torch.float32, device=x.device) for n in (0 if rms else rows, rows))
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    h = torch.empty(x.shape if residual is not None else (0,), dtype=h_dtype, device=x.device)
    if rows == 0:
        return y, h, mean, rstd
    one, height, columns, warps = _columns(size)
    grid = Grid((-(-rows // height), 1, 1), (rows, size, rows // batch), (height, columns))
    kept, means = None if residual is None else h, None if rms else mean
    tensors = (y, kept, means, rstd, x.contiguous(), _contiguous(residual), gate, weight, bias, scale, shift)
    strides = tuple(map(_stride, (gate, scale, shift)))
    launch(rows_kernel, grid, tensors, (*strides, eps), (rms, one, _aligned(size, *strides)), warps)
    return y, h, mean, rstd


def _part(rows: int) -> int:
    """Rows whose sums one program adds up: enough programs for a large device, without much memory for their sums."""
    return 16 if rows <= 1 << 14 else 64


def norm_rows_backward(
    grad: Tensor,
    grad_h: Tensor | None,
    h: Tensor,
    x: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    with_shift: bool,
    mean: Tensor,
    rstd: Tensor,
    size: int,
    rms: bool,
) -> tuple[Tensor, ...]:
    """``dgm::norm_rows_backward.triton``: gradients of h, x, gate, weight, bias, scale and shift."""
    rows = h.numel() // size
    batch = h.shape[0] if gate is not None or scale is not None else 1
    _check_samples(batch, size, gate=gate, scale=scale)
    tokens = rows // max(batch, 1)
    part = _part(rows)
    parts = -(-tokens // part)
    sums = 3 if gate is not None else 2 if any(t is not None for t in (weight, bias, scale)) else 0
    to_h, to_x = torch.empty_like(h), None if x is None else torch.empty_like(x)
    partial = torch.empty(batch, parts, sums, size, dtype=torch.float32, device=h.device)
    if rows:
        one, height, columns, warps = _columns(size)
        strides = (_stride(gate), _stride(scale))
        aligned = _aligned(size, *strides)
        given = (grad.contiguous(), h, weight, scale, None if rms else mean, rstd)
        means = None
        if not one:
            means = torch.empty(rows, 2, dtype=torch.float32, device=h.device)
            tall = Grid((rows, 1, 1), (rows, size, tokens), (1, columns))
            launch(row_means_kernel, tall, (means, *given), strides[1:], (rms, aligned), warps)
        blocks = -(-size // columns)
        grid = Grid((batch * parts * blocks, 1, 1), (parts, size, blocks), (height, columns))
        operands = (given[0], _contiguous(grad_h), h, x, gate, *given[2:], means)
        tensors = (to_h, to_x, partial if sums else None, *operands)
        launch(rows_backward_kernel, grid, tensors, (*strides, tokens, part), (rms, sums, aligned), warps)
    found = _parameter_gradients(partial.sum(1), gate, weight, bias, scale)
    to_shift = partial[:, :, 0].sum(1) if with_shift else None
    return (to_h, *(_or_empty(tensor, h) for tensor in (to_x, *found, to_shift)))


def _or_empty(grad: Tensor | None, like: Tensor) -> Tensor:
    """The gradient of an operand that may be absent."""
    return like.new_empty((0,), dtype=torch.float32) if grad is None else grad


def _parameter_gradients(
    sums: Tensor, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Of gate, weight, bias and scale, from the sums over tokens ``[batch, 2 or 3, size]``."""
    if sums.shape[1] == 0:
        return (None,) * 4
    plain, normalized = sums[:, 0], sums[:, 1]
    factor = 1.0 if scale is None else 1.0 + scale.float()
    to_scale = normalized if weight is None else normalized * weight.float().view(-1)
    if bias is not None:
        to_scale = to_scale + plain * bias.float().view(-1)
    return (
        None if gate is None else _own(sums[:, 2], gate.dtype),
        None if weight is None else (normalized * factor).sum(0).view(weight.shape).to(weight.dtype),
        None if bias is None else (plain * factor).sum(0).view(bias.shape).to(bias.dtype),
        None if scale is None else _own(to_scale, scale.dtype),
    )


def _own(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A result of an op shares no memory with another one."""
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format)


# ---- Groups


def norm_group_silu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dgm::norm_group_silu.triton``; see :func:`dgm_kernels.group_norm_silu`."""
    batch, channels = x.shape[:2]
    _check_samples(batch, channels, scale=scale, shift=shift)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    mean, rstd = (torch.empty(batch * groups, dtype=torch.float32, device=x.device) for _ in range(2))
    if batch == 0:
        return y, mean, rstd
    elements = x.numel() // (batch * channels)
    one, *tile, warps = _group_tile(channels // groups, elements)
    grid = Grid((batch * groups, 1, 1), (batch, channels, elements), (tile[0], tile[1]))
    tensors = (y, mean, rstd, x.contiguous(), weight, bias, scale, shift)
    numbers = (_stride(scale), _stride(shift), eps, groups)
    launch(group_silu_kernel, grid, tensors, numbers, (one, _aligned(elements)), warps)
    return y, mean, rstd


def _group_tile(channels: int, elements: int) -> tuple[bool, int, int, int]:
    """Whether a tile holds a whole group, its channels and elements, and warps: 8 elements a thread."""
    rows, columns = triton.next_power_of_2(channels), max(16, triton.next_power_of_2(elements))
    one = rows * columns <= _LONGEST
    if not one:
        columns = min(columns, _LOOP)
        rows = min(rows, _LOOP // columns)
    return one, rows, columns, max(4, rows * columns // 256)


def _channel_tile(elements: int) -> tuple[int, int]:
    columns = min(_TILE, max(16, triton.next_power_of_2(elements)))
    return _TILE // columns, columns


def norm_group_silu_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
) -> tuple[Tensor, ...]:
    """``dgm::norm_group_silu_backward.triton``: gradients of x, weight, bias, scale and shift."""
    batch, channels = x.shape[:2]
    _check_samples(batch, channels, scale=scale, shift=shift)
    to_x = torch.empty_like(x)
    sums = torch.empty(batch, 2, channels, dtype=torch.float32, device=x.device)
    if batch:
        elements = x.numel() // (batch * channels)
        strides = (_stride(scale), _stride(shift))
        given = (grad.contiguous(), x.contiguous(), weight, bias, scale, shift, mean, rstd)
        rows, columns = _channel_tile(elements)
        programs, blocks = -(-batch * channels // rows), -(-elements // columns)
        numbers, aligned = (batch, channels, elements), (_aligned(elements),)
        launch(
            channel_sums_kernel,
            Grid((programs, 1, 1), numbers, (rows, columns)),
            (sums, *given),
            (*strides, groups),
            aligned,
        )
        means = _group_means(sums, weight, scale, groups, channels // groups * elements)
        grid = Grid((programs * blocks, 1, 1), numbers, (rows, columns))
        launch(group_silu_backward_kernel, grid, (to_x, means, *given), (*strides, groups, blocks), aligned)
    _, to_weight, to_bias, to_scale = _parameter_gradients(sums, None, weight, bias, scale)
    to_shift = None if shift is None else _own(sums[:, 0], shift.dtype)
    others = (to_weight, to_bias, to_scale, to_shift)
    return (to_x, *(_or_empty(tensor, x) for tensor in others))


def _group_means(sums: Tensor, weight: Tensor | None, scale: Tensor | None, groups: int, size: int) -> Tensor:
    """``[batch groups, 2]``: the means over a group of the gradient of the normalised x, and of that times it."""
    factor = sums.new_ones(1) if weight is None else weight.float()
    factor = factor if scale is None else factor * (1.0 + scale.float())
    weighed = sums * (factor[:, None] if factor.dim() == 2 else factor)
    return (weighed.unflatten(2, (groups, -1)).sum(3) / max(size, 1)).transpose(1, 2).contiguous().view(-1, 2)


# ---- Ahead-of-time compilation


def aot_specs() -> Iterator[Spec]:
    """Forms of the kernels to compile ahead of time: the common ones, and those with every option."""
    for name, dtype in (("fp32", "*fp32"), ("bf16", "*bf16")):
        yield from _rows_specs(name, dtype)
        yield from _group_specs(name, dtype)


def _rows_specs(name: str, dtype: str) -> Iterator[Spec]:
    floats = {"mean": "*fp32", "rstd": "*fp32"}
    forms: dict[str, tuple[tuple[str, ...], int, dict[str, Any]]] = {
        "_layer_norm": (("weight", "bias"), 1024, {}),
        "_rms_norm": (("weight",), 1024, {"RMS": True}),
        "_modulated": (("residual", "gate", "scale", "shift"), 2048, {}),
        "_modulated_64": (("residual", "gate", "scale", "shift"), 64, {}),
        "_everything_4096": (("residual", "gate", "weight", "bias", "scale", "shift"), 4096, {}),
        "_everything_long": (("residual", "gate", "weight", "bias", "scale", "shift"), 10000, {}),
        "_unaligned": (("weight", "bias"), 1024, {"ALIGNED": False}),
    }
    for form, (present, size, more) in forms.items():
        one, height, columns, warps = _columns(size)
        constants = {"RMS": False, "ONE": one, "ROWS": height, "COLUMNS": columns, **more}
        kept = ("h",) if "residual" in present else ()
        forward = dict.fromkeys(("y", "x", *kept, *present), dtype) | floats
        yield spec(f"rows{form}_{name}", rows_kernel, forward, warps, **constants)
        gated = ("x", "to_x", "grad_h") if "gate" in present else ()
        backward = dict.fromkeys(("to_h", "grad", "h", *gated, *present), dtype) | floats | {"sums": "*fp32"}
        if not one:
            backward["means"] = "*fp32"
            yield spec(f"row_means{form}_{name}", row_means_kernel, backward, warps, **constants)
        constants["SUMS"] = 3 if "gate" in present else 2
        yield spec(f"rows_backward{form}_{name}", rows_backward_kernel, backward, warps, **constants)


def _group_specs(name: str, dtype: str) -> Iterator[Spec]:
    floats = dict.fromkeys(("mean", "rstd", "means", "sums"), "*fp32")
    for form, present in (("", ("weight", "bias")), ("_modulated", ("weight", "bias", "scale", "shift"))):
        pointers = dict.fromkeys(("y", "x", "to_x", "grad", *present), dtype) | floats
        for shape, channels, elements in (("", 4, 1024), ("_8_pixels", 32, 64), ("_long", 8, 4096)):
            one, rows, columns, warps = _group_tile(channels, elements)
            constants = {"ONE": one, "ROWS": rows, "COLUMNS": columns}
            yield spec(f"group_silu{form}{shape}_{name}", group_silu_kernel, pointers, warps, **constants)
            rows, columns = _channel_tile(elements)
            constants = {"ROWS": rows, "COLUMNS": columns}
            yield spec(f"channel_sums{form}{shape}_{name}", channel_sums_kernel, pointers, **constants)
            yield spec(f"group_silu_backward{form}{shape}_{name}", group_silu_backward_kernel, pointers, **constants)
    odd = {"ALIGNED": False, "ROWS": 2, "COLUMNS": 512}
    yield spec(f"group_silu_unaligned_{name}", group_silu_kernel, pointers, ONE=True, **odd)
    yield spec(f"channel_sums_unaligned_{name}", channel_sums_kernel, pointers, **odd)
    yield spec(f"group_silu_backward_unaligned_{name}", group_silu_backward_kernel, pointers, **odd)
