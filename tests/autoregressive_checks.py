"""What the convolutional and dense autoregressive families and the transformer have to keep alike, as assertions.

Models are small enough to visit every sample that there is.
"""

from __future__ import annotations

import itertools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dgm_kernels import NoiseKey
from dgm_models import from_pretrained, list_models
from dgm_models.data import digits
from dgm_models.train import Settings, Trainer
from tests.command_line import run

Model = Any  # one of dgm_models.autoregressive


def every_sample(model: Model) -> Tensor:
    """All samples there are, ``[levels ** numbers, *image_shape]``."""
    grid = torch.linspace(-1, 1, model.levels, dtype=torch.float64)
    return torch.cartesian_prod(*[grid] * math.prod(model.sample_shape)).view(-1, *model.sample_shape)


def number(model: Model, x: Tensor) -> Tensor:
    """Which of :func:`every_sample` each x is."""
    level = ((x.flatten(1) + 1) / 2 * (model.levels - 1)).round().long()
    weights = model.levels ** torch.arange(level.shape[1] - 1, -1, -1)
    return (level * weights).sum(1)


# Densities


def check_probabilities_sum_to_one(model: Model, tolerance: float) -> None:
    with torch.no_grad():
        probability = model.log_prob(every_sample(model)).exp()
    assert float(probability.sum()) == pytest.approx(1.0, abs=tolerance)
    assert float(probability.max() / probability.min()) > 2, "they are not all alike"


def check_frequencies(model: Model, drawn: Tensor, expected: Tensor, margin: float) -> None:
    """Those of the samples are the expected ones of :func:`every_sample`.

    The sum of their deviations is at most ``margin`` times that of the cells' expected absolute deviations of a
    multinomial.
    """
    n = len(drawn)
    found = torch.bincount(number(model, drawn), minlength=len(expected)) / n
    deviation = (2 / math.pi * expected * (1 - expected) / n).sqrt().sum()
    assert float((found - expected).abs().sum()) < margin * float(deviation)


def check_samples_have_the_probabilities(model: Model) -> None:
    with torch.no_grad():
        expected = model.log_prob(every_sample(model)).exp()
    x = model.sample(4000, seed=3)
    assert x.shape == (4000, *model.sample_shape)
    check_frequencies(model, x, expected, 1.2)


def check_classes_have_distributions_of_their_own(model: Model) -> None:
    """Of a model with three classes."""
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


def check_loss_is_the_negative_log_probability(model: Model) -> None:
    """In nats."""
    x = every_sample(model)[5:25]
    parts = model.loss_parts(x)
    assert list(parts) == ["nll"]
    torch.testing.assert_close(parts["nll"], -model.log_prob(x).mean())
    assert torch.equal(model.loss(x), parts["nll"])
    torch.testing.assert_close(model.elbo(x, 3), model.log_prob(x))
    bits = model.bits_per_dim(model.log_prob(x))
    torch.testing.assert_close(bits, -model.log_prob(x) / math.log(2) / math.prod(model.sample_shape))


def check_every_parameter_is_trained(model: Model) -> None:
    x = torch.randint(0, model.levels, (200, *model.sample_shape)).double() * (2 / (model.levels - 1)) - 1
    model.train().loss(x, torch.arange(len(x)) % 2 if model.conditional else None).backward()
    unused = [key for key, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert not unused


def check_a_short_training_beats_independent_pixels(model: Model, steps: int, nats: float) -> None:
    """Independent Bernoulli pixels have 24.6 nats an image."""
    data = digits(2)
    settings = {**model.default_settings, "steps": steps, "warmup": 20, "lr": 1e-2, "ema": 0.9}
    trainer = Trainer(model, data, Settings(**settings))
    trainer.run(progress=False)
    with torch.no_grad():
        found = -float(trainer.averaged_model.log_prob(data.validation.x).mean())
    assert 14 < found < nats


# Samples and completions


def check_cached_samples_are_the_naive_ones(
    model: Model, naive: Callable[[Model, int, NoiseKey, int], Tensor], different: int
) -> None:
    """Each is drawn by one of the networks, by all of them in turn; there are more than ``different`` among them."""
    drawn = model.sample(30, seed=5, first_sample=7)
    assert drawn.flatten(1).unique(dim=0).shape[0] > different
    networks = range(len(model.networks))
    same = torch.stack([(naive(model, 30, NoiseKey(5, 7), place) == drawn).flatten(1).all(1) for place in networks])
    assert same.any(0).all()
    assert same.any(1).all()
    if len(networks) > 1:
        assert not same.all(1).any()


def check_the_batch_does_not_matter(model: Model) -> None:
    """The same seed gives the same samples, whatever the batch."""
    whole = model.sample(20, seed=5)
    assert torch.equal(model.sample(20, seed=5, batch_size=7), whole)
    parts = [model.sample(3, seed=5), model.sample(17, seed=5, first_sample=3)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(model.sample(20, seed=6), whole)


def first_half(model: Model) -> Tensor:
    """1 in the first half of the pixels, 0 in the others."""
    mask = torch.zeros(model.sample_shape)
    pixels = mask.view(model.sample_shape[0], -1)
    pixels[:, : pixels.shape[1] // 2] = 1
    return mask


def check_completion_keeps_what_is_known(model: Model) -> None:
    """And draws the rest; what is not known may be NaN."""
    whole, mask = model.sample(40, seed=2), first_half(model)
    known = torch.where(mask.bool(), whole, float("nan"))
    other = model.sample(40, seed=3, known=known, mask=mask)
    assert torch.equal(other * mask, whole * mask)
    assert not torch.equal(other, whole)
    again = model.sample(40, seed=2, known=known, mask=mask)
    same = (again == whole).flatten(1).all(1)
    assert same.all() if len(model.networks) == 1 else same.any(), "the same noise for the rest, by the same network"
    few = model.sample(10, seed=3, known=known[:10], mask=mask.bool().expand(10, *mask.shape), batch_size=4)
    assert torch.equal(few, other[:10])
    one = model.sample(5, seed=3, known=whole[0], mask=torch.ones(()))
    assert torch.equal(one, whole[:1].expand_as(one)), "all is known"


def check_completions_have_the_conditional_probabilities(model: Model, first: Tensor) -> None:
    """Given the first pixel of ``first``, the rest has its exact conditional distribution."""
    x = every_sample(model)
    mask = torch.zeros(model.sample_shape)
    mask.view(model.sample_shape[0], -1)[:, 0] = 1  # the first pixel
    fits = ((x == first) | (mask == 0)).flatten(1).all(1)
    cond = torch.ones(len(x), dtype=torch.long) if model.conditional else None
    with torch.no_grad():
        expected = model.log_prob(x, cond).exp() * fits
    drawn = model.sample(4000, seed=1, cond=None if cond is None else 1, known=first, mask=mask)
    check_frequencies(model, drawn, expected / expected.sum(), 1.25)


def check_samples_lie_on_the_levels(model: Model, level_of: Callable[[Tensor], Tensor]) -> None:
    """Of a model in a dtype of few digits; ``level_of`` is how the model reads them."""
    x = model.sample(20, seed=1)
    assert x.dtype == next(model.parameters()).dtype
    assert model.log_prob(x).isfinite().all()
    assert torch.equal(model.sample(20, seed=2, known=x, mask=torch.ones(())), x)
    level = ((x.double() + 1) / 2 * (model.levels - 1)).round()
    assert torch.equal(level_of(x).double(), level)
    assert level.unique().numel() > min(model.levels, 50) // 2


# Saving, command line


def check_save_and_load(model: Model, folder: pathlib.Path) -> Model:
    """The saved model is the model; returned is what was loaded."""
    model.save_pretrained(folder)
    loaded = from_pretrained(folder)
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    x = every_sample(model)[:50]
    cond = torch.arange(50) % 2 if model.conditional else None
    assert torch.equal(loaded.log_prob(x, cond), model.log_prob(x, cond))
    assert torch.equal(loaded.sample(50, seed=1, cond=cond), model.sample(50, seed=1, cond=cond))
    return loaded


def check_command_line(family: str, config: dict[str, object], folder: pathlib.Path) -> None:
    """Training, samples, evaluation, and training that goes on."""
    assert family in list_models()
    options = [text for name, value in config.items() for text in ("--set", f"{name}={value}")]
    out, common = folder / "run", ("--quiet", "--device", "cpu")
    status, text = run("train", family, "--out", out, "--steps", 3, "--batch-size", 100, *common, *options)
    assert status == 0, text
    assert text.startswith("step 3 of 3, validation loss")
    status, text = run("sample", "--from", out, "-n", 3, "--out", folder / "s.png", "--device", "cpu")
    assert status == 0, text
    assert (folder / "s.png").exists()
    status, text = run("evaluate", "--from", out, "--device", "cpu")
    assert status == 0, text
    assert text.startswith("log-likelihood, validation set, mean of 200 samples: nats -")
    status, text = run("train", family, "--out", out, "--resume", "--steps", 4, *common)
    assert (status, text.split(",")[0]) == (0, "step 4 of 4"), text
