"""Invertible layers with parameters, on ``[batch, D]``: ``forward(x)`` is (z, logdet), ``inverse(z)`` (x, logdet)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import dgm_kernels
from dgm_kernels.coupling import SCALE_MAPS
from dgm_kernels.nn import Coupling

from .conditioners import MADE, MLP

# Of the raw derivatives of a spline: 1 at every knot, so that a new layer is near the identity.
_UNIT_DERIVATIVE = math.log(math.expm1(1 - 1e-3))


class Affine(nn.Module):
    """A learnt scale and shift of every feature; starts as the identity."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(features))
        self.log_scale = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z and logdet."""
        return dgm_kernels.actnorm(x, self.shift, self.log_scale)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x and logdet."""
        return dgm_kernels.actnorm(z, self.shift, self.log_scale, inverse=True)


class Standardization(Affine):
    """:class:`Affine` that :meth:`fit` sets to give every feature mean 0 and variance 1."""

    fitted: Tensor

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.register_buffer("fitted", torch.tensor(False))

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Sets scale and shift unless they were fitted or trained before; a constant feature is only shifted."""
        if self.fitted or self.shift.any() or self.log_scale.any():
            return
        deviation = x.std(0, correction=0)
        deviation = torch.where(deviation > 1e-6, deviation, 1.0)
        self.log_scale.copy_(-deviation.log())
        self.shift.copy_(-x.mean(0) / deviation)
        self.fitted.fill_(True)


class Permutation(nn.Module):
    """A random order of the features, drawn once."""

    permutation: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("permutation", torch.randperm(features))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z and logdet."""
        return dgm_kernels.permute_channels(x, self.permutation)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x and logdet."""
        return dgm_kernels.permute_channels(z, self.permutation, inverse=True)


class AffineCoupling(Coupling):
    """Scales and shifts one half of the features by functions of the other half.

    Args:
        features: D, even.
        flipped: whether it is the first half that is transformed.
        scale_map: of ``dgm_kernels.affine_coupling``; None only shifts, which preserves volume.
        network: the further arguments of :class:`.MLP`.
    """

    def __init__(self, features: int, flipped: bool, scale_map: str | None, **network: Any) -> None:
        super().__init__()
        half = _half(features)
        if scale_map is not None:
            check_scale_map(scale_map)
        self.mask = "channels_flipped" if flipped else "channels"
        self.read = slice(half, None) if flipped else slice(0, half)
        self.scale_map = scale_map
        self.net = MLP(half, outputs=half if scale_map is None else 2 * half, **network)

    def condition(self, x: Tensor, *context: Any) -> tuple[Tensor, ...]:
        """The shift, and the logarithm of the scale if there is one."""
        output = self.net(x[:, self.read])
        return (output,) if self.scale_map is None else tuple(output.chunk(2, dim=1))

    def transform(self, x: Tensor, *parameters: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """The layer, or its inverse, with these parameters."""
        if self.scale_map is None:
            return dgm_kernels.additive_coupling(x, *parameters, mask=self.mask, inverse=inverse)
        shift, log_scale = parameters
        return dgm_kernels.affine_coupling(
            x, shift, log_scale, mask=self.mask, scale_map=self.scale_map, inverse=inverse
        )


class SplineCoupling(Coupling):
    """Maps one half of the features by monotone splines whose knots are functions of the other half.

    Args:
        features: D, even.
        flipped: whether it is the first half that is transformed.
        bins: of each spline.
        bound: outside ``[-bound, bound]`` it is the identity.
        network: the further arguments of :class:`.MLP`.
    """

    def __init__(self, features: int, flipped: bool, bins: int, bound: float, **network: Any) -> None:
        super().__init__()
        self.middle, self.flipped, self.bins, self.bound = _half(features), flipped, bins, bound
        self.net = MLP(self.middle, outputs=self.middle * (3 * bins - 1), **network)
        _start_near_identity(self.net.layers[-1], bins)

    def condition(self, x: Tensor, *context: Any) -> tuple[Tensor, ...]:
        """Raw widths, heights and derivatives."""
        output = self.net(x[:, self.middle :] if self.flipped else x[:, : self.middle])
        return _spline_parameters(output, self.middle, self.bins)

    def transform(self, x: Tensor, *parameters: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """The layer, or its inverse, with these parameters."""
        first, second = x[:, : self.middle], x[:, self.middle :]
        y, logdet = dgm_kernels.rational_quadratic_spline(
            first if self.flipped else second, *parameters, bound=self.bound, inverse=inverse
        )
        return torch.cat([y, second] if self.flipped else [first, y], dim=1), logdet


class AffineAutoregressive(nn.Module):
    """Scales and shifts every feature by functions of the features before it; the inverse goes feature by feature.

    Args:
        features: D.
        backwards: whether the order is from the last feature to the first.
        scale_map: of ``dgm_kernels.affine_coupling``.
        network: the further arguments of :class:`.MADE`.
    """

    def __init__(self, features: int, backwards: bool, scale_map: str, **network: Any) -> None:
        super().__init__()
        self.scale_map = check_scale_map(scale_map)
        self.net = MADE(_order(features, backwards), parameters=2, feature_major=False, **network)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z and logdet."""
        shift, log_scale = self.net(x).chunk(2, dim=1)
        return dgm_kernels.affine_coupling(x, shift, log_scale, scale_map=self.scale_map)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x and logdet."""
        return _made_inverse(z, self.net, transform="affine", scale_map=self.scale_map)


class SplineAutoregressive(nn.Module):
    """Maps every feature by a spline whose knots are functions of the features before it.

    Args:
        features: D.
        backwards: whether the order is from the last feature to the first.
        bins: of each spline.
        bound: outside ``[-bound, bound]`` it is the identity.
        network: the further arguments of :class:`.MADE`.
    """

    def __init__(self, features: int, backwards: bool, bins: int, bound: float, **network: Any) -> None:
        super().__init__()
        self.features, self.bins, self.bound = features, bins, bound
        self.net = MADE(_order(features, backwards), parameters=3 * bins - 1, feature_major=True, **network)
        _start_near_identity(self.net.layers[-1], bins)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z and logdet."""
        parameters = _spline_parameters(self.net(x), self.features, self.bins)
        return dgm_kernels.rational_quadratic_spline(x, *parameters, bound=self.bound)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x and logdet."""
        return _made_inverse(z, self.net, transform="spline", bins=self.bins, bound=self.bound)


class TriangularLinear(nn.Module):
    """``leaky_relu(W x + bias)`` with W triangular; the diagonal is an exponential, so that W has an inverse.

    Args:
        features: D.
        lower: which triangle of W holds the weights.
        negative_slope: of the leaky ReLU, positive; 1 is no activation.
    """

    def __init__(self, features: int, lower: bool, negative_slope: float) -> None:
        super().__init__()
        self.lower, self.negative_slope = lower, negative_slope
        self.off_diagonal = nn.Parameter(torch.randn(features, features) * 0.1 / math.sqrt(features))
        self.log_diagonal = nn.Parameter(torch.zeros(features))
        self.bias = nn.Parameter(torch.zeros(features))

    @property
    def weight(self) -> Tensor:
        """W."""
        strict = self.off_diagonal.tril(-1) if self.lower else self.off_diagonal.triu(1)
        return strict + torch.diag(self.log_diagonal.exp())

    def forward(self, x: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """z and logdet."""
        return dgm_kernels.triangular_linear(
            x, self.weight, self.bias, lower=self.lower, negative_slope=self.negative_slope, inverse=inverse
        )

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x and logdet."""
        return self(z, inverse=True)


class Inverse(nn.Module):
    """A layer the other way round."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z and logdet."""
        return self.layer.inverse(x)  # type: ignore[operator]

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x and logdet."""
        return self.layer(z)


def check_scale_map(name: str) -> str:
    """``name`` if it is one of ``dgm_kernels.affine_coupling``, else an error."""
    if name not in SCALE_MAPS:
        raise ValueError(f"scale_map must be one of {', '.join(SCALE_MAPS)}, got {name!r}")
    return name


def _half(features: int) -> int:
    if features % 2:
        raise ValueError(f"image_shape must have an even number of elements to be halved, got {features}")
    return features // 2


def _order(features: int, backwards: bool) -> Tensor:
    order = torch.arange(1, features + 1)
    return order.flip(0) if backwards else order


def _spline_parameters(output: Tensor, features: int, bins: int) -> tuple[Tensor, ...]:
    return output.view(-1, features, 3 * bins - 1).split([bins, bins, bins - 1], dim=-1)


def _start_near_identity(layer: nn.Module, bins: int) -> None:
    """Sets the biases of the raw derivatives."""
    with torch.no_grad():
        layer.bias.view(-1, 3 * bins - 1)[:, 2 * bins :] = _UNIT_DERIVATIVE  # type: ignore[operator]


def _made_inverse(z: Tensor, net: MADE, **transform: Any) -> tuple[Tensor, Tensor]:
    weights: Sequence[Tensor] = [layer.weight for layer in net.layers]  # type: ignore[misc]
    biases: Sequence[Tensor] = [layer.bias for layer in net.layers]  # type: ignore[misc]
    return dgm_kernels.made_inverse(z, weights, biases, net.degrees, activation=net.activation_name, **transform)
