"""What the density op is compared with: PyTorch as a user writes it, in chunks too, and scikit-learn."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tests.density_cases import LOG_2PI


class Parameters(NamedTuple):
    """Of a mixture with full covariances."""

    weights: Tensor  #: ``[K]``
    means: Tensor  #: ``[K, D]``
    covariances: Tensor  #: ``[K, D, D]``


EMStep = tuple[Tensor, Tensor, Tensor, Tensor]  # mean log-likelihood, then the new parameters


def in_chunks(function: Callable[[Tensor], Tensor], x: Tensor, rows: int) -> Tensor:
    """The function of so many rows at a time."""
    return torch.cat([function(part) for part in x.split(rows)])


def kde_of_distances(x: Tensor, data: Tensor, h: float) -> Tensor:
    """A kernel estimate from the distances that ``torch.cdist`` gives."""
    scores = -0.5 * (torch.cdist(x, data) / h).square()
    return scores.logsumexp(1) - normalizer(data, h)


def kde_of_products(x: Tensor, data: Tensor, h: float) -> Tensor:
    """A kernel estimate whose only matrix of pairs comes from a matrix product."""
    scores = torch.addmm(-0.5 * (data / h).square().sum(1), x / h, (data / h).T)
    return scores.logsumexp(1) - 0.5 * (x / h).square().sum(1) - normalizer(data, h)


def normalizer(data: Tensor, h: float) -> float:
    """The logarithm of what divides the sum of exponentials."""
    return float(np.log(len(data)) + data.shape[1] * (np.log(h) + 0.5 * LOG_2PI))


def denoiser_of_distances(x_t: Tensor, data: Tensor, alpha: float, sigma: float) -> Tensor:
    """The exact denoiser as a softmax of the distances that ``torch.cdist`` gives."""
    return torch.softmax(-0.5 * (torch.cdist(x_t, alpha * data) / sigma).square(), 1) @ data


def em_step(x: Tensor, old: Parameters) -> EMStep:
    """One step of expectation maximisation, one component after the other, as scikit-learn does it."""
    factors = torch.linalg.cholesky(old.covariances)
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand_as(factors)
    inverses = torch.linalg.solve_triangular(factors, eye, upper=False)
    log_det = factors.diagonal(dim1=1, dim2=2).log().sum(1)
    squares = [((x - mean) @ inverse.T).square().sum(1) for mean, inverse in zip(old.means, inverses, strict=True)]
    scores = old.weights.log() - log_det - 0.5 * (x.shape[1] * LOG_2PI + torch.stack(squares, 1))
    log_prob = scores.logsumexp(1)
    r = torch.exp(scores - log_prob[:, None])
    counts = r.sum(0)
    means = (r.T @ x) / counts[:, None]
    covariances = []
    for k in range(len(means)):
        t = x - means[k]
        covariances.append((r[:, k, None] * t).T @ t / counts[k])
    return log_prob.mean(), counts / len(x), means, torch.stack(covariances)


class SklearnMixture:
    """scikit-learn's mixture with given parameters; imported where it is used."""

    def __init__(self, kind: str, weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        from sklearn.mixture import GaussianMixture

        self.model = GaussianMixture(len(means), covariance_type=kind, reg_covar=0.0)
        self.start = [t.numpy() for t in (weights, means, covariances)]
        if kind == "full":
            factors = torch.linalg.cholesky(covariances)
            eye = torch.eye(means.shape[1]).expand_as(factors)
            self.precisions = torch.linalg.solve_triangular(factors, eye, upper=False).mT.contiguous().numpy()
        else:
            self.precisions = covariances.rsqrt().numpy()
        self.reset()

    def reset(self) -> None:
        """The parameters that it began with."""
        self.model.weights_, self.model.means_, self.model.covariances_ = self.start
        self.model.precisions_cholesky_ = self.precisions

    def log_prob(self, x: Tensor) -> Tensor:
        """Of every point."""
        return torch.from_numpy(self.model.score_samples(x.numpy()))

    def em_step(self, x: Tensor) -> EMStep:
        """What ``fit`` repeats: an E-step and an M-step, which ends with the Cholesky factors of the next one."""
        self.reset()
        log_likelihood, log_r = self.model._e_step(x.numpy())
        self.model._m_step(x.numpy(), log_r)
        found = (self.model.weights_, self.model.means_, self.model.covariances_)
        return torch.tensor(float(log_likelihood)), *(torch.from_numpy(array) for array in found)


def sklearn_kde(data: Tensor, h: float) -> Callable[[Tensor], Tensor]:
    """scikit-learn's kernel estimate, exact: a tree of more than one leaf prunes what counts far from the data."""
    from sklearn.neighbors import KernelDensity

    model = KernelDensity(bandwidth=h, leaf_size=len(data)).fit(data.numpy())
    return lambda x: torch.from_numpy(model.score_samples(x.numpy()))
