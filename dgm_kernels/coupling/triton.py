"""Launchers of the coupling op's Triton kernels, and the forms of them to compile ahead of time."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .._core import layout
from .._core.triton import TILE, Grid, Spec, cut, launch, spec
from .triton_affine import affine_backward_kernel, affine_kernel, log_prob_kernel
from .triton_spline import spline_backward_kernel, spline_kernel

_SPLINE_TILE = 128  # elements of a program: one a thread


@functools.lru_cache(maxsize=1024)
def _grid(batch: int, elements: int, size: int) -> Grid:
    columns = min(size, max(2, triton.next_power_of_2(elements)))  # short samples share a program
    return cut(batch, elements, columns, size)


def _sample_size(x: Tensor) -> int:
    return x.numel() // x.shape[0] if x.shape[0] else 0


def _stride(x: Tensor) -> int:
    """Elements from one sample to the next."""
    return x.stride(0) if x.shape[0] > 1 else 0


def _partial_sums(grid: Grid, like: Tensor) -> Tensor:
    """What the programs write their parts of the sums over samples to."""
    batch, _, blocks = grid.numbers
    return torch.empty(batch if blocks == 1 else (batch, blocks), dtype=torch.float32, device=like.device)


def _total(partial: Tensor) -> Tensor:
    return partial if partial.dim() == 1 else partial.sum(1)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _check_rows(elements: int, batch: int, **tensors: Tensor) -> None:
    """Every tensor has ``batch`` contiguous samples of this many elements."""
    for name, tensor in tensors.items():
        if tensor.shape[0] != batch or tensor.numel() != batch * elements:
            raise ValueError(f"{name} must hold {batch} samples of {elements} elements, got {tuple(tensor.shape)}")
        if layout.rows(tensor) is not tensor:
            raise ValueError(f"each sample of {name} must be contiguous, got strides {tensor.stride()}")


# ---- Affine coupling


class _Region(NamedTuple):
    """Which elements are transformed, as the kernels take it; see ``Region.op_args``."""

    fixed: Tensor | None
    stride: int  # from one sample's part of ``fixed`` to the next
    numbers: tuple[int, int, int]  # start, stop, period
    forms: tuple[bool, int, int, int]  # PERIODIC, PARITY, WIDTH, HEIGHT


def _region(x: Tensor, fixed: Tensor | None, start: int, stop: int, parity: int, width: int, plane: int) -> _Region:
    elements = _sample_size(x)
    if not 0 <= start <= stop <= elements:
        raise ValueError(f"start and stop must be in order and within the sample of {elements}, got {start}, {stop}")
    period, stride = elements, 0
    if fixed is not None:
        fixed, period = fixed.contiguous(), fixed.numel()
        if period == x.numel():
            period, stride = elements, elements
        elif period == 0 or elements % period:
            raise ValueError(f"fixed must hold {x.numel()} elements or divide a sample of {elements}, got {period}")
    image = (0, 0)
    if parity >= 0 and width < elements:
        if width < 1 or plane % width or elements % plane:
            raise ValueError(f"plane must be rows of width elements and divide the sample, got {plane} and {width}")
        image = (width, plane // width)
    return _Region(fixed, stride, (start, stop, period), (period != elements, parity, *image))


def _aligned(*numbers: int) -> bool:
    return all(number % 8 == 0 for number in numbers)


def coupling_affine(x: Tensor, shift: Tensor, log_scale: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    """``dgm::coupling_affine.triton``; see :func:`dgm_kernels.affine_coupling`."""
    *place, scale_map, inverse, dtype = args
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel() == 0:
        return out, torch.zeros(x.shape[:1], dtype=torch.float32, device=x.device)
    region = _region(x, *place)
    elements, moved = _sample_size(x), region.numbers[1] - region.numbers[0]
    parameters = {"shift": shift} if log_scale is None else {"shift": shift, "log_scale": log_scale}
    _check_rows(elements, x.shape[0], x=x)
    _check_rows(moved, x.shape[0], **parameters)
    grid = _grid(x.shape[0], elements, TILE)
    partial = None if log_scale is None else _partial_sums(grid, x)
    strides = (_stride(x), _stride(shift), 0 if log_scale is None else _stride(log_scale), region.stride)
    constants = (scale_map, inverse, *region.forms, _aligned(elements, *strides, *region.numbers))
    tensors = (out, partial, x, shift, log_scale, region.fixed)
    launch(affine_kernel, grid, tensors, (*strides, *region.numbers), constants)
    return out, x.new_zeros(x.shape[:1], dtype=torch.float32) if partial is None else _total(partial)


def coupling_affine_backward(
    grad: Tensor, grad_logdet: Tensor | None, output: Tensor, shift: Tensor, log_scale: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """``dgm::coupling_affine_backward.triton``: gradients of x, shift and log_scale."""
    *place, scale_map, inverse, with_shift, x_dtype = args
    to_x = torch.empty(output.shape, dtype=x_dtype, device=output.device)
    to_shift = shift.new_empty(shift.shape if with_shift else (0,))
    to_scale = log_scale.new_empty(log_scale.shape)
    if output.numel() == 0:
        return to_x, to_shift, to_scale
    region = _region(output, *place)
    batch, elements, moved = output.shape[0], _sample_size(output), region.numbers[1] - region.numbers[0]
    _check_rows(elements, batch, grad=grad, output=output)
    _check_rows(moved, batch, shift=shift, log_scale=log_scale)
    strides = (*map(_stride, (grad, output, shift, log_scale)), region.stride)
    constants = (scale_map, inverse, *region.forms, _aligned(elements, *strides, *region.numbers))
    results = (to_x, to_shift if with_shift else None, to_scale)
    given = (grad, _contiguous(grad_logdet), output, shift, log_scale, region.fixed)
    grid = _grid(batch, elements, TILE)
    launch(affine_backward_kernel, grid, (*results, *given), (*strides, *region.numbers), constants)
    return to_x, to_shift, to_scale


# ---- Spline


class _Settings(NamedTuple):
    """Settings of a spline and strides of its parameters as the kernels take them."""

    numbers: tuple[float, ...]
    constants: tuple[bool | int, ...]


def _settings(x: Tensor, parameters: Sequence[Tensor], args: Sequence[Any]) -> _Settings:
    bound, tails, min_width, min_height, min_derivative, inverse = args
    bins = parameters[0].shape[-1]
    counts = (bins, bins, bins - 1 if tails else bins + 1)
    for name, tensor, count in zip(("widths", "heights", "derivatives"), parameters, counts, strict=True):
        if tensor.shape != (*x.shape, count):
            raise ValueError(f"{name} must have shape {(*x.shape, count)}, got {tuple(tensor.shape)}")
        if layout.last_rows(tensor) is not tensor:
            raise ValueError(f"{name} must hold evenly spaced rows of contiguous bins, got strides {tensor.stride()}")
    strides = map(_row_stride, parameters)
    return _Settings(
        (bound, min_width, min_height, min_derivative), (*strides, bins, (bins - 1).bit_length(), tails, inverse)
    )


def _row_stride(x: Tensor) -> int:
    """From one row of the last dimension to the next."""
    return next((x.stride(d) for d in reversed(range(x.dim() - 1)) if x.shape[d] != 1), x.shape[-1])


@functools.lru_cache(maxsize=128)
def _end(bound: float, dtype: torch.dtype) -> float:
    """The largest number of this dtype that is no larger than the bound."""
    end = torch.tensor(bound, dtype=dtype, device="cpu")
    return float(end if float(end) <= bound else torch.nextafter(end, torch.zeros_like(end)))


def coupling_spline(
    x: Tensor, widths: Tensor, heights: Tensor, derivatives: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    """``dgm::coupling_spline.triton``; see :func:`dgm_kernels.rational_quadratic_spline`."""
    *settings, dtype = args
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel() == 0:
        return out, torch.zeros(x.shape[:1], dtype=torch.float32, device=x.device)
    numbers, constants = _settings(x, (widths, heights, derivatives), settings)
    grid = _grid(x.shape[0], _sample_size(x), _SPLINE_TILE)
    partial = _partial_sums(grid, x)
    tensors = (out, partial, x.contiguous(), widths, heights, derivatives)
    launch(spline_kernel, grid, tensors, (_end(numbers[0], dtype), *numbers), constants)
    return out, _total(partial)


def coupling_spline_backward(
    grad: Tensor,
    grad_logdet: Tensor | None,
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``dgm::coupling_spline_backward.triton``: gradients of x, widths, heights and derivatives."""
    parameters = (widths, heights, derivatives)
    to_x, to_widths, to_heights, to_derivatives = (t.new_empty(t.shape) for t in (x, *parameters))
    if x.numel():
        numbers, constants = _settings(x, parameters, settings)
        grid = _grid(x.shape[0], _sample_size(x), _SPLINE_TILE)
        given = (grad.contiguous(), _contiguous(grad_logdet), x.contiguous())
        tensors = (to_x, to_widths, to_heights, to_derivatives, *given, *parameters)
        launch(spline_backward_kernel, grid, tensors, numbers, constants)
    return to_x, to_widths, to_heights, to_derivatives


# ---- Base densities


def coupling_log_prob(z: Tensor, logdet: Tensor | None, logistic: bool) -> Tensor:
    """``dgm::coupling_log_prob.triton``; see :func:`dgm_kernels.standard_normal_log_prob`."""
    if z.numel() == 0:
        total = torch.zeros(z.shape[:1], dtype=torch.float32, device=z.device)
    else:
        _check_rows(_sample_size(z), z.shape[0], z=z)
        grid = _grid(z.shape[0], _sample_size(z), TILE)
        partial = _partial_sums(grid, z)
        aligned = _aligned(_sample_size(z), _stride(z))
        launch(log_prob_kernel, grid, (partial, z), (_stride(z),), (logistic, aligned))
        total = _total(partial)
    return total if logdet is None else total + logdet


# ---- Ahead-of-time compilation


def aot_specs() -> Iterator[Spec]:
    """Forms of the kernels to compile ahead of time: the common ones, and those with every option."""
    for name, dtype in (("fp32", "*fp32"), ("bf16", "*bf16")):
        yield from _affine_specs(name, dtype)
        yield from _spline_specs(name, dtype)
        for base in ("normal", "logistic"):
            pointers = {"out": "*fp32", "z": dtype}
            yield spec(f"log_prob_{base}_{name}", log_prob_kernel, pointers, LOGISTIC=base == "logistic")


def _affine_specs(name: str, dtype: str) -> Iterator[Spec]:
    plain = {"MAP": 0, "INVERSE": False, "PERIODIC": False, "PARITY": -1, "WIDTH": 0, "HEIGHT": 0}
    board, short = {"PARITY": 0, "WIDTH": 32, "HEIGHT": 32}, {"ROWS": TILE // 64, "COLUMNS": 64}
    forms: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
        "": ({}, {}),
        "_tanh_inverse": ({}, {"MAP": 1, "INVERSE": True}),
        "_sigmoid": ({}, {"MAP": 2}),
        "_softclip": ({}, {"MAP": 3}),
        "_64_columns": ({}, short),
        "_checkerboard": ({}, board),
        "_checkerboard_28": ({}, {**board, "WIDTH": 28, "HEIGHT": 28}),
        "_mask": ({"fixed": "*i1"}, {}),
        "_mask_of_pixels": ({"fixed": "*i1"}, {"PERIODIC": True}),
        "_unaligned": ({}, {"ALIGNED": False}),
    }
    forward = dict.fromkeys(("out", "x", "shift", "log_scale"), dtype) | {"logdet": "*fp32"}
    backward = dict.fromkeys(("to_x", "to_shift", "to_scale", "grad", "output", "shift", "log_scale"), dtype)
    backward["grad_logdet"] = "*fp32"
    for form, (more, constants) in forms.items():
        yield spec(f"affine{form}_{name}", affine_kernel, forward | more, **plain | constants)
        yield spec(f"affine_backward{form}_{name}", affine_backward_kernel, backward | more, **plain | constants)
    additive = {key: forward[key] for key in ("out", "x", "shift")}
    yield spec(f"additive_{name}", affine_kernel, additive, **plain)


def _spline_specs(name: str, dtype: str) -> Iterator[Spec]:
    raw = ("x", "widths", "heights", "derivatives")
    forward = dict.fromkeys(("out", *raw), dtype) | {"logdet": "*fp32"}
    backward = dict.fromkeys(("to_x", "to_widths", "to_heights", "to_derivatives", "grad", *raw), dtype)
    backward["grad_logdet"] = "*fp32"
    plain = {"TAILS": True, "INVERSE": False, "COLUMNS": _SPLINE_TILE}
    eight = _bins(8, 8, 8, 7)
    forms: dict[str, dict[str, Any]] = {
        "": eight,
        "_inverse": {**eight, "INVERSE": True},
        "_of_one_output": _bins(8, 23, 23, 23),
        "_16_columns": {**eight, "ROWS": _SPLINE_TILE // 16, "COLUMNS": 16},
        "_10_bins_no_tails": {**_bins(10, 10, 10, 11), "TAILS": False},
        "_32_bins": _bins(32, 32, 32, 31),
    }
    for form, constants in forms.items():
        yield spec(f"spline{form}_{name}", spline_kernel, forward, **plain | constants)
        yield spec(f"spline_backward{form}_{name}", spline_backward_kernel, backward, **plain | constants)


def _bins(count: int, *strides: int) -> dict[str, int]:
    names = ("WIDTH_STRIDE", "HEIGHT_STRIDE", "DERIVATIVE_STRIDE")
    return {"K": count, "LEVELS": (count - 1).bit_length(), **dict(zip(names, strides, strict=True))}
