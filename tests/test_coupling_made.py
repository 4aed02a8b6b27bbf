"""Inversion of masked autoregressive layers: it undoes them, whatever their order, network and transform; and peers."""

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dgm_kernels import affine_coupling, made_inverse, rational_quadratic_spline, use_backend
from tests.cases import BACKENDS, DTYPES, NATIVE
from tests.contract import (
    assert_bitwise_repeatable,
    assert_compiles,
    assert_inputs_unchanged,
    assert_parity,
    assert_vmap,
    strided_variants,
)
from tests.coupling_cases import SCALE_MAPS

ACTIVATIONS = {"relu": F.relu, "tanh": torch.tanh, "elu": F.elu, "silu": F.silu}
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
on_native = pytest.mark.parametrize("backend", NATIVE)


@dataclasses.dataclass
class Made:
    """A masked autoregressive layer as a user writes it."""

    weights: list[Tensor]
    biases: list[Tensor]
    degrees: list[Tensor]
    activation: str = "relu"
    bins: int = 0  # 0: affine
    scale_map: str = "exp"
    bound: float = 3.0

    @classmethod
    def random(cls, features: int, hidden: tuple[int, ...] = (23, 17), **options: Any) -> "Made":
        """In a random order, with hidden degrees of every value."""
        rows = features * (3 * options["bins"] - 1 if options.get("bins") else 2)
        sizes = (features, *hidden, rows)
        weights = [torch.randn(o, i) / max(1, i) ** 0.5 for i, o in itertools.pairwise(sizes)]
        biases = [0.3 * torch.randn(o) for o in sizes[1:]]
        degrees = [1 + torch.randperm(features), *(torch.randint(0, features + 1, (h,)) for h in hidden)]
        return cls(weights, biases, degrees, **options)

    def masks(self) -> list[Tensor]:
        features = self.degrees[0]
        outputs = features.repeat_interleave(3 * self.bins - 1) if self.bins else features.repeat(2)
        masks = [after[:, None] >= before for before, after in itertools.pairwise(self.degrees)]
        return [*masks, outputs[:, None] > self.degrees[-1]]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z and logdet of the map from x to z, in the dtype of x."""
        h = x
        for layer, (weight, bias, mask) in enumerate(zip(self.weights, self.biases, self.masks(), strict=True)):
            h = h if layer == 0 else ACTIVATIONS[self.activation](h)
            h = F.linear(h, weight.to(x).masked_fill(~mask, 0.0), bias.to(x))
        if not self.bins:
            return affine_coupling(x, *h.chunk(2, 1), scale_map=self.scale_map)
        raw = h.unflatten(1, (x.shape[1], -1)).split((self.bins, self.bins, self.bins - 1), -1)
        return rational_quadratic_spline(x, *raw, bound=self.bound)

    def invert(self, z: Tensor, dtype: torch.dtype | None = None, **more: Any) -> tuple[Tensor, Tensor]:
        """``made_inverse`` with the network in ``dtype``, that of z by default."""
        dtype = dtype or z.dtype
        weights, biases = ([t.to(dtype) for t in tensors] for tensors in (self.weights, self.biases))
        return made_inverse(z, weights, biases, self.degrees, **self.options(), **more)

    def options(self) -> dict[str, Any]:
        kind = {"transform": "spline", "bins": self.bins} if self.bins else {"transform": "affine"}
        return {**kind, "activation": self.activation, "scale_map": self.scale_map, "bound": self.bound}


NETWORKS = [(5, (16,)), (12, (23, 17)), (1, (4,)), (2, ()), (33, (65, 40, 9))]
TRANSFORMS = [{"scale_map": "tanh"}, {"bins": 6}]


@on_every_backend
@pytest.mark.parametrize("options", TRANSFORMS, ids=str)
@pytest.mark.parametrize(("features", "hidden"), NETWORKS, ids=str)
def test_it_undoes_the_layer(features, hidden, options, backend):
    made = Made.random(features, hidden, **options)
    exact = backend == "reference"
    for batch in (0, 1, 3, 37):
        x = torch.randn(batch, features, dtype=torch.float64)
        z, logdet = made.forward(x)
        with use_backend(backend):
            back, logdet_back = made.invert(z if exact else z.float())
        tolerance = 1e-8 if exact else 2e-3
        torch.testing.assert_close(back.double(), x, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(logdet_back.double(), -logdet, rtol=tolerance, atol=tolerance)
        assert logdet_back.dtype == (torch.float64 if exact else torch.float32)


@on_every_backend
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("scale_map", SCALE_MAPS)
def test_every_activation_and_scale_map(activation, scale_map, backend):
    made = Made.random(7, activation=activation, scale_map=scale_map)
    made.weights[-1] *= 0.5
    x = torch.randn(4, 7, dtype=torch.float64)
    z, logdet = made.forward(x)
    exact = backend == "reference"
    tolerance = 1e-9 if exact else 1e-3
    with use_backend(backend):
        back, logdet_back = made.invert(z if exact else z.float())
    torch.testing.assert_close(back.double(), x, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(logdet_back.double(), -logdet, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", TRANSFORMS, ids=str)
def test_logdet_is_that_of_the_jacobian(options):
    made = Made.random(5, **options)
    z = torch.randn(3, 5, dtype=torch.float64)
    _, logdet = made.invert(z)
    for i in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda one: made.invert(one[None])[0][0], z[i])
        torch.testing.assert_close(logdet[i], torch.linalg.slogdet(jacobian)[1], rtol=1e-9, atol=1e-9)


@on_native
@pytest.mark.parametrize("options", TRANSFORMS, ids=str)
@pytest.mark.parametrize(("features", "hidden"), NETWORKS, ids=str)
def test_parity(features, hidden, options, backend):
    made = Made.random(features, hidden, **options)
    for batch, dtype in itertools.product((0, 1, 3, 37), DTYPES):
        z = torch.randn(batch, features).to(dtype)
        network = [[t.to(dtype) for t in tensors] for tensors in (made.weights, made.biases)]
        given = dataclasses.replace(made, weights=network[0], biases=network[1])  # the rounded network, in any dtype
        with use_backend("reference"):
            eager, exact = given.invert(z), given.invert(z.double())
        with use_backend(backend):
            actual = given.invert(z)
        size = max((float(e.abs().max()) for e in exact if e.numel()), default=1.0)
        assert_parity(actual, eager, exact, tiny=1e-5 * max(1.0, size))


@on_every_backend
@pytest.mark.parametrize("options", TRANSFORMS, ids=str)
def test_weights_that_do_not_count_may_hold_anything(options, backend):
    made = Made.random(6, **options)
    z = torch.randn(5, 6)
    with use_backend(backend):
        expected = made.invert(z)
        for junk in (math.nan, math.inf):
            masks = zip(made.weights, made.masks(), strict=True)
            spoiled = dataclasses.replace(made, weights=[w.masked_fill(~m, junk) for w, m in masks])
            torch.testing.assert_close(spoiled.invert(z), expected, rtol=0, atol=0)


@on_every_backend
@pytest.mark.parametrize("options", TRANSFORMS, ids=str)
@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_orders_and_extreme_degrees(order, options, backend):
    """Units that no feature reads, units that read all, layers that cut the features off from the outputs."""
    made = Made.random(6, (8, 8), **options)
    made.degrees[0] = torch.arange(1, 7) if order == "ascending" else torch.arange(6, 0, -1)
    x = torch.randn(3, 6, dtype=torch.float64)
    for first, second in itertools.product((0, 1, 5, 6), repeat=2):
        made.degrees[1], made.degrees[2] = torch.full((8,), first), torch.full((8,), second)
        z, logdet = made.forward(x)
        with use_backend(backend):
            exact = backend == "reference"
            back, logdet_back = made.invert(z if exact else z.float())
        tolerance = 1e-9 if exact else 1e-3
        torch.testing.assert_close(back.double(), x, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(logdet_back.double(), -logdet, rtol=tolerance, atol=tolerance)


@on_every_backend
def test_linear_tails(backend):
    made = Made.random(4, bins=5, bound=1.0)
    z = torch.tensor([[1.5, -7.0, 1e4, -1.0001]])
    with use_backend(backend):
        x, logdet = made.invert(z)
    assert torch.equal(x, z)
    assert torch.equal(logdet, torch.zeros(1))


@on_every_backend
@pytest.mark.parametrize("options", TRANSFORMS, ids=str)
def test_a_nan_spreads_only_forward(options, backend):
    made = Made.random(6, (32, 32), **options)
    made.degrees[0] = torch.tensor([3, 1, 2, 6, 5, 4])
    z = torch.randn(3, 6).clamp(-2, 2)
    z[1, 0] = math.nan  # of degree 3: what comes before it in the order is known
    with use_backend(backend):
        x, logdet = made.invert(z)
        clean, _ = made.invert(z.nan_to_num(0.5))
    assert not x[[0, 2]].isnan().any()
    assert x[1].isnan().tolist() == [True, False, False, True, True, True]
    assert torch.equal(x[1, 1:3], clean[1, 1:3])
    assert logdet.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("options", [{"scale_map": "tanh"}, {"bins": 2}], ids=str)
def test_gradients(options):
    made = Made.random(3, (4,), activation="tanh", **options)
    z = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    leaves = [t.double().requires_grad_() for t in (*made.weights, *made.biases)]

    def call(z: Tensor, *leaves: Tensor) -> Any:
        return made_inverse(z, leaves[:2], leaves[2:], made.degrees, **made.options())

    assert torch.autograd.gradcheck(call, (z, *leaves), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, (z, *leaves), fast_mode=True)


@on_native
def test_gradients_in_float32_take_the_reference(backend):
    """By themselves; a native backend that is forced says that it has none."""
    made = Made.random(4)
    z = torch.randn(3, 4, requires_grad=True)
    x, logdet = made.invert(z)
    (gradient,) = torch.autograd.grad(x.sum() + logdet.sum(), z)
    wide = z.detach().double().requires_grad_()
    x, logdet = made.invert(wide)
    (expected,) = torch.autograd.grad(x.sum() + logdet.sum(), wide)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-4)
    with use_backend(backend), pytest.raises(ValueError, match="gradients of made_inverse"):
        made.invert(z)
    with use_backend(backend), torch.no_grad():
        made.invert(z)


@on_every_backend
@pytest.mark.parametrize("options", TRANSFORMS, ids=str)
def test_layouts_inputs_and_repeatability(options, backend):
    made, z = Made.random(6, (9, 8), **options), torch.randn(5, 6)
    call = lambda z, w, b, d: made_inverse(z, w, b, d, **made.options())  # noqa: E731
    with use_backend(backend):
        with assert_inputs_unchanged(z, *made.weights, *made.biases, *made.degrees):
            expected = call(z, made.weights, made.biases, made.degrees)
        assert_bitwise_repeatable(lambda: call(z, made.weights, made.biases, made.degrees))
        for other in strided_variants(z):
            actual = call(other, made.weights, made.biases, made.degrees)
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        for weights in zip(*map(strided_variants, made.weights), strict=False):
            biases = [next(strided_variants(b)) for b in made.biases]
            degrees = [next(strided_variants(d)) for d in made.degrees]
            torch.testing.assert_close(call(z, weights, biases, degrees), expected, rtol=1e-5, atol=1e-5)


@on_native
@pytest.mark.parametrize("options", TRANSFORMS, ids=str)
def test_neither_threads_nor_the_batch_change_a_sample(options, backend):
    made, z = Made.random(10, (32, 20), **options), torch.randn(133, 10)
    before = torch.get_num_threads()
    try:
        with use_backend(backend):
            torch.set_num_threads(1)
            alone = made.invert(z)
            torch.set_num_threads(2)
            torch.testing.assert_close(made.invert(z), alone, rtol=0, atol=0)
            parts = [torch.cat(p) for p in zip(made.invert(z[:5]), made.invert(z[5:]), strict=True)]
            torch.testing.assert_close(parts, list(alone), rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(before)


@on_every_backend
def test_compiles_once_for_two_sizes(backend):
    made = Made.random(4, (6,))
    with use_backend(backend):
        assert_compiles(made.invert, (torch.randn(3, 4),), (torch.randn(8, 4),), backend="aot_eager")


def test_vmap():
    """Over batches, and over networks, as an ensemble has them."""
    made, z = Made.random(4, (6,)), torch.randn(2, 3, 4)
    stacked = [torch.stack([t, -t]) for t in (*made.weights, *made.biases)]

    def call(z: Tensor, *network: Tensor) -> Any:
        return made_inverse(z, network[:2], network[2:], made.degrees, **made.options())

    assert_vmap(made.invert, [z])
    assert_vmap(call, [z, *stacked])


@on_every_backend
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_against_nflows(activation, backend):
    """nflows' autoregressive spline layer: its weights, its degrees, its D passes."""
    autoregressive = pytest.importorskip("nflows.transforms.autoregressive")
    layer = autoregressive.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
        features=6,
        hidden_features=20,
        num_bins=5,
        tails="linear",
        tail_bound=2.0,
        num_blocks=2,
        use_residual_blocks=False,
        activation=ACTIVATIONS[activation],
    ).double()
    net = layer.autoregressive_net
    linears = [net.initial_layer, *(block.linear for block in net.blocks), net.final_layer]
    for linear in linears:
        torch.nn.init.normal_(linear.bias)
    degrees = [torch.arange(1, 7), *(linear.degrees for linear in linears[:-1])]
    weights, biases = [m.weight.detach() for m in linears], [m.bias.detach() for m in linears]
    made = Made(weights, biases, degrees, activation, bins=5, bound=2.0)
    check_peer(made, layer.inverse, backend)


@on_every_backend
@pytest.mark.parametrize("order", [None, [2, 0, 4, 1, 3, 5]])
def test_against_zuko(order, backend):
    """A layer of zuko's MAF; the shift and scale of a feature lie side by side there."""
    autoregressive = pytest.importorskip("zuko.flows.autoregressive")
    layer = autoregressive.MaskedAutoregressiveTransform(6, hidden_features=(20, 16), order=order).double()
    linears = [m for m in layer.hyper if hasattr(m, "mask")]
    degrees, reach = [1 + layer.order], torch.eye(6)
    for linear in linears[:-1]:
        reach = (linear.mask.float() @ reach > 0).float()
        degrees.append(reach.sum(1).long())  # as many as a unit reads, and they come first in the order
    weights, biases = [m.weight.detach() for m in linears], [m.bias.detach() for m in linears]
    apart = torch.arange(12).view(6, 2).T.flatten()
    weights[-1], biases[-1] = weights[-1][apart], biases[-1][apart]
    made = Made(weights, biases, degrees, scale_map="softclip")
    masks = [*(m.mask for m in linears[:-1]), linears[-1].mask[apart]]
    assert all(torch.equal(a, b) for a, b in zip(made.masks(), masks, strict=True))
    check_peer(made, layer().inv.call_and_ladj, backend)


def check_peer(made: Made, inverse: Any, backend: str) -> None:
    z = torch.randn(9, 6, dtype=torch.float64)
    with torch.no_grad(), use_backend(backend):
        expected, logdet = inverse(z)
        exact = backend == "reference"
        actual = made.invert(z if exact else z.float())
    tolerance = 1e-6 if exact else 1e-3
    torch.testing.assert_close(actual[0].double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(actual[1].double(), logdet, rtol=tolerance, atol=tolerance)


def bad_calls() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    made, z = Made.random(4, (6,)), torch.randn(2, 4)
    w, b, d = made.weights, made.biases, made.degrees
    twice = [torch.tensor([1, 2, 2, 4]), d[1]]
    return {
        "z int": ({"z": z.long()}, TypeError, "^z must be a floating-point"),
        "z dims": ({"z": z[0]}, ValueError, r"^z must have shape \[batch, features\], got \(4,\)"),
        "z features": ({"z": z[:, :3]}, ValueError, r"^degrees\[0\] must have shape \(3,\), got \(4,\)"),
        "no layer": ({"weights": [], "biases": [], "degrees": []}, ValueError, "^weights must hold at least one"),
        "biases": ({"biases": b[:1]}, ValueError, "^biases must have one tensor for each of the 2 weights, got 1"),
        "degrees": ({"degrees": [*d, d[0]]}, ValueError, "^degrees must have one tensor for each .*got 3"),
        "weight shape": ({"weights": [w[0][:, :3], w[1]]}, ValueError, r"^weights\[0\] must have the shape"),
        "weight rows": ({"weights": [w[0], w[1][:4]]}, ValueError, r"^weights\[1\] must have the shape.*\(8, 6\)"),
        "weight int": ({"weights": [w[0].int(), w[1]]}, TypeError, r"^weights\[0\] must be a floating-point"),
        "weight None": ({"weights": [w[0], None]}, TypeError, r"^weights\[1\] must be a tensor"),
        "weight first": ({"weights": [None, w[1]]}, TypeError, r"^weights\[0\] must be a tensor"),
        "bias shape": ({"biases": [b[0][:2], b[1]]}, ValueError, r"^biases\[0\] must have the shape"),
        "bias None": ({"biases": [b[0], None]}, TypeError, r"^biases\[1\] must be a tensor"),
        "degrees dtype": ({"degrees": [d[0].int(), d[1]]}, TypeError, r"^degrees\[0\] must be an int64.*torch.int32"),
        "degrees hidden": ({"degrees": [d[0], d[1][:3]]}, ValueError, r"^degrees\[1\] must have shape \(6,\)"),
        "degrees twice": ({"degrees": twice}, ValueError, r"^degrees\[0\] must be a permutation of 1 .. 4"),
        "degrees range": ({"degrees": [d[0], d[1] + 9]}, ValueError, r"^degrees\[1\] must be in 0 .. 4"),
        "device": ({"weights": [w[0].to("meta"), w[1]]}, ValueError, r"^weights\[0\] must be on the device"),
        "activation": ({"activation": "gelu"}, ValueError, "^activation must be one of .*'gelu'"),
        "transform": ({"transform": "cubic"}, ValueError, "^transform must be .*'cubic'"),
        "scale_map": ({"scale_map": "softplus"}, ValueError, "^scale_map must be one of"),
        "no bins": ({"transform": "spline"}, ValueError, "^bins must be an int of at least 2, got None"),
        "one bin": ({"transform": "spline", "bins": 1}, ValueError, "^bins must be an int of at least 2, got 1"),
        "bins float": ({"transform": "spline", "bins": 4.0}, (TypeError, ValueError), "^bins must be an int"),
        "bound": ({"transform": "spline", "bins": 4, "bound": 0.0}, ValueError, "^bound must be a positive"),
        "width": ({"transform": "spline", "bins": 4, "min_bin_width": 0.3}, ValueError, "^min_bin_width must"),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_bad_input(name):
    changed, error, message = bad_calls()[name]
    made = Made.random(4, (6,))
    good = {"z": torch.randn(2, 4), "weights": made.weights, "biases": made.biases, "degrees": made.degrees}
    for backend in BACKENDS:
        with use_backend(backend), pytest.raises(error, match=message):
            made_inverse(**{**good, **changed})
