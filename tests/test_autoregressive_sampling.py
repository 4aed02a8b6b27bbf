"""Completion of images by autoregressive models, samplers that are kept, and samples of few digits."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from dgm_kernels import NoiseKey
from dgm_kernels.masked_conv import generate
from tests.test_autoregressive import SMALL, every_sample, number, small


@pytest.mark.parametrize("name", SMALL)
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
    one = model.sample(5, seed=3, known=whole[0], mask=torch.ones(()))
    assert torch.equal(one, whole[:1].expand_as(one)), "all is known"


COMPLETED = {
    "pixelcnn": {},
    "made_natural": {},
    "wavenet": {},
    "gated_pixelcnn_colour": {},
    "pixelcnn_networks": {"noise": 0.8},
    "fvsbn": {"num_classes": 2},
    "pixelcnn_pp": {"networks": 3},
    "wavenet_stereo": {"networks": 2, "num_classes": 2, "noise": 0.8},
}


@pytest.mark.parametrize("name", COMPLETED)
def test_completions_have_the_conditional_probabilities(name: str) -> None:
    """Given the beginning in raster order, the rest has its exact conditional distribution, of several networks too."""
    model, n = small(name, **COMPLETED[name]), 4000
    x = every_sample(model)
    first = x[number(model, x).argsort()][len(x) // 3]
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


def test_the_known_weigh_networks_of_any_order() -> None:
    """Which of the networks' completions is taken depends on known numbers that come late in their orders."""
    model, n = small("made", noise=1.0, networks=8), 4000
    x = every_sample(model)
    mask = torch.zeros(model.sample_shape)
    mask[:, 1] = 1
    first = x[200]
    fits = ((x == first) | (mask == 0)).flatten(1).all(1)
    with torch.no_grad():
        exact = model.log_prob(x).exp() * fits
    exact /= exact.sum()

    def distance(drawn: Tensor) -> float:
        return float((torch.bincount(number(model, drawn), minlength=len(x)) / len(drawn) - exact).abs().sum())

    given, known = model._given(first, mask, n)
    each = [model.sampler(k)(n // 8, key=NoiseKey(k), given=given[0], known=known[0]) for k in range(8)]
    alike = model._from_network(model._value(torch.cat(each)))
    assert distance(model.sample(n, seed=1, known=first, mask=mask)) < 0.7 * distance(alike)


class Traces:
    """Counts what is traced."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, trace = 0, generate.Trace

        def counted(*args: Any, **options: Any) -> object:
            self.count += 1
            return trace(*args, **options)

        monkeypatch.setattr(generate, "Trace", counted)


def test_a_network_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, traces = small("pixelcnn_networks"), Traces(monkeypatch)
    first = model.sample(40, seed=1)
    assert traces.count == len(model.networks)
    assert torch.equal(model.sample(40, seed=1, batch_size=7), first)
    model.sample(10, known=first[0], mask=torch.ones(2, 3))
    assert traces.count == len(model.networks)


def test_what_is_kept_to_sample_follows_the_weights_and_belongs_to_no_copy() -> None:
    model, other = small("pixelcnn_networks"), small("pixelcnn_networks", noise=0.9)
    before, names = model.sample(40, seed=1), list(model.state_dict())
    wanted = other.sample(40, seed=1)
    assert not torch.equal(before, wanted)
    assert list(model.state_dict()) == names
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not made._samplers
        assert torch.equal(made.sample(40, seed=1), before)
        made.load_state_dict(other.state_dict())
        assert torch.equal(made.sample(40, seed=1), wanted)
    assert torch.equal(model.sample(40, seed=1), before), "the copies have weights of their own"
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.sample(40, seed=1), wanted)
    assert model.float().sample(40, seed=1).dtype == torch.float32
    model.double().networks = small("pixelcnn_networks").networks
    assert torch.equal(model.sample(40, seed=1), before), "other networks"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("levels", [2, 17, 256])
def test_samples_of_few_digits_lie_on_the_levels(levels: int, dtype: torch.dtype) -> None:
    model = small("pixelcnn", image_shape=(1, 4, 4), levels=levels).to(dtype)
    x = model.sample(20, seed=1)
    assert x.dtype == dtype
    assert model.log_prob(x).isfinite().all()
    assert torch.equal(model.sample(20, seed=2, known=x, mask=torch.ones(())), x)
    level = ((x.double() + 1) / 2 * (levels - 1)).round()
    assert torch.equal(model._level(x).double(), level)
    assert level.unique().numel() > min(levels, 50) // 2
    with pytest.raises(ValueError, match=f"x must lie on {levels} equally spaced levels"):
        model.log_prob(x + 0.6 / (levels - 1) if levels < 256 else x * 2)


def test_bad_completions() -> None:
    model = small("pixelcnn")
    known, mask = every_sample(model)[:4], torch.ones(3, 3)
    for options in ({"known": known}, {"mask": mask}):
        with pytest.raises(ValueError, match="known and mask must be given together"):
            model.sample(4, **options)
    with pytest.raises(ValueError, match=r"mask must broadcast to shape \(4, 1, 3, 3\), got \(3, 2\)"):
        model.sample(4, known=known, mask=mask[:, :2])
    for name, shape in (("known", (4, 3, 3)), ("mask", (1, 4, 3, 3)), ("known", (4, 1, 1, 3, 3))):
        options = {"known": known, "mask": mask, name: torch.ones(shape)}
        got = ", ".join(map(str, shape))
        with pytest.raises(ValueError, match=rf"{name} must broadcast to shape \(4, 1, 3, 3\), got \({got}\)"):
            model.sample(4, **options)
    with pytest.raises(TypeError, match="known must be a tensor, got float"):
        model.sample(4, known=1.0, mask=mask)
    with pytest.raises(ValueError, match=r"known must lie on 2 equally spaced levels in \[-1, 1\]"):
        model.sample(4, known=0.3 * known, mask=mask)
    with pytest.raises(TypeError, match="sample of pixelcnn has no option 'given'; its options are known, mask"):
        model.sample(4, given=known)
