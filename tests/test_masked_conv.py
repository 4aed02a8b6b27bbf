"""Masked convolutions: values against the definition, receptive fields by gradients, the order of colour groups."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dgm_kernels import causal_conv1d, use_backend
from dgm_kernels.masked_conv.taps import Kernel, Layout, Rule
from tests.cases import DTYPES
from tests.contract import assert_parity
from tests.masked_conv_cases import (
    BACKENDS,
    CASES,
    EMPTY_SIZES,
    FUNCTIONS,
    SIZES,
    ConvCase,
    centre,
    eager_conv,
    group_of,
    live_weights,
    sees,
)

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_case = pytest.mark.parametrize("case", CASES, ids=str)
LAYOUTS = {"raster": Layout.RASTER, "vertical": Layout.VERTICAL, "horizontal": Layout.HORIZONTAL}


# ---- The yardstick itself.


def by_pixels(case: ConvCase, x: Tensor, weight: Tensor) -> Tensor:
    """The sum over every pair of pixels: ``weight`` at their distance, if the one may see the other."""
    outputs, inputs, height, width = weight.shape
    row, column = centre(case.kind, height, width)
    of, to = group_of(inputs, case.groups), group_of(outputs, case.groups)[:, None]
    y = x.new_zeros(x.shape[0], outputs, *x.shape[2:])
    places = list(itertools.product(range(x.shape[2]), range(x.shape[3])))
    for (r, c), (i, j) in itertools.product(places, places):
        (dy, off_y), (dx, off_x) = divmod(i - r, case.dilation[0]), divmod(j - c, case.dilation[1])
        if off_y or off_x or not 0 <= row + dy < height or not 0 <= column + dx < width:
            continue
        allowed = sees(case.kind, case.mask_type, dy, dx, of, to)
        y[:, :, r, c] += x[:, :, i, j] @ (weight[:, :, row + dy, column + dx] * allowed).T
    return y


@every_case
def test_the_eager_yardstick_is_the_definition(case):
    """``conv2d`` with the mask that the other tests compare with, pixel pair by pixel pair."""
    x, weight = (t.unsqueeze(2) if t.dim() == 3 else t for t in case.make((2, 3, 4, 5, 4), torch.float64)[:2])
    actual = eager_conv(case.kind, x, weight, None, case.mask_type, case.groups, case.dilation)
    torch.testing.assert_close(actual, by_pixels(case, x, weight))


def test_the_published_masks():
    """Written out: 3x3, the number of live taps of 5x5, and red, green and blue at the centre."""
    above = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()
    assert torch.equal(live_weights("raster", "A", 1, (1, 1, 3, 3))[0, 0], above)
    above[1, 1] = True
    assert torch.equal(live_weights("raster", "B", 1, (1, 1, 3, 3))[0, 0], above)
    counts = [int(live_weights("raster", mask_type, 1, (1, 1, 5, 5)).sum()) for mask_type in "AB"]
    assert counts == [12, 13]
    lower = torch.ones(3, 3).bool().tril()
    assert torch.equal(live_weights("raster", "B", 3, (3, 3, 3, 3))[:, :, 1, 1], lower)
    assert torch.equal(live_weights("raster", "A", 3, (3, 3, 3, 3))[:, :, 1, 1], lower.tril(-1))
    assert live_weights("raster", "A", 3, (3, 3, 3, 3))[:, :, 0].all()
    assert torch.equal(live_weights("vertical", "B", 1, (1, 1, 2, 3))[0, 0], torch.ones(2, 3).bool())
    assert live_weights("vertical", "A", 1, (1, 1, 2, 3))[0, 0].tolist() == [[True] * 3, [False] * 3]
    assert live_weights("horizontal", "A", 1, (1, 1, 1, 3))[0, 0].tolist() == [[True, True, False]]


# ---- Values.


def check_parity(case: ConvCase, size: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    operands = case.make(size, dtype)
    with use_backend(backend):
        actual = case.call(*operands)
    exact = case.call_eager(*(operand.double() for operand in operands))
    # After the convolution, sums and functions in 16 bits round once more each, by chance in our favour or eager's.
    rounds = dtype != torch.float32 and (case.gated or case.condition is not None)
    tiny = 0.5 * torch.finfo(dtype).eps if rounds else 1e-6
    largest = float(exact.abs().max())
    assert_parity(actual, case.call_eager(*operands), exact, tiny=tiny * max(1.0, largest))


@on_every_backend
@every_case
def test_parity_float32(case, backend):
    for size in SIZES:
        check_parity(case, size, torch.float32, backend)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@every_case
def test_parity_16_bits(case, dtype, backend):
    for size in SIZES[1:9:2]:
        check_parity(case, size, dtype, backend)


@every_case
def test_float64(case):
    """By the reference, to its precision."""
    for size in SIZES[3:6]:
        operands = case.make(size, torch.float64)
        torch.testing.assert_close(case.call(*operands), case.call_eager(*operands), rtol=1e-12, atol=1e-12)


@on_every_backend
@every_case
def test_empty_sizes(case, backend):
    """Without samples, rows, columns or outputs: an empty result. Without inputs: what inputs of 0 give."""
    for size in EMPTY_SIZES:
        operands = case.make(size, grad=True)
        x, weight = operands[:2]
        with use_backend(backend):
            y = case.call(*operands)
            grads = torch.autograd.grad(y.sum(), operands)
        assert y.shape == (x.shape[0], weight.shape[0] // (2 if case.gated else 1), *x.shape[2:])
        for operand, grad in zip(operands, grads, strict=True):
            assert grad.shape == operand.shape and (y.numel() or not grad.any())
        if y.numel():
            zeros = [torch.zeros(t.shape[0], case.groups, *t.shape[2:]) for t in (x, weight)]
            torch.testing.assert_close(y, case.call_eager(*zeros, *operands[2:]))


# ---- Receptive fields.


def dependence(network: Callable[[Tensor], Tensor], inputs: int, pixels: tuple[int, ...]) -> Tensor:
    """Whether channel o of pixel p has a gradient to channel i of pixel q: bool ``[outputs, P, inputs, P]``.

    One sample for each pair (o, p), all in one pass. ``network`` keeps what it gets positive.
    """
    one = torch.rand(inputs, *pixels) + 0.5
    outputs, count = network(one[None]).shape[1], pixels[0] * (pixels[1] if len(pixels) == 2 else 1)
    x = one.expand(outputs * count, *one.shape).clone().requires_grad_()
    y = network(x).reshape(outputs * count, outputs * count)
    (gradient,) = torch.autograd.grad(y.diagonal().sum(), x)
    return gradient.reshape(outputs, count, inputs, count) != 0


def expected_dependence(case: ConvCase, outputs: int, inputs: int, height: int, width: int) -> Tensor:
    """The same of one layer, from the definition."""
    row, column = centre(case.kind, *case.kernel)
    of, to = group_of(inputs, case.groups), group_of(outputs, case.groups)[:, None]
    places = list(itertools.product(range(height), range(width)))
    seen = torch.zeros(outputs, len(places), inputs, len(places), dtype=torch.bool)
    for (p, (r, c)), (i, j) in itertools.product(enumerate(places), itertools.product(*map(range, case.kernel))):
        q = (r + (i - row) * case.dilation[0], c + (j - column) * case.dilation[1])
        if q in places:
            seen[:, p, :, places.index(q)] = sees(case.kind, case.mask_type, i - row, j - column, of, to)
    return seen


def compose(later: Tensor, earlier: Tensor) -> Tensor:
    """What depends on what through two layers."""
    return torch.einsum("opmr,mriq->opiq", later.float(), earlier.float()) > 0


def in_order(outputs: int, inputs: int, pixels: int, groups: int) -> Tensor:
    """All that a model may see: every earlier pixel, and the earlier groups of the pixel."""
    p, q = torch.arange(pixels)[:, None], torch.arange(pixels)
    of, to = group_of(inputs, groups), group_of(outputs, groups)[:, None]
    return (q < p)[None, :, None] | ((q == p)[None, :, None] & (of < to)[:, None, :, None])


def positive_layer(case: ConvCase, inputs: int, outputs: int, height: int, width: int) -> Callable[[Tensor], Tensor]:
    """The layer with operands above 0, so that no two paths cancel."""
    weight, *rest = (operand.abs() for operand in case.make((1, inputs, outputs, height, width))[1:])

    def run(x: Tensor) -> Tensor:
        per_sample = [t.expand(len(x), *t.shape[1:]) if t.dim() > 1 else t for t in rest]
        return case.call(x, weight, *per_sample)

    return run


@on_every_backend
@every_case
def test_one_layer_depends_on_what_it_sees(case, backend):
    """Exactly 0 elsewhere: on later pixels, later groups, beyond the kernel."""
    _, inputs, outputs, height, width = case.fit((1, 2, 3, 4, 5))
    pixels = (height * width,) if case.kind == "causal" else (height, width)
    with use_backend(backend):
        actual = dependence(positive_layer(case, inputs, outputs, height, width), inputs, pixels)
    expected = expected_dependence(case, outputs, inputs, *((1, *pixels)[-2:]))
    if case.gated:  # a channel of the result comes from two, of one group
        expected = expected.unflatten(0, (case.groups, 2, -1)).any(1).flatten(0, 1)
    assert torch.equal(actual, expected)


@on_every_backend
@pytest.mark.parametrize("groups", [1, 3])
def test_a_stack_of_masked_layers(groups, backend):
    """A, then B: the composition of what its layers see; nothing later, and red, green, blue in their order."""
    height, width, channels = 6, 7, (3, 6, 6, 3)
    cases = [ConvCase("raster", "AB"[i > 0], kernel, groups) for i, kernel in enumerate(((5, 3), (3, 3), (1, 1)))]
    shapes = list(itertools.pairwise(channels))
    with use_backend(backend):
        layers = [positive_layer(c, i, o, height, width) for c, (i, o) in zip(cases, shapes, strict=True)]
        actual = dependence(lambda x: layers[2](layers[1](layers[0](x))), 3, (height, width))
    expected = [expected_dependence(c, o, i, height, width) for c, (i, o) in zip(cases, shapes, strict=True)]
    assert torch.equal(actual, compose(expected[2], compose(expected[1], expected[0])))
    allowed = in_order(3, 3, height * width, groups)
    assert not (actual & ~allowed).any()
    assert torch.equal(actual[:, 10, :, 10], allowed[:, 10, :, 10])
    assert (allowed & ~actual).any(), "a plain stack has a blind spot: the test must see it"


def two_stacks(depth: int, groups: int, channels: int, height: int, width: int) -> Callable[[Tensor], Tensor]:
    """A gated PixelCNN's stacks: kernels of 3x5 above and 1x3 to the left, each with its gate."""
    size = (channels, 2 * channels, height, width)
    below = [positive_layer(ConvCase("vertical", "AB"[i > 0], (3, 5), gated=True), *size) for i in range(depth)]
    beside = [
        positive_layer(ConvCase("horizontal", "AB"[i > 0], (1, 3), groups, gated=True), *size) for i in range(depth)
    ]

    def run(x: Tensor) -> Tensor:
        above, left = x, x
        for vertical, horizontal in zip(below, beside, strict=True):
            above = vertical(above)
            left = horizontal(left) + above
        return left

    return run


@on_every_backend
@pytest.mark.parametrize(("depth", "groups", "channels", "side"), [(7, 1, 1, 13), (5, 3, 3, 7)])
def test_two_stacks_have_no_blind_spot(depth, groups, channels, side, backend):
    """0 pixels and channels of the context missing, 0 leaked."""
    with use_backend(backend):
        actual = dependence(two_stacks(depth, groups, channels, side, side), channels, (side, side))
    allowed = in_order(channels, channels, side * side, groups)
    missing, leaked = int((allowed & ~actual).sum()), int((actual & ~allowed).sum())
    assert (missing, leaked) == (0, 0)


@on_every_backend
def test_a_dilated_stack_reaches_its_whole_past(backend):
    """The two steps before, then kernels of 2 with dilations 2, 4, 8: the 16 steps before and no more."""
    cases = [ConvCase("causal", "AB"[i > 0], (1, 2 if i else 3), dilation=(1, 2**i)) for i in range(4)]
    with use_backend(backend):
        layers = [positive_layer(case, 1, 1, 1, 40) for case in cases]
        actual = dependence(lambda x: layers[3](layers[2](layers[1](layers[0](x)))), 1, (40,))[0, :, 0]
    distance = torch.arange(40)[:, None] - torch.arange(40)
    assert torch.equal(actual, (distance >= 1) & (distance <= 16))


# ---- What the op says of its kernels, and to torch.fx.


@every_case
def test_the_taps_are_those_of_the_definition(case):
    """Mask, offsets and rules, which the native kernels and the generator ask for."""
    layout = LAYOUTS.get(case.kind, Layout.HORIZONTAL)
    kernel = Kernel(layout, case.mask_type == "A", case.groups, *case.kernel, case.dilation)
    mask = live_weights(case.kind, case.mask_type, case.groups, (12, 6, *case.kernel))
    assert torch.equal(kernel.mask(12, 6), mask)
    row, column = centre(case.kind, *case.kernel)
    of, to = group_of(6, case.groups), group_of(12, case.groups)[:, None]
    rules = {Rule.FULL: torch.ones(12, 6, dtype=torch.bool), Rule.LESS: of < to, Rule.LESS_EQUAL: of <= to}
    from_taps = torch.zeros_like(mask)
    for tap in kernel.taps():
        assert (tap.dy, tap.dx) == ((tap.row - row) * case.dilation[0], (tap.column - column) * case.dilation[1])
        from_taps[:, :, tap.row, tap.column] = rules[tap.rule]
    assert torch.equal(from_taps, mask)
    places = [(tap.row, tap.column) for tap in kernel.taps()]
    assert places == sorted(set(places))


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_torch_fx_records_the_call(function):
    """As one node, however x is passed; the traced module computes the same."""
    one = function is causal_conv1d
    x, weight = torch.randn(2, 3, *([5] if one else [4, 5])), torch.randn(4, 3, *([3] if one else [1, 3]))

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x, weight, mask_type="A", gated=True) + function(x=x, weight=weight, mask_type="B")[:, :2]

    traced = torch.fx.symbolic_trace(Layer())
    calls = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert calls.count(function) == 2
    torch.testing.assert_close(traced(x), Layer()(x))
