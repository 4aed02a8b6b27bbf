"""Rows A8 and A9 of docs/models.md: the transformer over pixels, its masks and positions, training and saving."""

from __future__ import annotations

import copy
import itertools
import math
import pathlib
import pickle

import pytest
import torch
from torch import Tensor, nn

from dgm_kernels import masks, use_backend
from dgm_models import create_model, from_pretrained
from dgm_models.autoregressive import ImageGPT
from dgm_models.data import digits
from dgm_models.train import Settings
from tests import autoregressive_checks as checks
from tests.autoregressive_checks import every_sample
from tests.cases import BACKENDS
from tests.command_line import run
from tests.image_gpt_cases import TINY, every_model, small

# Densities


@every_model
def test_A9_probabilities_sum_to_one(name: str) -> None:
    checks.check_probabilities_sum_to_one(small(name), 1e-9)


@every_model
def test_A9_samples_have_the_probabilities(name: str) -> None:
    checks.check_samples_have_the_probabilities(small(name))


@every_model
def test_loss_is_the_negative_log_probability_in_nats(name: str) -> None:
    checks.check_loss_is_the_negative_log_probability(small(name))


@pytest.mark.parametrize("name", ["learned", "local", "colour"])
def test_log_prob_is_the_same_on_every_backend(name: str) -> None:
    model = small(name)
    x = every_sample(model)[::7]
    expected = model.log_prob(x).float()
    model.float()
    for backend in BACKENDS:
        with use_backend(backend):
            torch.testing.assert_close(model.log_prob(x.float()), expected, rtol=1e-4, atol=1e-5)


def test_A9_levels_are_categorical_and_two_are_bernoulli() -> None:
    grey, binary = create_model("image_gpt", levels=17), create_model("image_gpt")
    assert (grey.output, binary.output) == ("categorical", "bernoulli")
    assert grey.networks[0].head.out_features == 17 and binary.networks[0].head.out_features == 1
    x = digits().train.x[:6]
    logits = grey.eval().networks[0](x)
    assert logits.shape == (6, 17, 8, 8)
    level = ((x + 1) * 8).round().long()
    expected = logits.log_softmax(1).gather(1, level).sum((1, 2, 3))
    torch.testing.assert_close(grey.networks[0](x).shape, logits.shape)
    alone = create_model("image_gpt", levels=17, networks=1).eval()
    alone.networks[0] = grey.networks[0]
    torch.testing.assert_close(alone.log_prob(x), expected)


def test_classes_have_distributions_of_their_own() -> None:
    checks.check_classes_have_distributions_of_their_own(small("several", noise=0.5, num_classes=3))


# What a token sees


def sees(model: ImageGPT) -> Tensor:
    """Which token's distribution depends on which other's level, by gradients: bool ``[tokens, tokens]``.

    Levels are looked up in a table, so the gradients are those of the features that the table gives.
    """
    (network,) = model.networks
    torch.manual_seed(0)
    x = torch.randint(0, model.levels, (2, *model.sample_shape)).double() * (2 / (model.levels - 1)) - 1
    features: list[Tensor] = []
    handle = network.embedding.register_forward_hook(lambda _, __, out: features.append(out))
    logits = network(x)
    handle.remove()
    each = logits.view(2, network.image_shape[0], network.numbers, -1).permute(0, 3, 1, 2).flatten(1, 2)
    rows = []
    for token in range(network.tokens):
        (gradient,) = torch.autograd.grad(each[:, token].sin().sum(), features[0], retain_graph=True)
        rows.append((gradient != 0).any(-1).any(0))
    seen = torch.stack(rows)
    assert bool(seen[:, 0].any()), "the token before the first"
    return nn.functional.pad(seen[:, 1:], (0, 1))  # place i of the input holds the token before i


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary", "learned+rotary"])
@pytest.mark.parametrize(("shape", "levels"), [((1, 4, 5), 2), ((3, 2, 3), 4)], ids=str)
def test_A9_a_token_sees_all_before_it_and_no_other(shape: tuple[int, ...], levels: int, positions: str) -> None:
    """Pixel by pixel, in a pixel red, then green given red, then blue given both."""
    model = small("learned", image_shape=shape, levels=levels, positions=positions, depth=1)
    tokens = math.prod(shape)
    assert torch.equal(sees(model), torch.ones(tokens, tokens, dtype=torch.bool).tril(-1))


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(("shape", "radius"), [((1, 6, 7), 1), ((1, 6, 7), 2), ((1, 5, 4), 0), ((3, 3, 4), 1)], ids=str)
def test_A8_local_attention_is_strictly_causal_with_the_receptive_field_of_its_mask(
    shape: tuple[int, ...], radius: int, depth: int
) -> None:
    """By gradients: in one block what the mask says of the inputs, which hold the token before; in more its powers."""
    channels, _, columns = shape
    model = small("learned", image_shape=shape, attention_radius=radius, depth=depth)
    tokens = math.prod(shape)
    token = torch.arange(tokens)
    row, column, colour = token // (columns * channels), token % (columns * channels) // channels, token % channels
    near = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    near &= (row[:, None] - row).abs() <= radius
    if channels == 1:
        near &= (column[:, None] - column).abs() <= radius
    else:  # all colours of the pixels that are near, and of the next ones as many as the mask's tokens reach
        place = column * channels + colour
        near &= (place[:, None] - place).abs() <= channels * radius + channels - 1
        whole = ((column[:, None] - column).abs() <= radius) & ((row[:, None] - row).abs() <= radius)
        assert bool(near[whole & (token[:, None] >= token)].all())
    reach = torch.linalg.matrix_power(near.double(), depth) > 0
    expected = nn.functional.pad(reach[:, 1:], (0, 1))
    seen = sees(model)
    assert torch.equal(seen, expected)
    assert not bool(seen.triu().any()), "no token sees itself or a later one"


def test_A8_local_attention_reaches_further_in_more_blocks() -> None:
    """The last pixel of 6x6: three pixels above and the one before it, moved by one; after six blocks, all."""
    seen = [
        sees(small("learned", image_shape=(1, 6, 6), attention_radius=radius, depth=depth))
        for radius, depth in ((1, 1), (1, 6), (5, 1))
    ]
    assert seen[0][-1].nonzero().flatten().tolist() == [27, 28, 33, 34]
    assert torch.equal(seen[1][-1], torch.arange(36) < 35)
    assert torch.equal(seen[2], torch.ones(36, 36, dtype=torch.bool).tril(-1)), "a radius as large as the picture"


@every_model
def test_A8_A9_a_pixel_changes_no_distribution_before_or_at_it(name: str) -> None:
    model = small(name)
    x = every_sample(model)[-3:-1]
    network = model.networks[0]
    expected = network(x).view(2, network.image_shape[0], network.numbers, -1)
    for pixel, channel in itertools.product(range(expected.shape[3]), range(expected.shape[1])):
        other = x.clone()
        other.flatten(2)[:, channel, pixel] *= -1
        found = network(other).view_as(expected)
        changed = (found != expected).any(0).any(1).t().flatten()  # token by token
        token = pixel * expected.shape[1] + channel
        assert not bool(changed[: token + 1].any())
        assert bool(changed[token + 1 :].any()) or token == len(changed) - 1


# Positions


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
def test_A9_the_order_of_what_came_before_counts_by_positions_alone(positions: str) -> None:
    """In one block the last token's result is a sum over the tokens before: without positions in no order."""
    model = small("learned", image_shape=(1, 3, 4), depth=1, positions=positions)
    x = torch.tensor([1.0, -1, -1, 1, 1, -1, 1, -1, -1, 1, 1, -1], dtype=torch.float64).view(1, 1, 3, 4)
    swapped = x.flatten(1)[:, [3, 6, 0, 5, 9, 2, 4, 1, 8, 7, 10, 11]].view(1, 1, 3, 4)  # the last two stay

    def difference() -> float:
        return float((model.networks[0](x) - model.networks[0](swapped))[..., -1, -1].abs().max().detach())

    assert difference() > 1e-4
    plain = small("learned", image_shape=(1, 3, 4), depth=1)
    nn.init.zeros_(plain.networks[0].position)
    plain.networks[0].embedding = model.networks[0].embedding
    a, b = (plain.networks[0](image)[..., -1, -1] for image in (x, swapped))
    torch.testing.assert_close(a, b)


def test_A9_tokens_without_positions_are_a_set() -> None:
    """The blocks of the network without a mask: results go along with the tokens that change places."""
    network = small("learned", image_shape=(1, 3, 4)).networks[0]
    hidden, order = torch.randn(2, 12, 16, dtype=torch.float64), torch.randperm(12)

    def blocks(hidden: Tensor, **options: object) -> Tensor:
        for block in network.blocks:
            hidden = block(hidden, **options)
        return hidden

    torch.testing.assert_close(blocks(hidden[:, order]), blocks(hidden)[:, order])
    rope = small("rotary", image_shape=(1, 3, 4)).networks[0].rope()
    for options in ({"rope": rope}, {"mask": masks.causal()}):
        gap = blocks(hidden[:, order], **options) - blocks(hidden, **options)[:, order]
        assert float(gap.detach().abs().max()) > 1e-3
    places = network.places()
    gap = blocks(hidden[:, order] + places) - blocks(hidden + places)[:, order]
    assert float(gap.detach().abs().max()) > 1e-3


def test_A9_sinusoids_and_rotations_by_row_and_column() -> None:
    network = create_model("image_gpt", image_shape=(3, 4, 5), positions="sinusoidal+rotary", **TINY).networks[0]
    with torch.no_grad():
        places = (network.places() - network.channel.repeat(20, 1)).view(4, 5, 3, 16)
    for row, column, channel, k in ((0, 0, 0, 0), (3, 1, 2, 1), (2, 4, 1, 3)):
        rate = 10000.0 ** (-k / 4)
        expected = [math.sin(row * rate), math.cos(row * rate), math.sin(column * rate), math.cos(column * rate)]
        assert places[row, column, channel, [k, 4 + k, 8 + k, 12 + k]].tolist() == pytest.approx(expected, abs=1e-5)
    table = network.rope().table.view(4, 5, 3, 4, 2)
    for row, column, k in ((3, 1, 1), (2, 4, 0)):
        rate = 100.0 ** (-k / 2)
        for angle, part in ((row * rate, k), (column * rate, 2 + k)):
            found = table[row, column, :, part]
            assert found.flatten().tolist() == pytest.approx([math.cos(angle), math.sin(angle)] * 3, abs=1e-6)


def test_colours_have_features_of_their_own() -> None:
    network = create_model("image_gpt", image_shape=(3, 2, 2), positions="rotary", **TINY).networks[0]
    assert torch.equal(network.places(), network.channel.repeat(4, 1))
    assert create_model("image_gpt", positions="rotary", **TINY).networks[0].places() is None
    x = torch.arange(24).view(2, 3, 2, 2)
    tokens = network.to_tokens(x)
    assert tokens[0].tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    assert torch.equal(network.from_tokens(tokens), x)


# Training, saving, command line


@pytest.mark.parametrize("name", ["several", "sinusoidal", "colour", "learned_colour"])
def test_every_parameter_is_trained(name: str) -> None:
    checks.check_every_parameter_is_trained(small(name, num_classes=2))


def test_a_short_training_beats_independent_pixels() -> None:
    torch.manual_seed(0)
    model = create_model("image_gpt", width=16, depth=2, heads=2, networks=1)
    checks.check_a_short_training_beats_independent_pixels(model, 250, 20.5)


@every_model
def test_save_and_load(name: str, tmp_path: pathlib.Path) -> None:
    model = small(name, num_classes=2)
    loaded = checks.check_save_and_load(model, tmp_path)
    assert type(loaded) is ImageGPT
    cond = torch.arange(50) % 2
    drawn = model.sample(50, seed=1, cond=cond)
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.sample(50, seed=1, cond=cond), drawn)


def test_cli(tmp_path: pathlib.Path) -> None:
    config = {"width": 8, "depth": 1, "heads": 2, "networks": 2, "num_classes": 10, "positions": "sinusoidal"}
    checks.check_command_line("image_gpt", config, tmp_path)


def test_default_settings_and_options_suit_each_other(tmp_path: pathlib.Path) -> None:
    """The command line's defaults for the black and white digits, for one step."""
    out = tmp_path / "run"
    status, text = run("train", "image_gpt", "--out", out, "--steps", 1, "--quiet", "--device", "cpu")
    assert status == 0, text
    assert from_pretrained(out).levels == 2
    Settings(**ImageGPT.default_settings)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"image_shape": (8, 8)}, r"image_shape must be \(channels, height, width\), got \(8, 8\)"),
        ({"width": 0}, "width must be a positive int, got 0"),
        ({"width": 30}, "heads must divide width, 30, got 4"),
        ({"heads": 0}, "heads must be a positive int, got 0"),
        ({"width": 8}, "width must be a multiple of 4 for each of 4 heads with rotary positions, got 8"),
        ({"width": 6, "heads": 2, "positions": "sinusoidal"}, "width must be divisible by 4 with sinusoidal"),
        ({"positions": "spiral"}, r"positions must be some of learned, sinusoidal, rotary, joined by \+, got 'spiral'"),
        ({"positions": "rotary+rotary"}, "positions must be some of"),
        ({"positions": ""}, "positions must be some of"),
        ({"positions": None}, "positions must be some of learned, sinusoidal, rotary, joined by .*, got None"),
        ({"depth": 0}, "depth must be a positive int, got 0"),
        ({"attention_radius": -1}, "attention_radius must be a non-negative int, got -1"),
        ({"attention_radius": 1.5}, "attention_radius must be a non-negative int, got 1.5"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"levels": 1}, "levels must be at least 2, got 1"),
        ({"networks": 0}, "networks must be a positive int, got 0"),
        ({"num_classes": 0}, "num_classes must be a positive int, got 0"),
    ],
)
def test_bad_config(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        create_model("image_gpt", **config)


def test_bad_data_and_completions() -> None:
    model = small("several")
    x = every_sample(model)[:4]
    with pytest.raises(ValueError, match=r"x must lie on 2 equally spaced levels in \[-1, 1\]"):
        model.loss(0.5 * x)
    with pytest.raises(ValueError, match=r"x must have shape \(batch, 1, 3, 3\), got \(4, 9\)"):
        model.log_prob(x.flatten(1))
    with pytest.raises(ValueError, match="cond must be given: this image_gpt is conditional"):
        small("several", num_classes=2).sample(2)
    with pytest.raises(ValueError, match="known and mask must be given together"):
        model.sample(4, known=x)
    with pytest.raises(TypeError, match="sample of image_gpt has no option 'given'; its options are known, mask"):
        model.sample(4, given=x)
