"""Fast, drop-in PyTorch ops for deep generative models."""

from . import nn
from ._core.backends import backends, use_backend
from .coupling import (
    actnorm,
    additive_coupling,
    affine_coupling,
    householder,
    invertible_conv1x1,
    logistic_log_prob,
    made_inverse,
    permute_channels,
    rational_quadratic_spline,
    standard_normal_log_prob,
    triangular_linear,
)
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
    "actnorm",
    "add_noise",
    "additive_coupling",
    "affine_coupling",
    "backends",
    "denoising_loss",
    "householder",
    "invertible_conv1x1",
    "logistic_log_prob",
    "made_inverse",
    "nn",
    "noise_like",
    "permute_channels",
    "rational_quadratic_spline",
    "sample",
    "sampler_step",
    "standard_normal_log_prob",
    "tables",
    "triangular_linear",
    "use_backend",
]
