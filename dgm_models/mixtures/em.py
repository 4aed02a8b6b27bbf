"""Expectation maximisation of Gaussian mixtures: both steps, and the bound that both of them raise."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

import dgm_kernels

COVARIANCES = ("spherical", "diagonal", "full")


class Mixture(NamedTuple):
    """The parameters of K Gaussians in D dimensions.

    Attributes:
        weights: ``[K]``, they sum to 1.
        means: ``[K, D]``.
        scale: standard deviations, ``[K]`` (spherical) or ``[K, D]`` (diagonal); None with full covariances.
        scale_tril: lower triangular factors of full covariances, ``[K, D, D]``; else None.
    """

    weights: Tensor
    means: Tensor
    scale: Tensor | None = None
    scale_tril: Tensor | None = None

    @property
    def covariance(self) -> str:
        """The kind: one of ``COVARIANCES``."""
        if self.scale is None:
            return "full"
        return "spherical" if self.scale.dim() == 1 else "diagonal"

    @property
    def options(self) -> dict[str, Any]:
        """What ``dgm_kernels.mixture_log_prob`` takes after the points and the means."""
        spread = {"scale": self.scale} if self.scale_tril is None else {"scale_tril": self.scale_tril}
        return {**spread, "weights": self.weights}

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats at points ``[N, D]``, ``[N]``."""
        return cast(Tensor, dgm_kernels.mixture_log_prob(x, self.means, **self.options))

    def responsibilities(self, x: Tensor) -> Tensor:
        """The E-step: the probability of each component given each point, ``[N, K]``."""
        return dgm_kernels.mixture_log_prob(x, self.means, **self.options, return_responsibilities=True)[1]


def em_step(x: Tensor, mixture: Mixture, *, min_variance: float = 1e-6) -> tuple[Mixture, Tensor]:
    """One iteration of EM in one pass over the points: an E-step, then the M-step for its responsibilities.

    With ``r_nk`` the responsibilities and ``c_k = sum_n r_nk``: weights ``c_k / N``, means
    ``m_k = sum_n r_nk x_n / c_k``, covariances ``S_k = sum_n r_nk (x_n - m_k)(x_n - m_k)^T / c_k``; of a diagonal
    covariance the diagonal, of a spherical one the mean of that. Then the eigenvalues of ``S_k`` that are below
    ``min_variance`` are set to it. That is the maximum among the covariances without smaller eigenvalues, so that the
    log-likelihood never falls. A component that no point has any share in stays where it is, with a weight near 0.

    Args:
        x: ``[N, D]``.
        mixture: from which to start; its covariances must have no eigenvalue below ``min_variance`` either.
        min_variance: positive, in the squared unit of the data. It keeps the density finite, which else grows without
            bound as a component shrinks to a point.

    Returns:
        The new mixture, and the mean log-likelihood of a point under the old one.

    Source: Dempster et al., "Maximum likelihood from incomplete data via the EM algorithm", 1977.
    """
    return _step(x, mixture, min_variance, 1.0)


def _step(x: Tensor, mixture: Mixture, min_variance: float, power: float) -> tuple[Mixture, Tensor]:
    """An iteration with the densities to a power in the responsibilities; the likelihood is that for power 1 only."""
    options = mixture.options if power == 1 else _flattened(mixture, power)
    found = dgm_kernels.mixture_em_statistics(x, mixture.means, **options)
    share = found.counts / x.shape[0]
    new = _maximize(mixture.means, found.counts, found.first, found.second, mixture.covariance, min_variance)
    empty = found.counts <= torch.finfo(found.counts.dtype).tiny * 1e6
    kept = [_where(empty, old, updated) for old, updated in zip(mixture[1:], new, strict=True)]
    share = share.clamp(min=1e-30)  # its logarithm stays finite
    parameters = [share / share.sum(), *kept]
    return Mixture(*(None if p is None else p.to(x.dtype) for p in parameters)), found.log_likelihood  # type: ignore[arg-type]


def anneal(
    x: Tensor, mixture: Mixture, steps: int, *, least_power: float | None = None, min_variance: float = 1e-6
) -> Mixture:
    """Iterations of EM with flattened responsibilities, ``r_nk ~ (w_k N(x_n; k))^b``, b rising geometrically to 1.

    In many dimensions responsibilities are nearly 0 or 1 from the start, so that EM stays close to its first guess of
    which points belong together; flattened ones let it move on. The log-likelihood may fall meanwhile.

    Args:
        x: ``[N, D]``.
        mixture: from which to start.
        steps: iterations.
        least_power: b of the first one, in (0, 1]; None for ``min(1, 6 / D)``.
        min_variance: see :func:`em_step`.

    Source: Ueda and Nakano, "Deterministic annealing EM algorithm", 1998.
    """
    least = min(1.0, 6 / x.shape[1]) if least_power is None else least_power
    if not 0 < least <= 1:
        raise ValueError(f"least_power must be in (0, 1], got {least_power!r}")
    for step in range(steps):
        mixture = _step(x, mixture, min_variance, least ** (1 - step / steps))[0]
    return mixture


def m_step(x: Tensor, responsibilities: Tensor, covariance: str = "diagonal", *, min_variance: float = 1e-6) -> Mixture:
    """The M-step for given responsibilities: the mixture for which :func:`lower_bound` is largest; see :func:`em_step`.

    Args:
        x: ``[N, D]``.
        responsibilities: ``[N, K]``, not negative; the rows sum to 1.
        covariance: ``"spherical"``, ``"diagonal"`` or ``"full"``.
        min_variance: see :func:`em_step`.

    Raises:
        ValueError: an argument has the wrong shape or value; or a component has no responsibility for any point.
    """
    check_covariance(covariance)
    if x.dim() != 2 or responsibilities.dim() != 2 or len(x) != len(responsibilities):
        raise ValueError(
            "responsibilities must have shape (N, K) for points (N, D), got "
            f"{tuple(responsibilities.shape)} for {tuple(x.shape)}"
        )
    total = responsibilities.sum(1)
    if not bool((responsibilities >= 0).all()) or not torch.allclose(total, torch.ones_like(total), atol=1e-4):
        raise ValueError("responsibilities must not be negative, and each row must sum to 1")
    counts = responsibilities.sum(0)
    if not bool((counts > 0).all()):
        raise ValueError(f"responsibilities must leave no component without points, got sums {counts.tolist()}")
    means = (responsibilities.mT @ x) / counts[:, None]
    second = second_moments(x, responsibilities, means, covariance)
    new = _maximize(means, counts, torch.zeros_like(means), second, covariance, min_variance)
    return Mixture(counts / len(x), *(None if p is None else p.to(x.dtype) for p in new))  # type: ignore[arg-type]


def lower_bound(x: Tensor, responsibilities: Tensor, mixture: Mixture) -> Tensor:
    """``sum_k r_nk (log w_k + log N(x_n; k) - log r_nk)`` of each point, ``[N]``: the bound that both steps raise.

    It is the log-likelihood minus ``KL(r_n || posterior)``, so it touches it where the responsibilities are those of
    the E-step, and there has the same gradient with respect to the parameters.

    Source: Neal and Hinton, "A view of the EM algorithm that justifies incremental, sparse, and other variants", 1998.
    """
    each = [_one(mixture, k).log_prob(x) + mixture.weights[k].log() for k in range(len(mixture.weights))]
    joint = torch.stack(each, dim=1)
    joint = torch.where(responsibilities > 0, joint, 0.0)  # a weight of 0 makes it infinite
    return (responsibilities * joint - torch.special.xlogy(responsibilities, responsibilities)).sum(1)


def second_moments(x: Tensor, responsibilities: Tensor, means: Tensor, covariance: str) -> Tensor:
    """Sums over the points of their deviations from the means, as ``dgm_kernels.mixture_em_statistics`` has them.

    ``sum_n r_nk |x_n - mu_k|^2`` ``[K]``, the squares of each dimension ``[K, D]``, or outer products ``[K, D, D]``.
    """
    sums = []
    for r, mean in zip(responsibilities.unbind(1), means, strict=True):
        deviation = x - mean
        if covariance == "full":
            sums.append((r[:, None] * deviation).mT @ deviation)
        else:
            squares = r @ deviation.square()
            sums.append(squares.sum() if covariance == "spherical" else squares)
    return torch.stack(sums)


def check_covariance(covariance: str) -> str:
    """``covariance`` if there is such a kind, else an error."""
    if covariance not in COVARIANCES:
        raise ValueError(f"covariance must be one of {', '.join(COVARIANCES)}, got {covariance!r}")
    return covariance


def _flattened(mixture: Mixture, power: float) -> dict[str, Any]:
    """The mixture whose responsibilities are those of the powers of densities.

    Each is a wider Gaussian, but for a factor: ``N(m, S)^b ~ |S|^((1 - b) / 2) N(m, S / b)``.
    """
    scale = mixture.scale if mixture.scale_tril is None else mixture.scale_tril
    assert scale is not None
    if mixture.covariance == "spherical":
        log_root = mixture.means.shape[1] * scale.log()
    else:
        log_root = (scale if mixture.scale_tril is None else scale.diagonal(dim1=1, dim2=2)).log().sum(1)
    name = "scale" if mixture.scale_tril is None else "scale_tril"
    return {name: scale / power**0.5, "logits": power * mixture.weights.log() + (1 - power) * log_root}


def _maximize(
    means: Tensor, counts: Tensor, first: Tensor, second: Tensor, covariance: str, min_variance: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Means, scale and scale_tril from moments about the old means, in float64."""
    if not 0 < min_variance < math.inf:
        raise ValueError(f"min_variance must be a positive finite number, got {min_variance!r}")
    counts = counts.double().clamp(min=1e-300)
    shift = first.double() / counts[:, None]
    new_means = means.double() + shift
    if covariance == "spherical":
        variance = (second.double() / counts - shift.square().sum(1)) / means.shape[1]
    elif covariance == "diagonal":
        variance = second.double() / counts[:, None] - shift.square()
    else:
        full = second.double() / counts[:, None, None] - shift[:, :, None] * shift[:, None, :]
        return new_means, None, torch.linalg.cholesky(_floored(full, min_variance))
    return new_means, variance.clamp(min=min_variance).sqrt(), None


def _floored(covariance: Tensor, floor: float) -> Tensor:
    """Symmetric matrices whose eigenvalues below ``floor`` are set to it; the others stay as they are, to the bit."""
    covariance = (covariance + covariance.mT) / 2
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    _, failed = torch.linalg.cholesky_ex(covariance - floor * eye)
    if not bool(failed.any()):
        return covariance
    values, vectors = torch.linalg.eigh(covariance)
    lifted = (vectors * values.clamp(min=floor).unsqueeze(-2)) @ vectors.mT
    return torch.where((failed > 0)[:, None, None], lifted, covariance)


def _where(empty: Tensor, old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """The old parameters of components without points, the new ones of the others."""
    if old is None or new is None:
        return None
    return torch.where(empty.view(-1, *[1] * (old.dim() - 1)), old.to(new.dtype), new)


def _one(mixture: Mixture, k: int) -> Mixture:
    """Component k by itself."""
    spread = [None if p is None else p[k : k + 1] for p in (mixture.scale, mixture.scale_tril)]
    return Mixture(torch.ones_like(mixture.weights[k : k + 1]), mixture.means[k : k + 1], *spread)
