"""Rows A8 and A9 of docs/models.md: what the transformer over pixels generates from its cache, and completes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from dgm_kernels import NoiseKey, categorical_sample, noise_like, use_backend
from dgm_models import create_model
from dgm_models.autoregressive import ImageGPT
from tests import autoregressive_checks as checks
from tests.autoregressive_checks import every_sample
from tests.cases import BACKENDS
from tests.contract import assert_compiles
from tests.image_gpt_cases import TINY, every_model, small

# Samples


def naive(model: ImageGPT, n: int, key: NoiseKey, network: int = 0) -> Tensor:
    """A full pass over a network for every token."""
    return model._value(model.sampler(network).naive(n, key=key))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@every_model
def test_A9_cached_samples_are_the_naive_ones(name: str, dtype: torch.dtype) -> None:
    checks.check_cached_samples_are_the_naive_ones(small(name).to(dtype), naive, 5)


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
    checks.check_the_batch_does_not_matter(small(name))


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
    checks.check_completion_keeps_what_is_known(model)
    whole, mask = model.sample(40, seed=2), checks.first_half(model)
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
    model = small(name, **options)
    x = every_sample(model)
    checks.check_completions_have_the_conditional_probabilities(model, x[len(x) // 3])


# Dtypes, compilation, devices


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("levels", [2, 17, 256])
def test_samples_of_few_digits_lie_on_the_levels(levels: int, dtype: torch.dtype) -> None:
    model = small("several", image_shape=(1, 4, 4), levels=levels).to(dtype)
    checks.check_samples_lie_on_the_levels(model, model.networks[0]._level)


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
