"""Rows D2, D3, D4, D6, D7, D9 and D10 of docs/models.md: what is particular to each family of flows."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable

import matplotlib.image
import pytest
import torch
from torch import Tensor, nn

from dgm_kernels import NoiseKey
from dgm_models import create_model, from_pretrained, list_models
from dgm_models.__main__ import main
from dgm_models.data import digits
from dgm_models.flows import check_invertible
from dgm_models.flows.layers import (
    AffineAutoregressive,
    AffineCoupling,
    SplineAutoregressive,
    SplineCoupling,
    TriangularLinear,
)
from dgm_models.train import Settings, Trainer
from tests import gradients
from tests.model_checks import check_backends_agree
from tests.test_flows import SMALL, jacobian, new, normal, small

FAMILIES = ("invertible_mlp", "maf", "nice", "realnvp", "spline")
NETWORK = {"hidden": (16,)}


def perturbed(layer: nn.Module, noise: float = 0.2) -> nn.Module:
    """The layer in float64 with parameters that are not those it starts with."""
    layer = layer.double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=noise)
    return layer


# D2: invertible MLP


@pytest.mark.parametrize("lower", [True, False])
def test_D2_logdet_is_the_diagonal_and_the_slopes(lower: bool) -> None:
    layer, x = perturbed(TriangularLinear(5, lower, 0.3)), normal(20, 5)
    y, logdet = layer(x)
    weight = layer.weight.detach()
    assert torch.equal(weight, weight.tril() if lower else weight.triu())
    h = x @ weight.T + layer.bias
    torch.testing.assert_close(y, torch.where(h > 0, h, 0.3 * h))
    expected = weight.diagonal().abs().log().sum() + math.log(0.3) * (h < 0).sum(1).double()
    torch.testing.assert_close(logdet, expected)
    torch.testing.assert_close(logdet, torch.linalg.slogdet(jacobian(lambda x: layer(x)[0], x)).logabsdet)
    back, inverse_logdet = layer.inverse(y)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_logdet, -logdet)


def test_D2_slope_0_is_refused() -> None:
    """There would be no inverse."""
    with pytest.raises(ValueError, match=r"negative_slope must be a positive finite number, got 0.0"):
        create_model("invertible_mlp", image_shape=(4,), levels=None, negative_slope=0.0)


def test_D2_the_last_layer_has_no_activation() -> None:
    slopes = [getattr(layer, "negative_slope", None) for layer in small("invertible_mlp").flow.layers]
    assert slopes == [None, 0.8, 0.8, 0.8, 1.0]


# D3: NICE


def test_D3_additive_couplings_preserve_volume() -> None:
    layer, x = perturbed(AffineCoupling(6, False, None, **NETWORK)), normal(10, 6)
    y, logdet = layer(x)
    assert torch.equal(logdet, torch.zeros_like(logdet))
    assert (y - x).abs().max() > 0.1
    determinant = torch.linalg.det(jacobian(lambda x: layer(x)[0], x))
    torch.testing.assert_close(determinant, torch.ones_like(determinant))


def test_D3_the_volume_of_nice_is_that_of_its_two_scales() -> None:
    model = small("nice")
    _, logdet = model.transform(normal(10, 6))
    first, *_, last = model.flow.layers
    torch.testing.assert_close(logdet, (first.log_scale.sum() + last.log_scale.sum()).expand(10))


# D4: RealNVP


@pytest.mark.parametrize("make", [AffineCoupling, SplineCoupling])
@pytest.mark.parametrize("flipped", [False, True])
def test_D4_D7_a_coupling_transforms_one_half_by_the_other(make: type[nn.Module], flipped: bool) -> None:
    options = {"scale_map": "tanh"} if make is AffineCoupling else {"bins": 4, "bound": 3.0}
    layer, x = perturbed(make(6, flipped, **options, **NETWORK)), normal(10, 6)
    kept, moved = (slice(3, 6), slice(0, 3)) if flipped else (slice(0, 3), slice(3, 6))
    y, _ = layer(x)
    assert torch.equal(y[:, kept], x[:, kept])
    assert ((y - x)[:, moved].abs().amax(0) > 1e-3).all()
    full = jacobian(lambda x: layer(x)[0], x)
    inner = full[:, moved, moved]
    assert torch.equal(inner, torch.diag_embed(inner.diagonal(dim1=1, dim2=2))), "each by itself, given the other half"
    assert (full[:, moved, kept].abs().amax((1, 2)) > 1e-3).all()
    torch.testing.assert_close(layer.inverse(y)[0], x)


def test_D4_every_pixel_is_transformed_and_the_halves_change() -> None:
    model = small("realnvp", image_shape=(16,), depth=4)
    orders = [layer.permutation for layer in model.flow.layers if hasattr(layer, "permutation")]
    assert len(orders) == 2
    assert not torch.equal(*orders)
    x = normal(10, 16)
    assert (torch.linalg.matrix_rank(jacobian(lambda x: model.transform(x)[0], x)) == 16).all()
    assert (jacobian(lambda x: model.transform(x)[0], x) != 0).any(0).all(), "every output reads every input"


@pytest.mark.parametrize("name", ["maf", "nice", "realnvp", "spline"])
def test_D3_D4_D6_D7_learn_more_than_a_gaussian_of_the_digits_in_seconds(name: str) -> None:
    """A full Gaussian has 2.970 bits a pixel on the test part, a mixture of 30 diagonal ones 2.634."""
    data = digits()
    torch.manual_seed(0)
    model = create_model(name, hidden=(128,))
    trainer = Trainer(model, data, Settings(**{**model.default_settings, "steps": 250, "warmup": 20}))
    trainer.run(progress=False)
    model = trainer.averaged_model
    with torch.no_grad():
        bits = float(model.bits_per_dim(model.log_prob(data.validation.x)).mean())
    assert bits < 2.634


# D6: MAF and IAF


@pytest.mark.parametrize("make", [AffineAutoregressive, SplineAutoregressive])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("hidden", [(11,), (11, 17)])
def test_D6_D7_autoregressive_layers_read_only_what_comes_before(
    make: type[nn.Module], backwards: bool, hidden: tuple[int, ...]
) -> None:
    options = {"scale_map": "tanh"} if make is AffineAutoregressive else {"bins": 4, "bound": 3.0}
    layer, x = perturbed(make(5, backwards, **options, hidden=hidden)), normal(10, 5)
    full = jacobian(lambda x: layer(x)[0], x)
    full = full.transpose(1, 2) if backwards else full
    assert torch.equal(full, full.tril())
    assert full.abs().amax(0)[torch.ones(5, 5).tril().bool()].ne(0).all(), "and all that comes before"


@pytest.mark.parametrize("hidden", [(1,), (3,), (4, 16), (16, 4), (5, 3)])
def test_D6_D7_small_hidden_layers_pass_on_all_that_their_degrees_allow(hidden: tuple[int, ...]) -> None:
    """A layer of n < D - 1 units has n degrees, evenly spaced up to D - 1; wider ones have all of them."""
    features = 9
    made = AffineAutoregressive(features, False, "tanh", hidden=hidden, activation="tanh")
    layer, x = perturbed(made), normal(10, features)
    spaced = {1: [8], 3: [2, 5, 8], 4: [2, 4, 6, 8], 5: [1, 3, 4, 6, 8], 16: [*range(1, 9), *range(1, 9)]}
    degrees = [spaced[size] for size in hidden]
    assert [found.tolist() for found in layer.net.degrees[1:]] == degrees
    expected = torch.eye(features).bool()
    for place in range(1, features + 1):
        reach = max((degree for degree in degrees[-1] if degree < place), default=0)
        for inner in degrees[-2::-1]:
            reach = max((degree for degree in inner if degree <= reach), default=0)
        expected[place - 1, :reach] = True
    assert bool(expected[-1].all()), "the last one reads everything"
    assert torch.equal((jacobian(lambda x: layer(x)[0], x) != 0).any(0), expected)
    torch.testing.assert_close(layer.inverse(layer(x)[0])[0], x)


def test_D6_wide_hidden_layers_have_every_degree_in_turn() -> None:
    net = create_model("maf", image_shape=(5,), levels=None, depth=1, hidden=(4, 7)).flow.layers[1].net
    assert [degrees.tolist() for degrees in net.degrees[1:]] == [[1, 2, 3, 4], [1, 2, 3, 4, 1, 2, 3]]


def test_D6_dropout_is_by_default_what_the_direction_allows(tmp_path: pathlib.Path) -> None:
    for fast, expected in (("density", 0.2), ("sampling", 0.0)):
        model = create_model("maf", image_shape=(6,), levels=None, hidden=(8,), fast=fast)
        model.save_pretrained(tmp_path / fast)
        for each in (model, from_pretrained(tmp_path / fast)):
            assert {module.p for module in each.modules() if isinstance(module, nn.Dropout)} == {expected}
            assert each.config["dropout"] is None
    assert create_model("maf", fast="sampling", dropout=0).config["dropout"] == 0


@pytest.mark.parametrize("name", ["maf", "spline"])
def test_D6_D7_samples_are_those_of_the_search_feature_by_feature(name: str) -> None:
    """The inverse layer by layer: D passes, of which the i-th makes the i-th feature right."""
    model, z = small(name), normal(7, 6)
    x = z
    for layer in reversed(model.flow.layers):
        x = by_passes(layer, x) if hasattr(layer, "net") else layer.inverse(x)[0]
    torch.testing.assert_close(model.invert(z), x, rtol=1e-8, atol=1e-8)


def by_passes(layer: nn.Module, z: Tensor) -> Tensor:
    """Bisection of every feature in its order; the transforms are monotone."""
    x = torch.zeros_like(z)
    for feature in layer.net.degrees[0].argsort().tolist():
        low, high = torch.full((len(z),), -100.0).double(), torch.full((len(z),), 100.0).double()
        for _ in range(60):
            middle = (low + high) / 2
            x[:, feature] = middle
            below = layer(x)[0][:, feature] < z[:, feature]
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        x[:, feature] = (low + high) / 2
    return x


def test_D6_iaf_is_maf_the_other_way_round() -> None:
    maf, iaf, x = small("maf", depth=1), small("iaf", depth=1, hidden=(24, 24)), normal(9, 6)
    maf.flow.layers[1].load_state_dict(iaf.flow.layers[1].layer.state_dict())
    for model in (maf, iaf):
        for parameter in model.flow.layers[0].parameters():
            nn.init.zeros_(parameter)
    z, logdet = maf.transform(x)
    torch.testing.assert_close(iaf.invert(x), z)
    back, inverse_logdet = iaf.transform(z)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_logdet, -logdet)


def test_D6_iaf_trains() -> None:
    model, x = new("iaf").double(), normal(200, 6) ** 2
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model.loss(x)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3


# D7: neural spline flows


@pytest.mark.parametrize("name", ["spline", "spline_coupling"])
def test_D7_splines_are_the_identity_outside_their_bound(name: str) -> None:
    model = small(name, bound=2.0)
    for parameter in model.flow.layers[0].parameters():
        nn.init.zeros_(parameter)
    x = 3 + normal(10, 6).abs()
    z, logdet = model.transform(x)
    assert torch.equal(z.sort(1).values, x.sort(1).values)
    assert torch.equal(logdet, torch.zeros_like(logdet))


# D9: why a map is no flow


def rank_one(x: Tensor) -> Tensor:
    a = torch.tensor([[1.0, -2.0, 0.5]], dtype=x.dtype)
    return torch.sigmoid(x @ (a.T @ a))


def even_in_x1(x: Tensor) -> Tensor:
    x1, x2, x3 = x.unbind(1)
    return torch.stack([(x3 + x2) ** 3, x1**4 * x2 + x3, torch.exp(x3)], dim=1)


@pytest.mark.parametrize(
    ("fn", "kinds"),
    [
        (rank_one, ["singular", "collision"]),
        (even_in_x1, ["fold", "collision"]),
        (torch.relu, ["singular", "collision"]),
        (lambda x: (x - 1.3) ** 2, ["fold", "collision"]),
        (lambda x: x**3 - x, ["fold", "collision"]),
        (lambda x: x.sort(1).values, ["fold", "collision"]),
        (lambda x: torch.ones_like(x), ["singular", "collision"]),
        (lambda x: x.softmax(1), ["singular", "collision"]),
        (lambda x: x**2 * torch.tensor([1.0, 1.0, 1e-9]), ["fold", "collision"]),
        (lambda x: x[:, :2], ["dimension"]),
        (lambda x: x.sum(1), ["dimension"]),
        (torch.log, ["not finite"]),
        (lambda x: torch.where(x > 0, x.sqrt(), x), ["not finite"]),
    ],
)
def test_D9_the_checker_says_why_with_points_that_show_it(fn: Callable[[Tensor], Tensor], kinds: list[str]) -> None:
    found = {finding.kind: finding for finding in check_invertible(fn, (3,))}
    assert list(found) == kinds
    if "collision" in kinds:
        a, b = (point[None] for point in found["collision"].points)
        assert float((a - b).norm()) > 1e-3
        torch.testing.assert_close(fn(a), fn(b), rtol=1e-9, atol=1e-9)
    if "singular" in kinds:
        (point,) = found["singular"].points
        assert int(torch.linalg.matrix_rank(jacobian(fn, point[None]))[0]) < 3
    if "fold" in kinds:
        a, b = found["fold"].points
        assert float((a - b).norm()) < 1e-9
        assert float(torch.linalg.det(torch.cat([jacobian(fn, a[None]), jacobian(fn, b[None])])).prod()) <= 0


def rotation() -> Tensor:
    return torch.linalg.matrix_exp(torch.tensor([[0.0, 1.0, 2.0], [-1.0, 0.0, 3.0], [-2.0, -3.0, 0.0]]).double())


def test_D9_what_rounds_to_one_point_is_found() -> None:
    found = check_invertible(torch.sigmoid, (3,), scale=40.0)
    assert [finding.kind for finding in found] == ["singular", "collision"]


def test_D9_maps_of_the_batch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"fn must map sample by sample: it makes shape \(\) of 32 samples"):
        check_invertible(torch.sum, (3,))


def test_D9_messages_name_the_reason() -> None:
    singular, _ = check_invertible(rank_one, (3,))
    assert singular.message == "the Jacobian is singular at 32 of 32 random points: it has rank 1 of 3"
    _, collision = check_invertible(even_in_x1, (3,))
    assert collision.message == "maps two points to one (found by negating or swapping elements)"
    a, b = collision.points
    assert torch.equal(a, b * torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64))
    (dimension,) = check_invertible(lambda x: x[:, :2], (3,))
    assert dimension.message == "maps 3 numbers to 2: the Jacobian is not square"
    (slope,) = check_invertible(lambda x: torch.where(x > 0, x.sqrt(), x), (3,))
    assert slope.message == "the Jacobian of a point is not finite"
    assert bool((slope.points[0] < 0).any())


def test_D9_maps_that_are_flows_pass() -> None:
    for fn in (torch.sinh, lambda x: nn.functional.leaky_relu(x, 0.1), lambda x: x.flip(1)):
        assert check_invertible(fn, (3,)) == []
    for fn, scale in (
        (torch.sigmoid, 10.0),
        (torch.tanh, 4.0),
        (torch.exp, 10.0),
        (lambda x: torch.exp(10 * x), 1.0),
        (lambda x: x * torch.tensor([1.0, 1.0, 1e-17]), 1.0),
        (lambda x: x @ rotation().T @ torch.diag(torch.tensor([1.0, 1e-6, 1e-12]).double()) @ rotation(), 1.0),
    ):
        assert check_invertible(fn, (3,), scale=scale) == [], "flat, but no two points become one"
    for name in SMALL:
        assert check_invertible(small(name).transform, (6,), points=8) == [], name


# D10: reversible training


@pytest.mark.parametrize("name", ["realnvp", "nice", "spline_coupling", "invertible_mlp"])
def test_D10_reversible_training_has_the_gradients_of_plain_training(name: str) -> None:
    plain, reversible = (
        new(name, image_shape=(1, 4, 4), levels=17, reversible=flag).double() for flag in (False, True)
    )
    reversible.load_state_dict(plain.state_dict())
    x = digits().train.x[:20, :, 2:6, 2:6].double()
    for model in (plain, reversible):
        model.train().loss(x, key=NoiseKey(3)).backward()
    for (key, expected), found in zip(plain.named_parameters(), reversible.parameters(), strict=True):
        torch.testing.assert_close(
            found.grad, expected.grad, rtol=1e-7, atol=1e-9, msg=lambda text, key=key: key + text
        )


def test_D10_reversible_training_draws_the_same_dropout_again() -> None:
    plain, reversible = (new("realnvp", dropout=0.4, reversible=flag).double() for flag in (False, True))
    reversible.load_state_dict(plain.state_dict())
    for model in (plain, reversible):
        torch.manual_seed(5)
        model.train().loss(normal(20, 6)).backward()
    for expected, found in zip(plain.parameters(), reversible.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-7, atol=1e-9)


def saved_bytes(depth: int, reversible: bool) -> int:
    """Of the activations that autograd keeps for the backward pass."""
    model = new("realnvp", image_shape=(64,), depth=depth, reversible=reversible).train()
    kept, loss = gradients.saved_bytes(
        lambda *_: model.loss(torch.randn(100, 64)), [*model.parameters(), *model.buffers()]
    )
    loss.backward()
    return kept


def test_D10_reversible_training_keeps_as_much_at_any_depth() -> None:
    assert saved_bytes(32, reversible=True) == saved_bytes(2, reversible=True)
    assert saved_bytes(32, reversible=False) > 10 * saved_bytes(2, reversible=False)
    assert saved_bytes(32, reversible=True) < saved_bytes(32, reversible=False) / 30


# Registry and command line


def test_the_families_of_flows_are_registered() -> None:
    assert set(FAMILIES) <= set(list_models())


@pytest.mark.parametrize("name", FAMILIES)
def test_cli_trains_samples_and_evaluates_flows(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    out = tmp_path / "run"
    assert main(["train", name, "--out", str(out), "--steps", "20", "--device", "cpu", "--quiet"]) == 0
    settings = Settings(**{**create_model(name).default_settings, "steps": 20})
    trained = (out / "training.json").read_text()
    assert f'"batch_size": {settings.batch_size}' in trained
    assert f'"weight_decay": {settings.weight_decay}' in trained
    assert matplotlib.image.imread(out / "samples.png")[..., :3].std() > 0.01
    assert (
        main(["sample", "--from", str(out), "-n", "4", "--set", "temperature=0.8", "--out", str(tmp_path / "s.png")])
        == 0
    )
    assert matplotlib.image.imread(tmp_path / "s.png")[..., :3].std() > 0.01
    capsys.readouterr()
    assert main(["evaluate", "--from", str(out)]) == 0
    assert capsys.readouterr().out.startswith("ELBO, validation set, mean of 200 samples: nats -")
    assert main(["profile", name, "--what", "sample", "--batch-size", "2", "--out", str(tmp_path / "p.json")]) == 0


def test_cli_evaluates_a_flow_with_the_draws_and_options_that_it_is_told(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, x = small("nice", image_shape=(1, 8, 8), levels=17), digits().validation.x
    model.save_pretrained(tmp_path)
    found = {}
    for k, seed in ((1, 0), (4, 0), (4, 1)):
        out = tmp_path / "result.json"
        args = ["evaluate", "--from", str(tmp_path), "-k", str(k), "--set", f"seed={seed}", "--out", str(out)]
        assert main([*args, "--device", "cpu"]) == 0
        result = json.loads(out.read_text())
        assert result["quantity"] == "ELBO"
        assert result["nats"] == pytest.approx(float(model.elbo(x, k, seed=seed).mean()), rel=1e-6)
        found[k, seed] = result["nats"]
    assert found[4, 0] > found[1, 0]
    assert found[4, 0] != found[4, 1]
    small("nice", image_shape=(1, 8, 8), levels=None).save_pretrained(tmp_path)
    assert main(["evaluate", "--from", str(tmp_path), "-k", "4"]) == 0
    assert "log-likelihood, validation set" in capsys.readouterr().out
    assert main(["evaluate", "--from", str(tmp_path), "--set", "times=4"]) == 2
    assert "'times'" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "expected"), [("true", True), ("False", False), ("FALSE", False)])
def test_cli_understands_true_and_false(tmp_path: pathlib.Path, text: str, expected: bool) -> None:
    args = ["train", "nice", "--out", str(tmp_path), "--steps", "1", "--quiet", "--device", "cpu"]
    assert main([*args, "--set", f"reversible={text}", "--set", "depth=2"]) == 0
    assert from_pretrained(tmp_path).config["reversible"] is expected


@pytest.mark.parametrize("name", ["realnvp", "nice", "maf", "spline", "spline_coupling"])
def test_native_and_reference_agree(name: str) -> None:
    """On the loss and its gradient, and on samples, in float32."""
    model = small(name, noise=0.05, image_shape=(1, 8, 8), levels=17, level_noise=0.5).float().train()
    x, z = digits().train.x[:50], normal(20, 64).float()
    check_backends_agree(model, x, torch.no_grad()(lambda: model.invert(z)))
