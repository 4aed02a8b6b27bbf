"""The density op against SciPy, scikit-learn, torch.distributions and PyTorch's own gradients, in float64 to 1e-9."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics.pairwise import polynomial_kernel, rbf_kernel
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KernelDensity
from torch import Tensor

from dgm_kernels import (
    empirical_denoiser,
    kde_log_prob,
    mixture_em_statistics,
    mixture_log_prob,
    mmd,
    use_backend,
)
from tests.cases import BACKENDS
from tests.density_cases import Sizes, random_factor, random_scale

POINTS, COMPONENTS, FEATURES = 113, 5, 3
SIZES = Sizes(POINTS, COMPONENTS, FEATURES)
KINDS = {"spherical": "spherical", "diagonal": "diag", "full": "full"}
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


def assert_near(actual: Any, expected: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected).to(actual.dtype), rtol=tolerance, atol=tolerance)


def mixture(kind: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Points, means and the other arguments of a mixture, in float64."""
    x, means = torch.randn(POINTS, FEATURES).double(), torch.randn(COMPONENTS, FEATURES).double()
    weights = 0.2 + torch.rand(COMPONENTS, dtype=torch.float64)
    options = {"weights": weights / weights.sum()}
    if kind == "full":
        options["scale_tril"] = random_factor(SIZES).double()
    else:
        shape = (COMPONENTS,) if kind == "spherical" else (COMPONENTS, FEATURES)
        options["scale"] = random_scale(SIZES, shape).double()
    return x, means, options


def factors(options: dict[str, Tensor]) -> Tensor:
    """The Cholesky factors of the components, whatever their kind."""
    if "scale_tril" in options:
        return options["scale_tril"]
    scale = options["scale"]
    return torch.diag_embed(scale[:, None].expand(-1, FEATURES) if scale.dim() == 1 else scale)


def covariances(options: dict[str, Tensor]) -> Tensor:
    """As scikit-learn has them: numbers, diagonals or matrices."""
    if "scale" in options:
        return options["scale"].square()
    return options["scale_tril"] @ options["scale_tril"].mT


def fitted(kind: str, means: Tensor, options: dict[str, Tensor], **settings: Any) -> GaussianMixture:
    """scikit-learn's mixture that starts from these parameters."""
    variance = covariances(options).numpy()
    precisions = np.linalg.inv(variance) if kind == "full" else 1 / variance
    return GaussianMixture(
        COMPONENTS,
        covariance_type=KINDS[kind],
        weights_init=options["weights"].numpy(),
        means_init=means.numpy(),
        precisions_init=precisions,
        reg_covar=0.0,
        **settings,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_mixture_against_scipy(kind):
    x, means, options = mixture(kind)
    scores = [
        np.log(float(w)) + stats.multivariate_normal(mean.numpy(), (f @ f.T).numpy()).logpdf(x.numpy())
        for w, mean, f in zip(options["weights"], means, factors(options), strict=True)
    ]
    expected = np.logaddexp.reduce(scores, axis=0)
    actual, r = mixture_log_prob(x, means, **options, return_responsibilities=True)
    assert_near(actual, expected)
    assert_near(r, np.exp(np.array(scores) - expected).T)


@pytest.mark.parametrize("kind", KINDS)
def test_mixture_against_torch_distributions(kind):
    x, means, options = mixture(kind)
    normals = torch.distributions.MultivariateNormal(means, scale_tril=factors(options))
    if kind != "full":
        normals = torch.distributions.Independent(
            torch.distributions.Normal(means, factors(options).diagonal(dim1=1, dim2=2)), 1
        )
    choice = torch.distributions.Categorical(options["weights"])
    expected = torch.distributions.MixtureSameFamily(choice, normals).log_prob(x)
    assert_near(mixture_log_prob(x, means, **options), expected)
    spread = {name: value for name, value in options.items() if name != "weights"}
    logits = options["weights"].log() + 7.0  # a constant does not count
    assert_near(mixture_log_prob(x, means, **spread, logits=logits), expected)
    assert_near(mixture_log_prob(x, means, covariance=factors(options) @ factors(options).mT, logits=logits), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_mixture_against_sklearn(kind):
    x, means, options = mixture(kind)
    peer = fitted(kind, means, options)
    peer._initialize(x.numpy(), np.zeros((POINTS, COMPONENTS)))
    actual, r = mixture_log_prob(x, means, **options, return_responsibilities=True)
    assert_near(actual, peer.score_samples(x.numpy()))
    assert_near(r, peer.predict_proba(x.numpy()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Best performing initialization")
@pytest.mark.filterwarnings("ignore:Initialization 1 did not converge")
def test_one_em_step_is_that_of_sklearn(kind):
    x, means, options = mixture(kind)
    peer = fitted(kind, means, options, max_iter=1, tol=0.0).fit(x.numpy())
    statistics = mixture_em_statistics(x, means, **options)
    counts = statistics.counts
    assert_near(counts / POINTS, peer.weights_)
    shape = (-1,) + (1,) * (statistics.second.dim() - 1)
    d = statistics.first / counts[:, None]
    assert_near(means + d, peer.means_)
    of_mean = {"spherical": d.square().sum(1), "diagonal": d.square(), "full": d[:, :, None] * d[:, None]}[kind]
    variance = statistics.second / counts.view(shape) - of_mean
    assert_near(variance / FEATURES if kind == "spherical" else variance, peer.covariances_)
    assert_near(statistics.log_likelihood, mixture_log_prob(x, means, **options).mean())


@on_every_backend
@pytest.mark.parametrize("kind", KINDS)
def test_em_steps_raise_the_likelihood(kind, backend):
    """Five steps from the statistics; in float32 too. Wide at first, no component collapses."""
    dtype = torch.float64 if backend == "reference" else torch.float32
    x, means, options = mixture(kind)
    options = {name: value if name == "weights" else 2 * value for name, value in options.items()}
    x, means, options = x.to(dtype), means.to(dtype), {name: value.to(dtype) for name, value in options.items()}
    likelihoods = []
    with use_backend(backend):
        for _ in range(6):
            statistics = mixture_em_statistics(x, means, **options)
            likelihoods.append(float(statistics.log_likelihood))
            counts = statistics.counts
            d = statistics.first / counts[:, None]
            means, options = means + d, {"weights": counts / counts.sum()}
            if kind == "full":
                second = statistics.second / counts[:, None, None] - d[:, :, None] * d[:, None]
                options["covariance"] = (second + second.mT) / 2
            elif kind == "diagonal":
                options["scale"] = (statistics.second / counts[:, None] - d.square()).sqrt()
            else:
                options["scale"] = ((statistics.second / counts - d.square().sum(1)) / FEATURES).sqrt()
    gains = np.diff(likelihoods)
    assert (gains > -1e-5).all() and likelihoods[-1] > likelihoods[0] + 0.02


@pytest.mark.parametrize("weighted", [False, True])
def test_kde_against_sklearn(weighted):
    x, data = torch.randn(59, FEATURES).double(), torch.randn(POINTS, FEATURES).double()
    weights = torch.rand(POINTS, dtype=torch.float64) if weighted else torch.ones(POINTS, dtype=torch.float64)
    weights /= weights.sum()
    for h in (0.1, 0.7, 3.0):
        # One leaf: a tree of several prunes what counts far from the data, whatever its tolerance.
        peer = KernelDensity(bandwidth=h, leaf_size=POINTS).fit(data.numpy(), sample_weight=weights.numpy())
        expected = peer.score_samples(x.numpy())
        assert_near(kde_log_prob(x, data, h, weights=weights if weighted else None), expected)


@pytest.mark.parametrize("weighted", [False, True])
def test_kde_against_scipy(weighted):
    """In one dimension, where SciPy's bandwidth is a number times the standard deviation of the data."""
    x, data = torch.randn(59, 1).double(), torch.randn(POINTS, 1).double()
    weights = torch.rand(POINTS, dtype=torch.float64)
    weights = weights / weights.sum() if weighted else None
    peer = stats.gaussian_kde(data[:, 0].numpy(), weights=None if weights is None else weights.numpy())
    h = float(np.sqrt(peer.covariance[0, 0]))
    assert_near(kde_log_prob(x, data, h, weights=weights), peer.logpdf(x[:, 0].numpy()))


def dense_denoiser(x: Tensor, data: Tensor, alpha: Tensor, sigma: Tensor, weights: Tensor) -> Tensor:
    """E[x0 | x_t] by Bayes' rule, from the density of every pair."""
    joint = (
        weights
        * torch.distributions.Normal(alpha[:, None, None] * data, sigma[:, None, None])
        .log_prob(x[:, None])
        .sum(2)
        .exp()
    )
    return joint @ data / joint.sum(1, keepdim=True)


@pytest.mark.parametrize("per_point", [False, True])
def test_denoiser_is_bayes_rule(per_point):
    x, data = torch.randn(59, FEATURES).double(), torch.randn(POINTS, FEATURES).double()
    shape = (59,) if per_point else ()
    alpha, sigma = (0.2 + torch.rand(shape, dtype=torch.float64) for _ in range(2))
    weights = torch.rand(POINTS, dtype=torch.float64)
    weights /= weights.sum()
    expected = dense_denoiser(x, data, alpha.expand(59), sigma.expand(59), weights)
    assert_near(empirical_denoiser(x, data, alpha, sigma, weights=weights), expected)
    uniform = torch.full_like(weights, 1 / POINTS)
    expected = dense_denoiser(x, data, alpha.expand(59), sigma.expand(59), uniform)
    assert_near(empirical_denoiser(x, data, alpha, sigma), expected)


def test_G5_score_against_numerical_differences():
    """The central difference of the log-density of the noisy data, to the square of its step."""
    x, data = torch.randn(7, FEATURES).double(), torch.randn(31, FEATURES).double()
    step = 1e-5
    score = empirical_denoiser(x, data, 0.7, 0.4, prediction="score")
    for dim in range(FEATURES):
        move = step * torch.eye(FEATURES, dtype=torch.float64)[dim]
        up, down = (kde_log_prob(x + sign * move, 0.7 * data, 0.4) for sign in (1, -1))
        assert_near(score[:, dim], (up - down) / (2 * step), tolerance=1e-7)


@pytest.mark.parametrize("unbiased", [False, True])
def test_mmd_against_sklearn_kernels(unbiased):
    x, y = torch.randn(31, FEATURES).double(), 0.3 + torch.randn(59, FEATURES).double()

    def dense(kernel: Any) -> float:
        def within(a: np.ndarray) -> float:
            k = kernel(a, a)
            return (k.sum() - np.trace(k)) / (len(a) * (len(a) - 1)) if unbiased else k.mean()

        return within(x.numpy()) + within(y.numpy()) - 2 * kernel(x.numpy(), y.numpy()).mean()

    widths = [0.5, 1.0, 3.0]
    rbf = lambda a, b: sum(rbf_kernel(a, b, 0.5 / h**2) for h in widths) / len(widths)  # noqa: E731
    assert_near(mmd(x, y, bandwidth=widths, unbiased=unbiased), dense(rbf))
    assert_near(mmd(x, y, bandwidth=2.0, unbiased=unbiased), dense(lambda a, b: rbf_kernel(a, b, 0.125)))
    for degree, gamma, coef0 in ((1, 0.5, 0.0), (2, 0.3, 1.5), (3, None, 1.0)):
        options = {"degree": degree, "gamma": gamma, "coef0": coef0}
        expected = dense(lambda a, b, o=options: polynomial_kernel(a, b, **o))
        assert_near(mmd(x, y, kernel="polynomial", unbiased=unbiased, **options), expected)


@on_every_backend
def test_kid_is_the_published_number(backend):
    """(x.y / D + 1)^3, unbiased, as the kernel inception distance has it."""
    x, y = torch.randn(31, 16), 0.3 + torch.randn(59, 16)
    k = lambda a, b: (a.double() @ b.double().T / 16 + 1) ** 3  # noqa: E731
    xx, yy, xy = k(x, x), k(y, y), k(x, y)
    expected = (xx.sum() - xx.trace()) / (31 * 30) + (yy.sum() - yy.trace()) / (59 * 58) - 2 * xy.mean()
    with use_backend(backend):
        assert_near(mmd(x, y, kernel="polynomial").double(), expected, tolerance=1e-5)


@on_every_backend
@pytest.mark.parametrize("options", [{"bandwidth": [0.5, 2.0]}, {"kernel": "polynomial"}], ids=["rbf", "polynomial"])
def test_unbiased_mmd_of_equal_distributions_is_0_on_average(options, backend):
    """400 pairs of samples: the mean is 0 to four standard errors; the biased one is above, and so is a shifted one."""
    with use_backend(backend):
        draws = {"unbiased": [], "biased": [], "shifted": []}
        for _ in range(400):
            x, y = torch.randn(2, 20, 2)
            draws["unbiased"].append(float(mmd(x, y, **options)))
            draws["biased"].append(float(mmd(x, y, unbiased=False, **options)))
            draws["shifted"].append(float(mmd(x, y + 1.0, **options)))
    errors = {name: np.std(values) / np.sqrt(len(values)) for name, values in draws.items()}
    assert abs(np.mean(draws["unbiased"])) < 4 * errors["unbiased"]
    assert np.mean(draws["biased"]) > 10 * errors["biased"]
    assert np.mean(draws["shifted"]) > 10 * errors["shifted"]


@on_every_backend
def test_biased_mmd_of_one_sample_with_itself_is_0(backend):
    x = torch.randn(59, 3)
    with use_backend(backend):
        for options in ({"bandwidth": 0.7}, {"kernel": "polynomial"}):
            assert abs(float(mmd(x, x.clone(), unbiased=False, **options))) < 1e-6
        assert float(mmd(x[:1], x[1:2], unbiased=False)) == pytest.approx(
            2 - 2 * float(torch.exp(-0.5 * (x[0] - x[1]).square().sum())), abs=1e-6
        )
