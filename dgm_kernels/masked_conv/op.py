"""Schemas, fake kernels and gradients of the masked_conv op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._core import ops
from . import reference
from .taps import Kernel, Layout

_TRITON = "dgm_kernels.masked_conv.triton"
BACKENDS = ("cpp", "triton")
_KERNEL = "int layout, bool strict, int groups, SymInt step_y, SymInt step_x"  # what taps.Kernel says of the masks


def _kernel(weight: Tensor, settings: tuple[int, bool, int, int, int]) -> Kernel:
    layout, strict, groups, *dilation = settings
    return Kernel(Layout(layout), strict, groups, weight.shape[2], weight.shape[3], (dilation[0], dilation[1]))


# ---- Masked convolution. Saves x and the weight.


def _fake_conv(x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0], *x.shape[2:]))


def _fake_input_grad(grad: Tensor, weight: Tensor, *settings: Any) -> Tensor:
    return grad.new_empty((grad.shape[0], weight.shape[1], *grad.shape[2:]))


def _fake_weight_grad(grad: Tensor, x: Tensor, height: int, width: int, *settings: Any) -> Tensor:
    return grad.new_empty((grad.shape[1], x.shape[1], height, width))


def _conv_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *settings = inputs
    ctx.save_for_backward(x, weight, bias)
    ctx.settings = tuple(settings)


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """To x: the convolution with the kernel turned over; to the weight: x against the gradient; to the bias: sums."""
    x, weight, bias = ctx.saved_tensors
    others = (None,) * len(ctx.settings)
    if torch.is_grad_enabled():
        return (*_differentiable_conv_backward(ctx, grad), *others)
    return (*_conv_grads(ctx, grad.contiguous(), x, weight, bias), *others)


def _conv_grads(ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, ...]:
    to_x, to_weight, to_bias = ctx.needs_input_grad[:3]
    return (
        input_grad[ctx.backend](grad, weight, *ctx.settings) if to_x else None,
        weight_grad[ctx.backend](grad, x, *weight.shape[2:], *ctx.settings) if to_weight else None,
        grad.sum((0, 2, 3)) if to_bias and bias is not None else None,
    )


def _differentiable_conv_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    kernel = _kernel(weight, ctx.settings)
    given = (x, weight) if bias is None else (x, weight, bias)

    def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor]:
        return (reference.masked_conv(x, weight, bias, kernel),)

    grads = ops.differentiable_vjp(conv, given, (grad,))
    return grads if bias is not None else (*grads, None)


conv = ops.define(
    "masked_conv",
    f"(Tensor x, Tensor weight, Tensor? bias, {_KERNEL}) -> Tensor",
    _fake_conv,
    _TRITON,
    _conv_context,
    _conv_backward,
    backends=BACKENDS,
)
input_grad = ops.define(
    "masked_conv_input_grad",
    f"(Tensor grad, Tensor weight, {_KERNEL}) -> Tensor",
    _fake_input_grad,
    _TRITON,
    backends=BACKENDS,
)
weight_grad = ops.define(
    "masked_conv_weight_grad",
    f"(Tensor grad, Tensor x, SymInt height, SymInt width, {_KERNEL}) -> Tensor",
    _fake_weight_grad,
    _TRITON,
    backends=BACKENDS,
)


# ---- Gated activation. Saves x and the condition.


def _fake_gate(x: Tensor, condition: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1] // 2, *x.shape[2:]))


def _fake_gate_backward(grad: Tensor, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
    per_sample = condition is not None and condition.dim() < x.dim()
    return x.new_empty(x.shape), x.new_empty(x.shape[:2] if per_sample else (0,), dtype=torch.float32)


def _gate_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """With t = tanh(a) and s = sigmoid(b): g s (1 - t^2) to a, g t s (1 - s) to b; to the condition their sums."""
    x, condition = ctx.saved_tensors
    if torch.is_grad_enabled():
        given = (x,) if condition is None else (x, condition)
        grads = ops.differentiable_vjp(
            lambda x, condition=None: (reference.gated_activation(x, condition),), given, (grad,)
        )
        return grads if condition is not None else (*grads, None)  # type: ignore[return-value]
    to_x, sums = gate_backward[ctx.backend](grad.contiguous(), x, condition)
    if condition is None:
        return to_x, None
    return to_x, (sums if condition.dim() < x.dim() else to_x).to(condition.dtype)


gate = ops.define(
    "masked_conv_gate",
    "(Tensor x, Tensor? condition) -> Tensor",
    _fake_gate,
    _TRITON,
    _gate_context,
    _gate_backward,
    backends=BACKENDS,
)
gate_backward = ops.define(
    "masked_conv_gate_backward",
    "(Tensor grad, Tensor x, Tensor? condition) -> (Tensor, Tensor)",
    _fake_gate_backward,
    _TRITON,
    backends=BACKENDS,
)


# ---- Masked convolution and its gated activation in one kernel. Saves x, the weight, the condition, and what the
# activation is of if ``keep``; otherwise the backward pass computes it again.


def _fake_gated(
    x: Tensor, weight: Tensor, bias: Tensor | None, condition: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor]:
    before = x.new_empty((x.shape[0], weight.shape[0], *x.shape[2:]) if args[-1] else (0,))
    return x.new_empty((x.shape[0], weight.shape[0] // 2, *x.shape[2:])), before


def _gated_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, layout, strict, groups, step_y, step_x, keep = inputs
    ctx.save_for_backward(*tensors, output[1] if keep else None)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.settings = (layout, strict, groups, step_y, step_x)


def _gated_backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    """That of the gate, group after group, then that of the convolution."""
    x, weight, bias, condition, before = ctx.saved_tensors
    others = (None,) * (len(ctx.settings) + 1)
    if grad is None:
        return (None,) * 4 + others
    if torch.is_grad_enabled():
        return (*_differentiable_gated_backward(ctx, grad), *others)
    if before is None:
        before = conv[ctx.backend](x, weight, bias, *ctx.settings)
    groups = ctx.settings[2]
    parts = [t if t is None else _by_group(t, groups) for t in (grad, before, condition)]
    to_before, sums = gate_backward[ctx.backend](*parts)
    to_before = to_before.view(before.shape)
    to_condition = None
    if condition is not None:
        to_condition = (sums if condition.dim() < x.dim() else to_before).view(condition.shape).to(condition.dtype)
    return (*_conv_grads(ctx, to_before, x, weight, bias), to_condition, *others)


def _by_group(x: Tensor, groups: int) -> Tensor:
    """Each group of channels as a sample of its own."""
    return x.reshape(x.shape[0] * groups, x.shape[1] // groups, *x.shape[2:]).contiguous()


def _differentiable_gated_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, condition, _ = ctx.saved_tensors
    kernel, groups = _kernel(weight, ctx.settings), ctx.settings[2]
    given = {"x": x, "weight": weight, "bias": bias, "condition": condition}
    present = {name: tensor for name, tensor in given.items() if tensor is not None}

    def gated_conv(*tensors: Tensor) -> tuple[Tensor]:
        named = dict(zip(present, tensors, strict=True))
        y = reference.masked_conv(named["x"], named["weight"], named.get("bias"), kernel)
        part = named.get("condition")
        out = reference.gated_activation(_by_group(y, groups), part if part is None else _by_group(part, groups))
        return (out.view(y.shape[0], y.shape[1] // 2, *y.shape[2:]),)

    grads = dict(zip(present, ops.differentiable_vjp(gated_conv, tuple(present.values()), (grad,)), strict=True))
    return tuple(grads.get(name) for name in given)


gated = ops.define(
    "masked_conv_gated",
    f"(Tensor x, Tensor weight, Tensor? bias, Tensor? condition, {_KERNEL}, bool keep) -> (Tensor, Tensor)",
    _fake_gated,
    _TRITON,
    _gated_context,
    _gated_backward,
    backends=("triton",),
)


# ---- Mixture of discretized logistics: log-prob of every pixel in float32. Saves x and the parameters.


def _fake_mixture(x: Tensor, parameters: Tensor, levels: int) -> Tensor:
    return x.new_empty((x.shape[0], *x.shape[2:]), dtype=torch.float32)


def _mixture_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, parameters, ctx.levels = inputs
    ctx.save_for_backward(x, parameters)


def _mixture_backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None]:
    x, parameters = ctx.saved_tensors
    if torch.is_grad_enabled():
        to_parameters = ops.differentiable_vjp(
            lambda p: (reference.discretized_logistic_mixture(x.float(), p.float(), ctx.levels),),
            (parameters,),
            (grad,),
        )[0]
        return None, to_parameters, None
    return None, mixture_backward[ctx.backend](grad.contiguous(), x, parameters, ctx.levels), None


mixture = ops.define(
    "masked_conv_mixture",
    "(Tensor x, Tensor parameters, int levels) -> Tensor",
    _fake_mixture,
    _TRITON,
    _mixture_context,
    _mixture_backward,
    backends=BACKENDS,
)
mixture_backward = ops.define(
    "masked_conv_mixture_backward",
    "(Tensor grad, Tensor x, Tensor parameters, int levels) -> Tensor",
    lambda grad, x, parameters, levels: parameters.new_empty(parameters.shape),
    _TRITON,
    backends=BACKENDS,
)


# ---- Categorical: logits [outer, levels, inner], x [outer, inner]. Saves both and the second result, by which the same
# backend's backward pass normalises: log sum exp of the logits; on CPUs of the logits less the largest one.


def _fake_categorical(x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float32), x.new_empty(x.shape, dtype=torch.float32)


def _categorical_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _categorical_backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[None, Tensor | None]:
    """g (one-hot of x - softmax)."""
    x, logits, normaliser = ctx.saved_tensors
    if grad is None:
        return None, None
    if torch.is_grad_enabled():
        return None, ops.differentiable_vjp(
            lambda logits: (reference.categorical_log_prob(x, logits.float()),), (logits,), (grad,)
        )[0]
    return None, categorical_backward[ctx.backend](grad.contiguous(), x, logits, normaliser)


categorical = ops.define(
    "masked_conv_categorical",
    "(Tensor x, Tensor logits) -> (Tensor, Tensor)",
    _fake_categorical,
    _TRITON,
    _categorical_context,
    _categorical_backward,
    backends=BACKENDS,
)
categorical_backward = ops.define(
    "masked_conv_categorical_backward",
    "(Tensor grad, Tensor x, Tensor logits, Tensor normaliser) -> Tensor",
    lambda grad, x, logits, normaliser: logits.new_empty(logits.shape),
    _TRITON,
    backends=BACKENDS,
)
