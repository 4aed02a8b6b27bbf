"""Shapes, calls and eager yardsticks of the latent op that tests and bench share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dgm_kernels import (
    NoiseKey,
    gaussian_kl,
    gaussian_sample_kl,
    importance_log_weights,
    lognormal_sample_kl,
    noise_like,
    use_backend,
    vector_quantize,
)

# Ragged first: no multiple of a vector, a tile or a block; then many short samples, one in parts, none.
SHAPES = ((1, 1), (7,), (3, 59), (2, 3, 113), (5, 1023), (2, 2, 7, 9), (301, 2), (40, 64), (2, 1600), (0, 4), (3, 0))
TRIL_SHAPES = ((1, 1), (3, 59), (5, 16), (2, 113), (0, 4), (3, 0))
CODE_SHAPES = ((1, 1, 1), (3, 59, 5), (30, 8, 33), (61, 16, 100), (2, 113, 40))  # rows, features, codes
LATENT_SHAPE, SMALL_SHAPE = (4096, 256), (8, 8)
IMPORTANCE_SHAPE, IMPORTANCE_DRAWS = (256, 64), 50
CODE_SIZES = (65536, 64, 1024)

KEY = NoiseKey(5, first_sample=3, step=2, stream=1)
DRAWS = 3
FREE_BITS = 0.3
PRIOR = {"prior_mu": 0.5, "prior_log_var": -0.7}


@functools.cache
def _noise(shape: tuple[int, ...], key: NoiseKey) -> Tensor:
    with use_backend("reference"):
        return noise_like(torch.empty(shape), key)


def eps_of(x: Tensor, key: NoiseKey = KEY) -> Tensor:
    """The noise of the key in the shape and dtype of ``x``."""
    return _noise(tuple(x.shape), key).to(x)


def eps_of_draws(x: Tensor, draws: int, key: NoiseKey = KEY) -> Tensor:
    """That of ``draws`` steps."""
    return torch.stack([eps_of(x, key.at(key.step + j)) for j in range(draws)])


def flat(x: Tensor) -> Tensor:
    """``[batch, elements]``."""
    return x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)


def eager_sample(
    mu: Tensor,
    log_var: Tensor,
    eps: Tensor,
    log_normal: bool = False,
    prior_mu: float = 0.0,
    prior_log_var: float = 0.0,
    free_bits: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """A sample and its KL as a user writes them."""
    z = mu + torch.exp(0.5 * log_var) * eps
    return torch.exp(z) if log_normal else z, eager_kl(
        mu, log_var, torch.full_like(mu, prior_mu), torch.full_like(mu, prior_log_var), free_bits
    )


def eager_kl(mu: Tensor, log_var: Tensor, m: Tensor, b: Tensor, free_bits: float = 0.0) -> Tensor:
    """The KL of two diagonal Gaussians as a user writes it."""
    kl = 0.5 * (b - log_var + ((mu - m) ** 2 + log_var.exp()) / b.exp() - 1)
    return flat(kl.clamp(min=free_bits) if free_bits else kl).sum(1)


def eager_tril(mu: Tensor, scale_tril: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """Full covariance as a user writes it."""
    factor = scale_tril.tril()
    z = mu + (factor @ eps.unsqueeze(-1)).squeeze(-1)
    squares = factor.square().sum((1, 2)) + mu.square().sum(1)
    return z, 0.5 * (squares - mu.shape[1]) - factor.diagonal(dim1=1, dim2=2).log().sum(1)


def eager_importance(mu: Tensor, log_var: Tensor, eps: Tensor, log_normal: bool = False) -> tuple[Tensor, Tensor]:
    """Samples and log p(z) - log q(z) as a user writes them, with torch.distributions."""
    scale = torch.exp(0.5 * log_var)
    z = mu + scale * eps
    posterior = torch.distributions.Normal(mu, scale, validate_args=False)
    prior = torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu), validate_args=False)
    ratio = prior.log_prob(z) - posterior.log_prob(z)
    return torch.exp(z) if log_normal else z, ratio.flatten(2).sum(2) if mu.dim() > 1 else ratio


def eager_quantize(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Vector quantisation as a user writes it."""
    rows = x.reshape(-1, x.shape[-1])
    indices = torch.cdist(rows.detach(), codebook.detach()).argmin(1)
    chosen = codebook[indices].view(x.shape)
    quantized = x + (chosen - x).detach()
    losses = F.mse_loss(chosen, x.detach()), F.mse_loss(x, chosen.detach())
    return quantized, indices.view(x.shape[:-1]), torch.bincount(indices, minlength=len(codebook)), *losses


def make_pair(shape: Sequence[int], dtype: torch.dtype = torch.float32, grad: bool = False) -> list[Tensor]:
    """mu and log_var; some variances near 1, whose KL is a small difference."""
    mu, log_var = torch.randn(shape), torch.randn(shape) - 0.5
    log_var = torch.where(torch.rand(shape) < 0.2, 0.01 * log_var, log_var)
    return [t.to(dtype).requires_grad_(grad) for t in (mu, log_var)]


def make_four(shape: Sequence[int], dtype: torch.dtype = torch.float32, grad: bool = False) -> list[Tensor]:
    """Two pairs."""
    return [*make_pair(shape, dtype, grad), *make_pair(shape, dtype, grad)]


def make_tril(shape: Sequence[int], dtype: torch.dtype = torch.float32, grad: bool = False) -> list[Tensor]:
    """mu and L, with NaN above the diagonal."""
    batch, features = shape
    factor = (0.3 * torch.randn(batch, features, features)).to(dtype)
    factor.diagonal(dim1=1, dim2=2).copy_(torch.rand(batch, features) + 0.4)
    above = torch.ones(features, features, dtype=torch.bool).triu(1)
    factor = factor.masked_fill(above, float("nan"))
    return [torch.randn(batch, features).to(dtype).requires_grad_(grad), factor.requires_grad_(grad)]


def make_codes(sizes: Sequence[int], dtype: torch.dtype = torch.float32, grad: bool = False) -> list[Tensor]:
    """Rows and a codebook, both far from 0."""
    rows, features, codes = sizes
    x, codebook = torch.randn(rows, features) + 4, torch.randn(codes, features) + 4
    return [t.to(dtype).requires_grad_(grad) for t in (x, codebook)]


@dataclasses.dataclass(frozen=True)
class LatentCase:
    """One way to call the op: ``call`` on operands, ``eager`` its yardstick, ``make`` random operands of a shape."""

    name: str
    call: Callable[..., Any]
    eager: Callable[..., Any]
    make: Callable[..., list[Tensor]] = make_pair
    shapes: tuple[tuple[int, ...], ...] = SHAPES
    small: tuple[int, ...] = (2, 3, 5)
    sizes: tuple[tuple[int, ...], ...] = ((3, 4, 6), (5, 4, 10))  # for compiled code

    def __str__(self) -> str:
        return self.name


def _sample_case(name: str, function: Callable[..., Any], log_normal: bool = False, **options: Any) -> LatentCase:
    return LatentCase(
        name,
        lambda mu, log_var: function(mu, log_var, KEY, **options),
        lambda mu, log_var: eager_sample(mu, log_var, eps_of(mu), log_normal, **options),
    )


def _importance_case(name: str, log_normal: bool) -> LatentCase:
    return LatentCase(
        name,
        lambda mu, log_var: importance_log_weights(mu, log_var, KEY, samples=DRAWS, log_normal=log_normal),
        lambda mu, log_var: eager_importance(mu, log_var, eps_of_draws(mu, DRAWS), log_normal),
    )


SAMPLE_CASES = (
    _sample_case("gaussian", gaussian_sample_kl),
    _sample_case("gaussian free bits", gaussian_sample_kl, free_bits=FREE_BITS),
    _sample_case("lognormal", lognormal_sample_kl, True),
    _sample_case("lognormal prior free bits", lognormal_sample_kl, True, **PRIOR, free_bits=FREE_BITS),
)
KL_CASES = (
    LatentCase("kl", gaussian_kl, lambda m, v: eager_kl(m, v, torch.zeros_like(m), torch.zeros_like(m))),
    LatentCase(
        "kl of two free bits",
        functools.partial(gaussian_kl, free_bits=FREE_BITS),
        functools.partial(eager_kl, free_bits=FREE_BITS),
        make_four,
    ),
)
IMPORTANCE_CASES = (_importance_case("importance", False), _importance_case("importance lognormal", True))
TRIL_CASE = LatentCase(
    "full covariance",
    lambda mu, factor: gaussian_sample_kl(mu, noise=KEY, scale_tril=factor),
    lambda mu, factor: eager_tril(mu, factor, eps_of(mu)),
    make_tril,
    TRIL_SHAPES,
    (3, 5),
    ((3, 4), (5, 7)),
)
CODE_CASE = LatentCase(
    "vector_quantize",
    lambda x, codebook: tuple(vector_quantize(x, codebook)),
    eager_quantize,
    make_codes,
    CODE_SHAPES,
    (6, 5, 7),
    ((3, 4, 6), (5, 7, 9)),
)
CASES = (*SAMPLE_CASES, *KL_CASES, *IMPORTANCE_CASES, TRIL_CASE, CODE_CASE)
