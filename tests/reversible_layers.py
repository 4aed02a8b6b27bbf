"""Invertible layers, and what the tests of chains compare: outputs and gradients of two ways to run one chain."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from dgm_kernels import affine_coupling, invertible_conv1x1, permute_channels, triangular_linear
from dgm_kernels.nn import ActNorm, Coupling, Reversible
from tests.contract import max_error

FEATURES, CONTEXT = 6, 3


def mlp(inputs: int, outputs: int, *between: nn.Module, hidden: int = 16) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), *between, nn.Linear(hidden, outputs))


class Affine(Coupling):
    """A RealNVP layer whose network also reads the context."""

    def __init__(self, flipped: bool = False, *between: nn.Module, features: int = FEATURES, context: int = 0) -> None:
        super().__init__()
        self.flipped = flipped
        self.network = mlp(features // 2 + context, features, *between)

    def condition(self, x: Tensor, *context: Tensor | None) -> tuple[Tensor, ...]:
        given = [t for t in context if t is not None]
        return self.network(torch.cat([x.chunk(2, 1)[self.flipped], *given], 1)).chunk(2, 1)

    def transform(self, x: Tensor, *parameters: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        mask = "channels_flipped" if self.flipped else "channels"
        return affine_coupling(x, *parameters, mask=mask, scale_map="tanh", inverse=inverse)


class Opaque(nn.Module):
    """A layer of which the container only sees forward and inverse."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.layer(x, *context)

    def inverse(self, y: Tensor, *context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.layer.inverse(y, *context)


class Mixing(nn.Module):
    """A triangular layer, an LU layer and a permutation, with a parameter that the other direction does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.triangle = nn.Parameter(torch.randn(FEATURES, FEATURES) * 0.2 + 1.5 * torch.eye(FEATURES))
        self.bias = nn.Parameter(torch.randn(FEATURES))
        self.lu = nn.Parameter(torch.randn(FEATURES, FEATURES) * 0.3)
        self.unused = nn.Parameter(torch.randn(2))
        self.register_buffer("order", torch.randperm(FEATURES))

    def mix(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        steps = [
            lambda x: triangular_linear(x, self.triangle, self.bias, negative_slope=0.5, inverse=inverse),
            lambda x: invertible_conv1x1(
                x, self.lu, self.lu, self.lu.diagonal(), torch.ones_like(self.bias), self.order, inverse=inverse
            ),
            lambda x: permute_channels(x, self.order, inverse=inverse),
        ]
        total = x.new_zeros(x.shape[0])
        for step in reversed(steps) if inverse else steps:
            x, logdet = step(x)
            total = total + logdet
        return x, total

    def forward(self, x: Tensor, *context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.mix(x, inverse=False)

    def inverse(self, y: Tensor, *context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.mix(y, inverse=True)


class Identity(nn.Module):
    """Returns its very argument, and a logdet without a gradient."""

    def forward(self, x: Tensor, *context: Tensor | None) -> tuple[Tensor, Tensor]:
        return x, x.new_zeros(x.shape[0])

    inverse = forward


def flow_of(*between: nn.Module, opaque: bool = False, context: int = 0, dtype: torch.dtype = torch.float64, **options):
    """Two coupling layers, an ActNorm, a Mixing and two coupling layers more."""
    wrap = Opaque if opaque else lambda layer: layer

    def layer(flipped: bool) -> nn.Module:
        return wrap(Affine(flipped, *copy.deepcopy(between), context=context))

    norm = ActNorm(FEATURES)
    norm.initialized.fill_(True)
    nn.init.normal_(norm.shift)
    nn.init.normal_(norm.log_scale, std=0.3)
    layers = [Identity(), layer(False), layer(True), norm, Mixing(), layer(False), Identity(), layer(True)]
    return Reversible(layers, **options).to(dtype)


def plain(flow: Reversible, x: Tensor, *context: Tensor | None, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """The layers one after the other, which PyTorch differentiates."""
    total: Any = 0.0
    for layer in reversed(flow.layers) if inverse else flow.layers:
        x, logdet = layer.inverse(x, *context) if inverse else layer(x, *context)
        total = total + logdet
    return x, total


def loss_of(outputs: tuple[Tensor, Tensor], which: str = "both") -> Tensor:
    y, logdet = outputs
    terms = {"y": y.sin().sum(), "logdet": logdet.cos().sum()}
    return sum(terms.values()) if which == "both" else terms[which]


def results(run: Any, flow: Reversible, *inputs: Tensor, which: str = "both") -> list[Tensor | None]:
    """Both outputs, and the gradients of the inputs and the parameters."""
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
    outputs = run(*leaves)
    wanted = [t for t in (*leaves, *flow.parameters()) if t.requires_grad]
    return [*outputs, *torch.autograd.grad(loss_of(outputs, which), wanted, allow_unused=True)]


def assert_same(actual: list[Tensor | None], expected: list[Tensor | None], tolerance: float = 1e-10) -> None:
    assert [t is None for t in actual] == [t is None for t in expected]
    for a, e in zip(actual, expected, strict=True):
        if a is not None and e is not None:
            assert a.dtype == e.dtype
            size = float(e.detach().abs().max()) if e.numel() else 0.0
            assert max_error(a, e) <= tolerance * max(1.0, size)


def batch(dtype: torch.dtype = torch.float64, size: int = 5, grad: bool = True) -> Tensor:
    return torch.randn(size, FEATURES, dtype=dtype, requires_grad=grad)
