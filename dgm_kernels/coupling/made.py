"""Inverts masked autoregressive networks: each hidden unit is computed once, when the features it reads are known."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core import ops
from .._core.backends import select
from .._core.checks import check_batch
from . import op, reference
from .checks import check_count, check_same, check_scale_map, check_spline_settings, values_known
from .reference import SCALE_MAPS, work_dtype
from .region import Region

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "tanh": torch.tanh, "elu": F.elu, "silu": F.silu}


def made_inverse(
    z: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    degrees: Sequence[Tensor],
    *,
    activation: str = "relu",
    transform: str = "affine",
    scale_map: str = "exp",
    bins: int | None = None,
    bound: float = 3.0,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """Inverts a masked autoregressive layer: the x with ``z = transform(x; MADE(x))``, feature after feature.

    MADE is ``weights[-1] a(... a(weights[0] x + biases[0]) ...) + biases[-1]`` with an activation a. A weight counts if
    the degree of its output is at least that of its input; in the last layer, whose outputs have the degrees of the
    features, if it is greater. Other weights are not read. One pass over the network in all, where inversion by D
    forward passes takes D of them. With gradients wanted, in float64 and on GPUs it is those D passes that run.

    Args:
        z: ``[batch, D]``.
        weights: ``[out, in]`` of each layer. The last one has 2 D rows, shifts then log-scales; with splines
            ``D (3 bins - 1)``, feature after feature, each with its widths, heights and derivatives.
        biases: ``[out]`` of each layer.
        degrees: int64, one tensor for the inputs of each layer: of the features, a permutation of 1 .. D (their
            order); of each hidden layer's units, any degrees from 0 to D.
        activation: ``"relu"``, ``"tanh"``, ``"elu"`` or ``"silu"``.
        transform: ``"affine"``, as :func:`dgm_kernels.affine_coupling`, or ``"spline"``, as
            :func:`dgm_kernels.rational_quadratic_spline` with linear tails.
        scale_map: of the affine transform.
        bins, bound, min_bin_width, min_bin_height, min_derivative: of the spline.

    Returns:
        x like ``z``, and logdet ``[batch]`` of the map from z to x, in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value; the message names it.

    Source: Germain et al., "MADE", 2015; Papamakarios et al., "Masked Autoregressive Flow", 2017.
    """
    check_batch("z", z)
    mins = (min_bin_width, min_bin_height, min_derivative)
    bins = _check_transform(transform, scale_map, bins, bound, mins)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
    weights, biases, degrees = list(weights), list(biases), list(degrees)
    _check_layers(z, weights, biases, degrees, 3 * bins - 1 if bins else 2)
    given = (z, *weights, *biases)
    grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    refusal = "gradients of made_inverse are those of the reference" if grad else None
    if bins > op.MAX_BINS:
        refusal = f"a spline of more than {op.MAX_BINS} bins"
    backend = select(z.device, given, refusal, natives=("cpp",))
    if backend == "reference":
        return _by_passes(z, weights, biases, degrees, activation, bins, scale_map, bound, mins)
    return ops.call(
        op.made_inverse[backend],
        False,
        z.contiguous(),
        [weight.contiguous() for weight in weights],
        [bias.contiguous() for bias in biases],
        [degree.contiguous() for degree in degrees],
        list(ACTIVATIONS).index(activation),
        bins,
        SCALE_MAPS.index(scale_map),
        float(bound),
        *map(float, mins),
    )


def _check_transform(
    transform: str, scale_map: str, bins: int | None, bound: float, mins: tuple[float, float, float]
) -> int:
    """The number of bins; 0 stands for the affine transform."""
    check_scale_map(scale_map)
    if transform == "affine":
        return 0
    if transform != "spline":
        raise ValueError(f"transform must be 'affine' or 'spline', got {transform!r}")
    bins = check_count("bins", bins, 2)
    check_spline_settings(bins, bound, mins)
    return bins


def _check_layers(
    z: Tensor, weights: list[Tensor], biases: list[Tensor], degrees: list[Tensor], parameters: int
) -> None:
    if z.dim() != 2:
        raise ValueError(f"z must have shape [batch, features], got {tuple(z.shape)}")
    if not weights:
        raise ValueError("weights must hold at least one layer")
    for name, values in (("biases", biases), ("degrees", degrees)):
        if len(values) != len(weights):
            raise ValueError(f"{name} must have one tensor for each of the {len(weights)} weights, got {len(values)}")
    for i, weight in enumerate(weights):
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            found = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
            raise TypeError(f"weights[{i}] must be a tensor of two dimensions, got {found}")
    features = z.shape[1]
    for i, (weight, bias, degree) in enumerate(zip(weights, biases, degrees, strict=True)):
        _check_degrees(f"degrees[{i}]", degree, z, features if i == 0 else weights[i - 1].shape[0])
        last = i + 1 == len(weights)
        rows = features * parameters if last else weight.shape[0]
        check_same(f"weights[{i}]", weight, (rows, degree.shape[0]), z, "this layer's outputs and inputs")
        check_same(f"biases[{i}]", bias, (rows,), z, "the rows of its weight")
    if values_known(degrees[0]) and degrees[0].sort().values.tolist() != list(range(1, features + 1)):
        raise ValueError(f"degrees[0] must be a permutation of 1 .. {features}")


def _check_degrees(name: str, degree: object, z: Tensor, size: int) -> None:
    if not isinstance(degree, Tensor) or degree.dtype != torch.int64:
        raise TypeError(f"{name} must be an int64 tensor, got {getattr(degree, 'dtype', type(degree).__name__)}")
    if tuple(degree.shape) != (size,):
        raise ValueError(f"{name} must have shape {(size,)}, got {tuple(degree.shape)}")
    if degree.device != z.device:
        raise ValueError(f"{name} must be on the device of z, {z.device}, got {degree.device}")
    if values_known(degree) and size and (int(degree.min()) < 0 or int(degree.max()) > z.shape[1]):
        raise ValueError(f"{name} must be in 0 .. {z.shape[1]}, got {int(degree.min())} to {int(degree.max())}")


def _by_passes(
    z: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    degrees: list[Tensor],
    activation: str,
    bins: int,
    scale_map: str,
    bound: float,
    mins: tuple[float, float, float],
) -> tuple[Tensor, Tensor]:
    """The reference: after the i-th pass the features of degree 1 .. i are right."""
    work = work_dtype(z, *weights, *biases)
    wide, features, order = z.to(work), z.shape[1], degrees[0].argsort()
    outputs = degrees[0].repeat_interleave(3 * bins - 1) if bins else degrees[0].repeat(2)
    masks = [after[:, None] >= before for before, after in itertools.pairwise(degrees)]
    masks.append(outputs[:, None] > degrees[-1])
    layers = [(w.to(work).where(m, 0.0), b.to(work)) for w, m, b in zip(weights, masks, biases, strict=True)]
    x, log_slopes = torch.zeros_like(wide), torch.zeros_like(wide)
    for step in range(1, features + 1):
        hidden = x
        for place, (weight, bias) in enumerate(layers):
            hidden = F.linear(hidden if place == 0 else ACTIVATIONS[activation](hidden), weight, bias)
        # Only the parameters of this feature are right by now; those of later ones may even be NaN.
        feature, now = order[step - 1 : step], degrees[0] == step
        grouped = (
            hidden.view(z.shape[0], features, 3 * bins - 1)
            if bins
            else hidden.view(z.shape[0], 2, features).transpose(1, 2)
        )
        parameters = grouped.index_select(1, feature)
        candidate, each = _inverse_transform(wide.index_select(1, feature), parameters, bins, scale_map, bound, mins)
        x, log_slopes = torch.where(now, candidate, x), torch.where(now, each[:, None], log_slopes)
    return x.to(z.dtype), log_slopes.sum(1)


def _inverse_transform(
    z: Tensor, parameters: Tensor, bins: int, scale_map: str, bound: float, mins: tuple[float, float, float]
) -> tuple[Tensor, Tensor]:
    """x and log dx/dz of one feature, ``[batch, 1]`` and ``[batch]``, from its parameters ``[batch, 1, number]``."""
    if not bins:
        shift, log_scale = parameters.unbind(-1)
        return reference.affine_coupling(z, shift, log_scale, Region(), scale_map, True, z.dtype)
    widths, heights, slopes = parameters.split([bins, bins, bins - 1], dim=-1)
    return reference.rational_quadratic_spline(z, widths, heights, slopes, bound, True, mins, True, z.dtype)
