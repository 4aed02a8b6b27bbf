"""Schemas, fake kernels and gradients of the norm op."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._core import ops
from . import reference

_TRITON = "dgm_kernels.norm.triton"
BACKENDS = ("cpp", "triton")


def as_rows(x: Tensor, batch: int, size: int) -> Tensor:
    """``[batch, tokens, size]``; a view of a contiguous ``x``."""
    return x.reshape(batch, x.numel() // (batch * size) if batch * size else _tokens(x), size)


def _tokens(x: Tensor) -> int:
    count = 1
    for length in x.shape[1:-1]:
        count *= length
    return count


def _like(tensor: Tensor | None, like: Tensor) -> Tensor:
    """The gradient of an optional operand; empty where it is absent."""
    return like.new_empty((0,), dtype=torch.float32) if tensor is None else tensor.new_empty(tensor.shape)


def _given(tensor: Tensor | None, grad: Tensor) -> Tensor | None:
    return None if tensor is None else grad


# ---- Rows: layer norm, RMS norm, and the modulated layer norm with its residual. Saves h (x without a residual), x if
# there is a gate, the parameters, and mean and 1 / deviation of every row, from which the backward pass normalises
# again: the normalised rows would take as much memory as h, which the next layer keeps anyway.


def _fake_rows(
    x: Tensor, residual: Tensor | None, gate: Any, weight: Any, bias: Any, scale: Any, shift: Any, *settings: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size, rms, _, dtype, h_dtype = settings
    rows = x.numel() // size
    return (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty((0,) if residual is None else x.shape, dtype=h_dtype),
        x.new_empty((0,) if rms else (rows,), dtype=torch.float32),
        x.new_empty((rows,), dtype=torch.float32),
    )


def _fake_rows_backward(grad: Tensor, grad_h: Any, h: Tensor, *args: Any) -> tuple[Tensor, ...]:
    x, gate, weight, bias, scale, with_shift, *_ = args
    to_shift = grad.new_empty((0,) if not with_shift else scale.shape, dtype=torch.float32)
    return (h.new_empty(h.shape), _like(x, h), *(_like(t, h) for t in (gate, weight, bias, scale)), to_shift)


def _rows_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, gate, weight, bias, scale, shift, *settings = inputs
    y, h, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(
        x if residual is None else h, None if gate is None else x, gate, weight, bias, scale, shift, mean, rstd
    )
    ctx.settings, ctx.y_shape = settings, y.shape
    ctx.x_dtype, ctx.residual_dtype = x.dtype, None if residual is None else residual.dtype


def _rows_backward(ctx: Any, grad: Tensor | None, grad_h: Tensor | None, *_: Any) -> tuple[Any, ...]:
    """With n the normalised row, g = grad (1 + scale) weight and means over the row::

    to h: grad_h + rstd (g - mean(g) - n mean(g n))        to x: gate to_h        to the residual: to_h
    to shift, scale: sums of grad and grad (n weight + bias) over the tokens;  to the gate: of to_h x
    """
    others = (None,) * 5
    h, x, gate, weight, bias, scale, shift, mean, rstd = ctx.saved_tensors
    with_h = ctx.residual_dtype is not None
    grad_h = grad_h if with_h else None
    if grad is None and grad_h is None:
        return (None,) * 7 + others
    if torch.is_grad_enabled():
        return (*_differentiable_rows_backward(ctx, grad, grad_h), *others)
    size, rms, _, dtype, _ = ctx.settings
    to_h, to_x, to_gate, to_weight, to_bias, to_scale, to_shift = rows_backward[ctx.backend](
        torch.zeros_like(h, dtype=dtype) if grad is None else grad.contiguous(),
        None if grad_h is None else grad_h.contiguous(),
        h,
        x,
        gate,
        weight,
        bias,
        scale,
        shift is not None,
        mean,
        rstd,
        size,
        rms,
    )
    return (
        (to_h if x is None else to_x).to(ctx.x_dtype),
        to_h.to(ctx.residual_dtype) if with_h else None,
        _given(gate, to_gate),
        _given(weight, to_weight),
        _given(bias, to_bias),
        _given(scale, to_scale),
        None if shift is None else to_shift.to(shift.dtype),
        *others,
    )


def _differentiable_rows_backward(ctx: Any, grad: Tensor | None, grad_h: Tensor | None) -> tuple[Tensor | None, ...]:
    """By the reference. h stands for the residual: its gradient is that of h, from which x and the gate have theirs."""
    h, x, gate, weight, bias, scale, shift, _, _ = ctx.saved_tensors
    size, rms, eps, dtype, _ = ctx.settings
    batch = 1 if scale is None else h.shape[0]
    places = (weight, bias, scale, shift)
    present = [t for t in places if t is not None]

    def normalize(h: Tensor, *parameters: Tensor) -> tuple[Tensor]:
        given = iter(parameters)
        w, b, s, t = (None if place is None else next(given) for place in places)
        w, b = (None if p is None else p.reshape(size) for p in (w, b))
        y, _ = reference.norm_rows(as_rows(h, batch, size), None, None, w, b, s, t, rms, eps, dtype, h.dtype)
        return (y.view(h.shape),)

    if grad is None:
        to_h: Tensor | None = None
        found: Iterator[Tensor | None] = iter([None] * len(present))
    else:
        to_h, *rest = ops.differentiable_vjp(normalize, (h, *present), (grad,))
        found = iter(rest)
    to_parameters = [None if place is None else next(found) for place in places]
    if grad_h is not None:
        to_h = grad_h if to_h is None else to_h + grad_h
    assert to_h is not None
    if ctx.residual_dtype is None:
        return (to_h.to(ctx.x_dtype), None, None, *to_parameters)
    to_x, to_gate = to_h.to(ctx.x_dtype), None
    if gate is not None:
        wide = as_rows(to_h, batch, size).to(reference.work_dtype(h))
        to_x = (wide * gate[:, None]).to(x.dtype).view(x.shape)
        to_gate = (wide * as_rows(x, batch, size)).sum(1).to(gate.dtype)
    return (to_x, to_h.to(ctx.residual_dtype), to_gate, *to_parameters)


rows = ops.define(
    "norm_rows",
    "(Tensor x, Tensor? residual, Tensor? gate, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, "
    "SymInt size, bool rms, float eps, ScalarType dtype, ScalarType h_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_rows,
    _TRITON,
    _rows_context,
    _rows_backward,
    backends=BACKENDS,
)
rows_backward = ops.define(
    "norm_rows_backward",
    "(Tensor grad, Tensor? grad_h, Tensor h, Tensor? x, Tensor? gate, Tensor? weight, Tensor? bias, Tensor? scale, "
    "bool with_shift, Tensor mean, Tensor rstd, SymInt size, bool rms) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_rows_backward,
    _TRITON,
    backends=BACKENDS,
)


# ---- Groups of channels, with SiLU. Saves x, the parameters, and mean and 1 / deviation of every group.


def _fake_group_silu(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    groups, _, dtype = args[-3:]
    statistics = (x.shape[0] * groups,)
    return (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(statistics, dtype=torch.float32),
        x.new_empty(statistics, dtype=torch.float32),
    )


def _fake_group_silu_backward(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return (x.new_empty(x.shape), *(_like(tensor, x) for tensor in args[:4]))


def _group_silu_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, scale, shift, *settings = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, weight, bias, scale, shift, *output[1:])
    ctx.settings = settings


def _group_silu_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    """With z what SiLU gets, s = sigmoid(z), g = grad s (1 + z (1 - s)) and a = (1 + scale) weight::

    to x: rstd (a g - mean(a g) - n mean(a g n)), with n the normalised x and means over the group
    to shift, scale: sums of g and g (n weight + bias) over the elements of a channel
    """
    others = (None,) * 3
    if grad is None:
        return (None,) * 5 + others
    x, weight, bias, scale, shift, mean, rstd = ctx.saved_tensors
    groups, eps, dtype = ctx.settings
    places = (x, weight, bias, scale, shift)
    if torch.is_grad_enabled():
        present = [tensor for tensor in places if tensor is not None]

        def normalize(*tensors: Tensor) -> tuple[Tensor]:
            given = iter(tensors)
            wide, w, b, s, t = (None if place is None else next(given) for place in places)
            assert wide is not None
            y = reference.group_norm_silu(as_channels(wide), w, b, s, t, groups, eps, dtype)
            return (y.view(wide.shape),)

        found = iter(ops.differentiable_vjp(normalize, present, (grad,)))
        return (*(None if place is None else next(found) for place in places), *others)
    to = group_silu_backward[ctx.backend](grad.contiguous(), x, weight, bias, scale, shift, mean, rstd, groups)
    return (*(_given(place, t) for place, t in zip(places, to, strict=True)), *others)


def as_channels(x: Tensor) -> Tensor:
    """``[batch, channels, elements]``; a view of a contiguous ``x``."""
    return x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)


group_silu = ops.define(
    "norm_group_silu",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, SymInt groups, float eps, "
    "ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    _fake_group_silu,
    _TRITON,
    _group_silu_context,
    _group_silu_backward,
    backends=BACKENDS,
)
group_silu_backward = ops.define(
    "norm_group_silu_backward",
    "(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor mean, Tensor rstd, "
    "SymInt groups) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_group_silu_backward,
    _TRITON,
    backends=BACKENDS,
)
