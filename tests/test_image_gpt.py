"""Rows A8 and A9 of docs/models.md: the transformer over pixels, its masks and positions, generation from a cache."""

from __future__ import annotations

import copy
import itertools
import math
import pathlib
import pickle

import pytest
import torch
from torch import Tensor, nn

from dgm_kernels import NoiseKey, categorical_sample, masks, noise_like, use_backend
from dgm_models import create_model, from_pretrained, list_models
from dgm_models.autoregressive import ImageGPT
from dgm_models.data import digits
from dgm_models.train import Settings, Trainer
from tests.cases import BACKENDS
from tests.contract import assert_compiles
from tests.test_autoregressive import every_sample, number, run

TINY = {"width": 16, "depth": 2, "heads": 2, "networks": 1}
# name: (options, shape and levels small enough to visit every sample)
SMALL = {
    "learned": ({"positions": "learned"}, (1, 3, 3), 2),
    "sinusoidal": ({"positions": "sinusoidal"}, (1, 2, 3), 3),
    "rotary": ({"positions": "rotary"}, (1, 3, 3), 2),
    "several": ({"positions": "learned+rotary"}, (1, 3, 3), 2),
    "local": ({"attention_radius": 1}, (1, 3, 3), 2),
    "row": ({"attention_radius": 0}, (1, 2, 3), 3),
    "colour": ({"positions": "rotary"}, (3, 1, 2), 3),
    "learned_colour": ({"positions": "learned"}, (2, 2, 2), 2),
    "local_colour": ({"attention_radius": 1}, (3, 3, 1), 2),
    "networks": ({"networks": 3}, (1, 2, 3), 2),
}
every_model = pytest.mark.parametrize("name", SMALL)


def small(name: str, noise: float = 0.3, **config: object) -> ImageGPT:
    """A small model in float64 with parameters that are not those it starts with."""
    options, shape, levels = SMALL[name]
    torch.manual_seed(0)
    model = create_model("image_gpt", **{**TINY, "image_shape": shape, "levels": levels, **options, **config}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=noise)
    return model.eval()


# Densities


@every_model
def test_A9_probabilities_sum_to_one(name: str) -> None:
    model = small(name)
    with torch.no_grad():
        probability = model.log_prob(every_sample(model)).exp()
    assert float(probability.sum()) == pytest.approx(1.0, abs=1e-9)
    assert float(probability.max() / probability.min()) > 2, "they are not all alike"


@every_model
def test_A9_samples_have_the_probabilities(name: str) -> None:
    model, n = small(name), 4000
    with torch.no_grad():
        expected = model.log_prob(every_sample(model)).exp()
    x = model.sample(n, seed=3)
    assert x.shape == (n, *model.sample_shape)
    found = torch.bincount(number(model, x), minlength=len(expected)) / n
    # The sum of the cells' expected absolute deviations of a multinomial, and a margin of a fifth.
    deviation = (2 / math.pi * expected * (1 - expected) / n).sqrt().sum()
    assert float((found - expected).abs().sum()) < 1.2 * float(deviation)


@every_model
def test_loss_is_the_negative_log_probability_in_nats(name: str) -> None:
    model = small(name)
    x = every_sample(model)[5:25]
    parts = model.loss_parts(x)
    assert list(parts) == ["nll"]
    torch.testing.assert_close(parts["nll"], -model.log_prob(x).mean())
    torch.testing.assert_close(model.elbo(x, 3), model.log_prob(x))


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
    model = small("several", noise=0.5, num_classes=3)
    x = every_sample(model)
    with torch.no_grad():
        each = torch.stack([model.log_prob(x, torch.full((len(x),), label)).exp() for label in range(3)])
    torch.testing.assert_close(each.sum(1), torch.ones(3, dtype=torch.float64))
    assert all((a - b).abs().sum() > 0.01 for a, b in itertools.combinations(each, 2))
    for label in range(3):
        drawn = number(model, model.sample(4000, seed=1, cond=label))
        likelihood = each[:, drawn].log().mean(1)
        assert int(likelihood.argmax()) == label
    mixed = model.sample(6, seed=1, cond=torch.tensor([0, 1, 2, 0, 1, 2]))
    assert torch.equal(mixed[2::3], model.sample(6, seed=1, cond=2)[2::3])


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


# Samples


def naive(model: ImageGPT, n: int, key: NoiseKey, network: int = 0) -> Tensor:
    """A full pass over a network for every token."""
    return model._value(model.sampler(network).naive(n, key=key))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@every_model
def test_A9_cached_samples_are_the_naive_ones(name: str, dtype: torch.dtype) -> None:
    """Each is drawn by one of the networks, by all of them in turn."""
    model = small(name).to(dtype)
    drawn = model.sample(30, seed=5, first_sample=7)
    assert drawn.flatten(1).unique(dim=0).shape[0] > 5
    networks = range(len(model.networks))
    same = torch.stack([(naive(model, 30, NoiseKey(5, 7), place) == drawn).flatten(1).all(1) for place in networks])
    assert same.any(0).all()
    assert same.any(1).all()
    if len(networks) > 1:
        assert not same.all(1).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("radius", [None, 3], ids=["full", "local"])
def test_A9_cached_samples_of_a_larger_picture_with_classes(radius: int | None, backend: str) -> None:
    options = {"image_shape": (1, 11, 9), "width": 32, "depth": 3, "levels": 5, "num_classes": 3}
    model = small("several", noise=0.1, attention_radius=radius, **options).float()
    key, classes = NoiseKey(4, 100), torch.tensor([0, 2, 1])
    with use_backend(backend):
        expected = model.sampler().naive(3, key=key, condition=classes)
        assert torch.equal(model.sampler()(3, key=key, condition=classes), expected)
        assert torch.equal(model.sample(3, seed=4, cond=classes, first_sample=100), model._value(expected))
    assert expected.flatten(1).unique(dim=0).shape[0] == 3 and expected.unique().numel() == 5


@every_model
def test_the_same_seed_gives_the_same_samples_whatever_the_batch(name: str) -> None:
    model = small(name)
    whole = model.sample(20, seed=5)
    assert torch.equal(model.sample(20, seed=5, batch_size=7), whole)
    parts = [model.sample(3, seed=5), model.sample(17, seed=5, first_sample=3)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(model.sample(20, seed=6), whole)


@pytest.mark.parametrize("levels", [2, 5])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_the_noise_is_that_of_the_incremental_sampler(channels: int, levels: int) -> None:
    """Element ``4 ceil(channels / 4) p + c`` of a sample for channel c of pixel p."""
    model = small("rotary", image_shape=(channels, 2, 3), levels=levels)
    network = model.networks[0]
    with torch.no_grad():
        network.head.weight.zero_()  # all tokens have the same distribution
    numbers = network.head.bias.detach()
    like = torch.empty(4, 6 * 4 * math.ceil(channels / 4))
    uniform = noise_like(like, NoiseKey(9, 50), distribution="uniform")
    logits = numbers if levels > 2 else torch.stack([torch.zeros(()), numbers[0]])
    drawn = model.sampler()(4, key=NoiseKey(9, 50)).flatten(2)
    for pixel, channel in itertools.product(range(6), range(channels)):
        u = uniform[:, 4 * math.ceil(channels / 4) * pixel + channel]
        expected = categorical_sample(logits.expand(4, -1), u.double())
        assert torch.equal(drawn[:, channel, pixel], expected)


@pytest.mark.parametrize("name", ["several", "colour"])
def test_A9_every_token_is_computed_once(name: str) -> None:
    """Generation is linear in the tokens, but for what attention reads; known ones at the beginning take one pass."""
    model = small(name)
    network, lengths = model.networks[0], []
    network.blocks[-1].mlp.register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
    whole = model.sample(5, seed=2)
    assert lengths == [1] * network.tokens
    lengths.clear()
    known = torch.zeros(model.sample_shape)
    known.flatten(1)[:, :1] = 1  # the first pixel
    assert torch.equal(model.sample(5, seed=2, known=whole, mask=known), whole)
    first = network.image_shape[0]
    assert lengths == [first + 1] + [1] * (network.tokens - first - 1)
    lengths.clear()
    assert torch.equal(model.sample(5, seed=3, known=whole, mask=torch.ones(())), whole)
    assert lengths == []
    lengths.clear()
    naive(model, 5, NoiseKey(2))
    assert lengths == [network.tokens] * network.tokens


def test_sampling_leaves_the_mode_and_drops_nothing() -> None:
    model = small("several", dropout=0.5).train()
    drawn = model.sampler()(20, key=NoiseKey(1))
    assert model.networks[0].training
    assert torch.equal(drawn, model.eval().sampler()(20, key=NoiseKey(1)))
    assert not model.networks[0].training
    x = model._value(drawn)
    model.train()
    assert torch.equal(model.log_prob(x), model.log_prob(x))
    assert not torch.equal(model.loss(x), model.loss(x)), "in training, features are dropped"


# Completions


@every_model
def test_completion_keeps_what_is_known_and_draws_the_rest(name: str) -> None:
    model = small(name)
    whole = model.sample(40, seed=2)
    mask = torch.zeros(model.sample_shape)
    pixels = mask.view(model.sample_shape[0], -1)
    pixels[:, : pixels.shape[1] // 2] = 1
    known = torch.where(mask.bool(), whole, float("nan"))
    other = model.sample(40, seed=3, known=known, mask=mask)
    assert torch.equal(other * mask, whole * mask)
    assert not torch.equal(other, whole)
    again = model.sample(40, seed=2, known=known, mask=mask)
    same = (again == whole).flatten(1).all(1)
    assert same.all() if len(model.networks) == 1 else same.any(), "the same noise for the rest, by the same network"
    few = model.sample(10, seed=3, known=known[:10], mask=mask.bool().expand(10, *mask.shape), batch_size=4)
    assert torch.equal(few, other[:10])
    late = 1 - mask
    drawn = model.sample(40, seed=3, known=whole, mask=late)
    assert torch.equal(drawn * late, whole * late)
    assert not torch.equal(drawn, whole)


@pytest.mark.parametrize(
    ("name", "options"),
    [("several", {}), ("local", {"num_classes": 2}), ("colour", {}), ("networks", {"noise": 0.8})],
    ids=str,
)
def test_completions_have_the_conditional_probabilities(name: str, options: dict[str, object]) -> None:
    """Given the beginning in raster order, the rest has its exact conditional distribution, of several networks too."""
    model, n = small(name, **options), 4000
    x = every_sample(model)
    first = x[len(x) // 3]
    mask = torch.zeros(model.sample_shape)
    mask.view(model.sample_shape[0], -1)[:, 0] = 1  # the first pixel
    fits = ((x == first) | (mask == 0)).flatten(1).all(1)
    cond = torch.ones(len(x), dtype=torch.long) if model.conditional else None
    with torch.no_grad():
        expected = model.log_prob(x, cond).exp() * fits
    expected /= expected.sum()
    drawn = model.sample(n, seed=1, cond=None if cond is None else 1, known=first, mask=mask)
    found = torch.bincount(number(model, drawn), minlength=len(x)) / n
    deviation = (2 / math.pi * expected * (1 - expected) / n).sqrt().sum()
    assert float((found - expected).abs().sum()) < 1.25 * float(deviation)


# Training, saving, command line


@pytest.mark.parametrize("name", ["several", "sinusoidal", "colour", "learned_colour"])
def test_every_parameter_is_trained(name: str) -> None:
    model = small(name, num_classes=2).train()
    x = torch.randint(0, model.levels, (200, *model.sample_shape)).double() * (2 / (model.levels - 1)) - 1
    model.loss(x, torch.arange(len(x)) % 2).backward()
    unused = [key for key, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert not unused


def test_a_short_training_beats_independent_pixels() -> None:
    """Independent Bernoulli pixels have 24.6 nats an image."""
    data = digits(2)
    torch.manual_seed(0)
    model = create_model("image_gpt", width=16, depth=2, heads=2, networks=1)
    settings = {**model.default_settings, "steps": 250, "warmup": 20, "lr": 1e-2, "ema": 0.9}
    trainer = Trainer(model, data, Settings(**settings))
    trainer.run(progress=False)
    with torch.no_grad():
        nats = -float(trainer.averaged_model.log_prob(data.validation.x).mean())
    assert 14 < nats < 20.5


@every_model
def test_save_and_load(name: str, tmp_path: pathlib.Path) -> None:
    model = small(name, num_classes=2)
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert type(loaded) is ImageGPT
    assert loaded.config == model.config
    x, cond = every_sample(model)[:50], torch.arange(50) % 2
    assert torch.equal(loaded.log_prob(x, cond), model.log_prob(x, cond))
    drawn = model.sample(50, seed=1, cond=cond)
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.sample(50, seed=1, cond=cond), drawn)


def test_cli(tmp_path: pathlib.Path) -> None:
    assert "image_gpt" in list_models()
    tiny = {"width": 8, "depth": 1, "heads": 2, "networks": 2, "num_classes": 10, "positions": "sinusoidal"}
    options = [text for name, value in tiny.items() for text in ("--set", f"{name}={value}")]
    out = tmp_path / "run"
    common = ("--quiet", "--device", "cpu")
    status, text = run("train", "image_gpt", "--out", out, "--steps", 3, "--batch-size", 100, *common, *options)
    assert status == 0, text
    assert text.startswith("step 3 of 3, validation loss")
    status, text = run("sample", "--from", out, "-n", 3, "--out", tmp_path / "s.png", "--device", "cpu")
    assert status == 0, text
    assert (tmp_path / "s.png").exists()
    status, text = run("evaluate", "--from", out, "--device", "cpu")
    assert status == 0, text
    assert text.startswith("log-likelihood, validation set, mean of 200 samples: nats -")
    status, text = run("train", "image_gpt", "--out", out, "--resume", "--steps", 4, *common)
    assert (status, text.split(",")[0]) == (0, "step 4 of 4"), text


def test_default_settings_and_options_suit_each_other(tmp_path: pathlib.Path) -> None:
    """The command line's defaults for the black and white digits, for one step."""
    out = tmp_path / "run"
    status, text = run("train", "image_gpt", "--out", out, "--steps", 1, "--quiet", "--device", "cpu")
    assert status == 0, text
    assert from_pretrained(out).levels == 2
    Settings(**ImageGPT.default_settings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("levels", [2, 17, 256])
def test_samples_of_few_digits_lie_on_the_levels(levels: int, dtype: torch.dtype) -> None:
    model = small("several", image_shape=(1, 4, 4), levels=levels).to(dtype)
    x = model.sample(20, seed=1)
    assert x.dtype == dtype
    assert model.log_prob(x).isfinite().all()
    assert torch.equal(model.sample(20, seed=2, known=x, mask=torch.ones(())), x)
    level = ((x.double() + 1) / 2 * (levels - 1)).round()
    assert torch.equal(model.networks[0]._level(x).double(), level)
    assert level.unique().numel() > min(levels, 50) // 2


def test_the_network_compiles_and_the_model_still_samples() -> None:
    model = small("learned", image_shape=(1, 3, 4), positions="sinusoidal+rotary", depth=1).float()
    network = model.networks[0]
    args = [[torch.randint(0, 2, (batch, 1, 3, 4)).float() * 2 - 1] for batch in (5, 7)]
    assert_compiles(network, *args, backend="aot_eager")
    expected = model.sample(6, seed=1)
    model.networks[0] = torch.compile(network, backend="aot_eager")
    assert torch.equal(model.sample(6, seed=1), expected)
    torch._dynamo.reset()


def test_the_meta_device_and_inference_mode_leave_nothing_behind() -> None:
    """Tables are made where they are needed: not without values, and not as tensors that gradients refuse."""
    options = {**TINY, "image_shape": (1, 5, 3), "positions": "sinusoidal+rotary"}
    full = create_model("image_gpt", **options).eval()
    with torch.device("meta"):
        empty = create_model("image_gpt", **options)
    empty = empty.to_empty(device="cpu").eval()
    empty.load_state_dict(full.state_dict())
    with torch.inference_mode():
        x = full.sample(3)
    x = x.clone()
    full.loss(x).backward()
    assert torch.equal(empty.log_prob(x), full.log_prob(x))


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
