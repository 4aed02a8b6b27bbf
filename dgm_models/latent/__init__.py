"""Latent-variable models: encoder, decoder, a bound of the likelihood. Importing this registers the families."""

from .base import LatentVariable, Posterior
from .estimators import pathwise, score_function
from .iwae import IWAE
from .lognormal_vae import LogNormalVAE
from .observation import Observation
from .vae import VAE

__all__ = ["IWAE", "VAE", "LatentVariable", "LogNormalVAE", "Observation", "Posterior", "pathwise", "score_function"]
