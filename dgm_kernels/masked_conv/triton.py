"""Launchers of the masked_conv op's Triton kernels, and the forms of them to compile ahead of time."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .._core.triton import TILE, Grid, Spec, cut, launch, spec
from .taps import Kernel, Layout, Rule
from .triton_conv import (
    channels_last_kernel,
    conv_kernel,
    pack_kernel,
    weight_grad_kernel,
    weight_sum_kernel,
)
from .triton_pixel import (
    categorical_backward_kernel,
    categorical_kernel,
    gate_backward_kernel,
    gate_kernel,
    mixture_backward_kernel,
    mixture_kernel,
)

_PACK_ROWS = 16  # rows of packed weights a program
_CHANNELS = 64  # of a tile that is brought to channels-last, which has as many pixels
# Programs of one gradient of a weight: a wave of two for each multiprocessor of the largest GPUs.
_PROGRAMS = 256
_LARGEST_PLANE = 1 << 30  # places in one plane are 32-bit numbers; those in a tensor are not


def _power_of_2(number: int, least: int, most: int) -> int:
    """The next power of two, within limits."""
    return min(most, max(least, triton.next_power_of_2(max(number, 1))))


def _plane(x: Tensor, first: int = 2) -> int:
    """Pixels of a sample; a place in a plane must fit into 32 bits."""
    plane = math.prod(x.shape[first:])
    if plane > _LARGEST_PLANE:
        raise ValueError(f"a sample must have at most {_LARGEST_PLANE} pixels, got {tuple(x.shape[first:])}")
    return plane


def _aligned(vector: int, itemsize: int) -> bool:
    """Whether a plane's pixels are read 16 bytes at a time; else it pays to bring them to channels-last first."""
    return vector * itemsize >= 16


def _vector(plane: int) -> int:
    """How many pixels are sure to be in one plane, if counted from a multiple of it: at most 16 bytes in 16 bits."""
    return math.gcd(plane, 8)


# ---- Convolution


class _Taps(NamedTuple):
    """A kernel's live taps as the Triton kernels take them: the first in raster order, the last by its own rule."""

    number: int
    rule: Rule
    numbers: tuple[int, int, int, int]  # step_y, step_x, centre_y, centre_x
    at_centre: bool  # the only one is the pixel itself


@functools.lru_cache(maxsize=1024)
def _live(kernel: Kernel, height: int, width: int) -> _Taps:
    taps = kernel.taps()
    # A step beyond the image reaches nothing, whether longer or not: with these, offsets fit into 32 bits.
    step_y, step_x = min(kernel.dilation[0], height), min(kernel.dilation[1], width)
    row, column = kernel.centre
    return _Taps(
        len(taps),
        taps[-1].rule if taps else Rule.FULL,
        (step_y, step_x, row * step_y, column * step_x),
        len(taps) == 1 and (taps[0].dy, taps[0].dx) == (0, 0),
    )


def _kernel(settings: tuple[Any, ...], height: int, width: int) -> Kernel:
    layout, strict, groups, step_y, step_x = settings
    return Kernel(Layout(layout), strict, groups, height, width, (step_y, step_x))


def _is_tf32(x: Tensor) -> bool:
    """Whether conv2d would use tf32."""
    precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return x.is_cuda and x.dtype == torch.float32 and precision == "tf32"


class _Tile(NamedTuple):
    """Sizes of a program's tile: rows of the result, pixels, channels a step; steps that are loaded ahead."""

    rows: int
    pixels: int
    inner: int
    stages: int


@functools.lru_cache(maxsize=1024)
def _conv_tile(
    rows: int, inner: int, pixels: int, gated: bool, direct: bool, vector: int, itemsize: int, tf32: bool
) -> _Tile:
    """On tensor cores a step is 128 bytes of channels; in float32 the products are ordinary instructions.

    The large tile reads less from the L2 cache, and is for calls of at least 128 programs with it, which is what an
    H200 has multiprocessors for. It is not for kernels that need registers for more: a second sum before the gate,
    addresses of planes at odd places.
    """
    if itemsize == 4 and not tf32:
        return _Tile(_power_of_2(rows, 16, 32 if gated else 64), 64, _power_of_2(inner, 16, 32), 3)
    narrow = gated or vector == 1
    size = _power_of_2(rows, 16, 64 if narrow else 128)
    large = not (narrow or direct) and -(-pixels // 128) * -(-rows // size) >= 128
    return _Tile(size, 128 if large else 64, _power_of_2(inner, 16, 128 // itemsize), 3)


def _programs(count: int) -> Grid:
    """Programs of a kernel that takes its own numbers and tile sizes."""
    return Grid((count, 1, 1), (), ())  # type: ignore[arg-type]


def _channels_last(x: Tensor, padded: int, tf32: bool) -> Tensor:
    """``[batch * pixels, padded]`` of x in NCHW, rounded to tf32."""
    channels, plane = x.shape[1], _plane(x)
    pixels = x.shape[0] * plane
    out = x.new_empty((pixels, padded))
    tile = math.gcd(_CHANNELS, padded)
    grid = _programs(-(-pixels // _CHANNELS) * (padded // tile))
    constants = (tf32, _vector(plane), _CHANNELS, tile)
    launch(channels_last_kernel, grid, (out, x), (pixels, plane, channels, padded), constants)
    return out


def _pack(weight: Tensor, taps: _Taps, groups: int, tile: _Tile, turned: bool, gated: bool, tf32: bool) -> Tensor:
    """The live weights as ``pack_kernel`` lays them out."""
    outputs, inputs, *size = weight.shape
    rows, inner = (inputs, outputs) if turned else (outputs // 2 if gated else outputs, inputs)
    padded_rows, padded = (-(-n // to) * to for n, to in ((rows, tile.rows), (inner, tile.inner)))
    packed = weight.new_empty((2 if gated else 1, taps.number, padded_rows, padded))
    if packed.numel():
        numbers = (outputs, inputs, groups, taps.number, math.prod(size), padded_rows, padded)
        constants = (int(taps.rule), turned, gated, tf32, _PACK_ROWS, tile.inner)
        grid = _programs(packed.numel() // (_PACK_ROWS * tile.inner))
        launch(pack_kernel, grid, (packed, weight), numbers, constants)
    return packed


def _convolve(
    out: Tensor, pre: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, condition: Tensor | None,
    settings: tuple[Any, ...], turned: bool = False, gated: bool = False,
) -> None:  # fmt: skip
    """Fills ``out``, and ``pre`` with the halves before the gate; turned: from the results to the inputs."""
    if out.numel() == 0:
        return
    height, width = x.shape[2:]
    kernel, groups = _kernel(settings, *weight.shape[2:]), settings[2]
    taps, plane = _live(kernel, height, width), _plane(x)
    pixels, rows, inner = x.shape[0] * plane, out.shape[1], x.shape[1]
    tf32, vector = _is_tf32(x), _vector(plane)
    direct = taps.at_centre and _aligned(vector, x.element_size())
    tile = _conv_tile(rows, inner, pixels, gated, direct, vector, x.element_size(), tf32)
    packed = _pack(weight, taps, groups, tile, turned, gated, tf32)
    if not direct and packed.numel():
        x = _channels_last(x, packed.shape[3], tf32)
    per_pixel = condition is not None and condition.dim() > 2
    numbers = (pixels, plane, width, rows, inner, groups, packed.shape[2], taps.number, *taps.numbers)
    constants = (kernel.width, int(taps.rule), turned, gated, per_pixel, direct, tf32, vector)
    grid = _programs(-(-pixels // tile.pixels) * -(-rows // tile.rows))
    tensors = (out, pre, x, packed, bias, condition)
    launch(conv_kernel, grid, tensors, numbers, (*constants, tile.stages, *tile[:3]))


def masked_conv(x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
    """``dgm::masked_conv.triton``; see :func:`dgm_kernels.masked_conv2d`."""
    out = x.new_empty((x.shape[0], weight.shape[0], *x.shape[2:]))
    _convolve(out, None, x.contiguous(), weight.contiguous(), bias, None, settings)
    return out


def masked_conv_input_grad(grad: Tensor, weight: Tensor, *settings: Any) -> Tensor:
    """``dgm::masked_conv_input_grad.triton``: the convolution with its taps and channels turned over."""
    out = grad.new_empty((grad.shape[0], weight.shape[1], *grad.shape[2:]))
    _convolve(out, None, grad.contiguous(), weight.contiguous(), None, None, settings, turned=True)
    return out


def masked_conv_gated(
    x: Tensor, weight: Tensor, bias: Tensor | None, condition: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor]:
    """``dgm::masked_conv_gated.triton``: the gated activation of a convolution, and with ``keep`` what it is of."""
    *settings, keep = args
    if weight.shape[0] // 2 % settings[2]:
        raise ValueError(f"groups must divide the {weight.shape[0] // 2} channels of the result, got {settings[2]}")
    shape = (x.shape[0], weight.shape[0], *x.shape[2:])
    out = x.new_empty((shape[0], shape[1] // 2, *shape[2:]))
    pre = x.new_empty(shape if keep else (0,))
    condition = None if condition is None else condition.contiguous()
    given = (x.contiguous(), weight.contiguous(), bias, condition)
    _convolve(out, pre if keep else None, *given, tuple(settings), gated=True)
    return out, pre


def _grad_tile(outputs: int, inputs: int, itemsize: int, tf32: bool) -> tuple[int, int, int, int]:
    """OUT, IN, PIXELS and the steps that are loaded ahead, of a gradient of the weight."""
    if itemsize == 4 and not tf32:
        return _power_of_2(outputs, 16, 64), _power_of_2(inputs, 16, 64), 16, 4
    return _power_of_2(outputs, 16, 128), _power_of_2(inputs, 16, 128), 64 // itemsize, 4


def masked_conv_weight_grad(grad: Tensor, x: Tensor, height: int, width: int, *settings: Any) -> Tensor:
    """``dgm::masked_conv_weight_grad.triton``: sums over parts of the pixels, then over the parts in order."""
    outputs, inputs = grad.shape[1], x.shape[1]
    out = grad.new_empty((outputs, inputs, height, width))
    taps = _live(_kernel(settings, height, width), *x.shape[2:])
    plane, columns = _plane(x), x.shape[3]
    pixels = x.shape[0] * plane
    if 0 in (out.numel(), taps.number, pixels):
        return out.zero_()
    tf32, vector = _is_tf32(x), _vector(plane)
    out_tile, in_tile, step, stages = _grad_tile(outputs, inputs, x.element_size(), tf32)
    out_blocks, in_blocks = -(-outputs // out_tile), -(-inputs // in_tile)
    tiles, steps = taps.number * in_blocks * out_blocks, -(-pixels // step)
    each = -(-steps // max(1, _PROGRAMS // tiles))
    splits = -(-steps // each)
    grad, x = grad.contiguous(), _channels_last(x.contiguous(), in_blocks * in_tile, tf32)
    last = not _aligned(vector, grad.element_size())
    if last:
        grad = _channels_last(grad, out_blocks * out_tile, tf32)
    partial = torch.empty((splits, taps.number, outputs, inputs), dtype=torch.float32, device=x.device)
    groups, rule = settings[2], int(taps.rule)
    numbers = (pixels, plane, columns, outputs, inputs, groups, in_blocks * in_tile, taps.number, *taps.numbers, each)
    constants = (width, rule, last, tf32, vector, stages, out_tile, in_tile, step)
    launch(weight_grad_kernel, _programs(splits * tiles), (partial, grad, x), numbers, constants)
    in_row = triton.next_power_of_2(height * width)
    pairs = max(1, TILE // in_row)
    sizes = (outputs, inputs, groups, taps.number, height * width, splits)
    grid = _programs(-(-outputs * inputs // pairs))
    launch(weight_sum_kernel, grid, (out, partial), sizes, (rule, pairs, in_row))
    return out


# ---- Gated activation


def _gate_grid(x: Tensor) -> tuple[Grid, int]:
    """Programs of whole rows, each a channel of the result, or of parts of one; and the size of a row."""
    plane = _plane(x)
    return cut(x.shape[0] * (x.shape[1] // 2), plane, _power_of_2(plane, 1, TILE)), plane


def masked_conv_gate(x: Tensor, condition: Tensor | None) -> Tensor:
    """``dgm::masked_conv_gate.triton``; see :func:`dgm_kernels.gated_activation`."""
    channels = x.shape[1] // 2
    grid, plane = _gate_grid(x)
    out = x.new_empty((x.shape[0], channels, *x.shape[2:]))
    if out.numel():
        constants = (condition is not None and condition.dim() == x.dim() > 2, _vector(plane))
        condition = None if condition is None else condition.contiguous()
        launch(gate_kernel, grid, (out, x.contiguous(), condition), (channels,), constants)
    return out


def masked_conv_gate_backward(grad: Tensor, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
    """``dgm::masked_conv_gate_backward.triton``: gradients of x and of a condition of each sample."""
    to_x = x.new_empty(x.shape)
    summed = condition is not None and condition.dim() < x.dim()
    if x.numel() == 0:
        return to_x, torch.zeros(x.shape[:2] if summed else (0,), dtype=torch.float32, device=x.device)
    grid, plane = _gate_grid(x)
    sums = torch.empty((*x.shape[:2], grid.numbers[2]) if summed else (0,), dtype=torch.float32, device=x.device)
    constants = (condition is not None and not summed, _vector(plane))
    condition = None if condition is None else condition.contiguous()
    tensors = (to_x, sums if summed else None, grad.contiguous(), x.contiguous(), condition)
    launch(gate_backward_kernel, grid, tensors, (x.shape[1] // 2,), constants)
    if not summed:
        return to_x, sums
    return to_x, sums.view(x.shape[:2]) if grid.numbers[2] == 1 else sums.sum(2)


# ---- Mixture of discretized logistics

_COMPONENTS = 256  # components of pixels a program: 2 a thread, so that all parameters of them stay in registers


def _mixture_call(x: Tensor, parameters: Tensor, levels: int) -> tuple[Grid, tuple[Any, ...], tuple[int, ...]]:
    channels, plane = x.shape[1], _plane(x)
    mixtures = parameters.shape[1] // (10 if channels == 3 else 3)
    components = triton.next_power_of_2(mixtures)
    size = max(1, _COMPONENTS // components)
    pixels = x.shape[0] * plane
    grid = _programs(-(-pixels // size))
    return grid, (1.0 / (levels - 1), pixels, plane, mixtures), (channels, components, size)


def masked_conv_mixture(x: Tensor, parameters: Tensor, levels: int) -> Tensor:
    """``dgm::masked_conv_mixture.triton``; see :func:`dgm_kernels.discretized_logistic_mixture`."""
    out = x.new_empty((x.shape[0], *x.shape[2:]), dtype=torch.float32)
    if out.numel():
        grid, numbers, constants = _mixture_call(x, parameters, levels)
        launch(mixture_kernel, grid, (out, x.contiguous(), parameters.contiguous()), numbers, constants)
    return out


def masked_conv_mixture_backward(grad: Tensor, x: Tensor, parameters: Tensor, levels: int) -> Tensor:
    """``dgm::masked_conv_mixture_backward.triton``: gradient of the parameters."""
    out = parameters.new_empty(parameters.shape)
    if out.numel():
        grid, numbers, constants = _mixture_call(x, parameters, levels)
        tensors = (out, grad.contiguous(), x.contiguous(), parameters.contiguous())
        launch(mixture_backward_kernel, grid, tensors, numbers, constants)
    return out


# ---- Categorical


def _categorical_call(logits: Tensor) -> tuple[Grid, tuple[int, ...], tuple[int, ...]]:
    outer, levels, _ = logits.shape
    plane = _plane(logits)
    # Along what is contiguous: pixels, or the levels of one.
    least = 16 if plane > 1 else 256
    level_tile = _power_of_2(levels, 1, least)
    size = 64 if plane > 1 else TILE // level_tile
    pixels = outer * plane
    return _programs(-(-pixels // size)), (pixels, plane, levels), (plane == 1, size, level_tile)


def masked_conv_categorical(x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """``dgm::masked_conv_categorical.triton``; see :func:`dgm_kernels.categorical_log_prob`."""
    out, normaliser = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for _ in range(2))
    if out.numel():
        grid, numbers, constants = _categorical_call(logits)
        launch(categorical_kernel, grid, (out, normaliser, x.contiguous(), logits.contiguous()), numbers, constants)
    return out, normaliser


def masked_conv_categorical_backward(grad: Tensor, x: Tensor, logits: Tensor, normaliser: Tensor) -> Tensor:
    """``dgm::masked_conv_categorical_backward.triton``: gradient of the logits."""
    out = logits.new_empty(logits.shape)
    if out.numel():
        grid, numbers, constants = _categorical_call(logits)
        tensors = (out, grad.contiguous(), x.contiguous(), logits.contiguous(), normaliser.contiguous())
        launch(categorical_backward_kernel, grid, tensors, numbers, constants)
    return out


# ---- Ahead-of-time compilation


def aot_specs() -> Iterator[Spec]:
    """Forms of the kernels to compile ahead of time: the common ones, and those with every option."""
    for name, dtype in (("fp32", "*fp32"), ("bf16", "*bf16")):
        yield from _conv_specs(name, dtype, False)
        yield from _pixel_specs(name, dtype)
    yield from _conv_specs("tf32", "*fp32", True)


def _conv_specs(name: str, dtype: str, tf32: bool) -> Iterator[Spec]:
    """Of 128 channels, 4 x 28 x 28 and 32 x 28 x 28 pixels, 3 x 3 taps."""
    itemsize = 2 if dtype == "*bf16" else 4
    plain = {"TF32": tf32, "WIDTH": 3, "RULE": int(Rule.FULL), "VECTOR": 8}
    forms: dict[str, dict[str, Any]] = {
        "": {},
        "_grouped": {"RULE": int(Rule.LESS_EQUAL)},
        "_turned": {"TURNED": True, "RULE": int(Rule.LESS_EQUAL)},
        "_1x1": {"DIRECT": True, "WIDTH": 1},
        "_14x14": {"VECTOR": 4},
        "_odd": {"VECTOR": 1},
        "_gated": {"GATED": True},
        "_gated_kept": {"GATED": True},
        "_gated_by_pixel": {"GATED": True, "PER_PIXEL": True},
    }
    off = dict.fromkeys(("TURNED", "GATED", "PER_PIXEL", "DIRECT"), False)
    pointers = dict.fromkeys(("out", "x", "packed", "bias"), dtype)
    for form, constants in forms.items():
        more = {"pre": dtype} if form == "_gated_kept" else {}
        more |= {"condition": dtype} if "GATED" in constants else {}
        for size, batch in (("", 4), ("_large", 32)):
            gated, direct, vector = "GATED" in constants, "DIRECT" in constants, constants.get("VECTOR", 8)
            tile = _conv_tile(64 if gated else 128, 128, batch * 784, gated, direct, vector, itemsize, tf32)
            if size and tile.pixels == 64:
                continue
            sizes = {"STAGES": tile.stages, "ROWS": tile.rows, "PIXELS": tile.pixels, "INNER": tile.inner}
            yield spec(f"conv{form}{size}_{name}", conv_kernel, pointers | more, **off | plain | sizes | constants)
    out_tile, in_tile, step, stages = _grad_tile(128, 128, itemsize, tf32)
    sizes = {"STAGES": stages, "OUT": out_tile, "IN": in_tile, "PIXELS": step}
    both = {"partial": "*fp32", "grad": dtype, "x": dtype}
    for form, vector in (("", 8), ("_odd", 1)):
        constants = plain | sizes | {"RULE": int(Rule.LESS_EQUAL), "LAST": vector == 1, "VECTOR": vector}
        yield spec(f"weight_grad{form}_{name}", weight_grad_kernel, both, **constants)
    masks = {"RULE": int(Rule.LESS_EQUAL), "TF32": tf32, "TURNED": False, "GATED": True, "ROWS": _PACK_ROWS}
    yield spec(f"pack_{name}", pack_kernel, {"packed": dtype, "weight": dtype}, **masks | {"INNER": 128 // itemsize})
    last = plain | {"PIXELS": _CHANNELS, "INNER": _CHANNELS}
    yield spec(f"channels_last_{name}", channels_last_kernel, {"out": dtype, "x": dtype}, **last)
    sums = {"RULE": int(Rule.LESS_EQUAL), "PAIRS": TILE // 16, "TAPS": 16}
    yield spec(f"weight_sum_{name}", weight_sum_kernel, {"out": dtype, "partial": "*fp32"}, **sums)


def _pixel_specs(name: str, dtype: str) -> Iterator[Spec]:
    forward = dict.fromkeys(("out", "x", "condition"), dtype)
    backward = dict.fromkeys(("to_x", "grad", "x", "condition"), dtype) | {"sums": "*fp32"}
    for form, per_pixel, vector in (("", False, 8), ("_by_pixel", True, 8), ("_odd", False, 1)):
        constants = {"PER_PIXEL": per_pixel, "VECTOR": vector}
        yield spec(f"gate{form}_{name}", gate_kernel, forward, **constants)
        yield spec(f"gate_backward{form}_{name}", gate_backward_kernel, backward, **constants)
    parameters = {"x": dtype, "parameters": dtype}
    for channels, components in ((1, 16), (3, 16), (3, 128)):
        sizes = {"CHANNELS": channels, "MIXTURES": components, "PIXELS": max(1, _COMPONENTS // components)}
        form = f"{components}x{channels}_{name}"
        yield spec(f"mixture_{form}", mixture_kernel, parameters | {"out": "*fp32"}, **sizes)
        gradients = parameters | {"to_parameters": dtype, "grad": "*fp32"}
        yield spec(f"mixture_backward_{form}", mixture_backward_kernel, gradients, **sizes)
    values = {"x": "*i64", "logits": dtype, "normaliser": "*fp32"}
    for form, last, size, levels in (("", False, 64, 16), ("_last", True, 4, 256)):
        sizes = {"LAST": last, "PIXELS": size, "LEVELS": levels}
        yield spec(f"categorical{form}_{name}", categorical_kernel, values | {"out": "*fp32"}, **sizes)
        gradients = values | {"to_logits": dtype, "grad": "*fp32"}
        yield spec(f"categorical_backward{form}_{name}", categorical_backward_kernel, gradients, **sizes)
