"""Mixtures of Gaussians and kernel density estimates: exact densities of vectors."""

from .em import Mixture, anneal, em_step, lower_bound, m_step
from .gaussian_mixture import GaussianMixture
from .kde import KernelDensityEstimate
from .starts import kmeans, start

__all__ = [
    "GaussianMixture",
    "KernelDensityEstimate",
    "Mixture",
    "anneal",
    "em_step",
    "kmeans",
    "lower_bound",
    "m_step",
    "start",
]
