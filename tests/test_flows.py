"""Row D1 of docs/models.md, for every family of flows: densities, samples, training by exact likelihood."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dgm_kernels
from dgm_kernels import NoiseKey, noise_like
from dgm_models import create_model, from_pretrained
from dgm_models.data import Dataset, Split, digits
from dgm_models.flows import Flow
from dgm_models.train import Settings, Trainer

SMALL = {
    "realnvp": {"depth": 4, "hidden": (24,)},
    "nice": {"depth": 4, "hidden": (24,)},
    "maf": {"depth": 3, "hidden": (24, 24)},
    "iaf": {"depth": 2, "hidden": (24,), "fast": "sampling"},
    "spline": {"kind": "autoregressive", "depth": 2, "hidden": (24,), "bins": 5},
    "spline_coupling": {"kind": "coupling", "depth": 4, "hidden": (24,), "bins": 5},
    "invertible_mlp": {"depth": 4, "negative_slope": 0.8},
}


def new(name: str, **config: object) -> Flow:
    """A small flow as it starts, without dropout."""
    family = {"iaf": "maf", "spline_coupling": "spline"}.get(name, name)
    options = {"image_shape": (6,), "levels": None, **SMALL[name], **config}
    if name != "invertible_mlp":
        options = {"dropout": 0.0, **options}
    return create_model(family, **options)


def small(name: str, noise: float = 0.1, **config: object) -> Flow:
    """A small flow in float64 with parameters that are not those it starts with."""
    model = new(name, **config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=noise)
    return model.eval()


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``[batch, outputs, inputs]`` of a function of ``[batch, inputs]``."""
    full = torch.autograd.functional.jacobian(function, x)
    return torch.stack([full[i, :, i] for i in range(len(x))])


def logabsdet(model: Flow, v: Tensor) -> Tensor:
    return torch.linalg.slogdet(jacobian(lambda v: model.transform(v)[0], v)).logabsdet


def normal(*shape: int, seed: int = 0) -> Tensor:
    return noise_like(torch.empty(*shape, dtype=torch.float64), NoiseKey(seed, stream=99))


def grid(points: int, low: float, high: float) -> tuple[Tensor, float]:
    """Midpoints of the cells of a square, ``[points^2, 2]``, and the area of a cell."""
    axis = low + (torch.arange(points, dtype=torch.float64) + 0.5) / points * (high - low)
    return torch.cartesian_prod(axis, axis), ((high - low) / points) ** 2


# D1: change of variables, sampling, training by exact likelihood


@pytest.mark.parametrize("levels", [None, 17])
@pytest.mark.parametrize("name", SMALL)
def test_D1_log_density_is_that_of_the_base_plus_the_jacobians_logdet(name: str, levels: int | None) -> None:
    for base in ("normal", "logistic"):
        model = small(name, base=base, levels=levels)
        v = torch.sigmoid(normal(5, 6)) if levels else 2 * normal(5, 6)
        z, given = model.transform(v)
        logdet = logabsdet(model, v)
        torch.testing.assert_close(given, logdet, rtol=1e-8, atol=1e-8)
        noise = torch.distributions.Normal(0.0, 1.0) if base == "normal" else Logistic()
        torch.testing.assert_close(model.log_density(v), noise.log_prob(z).sum(1) + logdet, rtol=1e-8, atol=1e-8)


class Logistic(torch.distributions.TransformedDistribution):
    def __init__(self) -> None:
        uniform = torch.distributions.Uniform(torch.zeros((), dtype=torch.float64), torch.ones(()))
        super().__init__(uniform, [torch.distributions.SigmoidTransform().inv])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", SMALL)
def test_D1_invert_undoes_transform(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model = small(name, noise=0.05).to(dtype)
    x = 2 * normal(20, 6).to(dtype)
    z, _ = model.transform(x)
    assert (z - x).abs().max() > 0.1, "it is not the identity"
    torch.testing.assert_close(model.invert(z), x, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", SMALL)
def test_D1_samples_have_the_density_and_it_integrates_to_one(name: str) -> None:
    model = small(name, noise=0.05, image_shape=(2,), base="normal")
    points, area = grid(480, -8.0, 8.0)
    n, blocks = 20_000, 16
    with torch.no_grad():
        expected = model.log_prob(points).exp().mul(area).view(blocks, 30, blocks, 30).sum((1, 3))
    assert float(expected.sum()) == pytest.approx(1.0, abs=1e-2)
    place = ((model.sample(n, seed=3) + 8.0) / 16.0 * blocks).floor().long().clamp(0, blocks - 1)
    found = torch.bincount(place[:, 0] * blocks + place[:, 1], minlength=blocks**2).view(blocks, blocks) / n
    # The sum of the cells' expected absolute deviations of a multinomial, and a margin of one half.
    noise = (2 / math.pi * expected / n).sqrt().sum()
    assert float((found - expected).abs().sum()) < 1.5 * float(noise)


@pytest.mark.parametrize("name", ["realnvp", "maf", "spline", "spline_coupling"])
def test_D1_training_reaches_the_entropy_of_the_data(name: str) -> None:
    """A banana: x_0 standard normal, x_1 = x_0^2 / 2 + 0.5 noise, of entropy log(2 pi e) + log 0.5."""
    noise = normal(2000, 2, seed=1).float()
    x = torch.stack([noise[:, 0], noise[:, 0] ** 2 / 2 - 0.5 + 0.5 * noise[:, 1]], dim=1)
    split = Split(x, torch.zeros(len(x)))
    model = new(name, image_shape=(2,), base="normal", hidden=(32,))
    trainer = Trainer(model, Dataset(split, split, split), Settings(steps=400, batch_size=250, lr=1e-2))
    before = -float(model.log_prob(x).detach().mean())
    trainer.run(progress=False)
    entropy = math.log(2 * math.pi * math.e) + math.log(0.5)
    after = -float(trainer.averaged_model.log_prob(x).detach().mean())
    assert before > entropy + 0.5
    assert entropy - 0.05 < after < entropy + 0.1


def test_D1_loss_is_the_negative_log_likelihood_of_an_element() -> None:
    model, x = small("realnvp"), normal(7, 6)
    parts = model.loss_parts(x)
    assert list(parts) == ["nll"]
    torch.testing.assert_close(parts["nll"], -model.log_prob(x).mean() / 6)


def uniform_flow(levels: int) -> Flow:
    """Its density is constant on the unit cube: the logistic function undoes the logit."""
    model = new("maf", image_shape=(1, 3, 3), levels=levels, base="logistic", margin=1e-12).double()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model.eval()


def test_D1_a_uniform_density_has_log2_of_the_levels_bits() -> None:
    model, x = uniform_flow(17), digits().validation.x[:5, :, 2:5, 2:5].double()
    for nats in (model.log_prob(x), model.elbo(x), model.elbo(x, k=3)):
        torch.testing.assert_close(model.bits_per_dim(nats), torch.full_like(nats, math.log2(17)), rtol=1e-9, atol=0)
    levels = ((model.sample(4000, seed=1) + 1) * 8).flatten()
    share = torch.bincount(levels.round().long(), minlength=17) / len(levels)
    torch.testing.assert_close(share, torch.full_like(share, 1 / 17), rtol=0, atol=5 * (1 / 17 / len(levels)) ** 0.5)


def test_D1_bounds_of_the_log_probability_rise_to_it() -> None:
    """One pixel of two levels, so that the log-probability is an integral over one number."""
    model = small("maf", image_shape=(1,), levels=2, depth=1)
    with torch.no_grad():
        for layer, value in zip(model.flow.layers, (0.3, 0.0), strict=True):
            if hasattr(layer, "shift"):
                layer.shift.fill_(value)
    cells = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    exact = torch.stack([model.log_density(((cells + level) / 2)[:, None]).exp().mean() / 2 for level in (0, 1)]).log()
    x = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat_interleave(4000)[:, None]
    bounds = [model.elbo(x, k, seed=5).view(2, -1).mean(1) for k in (1, 4, 64)]
    torch.testing.assert_close(bounds[0], model.log_prob(x, seed=5).view(2, -1).mean(1))
    assert bool((bounds[0] < bounds[1] - 1e-3).all())
    assert bool((bounds[1] < bounds[2]).all())
    torch.testing.assert_close(bounds[2], exact, rtol=0, atol=0.02)


@pytest.mark.parametrize("name", SMALL)
def test_D1_sample_i_of_a_seed_is_always_the_same(name: str) -> None:
    model = small(name)
    whole = model.sample(7, seed=5)
    torch.testing.assert_close(model.sample(7, seed=5, batch_size=2), whole)
    torch.testing.assert_close(model.sample(3, seed=5, first_sample=4), whole[4:])
    assert (model.sample(7, seed=6) - whole).abs().amax(1).min() > 1e-3
    assert bool((model.sample(500, temperature=0.1).var(0) < 0.5 * model.sample(500).var(0)).all())


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", SMALL)
def test_D1_float32_samples_of_levels_are_the_same_however_drawn(name: str, backend: str) -> None:
    """But for a pixel whose value, within rounding, is the border of two levels."""
    model = small(name, noise=0.05, image_shape=(1, 4, 4), levels=17).float()
    with dgm_kernels.use_backend(backend):
        whole = model.sample(40, seed=5)
        others = torch.stack(
            [
                model.sample(40, seed=5, batch_size=7),
                torch.cat([model.sample(13, seed=5), model.sample(27, seed=5, first_sample=13)]),
            ]
        )
    assert torch.equal((whole + 1) * 8, ((whole + 1) * 8).round())
    assert len(whole.unique()) == 17
    steps = ((others - whole) * 8).abs()
    assert float(steps.max()) <= 1
    assert float((steps > 0).double().mean()) < 0.005


@pytest.mark.parametrize("name", SMALL)
def test_D1_log_prob_of_levels_needs_only_the_sample_and_its_index(name: str) -> None:
    model, x = small(name, image_shape=(1, 8, 8), levels=17), digits().validation.x[:6].double()
    whole = model.log_prob(x, seed=2)
    torch.testing.assert_close(model.log_prob(x[4:], seed=2, first_sample=4), whole[4:])
    assert bool((model.log_prob(x, seed=3) != whole).all())
    v = model.dequantize(x, NoiseKey(0))
    assert torch.equal((v * 17).ceil() - 1, ((x + 1) * 8).round()), "a point of the cell of its level"


def test_D1_level_noise_moves_levels_by_one_in_training_only() -> None:
    model = new("nice", image_shape=(1, 8, 8), levels=17, level_noise=0.4, margin=1e-3).double()
    x, key = digits().train.x.double(), NoiseKey(0)
    moved = model._move_levels(x, 17, key)
    step = ((moved - x) * 8).round()
    assert torch.equal(moved * 8, (moved * 8).round())
    assert bool((step[x == -1] == 0).all())
    middle = (x > -1) & (x < 1)
    for value in (-1, 1):
        assert float((step[middle] == value).double().mean()) == pytest.approx(0.2, abs=0.01)
    assert bool((moved <= 1).all())
    assert set(step.unique().tolist()) == {-1.0, 0.0, 1.0}
    quiet = new("nice", image_shape=(1, 8, 8), levels=17, level_noise=0.0, margin=1e-3).double()
    quiet.load_state_dict(model.state_dict())
    assert not torch.equal(model.train().loss(x, key=key), quiet.train().loss(x, key=key))
    assert torch.equal(model.eval().loss(x, key=key), quiet.eval().loss(x, key=key))
    x = x[:10]
    assert torch.equal(model.train().log_prob(x), quiet.log_prob(x)), "and not in the likelihood, whatever the mode"
    assert torch.equal(model.elbo(x, k=2), quiet.elbo(x, k=2))
    assert model.training


def test_D1_prepare_standardises_the_data_once() -> None:
    model, data = new("maf", image_shape=(1, 8, 8), levels=17, depth=1), digits()
    Trainer(model, data, Settings())
    first = model.standardization(model._unbounded(model.dequantize(data.train.x, NoiseKey(4)))[0])[0]
    torch.testing.assert_close(first.mean(0), torch.zeros(64), rtol=0, atol=0.2)
    torch.testing.assert_close(first.std(0), torch.ones(64), rtol=0, atol=0.2)
    before = model.standardization.shift.clone()
    model.prepare(-data.train.x)
    assert torch.equal(model.standardization.shift, before), "a trained model keeps its scale"
    plain = new("maf", image_shape=(3,), depth=1).double()
    x = normal(50, 3) * torch.tensor([2.0, 5.0, 0.0]) + 7
    plain.prepare(x)
    z, logdet = plain.standardization(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(3).double())
    torch.testing.assert_close(z.std(0, correction=0), torch.tensor([1.0, 1.0, 0.0]).double())
    torch.testing.assert_close(logdet, -x.std(0, correction=0)[:2].log().sum().expand(50))


def test_D1_prepare_leaves_a_flow_alone_that_was_trained_by_hand() -> None:
    model, x = new("maf", image_shape=(3,), depth=1).double(), 5 + normal(50, 3)
    torch.optim.SGD(model.parameters(), lr=0.1).step(lambda: backward(model, x))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert bool((before["flow.layers.0.shift"] != 0).all())
    model.prepare(x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def backward(model: Flow, x: Tensor) -> float:
    loss = model.loss(x)
    loss.backward()
    return float(loss.detach())


def test_D1_the_standardisation_is_saved(tmp_path: pathlib.Path) -> None:
    model, x = new("realnvp"), 3 + 2 * normal(50, 6).float()
    model.prepare(x)
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert bool(loaded.standardization.fitted)
    loaded.prepare(-x)
    for found, expected in zip(loaded.standardization.parameters(), model.standardization.parameters(), strict=True):
        assert bool((expected != 0).all())
        assert torch.equal(found, expected)


def test_D1_a_resumed_run_equals_an_uninterrupted_one(tmp_path: pathlib.Path) -> None:
    def trainer(model: Flow, out: pathlib.Path | None = None) -> Trainer:
        return Trainer(model, digits(), Settings(steps=12, batch_size=200, validate_every=5), out)

    options = {"depth": 2, "hidden": (16,), "dropout": 0.3, "level_noise": 0.5}
    torch.manual_seed(0)
    whole = trainer(create_model("realnvp", **options))
    whole.run(progress=False)
    torch.manual_seed(0)
    trainer(create_model("realnvp", **options), tmp_path).run(until=5, progress=False)
    torch.manual_seed(1)
    resumed = trainer(from_pretrained(tmp_path), tmp_path)
    resumed.load()
    resumed.run(progress=False)
    assert (resumed.step, resumed.losses) == (12, whole.losses)
    for name in ("model", "average"):
        for key, value in getattr(whole, name).state_dict().items():
            assert torch.equal(getattr(resumed, name).state_dict()[key], value), (name, key)


@pytest.mark.parametrize("name", SMALL)
def test_D1_flows_save_and_load(tmp_path: pathlib.Path, name: str) -> None:
    model = small(name)
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(loaded.sample(4), model.sample(4))


def test_D1_the_loss_compiles_without_a_break() -> None:
    for name in ("realnvp", "spline"):
        model, x = new(name, image_shape=(1, 4, 4), depth=2, levels=17, level_noise=0.5), torch.zeros(5, 1, 4, 4)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, key=NoiseKey(0)), model(x, key=NoiseKey(0)))


def test_D1_flows_refuse_bad_input() -> None:
    for name, config, message in (
        ("realnvp", {"image_shape": (1, 3, 3)}, "image_shape must have an even number of elements .* got 9"),
        ("realnvp", {"depth": 0}, "depth must be a positive int, got 0"),
        ("realnvp", {"activation": "sine"}, "activation must be one of relu, tanh, elu, silu, got 'sine'"),
        ("realnvp", {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ("maf", {"fast": "both"}, r"fast must be 'density' \(MAF\) or 'sampling' \(IAF\), got 'both'"),
        ("maf", {"base": "cauchy"}, "base must be one of normal, logistic, got 'cauchy'"),
        ("maf", {"levels": 1}, "levels must be at least 2, got 1"),
        ("maf", {"margin": 0.5}, r"margin must be in \(0, 0.5\), got 0.5"),
        ("maf", {"level_noise": 2}, r"level_noise must be in \[0, 1\], got 2"),
        ("maf", {"scale_map": None}, "scale_map must be one of exp, tanh, sigmoid, softclip, got None"),
        ("realnvp", {"scale_map": None}, "scale_map must be one of exp, tanh, sigmoid, softclip, got None"),
        ("realnvp", {"scale_map": "cosh"}, "scale_map must be one of exp, tanh, sigmoid, softclip, got 'cosh'"),
        ("nice", {"activation": ["relu"]}, r"activation must be one of relu, tanh, elu, silu, got \['relu'\]"),
        ("maf", {"fast": "sampling", "dropout": 0.2}, "dropout must be 0 with fast 'sampling', where .*; got 0.2"),
        ("maf", {"fast": "sampling", "dropout": -1}, r"dropout must be in \[0, 1\), got -1"),
        ("invertible_mlp", {"negative_slope": 0.0}, "negative_slope must be a positive finite number, got 0.0"),
        ("invertible_mlp", {"negative_slope": math.inf, "depth": 1}, "negative_slope must be a positive .*, got inf"),
        ("maf", {"hidden": (0,)}, r"hidden\[0\] must be a positive int, got 0"),
        ("spline", {"kind": "linear"}, "kind must be 'autoregressive' or 'coupling', got 'linear'"),
        ("spline", {"kind": "autoregressive", "reversible": True}, "reversible must be False with kind 'autoreg"),
        ("spline", {"bins": 1}, "bins must be at least 2, got 1"),
        ("spline", {"bound": 0.0}, "bound must be a positive finite number, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            create_model(name, **config)
    for name, config, message in (
        ("realnvp", {"reversible": "false"}, "reversible must be True or False, got 'false'"),
        ("spline", {"kind": "autoregressive", "reversible": 0}, "reversible must be True or False, got 0"),
        ("invertible_mlp", {"negative_slope": "0.5"}, "negative_slope must be a number, got '0.5'"),
        ("nice", {"dropout": None}, "dropout must be a number, got None"),
        ("maf", {"dropout": "none"}, "dropout must be a number, got 'none'"),
        ("maf", {"margin": [0.1]}, r"margin must be a number, got \[0.1\]"),
        ("maf", {"level_noise": True}, "level_noise must be a number, got True"),
        ("spline", {"bound": "3"}, "bound must be a number, got '3'"),
    ):
        with pytest.raises(TypeError, match=message):
            create_model(name, **config)


def test_D1_methods_of_flows_refuse_bad_input() -> None:
    model = create_model("nice")
    with pytest.raises(ValueError, match="x must lie on 17 equally spaced levels"):
        model.log_prob(torch.full((1, 1, 8, 8), 0.3))
    with pytest.raises(ValueError, match="cond must be None: this nice is not conditional"):
        model.loss(torch.zeros(1, 1, 8, 8), cond=torch.zeros(1))
    with pytest.raises(ValueError, match="k must be a positive int, got 0"):
        model.elbo(torch.zeros(1, 1, 8, 8), k=0)
    for method in (model.transform, model.log_density):
        with pytest.raises(ValueError, match=r"v must have shape \(batch, 1, 8, 8\), got \(2, 64\)"):
            method(torch.zeros(2, 64))
    with pytest.raises(ValueError, match=r"z must have shape \(batch, 64\), got \(2, 1, 8, 8\)"):
        model.invert(torch.zeros(2, 1, 8, 8))
    with pytest.raises(TypeError, match=r"v must hold floating-point numbers, got torch.int64"):
        model.log_density(torch.zeros(2, 1, 8, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"v must be in \[0, 1\], got values from -1.0 to -1.0"):
        model.log_density(-torch.ones(2, 1, 8, 8))
    for temperature in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"temperature must be a positive finite number, got {temperature}"):
            model.sample(1, temperature=temperature)
    with pytest.raises(TypeError, match="temperature must be a number, got 'hot'"):
        model.sample(1, temperature="hot")
    with pytest.raises(TypeError, match=r"^sample of nice has no option 'steps'; its options are temperature$"):
        model.sample(1, steps=3)
