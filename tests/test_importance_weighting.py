"""Rows B6, C5 and C11 of docs/models.md: importance-weighted bounds, naive ones, and estimators of gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dgm_kernels import NoiseKey, noise_like
from dgm_models import create_model
from dgm_models.data import digits
from dgm_models.latent import LatentVariable, pathwise, score_function
from dgm_models.train import Settings, Trainer
from tests.test_vae_families import approximate_posterior, evidence, linear_gaussian, normal, small

# C5: importance weighting


@pytest.fixture(scope="module")
def trained_iwae() -> LatentVariable:
    """A few seconds of training on the digits."""
    torch.manual_seed(0)
    model = create_model("iwae", latent=8, hidden=(128,), samples=3)
    settings = Settings(steps=150, batch_size=50, warmup=20, lr=5e-3, ema=0.9, validation_draws=1)
    trainer = Trainer(model, digits(), settings)
    trainer.run(progress=False)
    return trainer.averaged_model.eval()


def test_C5_the_bound_rises_with_k_over_the_test_set(trained_iwae: LatentVariable) -> None:
    x = digits().test.x
    bounds = [float(trained_iwae.elbo(x, k, seed=1).mean()) for k in (1, 2, 5, 20, 60)]
    assert all(low < high for low, high in itertools.pairwise(bounds))
    assert bounds[-1] > bounds[0] + 0.5, "nats"


def test_C5_the_loss_is_the_logarithm_of_the_mean_weight() -> None:
    model, x = small("iwae", samples=6), digits().test.x[:4].double()
    parts = model.loss_parts(x, key=NoiseKey(2, step=3))
    assert list(parts) == ["bound"]
    q = approximate_posterior(model, x)
    prior = torch.distributions.Normal(0.0, 1.0)
    weights = []
    for draw in range(6):
        noise = noise_like(x.new_empty(4, 3), NoiseKey(2, step=18 + draw, stream=7))
        z = q.loc + (q.scale_tril @ noise[..., None])[..., 0]
        likelihood = model.observation.log_prob(x, model.decode(z))
        weights.append(likelihood + prior.log_prob(z).sum(1) - q.log_prob(z))
    expected = torch.stack(weights).logsumexp(0) - math.log(6)
    torch.testing.assert_close(parts["bound"], -expected.mean() / 64, rtol=1e-9, atol=1e-12)


def test_C5_one_draw_is_the_vae_on_average() -> None:
    torch.manual_seed(0)
    vae, x = small(), digits().test.x[:3].double()
    iwae = small("iwae", samples=1)
    iwae.load_state_dict(vae.state_dict())
    n = 4000
    repeated = x.repeat(n, 1, 1, 1)
    one = iwae.log_weights(repeated, None, 1, NoiseKey(5)).detach()[0].view(n, 3)
    closed = vae.elbo(repeated, seed=5).view(n, 3)
    error = (one - closed).std(0) / n**0.5
    assert bool(((one - closed).mean(0).abs() < 5 * error).all())
    assert torch.equal(vae.elbo(x), iwae.elbo(x))


@pytest.mark.parametrize("posterior", ["diagonal", "full"])
def test_C5_the_bound_reaches_the_evidence_of_a_linear_gaussian_model(posterior: str) -> None:
    model, x = linear_gaussian(posterior, name="iwae"), 2 * normal(4, 4)
    (encoder,) = model.encoder.layers
    with torch.no_grad():  # a posterior that is off and too wide, so that no weight is huge
        encoder.bias[:2] += 0.3
        encoder.bias[2:4] += 0.5
    expected = evidence(model, x)
    repeated = x.repeat(300, 1)
    gaps = [expected - model.elbo(repeated, k, seed=3).view(300, 4).mean(0) for k in (1, 8, 64)]
    assert bool((gaps[0] > gaps[1]).all() and (gaps[1] > gaps[2]).all())
    torch.testing.assert_close(model.elbo(x, 2000), expected, rtol=0, atol=0.1)


# B6: Monte-Carlo likelihoods


def test_B6_draws_from_the_prior_vary_far_more_than_importance_weighted_ones() -> None:
    model, x = linear_gaussian("diagonal"), 2 * normal(4, 4)
    expected, runs = evidence(model, x), 200
    repeated = x.repeat(runs, 1)
    for k in (4, 32):
        naive = model.naive_bound(repeated, k, seed=1).view(runs, 4)
        weighted = model.elbo(repeated, k, seed=1).view(runs, 4)
        # Both are unbiased estimates of p(x): it is the variance of their ratio to it that differs.
        ratios = [(bound - expected).exp() for bound in (naive, weighted)]
        assert bool((ratios[0].var(0) > 2 * ratios[1].var(0)).all())
        assert float(ratios[0].var(0).mean()) > 10 * float(ratios[1].var(0).mean())
        assert bool((expected - naive.mean(0) > expected - weighted.mean(0)).all())
    error = ratios[0].std(0) / runs**0.5
    assert bool(((ratios[0].mean(0) - 1).abs() < 5 * error).all())
    assert bool(((ratios[1].mean(0) - 1).abs() < 5 * ratios[1].std(0) / runs**0.5).all())
    torch.testing.assert_close(model.naive_bound(x[::2], 3000), expected[::2], rtol=0, atol=0.4)


def test_B6_the_naive_bound_of_the_digits_is_loose(trained_iwae: LatentVariable) -> None:
    x = digits().test.x[:50]
    naive, weighted = (float(bound(x, 64).mean()) for bound in (trained_iwae.naive_bound, trained_iwae.elbo))
    assert naive < weighted - 2


# C11: estimators of gradients


def test_C11_both_estimators_have_the_same_mean_and_the_pathwise_one_less_variance() -> None:
    """E[|z|^2 + z_0] of a Gaussian, whose gradients are 2 mu + e_0 and sigma^2."""
    n, dimensions = 20_000, 6
    mu = normal(1, dimensions)[0].requires_grad_()
    log_var = torch.linspace(-1, 0.5, dimensions, dtype=torch.float64).requires_grad_()
    exact = [2 * mu.detach() + F.one_hot(torch.tensor(0), dimensions), log_var.detach().exp()]

    def f(z: Tensor) -> Tensor:
        return z.square().sum(1) + z[:, 0]

    mean = float(mu.detach().square().sum() + mu.detach()[0] + log_var.detach().exp().sum())
    spread: dict[str, Tensor] = {}
    for name, estimator, options in (
        ("path", pathwise, {}),
        ("score", score_function, {}),
        ("baseline", score_function, {"baseline": mean}),
    ):
        rows = [p.expand(n, dimensions).detach().requires_grad_() for p in (mu, log_var)]
        value = estimator(f, *rows, NoiseKey(1), **options)
        assert float(value.detach().mean()) == pytest.approx(mean, abs=5 * float(value.detach().std()) / n**0.5)
        gradients = torch.autograd.grad(value.sum(), rows)
        for found, expected in zip(gradients, exact, strict=True):
            error = found.std(0) / n**0.5
            assert bool(((found.mean(0) - expected).abs() < 5 * error + 1e-9).all()), name
        spread[name] = torch.cat([g.var(0) for g in gradients])
    assert bool((spread["path"] < spread["baseline"]).all())
    assert bool((spread["path"] < 0.2 * spread["score"]).all())
    assert float(spread["baseline"].mean()) < float(spread["score"].mean())


def test_C11_the_score_function_needs_no_gradient_of_f() -> None:
    """The probability that z is positive, a step function: its gradient with respect to mu is the density at 0."""
    n = 40_000
    mu, log_var = torch.full((n, 1), 0.3).double().requires_grad_(), torch.zeros(n, 1).double()
    step = lambda z: (z[:, 0] > 0).double()  # noqa: E731
    value = score_function(step, mu, log_var, NoiseKey(0), baseline=0.6)
    (gradient,) = torch.autograd.grad(value.sum(), mu)
    expected = math.exp(-0.5 * 0.09) / math.sqrt(2 * math.pi)
    assert float(gradient.mean()) == pytest.approx(expected, abs=5 * float(gradient.std()) / n**0.5)
    assert not pathwise(step, mu, log_var, NoiseKey(0)).requires_grad
