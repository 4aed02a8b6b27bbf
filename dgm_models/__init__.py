"""Deep generative models behind one interface, built from the public functions of ``dgm_kernels``."""

from .model import DensityUnavailable, GenerativeModel
from .registry import create_model, from_pretrained, list_models, register_model

from . import autoregressive, ddpm, flows, latent, mixtures  # isort: skip  (registers the families)

__all__ = [
    "DensityUnavailable",
    "GenerativeModel",
    "autoregressive",
    "create_model",
    "ddpm",
    "flows",
    "from_pretrained",
    "latent",
    "list_models",
    "mixtures",
    "register_model",
]
