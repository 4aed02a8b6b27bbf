"""Where EM starts: four ways to initialise a Gaussian mixture, of which one never gets anywhere."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from dgm_kernels import NoiseKey, noise_like

from .em import Mixture, m_step

STARTS = ("same", "variances", "data", "kmeans")
RANDOM_STARTS = ("data", "kmeans")
_LLOYD_STEPS = 20


def start(
    init: str, x: Tensor, components: int, covariance: str, *, key: NoiseKey, min_variance: float = 1e-6
) -> Mixture:
    """A mixture of equally likely components to begin EM with.

    Args:
        init: ``"same"``: every component is the Gaussian of the data. All responsibilities are then 1 / K, and stay so
            for ever, but for rounding: each M-step gives every component the same again. A warning says so.
            ``"variances"``: the same means, but variances from 1/2 to 2 times those of the data, by which EM can tell
            the components apart.
            ``"data"``: the means are points of the data, no two the same point, with the data's covariance.
            ``"kmeans"``: the means are those of k-means, seeded by k-means++, with the mean covariance within clusters.
        x: ``[N, D]``.
        components: K.
        covariance: ``"spherical"``, ``"diagonal"`` or ``"full"``.
        key: names the noise.
        min_variance: see :func:`.em_step`.

    Source: k-means++: Arthur and Vassilvitskii, 2007.
    """
    if components > len(x):
        raise ValueError(f"components must be at most the {len(x)} points to fit, got {components}")
    whole = m_step(x, x.new_ones(len(x), 1), covariance, min_variance=min_variance)
    if init == "kmeans":
        means, nearest = kmeans(x, components, key)
        within = x - means[nearest]
        whole = m_step(within, x.new_ones(len(x), 1), covariance, min_variance=min_variance)
    elif init == "data":
        means = x[_uniform(len(x), x, key).argsort(stable=True)[:components]]
    elif init in ("same", "variances"):
        means = whole.means.expand(components, -1)
    else:
        raise ValueError(f"init must be one of {', '.join(STARTS)}, got {init!r}")
    if init == "same" and components > 1:
        warnings.warn(
            "init 'same' gives all components the same mean and covariance: each stays responsible for the same share "
            "of every point, so EM can never separate them, and the mixture stays a single Gaussian; use 'variances', "
            "'data' or 'kmeans'",
            stacklevel=2,
        )
    factor = x.new_ones(components)
    if init == "variances":
        factor = torch.linspace(-0.5, 0.5, components, dtype=x.dtype, device=x.device).exp2()
    spread = [None if p is None else p * factor.view(-1, *[1] * (p.dim() - 1)) for p in whole[2:]]
    floor = min_variance**0.5
    scale = None if spread[0] is None else spread[0].clamp(min=floor)
    return Mixture(x.new_full((components,), 1 / components), means.clone(), scale, spread[1])


def kmeans(x: Tensor, components: int, key: NoiseKey) -> tuple[Tensor, Tensor]:
    """Means ``[K, D]`` and the nearest one of each point ``[N]``: seeds by k-means++, then a few steps of Lloyd's."""
    u = _uniform(components, x, key)
    means = x[_index(x.new_ones(len(x)), u[0])][None]
    distance = (x - means[0]).square().sum(1)
    for place in range(1, components):
        chosen = x[_index(distance, u[place])]
        means = torch.cat([means, chosen[None]])
        distance = torch.minimum(distance, (x - chosen).square().sum(1))
    for _ in range(_LLOYD_STEPS):
        nearest = _nearest(x, means)
        counts = torch.bincount(nearest, minlength=components)
        sums = torch.zeros_like(means).index_add(0, nearest, x)
        means = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None].to(x.dtype), means)
    return means, _nearest(x, means)


def _nearest(x: Tensor, means: Tensor) -> Tensor:
    """Index of the nearest mean."""
    middle = means.mean(0)  # of data far from 0 the expanded square would lose all digits
    x, means = x - middle, means - middle
    return (means.square().sum(1) / 2 - x @ means.mT).argmin(1)


def _index(weights: Tensor, u: Tensor) -> Tensor:
    """An index drawn in proportion to the weights, by a uniform number; any if all are 0."""
    share = weights.double().cumsum(0)
    return torch.searchsorted(share, u.double() * share[-1]).clamp(max=len(weights) - 1)


def _uniform(n: int, like: Tensor, key: NoiseKey) -> Tensor:
    return noise_like(like.new_empty(1, n), key, distribution="uniform")[0]
