"""Two estimators of the gradient of an expectation: along the path of the samples, and by the score function."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import dgm_kernels
from dgm_kernels import NoiseKey


def pathwise(f: Callable[[Tensor], Tensor], mu: Tensor, log_var: Tensor, key: NoiseKey) -> Tensor:
    """``f(mu + exp(log_var / 2) eps)``: its gradient is an unbiased one of ``E[f(z)]``, through f.

    Args:
        f: ``[batch, D]`` to ``[batch]``, differentiable.
        mu: ``[batch, D]``, mean of the Gaussian z.
        log_var: like mu, logarithm of its variances.
        key: names the noise.

    Returns:
        ``[batch]``.

    Source: Kingma and Welling, 2014; Rezende et al., 2014.
    """
    return f(dgm_kernels.gaussian_sample_kl(mu, log_var, key)[0])


def score_function(
    f: Callable[[Tensor], Tensor], mu: Tensor, log_var: Tensor, key: NoiseKey, baseline: float | Tensor = 0.0
) -> Tensor:
    """``f(z)``, whose gradient is ``(f(z) - baseline) d log q(z)``: the policy gradient (REINFORCE), unbiased too.

    It needs no gradient of f, and pays for that with a variance that grows with the dimension.

    Args:
        f, mu, log_var, key: see :func:`pathwise`; f need not be differentiable.
        baseline: a constant that moves the variance and not the mean, such as the mean of f.

    Returns:
        ``[batch]``.

    Source: Williams, "Simple statistical gradient-following algorithms for connectionist reinforcement learning", 1992.
    """
    with torch.no_grad():
        z, _ = dgm_kernels.gaussian_sample_kl(mu, log_var, key)
        value = f(z)
    log_q = -0.5 * ((z - mu).square() * torch.exp(-log_var) + log_var).sum(1)
    return value + (value - baseline) * (log_q - log_q.detach())
