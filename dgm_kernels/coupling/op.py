"""Schemas, fake kernels and gradients of the coupling op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._core import layout, ops
from . import reference
from .reference import SCALE_MAPS
from .region import flat_region

_TRITON = "dgm_kernels.coupling.triton"
BACKENDS = ("cpp", "triton")
MAX_BINS = 64  # that the native kernels hold for an element
_REGION = "Tensor? fixed, SymInt start, SymInt stop, int parity, SymInt width, SymInt plane"
_SPLINE = "float bound, bool tails, float min_width, float min_height, float min_derivative, bool inverse"
_REGION_ARGS = 6


def _new_logdet(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:1], dtype=torch.float32)


# ---- Affine coupling. Saves its output in place of its input (x exp(s) = y - shift), shift, log_scale and the mask.
# In 16 bits the difference would keep too few digits: there x is saved, and y computed again in float32.


def _fake_affine(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=args[-1]), _new_logdet(x)


def _fake_affine_backward(
    grad: Tensor, grad_logdet: Tensor | None, output: Tensor, shift: Tensor, log_scale: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    with_shift, x_dtype = args[-2:]
    return (
        grad.new_empty(output.shape, dtype=x_dtype),
        shift.new_empty(shift.shape if with_shift else (0,)),
        log_scale.new_empty(log_scale.shape),
    )


def _affine_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, shift, log_scale, fixed, *region, scale_map, inverse, dtype = inputs
    ctx.set_materialize_grads(False)
    ctx.region, ctx.scale_map, ctx.inverse = region, scale_map, inverse
    ctx.dtype, ctx.x_dtype, ctx.shift_dtype, ctx.shift_shape = dtype, x.dtype, shift.dtype, shift.shape
    ctx.keeps_x = dtype.itemsize < 4 and not inverse
    if log_scale is None:
        ctx.save_for_backward(fixed)
    else:
        ctx.save_for_backward(x if ctx.keeps_x else output[0], shift, log_scale, fixed)


def _affine_backward(ctx: Any, grad: Tensor | None, grad_logdet: Tensor | None) -> tuple[Any, ...]:
    """To x: g exp(s); to the shift: g; to s: g (y - shift) + l, with g and l the gradients of y and of logdet.

    Inverse: g exp(-s); minus that; -(g y + l).
    """
    others = (None,) * (_REGION_ARGS + 3)
    if len(ctx.saved_tensors) == 1:
        return (*_additive_backward(ctx, grad, *ctx.saved_tensors), None, *others)
    if grad is None and grad_logdet is None:
        return (None, None, None, *others)
    if torch.is_grad_enabled():
        return (*_differentiable_affine_backward(ctx, grad, grad_logdet), *others)
    saved, shift, log_scale, fixed = ctx.saved_tensors
    setting = (fixed, *ctx.region, ctx.scale_map, ctx.inverse)
    output = affine[ctx.backend](saved, shift, log_scale, *setting, torch.float32)[0] if ctx.keeps_x else saved
    grad = torch.zeros_like(saved, dtype=ctx.dtype) if grad is None else layout.rows(grad)
    whole = fixed is None and ctx.region[2] < 0 and shift.shape == saved.shape
    passed = whole and not ctx.inverse and shift.dtype == grad.dtype  # the gradient of the shift is that of y
    to_x, to_shift, to_scale = affine_backward[ctx.backend](
        grad,
        None if grad_logdet is None else grad_logdet.contiguous(),
        output,
        shift,
        log_scale,
        *setting,
        not passed,
        ctx.x_dtype,
    )
    return (to_x, grad if passed else to_shift, to_scale, *others)


def _additive_backward(ctx: Any, grad: Tensor | None, fixed: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if grad is None:
        return None, None
    start, stop, *_ = ctx.region
    mask = flat_region(grad, fixed, *ctx.region).fixed
    part = grad if grad.dim() == 1 else grad.flatten(1)[:, start:stop]
    part = part if mask is None else part.masked_fill(mask, 0.0)
    part = -part if ctx.inverse else part
    return grad.to(ctx.x_dtype), part.reshape(ctx.shift_shape).to(ctx.shift_dtype)


def _differentiable_affine_backward(
    ctx: Any, grad: Tensor | None, grad_logdet: Tensor | None
) -> tuple[Tensor | None, ...]:
    saved, shift, log_scale, fixed = ctx.saved_tensors
    region = flat_region(saved, fixed, *ctx.region)
    name = SCALE_MAPS[ctx.scale_map]

    def affine(x: Tensor, shift: Tensor, raw: Tensor, inverse: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        flat_x, flat_shift, flat_raw = (t if t.dim() == 1 else t.flatten(1) for t in (x, shift, raw))
        y, logdet = reference.affine_coupling(flat_x, flat_shift, flat_raw, region, name, inverse, dtype)
        return y.view(x.shape), logdet

    x = saved if ctx.keeps_x else affine(saved, shift, log_scale, not ctx.inverse, ctx.x_dtype)[0]
    return ops.differentiable_vjp(
        lambda x, shift, raw: affine(x, shift, raw, ctx.inverse, ctx.dtype),
        (x, shift, log_scale),
        (grad, grad_logdet),
    )


affine = ops.define(
    "coupling_affine",
    f"(Tensor x, Tensor shift, Tensor? log_scale, {_REGION}, int scale_map, bool inverse, ScalarType dtype)"
    " -> (Tensor, Tensor)",
    _fake_affine,
    _TRITON,
    _affine_context,
    _affine_backward,
    backends=BACKENDS,
)
affine_backward = ops.define(
    "coupling_affine_backward",
    "(Tensor grad, Tensor? grad_logdet, Tensor output, Tensor shift, Tensor log_scale, "
    f"{_REGION}, int scale_map, bool inverse, bool with_shift, ScalarType x_dtype) -> (Tensor, Tensor, Tensor)",
    _fake_affine_backward,
    _TRITON,
    backends=BACKENDS,
)


# ---- Spline. Saves its input and the raw parameters: where the slope is small, the output has too few digits to
# rebuild the input from (gradients were off by 1e-4 of their size, eager's by 1e-6).


def _fake_spline(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=args[-1]), _new_logdet(x)


def _fake_spline_backward(
    grad: Tensor,
    grad_logdet: Tensor | None,
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    *args: Any,
) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (x, widths, heights, derivatives))


def _spline_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, widths, heights, derivatives, *settings, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, widths, heights, derivatives)
    ctx.settings, ctx.dtype = settings, output[0].dtype


def _spline_backward(ctx: Any, grad: Tensor | None, grad_logdet: Tensor | None) -> tuple[Any, ...]:
    """Of the values at the bin's ends in closed form, and from there through cumsum, softmax and softplus."""
    others = (None,) * 7
    if grad is None and grad_logdet is None:
        return (None,) * 4 + others
    if torch.is_grad_enabled():
        return (*_differentiable_spline_backward(ctx, grad, grad_logdet), *others)
    x, *parameters = ctx.saved_tensors
    grads = spline_backward[ctx.backend](
        torch.zeros_like(x, dtype=ctx.dtype) if grad is None else grad.contiguous(),
        None if grad_logdet is None else grad_logdet.contiguous(),
        x,
        *parameters,
        *ctx.settings,
    )
    return (*grads, *others)


def _differentiable_spline_backward(
    ctx: Any, grad: Tensor | None, grad_logdet: Tensor | None
) -> tuple[Tensor | None, ...]:
    bound, tails, *mins, inverse = ctx.settings

    def spline(x: Tensor, widths: Tensor, heights: Tensor, derivatives: Tensor) -> tuple[Tensor, Tensor]:
        return reference.rational_quadratic_spline(
            x, widths, heights, derivatives, bound, tails, (mins[0], mins[1], mins[2]), inverse, ctx.dtype
        )

    return ops.differentiable_vjp(spline, ctx.saved_tensors, (grad, grad_logdet))


spline = ops.define(
    "coupling_spline",
    f"(Tensor x, Tensor widths, Tensor heights, Tensor derivatives, {_SPLINE}, ScalarType dtype) -> (Tensor, Tensor)",
    _fake_spline,
    _TRITON,
    _spline_context,
    _spline_backward,
    backends=BACKENDS,
)
spline_backward = ops.define(
    "coupling_spline_backward",
    "(Tensor grad, Tensor? grad_logdet, Tensor x, Tensor widths, Tensor heights, Tensor derivatives, "
    f"{_SPLINE}) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_spline_backward,
    _TRITON,
    backends=BACKENDS,
)


# ---- Base log-densities. Save z.


def _fake_log_prob(z: Tensor, *args: Any) -> Tensor:
    return _new_logdet(z)


def _log_prob_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, logdet, logistic = inputs
    ctx.save_for_backward(z)
    ctx.logistic, ctx.logdet_dtype = logistic, None if logdet is None else logdet.dtype


def _log_prob_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
    """-g z for the normal density, -g tanh(z / 2) for the logistic one."""
    (z,) = ctx.saved_tensors
    slope = torch.tanh(0.5 * z) if ctx.logistic else z
    to_z = (slope * -grad.view(-1, *[1] * (z.dim() - 1))).to(z.dtype)
    return to_z, None if ctx.logdet_dtype is None else grad.to(ctx.logdet_dtype), None


log_prob = ops.define(
    "coupling_log_prob",
    "(Tensor z, Tensor? logdet, bool logistic) -> Tensor",
    _fake_log_prob,
    _TRITON,
    _log_prob_context,
    _log_prob_backward,
    backends=BACKENDS,
)


# ---- Inversion of masked autoregressive networks: no gradients, the public function sees to it.

made_inverse = ops.define(
    "coupling_made_inverse",
    "(Tensor z, Tensor[] weights, Tensor[] biases, Tensor[] degrees, int activation, int bins, int scale_map, "
    "float bound, float min_width, float min_height, float min_derivative) -> (Tensor, Tensor)",
    lambda z, *args: (z.new_empty(z.shape), _new_logdet(z)),
    _TRITON,
    backends=("cpp",),
)
