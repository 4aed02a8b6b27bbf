"""The operations that a generator knows, each as what it adds to a program."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from . import (
    causal_conv1d,
    gated_activation,
    horizontal_conv2d,
    masked_conv2d,
    masked_linear,
    vertical_conv2d,
)
from .checks import is_strict, pair
from .lowering import Constant, Lowering, Unsupported, View
from .program import Activation
from .taps import Kernel, Layout

Value = View | Constant | float
Handler = Callable[..., Any]  # takes the lowering and what the operation takes, tensors as views and constants


def _maps(x: Any) -> View:
    if not isinstance(x, View):
        raise Unsupported("a first argument that does not depend on the image")
    return x


# ---- Convolutions and gates.


def _masked_conv2d(
    low: Lowering,
    x: Any,
    weight: Any,
    bias: Any = None,
    *,
    mask_type: str,
    channel_groups: int = 1,
    dilation: int | tuple[int, int] = 1,
    gated: bool = False,
    condition: Any = None,
) -> View:
    height, width = weight.value.shape[2:]
    steps = pair("dilation", dilation)
    kernel = Kernel(Layout.RASTER, is_strict(mask_type), channel_groups, height, width, steps)
    return low.conv(_maps(x), weight, bias, kernel, gated, condition)


def _vertical_conv2d(
    low: Lowering,
    x: Any,
    weight: Any,
    bias: Any = None,
    *,
    mask_type: str = "B",
    dilation: int | tuple[int, int] = 1,
    gated: bool = False,
    condition: Any = None,
) -> View:
    height, width = weight.value.shape[2:]
    kernel = Kernel(Layout.VERTICAL, is_strict(mask_type), 1, height, width, pair("dilation", dilation))
    return low.conv(_maps(x), weight, bias, kernel, gated, condition)


def _horizontal_conv(
    low: Lowering,
    x: Any,
    weight: Any,
    bias: Any = None,
    *,
    mask_type: str = "B",
    channel_groups: int = 1,
    dilation: int = 1,
    gated: bool = False,
    condition: Any = None,
) -> View:
    """horizontal_conv2d, and causal_conv1d: the same on an image of one row."""
    steps = pair("dilation", dilation)
    kernel = Kernel(Layout.HORIZONTAL, is_strict(mask_type), channel_groups, 1, weight.value.shape[-1], steps)
    return low.conv(_maps(x), weight, bias, kernel, gated, condition)


def _conv(
    low: Lowering,
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> View:
    if groups != 1 or any(step != 1 for step in _numbers(stride)):
        raise Unsupported("strides and groups")
    if padding not in ("same", "valid") and any(number != 0 for number in _numbers(padding)):
        raise Unsupported("padding of a kernel that is not masked")
    return low.pointwise(_maps(x), weight, bias)


def _numbers(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (tuple, list)) else (value,)


def _linear(low: Lowering, x: Any, weight: Any, bias: Any = None) -> View:
    if low.dimensions != 2:
        raise Unsupported("a dense layer over pixels")
    return low.pointwise(_maps(x), weight, bias)


def _masked_linear(
    low: Lowering,
    x: Any,
    weight: Any,
    bias: Any = None,
    in_degrees: Any = None,
    out_degrees: Any = None,
    *,
    strict: bool = False,
) -> View:
    if low.dimensions != 2:
        raise Unsupported("a dense layer over pixels")
    return low.masked_linear(_maps(x), weight, bias, in_degrees, out_degrees, strict)


def _gated_activation(low: Lowering, x: Any, condition: Any = None, *, channel_groups: int = 1) -> View:
    return low.gate(_maps(x), condition, channel_groups)


# ---- Arithmetic.


def _add(low: Lowering, left: Value, right: Value, *, alpha: float = 1.0) -> View:
    return low.add(left, right, alpha)


def _subtract(low: Lowering, left: Value, right: Value, *, alpha: float = 1.0) -> View:
    return low.add(left, right, -alpha)


def _multiply(low: Lowering, left: Value, right: Value) -> View:
    return low.multiply(left, right)


def _divide(low: Lowering, left: Value, right: Value) -> View:
    if isinstance(right, View):
        raise Unsupported("division by a tensor that depends on the image")
    if isinstance(right, Constant):
        divisor = right.recipe
        return low.multiply(left, Constant(lambda env: divisor(env).reciprocal(), right.value.reciprocal()))
    return low.multiply(left, 1.0 / right)


def _negative(low: Lowering, x: View) -> View:
    return x.scaled(-1.0)


def _activation(kind: Activation) -> Handler:
    def activate(low: Lowering, x: Any, inplace: bool = False) -> View:
        return low.activate(_maps(x), kind)

    return activate


def _elu(low: Lowering, x: Any, alpha: float = 1.0, inplace: bool = False) -> View:
    if alpha != 1.0:
        raise Unsupported(f"alpha={alpha}, only 1")
    return low.activate(_maps(x), Activation.ELU)


def _identity(low: Lowering, x: Any, *args: Any, **kwargs: Any) -> View:
    return _maps(x)


# ---- Channels.


def _check_channels(low: Lowering, dim: int) -> None:
    if dim % low.dimensions != 1:
        raise Unsupported(f"dimension {dim}, only that of the channels")


def _cat(low: Lowering, tensors: Sequence[Any], dim: int = 0) -> View:
    _check_channels(low, dim)
    views = [t if isinstance(t, View) else low.view(t, t.value.shape[1]) for t in tensors]
    return View(tuple(segment for view in views for segment in view.segments))


def _chunk(low: Lowering, x: Any, chunks: int, dim: int = 0) -> tuple[View, ...]:
    return _split(low, x, -(-_maps(x).channels // chunks), dim)


def _split(low: Lowering, x: Any, split_size: int | Sequence[int], dim: int = 0) -> tuple[View, ...]:
    _check_channels(low, dim)
    view, begin = _maps(x), 0
    parts: list[View] = []
    sizes = [split_size] * view.channels if isinstance(split_size, int) else list(split_size)
    for size in sizes:
        if begin < view.channels:
            parts.append(view.part(begin, min(begin + size, view.channels)))
        begin += size
    return tuple(parts)


def _narrow(low: Lowering, x: Any, dim: int, start: int, length: int) -> View:
    _check_channels(low, dim)
    begin = start + _maps(x).channels if start < 0 else start
    return _maps(x).part(begin, begin + length)


def _getitem(low: Lowering, x: Any, index: Any) -> Any:
    if isinstance(x, tuple):
        return x[index]
    whole = slice(None)
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in parts:
        place = parts.index(Ellipsis)
        parts[place : place + 1] = [whole] * (low.dimensions - len(parts) + 1)
    channels = parts[1] if len(parts) > 1 else whole
    others = [part for place, part in enumerate(parts) if place != 1]
    if not isinstance(channels, slice) or channels.step not in (None, 1) or any(part != whole for part in others):
        raise Unsupported(f"the index {index}, only ranges of channels")
    begin, end, _ = channels.indices(_maps(x).channels)
    return x.part(begin, end)


_relu, _silu = _activation(Activation.RELU), _activation(Activation.SILU)
_tanh, _sigmoid = _activation(Activation.TANH), _activation(Activation.SIGMOID)

FUNCTIONS: dict[Any, Handler] = {
    masked_conv2d: _masked_conv2d,
    vertical_conv2d: _vertical_conv2d,
    horizontal_conv2d: _horizontal_conv,
    causal_conv1d: _horizontal_conv,
    masked_linear: _masked_linear,
    gated_activation: _gated_activation,
    **dict.fromkeys((F.conv1d, F.conv2d), _conv),
    F.linear: _linear,
    **dict.fromkeys((operator.add, operator.iadd, torch.add), _add),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, torch.subtract), _subtract),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, torch.multiply), _multiply),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div, torch.divide), _divide),
    **dict.fromkeys((operator.neg, torch.neg, torch.negative), _negative),
    **dict.fromkeys((F.relu, torch.relu), _relu),
    F.elu: _elu,
    F.silu: _silu,
    **dict.fromkeys((F.tanh, torch.tanh), _tanh),
    **dict.fromkeys((F.sigmoid, torch.sigmoid), _sigmoid),
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.alpha_dropout, torch.clone), _identity),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _cat),
    torch.chunk: _chunk,
    torch.split: _split,
    torch.narrow: _narrow,
    operator.getitem: _getitem,
}

METHODS: dict[str, Handler] = {
    **dict.fromkeys(("add", "add_"), _add),
    **dict.fromkeys(("sub", "sub_"), _subtract),
    **dict.fromkeys(("mul", "mul_"), _multiply),
    **dict.fromkeys(("div", "div_"), _divide),
    **dict.fromkeys(("neg", "neg_"), _negative),
    **dict.fromkeys(("relu", "relu_"), _relu),
    **dict.fromkeys(("tanh", "tanh_"), _tanh),
    **dict.fromkeys(("sigmoid", "sigmoid_"), _sigmoid),
    **dict.fromkeys(("contiguous", "clone"), _identity),
    "chunk": _chunk,
    "split": _split,
    "narrow": _narrow,
}

_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout)
_ACTIVATIONS = (F.relu, F.elu, F.silu)  # that take `inplace` as their last argument
_ALIASING: frozenset[Any] = frozenset(
    (
        *(F.dropout, F.dropout1d, F.dropout2d, F.alpha_dropout, torch.chunk, torch.split, torch.narrow),
        *(operator.getitem, "contiguous", "chunk", "split", "narrow"),
    )
)


def writes(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether an operation writes its result to its first argument."""
    if module is not None:
        return bool(getattr(module, "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    if node.target in (operator.iadd, operator.isub, operator.imul, operator.itruediv):
        return True
    return bool(node.kwargs.get("inplace", False)) or (node.target in _ACTIVATIONS and node.args[-1] is True)


def aliases(target: Any, module: nn.Module | None) -> bool:
    """Whether an operation may return its first argument, or a part of the memory of it."""
    return isinstance(module, _IDENTITIES) if module is not None else target in _ALIASING


def _parameter(module: nn.Module, name: str) -> Constant | None:
    value = getattr(module, name)
    return None if value is None else Constant(lambda env: getattr(module, name), value)


def call_module(low: Lowering, module: nn.Module, x: Any) -> View:
    """What a module of PyTorch adds."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        settings = (module.stride, module.padding, module.dilation, module.groups)
        return _conv(low, x, _parameter(module, "weight"), _parameter(module, "bias"), *settings)
    if isinstance(module, nn.Linear):
        return _linear(low, x, _parameter(module, "weight"), _parameter(module, "bias"))
    if isinstance(module, nn.ELU):
        return _elu(low, x, module.alpha)
    for kinds, handler in _MODULES:
        if isinstance(module, kinds):
            return handler(low, x)
    raise Unsupported("a module of this type")


_MODULES: tuple[tuple[Any, Handler], ...] = (
    (nn.ReLU, _relu),
    (nn.SiLU, _silu),
    (nn.Tanh, _tanh),
    (nn.Sigmoid, _sigmoid),
    (_IDENTITIES, _identity),
)
