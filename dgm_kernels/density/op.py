"""Schemas, fake kernels and gradients of the density op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._core import ops
from . import reference

_TRITON = "dgm_kernels.density.triton"
BACKENDS = ("cpp", "triton")
_MIXTURE = "Tensor x, Tensor y, Tensor inv, Tensor? q, Tensor offset"


def _second(y: Tensor, inv: Tensor) -> Tensor:
    """The shape of the second moments."""
    return y.new_empty((*y.shape, y.shape[1]) if inv.dim() == 3 else y.shape if inv.dim() == 2 else y.shape[:1])


# ---- Log-probability, with responsibilities if they are wanted (else a tensor without elements). Saves its operands
# ---- and the log-probability; responsibilities are computed again.


def _fake_log_prob(x: Tensor, y: Tensor, inv: Tensor, q: Tensor | None, offset: Tensor, full: bool) -> Any:
    return x.new_empty(x.shape[0]), x.new_empty((x.shape[0], y.shape[0]) if full else (0, 0))


def _log_prob_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, y, inv, q, offset, ctx.full = inputs
    ctx.save_for_backward(x, y, inv, q, offset, output[0])
    ctx.set_materialize_grads(False)


def _log_prob_backward(ctx: Any, grad: Tensor | None, grad_r: Tensor | None) -> tuple[Any, ...]:
    """With w = grad_n r_nm and t = x_n - y_m: d offset = sum w, dy = A^T A sum w t, dA = -A sum w t t^T."""
    x, y, inv, q, offset, lse = ctx.saved_tensors
    if not ctx.full:
        grad_r = None
    if grad is None and grad_r is None:
        return (None,) * 6
    if grad is None or grad_r is not None or torch.is_grad_enabled():
        return _differentiable(ctx, (x, y, inv, offset), q, (grad, grad_r))
    grad = grad.contiguous()
    operands = (grad, lse, x, y, inv, q, offset)
    to_x = grad_x[ctx.backend](*operands) if ctx.needs_input_grad[0] else None
    if not any(ctx.needs_input_grad[i] for i in (1, 2, 4)):
        return to_x, None, None, None, None, None
    count, first, second = moments[ctx.backend](*operands)
    return to_x, *_parameter_gradients(y, inv, offset, count, first, second), None


def _parameter_gradients(
    y: Tensor, inv: Tensor, offset: Tensor, count: Tensor, first: Tensor, second: Tensor
) -> tuple[Tensor, Tensor, None, Tensor]:
    """Those of y, inv, q and offset from the moments."""
    if inv.dim() == 3:
        lower = inv.tril()
        to_y = (lower.mT @ (lower @ first[..., None])).squeeze(-1)
        return to_y, -(lower @ second).tril(), None, count
    factor = inv.square() if inv.dim() == 2 else inv.square()[:, None]
    to_inv = -inv * second
    if inv.dim() == 1 and inv.shape[0] != y.shape[0]:
        to_inv = to_inv.sum(0, keepdim=True)
    to_offset = count if offset.shape[0] == y.shape[0] else count.sum(0, keepdim=True)
    return factor * first, to_inv, None, to_offset


def _differentiable(ctx: Any, operands: Sequence[Tensor], q: Tensor | None, grads: Sequence[Tensor | None]) -> Any:
    def function(x: Tensor, y: Tensor, inv: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
        lse, r = reference.responsibilities(x, y, inv, q, offset)
        return (lse, r) if ctx.full else (lse,)

    seeds = grads if ctx.full else grads[:1]
    with torch.enable_grad():  # gradients of responsibilities come here without it
        to_x, to_y, to_inv, to_offset = ops.differentiable_vjp(function, operands, seeds)
    return to_x, to_y, to_inv, None, to_offset, None


log_prob = ops.define(
    "density_log_prob",
    f"({_MIXTURE}, bool full) -> (Tensor, Tensor)",
    _fake_log_prob,
    _TRITON,
    _log_prob_context,
    _log_prob_backward,
    backends=BACKENDS,
)
moments = ops.define(
    "density_moments",
    f"(Tensor weight, Tensor lse, {_MIXTURE}) -> (Tensor, Tensor, Tensor)",
    lambda weight, lse, x, y, inv, *rest: (y.new_empty(y.shape[0]), y.new_empty(y.shape), _second(y, inv)),
    _TRITON,
    backends=BACKENDS,
)
grad_x = ops.define(
    "density_grad_x",
    f"(Tensor grad, Tensor lse, {_MIXTURE}) -> Tensor",
    lambda grad, lse, x, *rest: x.new_empty(x.shape),
    _TRITON,
    backends=BACKENDS,
)


# ---- Posterior mean over points y; gradients for x alone, the public function sees to it. Saves its operands and both
# ---- results.


def _fake_mean(x: Tensor, y: Tensor, q: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0])


def _mean_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)


def _mean_backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    """With r the posterior: dx = q sum_m (r_m (g.y_m - g.mean) + grad_lse r_m) (y_m - x)."""
    x, y, q, offset, mean_, lse = ctx.saved_tensors
    if grad is None and grad_lse is None:
        return None, None, None, None
    if torch.is_grad_enabled():
        (to_x,) = ops.differentiable_vjp(lambda x: reference.mean(x, y, q, offset), (x,), (grad, grad_lse))
        return to_x, None, None, None
    grad = torch.zeros_like(mean_) if grad is None else grad.contiguous()
    return mean_grad[ctx.backend](grad, grad_lse, mean_, lse, x, y, q, offset), None, None, None


mean = ops.define(
    "density_mean",
    "(Tensor x, Tensor y, Tensor q, Tensor offset) -> (Tensor, Tensor)",
    _fake_mean,
    _TRITON,
    _mean_context,
    _mean_backward,
    backends=BACKENDS,
)
mean_grad = ops.define(
    "density_mean_grad",
    "(Tensor grad, Tensor? grad_lse, Tensor mean, Tensor lse, Tensor x, Tensor y, Tensor q, Tensor offset) -> Tensor",
    lambda grad, grad_lse, mean, lse, x, *rest: x.new_empty(x.shape),
    _TRITON,
    backends=BACKENDS,
)


# ---- Sums of a kernel over all pairs. Saves x and y.

KINDS = ("rbf", "polynomial")


def _kernel_sum_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, ctx.kind, ctx.values, ctx.same = inputs
    ctx.save_for_backward(x, y)


def _kernel_sum_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Of the ``same`` points the kernel's symmetry gives both shares at once."""
    x, y = ctx.saved_tensors
    if torch.is_grad_enabled():
        kind, same = KINDS[ctx.kind], ctx.same

        def function(x: Tensor, y: Tensor) -> tuple[Tensor]:
            return (reference.kernel_sum(x, y, kind, ctx.values, same),)

        return (*ops.differentiable_vjp(function, (x, y), (grad,)), None, None, None)
    kernel, factor = kernel_sum_grad[ctx.backend], grad.to(x.dtype)
    to_x = factor * kernel(x, y, ctx.kind, ctx.values, ctx.same) if ctx.needs_input_grad[0] else None
    if not ctx.needs_input_grad[1]:
        return to_x, None, None, None, None
    if ctx.same and to_x is not None:
        return to_x, to_x, None, None, None
    return to_x, factor * kernel(y, x, ctx.kind, ctx.values, ctx.same), None, None, None


kernel_sum = ops.define(
    "density_kernel_sum",
    "(Tensor x, Tensor y, int kind, float[] numbers, bool same) -> Tensor",
    lambda x, *rest: x.new_empty((), dtype=torch.float64),
    _TRITON,
    _kernel_sum_context,
    _kernel_sum_backward,
    backends=BACKENDS,
)
kernel_sum_grad = ops.define(
    "density_kernel_sum_grad",
    "(Tensor x, Tensor y, int kind, float[] numbers, bool same) -> Tensor",
    lambda x, *rest: x.new_empty(x.shape),
    _TRITON,
    backends=BACKENDS,
)
