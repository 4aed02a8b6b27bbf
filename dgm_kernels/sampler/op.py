"""Schemas, fake kernels and gradients of the sampler op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._core import ops
from .._core.noise import SCHEMA as _NOISE
from .reference import per_row, per_sample, predict, row_of

_TRITON = "dgm_kernels.sampler.triton"
_STEP_INPUTS = (
    f"Tensor x, Tensor model_output, Tensor rows, Tensor? step_tensor, SymInt step, {_NOISE}, Tensor? history, "
    "Tensor? unconditional, float guidance_scale, Tensor? known, Tensor? mask, Tensor? threshold, bool clips"
)


def _fake_noise_like(like: Tensor, *args: Any) -> Tensor:
    kind = args[-1]
    return torch.empty(like.shape, dtype=torch.int32 if kind == 2 else like.dtype, device=like.device)


def _fake_step(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape if args[-1] else (0,))


def _step_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    (
        x,
        m,
        rows,
        step_tensor,
        step,
        noise,
        *_,
        history,
        unconditional,
        scale,
        known,
        mask,
        threshold,
        clips,
        with_x0,
    ) = inputs
    bounded = (x, m, unconditional, threshold) if clips or threshold is not None else (None,) * 4
    ctx.save_for_backward(rows, step_tensor, mask, *bounded)
    ctx.step, ctx.scale, ctx.with_x0, ctx.shape = step, scale, with_x0, x.shape
    optional = {"noise": noise, "history": history, "unconditional": unconditional, "known": known}
    ctx.dtypes = {"x": x.dtype, "m": m.dtype, **{k: v.dtype for k, v in optional.items() if v is not None}}


def _step_backward(ctx: Any, grad: Tensor, grad_x0: Tensor) -> tuple[Any, ...]:
    """Gradients of the affine step. Saves x and the model output only where x0 is bounded."""
    rows, step_tensor, mask, *bounded = ctx.saved_tensors
    row = row_of(rows, ctx.step if step_tensor is None else step_tensor, grad)
    px, pm, _, _, ax, a0, am, ah, an, ak, sk, _ = row
    g = grad.to(torch.float32)
    share = None if mask is None else g * mask
    g = g if share is None else g - share
    g_x0 = a0 * g + grad_x0 if ctx.with_x0 else a0 * g
    g_threshold = None
    if bounded[0] is not None:
        g_x0, g_threshold = _bounds_backward(g_x0, row, ctx.scale, *bounded)
    g_m = am * g + pm * g_x0
    guided = "unconditional" in ctx.dtypes
    grads = {
        "x": ax * g + px * g_x0,
        "m": ctx.scale * g_m if guided else g_m,
        "noise": an * g if share is None else an * g + sk * share,
        "history": ah * g,
        "unconditional": (1 - ctx.scale) * g_m,
        "known": None if share is None else ak * share,
    }
    out = {k: grads[k].to(d) for k, d in ctx.dtypes.items() if grads[k] is not None}
    # x, model_output, rows, step_tensor, step, noise, 7 numbers and tensors of the key, history, ...
    return (
        *(out["x"], out["m"], None, None, None, out.get("noise"), *[None] * 7),
        *(out.get("history"), out.get("unconditional"), None, out.get("known"), None, g_threshold, None, None),
    )


def _bounds_backward(
    grad: Tensor,
    row: tuple[Tensor, ...],
    scale: float,
    x: Tensor,
    m: Tensor,
    unconditional: Tensor | None,
    threshold: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """From the gradient of the bounded x0 to that of the unbounded one and of the threshold."""
    _, raw = predict(x, m, row, unconditional, scale)
    if threshold is None:
        return grad * ((raw >= row[2]) & (raw <= row[3])), None
    s = per_sample(threshold, raw)
    inside = grad * (raw.abs() <= s)
    return inside / s, -per_row(inside * raw).sum(1) / threshold**2


def _fake_add_noise(x0: Tensor, *args: Any) -> Tensor:
    return x0.new_empty(x0.shape)


def _add_noise_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x0, rows, t, noise, *_ = inputs
    ctx.save_for_backward(rows, t)
    ctx.dtypes = x0.dtype, None if noise is None else noise.dtype


def _add_noise_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """``alpha[t] grad`` and ``sigma[t] grad``. Saves nothing but the table."""
    rows, t = ctx.saved_tensors
    dtype, noise_dtype = ctx.dtypes
    to_x0 = (per_sample(rows[t, 0], grad) * grad).to(dtype)
    to_noise = None if noise_dtype is None else (per_sample(rows[t, 1], grad) * grad).to(noise_dtype)
    return (to_x0, None, None, to_noise, *[None] * 7)


def _fake_loss(model_output: Tensor, x0: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    loss = x0.new_empty(x0.shape[:1], dtype=torch.float32)
    return loss, model_output.new_empty(model_output.shape if args[-1] else (0,))


noise_like = ops.define("noise_like", f"(Tensor like, {_NOISE}, int kind) -> Tensor", _fake_noise_like, _TRITON)
sampler_step = ops.define(
    "sampler_step",
    f"({_STEP_INPUTS}, bool return_x0) -> (Tensor, Tensor)",
    _fake_step,
    _TRITON,
    _step_context,
    _step_backward,
)
sampler_step_out = ops.define(
    "sampler_step_out",
    f"({_STEP_INPUTS}, Tensor(a!) out, Tensor(b!)? x0_out) -> ()",
    lambda *args: None,
    _TRITON,
)
add_noise = ops.define(
    "add_noise",
    f"(Tensor x0, Tensor rows, Tensor t, {_NOISE}) -> Tensor",
    _fake_add_noise,
    _TRITON,
    _add_noise_context,
    _add_noise_backward,
)


def _loss_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, x0, rows, t, noise, *_ = inputs
    ctx.save_for_backward(output[1], rows, t)
    ctx.set_materialize_grads(False)
    ctx.dtypes = x0.dtype, None if noise is None else noise.dtype


def _loss_backward(ctx: Any, grad: Tensor | None, grad_residual: Tensor | None) -> tuple[Any, ...]:
    """``2 weight / elements * grad * residual``. Saves the residual (in place of the model output), never the noise.

    The residual is an output of the op, so a second derivative reaches the model output through ``grad_residual``.
    """
    residual, rows, t = ctx.saved_tensors
    g = grad_residual
    if grad is not None:
        elements = max(residual[:1].numel(), 1)
        weight = rows.select(1, 4).index_select(0, t)
        own = residual * per_sample(weight * (grad * (2.0 / elements)), residual)
        g = own if g is None else own + g
    if g is None:
        return (None,) * 13
    dtype, noise_dtype = ctx.dtypes
    to_x0 = (-per_sample(rows[t, 2], g) * g).to(dtype) if ctx.needs_input_grad[1] else None
    to_noise = None if noise_dtype is None else (-per_sample(rows[t, 3], g) * g).to(noise_dtype)
    return (g.to(residual.dtype), to_x0, None, None, to_noise, *[None] * 8)


denoising_loss = ops.define(
    "denoising_loss",
    f"(Tensor model_output, Tensor x0, Tensor rows, Tensor t, {_NOISE}, bool with_residual) -> (Tensor, Tensor)",
    _fake_loss,
    _TRITON,
    _loss_context,
    _loss_backward,
)
