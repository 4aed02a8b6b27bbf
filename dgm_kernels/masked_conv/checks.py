"""Checks of the arguments of the masked_conv op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._core.checks import as_int, check_batch, check_device, check_float, values_known


def positive_int(name: str, value: object) -> int:
    """``value`` as an int from 1 on."""
    number = as_int(value)
    if number is None:
        raise TypeError(f"{name} must be an int, got {value!r}")
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number


def pair(name: str, value: object) -> tuple[int, int]:
    """One positive int, or two: for rows and for columns."""
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"{name} must be an int or two, got {value!r}")
        return positive_int(f"{name}[0]", value[0]), positive_int(f"{name}[1]", value[1])
    number = positive_int(name, value)
    return number, number


def is_strict(mask_type: object) -> bool:
    """Whether the mask type is A; it must be A or B."""
    if mask_type not in ("A", "B"):
        raise ValueError(f"mask_type must be 'A' or 'B', got {mask_type!r}")
    return mask_type == "A"


def check_groups(channel_groups: object, outputs: int, inputs: int, output_name: str, input_name: str) -> int:
    """Both numbers of channels are divisible by the groups."""
    groups = positive_int("channel_groups", channel_groups)
    for name, channels in ((input_name, inputs), (output_name, outputs)):
        if channels % groups:
            raise ValueError(f"channel_groups must divide {name}, {channels}, got {groups}")
    return groups


def check_conv(x: object, weight: object, bias: object, dimensions: int) -> None:
    """x ``[batch, in, ...]``, weight ``[out, in, ...]`` and bias ``[out]`` fit together; ``dimensions`` are spatial."""
    form = "[batch, channels, height, width]" if dimensions == 2 else "[batch, channels, length]"
    check_batch("x", x)
    assert isinstance(x, Tensor)
    if x.dim() != dimensions + 2:
        raise ValueError(f"x must have shape {form}, got {tuple(x.shape)}")
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    if weight.dim() != dimensions + 2 or weight.shape[1] != x.shape[1] or 0 in weight.shape[2:]:
        taps = ", height, width" if dimensions == 2 else ", taps"
        raise ValueError(f"weight must have shape [outputs, {x.shape[1]}{taps}], got {tuple(weight.shape)}")
    check_float("weight", weight)
    check_device("weight", weight, x, "x")
    check_bias(bias, weight, x)


def check_bias(bias: object, weight: Tensor, x: Tensor) -> None:
    """A number for each output of the weight, or None."""
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a tensor or None, got {type(bias).__name__}")
    if tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias must have shape {(weight.shape[0],)}, the outputs of weight, got {tuple(bias.shape)}")
    check_float("bias", bias)
    check_device("bias", bias, x, "x")


def check_odd(weight: Tensor, dimensions: Sequence[int]) -> None:
    """The kernel has a middle in these dimensions of the weight."""
    for dim in dimensions:
        if weight.shape[dim] % 2 == 0:
            side = "height" if dim == 2 else "width"
            raise ValueError(f"weight must have a kernel of odd {side}, got {tuple(weight.shape[2:])}")


def check_gate(x: object, condition: object) -> None:
    """x ``[batch, 2 C, ...]`` and a condition for each sample or each element."""
    check_batch("x", x)
    assert isinstance(x, Tensor)
    if x.dim() < 2 or x.shape[1] % 2:
        raise ValueError(
            f"x must have shape [batch, channels, ...] with an even number of channels, got {tuple(x.shape)}"
        )
    check_condition(condition, x, x.shape, "x")


def check_condition(condition: object, x: Tensor, shape: Sequence[int], of: str) -> None:
    """A number for each channel of each sample, or one for each element of a tensor of this shape."""
    if condition is None:
        return
    if not isinstance(condition, Tensor):
        raise TypeError(f"condition must be a tensor or None, got {type(condition).__name__}")
    per_sample = tuple(shape[:2])
    if tuple(condition.shape) not in (tuple(shape), per_sample, (*per_sample, *[1] * (len(shape) - 2))):
        raise ValueError(
            f"condition must have shape {per_sample} or that of {of}, {tuple(shape)}, got {tuple(condition.shape)}"
        )
    check_float("condition", condition)
    check_device("condition", condition, x, "x")


def check_epilogue(x: Tensor, weight: Tensor, groups: int, gated: bool, condition: object) -> None:
    """What follows a convolution fits its result."""
    if gated and weight.shape[0] % (2 * groups):
        of_groups = f" in each of {groups} groups" if groups > 1 else ""
        raise ValueError(f"weight must have an even number of outputs{of_groups} to be gated, got {weight.shape[0]}")
    check_condition(condition, x, (x.shape[0], weight.shape[0], *x.shape[2:]), "the convolution's result")


def check_levels(levels: object) -> int:
    """At least two."""
    number = positive_int("levels", levels)
    if number < 2:
        raise ValueError(f"levels must be at least 2, got {number}")
    return number


def mixtures_of(parameters: Tensor, channels: int, name: str) -> int:
    """The number of components that a tensor of parameters ``[batch, P, ...]`` describes."""
    numbers = 1 + (9 if channels == 3 else 2 * channels)
    if channels not in (1, 3):
        raise ValueError(f"{name} must have 1 or 3 channels, got {channels}")
    if parameters.dim() < 2 or parameters.shape[1] == 0 or parameters.shape[1] % numbers:
        raise ValueError(
            f"parameters must have shape [batch, {numbers} K, ...] for {channels} channels and K components, "
            f"got {tuple(parameters.shape)}"
        )
    return parameters.shape[1] // numbers


def check_mixture(x: object, parameters: object) -> None:
    """x ``[batch, channels, ...]`` in [-1, 1] and the parameters at each of its pixels."""
    check_batch("x", x)
    assert isinstance(x, Tensor)
    if x.dim() < 2:
        raise ValueError(f"x must have shape [batch, channels, ...], got {tuple(x.shape)}")
    if not isinstance(parameters, Tensor):
        raise TypeError(f"parameters must be a tensor, got {type(parameters).__name__}")
    check_float("parameters", parameters)
    check_device("parameters", parameters, x, "x")
    mixtures_of(parameters, x.shape[1], "x")
    if parameters.shape[:1] + parameters.shape[2:] != x.shape[:1] + x.shape[2:]:
        raise ValueError(
            f"parameters must have the batch and the pixels of x, {tuple(x.shape)}, got {tuple(parameters.shape)}"
        )
    if values_known(x) and x.numel() and not bool((x.detach().abs() <= 1).all()):
        raise ValueError(f"x must be in [-1, 1], got values from {float(x.min()):g} to {float(x.max()):g}")


def check_categorical(x: object, logits: object, dim: object) -> int:
    """x int64, of the shape of the logits without the dimension of the levels; that dimension, from 0 on."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a tensor, got {type(logits).__name__}")
    check_float("logits", logits)
    number = as_int(dim)
    if number is None or not -logits.dim() <= number < logits.dim():
        raise ValueError(f"dim must be one of the {logits.dim()} dimensions of logits, got {dim!r}")
    number %= logits.dim()
    if not isinstance(x, Tensor) or x.dtype != torch.int64:
        raise TypeError(f"x must be an int64 tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    expected = (*logits.shape[:number], *logits.shape[number + 1 :])
    if tuple(x.shape) != expected:
        raise ValueError(
            f"x must have the shape of logits without dimension {number}, {expected}, got {tuple(x.shape)}"
        )
    check_device("x", x, logits, "logits")
    if logits.shape[number] == 0:
        raise ValueError(f"logits must have at least one level in dimension {number}, got {tuple(logits.shape)}")
    if x.numel() and values_known(x):
        low, high = (int(bound) for bound in x.aminmax())
        if low < 0 or high >= logits.shape[number]:
            raise ValueError(
                f"x must be in [0, {logits.shape[number]}), the levels of logits, got {low if low < 0 else high}"
            )
    return number
