"""Rows B1 to B3 of docs/models.md: Gaussian mixtures by EM, where they start, and the bound that they raise."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import sklearn.mixture
import sklearn.neighbors
import torch
from torch import Tensor

from dgm_kernels import NoiseKey, mixture_log_prob, noise_like
from dgm_models import create_model
from dgm_models.data import digits
from dgm_models.mixtures import (
    GaussianMixture,
    Mixture,
    anneal,
    em_step,
    kmeans,
    lower_bound,
    m_step,
    start,
)
from dgm_models.mixtures.em import second_moments

COVARIANCES = ("spherical", "diagonal", "full")
SKLEARN = {"spherical": "spherical", "diagonal": "diag", "full": "full"}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return noise_like(torch.empty(*shape, dtype=torch.float64), NoiseKey(seed, stream=99))


def clusters(n: int = 300, dimensions: int = 3) -> Tensor:
    """Three Gaussians of different places, widths and sizes."""
    x = normal(n, dimensions)
    third = torch.arange(n) % 6
    x[third < 2] = 0.5 * x[third < 2] + torch.tensor([4.0, 0.0, 1.0], dtype=torch.float64)[:dimensions]
    x[third == 2] = x[third == 2] * torch.linspace(0.3, 2.0, dimensions, dtype=torch.float64) - 3.0
    return x


def some_mixture(covariance: str, components: int = 4, dimensions: int = 3, seed: int = 1) -> Mixture:
    """Random parameters."""
    weights = torch.softmax(normal(1, components, seed=seed)[0], 0)
    means = 2 * normal(components, dimensions, seed=seed + 1)
    if covariance == "full":
        root = normal(components, dimensions, dimensions, seed=seed + 2)
        full = root @ root.mT + torch.eye(dimensions, dtype=torch.float64)
        return Mixture(weights, means, scale_tril=torch.linalg.cholesky(full))
    shape = (components,) if covariance == "spherical" else (components, dimensions)
    return Mixture(weights, means, scale=(0.3 * normal(1, *shape, seed=seed + 2)[0]).exp())


def covariances(mixture: Mixture) -> Tensor:
    """``[K, D, D]`` of any kind."""
    if mixture.scale_tril is not None:
        return mixture.scale_tril @ mixture.scale_tril.mT
    assert mixture.scale is not None
    variance = mixture.scale.square()
    return torch.diag_embed(variance if variance.dim() == 2 else variance[:, None].expand(-1, mixture.means.shape[1]))


def torch_mixture(mixture: Mixture) -> torch.distributions.MixtureSameFamily:
    return torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(mixture.weights),
        torch.distributions.MultivariateNormal(mixture.means, covariances(mixture)),
    )


def peer(mixture: Mixture) -> sklearn.mixture.GaussianMixture:
    """scikit-learn's mixture that starts from these parameters, without regularisation."""
    kind = mixture.covariance
    full = covariances(mixture)
    precisions = torch.linalg.inv(full).numpy()
    if kind != "full":
        precisions = precisions.diagonal(axis1=1, axis2=2)
        precisions = precisions[:, 0] if kind == "spherical" else precisions
    return sklearn.mixture.GaussianMixture(
        len(mixture.weights),
        covariance_type=SKLEARN[kind],
        reg_covar=0.0,
        weights_init=mixture.weights.numpy(),
        means_init=mixture.means.numpy(),
        precisions_init=precisions,
        tol=1e-10,
    )


def vectors(components: int = 3, covariance: str = "diagonal", **config: object) -> GaussianMixture:
    """A mixture of continuous vectors in float64."""
    options = {"levels": None, "image_shape": (3,), "restarts": 2, "annealing": 0, "tolerance": 1e-9, **config}
    return create_model("gaussian_mixture", components=components, covariance=covariance, **options).double()


# B1: EM


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_B1_one_em_step_is_scikit_learns(covariance: str) -> None:
    x, mixture = clusters(), some_mixture(covariance)
    model = peer(mixture).set_params(max_iter=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(x.numpy())
    new, log_likelihood = em_step(x, mixture, min_variance=1e-12)
    full = {
        "spherical": lambda c: c[:, None, None] * np.eye(3),
        "diagonal": lambda c: np.stack([np.diag(v) for v in c]),
    }
    expected = full.get(covariance, lambda c: c)(model.covariances_)
    assert float(log_likelihood) == pytest.approx(float(torch_mixture(mixture).log_prob(x).mean()), rel=1e-9)
    for found, other in ((new.weights, model.weights_), (new.means, model.means_), (covariances(new), expected)):
        np.testing.assert_allclose(found.numpy(), other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_B1_em_ends_where_scikit_learns_does(covariance: str) -> None:
    x, mixture = clusters(), some_mixture(covariance, components=3)
    expected = peer(mixture).set_params(max_iter=3000).fit(x.numpy()).score(x.numpy())
    for _ in range(300):
        mixture, _ = em_step(x, mixture)
    assert float(mixture.log_prob(x).mean()) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("min_variance", [1e-6, 0.3])
def test_B1_the_log_likelihood_never_falls(covariance: str, min_variance: float) -> None:
    """Nor where the least variance is reached."""
    x = clusters(120)
    mixture = start("data", x, 6, covariance, key=NoiseKey(3), min_variance=min_variance)
    found = []
    for _ in range(60):
        mixture, log_likelihood = em_step(x, mixture, min_variance=min_variance)
        found.append(float(log_likelihood))
    assert np.diff(found).min() > -1e-12
    assert found[-1] > found[0] + 0.1
    least = torch.linalg.eigvalsh(covariances(mixture)).min()
    assert float(least) > min_variance * (1 - 1e-9)
    assert (float(least) < min_variance * (1 + 1e-9)) == (min_variance == 0.3), "it is reached, or too small to matter"


def test_B1_the_least_variance_is_the_best_covariance_above_it() -> None:
    """Of all covariances without an eigenvalue below the least one: no small step within them is better."""
    x = normal(40, 3) @ torch.tensor([[1.0, 0.9, 0.0], [0.0, 0.2, 0.1], [0.3, 0.0, 0.1]], dtype=torch.float64)
    floor = 0.05
    best = m_step(x, torch.ones(40, 1, dtype=torch.float64), "full", min_variance=floor)
    values, vectors_ = torch.linalg.eigh(covariances(best)[0])
    sample = torch.linalg.eigvalsh(torch.cov(x.T, correction=0))
    assert float(sample.min()) < floor < float(sample.max())
    torch.testing.assert_close(values, sample.clamp(min=floor))
    at = float(best.log_prob(x).mean())
    for seed in range(30):
        turn = torch.linalg.matrix_exp(0.05 * (normal(3, 3, seed=seed) - normal(3, 3, seed=seed).T))
        moved = (values * (0.05 * normal(1, 3, seed=seed + 50)[0]).exp()).clamp(min=floor)
        other = turn @ vectors_ @ torch.diag(moved) @ (turn @ vectors_).T
        assert float(best._replace(scale_tril=torch.linalg.cholesky(other)[None]).log_prob(x).mean()) < at


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_B1_a_component_without_points_stays_where_it_is(covariance: str) -> None:
    x, mixture = clusters(60), some_mixture(covariance)
    means = mixture.means.clone()
    means[2] = 1e4
    mixture = mixture._replace(means=means)
    before = mixture.log_prob(x).mean()
    new, _ = em_step(x, mixture)
    assert torch.equal(new.means[2], means[2])
    torch.testing.assert_close(covariances(new)[2], covariances(mixture)[2])
    assert 0 < float(new.weights[2]) < 1e-20
    assert all(bool(p.isfinite().all()) for p in new if p is not None)
    assert float(new.log_prob(x).mean()) > float(before)
    again, _ = em_step(x, new)
    assert torch.equal(again.means[2], means[2])


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_B1_fit_finds_the_clusters_and_their_density(covariance: str) -> None:
    x = clusters(600)
    model = vectors(3, covariance)
    losses = model.fit(x, steps=500)
    assert len(losses) > 2
    assert np.diff(losses).max() < 1e-9
    assert losses[-1] == pytest.approx(float(model.loss(x).detach()), abs=1e-6)
    size = model.mixture.weights.sort().values.detach()
    torch.testing.assert_close(size, torch.tensor([1, 2, 3]).double() / 6, rtol=0, atol=0.03)
    torch.testing.assert_close(model.log_prob(x), torch_mixture(model.mixture).log_prob(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.elbo(x, k=3), model.log_prob(x).detach())
    far = torch.full((1, 3), 400.0, dtype=torch.float64)
    assert bool(model.log_prob(far).isfinite())


def test_B1_of_several_starts_the_best_on_the_validation_samples_is_kept() -> None:
    x = clusters(90)
    alone = []
    for validation in (None, clusters(60) + 0.1):
        one = vectors(4, init="data", restarts=1)
        many = vectors(4, init="data", restarts=4)
        judges = x if validation is None else validation
        one.fit(x, validation, seed=2)
        many.fit(x, validation, seed=2)
        scores = [float(model.log_prob(judges).detach().mean()) for model in (one, many)]
        assert scores[1] > scores[0]
        alone.append(scores)
    assert alone[0] != alone[1]


def test_B1_a_fit_goes_on_and_stops_when_told() -> None:
    x = clusters(200)
    whole, parts = (vectors(3, restarts=1, tolerance=0.0) for _ in range(2))
    losses = whole.fit(x, steps=12)
    assert len(losses) == 12
    found = parts.fit(x, steps=5) + parts.fit(x, steps=7)
    assert found == pytest.approx(losses, rel=1e-9)
    told: list[float] = []

    def report(loss: float) -> bool:
        told.append(loss)
        return len(told) < 3

    stopped = vectors(3, restarts=4)
    assert stopped.fit(x, report=report) == told == pytest.approx(losses[:3], rel=1e-9)


def test_B1_annealing_comes_before_em_from_random_starts() -> None:
    x = clusters(200)
    for init, steps in (("kmeans", 4), ("variances", 0)):
        model = vectors(3, init=init, restarts=1, annealing=4, tolerance=0.0)
        losses = model.fit(x, steps=3, seed=5)
        key = NoiseKey(5, stream=12)  # that of starts
        mixture = anneal(x, start(init, x, 3, "diagonal", key=key, min_variance=1e-3), steps, min_variance=1e-3)
        expected = -float(mixture.log_prob(x).mean()) / 3
        assert losses[0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_B1_samples_have_the_density(covariance: str) -> None:
    model = vectors(4, covariance)
    mixture = some_mixture(covariance)
    model.set_mixture(mixture)
    x, n = model.sample(40_000, seed=3), 40_000
    mean = (mixture.weights[:, None] * mixture.means).sum(0)
    spread = mixture.means - mean
    second = mixture.weights[:, None, None] * (covariances(mixture) + spread[:, :, None] * spread[:, None, :])
    deviation = x.std(0)
    assert bool(((x.mean(0) - mean).abs() < 5 * deviation / n**0.5).all())
    torch.testing.assert_close(torch.cov(x.T), second.sum(0), rtol=0.05, atol=0.1)
    # The mean log-density of the samples is minus the entropy, which other samples estimate as well.
    other = torch_mixture(mixture)
    expected = other.log_prob(other.sample((n,)))
    assert float(model.log_prob(x).detach().mean()) == pytest.approx(
        float(expected.mean()), abs=5 * float(expected.std()) / 140
    )


def test_B1_grey_levels_have_a_density_that_bounds_their_probability() -> None:
    """One pixel of four levels, so that the log-probability is a difference of distribution functions."""
    model = create_model("gaussian_mixture", image_shape=(1,), components=3, levels=4).double()
    wide = Mixture(
        torch.tensor([0.2, 0.5, 0.3]).double(),
        torch.tensor([[0.5], [2.0], [3.0]]).double(),
        scale=torch.tensor([0.2, 0.5, 1.0]).double()[:, None],
    )
    model.set_mixture(wide)
    edges = torch.arange(5).double()
    parts = torch.distributions.Normal(wide.means, wide.scale).cdf(edges)
    exact = (wide.weights[:, None] * parts.diff(dim=1)).sum(0).log()
    x = (torch.arange(4).double() / 3 * 2 - 1).repeat_interleave(4000)[:, None]
    bounds = [model.elbo(x, k, seed=5).view(4, -1).mean(1) for k in (1, 4, 64)]
    torch.testing.assert_close(bounds[0], model.log_prob(x, seed=5).view(4, -1).mean(1).detach())
    assert bool((bounds[0] < bounds[1]).all())
    assert bool((bounds[1] < bounds[2]).all())
    torch.testing.assert_close(bounds[2], exact, rtol=0, atol=0.02)
    drawn = torch.bincount(((model.sample(20_000) + 1) * 1.5).round().long()[:, 0], minlength=4) / 20_000
    beyond = [float(wide.weights @ parts[:, 0]), float(wide.weights @ (1 - parts[:, -1]))]  # goes to the last levels
    expected = exact.exp() + torch.tensor([beyond[0], 0, 0, beyond[1]]).double()
    torch.testing.assert_close(drawn.double(), expected, rtol=0, atol=0.02)


def test_B1_level_noise_and_dequantisation_are_part_of_the_fit_only() -> None:
    model, x = (
        create_model("gaussian_mixture", components=2, dequantizations=3, level_noise=0.6),
        digits().train.x[:100],
    )
    y = model._training_points(x, seed=0)
    level = ((x + 1) * 8).round().flatten(1).repeat(3, 1)
    step = y.ceil() - 1 - level
    assert y.shape == (300, 64)
    assert bool(((y > 0) & (y <= 17)).all())
    assert bool((step[level == 0] == 0).all())
    middle = (level > 0) & (level < 16)
    for value in (-1, 1):
        assert float((step[middle] == value).double().mean()) == pytest.approx(0.3, abs=0.02)
    assert not torch.equal(y[:100], y[100:200])
    plain = create_model("gaussian_mixture", components=2, level_noise=0.0, dequantizations=1)
    y = plain._training_points(x, seed=0)
    assert torch.equal(y.ceil() - 1, level[:100])
    assert torch.equal(y, plain._training_points(x, seed=0))
    assert torch.equal(plain.points(x, NoiseKey(4)).ceil() - 1, level[:100])


# B2: where EM starts


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_B2_the_same_means_and_variances_stay_stuck_for_ever(covariance: str) -> None:
    x, model = clusters(), vectors(3, covariance, init="same")
    with pytest.warns(UserWarning, match="init 'same' .* EM can never separate them"):
        losses = model.fit(x, steps=200)
    mixture = model.mixture
    one = m_step(x, torch.ones(len(x), 1, dtype=torch.float64), covariance)
    for k in range(3):
        torch.testing.assert_close(mixture.means[k], one.means[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(covariances(mixture)[k], covariances(one)[0], rtol=1e-9, atol=1e-9)
    assert losses[-1] == pytest.approx(-float(one.log_prob(x).mean()) / 3, abs=1e-12)
    for _ in range(5 if covariance == "full" else 300):  # rounding of products of matrices grows
        mixture, _ = em_step(x, mixture)
    assert float((mixture.means - one.means).detach().abs().max()) < 1e-9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vectors(1, covariance, init="same").fit(x)  # one component is not stuck


@pytest.mark.parametrize("init", ["variances", "data", "kmeans"])
def test_B2_the_other_starts_separate_the_clusters(init: str) -> None:
    x, model = clusters(600), vectors(3, "full", init=init, restarts=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = model.fit(x, steps=1000)
    single = vectors(1, "full")
    single.fit(x)
    assert losses[-1] * 3 < 3 * float(single.loss(x).detach()) - 0.5
    distance = torch.cdist(model.means, model.means).detach() + 100 * torch.eye(3)
    assert float(distance.min()) > 1.0


def test_B2_the_starts_are_what_they_are_called() -> None:
    x = clusters(100)
    for covariance in COVARIANCES:
        same, spread = (start(name, x, 4, covariance, key=NoiseKey(0)) for name in ("variances", "data"))
        whole = m_step(x, torch.ones(100, 1, dtype=torch.float64), covariance)
        torch.testing.assert_close(same.means, whole.means.expand(4, 3))
        ratio = (covariances(same) / covariances(whole)).diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(
            ratio, torch.tensor([-1.0, -1 / 3, 1 / 3, 1.0]).double().exp2()[:, None].expand(4, 3)
        )
        torch.testing.assert_close(covariances(spread), covariances(whole).expand(4, 3, 3))
        chosen = (spread.means[:, None] == x).all(2)
        assert chosen.sum(1).tolist() == [1, 1, 1, 1]
        assert int(chosen.any(0).sum()) == 4, "four different points"


def test_B2_kmeans_finds_clusters_and_depends_on_the_key_alone() -> None:
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]]).double()
    x = centres.repeat_interleave(50, 0) + 0.1 * normal(200, 2)
    for seed in range(10):
        means, nearest = kmeans(x, 4, NoiseKey(seed))
        expected = torch.stack([x[i : i + 50].mean(0) for i in range(0, 200, 50)])
        order = torch.cdist(means, expected).argmin(1)
        torch.testing.assert_close(means, expected[order])
        assert torch.equal(order[nearest], torch.arange(4).repeat_interleave(50))
        assert torch.equal(kmeans(x, 4, NoiseKey(seed))[0], means)
    copies = torch.ones(5, 2, dtype=torch.float64)
    assert torch.equal(kmeans(copies, 3, NoiseKey(0))[0], torch.ones(3, 2, dtype=torch.float64))


# B3: the M-step and the bound


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_B3_the_m_step_has_the_largest_bound_for_given_responsibilities(covariance: str) -> None:
    x = clusters(80)
    r = torch.softmax(normal(80, 3, seed=7), 1)
    best = m_step(x, r, covariance)
    torch.testing.assert_close(best.weights, r.mean(0))
    torch.testing.assert_close(best.means, torch.stack([(r[:, [k]] * x).sum(0) / r[:, k].sum() for k in range(3)]))
    names = [name for name, value in zip(best._fields, best, strict=True) if value is not None and name != "weights"]
    leaves = {name: getattr(best, name).clone().requires_grad_() for name in names}
    logits = best.weights.log().requires_grad_()
    bound = lower_bound(x, r, Mixture(torch.softmax(logits, 0), **leaves)).mean()
    for gradient in torch.autograd.grad(bound, [logits, *leaves.values()]):
        assert float(gradient.abs().max()) < 1e-9
    for seed in range(10):
        moved = {name: value.detach() + 0.01 * normal(*value.shape, seed=seed) for name, value in leaves.items()}
        assert float(lower_bound(x, r, Mixture(best.weights, **moved)).mean()) < float(bound.detach())


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_B3_the_bounds_gradient_is_the_likelihoods_at_the_e_step(covariance: str) -> None:
    x, mixture = clusters(50), some_mixture(covariance)
    r = mixture.responsibilities(x)
    leaves = [p.clone().requires_grad_() for p in mixture if p is not None]
    names = [name for name, p in zip(mixture._fields, mixture, strict=True) if p is not None]
    copy = Mixture(**dict(zip(names, leaves, strict=True)))
    copy = copy._replace(weights=copy.weights / copy.weights.sum())
    bound, likelihood = lower_bound(x, r, copy), copy.log_prob(x)
    torch.testing.assert_close(bound, likelihood, rtol=1e-9, atol=1e-9)
    found = torch.autograd.grad(bound.sum(), leaves, retain_graph=True)
    expected = torch.autograd.grad(likelihood.sum(), leaves, retain_graph=True)
    for a, b in zip(found, expected, strict=True):
        assert float(b.abs().max()) > 0.1
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    elsewhere = torch.softmax(r.log() + 0.5 * normal(50, 4, seed=9), 1)
    gap = likelihood - lower_bound(x, elsewhere, copy)
    torch.testing.assert_close(gap, (elsewhere * (elsewhere / r).log()).sum(1), rtol=1e-8, atol=1e-8)
    assert not torch.allclose(
        torch.autograd.grad(lower_bound(x, elsewhere, copy).sum(), leaves)[1], found[1], rtol=0.01
    )


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_B3_annealing_flattens_the_responsibilities(covariance: str) -> None:
    x, mixture = clusters(60), some_mixture(covariance)
    each = torch.distributions.MultivariateNormal(mixture.means, covariances(mixture)).log_prob(x[:, None])
    for power in (0.2, 0.7):
        r = torch.softmax(power * (each + mixture.weights.log()), 1)
        expected = m_step(x, r, covariance)
        found = anneal(x, mixture, 1, least_power=power)
        for a, b in zip(found, expected, strict=True):
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    both = anneal(x, anneal(x, mixture, 1, least_power=0.25), 1, least_power=0.5)
    for a, b in zip(anneal(x, mixture, 2, least_power=0.25), both, strict=True):
        assert a is b is None or torch.equal(a, b)
    for a, b in zip(anneal(x, mixture, 1), em_step(x, mixture)[0], strict=True):
        assert a is b is None or torch.equal(a, b), "plain EM in few dimensions"
    with pytest.raises(ValueError, match=r"least_power must be in \(0, 1\], got 0"):
        anneal(x, mixture, 1, least_power=0.0)


def test_B3_second_moments_are_sums_of_outer_products() -> None:
    x, r, means = clusters(20), torch.softmax(normal(20, 2), 1), normal(2, 3, seed=4)
    deviation = x[:, None] - means
    full = torch.einsum("nk,nki,nkj->kij", r, deviation, deviation)
    torch.testing.assert_close(second_moments(x, r, means, "full"), full)
    torch.testing.assert_close(second_moments(x, r, means, "diagonal"), full.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(second_moments(x, r, means, "spherical"), full.diagonal(dim1=1, dim2=2).sum(1))


def test_B3_em_is_its_two_steps() -> None:
    x = clusters(70)
    for covariance in COVARIANCES:
        mixture = some_mixture(covariance)
        both, _ = em_step(x, mixture)
        after = m_step(x, mixture.responsibilities(x), covariance)
        for a, b in zip(both, after, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_B1_mixtures_learn_the_digits_in_seconds() -> None:
    """A full Gaussian has 2.970 bits a pixel on the test part; of several diagonal ones more is known."""
    data = digits()
    single = create_model("gaussian_mixture", components=1, covariance="full", level_noise=0.0, dequantizations=4)
    single.fit(data.train.x)
    assert float(single.bits_per_dim(single.log_prob(data.test.x).detach()).mean()) < 2.970
    several = create_model("gaussian_mixture", dequantizations=4, restarts=2)
    several.fit(data.train.x, data.validation.x)
    assert float(several.bits_per_dim(several.log_prob(data.validation.x).detach()).mean()) < 2.634


def test_the_loss_of_a_mixture_has_gradients() -> None:
    for covariance in COVARIANCES:
        model = vectors(3, covariance)
        model.set_mixture(some_mixture(covariance, components=3))
        x = clusters(40)
        before = float(model.loss(x).detach())
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for _ in range(20):
            optimizer.zero_grad()
            model.loss(x).backward()
            optimizer.step()
        assert float(model.loss(x).detach()) < before - 0.05
        assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in model.parameters())


def test_kmeans_finds_clusters_far_from_zero():
    centres = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]]) + 1e4
    x = centres.repeat(200, 1) + 0.25 * torch.randn(600, 2)
    means, nearest = kmeans(x, 3, NoiseKey(0))
    assert torch.bincount(nearest).tolist() == [200, 200, 200]
    assert float((means[:, None] - centres).norm(dim=-1).min(1).values.max()) < 0.1


def test_B3_the_bound_of_a_component_without_weight():
    x, ours = torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    mixture = Mixture(torch.tensor([1.0, 0.0]), torch.zeros(2, 2), torch.ones(2))
    expected = mixture_log_prob(x, mixture.means[:1], scale=torch.ones(1))
    torch.testing.assert_close(lower_bound(x, ours, mixture), expected)
