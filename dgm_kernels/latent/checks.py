"""Checks of the arguments of the latent op."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from .._core.checks import as_int, check_batch, check_device, check_float, check_like, values_known


def check_number(name: str, value: object) -> float:
    """``value`` is a finite number."""
    if not isinstance(value, (Real, torch.SymFloat)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    number = float(value)
    if not -math.inf < number < math.inf:  # math.isfinite is not for torch.compile's symbols
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def check_prior_log_var(value: object) -> float:
    """A number whose exponential, the prior's variance or precision, float32 holds."""
    number = check_number("prior_log_var", value)
    if not -80 <= number <= 80:
        raise ValueError(f"prior_log_var must be in [-80, 80], got {number}")
    return number


def check_free_bits(value: object) -> float:
    """Nats that an element counts for at least."""
    number = check_number("free_bits", value)
    if number < 0:
        raise ValueError(f"free_bits must be at least 0 nats an element, got {number}")
    return number


def check_gaussian(mu: object, log_var: object) -> None:
    """``mu`` is a batch and ``log_var`` like it."""
    check_batch("mu", mu)
    assert isinstance(mu, Tensor)
    check_like("log_var", log_var, mu, "mu")


def check_scale_tril(scale_tril: object, mu: Tensor) -> None:
    """``[batch, D, D]`` for a mu of ``[batch, D]``, with a positive diagonal where that can be looked at."""
    if not isinstance(scale_tril, Tensor):
        raise TypeError(f"scale_tril must be a tensor, got {type(scale_tril).__name__}")
    if mu.dim() != 2:
        raise ValueError(f"mu must have shape [batch, D] beside scale_tril, got {tuple(mu.shape)}")
    expected = (*mu.shape, mu.shape[1])
    if tuple(scale_tril.shape) != expected:
        raise ValueError(f"scale_tril must have shape [batch, D, D], {expected}, got {tuple(scale_tril.shape)}")
    check_device("scale_tril", scale_tril, mu, "mu")
    check_float("scale_tril", scale_tril)
    if values_known(scale_tril) and scale_tril.numel():
        least = float(scale_tril.detach().diagonal(dim1=-2, dim2=-1).min())
        if not least > 0:
            raise ValueError(f"scale_tril must have a positive diagonal, got {least:g} on it")


def check_prior(name: str, value: object, mu: Tensor) -> Tensor | None:
    """None, or a floating-point tensor that broadcasts to the shape of ``mu``; returned in that shape."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {type(value).__name__}")
    check_device(name, value, mu, "mu")
    check_float(name, value)
    if value.shape == mu.shape:
        return value
    try:
        return value.expand(mu.shape)
    except RuntimeError:
        expected, got = tuple(mu.shape), tuple(value.shape)
        raise ValueError(f"{name} must broadcast to the shape of mu, {expected}, got {got}") from None


def check_draws(value: object) -> int:
    """A positive number of samples."""
    number = as_int(value)
    if number is None:
        raise TypeError(f"samples must be an int, got {type(value).__name__}")
    if number < 1:
        raise ValueError(f"samples must be at least 1, got {number}")
    return number


def check_codes(x: object, codebook: object) -> None:
    """``x`` is ``[..., D]`` and ``codebook`` ``[K, D]`` with K and D at least 1."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    check_float("x", x)
    if x.dim() == 0:
        raise ValueError("x must have a dimension of features, got a tensor without dimensions")
    if not isinstance(codebook, Tensor):
        raise TypeError(f"codebook must be a tensor, got {type(codebook).__name__}")
    check_float("codebook", codebook)
    if codebook.dim() != 2 or codebook.shape[1] != x.shape[-1]:
        expected = f"[codes, {x.shape[-1]}], the features of x"
        raise ValueError(f"codebook must have shape {expected}, got {tuple(codebook.shape)}")
    if codebook.shape[0] == 0 or codebook.shape[1] == 0:
        raise ValueError(f"codebook must hold at least one code of one feature, got shape {tuple(codebook.shape)}")
    check_device("codebook", codebook, x, "x")
