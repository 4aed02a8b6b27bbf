"""The latent op in plain PyTorch: the specification, the oracle of the tests, and the fallback on every device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._core import noise as _noise
from .._core.noise import OpArgs


def work_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where there is one, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def per_sample(x: Tensor) -> Tensor:
    """``[batch, elements]``."""
    return x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)


def drawn(shape: torch.Size, like: Tensor, args: OpArgs, dtype: torch.dtype) -> Tensor:
    """The given noise, or that of the key."""
    given = args[0]
    return (given if given is not None else _noise.normal_noise(shape, like.device, args)).to(dtype)


def drawn_steps(shape: torch.Size, like: Tensor, args: OpArgs, dtype: torch.dtype, draws: int) -> Tensor:
    """The given noise ``[draws, ...]``, or draw j at step j of the key."""
    if args[0] is not None:
        return args[0].to(dtype)
    if draws == 0:
        return like.new_empty((0, *shape), dtype=dtype)
    return torch.stack([_noise.normal_noise(shape, like.device, args, step) for step in range(draws)]).to(dtype)


def divergence(mu: Tensor, log_var: Tensor, prior_mu: Tensor | float, prior_log_var: Tensor | float) -> Tensor:
    """KL of every element: ``0.5 (exp(a) - 1 - a + (mu - m)^2 exp(-b))`` with a = log_var - b, b = prior_log_var.

    ``exp(a) - 1`` is one function, which keeps its digits where the two variances are near each other. The square is
    taken of ``(mu - m) exp(-b / 2)``, finite where exp(-b) may be infinite.
    """
    a = log_var - prior_log_var
    if isinstance(prior_log_var, Tensor):
        most = math.log(torch.finfo(prior_log_var.dtype).max) - 0.7
        inverse_sigma: Tensor | float = torch.exp((-0.5 * prior_log_var).clamp(max=most))
    else:
        inverse_sigma = math.exp(-0.5 * prior_log_var)
    return 0.5 * (torch.expm1(a) - a + ((mu - prior_mu) * inverse_sigma).square())


def kl_sum(kl: Tensor, free_bits: float) -> Tensor:
    """Of every sample; an element counts as ``free_bits`` at least, and has no gradient where it is below that."""
    return per_sample(kl.clamp(min=free_bits) if free_bits > 0 else kl).sum(1)


def sample_kl(
    mu: Tensor,
    log_var: Tensor,
    args: OpArgs,
    free_bits: float,
    log_normal: bool,
    prior_mu: float,
    prior_log_var: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """``u = mu + exp(log_var / 2) eps``; returns z = u, or exp(u), in ``dtype``, and the KL ``[batch]``."""
    work = work_dtype(mu, log_var)
    m, v = mu.to(work), log_var.to(work)
    u = m + torch.exp(0.5 * v) * drawn(mu.shape, mu, args, work)
    kl = kl_sum(divergence(m, v, prior_mu, prior_log_var), free_bits)
    return (torch.exp(u) if log_normal else u).to(dtype), kl


def sample_tril_kl(mu: Tensor, scale_tril: Tensor, args: OpArgs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``z = mu + L eps`` and ``0.5 (|L|^2 + |mu|^2 - D) - sum log diag L``."""
    work = work_dtype(mu, scale_tril)
    m, factor = mu.to(work), torch.tril(scale_tril.to(work))
    z = m + (factor @ drawn(mu.shape, mu, args, work).unsqueeze(-1)).squeeze(-1)
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    squares = factor.square().sum((-2, -1)) + m.square().sum(-1)
    return z.to(dtype), 0.5 * (squares - mu.shape[-1]) - diagonal.log().sum(-1)


def gaussian_kl(
    mu: Tensor, log_var: Tensor, prior_mu: Tensor | None, prior_log_var: Tensor | None, free_bits: float
) -> Tensor:
    """KL of two diagonal Gaussians, ``[batch]``; None stands for 0."""
    work = work_dtype(*(t for t in (mu, log_var, prior_mu, prior_log_var) if t is not None))
    prior = (0.0 if t is None else t.to(work) for t in (prior_mu, prior_log_var))
    return kl_sum(divergence(mu.to(work), log_var.to(work), *prior), free_bits)


def importance(
    mu: Tensor, log_var: Tensor, args: OpArgs, draws: int, log_normal: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """z of every draw, ``[draws, batch, ...]``, and ``sum 0.5 (eps^2 + log_var - u^2)``, ``[draws, batch]``.

    Of log-normal z and prior the Jacobians of exp cancel: the ratio is that of the logarithms u.
    """
    work = work_dtype(mu, log_var)
    m, v = mu.to(work), log_var.to(work)
    eps = drawn_steps(mu.shape, mu, args, work, draws)
    u = m + torch.exp(0.5 * v) * eps
    ratio = 0.5 * (eps.square() + v - u.square())
    total = ratio.flatten(2).sum(2) if mu.dim() > 1 else ratio
    return (torch.exp(u) if log_normal else u).to(dtype), total


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code of every row, the lowest of equal ones: least ``|e|^2 / 2 - x.e``.

    Both are shifted by the mean of the codes, which changes no distance and keeps the digits of near ones.
    """
    mean = codebook.mean(0)
    e = codebook - mean
    return (0.5 * e.square().sum(1) - (x - mean) @ e.mT).argmin(1)


def quantize(x: Tensor, codebook: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of rows ``x [N, D]``: the codes with the gradient of x, indices, usage counts, and the two losses as ``[2]``."""
    work = work_dtype(x, codebook)
    rows, codes = x.to(work), codebook.to(work)
    indices = nearest(rows.detach(), codes.detach())
    chosen = codes[indices]
    counts = indices.new_zeros(codebook.shape[0]).scatter_add(0, indices, torch.ones_like(indices))
    losses = torch.stack([(rows.detach() - chosen).square().mean(), (rows - chosen.detach()).square().mean()])
    # x - x, not chosen - x: adding that to x would round, and the codes are to be exact.
    passed = torch.where(torch.isfinite(rows.detach()), rows - rows.detach(), rows)
    return (chosen.detach() + passed).to(dtype), indices, counts, losses


def importance_bound(log_weights: Tensor) -> Tensor:
    """log mean exp over dimension 0."""
    return torch.logsumexp(log_weights, 0) - math.log(log_weights.shape[0])
