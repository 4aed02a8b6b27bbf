"""The masked_conv op in plain PyTorch: the specification, and what runs where no native backend does."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .taps import Kernel

MIN_LOG_SCALE = -7.0  # of a logistic


def masked_conv(x: Tensor, weight: Tensor, bias: Tensor | None, kernel: Kernel) -> Tensor:
    """conv2d with the weights that count; what the others hold is not read, NaN too."""
    if 0 in x.shape or 0 in weight.shape:  # PyTorch's convolution takes no empty ones
        nothing = x.flatten()[:0].sum() + weight.flatten()[:0].sum()
        y = nothing.expand(x.shape[0], weight.shape[0], *x.shape[2:])
        return y.clone() if bias is None else y + bias[:, None, None]
    live = weight.where(kernel.mask(weight.shape[0], weight.shape[1], weight.device), 0.0)
    (above, left), (step_y, step_x) = kernel.centre, kernel.dilation
    below, right = kernel.height - 1 - above, kernel.width - 1 - left
    if above == below and left == right:
        return F.conv2d(x, live, bias, padding=(above * step_y, left * step_x), dilation=kernel.dilation)
    padded = F.pad(x, (left * step_x, right * step_x, above * step_y, below * step_y))
    return F.conv2d(padded, live, bias, dilation=kernel.dilation)


def gated_activation(x: Tensor, condition: Tensor | None) -> Tensor:
    """tanh of the first half of the channels times the sigmoid of the second, of x + condition."""
    if condition is not None:
        x = x + condition.view(*condition.shape, *[1] * (x.dim() - condition.dim()))
    features, gate = x.chunk(2, dim=1)
    return torch.tanh(features) * torch.sigmoid(gate)


def split_mixture(parameters: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Logits ``[B, K, ...]``, means, log-scales and, of three channels, coefficients ``[B, channels, K, ...]``."""
    numbers = 3 if channels == 3 else 2
    mixtures = parameters.shape[1] // (1 + numbers * channels)
    logits, rest = parameters[:, :mixtures], parameters[:, mixtures:]
    grouped = rest.unflatten(1, (channels, numbers, mixtures))
    log_scales = grouped[:, :, 1].clamp(min=MIN_LOG_SCALE)
    return logits, grouped[:, :, 0], log_scales, torch.tanh(grouped[:, :, 2]) if channels == 3 else None


def conditional_means(x: Tensor, means: Tensor, coefficients: Tensor | None) -> Tensor:
    """Means of each channel given the channels before it; x ``[B, channels, ...]``."""
    if coefficients is None:
        return means
    red, green = x[:, 0:1], x[:, 1:2]  # [B, 1, ...], one for all mixtures
    return torch.stack(
        (
            means[:, 0],
            means[:, 1] + coefficients[:, 0] * red,
            means[:, 2] + coefficients[:, 1] * red + coefficients[:, 2] * green,
        ),
        dim=1,
    )


def discretized_logistic_mixture(x: Tensor, parameters: Tensor, levels: int) -> Tensor:
    """log sum_k pi_k prod_c [F((x_c - m + h) / s) - F((x_c - m - h) / s)], h half a level, F the logistic function.

    With a and b the two arguments, log(F(a) - F(b)) = log(1 - exp(b - a)) - softplus(-a) - softplus(b): exact however
    far x is from the mean, where the difference of the two would be 0. At the ends F(a) = 1 or F(b) = 0.
    """
    logits, means, log_scales, coefficients = split_mixture(parameters, x.shape[1])
    half = 1.0 / (levels - 1)
    centred = x[:, :, None] - conditional_means(x, means, coefficients)
    inverse = torch.exp(-log_scales)
    upper, lower = inverse * (centred + half), inverse * (centred - half)
    inside = torch.log(-torch.expm1(-2 * half * inverse)) - F.softplus(-upper) - F.softplus(lower)
    at_low, at_high = (x < -1 + half)[:, :, None], (x > 1 - half)[:, :, None]
    each = torch.where(at_low, -F.softplus(-upper), torch.where(at_high, -F.softplus(lower), inside))
    return torch.logsumexp(each.sum(1) + F.log_softmax(logits, dim=1), dim=1)


def categorical_log_prob(x: Tensor, logits: Tensor) -> Tensor:
    """log softmax(logits)[x] over dimension 1."""
    return F.log_softmax(logits, dim=1).gather(1, x[:, None]).squeeze(1)


def categorical_sample(logits: Tensor, uniform: Tensor) -> Tensor:
    """The level whose part of (0, 1] ``uniform`` falls into: how many sums of the first probabilities are below it."""
    weights = torch.exp(logits - logits.amax(1, keepdim=True))
    sums = weights.cumsum(1)
    return (sums[:, :-1] < uniform[:, None] * sums[:, -1:]).sum(1)


def discretized_logistic_mixture_sample(parameters: Tensor, uniform: Tensor, levels: int) -> Tensor:
    """The component by ``uniform[:, 0]``, then channel after channel from a logistic by ``uniform[:, 1:]``."""
    channels = uniform.shape[1] - 1
    logits, means, log_scales, coefficients = split_mixture(parameters, channels)
    component = categorical_sample(logits, uniform[:, 0])[:, None, None]
    chosen = [
        t.gather(2, component.expand(-1, t.shape[1], -1, *t.shape[3:])).squeeze(2)
        for t in (means, log_scales, *(() if coefficients is None else (coefficients,)))
    ]
    inside = uniform[:, 1:].clamp(1e-5, 1.0 - 1e-5)
    centred = torch.exp(chosen[1]) * (torch.log(inside) - torch.log1p(-inside))
    values: list[Tensor] = []
    for c in range(channels):
        mean = chosen[0][:, c]
        if coefficients is not None and c > 0:
            for earlier in range(c):  # coefficients: 0 of red in green; 1, 2 of red and green in blue
                mean = mean + chosen[2][:, c - 1 + earlier] * values[earlier]
        drawn = (mean + centred[:, c]).nan_to_num(nan=-1.0)  # what is not a number gives level 0
        level = torch.round(drawn.clamp(-1.0, 1.0).add(1.0) * (0.5 * (levels - 1)))
        values.append(level * (2.0 / (levels - 1)) - 1.0)
    levels_of = torch.stack(values, dim=1).add(1.0) * (0.5 * (levels - 1))
    return torch.round(levels_of).to(torch.int64)
