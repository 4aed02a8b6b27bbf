"""Schemas, fake kernels and gradients of the latent op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._core import layout, ops
from .._core.noise import NO_NOISE, OpArgs
from .._core.noise import SCHEMA as _NOISE
from . import reference

_TRITON = "dgm_kernels.latent.triton"
BACKENDS = ("cpp", "triton")
_NOISE_ARGS = 8

# Every backward pass draws the noise again: saved are the distribution and the key, whose tensors must be the same
# then (autograd checks that nobody has written to them), never z or the noise.


def _save(ctx: Any, operands: Sequence[Tensor | None], noise: Sequence[Any] = NO_NOISE) -> None:
    """Keeps operands and the arguments of a noise key for the backward pass."""
    given, seed_tensor, seed, step_tensor, step, samples, first_sample, stream = noise
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*operands, given, seed_tensor, step_tensor, samples)
    ctx.numbers = seed, step, first_sample, stream


def _saved(ctx: Any) -> tuple[Sequence[Any], OpArgs]:
    """What ``_save`` kept."""
    *operands, given, seed_tensor, step_tensor, samples = ctx.saved_tensors
    seed, step, first_sample, stream = ctx.numbers
    return operands, (given, seed_tensor, seed, step_tensor, step, samples, first_sample, stream)


def _rows(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else layout.rows(grad)


def _dense(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else grad.contiguous()


def _new_sum(x: Tensor, *sizes: int) -> Tensor:
    return x.new_empty((*sizes, x.shape[0]), dtype=torch.float32)


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in tensors)


# ---- A sample and its KL, Gaussian or log-normal. Saves mu, log_var and the key.


def _fake_sample(mu: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return mu.new_empty(mu.shape, dtype=args[-1]), _new_sum(mu)


def _sample_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    mu, log_var, *rest = inputs
    _save(ctx, (mu, log_var), rest[:_NOISE_ARGS])
    *ctx.settings, ctx.dtype = rest[_NOISE_ARGS:]


def _sample_backward(ctx: Any, grad: Tensor | None, grad_kl: Tensor | None) -> tuple[Any, ...]:
    """``dmu = g + k d w`` and ``dlog_var = 0.5 (g sigma eps + k (w exp(log_var) - 1))``.

    g and k are the gradients of z (times z if log-normal) and of the KL, d = mu - prior_mu, w = exp(-prior_log_var).
    """
    others = (None,) * (_NOISE_ARGS + 5)
    if grad is None and grad_kl is None:
        return (None, None, *others)
    (mu, log_var), noise = _saved(ctx)
    if torch.is_grad_enabled():
        settings = (noise, *ctx.settings, ctx.dtype)
        formula = lambda m, v: reference.sample_kl(m, v, *settings)  # noqa: E731
        return (*ops.differentiable_vjp(formula, (mu, log_var), (grad, grad_kl)), *others)
    kernel = sample_backward[ctx.backend]
    return (*kernel(_rows(grad), _dense(grad_kl), mu, log_var, *noise, *ctx.settings), *others)


_SETTINGS = "float free_bits, bool log_normal, float prior_mu, float prior_log_var"
sample = ops.define(
    "latent_sample",
    f"(Tensor mu, Tensor log_var, {_NOISE}, {_SETTINGS}, ScalarType dtype) -> (Tensor, Tensor)",
    _fake_sample,
    _TRITON,
    _sample_context,
    _sample_backward,
    backends=BACKENDS,
)
sample_backward = ops.define(
    "latent_sample_backward",
    f"(Tensor? grad, Tensor? grad_kl, Tensor mu, Tensor log_var, {_NOISE}, {_SETTINGS}) -> (Tensor, Tensor)",
    lambda grad, grad_kl, mu, log_var, *args: _like(mu, log_var),
    _TRITON,
    backends=BACKENDS,
)


# ---- Full covariance. Saves scale_tril, mu and the key.


def _tril_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    mu, scale_tril, *noise, ctx.dtype = inputs
    _save(ctx, (mu, scale_tril), noise)


def _tril_backward(ctx: Any, grad: Tensor | None, grad_kl: Tensor | None) -> tuple[Any, ...]:
    """``dmu = g + k mu`` and ``dL = tril(g eps^T + k L) - k diag(1 / L_ii)``."""
    others = (None,) * (_NOISE_ARGS + 1)
    if grad is None and grad_kl is None:
        return (None, None, *others)
    (mu, scale_tril), noise = _saved(ctx)
    if torch.is_grad_enabled():
        formula = lambda m, factor: reference.sample_tril_kl(m, factor, noise, ctx.dtype)  # noqa: E731
        return (*ops.differentiable_vjp(formula, (mu, scale_tril), (grad, grad_kl)), *others)
    kernel = tril_backward[ctx.backend]
    return (*kernel(_rows(grad), _dense(grad_kl), mu, scale_tril, *noise), *others)


tril = ops.define(
    "latent_tril",
    f"(Tensor mu, Tensor scale_tril, {_NOISE}, ScalarType dtype) -> (Tensor, Tensor)",
    _fake_sample,
    _TRITON,
    _tril_context,
    _tril_backward,
    backends=BACKENDS,
)
tril_backward = ops.define(
    "latent_tril_backward",
    f"(Tensor? grad, Tensor? grad_kl, Tensor mu, Tensor scale_tril, {_NOISE}) -> (Tensor, Tensor)",
    lambda grad, grad_kl, mu, scale_tril, *args: _like(mu, scale_tril),
    _TRITON,
    backends=BACKENDS,
)


# ---- KL of two diagonal Gaussians. Saves its operands.


def _kl_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *operands, ctx.free_bits = inputs
    _save(ctx, operands)


def _kl_backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    """With d = mu - m, w = exp(-b) and a = log_var - b: ``k d w`` to mu, minus that to m,
    ``0.5 k (exp(a) - 1)`` to log_var, minus ``0.5 k (exp(a) - 1 + d^2 w)`` to b."""
    if grad is None:
        return (None,) * 5
    operands, _ = _saved(ctx)
    if torch.is_grad_enabled():
        there = [t for t in operands if t is not None]

        def formula(mu: Tensor, log_var: Tensor, *prior: Tensor) -> tuple[Tensor]:
            given = iter(prior)
            m, b = (None if t is None else next(given) for t in operands[2:])
            return (reference.gaussian_kl(mu, log_var, m, b, ctx.free_bits),)

        back = iter(ops.differentiable_vjp(formula, there, (grad,)))
        return (*(None if t is None else next(back) for t in operands), None)
    grads = kl_backward[ctx.backend](grad.contiguous(), *operands, ctx.free_bits)
    return (*(None if t is None else g for t, g in zip(operands, grads, strict=True)), None)


_KL = "Tensor mu, Tensor log_var, Tensor? prior_mu, Tensor? prior_log_var, float free_bits"
kl = ops.define(
    "latent_kl",
    f"({_KL}) -> Tensor",
    lambda mu, *args: _new_sum(mu),
    _TRITON,
    _kl_context,
    _kl_backward,
    backends=BACKENDS,
)
kl_backward = ops.define(
    "latent_kl_backward",
    f"(Tensor grad, {_KL}) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda grad, *args: tuple(grad.new_empty((0,)) if t is None else t.new_empty(t.shape) for t in args[:4]),
    _TRITON,
    backends=BACKENDS,
)


# ---- Importance samples and their log-weights. Saves mu, log_var and the key.


def _fake_importance(mu: Tensor, log_var: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    draws, _, dtype = args[-3:]
    return mu.new_empty((draws, *mu.shape), dtype=dtype), _new_sum(mu, draws)


def _importance_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    mu, log_var, *rest = inputs
    _save(ctx, (mu, log_var), rest[:_NOISE_ARGS])
    ctx.draws, ctx.log_normal, ctx.dtype = rest[_NOISE_ARGS:]


def _importance_backward(ctx: Any, grad: Tensor | None, grad_ratio: Tensor | None) -> tuple[Any, ...]:
    """With h = g - l u: ``dmu = sum h`` and ``dlog_var = 0.5 sum (h sigma eps + l)`` over the draws.

    g and l are the gradients of u (that of z, times z if log-normal) and of the log-ratio.
    """
    others = (None,) * (_NOISE_ARGS + 3)
    if grad is None and grad_ratio is None:
        return (None, None, *others)
    (mu, log_var), noise = _saved(ctx)
    if torch.is_grad_enabled():
        formula = lambda m, v: reference.importance(m, v, noise, ctx.draws, ctx.log_normal, ctx.dtype)  # noqa: E731
        return (*ops.differentiable_vjp(formula, (mu, log_var), (grad, grad_ratio)), *others)
    kernel = importance_backward[ctx.backend]
    settings = (*noise, ctx.draws, ctx.log_normal)
    return (*kernel(_dense(grad), _dense(grad_ratio), mu, log_var, *settings), *others)


importance = ops.define(
    "latent_importance",
    f"(Tensor mu, Tensor log_var, {_NOISE}, SymInt draws, bool log_normal, ScalarType dtype) -> (Tensor, Tensor)",
    _fake_importance,
    _TRITON,
    _importance_context,
    _importance_backward,
    backends=BACKENDS,
)
importance_backward = ops.define(
    "latent_importance_backward",
    f"(Tensor? grad, Tensor? grad_ratio, Tensor mu, Tensor log_var, {_NOISE}, SymInt draws, bool log_normal)"
    " -> (Tensor, Tensor)",
    lambda grad, grad_ratio, mu, log_var, *args: _like(mu, log_var),
    _TRITON,
    backends=BACKENDS,
)


# ---- The bound of importance samples; on GPUs plain PyTorch. Saves the log-weights and the bound.


def _bound_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _bound_backward(ctx: Any, grad: Tensor) -> Tensor:
    """The normalised weights, times the gradient."""
    log_weights, found = ctx.saved_tensors
    if torch.is_grad_enabled():
        formula = lambda w: (reference.importance_bound(w),)  # noqa: E731
        (to_log_weights,) = ops.differentiable_vjp(formula, (log_weights,), (grad,))
        assert to_log_weights is not None
        return to_log_weights
    return bound_backward[ctx.backend](grad.contiguous(), log_weights, found)


bound = ops.define(
    "latent_bound",
    "(Tensor log_weights) -> Tensor",
    lambda log_weights: log_weights.new_empty(log_weights.shape[1:]),
    _TRITON,
    _bound_context,
    _bound_backward,
    backends=("cpp",),
)
bound_backward = ops.define(
    "latent_bound_backward",
    "(Tensor grad, Tensor log_weights, Tensor bound) -> Tensor",
    lambda grad, log_weights, bound: log_weights.new_empty(log_weights.shape),
    _TRITON,
    backends=("cpp",),
)


# ---- Vector quantisation of rows. Saves x, the codebook and the indices.


def _fake_quantize(x: Tensor, codebook: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(x.shape[:1], dtype=torch.int64),
        x.new_empty(codebook.shape[:1], dtype=torch.int64),
        x.new_empty((2,), dtype=torch.float32),
    )


def _quantize_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, codebook, ctx.dtype = inputs
    _save(ctx, (x, codebook, output[1]))


def _quantize_backward(ctx: Any, grad: Tensor | None, _i: Any, _c: Any, grad_losses: Tensor | None) -> tuple[Any, ...]:
    """``g + 2 l1 (x - e) / n`` to x and ``2 l0 sum (e - x) / n`` to a code, over the rows it was chosen for.

    l0 and l1 are the gradients of the two losses, means over n elements.
    """
    if grad is None and grad_losses is None:
        return None, None, None
    (x, codebook, indices), _ = _saved(ctx)
    if torch.is_grad_enabled():
        given = (grad, None, None, grad_losses)
        formula = lambda x, e: reference.quantize(x, e, ctx.dtype)  # noqa: E731
        return (*ops.differentiable_vjp(formula, (x, codebook), given), None)
    if grad_losses is None:
        assert grad is not None
        return grad.to(x.dtype), None, None
    grads = quantize_backward[ctx.backend](_dense(grad), grad_losses.contiguous(), x, codebook, indices)
    return (*grads, None)


quantize = ops.define(
    "latent_quantize",
    "(Tensor x, Tensor codebook, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_quantize,
    _TRITON,
    _quantize_context,
    _quantize_backward,
    backends=BACKENDS,
)
quantize_backward: dict[str, Callable[..., Any]] = ops.define(
    "latent_quantize_backward",
    "(Tensor? grad, Tensor grad_losses, Tensor x, Tensor codebook, Tensor indices) -> (Tensor, Tensor)",
    lambda grad, grad_losses, x, codebook, indices: _like(x, codebook),
    _TRITON,
    backends=BACKENDS,
)
