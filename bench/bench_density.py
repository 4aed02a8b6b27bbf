"""Cases of the density op: mixtures, a step of EM, kernel estimates, the exact denoiser of a data set, MMD; memory.

Contenders that take seconds are timed by a part of the points, whose time is counted as often as gives the work of all
(`Contender.repeats`). Of mixtures and the kernel estimate some points are checked, evenly spread.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.compare import Bars, Case, Contender, Setup, bars_at_two_threads, ours, size_name, variants
from bench.density_baselines import (
    EMStep,
    Parameters,
    SklearnMixture,
    denoiser_of_distances,
    em_step,
    in_chunks,
    kde_of_distances,
    kde_of_products,
    sklearn_kde,
)
from bench.environment import available_cores
from dgm_kernels import empirical_denoiser, kde_log_prob, mixture_em_statistics, mixture_log_prob, mmd
from tests.density_cases import eager_denoiser, eager_kde, eager_mixture, eager_mmd

NATIVES = ("cpp", "triton")
MIXTURE = (100_000, 64, 256)  # points, dimensions, components
SMALL_MIXTURE = (1000, 2, 8)
EM = (100_000, 64, 32)
KDE = (10_000, 32, 100_000)  # queries, dimensions, data
KDE_TRAINING = (1000, 32, 20_000)
DENOISER = (256, 784, 60_000)
MMD = (2000, 64, 2000)
BANDWIDTH = 0.7
WIDTHS = (2.0, 4.0, 8.0, 16.0, 32.0)
CHUNK = 1000  # queries that eager takes at a time
CHECKED = 64  # of the points or queries of a case that has slow contenders
SKLEARN_QUERIES = 20
BROADCAST_CHUNK, BROADCAST_PARTS = 250, 100
TOLERANCE = 1e-4  # of scikit-learn, relative

Function = Callable[..., Any]
Operands = Sequence[Tensor]


def without_sklearn(setup: Setup) -> dict[str, str]:
    """Why scikit-learn does not compete; empty if it does."""
    if setup.device.type != "cpu":
        return {"sklearn": "runs on CPUs"}
    found = importlib.util.find_spec("sklearn")
    return {} if found else {"sklearn": "not installed"}


def with_gradients(function: Function, operands: Operands, seed: Tensor) -> tuple[Tensor, ...]:
    """The result and the gradients of the operands, for a given gradient of the result."""
    with torch.enable_grad():
        result = function(*operands)
        return result.detach(), *torch.autograd.grad(result, operands, seed.to(result.dtype))


def training_case(
    setup: Setup,
    name: str,
    fused: Function,
    plain: Function,
    make_operands: Callable[[], Operands],
    make_seed: Callable[[], Tensor],
    **fields: Any,
) -> Case:
    """Forward and backward of `fused` against `plain`, compiled too."""

    def make_inputs() -> SimpleNamespace:
        operands = [operand.to(setup.device).requires_grad_() for operand in make_operands()]
        return SimpleNamespace(operands=operands, seed=make_seed().to(setup.device))

    def reference(i: SimpleNamespace) -> tuple[Tensor, ...]:
        return with_gradients(plain, [t.detach().double().requires_grad_() for t in i.operands], i.seed)

    contenders, missing = ours(lambda i: with_gradients(fused, i.operands, i.seed), setup, NATIVES)
    for baseline, function in variants(plain, setup).items():
        contenders[baseline] = Contender(lambda i, f=function: with_gradients(f, i.operands, i.seed))
    return Case(name, make_inputs, contenders, reference, grad=True, missing=missing, **fields)


def mixture_operands(points: int, features: int, components: int) -> Operands:
    """x, means, scale and logits."""
    x, means = torch.randn(points, features), torch.randn(components, features)
    return x, means, 0.5 + torch.rand(components, features), torch.randn(components)


def mixture_traffic(points: int, features: int, components: int, train: bool = False) -> Mapping[str, int]:
    """Points, parameters and results, and their gradients; the two products of x^2 and x with all components.

    Backward those two again, two for the gradient of x, and two for those of the parameters.
    """
    numbers = points * (features + 1) + components * (2 * features + 1)
    products = 2 * points * features * components
    return {"bytes": 4 * numbers * (2 if train else 1), "flops": products * (8 if train else 2)}


def mixture(
    setup: Setup, sizes: tuple[int, int, int], *, peers: bool = False, bars: Bars = bars_at_two_threads
) -> Case:
    """Diagonal components; eager in two matrix products. "broadcast" takes differences, of some points at a time."""

    def fused(x: Tensor, means: Tensor, scale: Tensor, logits: Tensor) -> Any:
        return mixture_log_prob(x, means, scale=scale, logits=logits)

    def plain(x: Tensor, means: Tensor, scale: Tensor, logits: Tensor, differences: bool = False) -> Any:
        return eager_mixture(x, means, scale=scale, logits=logits, differences=differences)

    def broadcast(x: Tensor, *rest: Tensor) -> Any:
        return in_chunks(lambda part: plain(part, *rest, differences=True), x, BROADCAST_CHUNK)

    def checked(function: Function) -> Function:
        """Of the chosen points."""
        return lambda i: function(i.operands[0][chosen], *i.operands[1:])

    def make_inputs() -> SimpleNamespace:
        operands = mixture_operands(*sizes)
        _, means, scale, logits = operands
        sklearn = SklearnMixture("diag", logits.softmax(0), means, scale.square()) if has_sklearn else None
        return SimpleNamespace(operands=[t.to(setup.device) for t in operands], sklearn=sklearn)

    chosen = torch.linspace(0, sizes[0] - 1, min(CHECKED, sizes[0])).long()
    all_points = lambda i: fused(*i.operands)  # noqa: E731
    contenders, missing = ours(all_points, setup, NATIVES, check=lambda i: all_points(i)[chosen])
    missing |= without_sklearn(setup) if peers else {}
    has_sklearn = peers and "sklearn" not in missing
    for baseline, function in variants(plain, setup).items():
        contenders[baseline] = Contender(
            lambda i, f=function: f(*i.operands), lambda i, f=function: f(*i.operands)[chosen]
        )
    if peers:
        points = sizes[0] // BROADCAST_PARTS
        part = lambda i: broadcast(i.operands[0][:points], *i.operands[1:])  # noqa: E731
        contenders["broadcast"] = Contender(part, checked(broadcast), repeats=BROADCAST_PARTS)
    if has_sklearn:
        contenders["sklearn"] = Contender(
            lambda i: i.sklearn.log_prob(i.operands[0]),
            lambda i: i.sklearn.log_prob(i.operands[0][chosen]),
            tolerance=TOLERANCE,
        )
    return Case(
        f"mixture {size_name(sizes[:2])}, {sizes[2]} components",
        make_inputs,
        contenders,
        lambda i: checked(plain)(SimpleNamespace(operands=[t.double() for t in i.operands])),
        **mixture_traffic(*sizes),
        bars=bars(setup),
        missing=missing,
    )


def mixture_training(setup: Setup, bars: Bars = bars_at_two_threads) -> Case:
    """Gradients of the points too, as where a network made them."""
    return training_case(
        setup,
        f"mixture forward+backward {size_name(MIXTURE[:2])}, {MIXTURE[2]} components",
        lambda x, means, scale, logits: mixture_log_prob(x, means, scale=scale, logits=logits),
        lambda x, means, scale, logits: eager_mixture(x, means, scale=scale, logits=logits),
        lambda: mixture_operands(*MIXTURE),
        lambda: torch.randn(MIXTURE[0]),
        **mixture_traffic(*MIXTURE, train=True),
        bars=bars(setup),
    )


def fused_em_step(x: Tensor, old: Parameters) -> EMStep:
    """The M-step from the sums that the E-step leaves."""
    sums = mixture_em_statistics(x, old.means, covariance=old.covariances, weights=old.weights)
    d = sums.first / sums.counts[:, None]
    covariances = sums.second / sums.counts[:, None, None] - d[:, :, None] * d[:, None]
    return sums.log_likelihood, sums.counts / len(x), old.means + d, covariances


def em(setup: Setup, bars: Bars = bars_at_two_threads) -> Case:
    """Full covariances, which every contender factors.

    What must be done: the triangle of A (x - mu) and the triangle of its outer products, for all pairs.
    """
    points, features, components = EM

    def make_inputs() -> SimpleNamespace:
        means = torch.randn(components, features)
        x = means[torch.randint(components, (points,))] + torch.randn(points, features)
        factors = torch.eye(features) + 0.02 * torch.randn(components, features, features).tril()
        weights = torch.full((components,), 1 / components)
        old = Parameters(weights, means + 0.1 * torch.randn_like(means), factors @ factors.mT)
        sklearn = SklearnMixture("full", *old) if "sklearn" not in missing else None
        return SimpleNamespace(
            x=x.to(setup.device), old=Parameters(*(t.to(setup.device) for t in old)), sklearn=sklearn
        )

    contenders, missing = ours(lambda i: fused_em_step(i.x, i.old), setup, NATIVES)
    missing |= without_sklearn(setup) | {"compile": "its loop over the components would be unrolled"}
    contenders["eager"] = Contender(lambda i: em_step(i.x, i.old))
    if "sklearn" not in missing:
        contenders["sklearn"] = Contender(lambda i: i.sklearn.em_step(i.x), tolerance=TOLERANCE)
    return Case(
        f"EM step {size_name(EM[:2])}, {components} full components",
        make_inputs,
        contenders,
        lambda i: em_step(i.x.double(), Parameters(*(t.double() for t in i.old))),
        bytes=4 * (points * features + 2 * components * features**2),
        flops=2 * points * components * features**2,
        bars=bars(setup),
        missing=missing,
    )


def kde(setup: Setup, bars: Bars = bars_at_two_threads) -> Case:
    """Exact densities of many queries; "eager" takes distances of some queries at a time, "products" a product."""
    queries, features, count = KDE
    chosen = torch.linspace(0, queries - 1, min(CHECKED, queries)).long()

    def chunked(function: Function) -> Contender:
        """Timed by one chunk."""
        return Contender(
            lambda i: function(i.x[:CHUNK], i.data, BANDWIDTH),
            lambda i: function(i.x[chosen], i.data, BANDWIDTH),
            repeats=-(-queries // CHUNK),
        )

    def make_inputs() -> SimpleNamespace:
        x, data = torch.randn(queries, features), torch.randn(count, features)
        sklearn = sklearn_kde(data, BANDWIDTH) if "sklearn" not in missing else None
        return SimpleNamespace(x=x.to(setup.device), data=data.to(setup.device), sklearn=sklearn)

    fused = lambda i: kde_log_prob(i.x, i.data, BANDWIDTH)  # noqa: E731
    contenders, missing = ours(fused, setup, NATIVES, check=lambda i: fused(i)[chosen])
    missing |= without_sklearn(setup)
    for baseline, function in variants(kde_of_distances, setup).items():
        contenders[baseline] = chunked(function)
    contenders["products"] = chunked(kde_of_products)
    if "sklearn" not in missing:
        contenders["sklearn"] = Contender(
            lambda i: i.sklearn(i.x[:SKLEARN_QUERIES]),
            lambda i: i.sklearn(i.x[chosen]),
            tolerance=TOLERANCE,
            repeats=queries // SKLEARN_QUERIES,
        )
    return Case(
        f"KDE {queries} queries, {count}x{features} data",
        make_inputs,
        contenders,
        lambda i: kde_of_distances(i.x[chosen].double(), i.data.double(), BANDWIDTH),
        bytes=4 * ((queries + count) * features + queries),
        flops=2 * queries * count * features,
        bars=bars(setup),
        missing=missing,
    )


def kde_training(setup: Setup) -> Case:
    """Gradients of queries and data; eager keeps the matrix of all pairs."""
    queries, features, count = KDE_TRAINING
    pairs = queries * count * features
    return training_case(
        setup,
        f"KDE forward+backward {queries} queries, {count}x{features} data",
        lambda x, data: kde_log_prob(x, data, BANDWIDTH),
        lambda x, data: eager_kde(x, data, BANDWIDTH),
        lambda: (torch.randn(queries, features), torch.randn(count, features)),
        lambda: torch.randn(queries),
        bytes=8 * ((queries + count) * features + queries),
        flops=8 * pairs,  # scores, scores again, and the products for the two gradients
    )


def pictures(count: int, features: int) -> Tensor:
    """Numbers in [-1, 1] as pictures of ten kinds have them: mostly background, alike within a kind."""
    strokes = torch.nn.functional.avg_pool1d(torch.randn(10, 1, features), 9, 1, 4)[:, 0]  # neighbours are alike
    kinds = 3.0 * strokes - 1.0
    values = kinds[torch.randint(10, (count,))] + 0.5 * torch.randn(count, features) * (strokes[:1] > -0.3)
    return values.clamp(-1.0, 1.0)


def denoiser(setup: Setup, alpha: float, sigma: float, bars: Bars = bars_at_two_threads) -> Case:
    """Of a set of pictures; eager is a softmax between two matrix products, "distances" one of ``torch.cdist``."""
    queries, features, count = DENOISER

    def make_inputs() -> SimpleNamespace:
        data = pictures(count, features)
        noisy = alpha * data[torch.randint(count, (queries,))] + sigma * torch.randn(queries, features)
        return SimpleNamespace(x=noisy.to(setup.device), data=data.to(setup.device))

    contenders, missing = ours(lambda i: empirical_denoiser(i.x, i.data, alpha, sigma), setup, NATIVES)
    for baseline, function in variants(eager_denoiser, setup).items():
        contenders[baseline] = Contender(lambda i, f=function: f(i.x, i.data, alpha, sigma))
    contenders["distances"] = Contender(lambda i: denoiser_of_distances(i.x, i.data, alpha, sigma))
    return Case(
        f"denoiser {queries} queries, {count}x{features} data, alpha {alpha} sigma {sigma}",
        make_inputs,
        contenders,
        lambda i: eager_denoiser(i.x.double(), i.data.double(), alpha, sigma),
        bytes=4 * (count + 2 * queries) * features,
        flops=4 * queries * count * features,
        bars=bars(setup),
        missing=missing,
    )


def mmd_training(setup: Setup, bars: Bars = bars_at_two_threads) -> Case:
    """A loss of five bandwidths. What must be done: half of two matrices of pairs and one whole, and its gradients."""
    n, features, m = MMD
    return training_case(
        setup,
        f"MMD forward+backward {n}x{features} and {m}x{features}, {len(WIDTHS)} bandwidths",
        lambda x, y: mmd(x, y, bandwidth=WIDTHS),
        lambda x, y: eager_mmd(x, y, bandwidth=WIDTHS),
        lambda: (torch.randn(n, features), 0.2 + torch.randn(m, features)),
        lambda: torch.ones(()),
        bytes=8 * (n + m) * features,
        flops=(n * n // 2 + m * m // 2 + n * m) * features * 8,
        bars=bars(setup),
    )


CASES: dict[str, Callable[[Setup], Case]] = {
    "mixture": partial(
        mixture,
        sizes=MIXTURE,
        peers=True,
        bars=partial(bars_at_two_threads, eager=2.5, broadcast=20, sklearn=8, memory=20),
    ),
    "mixture-small": partial(mixture, sizes=SMALL_MIXTURE),
    "mixture-train": mixture_training,
    "em": partial(em, bars=partial(bars_at_two_threads, sklearn=2)),
    "kde": partial(kde, bars=partial(bars_at_two_threads, eager=10, sklearn=100, memory=20)),
    "kde-train": kde_training,
    "denoiser": partial(denoiser, alpha=0.8, sigma=0.6, bars=partial(bars_at_two_threads, eager=2, memory=10)),
    "denoiser-noise": partial(denoiser, alpha=0.1, sigma=1.0),
    "mmd-train": mmd_training,
}
LARGE = ("mixture-train", "em", "kde", "denoiser", "denoiser-noise")


def test_density(
    compare: Callable[[Callable[[Setup], Case]], None],
    build: Callable[[Setup], Case],
    threads: int,
    pytestconfig: pytest.Config,
) -> None:
    fewer = pytestconfig.getoption("--device") == "cpu" and threads < min(2, available_cores())
    if fewer and any(build is CASES[name] for name in LARGE):
        pytest.skip("takes long, and the bar is for two threads")
    compare(build)
