"""Rows A1, A2, A4, A5, A6, A7, A10 and A12 of docs/models.md: what is particular to each autoregressive family."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dgm_kernels
from dgm_kernels import NoiseKey
from dgm_models import create_model
from dgm_models.autoregressive import MADE, Autoregressive
from dgm_models.autoregressive.made import random_order
from tests.autoregressive_checks import every_sample
from tests.test_autoregressive import CONVOLUTION, naive, small


def jacobian(network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Of a network at one sample ``[1, ...]``: ``[outputs, inputs]``."""
    full = torch.autograd.functional.jacobian(network, x)
    return full.reshape(network(x).numel(), x.numel())


def logits_of(model: Autoregressive) -> Callable[[Tensor], Tensor]:
    """A sample to the logits of its numbers: those of all levels of the first number, then those of the second, ..."""

    (network,) = model.networks

    def logits(x: Tensor) -> Tensor:
        numbers = math.prod(model.sample_shape)
        parameters = network(model._to_network(x))
        grouped = parameters.reshape(1, model.network_shape[0], -1, numbers // model.network_shape[0]).transpose(2, 3)
        levels = grouped.shape[-1]
        each = grouped.reshape(1, numbers, levels)  # in the order of the network
        places = model._from_network(torch.arange(numbers)[None]).flatten()
        return each[:, places]

    return logits


def sees(model: Autoregressive) -> Tensor:
    """Which number's distribution depends on which other: bool ``[numbers, numbers]``."""
    numbers = math.prod(model.sample_shape)
    torch.manual_seed(0)
    points = torch.randn(6, 1, *model.sample_shape, dtype=torch.float64)  # not one: units may be dead at a point
    each = torch.stack([jacobian(logits_of(model), x) != 0 for x in points])
    return each.any(0).view(numbers, -1, numbers).any(1)


def raster_places(shape: tuple[int, ...]) -> Tensor:
    """The place of each number: pixel by pixel, in a pixel colour by colour."""
    pixel = torch.arange(math.prod(shape[1:]))
    return (shape[0] * pixel + torch.arange(shape[0])[:, None]).flatten()


# A1: fully visible sigmoid belief network


def test_A1_a_free_parameter_and_logistic_regressions() -> None:
    model = small("fvsbn")
    x = every_sample(model)
    (layer,) = model.networks[0].layers
    flat, total = x.flatten(1), 0
    for i in range(9):
        weight, bias = layer.weight[i, :i], layer.bias[i]
        probability = torch.sigmoid(bias + (flat[:, :i] * weight).sum(1))
        total = total + torch.where(flat[:, i] > 0, probability, 1 - probability).log()
    torch.testing.assert_close(model.log_prob(x), total)
    nn.init.constant_(layer.bias, 0.0)
    nn.init.constant_(layer.weight, float("nan"))
    assert model.log_prob(x).isnan().all()


def test_A1_weights_from_later_pixels_do_not_count() -> None:
    model = small("fvsbn")
    x = every_sample(model)
    (layer,) = model.networks[0].layers
    expected = model.log_prob(x)
    with torch.no_grad():
        layer.weight.masked_fill_(torch.ones(9, 9, dtype=torch.bool).triu(), float("nan"))
    assert torch.equal(model.log_prob(x), expected)


# A12: logistic regression


@pytest.mark.parametrize("positive", [1, 3, 9])
def test_A12_logistic_regression_on_a_constant_feature_recovers_the_base_rate(positive: int) -> None:
    """The first pixel is white in every image; the second one's best prediction is how often it is."""
    x = torch.ones(10, 1, 1, 2, dtype=torch.float64)
    x[positive:, ..., 1] = -1
    model = create_model("fvsbn", image_shape=(1, 1, 2)).double()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = model.loss(x)
        value.backward()
        return value

    optimizer.step(loss)
    white, _ = (math.exp(float(model.log_prob(x[[i]]).detach())) for i in (0, 9))
    assert white == pytest.approx(positive / 10, abs=1e-4)


# A2: MADE


def test_A2_a_number_depends_on_those_before_it_in_its_order_and_no_other() -> None:
    model = small("made", hidden=(40, 30))
    orders = []
    for network in model.networks:
        order = network.layers[0].in_degrees
        assert order.sort().values.tolist() == list(range(1, 10))
        x = torch.linspace(-1, 1, 9, dtype=torch.float64)[None]
        full = sum(jacobian(network, x * scale).abs() for scale in (1.0, -0.7, 0.3))
        assert torch.equal(full > 0, order[:, None] > order)
        orders.append(tuple(order.tolist()))
    assert len(set(orders)) == len(model.networks), "each has an order of its own"


def test_A2_the_density_is_the_mean_of_the_networks_densities() -> None:
    model = small("made", dropout=0.0)
    x = every_sample(model)
    each = []
    for network in model.networks:
        alone = small("made", networks=1)
        alone.networks[0] = network
        each.append(alone.log_prob(x).detach().exp())
        assert float(each[-1].sum()) == pytest.approx(1.0, abs=1e-9)
    torch.testing.assert_close(model.log_prob(x).exp(), torch.stack(each).mean(0))
    model.train()
    torch.testing.assert_close(model.loss(x), -torch.stack(each).log().mean(), msg="each is trained by itself")


def test_A2_natural_order_goes_pixel_by_pixel_and_colour_by_colour() -> None:
    model = small("made_natural", hidden=(60,), image_shape=(3, 2, 2))
    places = raster_places((3, 2, 2))
    assert torch.equal(sees(model), places[:, None] > places)


def test_A2_orders_do_not_depend_on_the_seed_of_the_weights() -> None:
    def orders(model: MADE) -> list[list[int]]:
        return [network.layers[0].in_degrees.tolist() for network in model.networks]

    first = create_model("made", networks=3)
    torch.manual_seed(1)
    assert orders(create_model("made", networks=3)) == orders(first)


def test_A2_orders_are_those_of_saved_models() -> None:
    """They are not saved with the weights: each is its own for ever, whatever the default dtype."""
    assert random_order(9, 0).tolist() == [9, 8, 6, 1, 4, 7, 3, 2, 5]
    assert random_order(9, 1).tolist() == [9, 7, 3, 8, 5, 4, 6, 1, 2]
    expected = random_order(3072, 0)
    default = torch.get_default_dtype()
    try:
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            torch.set_default_dtype(dtype)
            assert torch.equal(random_order(3072, 0), expected), dtype
    finally:
        torch.set_default_dtype(default)
    with torch.device("meta"):
        assert random_order(9, 0).device.type == "meta", "where the weights are"


# A4: PixelCNN


@pytest.mark.parametrize("name", ["pixelcnn", "gated_pixelcnn"])
def test_A4_type_a_hides_the_pixel_and_type_b_shows_it(name: str) -> None:
    model = create_model(name, width=6, depth=1, networks=1).double()
    layers = [module for module in model.networks.modules() if hasattr(module, "mask_type")]
    first = [layer for layer in layers if layer.in_channels == 1]
    assert [layer.mask_type for layer in layers] == ["A" if layer in first else "B" for layer in layers]
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    places = torch.arange(64)
    for layer in layers:
        if type(layer) is dgm_kernels.nn.MaskedConv2d:
            inputs = torch.randn(1, layer.in_channels, 5, 5, dtype=torch.float64)
            full = jacobian(layer, inputs).view(-1, 25, layer.in_channels, 25).abs().amax((0, 2))
            assert not full.triu(1).any(), "later pixels are hidden"
            assert bool(full.diagonal().any()) == (layer.mask_type == "B")
    seen = (jacobian(model.networks[0], x) != 0).view(64, 64)
    assert torch.equal(seen & (places[:, None] <= places), torch.zeros(64, 64, dtype=torch.bool))


def context(model: Autoregressive, size: int, row: int, column: int) -> tuple[int, int, int]:
    """Pixels before (row, column) that its distribution misses, those it should not see but does, pixels before."""
    torch.manual_seed(0)
    # In double precision, and summed over random x: no path's derivative is lost in rounding or under a dead unit.
    x = torch.randn(4, 1, size, size, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(model.networks[0](x)[:, :, row, column].sum(), x)
    seen = (gradient != 0).any(0).flatten()
    before = torch.arange(size * size) < row * size + column
    return int((before & ~seen).sum()), int((seen & ~before).sum()), int(before.sum())


@pytest.mark.parametrize("block", ["gated", "concat_elu"])
@pytest.mark.parametrize(("row", "column"), [(10, 10), (13, 7), (8, 13)])
def test_A5_no_blind_spot_and_no_leak_at_12_layers_on_21x21(block: str, row: int, column: int) -> None:
    model = (
        create_model(
            "gated_pixelcnn", image_shape=(1, 21, 21), width=8, depth=11, kernel_size=3, block=block, networks=1
        )
        .double()
        .eval()
    )
    missing, leaked, before = context(model, 21, row, column)
    assert (missing, leaked) == (0, 0)
    assert before == 21 * row + column


def test_A5_every_pixel_with_wider_kernels() -> None:
    """From corner to corner it takes kernels of 5."""
    model = (
        create_model("gated_pixelcnn", image_shape=(1, 21, 21), width=6, depth=11, kernel_size=5, networks=1)
        .double()
        .eval()
    )
    for row, column in ((20, 20), (20, 0), (1, 20), (15, 20), (0, 0), (0, 20)):
        assert context(model, 21, row, column)[:2] == (0, 0), (row, column)


def test_A5_the_plain_stack_has_a_blind_spot() -> None:
    model = (
        create_model("pixelcnn", image_shape=(1, 21, 21), width=6, depth=11, kernel_size=3, networks=1).double().eval()
    )
    missing, leaked, _ = context(model, 21, 10, 10)
    assert missing > 20
    assert leaked == 0


# A6: mixtures of discretized logistics


@pytest.mark.parametrize("channels", [1, 3])
def test_A6_log_prob_is_that_of_the_mixture(channels: int) -> None:
    options = {**CONVOLUTION, "block": "concat_elu", "output": "logistic_mixture", "mixtures": 4, "levels": 256}
    torch.manual_seed(0)
    model = create_model("gated_pixelcnn", image_shape=(channels, 5, 5), **options).double().eval()
    level = torch.randint(0, 256, (3, channels, 5, 5))
    x = level.double() / 127.5 - 1
    parameters = model.networks[0](x)
    assert parameters.shape == (3, 4 * (10 if channels == 3 else 3), 5, 5)
    expected = dgm_kernels.discretized_logistic_mixture(x, parameters, levels=256).sum((1, 2))
    torch.testing.assert_close(model.log_prob(x), expected)
    drawn = (model.sample(4, seed=1) + 1) * 127.5
    assert (drawn - drawn.round()).abs().max() < 1e-9
    assert drawn.min() >= 0 and drawn.max() <= 255


def test_A6_all_colours_of_a_pixel_are_drawn_together() -> None:
    """The parameters of a pixel's mixture depend on no colour of the pixel itself."""
    model = small("pixelcnn_pp", image_shape=(3, 2, 2))
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(1, 3, 2, 2)
    full = jacobian(model.networks[0], x).view(-1, 4, 3, 4).abs().amax((0, 2)) > 0
    assert torch.equal(full, torch.ones(4, 4, dtype=torch.bool).tril(-1))


# A7: the order of the colours


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("pixelcnn", {"width": 12, "depth": 3}),
        ("gated_pixelcnn", {"width": 12, "depth": 3}),
        ("made_natural", {"hidden": (120,)}),
        ("wavenet", {"width": 12, "depth": 5, "cycle": 5}),
    ],
)
@pytest.mark.parametrize("levels", [2, 4])
def test_A7_red_then_green_given_red_then_blue_given_both(name: str, options: dict[str, object], levels: int) -> None:
    shape = (3, 3, 3)
    model = small(name, image_shape=shape, levels=levels, **options)
    places = raster_places(shape)
    expected = places[:, None] > places
    seen = sees(model)
    if name == "pixelcnn":  # it has a blind spot
        assert not (seen & ~expected).any()
        row, column = places // 9, places // 3 % 3
        near = (row[:, None] - row) + (column[:, None] - column).abs() <= 1
        assert torch.equal(seen[near], expected[near])
    else:
        assert torch.equal(seen, expected)


# A10: WaveNet


def test_A10_sees_as_far_back_as_its_dilations_reach() -> None:
    model = small("wavenet", image_shape=(1, 40), width=6, depth=6, cycle=3, kernel_size=2)
    reach = 2 + 2 * (1 + 2 + 4)  # the first layer's two taps before the step, then one tap back a layer
    step = torch.arange(40)
    expected = (step[:, None] > step) & (step[:, None] - step <= reach)
    assert torch.equal(sees(model), expected)


def test_A10_cached_generation_of_sound_is_the_naive_one() -> None:
    model = small("wavenet", noise=0.1, image_shape=(1, 300), width=8, depth=8, cycle=8, levels=256)
    drawn = model.sample(2, seed=4)
    assert torch.equal(drawn, naive(model, 2, NoiseKey(4)))
    assert drawn.unique().numel() > 50
    continued = model.sample(2, seed=4, known=drawn, mask=torch.arange(300) < 200)
    assert torch.equal(continued, drawn)
