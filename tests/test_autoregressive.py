"""Rows A1, A2, A4, A5, A6, A7 and A10 of docs/models.md: what every autoregressive family has to keep."""

from __future__ import annotations

import math
import pathlib

import pytest
import torch
from torch import Tensor

from dgm_kernels import NoiseKey
from dgm_models import create_model
from dgm_models.autoregressive import Autoregressive
from dgm_models.data import digits
from tests import autoregressive_checks as checks
from tests.autoregressive_checks import every_sample
from tests.command_line import run

FAMILIES = ("fvsbn", "gated_pixelcnn", "made", "pixelcnn", "wavenet")
CONVOLUTION = {"width": 6, "depth": 2, "first_kernel_size": 3, "kernel_size": 3, "networks": 1}
# name: (family, options, shape and levels small enough to visit every sample)
SMALL = {
    "fvsbn": ("fvsbn", {}, (1, 3, 3), 2),
    "fvsbn_colour": ("fvsbn", {}, (3, 1, 3), 2),
    "made": ("made", {"hidden": (12, 10), "networks": 3}, (1, 3, 3), 2),
    "made_levels": ("made", {"hidden": (12,), "networks": 2}, (1, 2, 3), 3),
    "made_natural": ("made", {"hidden": (12,), "order": "natural", "networks": 1}, (3, 1, 2), 3),
    "pixelcnn": ("pixelcnn", CONVOLUTION, (1, 3, 3), 2),
    "pixelcnn_networks": ("pixelcnn", {**CONVOLUTION, "networks": 3}, (1, 2, 3), 2),
    "pixelcnn_colour": ("pixelcnn", CONVOLUTION, (3, 1, 2), 3),
    "gated_pixelcnn": ("gated_pixelcnn", CONVOLUTION, (1, 3, 3), 2),
    "gated_pixelcnn_bernoulli_colour": ("gated_pixelcnn", CONVOLUTION, (3, 3, 1), 2),
    "gated_pixelcnn_colour": ("gated_pixelcnn", CONVOLUTION, (3, 2, 1), 3),
    "gated_pixelcnn_concat_elu": ("gated_pixelcnn", {**CONVOLUTION, "block": "concat_elu"}, (1, 3, 3), 2),
    "pixelcnn_mixture": ("pixelcnn", {**CONVOLUTION, "output": "logistic_mixture"}, (1, 2, 2), 5),
    "pixelcnn_pp": (
        "gated_pixelcnn",
        {**CONVOLUTION, "block": "concat_elu", "output": "logistic_mixture", "mixtures": 2},
        (3, 1, 2),
        3,
    ),
    "wavenet": ("wavenet", {"width": 6, "depth": 3, "cycle": 2}, (1, 6), 3),
    "wavenet_stereo": ("wavenet", {"width": 6, "depth": 3, "cycle": 3}, (2, 3), 3),
    "wavenet_picture": ("wavenet", {"width": 6, "depth": 3, "cycle": 3}, (1, 3, 3), 2),
}
CONDITIONAL = ("fvsbn", "made", "pixelcnn", "gated_pixelcnn", "gated_pixelcnn_concat_elu", "wavenet")


def small(name: str, noise: float = 0.3, **config: object) -> Autoregressive:
    """A small model in float64 with parameters that are not those it starts with."""
    family, options, shape, levels = SMALL[name]
    options = {**options, "image_shape": shape, **config}
    if family != "fvsbn":
        options = {"levels": levels, **options}
    torch.manual_seed(0)
    model = create_model(family, **options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=noise)
    return model.eval()


# Densities


@pytest.mark.parametrize("name", SMALL)
def test_A1_A2_A4_A5_A6_A10_probabilities_sum_to_one(name: str) -> None:
    checks.check_probabilities_sum_to_one(small(name), 1e-6)


@pytest.mark.parametrize("name", SMALL)
def test_A1_A2_A4_A5_A6_A10_samples_have_the_probabilities(name: str) -> None:
    checks.check_samples_have_the_probabilities(small(name))


@pytest.mark.parametrize("name", CONDITIONAL)
def test_classes_have_distributions_of_their_own(name: str) -> None:
    checks.check_classes_have_distributions_of_their_own(small(name, noise=0.5, num_classes=3))


@pytest.mark.parametrize("name", SMALL)
def test_loss_is_the_negative_log_probability_in_nats(name: str) -> None:
    checks.check_loss_is_the_negative_log_probability(small(name))


@pytest.mark.parametrize("name", [*CONDITIONAL, "pixelcnn_pp", "made_levels"])
def test_every_parameter_is_trained(name: str) -> None:
    options = {"num_classes": 2} if name in CONDITIONAL else {}
    if name == "pixelcnn_pp":
        options["image_shape"] = (3, 2, 2)  # in one row of pixels there is nothing above
    checks.check_every_parameter_is_trained(small(name, **options))


def test_probabilities_do_not_depend_on_dropout_or_the_mode() -> None:
    model = small("gated_pixelcnn", dropout=0.5).train()
    x = every_sample(model)[:50]
    assert torch.equal(model.log_prob(x), model.log_prob(x))
    assert model.training
    assert not torch.equal(model.loss(x), model.loss(x)), "in training, features are dropped"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_short_training_beats_independent_pixels(family: str) -> None:
    torch.manual_seed(0)
    options = {"made": {"networks": 2}, "fvsbn": {}, "wavenet": {"width": 16, "depth": 6}}
    options = options.get(family, {"width": 16, "networks": 1})
    model = create_model(family, **options, **({} if family == "fvsbn" else {"levels": 2}))
    checks.check_a_short_training_beats_independent_pixels(model, 150, 21)


# Samples


def naive(model: Autoregressive, n: int, key: NoiseKey, network: int = 0) -> Tensor:
    """A full pass over a network for every number of a sample."""
    level = model.sampler(network).naive(n, key=key)
    return model._from_network((level.double() * (2 / (model.levels - 1)) - 1).to(model.dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_A1_A2_A4_A5_A6_A10_cached_samples_are_the_naive_ones(name: str, dtype: torch.dtype) -> None:
    model = small(name).to(dtype)  # the C++ generator works in float32, PyTorch in float64
    checks.check_cached_samples_are_the_naive_ones(model, naive, 10)


@pytest.mark.parametrize("name", SMALL)
def test_the_same_seed_gives_the_same_samples_whatever_the_batch(name: str) -> None:
    checks.check_the_batch_does_not_matter(small(name))


# Saving, command line


@pytest.mark.parametrize("name", SMALL)
def test_save_and_load(name: str, tmp_path: pathlib.Path) -> None:
    checks.check_save_and_load(small(name, **({"num_classes": 2} if name in CONDITIONAL else {})), tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_cli(family: str, tmp_path: pathlib.Path) -> None:
    configs = {"fvsbn": {}, "made": {"hidden": (16,), "networks": 2, "num_classes": 10}}
    convolution = {"width": 4, "depth": 1, "networks": 1, "num_classes": 10}
    checks.check_command_line(family, configs.get(family, convolution), tmp_path)


@pytest.mark.parametrize("model", ["gated_pixelcnn", "nice"])
def test_cli_takes_no_levels_that_the_digits_do_not_have(model: str, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "run"
    status, text = run("train", model, "--set", "levels=4", "--steps", 1, "--out", out, "--device", "cpu")
    assert (status, out.exists()) == (2, False)
    assert "error: levels must be 2 or 17, got 4" in text


def test_cli_names_the_options_of_elbo(tmp_path: pathlib.Path) -> None:
    create_model("fvsbn").save_pretrained(tmp_path)
    status, text = run("evaluate", "--from", tmp_path, "--set", "known=1", "--device", "cpu")
    assert status == 2
    assert "error: elbo of fvsbn has no option 'known'; it has none" in text


# Bad input


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("pixelcnn", {"image_shape": (8, 8)}, r"image_shape must be \(channels, height, width\), got \(8, 8\)"),
        ("pixelcnn", {"kernel_size": 4}, "kernel_size must be odd, got 4"),
        ("gated_pixelcnn", {"first_kernel_size": 2}, "first_kernel_size must be odd, got 2"),
        ("gated_pixelcnn", {"block": "resnet"}, "block must be one of gated, concat_elu, got 'resnet'"),
        ("gated_pixelcnn", {"image_shape": (3, 8, 8), "width": 32}, "width must be divisible by the 3 colours, got 32"),
        (
            "gated_pixelcnn",
            {"image_shape": (3, 8, 8), "width": 30, "block": "concat_elu"},
            "block must be 'gated' for 3 colours with output 'bernoulli'",
        ),
        ("gated_pixelcnn", {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ("gated_pixelcnn", {"output": "gauss"}, "output must be one of bernoulli, categorical, logistic_mixture"),
        ("gated_pixelcnn", {"output": "bernoulli", "levels": 17}, "levels must be 2 with output 'bernoulli', got 17"),
        ("gated_pixelcnn", {"output": "logistic_mixture", "mixtures": 0}, "mixtures must be a positive int, got 0"),
        (
            "gated_pixelcnn",
            {"output": "logistic_mixture", "image_shape": (2, 8, 8)},
            "image_shape must have 1 or 3 channels with output 'logistic_mixture', got 2",
        ),
        ("gated_pixelcnn", {"levels": 1}, "levels must be at least 2, got 1"),
        ("gated_pixelcnn", {"depth": 0}, "depth must be a positive int, got 0"),
        ("gated_pixelcnn", {"networks": 0}, "networks must be a positive int, got 0"),
        ("gated_pixelcnn", {"num_classes": 0}, "num_classes must be a positive int, got 0"),
        ("made", {"order": "spiral"}, "order must be one of random, natural, got 'spiral'"),
        ("made", {"networks": 0}, "networks must be a positive int, got 0"),
        ("made", {"hidden": (0,)}, r"hidden\[0\] must be a positive int, got 0"),
        ("fvsbn", {"image_shape": (0, 2)}, r"image_shape\[0\] must be a positive int, got 0"),
        ("fvsbn", {"image_shape": ()}, r"image_shape must have at least one size, got \(\)"),
        ("made", {"image_shape": ()}, r"image_shape must have at least one size, got \(\)"),
        ("wavenet", {"image_shape": ()}, r"image_shape must be \(channels, steps\) or \(channels, h.*, got \(\)"),
        ("wavenet", {"image_shape": (9,)}, r"image_shape must be \(channels, steps\) or \(channels, h.*, got \(9,\)"),
        ("wavenet", {"kernel_size": 1}, "kernel_size must be at least 2, got 1"),
        ("wavenet", {"cycle": 0}, "cycle must be a positive int, got 0"),
    ],
)
def test_bad_config(family: str, config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(family, **config)


def test_bad_data_and_classes() -> None:
    model, conditional = small("pixelcnn"), small("pixelcnn", num_classes=3)
    x = every_sample(model)[:4]
    with pytest.raises(ValueError, match=r"x must have shape \(batch, 1, 3, 3\), got \(4, 9\)"):
        model.log_prob(x.flatten(1))
    with pytest.raises(ValueError, match=r"x must lie on 2 equally spaced levels in \[-1, 1\]"):
        model.log_prob(0.5 * x)
    with pytest.raises(ValueError, match="cond must be None: this pixelcnn is not conditional"):
        model.log_prob(x, torch.zeros(4, dtype=torch.long))
    for call in (lambda: conditional.log_prob(x), lambda: conditional.loss(x), lambda: conditional.sample(4)):
        with pytest.raises(ValueError, match=r"cond must be given: this pixelcnn is conditional"):
            call()
    with pytest.raises(ValueError, match=r"cond must be in 0 \.\. 2, got \[0, 1, 2, 3\]"):
        conditional.log_prob(x, torch.arange(4))
    with pytest.raises(ValueError, match=r"cond must be in 0 \.\. 2, got \[-1"):
        conditional.sample(2, cond=-1)
    with pytest.raises(TypeError, match=r"cond must be int64 of shape \[batch\], got torch.float32 of shape \(4,\)"):
        conditional.log_prob(x, torch.zeros(4))


@pytest.mark.parametrize("name", ["pixelcnn", "wavenet", "pixelcnn_mixture"])
def test_loss_takes_only_the_levels(name: str) -> None:
    """Black and white as 0 and 1, the likeliest slip, would train on white alone."""
    model = small(name).train()
    x = every_sample(model)[::3]
    for wrong in ((x + 1) / 2 * 0.9, 2 * x, torch.full_like(x, math.nan)):
        with pytest.raises(ValueError, match=rf"x must lie on {model.levels} equally spaced levels in \[-1, 1\]"):
            model.loss(wrong)
    assert model.loss(x).isfinite()


def test_binarised_digits() -> None:
    grey, binary = digits(), digits(2)
    for part in ("train", "validation", "test"):
        level = (grey.split(part).x + 1) * 8
        assert torch.equal(binary.split(part).x, torch.where(level > 8, 1.0, -1.0))
        assert torch.equal(binary.split(part).label, grey.split(part).label)
    with pytest.raises(ValueError, match="levels must be 2 or 17, got 256"):
        digits(256)
