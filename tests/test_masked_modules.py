"""The masked layers of dgm_kernels.nn: parameters of PyTorch's modules, state dicts, copies, compilation, refusals."""

import copy
import io
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dgm_kernels import causal_conv1d, horizontal_conv2d, masked_conv2d, masked_linear, use_backend, vertical_conv2d
from dgm_kernels.nn import CausalConv1d, HorizontalConv2d, MaskedConv2d, MaskedLinear, VerticalConv2d
from tests.contract import assert_autocast_like, assert_compiles
from tests.masked_conv_cases import BACKENDS, ConvCase, eager_gate, live_weights

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)

# Each layer, the function that it calls, the module whose parameters it has, and the case that says what it computes.
LAYERS: dict[str, tuple[Any, Any, Any, ConvCase]] = {
    "masked": (
        lambda **k: MaskedConv2d(6, 12, (3, 5), mask_type="A", channel_groups=3, dilation=(2, 1), **k),
        masked_conv2d,
        lambda **k: nn.Conv2d(6, 12, (3, 5), **k),
        ConvCase("raster", "A", (3, 5), groups=3, dilation=(2, 1)),
    ),
    "masked, square": (
        lambda **k: MaskedConv2d(6, 12, 3, mask_type="B", **k),
        masked_conv2d,
        lambda **k: nn.Conv2d(6, 12, 3, **k),
        ConvCase("raster", "B", (3, 3)),
    ),
    "vertical": (
        lambda **k: VerticalConv2d(6, 12, (2, 3), mask_type="A", dilation=2, **k),
        vertical_conv2d,
        lambda **k: nn.Conv2d(6, 12, (2, 3), **k),
        ConvCase("vertical", "A", (2, 3), dilation=(2, 2)),
    ),
    "vertical, half a square": (
        lambda **k: VerticalConv2d(6, 12, 5, **k),
        vertical_conv2d,
        lambda **k: nn.Conv2d(6, 12, (3, 5), **k),
        ConvCase("vertical", "B", (3, 5)),
    ),
    "horizontal": (
        lambda **k: HorizontalConv2d(6, 12, 3, mask_type="A", channel_groups=2, dilation=2, **k),
        horizontal_conv2d,
        lambda **k: nn.Conv2d(6, 12, (1, 3), **k),
        ConvCase("horizontal", "A", (1, 3), groups=2, dilation=(1, 2)),
    ),
    "causal": (
        lambda **k: CausalConv1d(6, 12, 2, dilation=4, **k),
        causal_conv1d,
        lambda **k: nn.Conv1d(6, 12, 2, **k),
        ConvCase("causal", "B", (1, 2), dilation=(1, 4)),
    ),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
DEGREES = torch.tensor([2, 0, 1, 3]), torch.tensor([0, 1, 2, 3, 1])


def image(name: str, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the layer takes."""
    return torch.randn(batch, 6, *([11] if name == "causal" else [5, 7])).to(dtype)


@on_every_backend
@every_layer
def test_the_layer_is_the_function_of_its_parameters(name, backend):
    make, _, _, case = LAYERS[name]
    layer, x = make(), image(name)
    with use_backend(backend):
        actual = layer(x)
    torch.testing.assert_close(actual, case.call_eager(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)


@on_every_backend
@every_layer
def test_gates_and_conditions(name, backend):
    make, _, _, case = LAYERS[name]
    layer, x = make(gated=True, bias=False), image(name)
    assert layer.bias is None
    plain = case.call_eager(x, layer.weight, torch.zeros(12))
    for condition in (None, torch.randn(2, 12), torch.randn(plain.shape)):
        shift = 0.0 if condition is None else condition.view(*condition.shape, *[1] * (plain.dim() - condition.dim()))
        with use_backend(backend):
            actual = layer(x, condition) if condition is not None else layer(x)
        torch.testing.assert_close(actual, eager_gate(plain + shift, case.groups), rtol=1e-5, atol=1e-5)
    given = torch.randn(2, 12)
    summed = make(bias=False)
    summed.load_state_dict(layer.state_dict())
    torch.testing.assert_close(summed(x, condition=given), plain + given.view(2, 12, *[1] * (x.dim() - 2)))


@every_layer
def test_state_dicts_are_those_of_pytorch(name):
    """The keys, shapes and order of nn.Conv2d's; either loads the other's."""
    make, _, pytorch, _ = LAYERS[name]
    for bias in (True, False):
        ours, theirs = make(bias=bias), pytorch(bias=bias)
        assert list(ours.state_dict()) == list(theirs.state_dict()) == ["weight", "bias"][: 1 + bias]
        assert isinstance(ours, type(theirs))
        assert [tuple(p.shape) for p in ours.parameters()] == [tuple(p.shape) for p in theirs.parameters()]
        for target, source in ((ours, theirs), (theirs, make(bias=bias))):
            target.load_state_dict(source.state_dict(), strict=True)
            for key, value in source.state_dict().items():
                assert torch.equal(target.state_dict()[key], value)


@every_layer
def test_attributes_of_pytorch(name):
    """What tools that look at a convolution ask for."""
    make, _, pytorch, case = LAYERS[name]
    ours, theirs = make(), pytorch()
    for attribute in ("in_channels", "out_channels", "kernel_size", "stride", "groups", "padding_mode"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    assert ours.dilation == case.dilation[-len(ours.dilation) :]
    assert ours.mask_type == case.mask_type and not ours.gated


@on_every_backend
@every_layer
def test_copies_and_pickles(name, backend):
    """The same settings and parameters, and parameters of their own."""
    layer, x = LAYERS[name][0](gated=True), image(name)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    with use_backend(backend):
        expected = layer(x)
        for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
            assert torch.equal(other(x), expected)
            assert repr(other) == repr(layer)
            with torch.no_grad():
                other.weight.add_(1.0)
            assert not torch.equal(other(x), expected)
        assert torch.equal(layer(x), expected)


def test_repr():
    shown = {
        "masked": "MaskedConv2d(6, 12, kernel_size=(3, 5), mask_type='A', channel_groups=3, dilation=(2, 1))",
        "masked, square": "MaskedConv2d(6, 12, kernel_size=(3, 3), mask_type='B')",
        "vertical": "VerticalConv2d(6, 12, kernel_size=(2, 3), mask_type='A', dilation=(2, 2))",
        "horizontal": "HorizontalConv2d(6, 12, kernel_size=(1, 3), mask_type='A', channel_groups=2, dilation=(1, 2))",
        "causal": "CausalConv1d(6, 12, kernel_size=(2,), mask_type='B', dilation=(4,))",
    }
    for name, expected in shown.items():
        assert repr(LAYERS[name][0]()) == expected
    bare = repr(MaskedConv2d(2, 4, 3, mask_type="A", bias=False, gated=True))
    assert bare == "MaskedConv2d(2, 4, kernel_size=(3, 3), mask_type='A', bias=False, gated=True)"
    linear = repr(MaskedLinear(*DEGREES, strict=True))
    assert linear == "MaskedLinear(in_features=4, out_features=5, bias=True, strict=True)"


@every_layer
def test_initialisation_counts_live_inputs_only(name):
    """Uniform in +-1 / sqrt(n) for n weights that count, output by output."""
    make, _, _, case = LAYERS[name]
    layers = [make() for _ in range(40)]
    live = live_weights(case.kind, case.mask_type, case.groups, (12, 6, *case.kernel)).flatten(1).sum(1).clamp(min=1)
    bound = live.double().rsqrt()
    for parameter in ("weight", "bias"):
        values = torch.stack([getattr(layer, parameter).detach().double().view(12, -1) for layer in layers], 1).flatten(
            1
        )
        assert bool((values.abs().amax(1) <= bound * (1 + 1e-6)).all())
        assert bool((values.abs().amax(1) > 0.75 * bound).all())
        ratio = values.std(1) / (bound / math.sqrt(3))
        assert float((ratio - 1).abs().max()) < 6 / math.sqrt(values.shape[1])
    before = layers[0].weight.detach().clone()
    layers[0].reset_parameters()
    assert bool((layers[0].weight != before).all())


@on_every_backend
@every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(name, dtype, backend):
    """Made in the dtype or moved to it: forward and backward in it, near the result of float32."""
    made = LAYERS[name][0](dtype=dtype, gated=True)
    moved = LAYERS[name][0](gated=True).to(dtype)
    tolerance = 4 * torch.finfo(dtype).eps
    for layer in (made, moved):
        x = image(name, dtype=dtype).requires_grad_()
        wide = copy.deepcopy(layer).float()
        with use_backend(backend):
            y = layer(x)
            y.square().sum().backward()
        wide_x = x.detach().float().requires_grad_()
        with use_backend("reference"):
            expected = wide(wide_x)
            expected.square().sum().backward()
        assert y.dtype == x.grad.dtype == layer.weight.grad.dtype == layer.bias.grad.dtype == dtype
        for ours, theirs in (
            (y.detach(), expected.detach()),
            (x.grad, wide_x.grad),
            *((p.grad, q.grad) for p, q in zip(layer.parameters(), wide.parameters(), strict=True)),
        ):
            largest = max(1e-3, float(theirs.abs().max()))
            torch.testing.assert_close(ours.float(), theirs, rtol=tolerance, atol=tolerance * largest)


@on_every_backend
def test_autocast(backend):
    """As nn.Conv2d: 16 bits out, float32 gradients in the parameters."""
    layer, x = MaskedConv2d(6, 12, 3, mask_type="B"), image("masked")
    case = ConvCase("raster", "B", (3, 3))
    with use_backend(backend):
        assert_autocast_like(layer, lambda x: case.call_eager(x, layer.weight, layer.bias), (x,))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(x).float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@on_every_backend
@pytest.mark.parametrize("name", ["masked", "vertical, half a square", "causal"])
def test_compiles(name, backend):
    """Without a graph break, once for two sizes."""
    layer = LAYERS[name][0](gated=True)
    pixels = ([5], [9]) if name == "causal" else ([8, 9], [11, 14])
    args = [
        [torch.randn(batch, 6, *size, requires_grad=True), torch.randn(batch, 12)]
        for batch, size in zip((4, 7), pixels, strict=True)
    ]
    with use_backend(backend):
        assert_compiles(layer, *args, backend="aot_eager")


@every_layer
def test_devices(name):
    """On the meta device nothing is initialised; materialised elsewhere, it loads a state dict."""
    make = LAYERS[name][0]
    empty, full = make(device="meta"), make()
    assert all(p.device.type == "meta" for p in empty.parameters())
    x = image(name)
    assert empty(x.to("meta")).shape == full(x).shape
    real = empty.to_empty(device="cpu")
    real.load_state_dict(full.state_dict())
    assert torch.equal(real(x), full(x))
    with pytest.raises(ValueError, match=r"^weight must be on the device of x"):
        make(device="meta")(x)


@on_every_backend
def test_a_step_of_training_leaves_masked_weights(backend):
    """Their gradient is 0: NaN in them does no harm, and stays."""
    layer = MaskedConv2d(6, 12, 5, mask_type="A", channel_groups=3, gated=True)
    live = live_weights("raster", "A", 3, layer.weight.shape)
    with torch.no_grad():
        layer.weight[~live] = torch.nan
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.05)
    losses = []
    x = image("masked", 4)
    with use_backend(backend):
        for _ in range(5):
            loss = (layer(x) - 0.2).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert bool(layer.weight.detach()[~live].isnan().all() and layer.weight.detach()[live].isfinite().all())
    assert not layer.weight.grad[~live].any()


# ---- Linear layers.


def linear_mask(in_degrees: Tensor, out_degrees: Tensor, strict: bool) -> Tensor:
    """Weight by weight."""
    mask = torch.zeros(len(out_degrees), len(in_degrees))
    for o, i in itertools.product(range(len(out_degrees)), range(len(in_degrees))):
        source, target = int(in_degrees[i]), int(out_degrees[o])
        mask[o, i] = float(source < target or (source == target and not strict))
    return mask


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("shape", [(3,), (2, 5), ()], ids=str)
def test_masked_linear_is_its_formula(shape, strict):
    """Values and gradients of ``x (weight * mask)' + bias``."""
    operands = [torch.randn(s, dtype=torch.float64) for s in ((*shape, 4), (5, 4), (5,))]
    mask = linear_mask(*DEGREES, strict).double()
    results = []
    for function in (
        lambda x, w, b: masked_linear(x, w, b, *DEGREES, strict=strict),
        lambda x, w, b: x @ (w * mask).T + b,
    ):
        leaves = [operand.clone().requires_grad_() for operand in operands]
        y = function(*leaves)
        results.append([y, *torch.autograd.grad(y.sin().sum(), leaves)])
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("strict", [False, True])
def test_masked_linear_does_not_read_masked_weights(strict):
    dead = linear_mask(*DEGREES, strict) == 0
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    expected = masked_linear(x, weight, None, *DEGREES, strict=strict)
    leaf = weight.masked_fill(dead, torch.nan).requires_grad_()
    y = masked_linear(x, leaf, None, *DEGREES, strict=strict)
    y.sum().backward()
    assert torch.equal(y.detach(), expected)
    assert not leaf.grad[dead].any() and leaf.grad.isfinite().all()


def test_the_linear_layer_has_the_state_of_nn_linear():
    """Degrees are not in it; they are copied, and move with the layer."""
    degrees = [d.clone() for d in DEGREES]
    layer, plain, x = MaskedLinear(*degrees), nn.Linear(4, 5), torch.randn(3, 4)
    assert isinstance(layer, nn.Linear)
    assert list(layer.state_dict()) == list(plain.state_dict()) == ["weight", "bias"]
    layer.load_state_dict(plain.state_dict())
    plain.load_state_dict(MaskedLinear(*DEGREES).state_dict())
    expected = masked_linear(x, layer.weight, layer.bias, *DEGREES)
    degrees[0].zero_()
    assert torch.equal(layer(x), expected)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    assert layer.double()(x.double()).dtype == torch.float64
    assert layer.to("meta").in_degrees.device.type == "meta"
    assert MaskedLinear(*DEGREES, bias=False).bias is None
    loose, strict = (MaskedLinear(*DEGREES, strict=s).double() for s in (False, True))
    strict.load_state_dict(loose.state_dict())
    assert not torch.equal(strict(x.double()), loose(x.double()))


@pytest.mark.parametrize("under", [True, False])
def test_degrees_survive_the_meta_device(under):
    """Made there or moved there: ``to_empty`` and a state dict give the layer back."""
    full, x = MaskedLinear(*DEGREES), torch.randn(3, 4)
    if under:
        with torch.device("meta"):
            layer = MaskedLinear(*DEGREES)
    else:
        layer = copy.deepcopy(full).to("meta")
    assert layer.weight.is_meta and layer(x.to("meta")).shape == (3, 5)
    for _ in range(2):
        layer = copy.deepcopy(layer).to_empty(device="cpu")
        layer.load_state_dict(full.state_dict())
        assert torch.equal(layer(x), full(x))


def test_degrees_that_changed_survive_the_meta_device():
    layer = MaskedLinear(*DEGREES)
    layer.in_degrees.copy_(DEGREES[0].flip(0))
    layer.to("meta").to_empty(device="cpu")
    assert torch.equal(layer.in_degrees, DEGREES[0].flip(0)) and torch.equal(layer.out_degrees, DEGREES[1])


def test_the_linear_layer_is_initialised_by_its_live_inputs():
    counts = linear_mask(*DEGREES, False).sum(1).clamp(min=1)
    layers = [MaskedLinear(*DEGREES) for _ in range(200)]
    largest = torch.stack([layer.weight.detach().abs().amax(1) for layer in layers]).amax(0) * counts.sqrt()
    assert bool((largest <= 1 + 1e-6).all() and (largest > 0.95).all())


def test_the_linear_layer_compiles():
    layer = MaskedLinear(*DEGREES)
    args = [[torch.randn(batch, 4, requires_grad=True)] for batch in (3, 7)]
    assert_compiles(layer, *args, backend="aot_eager")


# ---- Refusals.


Bad = tuple[Any, Any, str]  # a call, the error or errors that it may raise, and the message


def bad_kernels_and_masks() -> dict[str, Bad]:
    return {
        "even": (lambda: MaskedConv2d(2, 4, 4, mask_type="A"), ValueError, "^kernel_size must be odd, got 4"),
        "even width": (
            lambda: MaskedConv2d(2, 4, (3, 2), mask_type="A"),
            ValueError,
            r"^kernel_size .*odd, got \(3, 2\)",
        ),
        "vertical even": (lambda: VerticalConv2d(2, 4, (2, 2)), ValueError, "^kernel_size must have an odd number"),
        "kernel 0": (lambda: CausalConv1d(2, 4, 0), ValueError, "^kernel_size must be at least 1, got 0"),
        "kernel pair": (lambda: HorizontalConv2d(2, 4, (1, 3)), TypeError, "^kernel_size must be an int"),
        "kernel float": (
            lambda: MaskedConv2d(2, 4, 3.0, mask_type="A"),
            TypeError,
            "^kernel_size must be an int, got 3.0",
        ),
        "no mask_type": (lambda: MaskedConv2d(2, 4, 3), TypeError, "mask_type"),
        "mask_type": (lambda: MaskedConv2d(2, 4, 3, mask_type="C"), ValueError, "^mask_type must be .*got 'C'"),
        "vertical mask_type": (
            lambda: VerticalConv2d(2, 4, 3, mask_type="a"),
            ValueError,
            "^mask_type must be .*got 'a'",
        ),
    }


def bad_channels_and_dilations() -> dict[str, Bad]:
    x = torch.randn(3, 4)
    return {
        "in groups": (
            lambda: MaskedConv2d(2, 6, 3, mask_type="A", channel_groups=3),
            ValueError,
            "^channel_groups must divide in_channels, 2, got 3",
        ),
        "out groups": (
            lambda: HorizontalConv2d(6, 4, 3, channel_groups=3),
            ValueError,
            "^channel_groups must divide out_channels, 4, got 3",
        ),
        "gated": (lambda: CausalConv1d(2, 5, 2, gated=True), ValueError, "^out_channels of a gated layer .*got 5"),
        "gated groups": (
            lambda: MaskedConv2d(3, 9, 3, mask_type="A", channel_groups=3, gated=True),
            ValueError,
            "^out_channels of a gated layer .*6, got 9",
        ),
        "in_channels": (lambda: MaskedConv2d(0, 4, 3, mask_type="A"), ValueError, "^in_channels must be at least 1"),
        "out_channels": (lambda: CausalConv1d(2, 4.0, 3), TypeError, "^out_channels must be an int, got 4.0"),
        "dilation": (
            lambda: MaskedConv2d(2, 4, 3, mask_type="A", dilation=0),
            ValueError,
            "^dilation must be at least 1",
        ),
        "causal dilation": (lambda: CausalConv1d(2, 4, 2, dilation=(2,)), TypeError, "^dilation must be an int"),
        "x channels": (lambda: MaskedConv2d(2, 4, 3, mask_type="A")(x), ValueError, "^x must have shape"),
    }


def linear(*args: Any) -> Callable[[], Tensor]:
    """A call of the function, to be made."""
    return lambda: masked_linear(*args)


def bad_degrees() -> dict[str, Bad]:
    """Of the layer, and of the function."""
    (d, o), x, w = DEGREES, torch.randn(3, 4), torch.randn(5, 4)
    return {
        "in_degrees list": (
            lambda: MaskedLinear([1, 2], o),
            TypeError,
            "^in_degrees must be an int64 tensor, got list",
        ),
        "out_degrees float": (lambda: MaskedLinear(d, o.float()), TypeError, "^out_degrees must be an int64 tensor"),
        "in_degrees matrix": (lambda: MaskedLinear(d[None], o), ValueError, "^in_degrees must have one dimension"),
        "meta degrees": (
            lambda: MaskedLinear(d, o.to("meta")),
            ValueError,
            "^out_degrees must hold values, got a tensor on the meta device",
        ),
        "out_degrees empty": (lambda: MaskedLinear(d, o[:0]), ValueError, "^out_degrees must have one dimension"),
        "linear no degrees": (linear(x, w), TypeError, "^out_degrees must be an int64 tensor, got NoneType"),
        "linear in_degrees": (linear(x, w, None, o, o), ValueError, r"^in_degrees must have shape \(4,\), got \(5,\)"),
        "linear out_degrees": (
            linear(x, w, None, d, d),
            ValueError,
            r"^out_degrees must have shape \(5,\), got \(4,\)",
        ),
        "linear degrees' device": (
            linear(x, w, None, d.to("meta"), o),
            ValueError,
            "^in_degrees must be on the device of weight",
        ),
    }


def bad_linear_operands() -> dict[str, Bad]:
    (d, o), x, w = DEGREES, torch.randn(3, 4), torch.randn(5, 4)
    return {
        "linear x": (linear([1.0], w, None, d, o), TypeError, "^x must be a tensor, got list"),
        "linear weight": (linear(x, None, None, d, o), TypeError, "^weight must be a tensor, got NoneType"),
        "linear weight shape": (linear(x, w.T, None, d, o), ValueError, r"^weight must have shape \[outputs, 4\], got"),
        "linear weight dtype": (linear(x, w.double(), None, d, o), TypeError, "^weight must have the dtype of x"),
        "linear bias shape": (
            linear(x, w, torch.zeros(4), d, o),
            ValueError,
            r"^bias must have shape \(5,\).*got \(4,\)",
        ),
        "linear bias number": (linear(x, w, 1.0, d, o), (TypeError, ValueError), "^bias must .*got float"),
        "linear bias dtype": (linear(x, w, torch.zeros(5).half(), d, o), TypeError, "^bias must have the dtype of x"),
        "linear bias device": (
            linear(x, w, torch.zeros(5, device="meta"), d, o),
            ValueError,
            "^bias must be on the device of x",
        ),
    }


BAD = bad_kernels_and_masks() | bad_channels_and_dilations() | bad_degrees() | bad_linear_operands()


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
