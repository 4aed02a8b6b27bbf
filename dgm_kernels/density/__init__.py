"""Densities that are sums over many components or data points, without the matrix of all pairs."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .._core import ops
from .._core.autocast import full_precision
from .._core.backends import is_differentiated, select
from .._core.checks import values_known
from . import op, reference
from .checks import check_bandwidths, check_points, check_positive
from .mixture import Components, components

__all__ = ["EMStatistics", "empirical_denoiser", "kde_log_prob", "mixture_em_statistics", "mixture_log_prob", "mmd"]

Prediction = Literal["x0", "eps", "score", "v", "velocity"]
PREDICTIONS = ("x0", "eps", "score", "v", "velocity")
_LEAST_ALPHA = 1e-10  # of sigma: below, data of any usual size leave no trace in x_t


class EMStatistics(NamedTuple):
    """What an M-step needs: sums over the points n, weighted by the responsibilities r of the components k.

    The new parameters are ``weights = counts / N``, ``means + first / counts`` and, with ``d = first / counts``,
    ``second / counts - d d^T`` (its diagonal; for spherical components the mean of that).
    """

    log_likelihood: Tensor  #: mean log-probability of the points, a scalar
    counts: Tensor  #: ``[K]``, sum_n r_nk
    first: Tensor  #: ``[K, D]``, sum_n r_nk (x_n - mu_k)
    second: Tensor  #: sum_n r_nk of ``|x_n - mu_k|^2`` ``[K]``, its terms ``[K, D]``, or outer products ``[K, D, D]``


def mixture_log_prob(
    x: Tensor,
    means: Tensor,
    *,
    scale: Tensor | None = None,
    scale_tril: Tensor | None = None,
    covariance: Tensor | None = None,
    weights: Tensor | None = None,
    logits: Tensor | None = None,
    return_responsibilities: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-density of a Gaussian mixture, ``log sum_k weights_k N(x; means_k, covariance_k)``, in nats.

    The matrix of all points and components is never made, forward or backward, unless responsibilities are asked for.
    16-bit tensors are worked on in float32, under autocast too.

    Args:
        x: ``[..., D]`` points.
        means: ``[K, D]``.
        scale: standard deviations, ``[K]`` for spherical or ``[K, D]`` for diagonal components.
        scale_tril: ``[K, D, D]``, Cholesky factors of the covariances; what is above the diagonal is not read.
        covariance: ``[K, D, D]``; exactly one of ``scale``, ``scale_tril`` and ``covariance`` is given.
        weights: ``[K]``, probabilities that sum to 1.
        logits: ``[K]`` in place of weights, their logarithms up to a constant; with neither all weights are 1 / K.
        return_responsibilities: also return the posterior of the components, ``[..., K]``.

    Returns:
        ``[...]`` in float32 (float64 if an argument is), with gradients for every argument; or the pair with the
        responsibilities.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device; a CPU tensor has a value that no mixture
            has: a scale that is not positive, a covariance that is not positive definite, weights that do not sum to 1.
            (On a GPU, which is not awaited, the result is NaN, or that of the weights as they are.)

    Source: McLachlan and Peel, "Finite Mixture Models", 2000; Bishop, "Pattern Recognition and Machine Learning", 9.2.
    """
    check_points("x", x)
    mixture = components(x, means, scale, scale_tril, covariance, weights, logits)
    lse, r = _log_prob(mixture.points(x), mixture, full=return_responsibilities)
    lse = (lse + mixture.constant).view(x.shape[:-1])
    return (lse, r.view(*x.shape[:-1], means.shape[0])) if return_responsibilities else lse


@torch.no_grad()
def mixture_em_statistics(
    x: Tensor,
    means: Tensor,
    *,
    scale: Tensor | None = None,
    scale_tril: Tensor | None = None,
    covariance: Tensor | None = None,
    weights: Tensor | None = None,
    logits: Tensor | None = None,
) -> EMStatistics:
    """The E-step of a Gaussian mixture and the sums that its M-step needs, without a matrix of responsibilities.

    The sums are about the present means, which keeps their digits where a component is narrow and far from 0. No
    gradients.

    Args:
        x: ``[..., D]`` points, at least one.
        means, scale, scale_tril, covariance, weights, logits: see :func:`mixture_log_prob`.

    Returns:
        :class:`EMStatistics` in float32, or float64 if an argument is.

    Raises:
        TypeError, ValueError: as :func:`mixture_log_prob`; ``x`` has no point.

    Source: Dempster, Laird and Rubin, "Maximum Likelihood from Incomplete Data via the EM Algorithm", 1977.
    """
    check_points("x", x, least=1)
    mixture = components(x, means, scale, scale_tril, covariance, weights, logits)
    points = mixture.points(x)
    lse, _ = _log_prob(points, mixture)
    ones = torch.ones_like(lse)
    operands = (points, mixture.y, mixture.inv, None, mixture.offset)
    backend = _select(points, mixture)
    if backend == "reference":
        with full_precision(x.device):
            sums = reference.moments(ones, *operands)
    else:
        sums = ops.call(op.moments[backend], False, ones, lse, *operands)
    return EMStatistics(lse.mean() + mixture.constant, *sums)


def kde_log_prob(x: Tensor, data: Tensor, bandwidth: float | Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Log-density of a kernel density estimate with a Gaussian kernel, ``log sum_m weights_m N(x; data_m, h^2 I)``.

    Memory is linear in the number of points, forward and backward.

    Args:
        x: ``[..., D]`` points.
        data: ``[M, D]``, at least one.
        bandwidth: h, a positive number or a tensor without dimensions.
        weights: ``[M]``, probabilities that sum to 1; 1 / M without.

    Returns:
        ``[...]`` in nats, float32 (float64 if an argument is), with gradients for every argument.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value; the message names it.

    Source: Rosenblatt, 1956; Parzen, "On Estimation of a Probability Density Function and Mode", 1962.
    """
    check_points("x", x)
    check_points("data", data, x, least=1)
    h = check_positive("bandwidth", bandwidth, x)
    scale = h.reshape(1) if isinstance(h, Tensor) else x.new_full((1,), h, dtype=_wide(x, data))
    mixture = components(x, data, scale, None, None, weights, None, scale_name="bandwidth")
    return (_log_prob(mixture.points(x), mixture)[0] + mixture.constant).view(x.shape[:-1])


def empirical_denoiser(
    x_t: Tensor,
    data: Tensor,
    alpha: float | Tensor,
    sigma: float | Tensor,
    *,
    weights: Tensor | None = None,
    prediction: Prediction = "x0",
    return_log_prob: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The exact denoiser of a finite data set: ``E[x0 | x_t]`` for ``x_t = alpha x0 + sigma eps``, x0 in the data.

    ``E[x0 | x_t] = sum_m r_m data_m``, ``r = softmax_m(log weights_m - |x_t - alpha data_m|^2 / (2 sigma^2))``. This is
    what a network that minimises the denoising loss on the data without error would answer.

    Args:
        x_t: ``[..., D]`` noisy points.
        data: ``[M, D]``, at least one.
        alpha: non-negative: a number, a tensor without dimensions, or one number a point, ``[...]``.
        sigma: positive, likewise.
        weights: ``[M]``, probabilities that sum to 1; 1 / M without.
        prediction: what to return: ``"x0"``; ``"eps"``, ``(x_t - alpha x0) / sigma``; ``"score"``, the gradient of the
            log-density of x_t, ``-eps / sigma``; ``"v"``, ``alpha eps - sigma x0``; ``"velocity"``, ``x0 - eps``,
            that of flow matching along ``x_t = t x0 + (1 - t) eps``.
        return_log_prob: also return the log-density of ``x_t``, in nats.

    Returns:
        ``[..., D]`` in the dtype of ``x_t``, with a gradient for it; or the pair with ``[...]``, float32 (float64).
        Other arguments with gradients are differentiated by the reference.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value; the message names it.

    Source: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022, appendix B.3;
        velocity: Lipman et al., 2023.
    """
    check_points("x_t", x_t)
    if not isinstance(data, Tensor):
        raise TypeError(f"data must be a tensor, got {type(data).__name__}")
    check_points("data", data, x_t, least=1, like_name="x_t")
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction must be one of {', '.join(map(repr, PREDICTIONS))}, got {prediction!r}")
    a = _per_point(check_positive("alpha", alpha, x_t, per_row=True, zero=True, like_name="x_t"), x_t, data)
    s = _per_point(check_positive("sigma", sigma, x_t, per_row=True, like_name="x_t"), x_t, data)
    mixture = components(x_t, data, x_t.new_ones(1, dtype=_wide(x_t, data)), None, None, weights, None)
    x = mixture.points(x_t)
    # s_nm = -q |x / alpha - data|^2 / 2 with q = (alpha / sigma)^2; where alpha is next to nothing, all data are alike.
    seen = a > _LEAST_ALPHA * s
    q = torch.where(seen, a / s, 0.0).square()
    if values_known(q) and not bool(q.isfinite().all()):
        raise ValueError(
            f"sigma must be such that (alpha / sigma)^2 is a finite {q.dtype}, got {float(s.detach().min())}"
        )
    mean, lse = _posterior_mean(torch.where(seen[:, None], x / torch.where(seen, a, 1.0)[:, None], 0.0), mixture, q)
    result = _predict(prediction, x, mean, a[:, None], s[:, None]).to(x_t.dtype).view(x_t.shape)
    if not return_log_prob:
        return result
    log_prob = lse + mixture.constant - x.shape[1] * torch.log(s)
    alone = -0.5 * (x / s[:, None]).square().sum(1)
    return result, torch.where(seen, log_prob, log_prob + alone).view(x_t.shape[:-1])


def mmd(
    x: Tensor,
    y: Tensor,
    *,
    kernel: Literal["rbf", "polynomial"] = "rbf",
    bandwidth: float | Sequence[float] = 1.0,
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
    unbiased: bool = True,
) -> Tensor:
    """Squared maximum mean discrepancy of two samples, ``mean k(x, x') + mean k(y, y') - 2 mean k(x, y)``.

    Sums are over tiles in memory linear in the points, and in float64 between tiles. With ``kernel="polynomial"`` on
    features of a network it is the kernel inception distance (KID).

    Args:
        x: ``[N, D]``.
        y: ``[M, D]``.
        kernel: ``"rbf"``, the mean over the bandwidths h of ``exp(-|x - y|^2 / (2 h^2))``; or ``"polynomial"``,
            ``(gamma x.y + coef0)^degree``.
        bandwidth: h, one or up to 32 positive numbers; of the rbf kernel.
        degree, gamma, coef0: of the polynomial kernel; degree from 1 on, gamma 1 / D unless given.
        unbiased: leave out the pairs of a point with itself, which needs two points in each sample.

    Returns:
        A scalar in float32 (float64 if an argument is), with gradients for x and y.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value; the message names it.

    Source: Gretton et al., "A Kernel Two-Sample Test", 2012, lemma 6; KID: Binkowski et al., 2018.
    """
    least = 2 if unbiased else 1
    if check_points("x", x, least=least).dim() != 2:
        raise ValueError(f"x must have shape [N, D], got {tuple(x.shape)}")
    check_points("y", y, x, least=least)
    wide = _wide(x, y)
    kind, values = _kernel(kernel, bandwidth, degree, 1.0 if gamma is None else gamma, coef0, wide)
    x, y = x.to(wide), y.to(wide)
    if kernel == "polynomial" and gamma is None:  # not as a number of the op, which compiled code would be made for
        x, y = x * x.shape[1] ** -0.5, y * x.shape[1] ** -0.5
    n, m = x.shape[0], y.shape[0]
    within_x = _kernel_sum(x, x, kind, values, unbiased) / (n * (n - unbiased))
    within_y = _kernel_sum(y, y, kind, values, unbiased) / (m * (m - unbiased))
    across = _kernel_sum(x, y, kind, values, False) / (n * m)
    total = within_x + within_y - 2.0 * across
    return (total / len(values) if kernel == "rbf" else total).to(wide)


def _wide(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 if one of the tensors is."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def _per_point(value: float | Tensor, x: Tensor, data: Tensor) -> Tensor:
    """One number a point, ``[points]``."""
    points, wide = math.prod(x.shape[:-1]), _wide(x, data)
    if isinstance(value, Tensor):
        return value.to(wide).reshape(-1).expand(points)
    return torch.full((points,), value, dtype=wide, device=x.device)


def _predict(prediction: str, x: Tensor, mean: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    if prediction == "x0":
        return mean
    eps = (x - alpha * mean) / sigma
    if prediction == "eps":
        return eps
    if prediction == "score":
        return -eps / sigma
    return alpha * eps - sigma * mean if prediction == "v" else mean - eps


def _kernel(
    kernel: str, bandwidth: float | Sequence[float], degree: int, gamma: float, coef0: float, dtype: torch.dtype
) -> tuple[int, list[float]]:
    """The kernel as the op takes it."""
    if kernel not in op.KINDS:
        raise ValueError(f"kernel must be one of {', '.join(map(repr, op.KINDS))}, got {kernel!r}")
    if kernel == "rbf":
        return op.KINDS.index(kernel), [0.5 / h / h for h in check_bandwidths(bandwidth, dtype)]
    if isinstance(degree, bool) or not isinstance(degree, int) or degree < 1:
        raise ValueError(f"degree must be an int of at least 1, got {degree!r}")
    for name, value in (("gamma", gamma), ("coef0", coef0)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not -math.inf < value < math.inf:
            raise ValueError(f"{name} must be a finite number, got {value!r}")
    return op.KINDS.index(kernel), [float(gamma), float(coef0), float(degree)]


def _select(x: Tensor, mixture: Components) -> str:
    full = mixture.inv.dim() == 3 and not x.is_cpu
    refusal = "full covariances are computed by the reference on GPUs" if full else None
    return select(x.device, (x, mixture.y, mixture.inv, mixture.offset), refusal, natives=op.BACKENDS)


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _log_prob(x: Tensor, mixture: Components, full: bool = False) -> tuple[Tensor, Tensor]:
    y, inv, offset, _ = mixture
    backend = _select(x, mixture)
    if backend == "reference":
        with full_precision(x.device):
            if full:
                return reference.responsibilities(x, y, inv, None, offset)
            return reference.log_prob(x, y, inv, None, offset), offset
    return ops.call(op.log_prob[backend], _needs_grad(x, y, inv, offset), x, y, inv, None, offset, full)


def _posterior_mean(x: Tensor, mixture: Components, q: Tensor) -> tuple[Tensor, Tensor]:
    y, _, offset, _ = mixture
    differentiated = any(map(is_differentiated, (y, q, offset)))
    refusal = "derivatives by data, weights, alpha or sigma are computed by the reference" if differentiated else None
    backend = select(x.device, (x, y, q, offset), refusal, natives=op.BACKENDS)
    if backend == "reference":
        with full_precision(x.device):
            return reference.mean(x, y, q, offset)
    return ops.call(op.mean[backend], _needs_grad(x), x.contiguous(), y, q.contiguous(), offset)


def _kernel_sum(x: Tensor, y: Tensor, kind: int, values: list[float], same: bool) -> Tensor:
    backend = select(x.device, (x, y), natives=op.BACKENDS)
    if backend == "reference":
        with full_precision(x.device):
            return reference.kernel_sum(x, y, op.KINDS[kind], values, same)
    return ops.call(op.kernel_sum[backend], _needs_grad(x, y), x.contiguous(), y.contiguous(), kind, values, same)
