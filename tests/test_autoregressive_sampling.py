"""Completion of images by autoregressive models, samplers that are kept, and samples of few digits."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from dgm_kernels import NoiseKey
from dgm_kernels.masked_conv import generate
from tests import autoregressive_checks as checks
from tests.autoregressive_checks import every_sample, number
from tests.test_autoregressive import SMALL, small


@pytest.mark.parametrize("name", SMALL)
def test_completion_keeps_what_is_known_and_draws_the_rest(name: str) -> None:
    checks.check_completion_keeps_what_is_known(small(name))


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
    model = small(name, **COMPLETED[name])
    x = every_sample(model)
    checks.check_completions_have_the_conditional_probabilities(model, x[number(model, x).argsort()][len(x) // 3])


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
    checks.check_samples_lie_on_the_levels(model, model._level)
    x = model.sample(20, seed=1)
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
