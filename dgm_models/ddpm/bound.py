"""The variational lower bound of a diffusion model's log-probability, in nats.

The model is ancestral sampling with the posterior's variance:
``p(x_T) = N(0, I)``; ``p(x_s | x_t) = q(x_s | x_t, x0(x_t))`` with the prediction ``x0(x_t)`` in place of x_0; and
``p(x_0 | x_1) = N(x0(x_1), beta_1 I)``, which for grey levels stands for its mass in the cell around the level (the
cells at the ends reach to infinity). Then (Ho et al., 2020, equation 5)

    log p(x_0) >= E[log p(x_0 | x_1)] - KL(q(x_T | x_0) || p(x_T)) - sum_t E[KL(q(x_s | x_t, x_0) || p(x_s | x_t))]

and each divergence of the sum is ``(snr_s - snr_t) / 2 |x_0 - x0(x_t)|^2`` (Kingma et al., "Variational diffusion
models", 2021), so the bound is the same function of x0 for every parametrisation.

Only the network works in the dtype of the weights; all else is float32, or float64 for such data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dgm_kernels import NoiseKey, SamplerTable, add_noise, noise_like, sampler_step, tables

from ..model import Stream, check_positive

if TYPE_CHECKING:
    from . import DDPM


class Terms(NamedTuple):
    """The terms of the bound in nats, ``[batch]`` each: a log-likelihood and two divergences."""

    reconstruction: Tensor
    prior_kl: Tensor
    transitions_kl: Tensor

    @property
    def elbo(self) -> Tensor:
        """The bound."""
        return self.reconstruction - self.prior_kl - self.transitions_kl


def variational(model: DDPM, x: Tensor, cond: Tensor | None, times: int | None, seed: int, first_sample: int) -> Terms:
    """The bound with every divergence in closed form, given one draw of each x_t."""
    x = _wide(x)
    key = NoiseKey(seed, first_sample, stream=Stream.BOUND)
    gain, table = _snr_steps(model, x), model.sampler_table("ddim")
    total = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
    visits = 0
    for step, t in enumerate(_times(model, x, times, seed, first_sample), start=1):
        noisy = add_noise(x, model.training_table, t, key.at(step))
        error = x - _predict_clean(model, table, noisy, t, cond)
        total += 0.5 * gain[t - 1] * _sum(error.square())
        visits = step
    transitions = total * (len(gain) / max(visits, 1))
    first = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    noisy = add_noise(x, model.training_table, first, key.at(0))
    reconstruction = _reconstruction(model, table, x, noisy, cond)
    return Terms(reconstruction, _prior_kl(model, x), transitions.to(x.dtype))


def importance_weighted(model: DDPM, x: Tensor, k: int, cond: Tensor | None, seed: int, first_sample: int) -> Tensor:
    """``log mean_k p(x_0:T) / q(x_1:T | x_0)`` over k paths drawn from q (Burda et al., IWAE, 2016), ``[batch]``."""
    x, batch = _wide(x), x.shape[0]
    index = first_sample + torch.arange(batch, device=x.device)
    samples = (index[:, None] * k + torch.arange(k, device=x.device)).flatten()
    paths = x.repeat_interleave(k, 0)
    cond = None if cond is None else cond.repeat_interleave(k, 0)
    weights = _path_log_weights(model, paths, cond, NoiseKey(seed, samples=samples, stream=Stream.BOUND_PATHS))
    return weights.reshape(batch, k).logsumexp(1) - math.log(k)


def _path_log_weights(model: DDPM, x: Tensor, cond: Tensor | None, key: NoiseKey) -> Tensor:
    """``log p(x_0:T) - log q(x_1:T | x_0)`` along a path drawn from q.

    A step of q is a step of the sampler that knows x_0. With ``x_s = mean_q + d n`` and ``e = x_0 - x0(x_t)``, the mean
    of p is ``mean_q - a e`` with ``(a / d)^2 = snr_s - snr_t =: g``, so ``log p/q = -g/2 |e|^2 - sqrt(g) n e``.
    """
    count = len(model.schedule)
    gain, table = _snr_steps(model, x), model.sampler_table("ddim")
    posterior = tables.ddpm(model.schedule, prediction="x0")
    last = torch.full((x.shape[0],), count - 1, device=x.device)
    noise = noise_like(x, key.at(count))
    state = add_noise(x, model.training_table, last, noise)
    weights = _sum(noise.square() - state.square()) / 2 + math.prod(x.shape[1:]) * model.schedule.sigma_t[-1].log()
    for t in range(count - 1, 0, -1):
        error = x - _predict_clean(model, table, state, torch.full_like(last, t), cond)
        row = count - 1 - t
        noise = noise_like(x, key.at(row))
        weights -= gain[t - 1] / 2 * _sum(error.square()) + gain[t - 1].sqrt() * _sum(noise * error)
        state, _ = sampler_step(state, x, posterior, row, noise=noise, return_x0=True)
    return (weights + _reconstruction(model, table, x, state, cond)).to(x.dtype)


def _snr_steps(model: DDPM, x: Tensor) -> Tensor:
    """``snr_s - snr_t`` of the transitions from t = s + 1 to s, ``[T - 1]`` float64."""
    return -model.schedule.log_snr.exp().diff().to(x.device)


def _times(model: DDPM, x: Tensor, times: int | None, seed: int, first_sample: int) -> Iterator[Tensor]:
    """The indices t that transitions start from, ``[batch]`` at a time: all, or one from each of ``times`` strata."""
    count = len(model.schedule) - 1
    if times is None:
        for t in range(1, count + 1):
            yield torch.full((x.shape[0],), t, device=x.device)
        return
    check_positive("times", times)
    key = NoiseKey(seed, first_sample, stream=Stream.BOUND_TIMES)
    uniform = noise_like(x.new_empty(x.shape[0], times, dtype=torch.float32), key, distribution="uniform")
    for stratum in range(times if count else 0):
        place = (stratum + uniform[:, stratum]) / times
        yield (place * count).ceil().long().clamp(1, count)


def _predict_clean(model: DDPM, table: SamplerTable, noisy: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
    """The x0 that the sampler uses at index t, clipped as it clips it; ``table`` has a row for every time."""
    output = model.denoise(noisy.to(model.dtype), t, cond)
    return sampler_step(noisy, output, table, len(table) - 1 - t, return_x0=True)[1]


def _prior_kl(model: DDPM, x: Tensor) -> Tensor:
    """``KL(N(alpha x, sigma^2) || N(0, 1))`` at the last time, summed over elements."""
    alpha, sigma = float(model.schedule.alpha_t[-1]), float(model.schedule.sigma_t[-1])
    return _sum((alpha * x).square() + (sigma**2 - 1 - 2 * math.log(sigma))).to(x.dtype) / 2


def _reconstruction(model: DDPM, table: SamplerTable, x: Tensor, noisy: Tensor, cond: Tensor | None) -> Tensor:
    """``log p(x_0 | x_1)``, ``[batch]``."""
    first = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    mean = _predict_clean(model, table, noisy, first, cond)
    scale = float(model.schedule.sigma_t[0])
    if model.levels is None:
        log_prob = -((x - mean) / scale).square() / 2 - math.log(scale * math.sqrt(2 * math.pi))
    else:
        log_prob = discretized_normal_log_prob(x, mean, scale, model.levels)
    return _sum(log_prob).to(x.dtype)


def discretized_normal_log_prob(x: Tensor, mean: Tensor, scale: float, levels: int) -> Tensor:
    """Log of the mass that ``N(mean, scale^2)`` gives to the cell around each level, elementwise.

    The levels lie equally spaced in [-1, 1]; the cells of -1 and 1 reach to infinity.
    """
    half = 1.0 / (levels - 1)
    upper = ((x + half - mean) / scale).masked_fill(x > 1 - half, math.inf)
    lower = ((x - half - mean) / scale).masked_fill(x < -1 + half, -math.inf)
    # Phi(upper) - Phi(lower) = Phi(-lower) - Phi(-upper): the tail where both are small keeps its digits.
    flip = lower > 0
    upper, lower = upper.where(~flip, -lower), lower.where(~flip, -upper)
    top, bottom = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    return top + torch.log1p(-torch.exp(bottom - top))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _sum(values: Tensor) -> Tensor:
    """Sum over the elements of a sample, in float64."""
    return values.flatten(1).sum(1, dtype=torch.float64)
