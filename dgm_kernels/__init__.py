"""Fast, drop-in PyTorch ops for deep generative models."""

from ._core.backends import backends, use_backend
from .sampler import (
    NoiseKey,
    SamplerTable,
    Schedule,
    TrainingTable,
    add_noise,
    denoising_loss,
    noise_like,
    sample,
    sampler_step,
    tables,
)

__version__ = "0.1.0"

__all__ = [
    "NoiseKey",
    "SamplerTable",
    "Schedule",
    "TrainingTable",
    "add_noise",
    "backends",
    "denoising_loss",
    "noise_like",
    "sample",
    "sampler_step",
    "tables",
    "use_backend",
]
