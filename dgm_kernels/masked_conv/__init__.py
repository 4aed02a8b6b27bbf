"""Masked convolutions and the distributions of autoregressive models, and generation that does each pixel once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._core import ops
from .._core.backends import select
from .._core.checks import check_device, check_float
from . import op, reference
from .checks import (
    check_categorical,
    check_conv,
    check_epilogue,
    check_gate,
    check_groups,
    check_levels,
    check_mixture,
    check_odd,
    is_strict,
    mixtures_of,
    pair,
    positive_int,
)
from .linear import masked_linear
from .operands import in_one_dtype
from .overridable import overridable
from .taps import Kernel, Layout

__all__ = [
    "categorical_log_prob",
    "categorical_sample",
    "causal_conv1d",
    "discretized_logistic_mixture",
    "discretized_logistic_mixture_sample",
    "gated_activation",
    "horizontal_conv2d",
    "masked_conv2d",
    "masked_linear",
    "vertical_conv2d",
]


@overridable
def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask_type: str,
    channel_groups: int = 1,
    dilation: int | tuple[int, int] = 1,
    gated: bool = False,
    condition: Tensor | None = None,
) -> Tensor:
    """Convolution whose pixel sees only the pixels before it in raster order, as ``conv2d(x, weight * mask, bias)``.

    With mask type B it sees itself too. The channels of ``x`` and of the result fall into ``channel_groups`` groups of
    equal size, one for each colour: at the centre, group g sees the groups before g (type A) or up to g (type B);
    without groups nothing (A) or all (B). The result has the size of ``x``; beyond the border are zeros. Masked weights
    are not read, whatever they hold, and cost no arithmetic; their gradient is 0. Differentiable to any order; saves
    ``x`` and ``weight``.

    Args:
        x: ``[batch, inputs, height, width]``.
        weight: ``[outputs, inputs, kh, kw]``, both sides odd, rectangular if wished. It is never written to.
        bias: ``[outputs]``.
        mask_type: ``"A"`` for the first layer of a model, ``"B"`` for the others.
        channel_groups: number of colour groups; divides both numbers of channels.
        dilation: distance of the taps, for rows and columns.
        gated: returns :func:`gated_activation` of the convolution, with half as many channels. With groups, the
            features and the gates of a group are the halves of its channels.
        condition: ``[batch, outputs]`` or like the convolution's result; added to it.

    Returns:
        ``[batch, outputs, height, width]`` (``outputs / 2`` if gated) in the dtype of ``x``
        (with a condition of PyTorch's promotion of the two).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or value; the message names it.

    Source: van den Oord et al., "Pixel Recurrent Neural Networks", 2016.
    """
    check_conv(x, weight, bias, 2)
    check_odd(weight, (2, 3))
    strict = is_strict(mask_type)
    groups = check_groups(channel_groups, weight.shape[0], weight.shape[1], "the outputs of weight", "the inputs")
    return _conv(x, weight, bias, Layout.RASTER, strict, groups, pair("dilation", dilation), gated, condition)


@overridable
def vertical_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask_type: str = "B",
    dilation: int | tuple[int, int] = 1,
    gated: bool = False,
    condition: Tensor | None = None,
) -> Tensor:
    """The vertical stack of a gated PixelCNN: a convolution over the row of the pixel and the rows above it.

    ``weight`` is the upper half of a kernel, middle row included: tap ``[kh - 1, kw // 2]`` is the pixel itself. Mask
    type A hides its row. A stack that begins with A and goes on with B sees exactly the rows above; together with a
    horizontal stack no pixel is missed. Otherwise as :func:`masked_conv2d`.

    Args:
        x: ``[batch, inputs, height, width]``.
        weight: ``[outputs, inputs, kh, kw]``, ``kw`` odd; any ``kh``.
        bias, mask_type, dilation, gated, condition: as in :func:`masked_conv2d`.

    Returns:
        ``[batch, outputs, height, width]`` (``outputs / 2`` if gated) in the dtype of ``x``
        (with a condition of PyTorch's promotion of the two).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or value; the message names it.

    Source: van den Oord et al., "Conditional Image Generation with PixelCNN Decoders", 2016.
    """
    check_conv(x, weight, bias, 2)
    check_odd(weight, (3,))
    strict = is_strict(mask_type)
    return _conv(x, weight, bias, Layout.VERTICAL, strict, 1, pair("dilation", dilation), gated, condition)


@overridable
def horizontal_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask_type: str = "B",
    channel_groups: int = 1,
    dilation: int = 1,
    gated: bool = False,
    condition: Tensor | None = None,
) -> Tensor:
    """The horizontal stack of a gated PixelCNN: a convolution over the pixel and those left of it.

    ``weight`` is the left half of a ``1 x (2 kw - 1)`` kernel, centre included: tap ``[0, kw - 1]`` is the pixel
    itself, to which mask type and groups apply. Otherwise as :func:`masked_conv2d`.

    Args:
        x: ``[batch, inputs, height, width]``.
        weight: ``[outputs, inputs, 1, kw]``, any ``kw``.
        bias, mask_type, channel_groups, dilation, gated, condition: as in :func:`masked_conv2d`.

    Returns:
        ``[batch, outputs, height, width]`` (``outputs / 2`` if gated) in the dtype of ``x``
        (with a condition of PyTorch's promotion of the two).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or value; the message names it.

    Source: van den Oord et al., "Conditional Image Generation with PixelCNN Decoders", 2016.
    """
    check_conv(x, weight, bias, 2)
    if weight.shape[2] != 1:
        raise ValueError(f"weight must have a kernel of height 1, got {tuple(weight.shape[2:])}")
    strict = is_strict(mask_type)
    groups = check_groups(channel_groups, weight.shape[0], weight.shape[1], "the outputs of weight", "the inputs")
    step = positive_int("dilation", dilation)
    return _conv(x, weight, bias, Layout.HORIZONTAL, strict, groups, (1, step), gated, condition)


@overridable
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask_type: str = "B",
    dilation: int = 1,
    gated: bool = False,
    condition: Tensor | None = None,
) -> Tensor:
    """Convolution over the past: ``y[t] = bias + sum_j weight[:, :, j] x[t - (k - 1 - j) dilation]``.

    Before the first step are zeros. Mask type A hides ``x[t]``, for the first layer of a model.
    Otherwise as :func:`masked_conv2d`.

    Args:
        x: ``[batch, inputs, length]``.
        weight: ``[outputs, inputs, k]``, any ``k``.
        bias, mask_type, gated, condition: as in :func:`masked_conv2d`.
        dilation: distance of the taps in steps.

    Returns:
        ``[batch, outputs, length]`` (``outputs / 2`` if gated) in the dtype of ``x``
        (with a condition of PyTorch's promotion of the two).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or value; the message names it.

    Source: van den Oord et al., "WaveNet: A Generative Model for Raw Audio", 2016.
    """
    check_conv(x, weight, bias, 1)
    strict = is_strict(mask_type)
    step = positive_int("dilation", dilation)
    check_epilogue(x, weight, 1, gated, condition)
    if condition is not None and condition.dim() == 3:
        condition = condition.unsqueeze(2)
    y = _conv(x.unsqueeze(2), weight.unsqueeze(2), bias, Layout.HORIZONTAL, strict, 1, (1, step), gated, condition)
    return y.squeeze(2)


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: Layout,
    strict: bool,
    groups: int,
    dilation: tuple[int, int],
    gated: bool,
    condition: Tensor | None,
) -> Tensor:
    check_epilogue(x, weight, groups, gated, condition)
    x, weight, bias = in_one_dtype(x, weight, bias)
    backend = select(x.device, (x, weight, bias), natives=op.BACKENDS)
    if backend == "reference":
        kernel = Kernel(layout, strict, groups, weight.shape[2], weight.shape[3], dilation)
        y = reference.masked_conv(x, weight, bias, kernel)
    else:
        settings = (int(layout), strict, groups, *dilation)
        wanted = (x, weight, bias)
        grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in wanted)
        bias = None if bias is None else bias.contiguous()
        if gated and backend == "triton" and (condition is None or getattr(condition, "dtype", None) == x.dtype):
            return _gated_conv(x.contiguous(), weight.contiguous(), bias, condition, settings, grad)
        y = ops.call(op.conv[backend], grad, x.contiguous(), weight.contiguous(), bias, *settings)
    if gated:
        return gated_activation(y, condition, channel_groups=groups)
    if condition is None:
        return y
    return y + condition.view(*condition.shape, *[1] * (y.dim() - condition.dim()))


def _gated_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    condition: Tensor | None,
    settings: tuple[int, bool, int, int, int],
    grad: bool,
) -> Tensor:
    """The convolution with the gated activation in the same kernel."""
    if condition is not None:
        grad = grad or (torch.is_grad_enabled() and condition.requires_grad)
        shape = (x.shape[0], weight.shape[0], *x.shape[2:])  # of the convolution's result
        condition = condition.contiguous() if condition.shape == shape else condition.reshape(shape[:2])
    return ops.call(op.gated["triton"], grad, x, weight, bias, condition, *settings, grad)[0]


@overridable
def gated_activation(x: Tensor, condition: Tensor | None = None, *, channel_groups: int = 1) -> Tensor:
    """``tanh(a) * sigmoid(b)`` with ``[a, b] = x + condition``, the halves of the channels.

    One pass forward, one backward, which computes both functions again. Differentiable to any order; saves ``x`` and
    ``condition``.

    Args:
        x: ``[batch, 2 C, ...]``.
        condition: ``[batch, 2 C]`` (one number for all pixels of a channel) or like ``x``.
        channel_groups: groups of channels, each of which has its own halves a and b, so that the result's channels
            keep their group.

    Returns:
        ``[batch, C, ...]`` in the dtype of ``x`` (of PyTorch's promotion of ``x`` and ``condition``).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value; the message names it.

    Source: van den Oord et al., "Conditional Image Generation with PixelCNN Decoders", 2016.
    """
    check_gate(x, condition)
    groups = check_groups(channel_groups, x.shape[1] // 2, x.shape[1] // 2, "half the channels of x", "half of them")
    if condition is not None and condition.dtype != x.dtype:
        dtype = torch.promote_types(x.dtype, condition.dtype)
        x, condition = x.to(dtype), condition.to(dtype)
    if condition is not None and condition.shape != x.shape:
        condition = condition.view(x.shape[:2])
    shape = x.shape
    if groups > 1:
        x = x.reshape(shape[0] * groups, shape[1] // groups, *shape[2:])
        condition = condition if condition is None else condition.reshape(x.shape[0], x.shape[1], *condition.shape[2:])
    backend = select(x.device, (x, condition), natives=op.BACKENDS)
    if backend == "reference":
        y = reference.gated_activation(x, condition)
    else:
        grad = torch.is_grad_enabled() and (x.requires_grad or (condition is not None and condition.requires_grad))
        condition = condition if condition is None else condition.contiguous()
        y = ops.call(op.gate[backend], grad, x.contiguous(), condition)
    return y.view(shape[0], shape[1] // 2, *shape[2:])


def discretized_logistic_mixture(x: Tensor, parameters: Tensor, *, levels: int = 256) -> Tensor:
    """Log-probability of each pixel under a mixture of discretized logistic distributions.

    ``log sum_k pi_k prod_c P_kc(x_c)`` with ``P(x) = F((x - m + h) / s) - F((x - m - h) / s)``, F the logistic function
    and ``h = 1 / (levels - 1)`` half a level; the lowest and the highest level take all that is beyond them. The mean
    of green is ``m + c0 red``, that of blue ``m + c1 red + c2 green``. ``s = exp(max(log_scale, -7))`` and
    ``c = tanh(coefficient)``. In float32 throughout, without a difference of nearly equal numbers: finite wherever the
    parameters are moderate. Differentiable in ``parameters`` to any order; saves both tensors.

    Args:
        x: ``[batch, channels, ...]`` with 1 or 3 channels, levels ``2 i / (levels - 1) - 1`` in [-1, 1].
        parameters: ``[batch, 10 K, ...]`` of three channels, ``[batch, 3 K, ...]`` of one: K logits of pi, then for
            each channel K means, K log-scales and, of three channels, K coefficients (of red for green; of red for
            blue; of green for blue).
        levels: of a channel.

    Returns:
        ``[batch, ...]`` in nats, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value; the message names it.

    Source: Salimans et al., "PixelCNN++", 2017.
    """
    check_mixture(x, parameters)
    levels = check_levels(levels)
    refusal = "x with a gradient is differentiated by the reference" if x.requires_grad else None
    backend = select(x.device, (x, parameters), refusal, natives=op.BACKENDS)
    if backend == "reference":
        work = torch.float64 if torch.float64 in (x.dtype, parameters.dtype) else torch.float32
        return reference.discretized_logistic_mixture(x.to(work), parameters.to(work), levels)
    grad = torch.is_grad_enabled() and parameters.requires_grad
    return ops.call(op.mixture[backend], grad, x.contiguous(), parameters.contiguous(), levels)


def discretized_logistic_mixture_sample(parameters: Tensor, uniform: Tensor, *, levels: int = 256) -> Tensor:
    """Levels drawn from a mixture of discretized logistic distributions, by given uniform numbers.

    ``uniform[:, 0]`` picks the component, ``uniform[:, 1 + c]`` channel c by the inverse of its distribution function;
    each channel is rounded to a level before it moves the mean of the next.

    Args:
        parameters: ``[batch, 10 K, ...]`` or ``[batch, 3 K, ...]``, as in :func:`discretized_logistic_mixture`.
        uniform: ``[batch, 1 + channels, ...]`` in (0, 1]; 1 or 3 channels.
        levels: of a channel.

    Returns:
        int64 ``[batch, channels, ...]`` in 0 .. levels - 1.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value; the message names it.

    Source: Salimans et al., "PixelCNN++", 2017.
    """
    levels = check_levels(levels)
    _check_uniform(parameters, uniform, "parameters")
    mixtures_of(parameters, uniform.shape[1] - 1, "uniform, after the first,")
    if uniform.shape[:1] + uniform.shape[2:] != parameters.shape[:1] + parameters.shape[2:]:
        raise ValueError(
            f"uniform must have the batch and the pixels of parameters, {tuple(parameters.shape)}, "
            f"got {tuple(uniform.shape)}"
        )
    return reference.discretized_logistic_mixture_sample(_wide(parameters), uniform, levels)


@overridable
def categorical_log_prob(x: Tensor, logits: Tensor, *, dim: int = 1) -> Tensor:
    """``log softmax(logits)[x]``: log-probability of each level, in one pass that stores neither softmax nor one-hot.

    The backward pass is ``g (onehot(x) - softmax(logits))``, from the saved logits and their log-sum-exp.
    Differentiable in ``logits`` to any order.

    Args:
        x: int64, shape of ``logits`` without dimension ``dim``; each entry is a level.
        logits: ``[batch, levels, ...]``.
        dim: the dimension of the levels.

    Returns:
        Shape of ``x``, in nats, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value; the message names it. Levels that
            are out of range on a GPU give NaN.
    """
    dim = check_categorical(x, logits, dim)
    outer, levels, inner = math.prod(logits.shape[:dim]), logits.shape[dim], math.prod(logits.shape[dim + 1 :])
    flat, merged = x.reshape(outer, inner), logits.reshape(outer, levels, inner)
    backend = select(logits.device, (logits,), natives=op.BACKENDS)
    if backend == "reference":
        return reference.categorical_log_prob(flat, _wide(merged)).view(x.shape)
    grad = torch.is_grad_enabled() and logits.requires_grad
    return ops.call(op.categorical[backend], grad, flat.contiguous(), merged.contiguous())[0].view(x.shape)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def categorical_sample(logits: Tensor, uniform: Tensor) -> Tensor:
    """Levels drawn by given uniform numbers: level v where ``uniform`` is in ``(P(< v), P(<= v)]``.

    Args:
        logits: ``[batch, levels, ...]``.
        uniform: ``[batch, ...]`` in (0, 1].

    Returns:
        int64 ``[batch, ...]`` in 0 .. levels - 1.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device; the message names it.
    """
    _check_uniform(logits, uniform, "logits")
    expected = logits.shape[:1] + logits.shape[2:]
    if logits.dim() < 2 or uniform.shape != expected:
        raise ValueError(
            f"uniform must have the shape of logits without the levels, {tuple(expected)}, got {tuple(uniform.shape)}"
        )
    return reference.categorical_sample(_wide(logits), uniform)


def _check_uniform(values: object, uniform: object, name: str) -> None:
    for given, what in ((values, name), (uniform, "uniform")):
        if not isinstance(given, Tensor):
            raise TypeError(f"{what} must be a tensor, got {type(given).__name__}")
        check_float(what, given)
    check_device("uniform", uniform, values, name)  # type: ignore[arg-type]
