"""Layers and networks of flows as a user writes them: the baselines of the coupling op's cases."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_kernels.nn import Coupling
from tests.coupling_cases import SCALE_MAPS

Transformation = Callable[..., tuple[Tensor, Tensor]]


def plain_affine(
    x: Tensor, shift: Tensor, log_scale: Tensor, *, scale_map: str, mask: Tensor | None = None, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """An affine layer; with a mask, 1 where x passes unchanged, as the paper on RealNVP has it."""
    s = SCALE_MAPS[scale_map](log_scale)
    y = (x - shift) * torch.exp(-s) if inverse else x * torch.exp(s) + shift
    s = -s if inverse else s
    if mask is not None:
        b = mask.to(x.dtype)
        y, s = b * x + (1 - b) * y, (1 - b) * s
    return y, s.sum(tuple(range(1, x.dim())))


def spelled_out_sums(x: Tensor) -> Tensor:
    """`x.cumsum(-1)` as single additions, which torch.compile turns into code that is as fast.

    Its code for the gradient of `cumsum` is wrong in a spline: torch 2.13 on a CPU, when it vectorises.
    """
    return torch.stack(list(itertools.accumulate(x.unbind(-1))), dim=-1)


def plain_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    *,
    bound: float,
    inverse: bool = False,
    least: float = 1e-3,
    sums: Callable[[Tensor], Tensor] = lambda x: x.cumsum(-1),
) -> tuple[Tensor, Tensor]:
    """A rational-quadratic spline with linear tails, as the paper on neural spline flows has it."""

    def edges(raw: Tensor) -> Tensor:
        bins = least + (1 - raw.shape[-1] * least) * raw.softmax(-1)
        inner = bound * (2 * sums(bins)[..., :-1] - 1)
        return F.pad(F.pad(inner, (1, 0), value=-bound), (0, 1), value=bound)

    grid, values, slopes = edges(widths), edges(heights), F.pad(least + F.softplus(derivatives), (1, 1), value=1.0)
    inside, at = (x >= -bound) & (x <= bound), x.clamp(-bound, bound)
    known = (values if inverse else grid)[..., 1:-1].detach().contiguous()
    k = torch.searchsorted(known, at.detach()[..., None].contiguous(), right=True)
    (x0, x1), (y0, y1), (d0, d1) = (
        (ends.gather(-1, k).squeeze(-1), ends.gather(-1, k + 1).squeeze(-1)) for ends in (grid, values, slopes)
    )
    w, h = x1 - x0, y1 - y0
    s = h / w
    bend = d0 + d1 - 2 * s
    if inverse:
        a, b, c = h * (s - d0) + (at - y0) * bend, h * d0 - (at - y0) * bend, -s * (at - y0)
        xi = 2 * c / (-b - (b.square() - 4 * a * c).clamp(min=0).sqrt())
        y = x0 + xi * w
    else:
        xi = (at - x0) / w
        y = y0 + h * (s * xi.square() + d0 * xi * (1 - xi)) / (s + bend * xi * (1 - xi))
    slope = s.square() * (d1 * xi.square() + 2 * s * xi * (1 - xi) + d0 * (1 - xi).square())
    log_slope = slope.log() - 2 * (s + bend * xi * (1 - xi)).log()
    logdet = torch.where(inside, -log_slope if inverse else log_slope, 0.0).sum(1)
    return torch.where(inside, y, x), logdet


def plain_normal(z: Tensor, logdet: Tensor) -> Tensor:
    """Log-density under a standard normal base, in as few passes over z as eager PyTorch allows."""
    return logdet - 0.5 * (z.square().sum(1) + z.shape[1] * math.log(2 * math.pi))


def plain_logistic(z: Tensor, logdet: Tensor) -> Tensor:
    """Log-density under a standard logistic base, likewise."""
    return logdet - z.sum(1) - 2 * F.softplus(-z).sum(1)


class Made(NamedTuple):
    """Weights, biases and degrees of a masked autoregressive network, as `made_inverse` takes them."""

    weights: list[Tensor]
    biases: list[Tensor]
    degrees: list[Tensor]

    def double(self) -> "Made":
        return Made([w.double() for w in self.weights], [b.double() for b in self.biases], self.degrees)

    def masked(self) -> "Made":
        """With 0 in place of the weights that do not count."""
        weights = [weight * mask for weight, mask in zip(self.weights, self.masks(), strict=True)]
        return Made(weights, self.biases, self.degrees)

    def masks(self) -> list[Tensor]:
        """Which weights count: those to a unit of at least the same degree, in the last layer of a greater one."""
        inner = [after[:, None] >= before for before, after in itertools.pairwise(self.degrees)]
        return [*inner, self.degrees[0].repeat(2)[:, None] > self.degrees[-1]]


def made(features: int, hidden: Sequence[int], reverse: bool, device: torch.device) -> Made:
    """A network with random weights; the degrees of hidden units go through 1 .. features - 1 again and again."""
    order = torch.arange(1, features + 1)
    degrees = [order.flip(0) if reverse else order, *(1 + torch.arange(units) % (features - 1) for units in hidden)]
    sizes = [*map(len, degrees), 2 * features]
    weights = [torch.randn(after, before) / before**0.5 for before, after in itertools.pairwise(sizes)]
    biases = [0.1 * torch.randn(after) for after in sizes[1:]]
    return Made(*([tensor.to(device) for tensor in tensors] for tensors in (weights, biases, degrees)))


def made_pass(x: Tensor, z: Tensor, weights: list[Tensor], biases: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Inverts every feature with the parameters that x gives; right for those whose predecessors in x are right."""
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        x = F.relu(F.linear(x, weight, bias))
    shift, log_scale = F.linear(x, weights[-1], biases[-1]).chunk(2, dim=1)
    log_scale = SCALE_MAPS["softclip"](log_scale)
    return (z - shift) * torch.exp(-log_scale), log_scale


def inverse_by_passes(step: Callable[..., Any], z: Tensor, networks: Sequence[Made]) -> tuple[Tensor, Tensor]:
    """As many passes through each network as there are features; `step` is `made_pass`, compiled or not.

    The networks are `masked`, once for all calls.
    """
    total = torch.zeros_like(z[:, 0])
    for network in networks:
        x = torch.zeros_like(z)
        for _ in range(z.shape[1]):
            x, log_scale = step(x, z, network.weights, network.biases)
        z, total = x, total - log_scale.sum(1)
    return z, total


class RealNvpLayer(Coupling):
    """Half of the features passes unchanged and sets shift and log-scale of the other half through an MLP.

    `transformation` is the affine map, such as `plain_affine`.
    """

    mask: Tensor

    def __init__(self, transformation: Transformation, features: int, hidden: int, odd: bool) -> None:
        super().__init__()
        self.transformation = transformation
        self.register_buffer("mask", torch.arange(features) % 2 == int(odd))
        self.net = nn.Sequential(
            *(nn.Linear(features, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()),
            nn.Linear(hidden, 2 * features),
        )

    def condition(self, x: Tensor, *context: Any) -> tuple[Tensor, ...]:
        return self.net(x * self.mask).chunk(2, dim=1)

    def transform(self, x: Tensor, *parameters: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        return self.transformation(x, *parameters, mask=self.mask, scale_map="tanh", inverse=inverse)


def real_nvp(transformation: Transformation, layers: int, features: int, hidden: int) -> nn.ModuleList:
    """Layers that take turns in which half they pass on."""
    return nn.ModuleList(RealNvpLayer(transformation, features, hidden, bool(i % 2)) for i in range(layers))


def chained(layers: nn.ModuleList, x: Tensor) -> tuple[Tensor, Tensor]:
    """One layer after the other, all of whose activations autograd keeps."""
    total = torch.zeros_like(x[:, 0])
    for layer in layers:
        x, logdet = layer(x)
        total = total + logdet
    return x, total


@torch.enable_grad()
def training_step(flow: Transformation, layers: nn.ModuleList, x: Tensor) -> tuple[Tensor, ...]:
    """The negative log-likelihood of every sample, and the gradients of all parameters for its mean per dimension."""
    z, logdet = flow(x)
    losses = 0.5 * z.square().sum(1) - logdet
    (losses.mean() / z.shape[1]).backward()
    gradients = [parameter.grad for parameter in layers.parameters()]
    layers.zero_grad()
    return losses.detach(), *gradients


def checked_step(flow: Transformation, layers: nn.ModuleList, x: Tensor) -> tuple[Tensor, Tensor]:
    """The same with the gradients as one vector: rounding leaves a mark on some of the hundreds, wherever it falls."""
    losses, *gradients = training_step(flow, layers, x)
    return losses, torch.cat([gradient.flatten() for gradient in gradients])
