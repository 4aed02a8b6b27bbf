"""The sampler op in plain PyTorch: the specification, the oracle of the tests, and the fallback on every device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._core import noise as _noise
from .._core.noise import OpArgs

_KINDS = ("normal", "uniform", "bits")


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """``[batch]`` or a scalar, shaped to multiply ``like``."""
    return values if values.dim() == 0 else values.reshape(-1, *[1] * (like.dim() - 1))


def per_row(x: Tensor) -> Tensor:
    """``[batch, elements]``."""
    return x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)


def _compute(x: Tensor) -> Tensor:
    """16-bit numbers are worked on in float32."""
    return x.to(torch.float32) if x.dtype in (torch.bfloat16, torch.float16) else x


def predict(
    x: Tensor, model_output: Tensor, row: tuple[Tensor, ...], unconditional: Tensor | None, guidance_scale: float
) -> tuple[Tensor, Tensor]:
    """The guided model output and the unbounded x0 = px x + pm m."""
    m = _compute(model_output)
    if unconditional is not None:
        mu = _compute(unconditional)
        m = mu + guidance_scale * (m - mu)
    return m, row[0] * _compute(x) + row[1] * m


def _scaled(coefficient: Tensor, operand: Tensor) -> Tensor:
    """A coefficient of 0 means that the operand is not read: it may hold anything, NaN too."""
    return torch.where(coefficient != 0, coefficient * operand, 0.0)


def row_of(rows: Tensor, step: int | Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """The coefficients of a step, shaped to multiply ``like``."""
    on_device = isinstance(step, Tensor) and step.dim() == 0  # rows[step] would wait for the device
    row = rows.index_select(0, step.reshape(1))[0] if on_device else rows[step]  # type: ignore[union-attr]
    return tuple(per_sample(c, like) for c in row.unbind(-1))


def _given_or_drawn(x: Tensor, args: OpArgs, step: int | Tensor = 0) -> Tensor:
    drawn = args[0] if args[0] is not None else _noise.normal_noise(x.shape, x.device, args, step)
    return drawn.to(_compute(x).dtype)


def noise_like(like: Tensor, args: OpArgs, kind: int) -> Tensor:
    """Normal (0) or uniform (1) noise in the dtype of ``like``, or the Philox words as int32 (2)."""
    words = _noise.words(like.shape, like.device, args)
    if _KINDS[kind] == "bits":
        return _noise.interleave(words, like.shape).to(torch.int32)
    values = _noise.normals(words) if _KINDS[kind] == "normal" else _noise.uniforms(words)
    return _noise.interleave(values, like.shape).to(like.dtype)


def sampler_step(
    x: Tensor,
    model_output: Tensor,
    rows: Tensor,
    step: int | Tensor,
    args: OpArgs = _noise.NO_NOISE,
    history: Tensor | None = None,
    unconditional: Tensor | None = None,
    guidance_scale: float = 1.0,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    threshold: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``x0 = clip(px x + pm m, lo, hi)``, ``x' = ax x + a0 x0 + am m + ah history + an noise``; returns (x', x0)."""
    row = row_of(rows, step, x)
    _, _, lo, hi, ax, a0, am, ah, an, ak, sk, _ = row
    m, x0 = predict(x, model_output, row, unconditional, guidance_scale)
    if threshold is None:
        x0 = torch.clamp(x0, lo, hi)
    else:
        s = per_sample(threshold, x)
        x0 = torch.clamp(x0, -s, s) / s
    new = ax * _compute(x) + a0 * x0 + am * m
    if history is not None:
        new = new + _scaled(ah, _compute(history))
    noise = _given_or_drawn(x, args, step) if args[0] is not None or args[-1] >= 0 else None
    if noise is not None:
        new = new + _scaled(an, noise)
    if known is not None and mask is not None:
        goal = ak * _compute(known) + (0.0 if noise is None else _scaled(sk, noise))
        share = mask.to(new.dtype)
        new = share * goal + (1 - share) * new
    return new.to(x.dtype), x0.to(x.dtype)


def dynamic_threshold(
    x: Tensor,
    model_output: Tensor,
    rows: Tensor,
    step: int | Tensor,
    unconditional: Tensor | None,
    guidance_scale: float,
    quantile: float,
    largest: float,
) -> Tensor:
    """``clamp(quantile of |x0| within a sample, 1, largest)``, ``[batch]``; the quantile interpolates linearly."""
    _, x0 = predict(x, model_output, row_of(rows, step, x), unconditional, guidance_scale)
    size = per_row(x0).abs()
    if size.shape[1] == 0:
        return size.new_ones(size.shape[0])
    last = size.shape[1] - 1
    below = math.floor(quantile * last)  # rank of the number under the quantile
    top = size.topk(last + 1 - below, dim=1).values  # the numbers from that rank up, largest first
    low = top[:, -1]
    high = low if quantile == 1 or last == 0 else top[:, -2]
    # As tensors: torch.compile would compile anew for every value of a Python float.
    share = quantile * low.new_full((), last, dtype=torch.float64) - low.new_full((), below, dtype=torch.float64)
    return torch.lerp(low, high, share.to(low.dtype)).clamp(1.0, largest)


def add_noise(x0: Tensor, rows: Tensor, t: Tensor, args: OpArgs) -> Tensor:
    """``alpha[t] x0 + sigma[t] noise``."""
    alpha, sigma = (per_sample(rows[t, i], x0) for i in (0, 1))
    return (alpha * _compute(x0) + sigma * _given_or_drawn(x0, args)).to(x0.dtype)


def denoising_loss(model_output: Tensor, x0: Tensor, rows: Tensor, t: Tensor, args: OpArgs) -> tuple[Tensor, Tensor]:
    """``weight[t] mean((m - target)^2)`` of every sample, ``[batch]``, and the residual ``m - target``."""
    cx, cn = (per_sample(rows[t, i], x0) for i in (2, 3))
    residual = _compute(model_output) - (cx * _compute(x0) + cn * _given_or_drawn(x0, args))
    mean = per_row(residual).square().mean(1)
    return rows[t, 4] * mean, residual.to(model_output.dtype)
