"""Fast, drop-in PyTorch ops for deep generative models."""

from . import nn
from ._core.backends import backends, use_backend
from .attention import KVCache, attention, attention_decode, masks, positions
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
from .masked_conv import (
    categorical_log_prob,
    categorical_sample,
    causal_conv1d,
    discretized_logistic_mixture,
    discretized_logistic_mixture_sample,
    gated_activation,
    horizontal_conv2d,
    masked_conv2d,
    masked_linear,
    vertical_conv2d,
)
from .masked_conv.generate import IncrementalSampler, incremental_sampler
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
    "IncrementalSampler",
    "KVCache",
    "NoiseKey",
    "SamplerTable",
    "Schedule",
    "TrainingTable",
    "actnorm",
    "add_noise",
    "additive_coupling",
    "affine_coupling",
    "attention",
    "attention_decode",
    "backends",
    "categorical_log_prob",
    "categorical_sample",
    "causal_conv1d",
    "denoising_loss",
    "discretized_logistic_mixture",
    "discretized_logistic_mixture_sample",
    "gated_activation",
    "horizontal_conv2d",
    "householder",
    "incremental_sampler",
    "invertible_conv1x1",
    "logistic_log_prob",
    "made_inverse",
    "masked_conv2d",
    "masked_linear",
    "masks",
    "nn",
    "noise_like",
    "permute_channels",
    "positions",
    "rational_quadratic_spline",
    "sample",
    "sampler_step",
    "standard_normal_log_prob",
    "tables",
    "triangular_linear",
    "use_backend",
    "vertical_conv2d",
]
