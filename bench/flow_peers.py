"""The coupling op's maps in nflows and zuko, with parameters converted so that they compute the same function.

Each builder imports its library, so that it raises ImportError where that is not installed, and returns a function of
x and the converted parameters.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.flow_baselines import Made

Function = Callable[..., tuple[Tensor, ...]]
Operands = dict[str, tuple[Tensor, ...]]
NFLOWS_SCALE_FLOOR = 1e-3  # what its coupling layer adds to the sigmoid
ZUKO_RANGE = math.log(1000)  # its log-scales and log-derivatives stay within this


def undo_softclip(value: Tensor, limit: float) -> Tensor:
    """The a with a / (1 + |a| / limit) = value."""
    return value / (1 - value.abs() / limit)


def affine_parameters(shift: Tensor, log_scale: Tensor) -> Operands:
    """What nflows and zuko take for y = x exp(log_scale) + shift, both converted in float64.

    nflows' scale is sigmoid(u + 2) + 0.001, so that log_scale may not be above 0.
    """
    wide = log_scale.double()
    raw = torch.logit(wide.exp() - NFLOWS_SCALE_FLOOR) - 2
    return {
        "nflows": (torch.cat([shift, raw.to(shift)], dim=1),),
        "zuko": (shift, undo_softclip(wide, ZUKO_RANGE).to(shift)),
    }


def nflows_affine(features: int) -> Function:
    """The part of an affine coupling layer that transforms, without the network and the gathering of the halves."""
    from nflows.transforms.coupling import AffineCouplingTransform

    layer = AffineCouplingTransform(torch.ones(features), lambda *_: None)
    return layer._coupling_transform_forward


def zuko_affine() -> Function:
    """As a layer of zuko's flows applies it."""
    from zuko.transforms import DependentTransform, MonotonicAffineTransform

    return lambda x, *raw: DependentTransform(MonotonicAffineTransform(*raw), 1).call_and_ladj(x)


def spline_parameters(widths: Tensor, heights: Tensor, derivatives: Tensor, least: float = 1e-3) -> Operands:
    """zuko's raw parameters for the same knots and derivatives, converted in float64; nflows takes ours.

    zuko limits its logits to +-3.45. They count up to a constant, chosen here so that the range is centred.
    """

    def logits(raw: Tensor) -> Tensor:
        log_bins = (least + (1 - raw.shape[-1] * least) * raw.double().softmax(-1)).log()
        centre = (log_bins.amax(-1, keepdim=True) + log_bins.amin(-1, keepdim=True)) / 2
        return undo_softclip(log_bins - centre, ZUKO_RANGE / 2).to(raw)

    log_slopes = (least + F.softplus(derivatives.double())).log()
    return {"zuko": (logits(widths), logits(heights), undo_softclip(log_slopes, ZUKO_RANGE).to(derivatives))}


def nflows_spline(bound: float, inverse: bool) -> Function:
    """The function that its neural spline flows call, with the sum over the sample that they take."""
    from nflows.transforms.splines.rational_quadratic import unconstrained_rational_quadratic_spline

    def run(x: Tensor, *raw: Tensor) -> tuple[Tensor, ...]:
        y, each = unconstrained_rational_quadratic_spline(x, *raw, inverse=inverse, tail_bound=bound)
        return y, each.sum(1)

    return run


def zuko_spline(bound: float, inverse: bool) -> Function:
    """As a layer of zuko's spline flows applies it."""
    from zuko.transforms import DependentTransform, MonotonicRQSTransform

    def run(x: Tensor, *raw: Tensor) -> tuple[Tensor, ...]:
        transform = DependentTransform(MonotonicRQSTransform(*raw, bound=bound), 1)
        return (transform.inv if inverse else transform).call_and_ladj(x)

    return run


def zuko_maf(networks: Sequence[Made]) -> Function:
    """Inverse of a masked autoregressive flow of zuko with the weights of `networks`."""
    from zuko.flows.autoregressive import MaskedAutoregressiveTransform

    layers = []
    for made in networks:
        features, hidden = len(made.degrees[0]), [len(degrees) for degrees in made.degrees[1:]]
        layer = MaskedAutoregressiveTransform(features, order=made.degrees[0] - 1, hidden_features=hidden)
        linears = [module for module in layer.hyper if hasattr(module, "mask")]
        weights, biases = list(made.weights), list(made.biases)
        for values in (weights, biases):  # zuko's outputs are shift and log-scale of one feature after the other
            values[-1] = torch.stack(values[-1].tensor_split(2), dim=1).flatten(0, 1)
        for linear, weight, bias in zip(linears, weights, biases, strict=True):
            linear.weight.data, linear.bias.data = weight, bias
        layers.append(layer.to(made.weights[0].device))

    def run(z: Tensor) -> tuple[Tensor, ...]:
        total = torch.zeros_like(z[:, 0])
        for layer in layers:
            z, logdet = layer().inv.call_and_ladj(z)
            total = total + logdet
        return z, total

    return run
