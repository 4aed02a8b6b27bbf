"""The coupling op in plain PyTorch: the specification, and what runs where no native backend does."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .region import Region

SCALE_MAPS = ("exp", "tanh", "sigmoid", "softclip")
SOFTCLIP = math.log(1000.0)  # bound of the log-scale


def work_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of arithmetic and log-determinants: float64 if one of the tensors is, else float32."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def sum_per_sample(x: Tensor) -> Tensor:
    """``[batch, ...] -> [batch]``."""
    return x.sum(tuple(range(1, x.dim()))) if x.dim() > 1 else x


def log_of_scale(log_scale: Tensor, scale_map: str) -> Tensor:
    """s = scale_map(log_scale), the logarithm of the scale."""
    if scale_map == "tanh":
        return torch.tanh(log_scale)
    if scale_map == "sigmoid":
        return F.logsigmoid(log_scale + 2)
    if scale_map == "softclip":
        return log_scale / (1 + (log_scale / SOFTCLIP).abs())
    return log_scale


def affine_coupling(
    x: Tensor,
    shift: Tensor,
    log_scale: Tensor | None,
    region: Region,
    scale_map: str,
    inverse: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """y = x exp(s) + shift where x is transformed; without log_scale s = 0. ``dtype`` is that of y."""
    if region.start is not None and region.stop is not None:
        return _split(x, shift, log_scale, region, scale_map, inverse, dtype)
    work = work_dtype(x, shift, log_scale)
    wide, shift = x.to(work), shift.to(work)
    fixed = region.fixed_mask(x)
    raw = torch.zeros_like(shift) if log_scale is None else log_scale.to(work)
    if fixed is not None:  # before the map too: the gradient of what does not count is 0, not 0 * NaN
        shift, raw = shift.masked_fill(fixed, 0.0), raw.masked_fill(fixed, 0.0)
    s = raw if log_scale is None else log_of_scale(raw, scale_map)
    if fixed is not None:
        s = s.masked_fill(fixed, 0.0)
    y = (wide - shift) * torch.exp(-s) if inverse else wide * torch.exp(s) + shift
    if fixed is not None:
        y = torch.where(fixed, wide, y)
    logdet = sum_per_sample(s)
    return y.to(dtype), -logdet if inverse else logdet


def _split(
    x: Tensor,
    shift: Tensor,
    log_scale: Tensor | None,
    region: Region,
    scale_map: str,
    inverse: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    before, changed, after = x[:, : region.start], x[:, region.start : region.stop], x[:, region.stop :]
    y, logdet = affine_coupling(changed, shift, log_scale, Region(), scale_map, inverse, dtype)
    return torch.cat([before.to(dtype), y, after.to(dtype)], dim=1), logdet


# ---- Rational-quadratic spline (Durkan et al., "Neural Spline Flows", 2019)


def spline_knots(raw: Tensor, bound: float, min_bin: float) -> tuple[Tensor, Tensor]:
    """Knots ``[..., K + 1]`` from -bound to bound and bin sizes ``[..., K]``."""
    bins = raw.shape[-1]
    sizes = 2 * bound * (min_bin + (1 - bins * min_bin) * torch.softmax(raw, dim=-1))
    inner = torch.cumsum(sizes[..., :-1], dim=-1) - bound
    edge = torch.full_like(sizes[..., :1], bound)
    return torch.cat([-edge, inner, edge], dim=-1), sizes


def spline_slopes(raw: Tensor, tails: bool, min_derivative: float) -> Tensor:
    """Derivatives at the knots ``[..., K + 1]``; with linear tails those at the ends are 1."""
    slopes = min_derivative + F.softplus(raw)
    return F.pad(slopes, (1, 1), value=1.0) if tails else slopes


def rational_quadratic_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    bound: float,
    tails: bool,
    mins: tuple[float, float, float],
    inverse: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The spline or its inverse; arguments as in the public function. ``dtype`` is that of y."""
    work = work_dtype(x, widths, heights, derivatives)
    wide = x.to(work)
    inside = (wide >= -bound) & (wide <= bound)
    u = torch.where(inside, wide, torch.zeros_like(wide))
    x_knots, x_sizes = spline_knots(widths.to(work), bound, mins[0])
    y_knots, y_sizes = spline_knots(heights.to(work), bound, mins[1])
    slopes = spline_slopes(derivatives.to(work), tails, mins[2])
    searched = y_knots if inverse else x_knots
    k = (u.unsqueeze(-1) >= searched[..., 1:-1]).sum(-1, keepdim=True)

    def at(values: Tensor) -> Tensor:
        return values.gather(-1, k).squeeze(-1)

    w, h, x_k, y_k = at(x_sizes), at(y_sizes), at(x_knots), at(y_knots)
    d0, d1 = at(slopes[..., :-1]), at(slopes[..., 1:])
    y, log_slope = _inverse_bin(u, w, h, x_k, y_k, d0, d1) if inverse else _forward_bin(u, w, h, x_k, y_k, d0, d1)
    outside = wide if tails else torch.full_like(wide, math.nan)
    log_slope = torch.where(inside, log_slope, torch.zeros_like(wide) if tails else outside)
    # A NaN is nowhere: it is not "outside", where a spline with tails would have slope 1.
    log_slope = torch.where(wide.isnan(), wide, log_slope)
    y = _clamped(y, -bound, bound)  # rounding must not carry a value out of the domain
    return torch.where(inside, y, outside).to(dtype), sum_per_sample(log_slope)


def _clamped(x: Tensor, low: float, high: float) -> Tensor:
    """``x`` moved into the interval, with the gradient of ``x``: what is outside is there by rounding alone."""
    return x + (x.clamp(low, high) - x).detach()


def _forward_bin(
    x: Tensor, w: Tensor, h: Tensor, x_k: Tensor, y_k: Tensor, d0: Tensor, d1: Tensor
) -> tuple[Tensor, Tensor]:
    """Equation 4: y and log dy/dx from the bin's width, height, lower left corner and derivatives at its ends."""
    xi = _clamped((x - x_k) / w, 0.0, 1.0)  # rounding of the knots could leave the bin
    s, rest = h / w, 1 - xi
    y = y_k + h * xi * (s * xi + d0 * rest) / _denominator(s, d0, d1, xi * rest)
    return y, _log_slope(xi, rest, s, d0, d1)


def _inverse_bin(
    y: Tensor, w: Tensor, h: Tensor, x_k: Tensor, y_k: Tensor, d0: Tensor, d1: Tensor
) -> tuple[Tensor, Tensor]:
    """x and log dx/dy. The quadratic's discriminant is written as a sum of squares: it cannot become negative."""
    theta = _clamped((y - y_k) / h, 0.0, 1.0)
    s, up = h / w, 1 - theta
    r = d0 * up - d1 * theta
    root = torch.sqrt((r * r + 4 * s * s * theta * up).clamp(min=torch.finfo(y.dtype).tiny))
    # xi = 2 s theta / (2 s theta + root + r), 1 - xi = 2 s (1 - theta) / (2 s (1 - theta) + root - r): that of the two
    # is taken in which the root and r have one sign, so that nothing cancels.
    rising, large = r >= 0, root + r.abs()
    part = 2 * s * torch.where(rising, theta, up)
    share, other = part / (part + large), large / (part + large)
    xi, rest = torch.where(rising, share, other), torch.where(rising, other, share)
    return x_k + w * xi, -_log_slope(xi, rest, s, d0, d1)


def _denominator(s: Tensor, d0: Tensor, d1: Tensor, mixed: Tensor) -> Tensor:
    """s + (d1 + d0 - 2 s) xi (1 - xi), as a sum of positive terms."""
    return s * (1 - 2 * mixed) + (d0 + d1) * mixed


def _log_slope(xi: Tensor, rest: Tensor, s: Tensor, d0: Tensor, d1: Tensor) -> Tensor:
    """Equation 5: log dy/dx."""
    mixed = xi * rest
    numerator = d1 * xi * xi + 2 * s * mixed + d0 * rest * rest
    return torch.log(numerator) + 2 * (torch.log(s) - torch.log(_denominator(s, d0, d1, mixed)))


# ---- Base densities


def log_prob(z: Tensor, logdet: Tensor | None, logistic: bool) -> Tensor:
    """Sum over the sample of log N(z; 0, 1), or of the standard logistic log-density, plus logdet."""
    wide = z.to(work_dtype(z, logdet))
    if logistic:
        each = -wide.abs() - 2 * torch.log1p(torch.exp(-wide.abs()))
    else:
        each = -0.5 * (wide * wide) - 0.5 * math.log(2 * math.pi)
    total = sum_per_sample(each)
    return total if logdet is None else total + logdet
