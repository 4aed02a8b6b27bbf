"""Latent variables: reparametrised samples with their KL in one pass, importance weights, vector quantisation."""

from __future__ import annotations

import torch
from torch import Tensor

from .._core import layout, ops
from .._core.autocast import elementwise_dtype
from .._core.backends import select
from .._core.checks import check_batch, check_float
from .._core.noise import NO_NOISE, NoiseKey, OpArgs, noise_args
from . import op, reference
from .checks import (
    check_draws,
    check_free_bits,
    check_gaussian,
    check_number,
    check_prior,
    check_prior_log_var,
    check_scale_tril,
)
from .quantize import VectorQuantized, vector_quantize

__all__ = [
    "VectorQuantized",
    "gaussian_kl",
    "gaussian_sample_kl",
    "importance_bound",
    "importance_log_weights",
    "lognormal_sample_kl",
    "vector_quantize",
]


def gaussian_sample_kl(
    mu: Tensor,
    log_var: Tensor | None = None,
    noise: NoiseKey | Tensor | None = None,
    *,
    scale_tril: Tensor | None = None,
    free_bits: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """A reparametrised Gaussian sample and its KL to the standard normal distribution, in one pass.

    Diagonal: ``z = mu + exp(log_var / 2) eps`` and ``kl = sum of 0.5 (exp(log_var) + mu^2 - 1 - log_var)`` over the
    sample. Full covariance L L^T: ``z = mu + L eps`` and ``kl = 0.5 (|L|^2 + |mu|^2 - D) - sum log diag L``. Saves mu,
    log_var or scale_tril, and the key: the backward pass draws eps again. 16-bit tensors are worked on in float32.
    Differentiable to any order; gradients of a given noise tensor are computed by the reference.

    Args:
        mu: ``[batch, ...]``; with ``scale_tril`` ``[batch, D]``.
        log_var: like ``mu``, logarithm of the variance. A view, such as a half of a network's output, is read where it
            is.
        noise: a key, whose noise :func:`noise_like` shows; a tensor like ``mu``, eps itself; or None: a fresh seed from
            PyTorch's generator.
        scale_tril: ``[batch, D, D]``, L, in place of ``log_var``. Its diagonal is positive; what is above it is never
            read, and its gradient is 0.
        free_bits: nats that every element of every sample counts for at least; where its KL is below, the KL has no
            gradient. Kingma et al. bound means over a minibatch and groups of elements; this is their bound with groups
            of one and without the mean. Not with ``scale_tril``.

    Returns:
        z in the shape of ``mu``, contiguous (dtype: PyTorch's promotion of the two), and kl ``[batch]`` in nats,
        float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value, such as not exactly one of
            ``log_var`` and ``scale_tril``, or, on the CPU, a diagonal of ``scale_tril`` that is not positive; the
            message names it.

    Source: Kingma and Welling, "Auto-Encoding Variational Bayes", 2014; free bits: Kingma et al., "Improved Variational
    Inference with Inverse Autoregressive Flow", 2016.
    """
    if (log_var is None) == (scale_tril is None):
        given = "neither" if log_var is None else "both"
        raise ValueError(f"exactly one of log_var and scale_tril must be given, got {given}")
    free_bits = check_free_bits(free_bits)
    if scale_tril is None:
        return _sample(mu, log_var, noise, free_bits)
    check_batch("mu", mu)
    check_scale_tril(scale_tril, mu)
    if free_bits:
        raise ValueError(f"free_bits must be 0 with scale_tril, whose KL is no sum over elements, got {free_bits}")
    args = noise_args(noise, mu, "mu")
    dtype = elementwise_dtype(mu, scale_tril)
    backend = select(mu.device, (mu, scale_tril, args[0]), _refusal(args), natives=op.BACKENDS)
    if backend == "reference":
        return reference.sample_tril_kl(mu, scale_tril, args, dtype)
    operands = (layout.rows(mu), layout.rows(scale_tril))
    return ops.call(op.tril[backend], _needs_grad(mu, scale_tril), *operands, *_dense(args), dtype)


def lognormal_sample_kl(
    mu: Tensor,
    log_var: Tensor,
    noise: NoiseKey | Tensor | None = None,
    *,
    prior_mu: float = 0.0,
    prior_log_var: float = 0.0,
    free_bits: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """A reparametrised log-normal sample and its KL to a log-normal prior, in one pass.

    ``z = exp(mu + exp(log_var / 2) eps)``; the KL of two log-normal distributions is that of the normal ones of the
    logarithms, ``sum of 0.5 (exp(log_var - b) + (mu - m)^2 exp(-b) - 1 - log_var + b)`` with m = ``prior_mu`` and
    b = ``prior_log_var``. What it saves and its precision are as in :func:`gaussian_sample_kl`.

    Args:
        mu: ``[batch, ...]``, mean of log z.
        log_var: like ``mu``, logarithm of the variance of log z.
        noise: a key, a tensor like ``mu``, or None: a fresh seed from PyTorch's generator.
        prior_mu: mean of log z under the prior.
        prior_log_var: logarithm of its variance, in [-80, 80].
        free_bits: nats that every element of every sample counts for at least, as in :func:`gaussian_sample_kl`.

    Returns:
        z in the shape of ``mu``, contiguous (dtype: PyTorch's promotion of the two), and kl ``[batch]`` in nats,
        float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value; the message names it.

    Source: Kingma and Welling, "Auto-Encoding Variational Bayes", 2014, of a log-normal posterior and prior.
    """
    prior = check_number("prior_mu", prior_mu), check_prior_log_var(prior_log_var)
    return _sample(mu, log_var, noise, check_free_bits(free_bits), True, *prior)


def gaussian_kl(
    mu: Tensor,
    log_var: Tensor,
    prior_mu: Tensor | None = None,
    prior_log_var: Tensor | None = None,
    *,
    free_bits: float = 0.0,
) -> Tensor:
    """KL of two diagonal Gaussians: ``sum of 0.5 (exp(a) - 1 - a + (mu - m)^2 exp(-b))``, a = log_var - b.

    m and b are ``prior_mu`` and ``prior_log_var``. Saves its operands; differentiable to any order, by all of them.

    Args:
        mu: ``[batch, ...]``.
        log_var: like ``mu``, logarithm of the variance.
        prior_mu: broadcasts to ``mu``; None for 0.
        prior_log_var: likewise; None for 0, the variance 1.
        free_bits: nats that every element of every sample counts for at least, as in :func:`gaussian_sample_kl`.

    Returns:
        ``[batch]`` in nats, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value; the message names it.

    Source: Kullback and Leibler, "On Information and Sufficiency", 1951; Kingma and Welling, 2014, appendix B.
    """
    check_gaussian(mu, log_var)
    free_bits = check_free_bits(free_bits)
    prior = check_prior("prior_mu", prior_mu, mu), check_prior("prior_log_var", prior_log_var, mu)
    operands = (mu, log_var, *prior)
    backend = select(mu.device, operands, natives=op.BACKENDS)
    if backend == "reference":
        return reference.gaussian_kl(*operands, free_bits)
    dense = (None if t is None else layout.rows(t) for t in operands)
    return ops.call(op.kl[backend], _needs_grad(*operands), *dense, free_bits)


def importance_log_weights(
    mu: Tensor,
    log_var: Tensor,
    noise: NoiseKey | Tensor | None = None,
    *,
    samples: int,
    log_normal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Several samples of every posterior and the prior's share of their log-weights, ``log p(z) - log q(z | x)``.

    ``z = mu + exp(log_var / 2) eps`` and, with a standard normal prior, ``log_ratio = sum of 0.5 (eps^2 + log_var -
    z^2)`` over the sample. The log-weight of a draw is ``log p(x | z) + log_ratio``; :func:`importance_bound` makes the
    bound of them. Saves mu, log_var and the key: neither z nor eps, which are k times their size.

    Args:
        mu: ``[batch, ...]``.
        log_var: like ``mu``, logarithm of the variance.
        noise: a key: draw j has the noise of step ``key.step + j``, however many there are; a tensor
            ``[samples, batch, ...]``; or None: a fresh seed from PyTorch's generator.
        samples: k, how many of each posterior.
        log_normal: the posterior and the prior are those of log z: ``z = exp(mu + exp(log_var / 2) eps)``.

    Returns:
        z ``[samples, batch, ...]`` (dtype: PyTorch's promotion of the two), and log_ratio ``[samples, batch]`` in nats,
        float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value; the message names it.

    Source: Burda, Grosse and Salakhutdinov, "Importance Weighted Autoencoders", 2016.
    """
    check_gaussian(mu, log_var)
    draws = check_draws(samples)
    if isinstance(noise, Tensor):
        expected = (draws, *mu.shape)
        if tuple(noise.shape) != expected:
            raise ValueError(f"noise must have shape [samples, *mu.shape], {expected}, got {tuple(noise.shape)}")
        check_float("noise", noise)
        if noise.device != mu.device:
            raise ValueError(f"noise must be on the device of mu, {mu.device}, got {noise.device}")
        args: OpArgs = (noise, *NO_NOISE[1:])
    else:
        args = noise_args(noise, mu, "mu")
    dtype = elementwise_dtype(mu, log_var)
    backend = select(mu.device, (mu, log_var, args[0]), _refusal(args), natives=op.BACKENDS)
    if backend == "reference":
        return reference.importance(mu, log_var, args, draws, bool(log_normal), dtype)
    operands = (layout.rows(mu), layout.rows(log_var))
    settings = (draws, bool(log_normal), dtype)
    return ops.call(op.importance[backend], _needs_grad(mu, log_var), *operands, *_dense(args), *settings)


def importance_bound(log_weights: Tensor) -> Tensor:
    """The importance-weighted bound: ``log mean exp`` of the log-weights over dimension 0.

    Its gradient with respect to them is the normalised weights.

    Args:
        log_weights: ``[samples, batch]``, ``log p(x | z) + log p(z) - log q(z | x)`` of every draw. Any dimensions may
            follow the first.

    Returns:
        ``[batch]`` in nats, float32 (float64 for float64): a lower bound of log p(x) in the mean, which rises with the
        number of samples.

    Raises:
        TypeError, ValueError: ``log_weights`` is no floating-point tensor or has no draws.

    Source: Burda, Grosse and Salakhutdinov, "Importance Weighted Autoencoders", 2016, equation 8.
    """
    check_batch("log_weights", log_weights)
    if log_weights.shape[0] == 0:
        raise ValueError(f"log_weights must hold at least one draw, got shape {tuple(log_weights.shape)}")
    weights = log_weights.to(reference.work_dtype(log_weights))
    if not weights.is_cpu or (backend := select(weights.device, (weights,), natives=("cpp",))) == "reference":
        return reference.importance_bound(weights)
    flat = weights.reshape(weights.shape[0], -1).contiguous()
    return ops.call(op.bound[backend], _needs_grad(weights), flat).view(weights.shape[1:])


def _sample(
    mu: Tensor,
    log_var: Tensor | None,
    noise: NoiseKey | Tensor | None,
    free_bits: float,
    log_normal: bool = False,
    prior_mu: float = 0.0,
    prior_log_var: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The diagonal sample and its KL on the best backend."""
    check_gaussian(mu, log_var)
    assert log_var is not None
    args = noise_args(noise, mu, "mu")
    settings = (free_bits, log_normal, prior_mu, prior_log_var, elementwise_dtype(mu, log_var))
    backend = select(mu.device, (mu, log_var, args[0]), _refusal(args), natives=op.BACKENDS)
    if backend == "reference":
        return reference.sample_kl(mu, log_var, args, *settings)
    operands = (layout.rows(mu), layout.rows(log_var))
    return ops.call(op.sample[backend], _needs_grad(mu, log_var), *operands, *_dense(args), *settings)


def _refusal(args: OpArgs) -> str | None:
    given = args[0]
    if given is not None and given.requires_grad and torch.is_grad_enabled():
        return "the gradient of given noise is computed by the reference"
    return None


def _dense(args: OpArgs) -> OpArgs:
    return args if args[0] is None else (args[0].contiguous(), *args[1:])


def _needs_grad(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False
