"""Rows C2 to C4 and C6 of docs/models.md: variational autoencoders and what all latent-variable models share."""

from __future__ import annotations

import functools
import itertools
import math
import pathlib

import matplotlib.image
import pytest
import torch
from torch import Tensor, nn

import dgm_kernels
from dgm_kernels import NoiseKey, noise_like
from dgm_models import DensityUnavailable, create_model, from_pretrained, list_models
from dgm_models.__main__ import main
from dgm_models.data import digits
from dgm_models.latent import LatentVariable, Observation
from dgm_models.train import Settings, Trainer
from tests.model_checks import check_backends_agree

FAMILIES = ("iwae", "lognormal_vae", "vae")
DENSE = {"latent": 3, "hidden": (16,), "dropout": 0.0}
CONV = {"latent": 3, "network": "conv", "width": 4, "dropout": 0.0}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return noise_like(torch.empty(*shape, dtype=torch.float64), NoiseKey(seed, stream=99))


def small(name: str = "vae", **config: object) -> LatentVariable:
    """A small model of the digits in float64."""
    options = CONV if config.get("network") == "conv" else DENSE
    return create_model(name, **{**options, **config}).double().eval()


def linear_gaussian(posterior: str, dimensions: int = 4, latent: int = 2, name: str = "vae") -> LatentVariable:
    """``x = W z + b + s noise``, whose evidence is known; its encoder has the best posterior that it can have."""
    model = create_model(
        name, image_shape=(dimensions,), latent=latent, hidden=(), dropout=0.0, posterior=posterior, levels=None
    ).double()
    weight, bias = normal(dimensions, latent, seed=1), normal(1, dimensions, seed=2)[0]
    log_scale = torch.linspace(-0.7, 0.2, dimensions, dtype=torch.float64)
    precision_of_noise = torch.diag((-2 * log_scale).exp())
    precision = torch.eye(latent).double() + weight.T @ precision_of_noise @ weight
    gain = torch.linalg.solve(precision, weight.T @ precision_of_noise)
    (encoder,), (decoder,) = model.encoder.layers, model.decoder.layers
    with torch.no_grad():
        decoder.weight.copy_(weight)
        decoder.bias.copy_(bias)
        model.observation.log_scale.copy_(log_scale)
        encoder.weight.zero_()
        encoder.weight[:latent] = gain
        encoder.bias[:latent] = -gain @ bias
        if posterior == "diagonal":  # the best variances are the inverse diagonal of the precision
            encoder.bias[latent:] = -precision.diagonal().log()
        else:
            root = torch.linalg.cholesky(torch.linalg.inv(precision))
            rows, columns = torch.tril_indices(latent, latent, -1)
            encoder.bias[latent:] = torch.cat([2 * root.diagonal().log(), root[rows, columns]])
    return model.eval()


def evidence(model: LatentVariable, x: Tensor) -> Tensor:
    """Exact log p(x) of a linear Gaussian model."""
    (decoder,) = model.decoder.layers
    covariance = decoder.weight @ decoder.weight.T + torch.diag((2 * model.observation.log_scale).exp())
    return torch.distributions.MultivariateNormal(decoder.bias, covariance).log_prob(x).detach()


def true_posterior(model: LatentVariable, x: Tensor) -> torch.distributions.MultivariateNormal:
    """p(z | x) of a linear Gaussian model."""
    (decoder,) = model.decoder.layers
    scaled = decoder.weight * (-2 * model.observation.log_scale).exp()[:, None]
    precision = torch.eye(decoder.weight.shape[1]).double() + scaled.T @ decoder.weight
    mean = torch.linalg.solve(precision, scaled.T @ (x - decoder.bias).T).T
    return torch.distributions.MultivariateNormal(mean.detach(), precision_matrix=precision.detach())


def approximate_posterior(model: LatentVariable, x: Tensor) -> torch.distributions.MultivariateNormal:
    """q(u | x)."""
    with torch.no_grad():
        mu, log_var, scale_tril = model.posterior(x)
    root = torch.diag_embed((0.5 * log_var).exp()) if scale_tril is None else scale_tril
    return torch.distributions.MultivariateNormal(mu, scale_tril=root)


# C2: the bound


@pytest.mark.parametrize("posterior", ["diagonal", "full"])
def test_C2_the_bound_is_the_evidence_minus_the_divergence_of_the_posteriors(posterior: str) -> None:
    """On a linear Gaussian model, whose encoder is moved away from its best."""
    model, x = linear_gaussian(posterior), 2 * normal(3, 4)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    gap = torch.distributions.kl_divergence(approximate_posterior(model, x), true_posterior(model, x))
    assert float(gap.min()) > 0.02
    draws = 40_000
    bound = torch.stack([model.elbo(row.expand(draws, 4)) for row in x])
    error = bound.std(1) / draws**0.5
    assert bool(((bound.mean(1) - (evidence(model, x) - gap)).abs() < 5 * error).all())


def test_C2_with_the_true_posterior_every_draw_has_the_evidence() -> None:
    model, x = linear_gaussian("full"), 2 * normal(5, 4)
    expected = evidence(model, x)
    for k in (2, 7, 40):
        torch.testing.assert_close(model.elbo(x, k), expected, rtol=1e-9, atol=1e-9)
    many = model.elbo(x.repeat(20_000, 1)).view(-1, 5)
    torch.testing.assert_close(many.mean(0), expected, rtol=0, atol=5 * float(many.std(0).max()) / 20_000**0.5)
    best = linear_gaussian("diagonal")
    assert float((evidence(best, x) - best.elbo(x.repeat(4000, 1)).view(-1, 5).mean(0)).min()) > 0.05


@pytest.mark.parametrize("posterior", ["diagonal", "full"])
def test_C2_the_divergence_is_that_of_torch_distributions(posterior: str) -> None:
    model, x = small(posterior=posterior), digits().test.x[:6].double()
    with torch.no_grad():
        _, kl = model._draw(model.posterior(x), NoiseKey(0))
    prior = torch.distributions.MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double())
    expected = torch.distributions.kl_divergence(approximate_posterior(model, x), prior)
    torch.testing.assert_close(kl, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("posterior", ["diagonal", "full"])
@pytest.mark.parametrize("network", ["dense", "conv"])
def test_C2_loss_is_the_negative_bound_of_an_element(network: str, posterior: str) -> None:
    model, x = small(network=network, posterior=posterior), digits().test.x[:6].double()
    parts = model.loss_parts(x, key=NoiseKey(3))
    assert list(parts) == ["reconstruction", "kl"]
    key = NoiseKey(3, stream=7)  # that of training
    noise = noise_like(x.new_empty(6, 3), key)
    q = approximate_posterior(model, x)
    z = q.loc + (q.scale_tril @ noise[..., None])[..., 0]
    prior = torch.distributions.MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double())
    outputs = model.decode(z)
    each = dgm_kernels.discretized_logistic_mixture(x, outputs, levels=17).flatten(1).sum(1)
    torch.testing.assert_close(parts["reconstruction"], -each.mean() / 64, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(parts["kl"], torch.distributions.kl_divergence(q, prior).mean() / 64)
    torch.testing.assert_close(model.loss(x, key=NoiseKey(3)), parts["reconstruction"] + parts["kl"])


@pytest.mark.parametrize(
    ("output", "levels"), [("bernoulli", 2), ("categorical", 4), ("logistic_mixture", 4), ("categorical", 2)]
)
def test_C2_the_probabilities_of_all_pictures_sum_to_one(output: str, levels: int) -> None:
    observation = Observation((1, 2, 1), output, levels, 2).double()
    outputs = 2 * normal(1, *observation.parameters_shape)
    values = torch.linspace(-1, 1, levels, dtype=torch.float64)
    pictures = torch.tensor(list(itertools.product(values.tolist(), repeat=2))).double().view(-1, 1, 2, 1)
    log_prob = observation.log_prob(pictures, outputs.expand(len(pictures), *outputs.shape[1:]))
    assert float(log_prob.exp().sum()) == pytest.approx(1.0, abs=1e-6)
    n = 20_000
    drawn = observation.sample(outputs.expand(n, *outputs.shape[1:]), NoiseKey(1))
    place = (drawn[:, None] - pictures).abs().flatten(2).sum(2).argmin(1)
    share = torch.bincount(place, minlength=len(pictures)) / n
    torch.testing.assert_close(share.double(), log_prob.exp(), rtol=0, atol=0.02)


def test_C2_gaussian_outputs_have_a_learnt_scale() -> None:
    observation = Observation((3,), None, None, 1).double()
    nn.init.constant_(observation.log_scale, -0.5)
    x, outputs = normal(5, 3), normal(5, 3, seed=1)
    expected = torch.distributions.Normal(outputs, math.exp(-0.5)).log_prob(x).sum(1)
    torch.testing.assert_close(observation.log_prob(x, outputs), expected)
    drawn = observation.sample(outputs[:1].expand(20_000, 3), NoiseKey(0))
    torch.testing.assert_close(drawn.mean(0), outputs[0], rtol=0, atol=0.02)
    torch.testing.assert_close(drawn.std(0), torch.full((3,), math.exp(-0.5)).double(), rtol=0.03, atol=0)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 8)])
@pytest.mark.parametrize("network", ["dense", "conv"])
def test_C2_networks_read_every_pixel_and_write_every_output(network: str, shape: tuple[int, ...]) -> None:
    model = small(network=network, image_shape=shape, levels=4)
    x = normal(1, *shape).requires_grad_()
    (gradient,) = torch.autograd.grad(model.posterior(x).mu.sum(), x)
    assert bool((gradient != 0).all())
    z = normal(2, 3)
    outputs = model.decode(z)
    assert outputs.shape == (2, *model.observation.parameters_shape)
    assert bool((outputs[0] != outputs[1]).all())


@pytest.mark.parametrize(("name", "network"), [*((name, "dense") for name in FAMILIES), ("vae", "conv")])
def test_C2_C5_C6_the_digits_are_learnt_in_seconds(name: str, network: str) -> None:
    """Independent pixels with each level's share have 2.97 bits on the validation part at best; so has a Gaussian."""
    torch.manual_seed(0)
    options = {"samples": 3} if name == "iwae" else {}
    model = create_model(name, network=network, dropout=0.0, width=8, hidden=(128,), latent=8, **options)
    data = digits()
    trainer = Trainer(model, data, Settings(steps=150, batch_size=50, warmup=20, lr=5e-3, ema=0.9, validation_draws=1))
    trainer.run(progress=False)
    bits = model.bits_per_dim(trainer.averaged_model.elbo(data.validation.x)).mean()
    assert float(bits) < 2.75


@pytest.mark.parametrize("name", FAMILIES)
def test_C2_C5_C6_sample_i_of_a_seed_is_always_the_same(name: str) -> None:
    for options in ({}, {"levels": None}, {"output": "categorical"}, {"levels": 2}):
        model = small(name, **options)
        whole = model.sample(7, seed=5)
        torch.testing.assert_close(model.sample(7, seed=5, batch_size=2), whole)
        torch.testing.assert_close(model.sample(3, seed=5, first_sample=4), whole[4:])
        assert float((model.sample(7, seed=6) - whole).abs().amax((1, 2, 3)).min()) > 1e-3
    calm = model.sample(300, temperature=0.01).mean((1, 2, 3)).var()
    assert float(calm) < float(model.sample(300).mean((1, 2, 3)).var()) or name == "lognormal_vae"


def test_C2_bounds_need_only_the_sample_and_its_index() -> None:
    model, x = small(), digits().test.x[:6].double()
    for k in (1, 40):
        whole = model.elbo(x, k, seed=2)
        torch.testing.assert_close(model.elbo(x[4:], k, seed=2, first_sample=4), whole[4:])
        assert bool((model.elbo(x, k, seed=3) != whole).all())
    first = model.log_weights(x, None, 5, NoiseKey(1))
    torch.testing.assert_close(model.log_weights(x, None, 3, NoiseKey(1, step=2)), first[2:])


def test_C2_there_is_no_density_and_the_error_says_why() -> None:
    for name in FAMILIES:
        with pytest.raises(DensityUnavailable, match=rf"{name} has no density in closed form: it is an integral"):
            small(name).log_prob(digits().test.x)


def test_C2_the_loss_compiles_without_a_break() -> None:
    x = digits().test.x[:5]
    for options in ({}, {"network": "conv", "posterior": "full", "num_classes": 10}):
        model = create_model("vae", **{**DENSE, "width": 4, **options})
        cond = digits().test.label[:5] if "num_classes" in options else None
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, cond, key=NoiseKey(0)), model(x, cond, key=NoiseKey(0)))


# C3: beta and free bits


def test_C3_beta_weighs_the_divergence_in_the_loss_and_not_in_the_bound() -> None:
    torch.manual_seed(0)
    plain, x = small(), digits().test.x[:6].double()
    heavy = small(beta=4.0)
    heavy.load_state_dict(plain.state_dict())
    parts, others = (model.loss_parts(x, key=NoiseKey(0)) for model in (plain, heavy))
    assert torch.equal(parts["reconstruction"], others["reconstruction"])
    torch.testing.assert_close(others["kl"], 4 * parts["kl"])
    assert torch.equal(plain.elbo(x), heavy.elbo(x))


def test_C3_more_beta_learns_a_smaller_divergence() -> None:
    found = []
    for beta in (0.2, 5.0):
        torch.manual_seed(0)
        model = create_model("vae", latent=8, hidden=(64,), beta=beta)
        settings = Settings(steps=100, batch_size=50, warmup=20, lr=4e-3, ema=0.9, validation_draws=1)
        trainer = Trainer(model, digits(), settings)
        trainer.run(progress=False)
        best = trainer.averaged_model.eval()
        with torch.no_grad():
            found.append(float(best.loss_parts(digits().validation.x, key=NoiseKey(0))["kl"]) / beta * 64)
    assert found[0] > 3 * found[1]


def test_C3_free_bits_are_the_least_divergence_of_a_dimension() -> None:
    torch.manual_seed(0)
    plain, x = small(), digits().test.x[:6].double()
    free = small(free_bits=0.7)
    free.load_state_dict(plain.state_dict())
    mu, log_var, _ = plain.posterior(x)
    each = 0.5 * (log_var.exp() + mu.square() - 1 - log_var)
    assert int((each < 0.7).sum()) > 0
    kl = free.loss_parts(x, key=NoiseKey(0))["kl"]
    torch.testing.assert_close(kl, each.clamp(min=0.7).sum(1).mean() / 64)
    assert torch.equal(plain.elbo(x), free.elbo(x))


# C4: conditional


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("network", ["dense", "conv"])
def test_C4_the_class_matters_to_encoder_and_decoder(name: str, network: str) -> None:
    model, data = small(name, network=network, num_classes=10), digits().test
    x, label = data.x[:6].double(), data.label[:6]
    other = (label + 1) % 10
    assert bool((model.posterior(x, label).mu != model.posterior(x, other).mu).all())
    assert not torch.equal(model.decode(normal(6, 3), label), model.decode(normal(6, 3), other))
    for k in (1, 3):
        found = model.elbo(x, k, label)
        assert bool((found != model.elbo(x, k, other)).all())
        torch.testing.assert_close(model.elbo(x[3:], k, label[3:], first_sample=3), found[3:])
    assert not torch.equal(model.naive_bound(x, 3, label), model.naive_bound(x, 3, other))
    assert not torch.equal(model.sample(6, cond=label), model.sample(6, cond=other))
    with pytest.raises(ValueError, match=rf"cond must be given: this {name} is conditional"):
        model.loss(x)
    with pytest.raises(ValueError, match=r"cond must be in 0 \.\. 9, got"):
        model.elbo(x, cond=label + 10)
    with pytest.raises(TypeError, match=r"cond must be int64 of shape \[batch\], got torch.float32"):
        model.loss(x, label.float())


def test_C4_a_conditional_model_draws_the_class_it_is_told() -> None:
    """A nearest-mean classifier of the digits recognises its samples."""
    torch.manual_seed(0)
    data = digits()
    model = create_model("vae", num_classes=10, latent=4, hidden=(128,), dropout=0.0)
    trainer = Trainer(model, data, Settings(steps=200, batch_size=50, warmup=20, lr=5e-3, ema=0.9))
    trainer.run(progress=False)
    label = torch.arange(200) % 10
    drawn = trainer.averaged_model.sample(200, cond=label).flatten(1)
    means = torch.stack([data.train.x[data.train.label == c].mean(0).flatten() for c in range(10)])
    assert float((torch.cdist(drawn, means).argmin(1) == label).double().mean()) > 0.7


# C6: log-normal


def test_C6_z_is_exp_of_a_normal_variable() -> None:
    model, x = small("lognormal_vae"), digits().test.x[:5].double()
    posterior = model.posterior(x)
    assert posterior.log_var is not None
    z, kl = model._draw(posterior, NoiseKey(4))
    noise = noise_like(x.new_empty(5, 3), NoiseKey(4))
    torch.testing.assert_close(z, (posterior.mu + (0.5 * posterior.log_var).exp() * noise).exp())
    q = torch.distributions.LogNormal(posterior.mu, (0.5 * posterior.log_var).exp())
    prior = torch.distributions.LogNormal(torch.zeros(3).double(), torch.ones(3).double())
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(q, prior).sum(1), rtol=1e-9, atol=1e-9)
    # Its weights are those of the densities of z itself.
    weights = model.log_weights(x, None, 1, NoiseKey(4))[0]
    likelihood = model.observation.log_prob(x, model.decode(z))
    expected = likelihood + prior.log_prob(z).sum(1) - q.log_prob(z).sum(1)
    torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-9)
    bounds = [float(model.elbo(x.repeat(200, 1, 1, 1), k).mean()) for k in (1, 5, 30)]
    assert bounds[0] < bounds[1] < bounds[2]


def test_C6_a_normal_posterior_is_refused_because_its_divergence_is_infinite() -> None:
    with pytest.raises(ValueError, match=r"posterior must be 'lognormal', got 'normal': .* KL divergence is infinite"):
        create_model("lognormal_vae", posterior="normal")
    with pytest.raises(ValueError, match="posterior must be 'lognormal', got 'diagonal'"):
        create_model("lognormal_vae", posterior="diagonal")
    # A Monte-Carlo estimate says the same: there are draws to which the prior gives no density.
    q = torch.distributions.Normal(torch.tensor(0.5), torch.tensor(0.4))
    z = q.sample((1000,))
    prior = torch.distributions.LogNormal(0.0, 1.0, validate_args=False)
    log_p = torch.where(z > 0, prior.log_prob(z.clamp(min=1e-30)), -math.inf)
    assert float((q.log_prob(z) - log_p).mean()) == math.inf


# All: saving, resuming, the command line, refusals


@pytest.mark.parametrize("name", FAMILIES)
def test_latent_variable_models_save_and_load(tmp_path: pathlib.Path, name: str) -> None:
    for options in ({}, {"network": "conv"}, {"levels": None}):
        model = small(name, **options)
        model.save_pretrained(tmp_path)
        loaded = from_pretrained(tmp_path)
        assert loaded.config == model.config
        assert torch.equal(loaded.sample(4), model.sample(4))


def test_a_resumed_run_of_a_vae_equals_an_uninterrupted_one(tmp_path: pathlib.Path) -> None:
    def trainer(out: pathlib.Path | None = None) -> Trainer:
        torch.manual_seed(0)
        model = create_model("iwae", latent=3, hidden=(16,), samples=3)
        return Trainer(model, digits(), Settings(steps=10, batch_size=200, validate_every=5, validation_draws=1), out)

    whole = trainer()
    whole.run(progress=False)
    trainer(tmp_path).run(until=5, progress=False)
    resumed = trainer(tmp_path)
    resumed.load()
    resumed.run(progress=False)
    assert resumed.losses == whole.losses
    for key, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], value), key


@pytest.mark.parametrize("name", FAMILIES)
def test_cli_trains_samples_and_evaluates_latent_variable_models(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert name in list_models()
    out = tmp_path / "run"
    args = ["train", name, "--out", str(out), "--steps", "20", "--device", "cpu", "--quiet"]
    assert main([*args, "--set", "num_classes=10", "--set", "network=conv", "--set", "width=8"]) == 0
    assert matplotlib.image.imread(out / "samples.png")[..., :3].std() > 0.01
    picture = str(tmp_path / "s.png")
    assert main(["sample", "--from", str(out), "-n", "4", "--set", "temperature=0.8", "--out", picture]) == 0
    assert matplotlib.image.imread(picture)[..., :3].std() > 0.01
    capsys.readouterr()
    assert main(["evaluate", "--from", str(out), "-k", "3"]) == 0
    assert capsys.readouterr().out.startswith("ELBO, validation set, mean of 200 samples: nats -")


def test_native_and_reference_agree_on_the_loss_and_its_gradient() -> None:
    x = digits().train.x[:50]
    for name, options in (("vae", {}), ("vae", {"posterior": "full"}), ("iwae", {"samples": 4}), ("lognormal_vae", {})):
        torch.manual_seed(0)
        model = create_model(name, latent=5, hidden=(32,), dropout=0.0, **options)
        check_backends_agree(model, x, functools.partial(model.elbo, x, 5))


def test_latent_variable_models_refuse_bad_input() -> None:
    for name, config, message in (
        ("vae", {"latent": 0}, "latent must be a positive int, got 0"),
        ("vae", {"network": "transformer"}, "network must be one of dense, conv, got 'transformer'"),
        ("vae", {"posterior": "lognormal"}, "posterior must be one of diagonal, full, got 'lognormal'"),
        ("vae", {"hidden": (0,)}, r"hidden\[0\] must be a positive int, got 0"),
        ("vae", {"network": "conv", "image_shape": (1, 6, 8)}, "a height and a width divisible by .* = 4, got"),
        (
            "vae",
            {"network": "conv", "image_shape": (64,), "levels": 2},
            r"image_shape must be \(channels, height, width\), got",
        ),
        ("vae", {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ("vae", {"beta": -1.0}, "beta must be a finite number that is not negative, got -1.0"),
        ("vae", {"free_bits": math.inf}, "free_bits must be a finite number that is not negative, got inf"),
        ("vae", {"free_bits": 0.1, "posterior": "full"}, "free_bits must be 0 with posterior 'full', got 0.1"),
        ("vae", {"output": "poisson"}, "output must be one of bernoulli, categorical, logistic_mixture, gaussian, got"),
        ("vae", {"output": "gaussian"}, "levels must be None with output 'gaussian' .* got 17 with 'gaussian'"),
        ("vae", {"output": "categorical", "levels": None}, "levels must be None with output .* got None with 'cat"),
        ("vae", {"output": "bernoulli"}, "levels must be 2 with output 'bernoulli', got 17"),
        ("vae", {"levels": 1}, "levels must be at least 2, got 1"),
        ("vae", {"num_classes": 0}, "num_classes must be a positive int, got 0"),
        ("iwae", {"samples": 0}, "samples must be a positive int, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            create_model(name, **config)
    model = small()
    for call in (model.elbo, model.naive_bound, model.loss):
        with pytest.raises(ValueError, match="x must lie on 17 equally spaced levels"):
            call(torch.full((1, 1, 8, 8), 0.3).double())
    for call in (model.elbo, model.naive_bound):
        with pytest.raises(ValueError, match="k must be a positive int, got 0"):
            call(digits().test.x.double(), 0)
    with pytest.raises(ValueError, match="cond must be None: this vae is not conditional"):
        model.loss(digits().test.x.double(), cond=digits().test.label)
    with pytest.raises(ValueError, match="temperature must be a positive finite number, got 0"):
        model.sample(1, temperature=0)
