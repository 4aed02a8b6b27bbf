"""Sizes, calls and eager yardsticks of the density op that tests and bench share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgm_kernels import empirical_denoiser, kde_log_prob, mixture_em_statistics, mixture_log_prob, mmd


class Sizes(NamedTuple):
    """How many points, components (or data points) and dimensions."""

    points: int
    components: int
    features: int


# Ragged first: no multiple of a vector, a tile or a block; then none; then the dimensions of a picture.
SIZES = tuple(
    Sizes(*size)
    for size in (
        *((1, 1, 1), (3, 2, 2), (59, 31, 3), (113, 113, 16), (1023, 2, 33), (59, 300, 64), (3, 113, 100)),
        *((1, 300, 16), (1023, 300, 2), (33, 17, 1), (0, 31, 3), (113, 31, 784)),
    )
)
SMALL = Sizes(5, 4, 3)
LOG_2PI = math.log(2 * math.pi)
PREDICTIONS = ("x0", "eps", "score", "v", "velocity")


def eager_log_weights(weights: Tensor | None, logits: Tensor | None, means: Tensor) -> Tensor:
    """Logarithms of the weights of the components."""
    if logits is not None:
        return logits.log_softmax(0)
    return means.new_full(means.shape[:1], -math.log(len(means))) if weights is None else weights.log()


def eager_scores(
    x: Tensor,
    means: Tensor,
    *,
    scale: Tensor | None = None,
    scale_tril: Tensor | None = None,
    covariance: Tensor | None = None,
    weights: Tensor | None = None,
    logits: Tensor | None = None,
    differences: bool = False,
) -> Tensor:
    """``log weights_k + log N(x; ...)`` as a user writes it: by two matrix products, or (the full form too) by
    differences of all points and means."""
    log_weights = eager_log_weights(weights, logits, means)
    if scale is None:
        factor = torch.linalg.cholesky(covariance) if scale_tril is None else scale_tril.tril()
        t = (x[..., None, :] - means)[..., None]
        squares = torch.linalg.solve_triangular(factor, t, upper=False).squeeze(-1).square().sum(-1)
        log_scale = factor.diagonal(dim1=1, dim2=2).log().sum(1)
    else:
        scale = (scale if scale.dim() == 2 else scale[:, None]).expand_as(means)
        log_scale, p = scale.log().sum(1), scale**-2
        if differences:
            squares = ((x[..., None, :] - means) / scale).square().sum(-1)
        else:
            squares = x.square() @ p.T - 2 * (x @ (means * p).T) + (means.square() * p).sum(1)
    return log_weights - log_scale - 0.5 * (means.shape[1] * LOG_2PI + squares)


def eager_mixture(
    x: Tensor, means: Tensor, *, return_responsibilities: bool = False, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """``mixture_log_prob`` as a user writes it."""
    scores = eager_scores(x, means, **options)
    log_prob = scores.logsumexp(-1)
    return (log_prob, scores.softmax(-1)) if return_responsibilities else log_prob


def eager_statistics(x: Tensor, means: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """``mixture_em_statistics`` from the matrix of responsibilities and the differences of all points and means."""
    log_prob, r = eager_mixture(x, means, return_responsibilities=True, **options)
    t = x[:, None] - means
    first = torch.einsum("nk,nkd->kd", r, t)
    if options.get("scale") is None:
        second = torch.einsum("nk,nkd,nke->kde", r, t, t)
    else:
        second = torch.einsum("nk,nkd->kd", r, t.square())
        second = second if options["scale"].dim() == 2 else second.sum(1)
    return log_prob.mean(), r.sum(0), first, second


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """``|x - y|^2`` of all pairs by a matrix product."""
    return (x.square().sum(-1, keepdim=True) - 2 * (x @ y.T) + y.square().sum(-1)).clamp(min=0)


def squared_differences(x: Tensor, y: Tensor) -> Tensor:
    """``|x - y|^2`` of all pairs from their differences."""
    return (x[..., None, :] - y).square().sum(-1)


def eager_kde(
    x: Tensor,
    data: Tensor,
    bandwidth: float | Tensor,
    *,
    weights: Tensor | None = None,
    differences: bool = False,
) -> Tensor:
    """``kde_log_prob`` as a user writes it."""
    h = torch.as_tensor(bandwidth, dtype=x.dtype)
    squares = (squared_differences if differences else squared_distances)(x, data)
    scores = eager_log_weights(weights, None, data) - squares / (2 * h.square())
    return scores.logsumexp(-1) - x.shape[-1] * (h.log() + 0.5 * LOG_2PI)


def eager_denoiser(
    x_t: Tensor,
    data: Tensor,
    alpha: float | Tensor,
    sigma: float | Tensor,
    *,
    weights: Tensor | None = None,
    prediction: str = "x0",
    return_log_prob: bool = False,
    differences: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``empirical_denoiser`` as a user writes it: a softmax between two matrix products, or of distances."""
    a, s = (torch.as_tensor(number, dtype=x_t.dtype)[..., None] for number in (alpha, sigma))
    if differences:
        scores = -0.5 * ((x_t[..., None, :] - a[..., None] * data) / s[..., None]).square().sum(-1)
    else:
        scores = (a * (x_t @ data.T) - 0.5 * a.square() * data.square().sum(1)) / s.square()
    scores = scores + eager_log_weights(weights, None, data)
    x0 = scores.softmax(-1) @ data
    eps = (x_t - a * x0) / s
    result = {"x0": x0, "eps": eps, "score": -eps / s, "v": a * eps - s * x0, "velocity": x0 - eps}[prediction]
    if not return_log_prob:
        return result
    alone = 0.0 if differences else 0.5 * (x_t / s).square().sum(-1)
    return result, scores.logsumexp(-1) - alone - x_t.shape[-1] * (s.squeeze(-1).log() + 0.5 * LOG_2PI)


def eager_mmd(
    x: Tensor,
    y: Tensor,
    *,
    kernel: str = "rbf",
    bandwidth: float | Sequence[float] = 1.0,
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
    unbiased: bool = True,
    differences: bool = False,
) -> Tensor:
    """``mmd`` as a user writes it, from three matrices of all pairs."""
    widths = bandwidth if isinstance(bandwidth, (list, tuple)) else [bandwidth]

    def k(x: Tensor, y: Tensor) -> Tensor:
        if kernel == "polynomial":
            return ((1 / x.shape[1] if gamma is None else gamma) * (x @ y.T) + coef0) ** degree
        squares = (squared_differences if differences else squared_distances)(x, y)
        return sum(torch.exp(-squares / (2 * h**2)) for h in widths) / len(widths)

    def within(x: Tensor) -> Tensor:
        pairs = k(x, x)
        if unbiased:
            return (pairs.sum() - pairs.diagonal().sum()) / (len(x) * (len(x) - 1))
        return pairs.mean()

    return within(x) + within(y) - 2 * k(x, y).mean()


def random_scale(sizes: Sizes, shape: tuple[int, ...]) -> Tensor:
    """Standard deviations at which several of the components count, whatever the dimension."""
    return 0.3 * (1.0 + math.sqrt(sizes.features)) * (0.5 + torch.rand(shape))


def random_factor(sizes: Sizes) -> Tensor:
    """Cholesky factors ``[K, D, D]`` of well-conditioned covariances; zeros above the diagonal."""
    k, d = sizes.components, sizes.features
    below = 0.1 * torch.randn(k, d, d).tril(-1)
    return torch.diag_embed(random_scale(sizes, (k, d))) + below


def random_weights(count: int) -> Tensor:
    """Probabilities, none of them 0."""
    weights = 0.2 + torch.rand(count, dtype=torch.float64)
    return (weights / weights.sum()).float()


@dataclasses.dataclass(frozen=True)
class DensityCase:
    """One way to call a function of the op: its operands and their names, positional ones first, and its options."""

    name: str
    function: Callable[..., Any]
    eager: Callable[..., Any]
    operands: Callable[[Sizes], dict[str, Tensor]]
    names: tuple[str, ...]
    positional: int = 2
    differentiable: bool = True
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    @property
    def is_full(self) -> bool:
        """Whether the components have matrices."""
        return "covariance" in self.names or "scale_tril" in self.names

    def takes(self, sizes: Sizes) -> bool:
        """Whether there is such a call, and whether its operands are small enough for a test."""
        if self.function is mmd:
            return min(sizes[:2]) >= 2
        if self.function is mixture_em_statistics and sizes.points == 0:
            return False
        return not self.is_full or sizes.points * sizes.components * sizes.features**2 <= 5e6

    def forms(self, sizes: Sizes) -> tuple[bool, ...]:
        """The options ``differences`` that eager has: full components have no other form, large matrices no time."""
        others = max(sizes.points, sizes.components) if self.function is mmd else sizes.components
        return (False, True) if not self.is_full and sizes.points * others * sizes.features < 5e6 else (False,)

    def make(self, sizes: Sizes, dtype: torch.dtype = torch.float32, grad: bool = False) -> list[Tensor]:
        """Random operands, x first."""
        made = self.operands(sizes)
        if dtype == torch.float64:  # the weights of float32 sum to 1 but for its rounding
            made |= {"weights": made["weights"].double() / made["weights"].double().sum()} if "weights" in made else {}
        return [operand.to(dtype).requires_grad_(grad) for operand in made.values()]

    def leaves(self, operands: Sequence[Tensor], backend: str = "reference") -> list[Tensor]:
        """Copies with gradients for all that the backend differentiates by: of the denoiser kernels have x's alone."""
        alone = self.function is empirical_denoiser and backend != "reference"
        return [o.detach().clone().requires_grad_(index == 0 or not alone) for index, o in enumerate(operands)]

    @property
    def trained(self) -> int:
        """How many operands, from x on, have gradients on every backend: of the denoiser kernels have x's alone."""
        return (1 if self.function is empirical_denoiser else len(self.names)) if self.differentiable else 0

    def call(self, *operands: Tensor) -> Any:
        return self._call(self.function, operands)

    def call_eager(self, *operands: Tensor, **more: Any) -> Any:
        return self._call(self.eager, operands, **more)

    def call_free(self, *operands: Tensor) -> Any:
        """The call as a function of unconstrained operands: weights are normalised and a covariance made symmetric."""
        maps = {"weights": lambda w: w / w.sum(), "covariance": lambda c: (c + c.mT) / 2}
        changed = [maps.get(name, lambda t: t)(t) for name, t in zip(self.names, operands, strict=True)]
        return self._call(self.function, changed)

    def _call(self, function: Callable[..., Any], operands: Sequence[Tensor], **more: Any) -> Any:
        named = dict(zip(self.names[self.positional :], operands[self.positional :], strict=True))
        return function(*operands[: self.positional], **named, **self.options, **more)


def _spread(kind: str, sizes: Sizes) -> dict[str, Tensor]:
    """The operand that says how wide the components are."""
    if kind == "scale_tril":
        return {kind: random_factor(sizes)}
    if kind == "covariance":
        factor = random_factor(sizes)
        return {kind: factor @ factor.mT}
    k, d = sizes.components, sizes.features
    return {"scale": random_scale(sizes, {"shared": (1,), "spherical": (k,), "diagonal": (k, d)}[kind])}


def _weights(kind: str | None, count: int) -> dict[str, Tensor]:
    if kind is None:
        return {}
    return {kind: random_weights(count) if kind == "weights" else torch.randn(count)}


def _mixture(kind: str, weights: str | None = None, statistics: bool = False, **options: Any) -> DensityCase:
    def operands(sizes: Sizes) -> dict[str, Tensor]:
        x, means = torch.randn(sizes.points, sizes.features), torch.randn(sizes.components, sizes.features)
        return {"x": x, "means": means, **_spread(kind, sizes), **_weights(weights, sizes.components)}

    names = ("x", "means", kind if kind in ("scale_tril", "covariance") else "scale", *([weights] if weights else []))
    words = ["em" if statistics else "mixture", kind, *([weights] if weights else []), *(["full"] if options else [])]
    functions = (mixture_em_statistics, eager_statistics) if statistics else (mixture_log_prob, eager_mixture)
    return DensityCase(" ".join(words), *functions, operands, names, differentiable=not statistics, options=options)


def _kde(weights: str | None = None) -> DensityCase:
    def operands(sizes: Sizes) -> dict[str, Tensor]:
        x, data = torch.randn(sizes.points, sizes.features), torch.randn(sizes.components, sizes.features)
        return {"x": x, "data": data, "bandwidth": random_scale(sizes, ()), **_weights(weights, sizes.components)}

    names = ("x", "data", "bandwidth", *([weights] if weights else []))
    return DensityCase(f"kde{' weights' * bool(weights)}", kde_log_prob, eager_kde, operands, names, positional=3)


def _denoiser(prediction: str, per_point: bool = False, weights: str | None = None, full: bool = False) -> DensityCase:
    def operands(sizes: Sizes) -> dict[str, Tensor]:
        shape = (sizes.points,) if per_point else ()
        alpha, sigma = 0.5 + 0.5 * torch.rand(shape), random_scale(sizes, shape)
        x, data = torch.randn(sizes.points, sizes.features), torch.randn(sizes.components, sizes.features)
        return {"x_t": x, "data": data, "alpha": alpha, "sigma": sigma, **_weights(weights, sizes.components)}

    words = ["denoiser", prediction, *["per point"] * per_point, *([weights] if weights else []), *["full"] * full]
    options = {"prediction": prediction, "return_log_prob": full}
    names = ("x_t", "data", "alpha", "sigma", *([weights] if weights else []))
    return DensityCase(
        " ".join(words), empirical_denoiser, eager_denoiser, operands, names, positional=4, options=options
    )


def _mmd(name: str, **options: Any) -> DensityCase:
    def operands(sizes: Sizes) -> dict[str, Tensor]:
        return {
            "x": torch.randn(sizes.points, sizes.features),
            "y": torch.randn(sizes.components, sizes.features) + 0.2,
        }

    return DensityCase(f"mmd {name}", mmd, eager_mmd, operands, ("x", "y"), options=options)


MIXTURE_CASES = (
    _mixture("shared", "weights"),
    _mixture("spherical"),
    _mixture("spherical", "logits", return_responsibilities=True),
    _mixture("diagonal"),
    _mixture("diagonal", "weights"),
    _mixture("diagonal", "logits", return_responsibilities=True),
    _mixture("scale_tril", "weights"),
    _mixture("scale_tril", return_responsibilities=True),
    _mixture("covariance", "logits"),
)
EM_CASES = tuple(
    _mixture(kind, weights, statistics=True)
    for kind, weights in (("shared", None), ("spherical", "weights"), ("diagonal", "logits"), ("scale_tril", "weights"))
)
KDE_CASES = (_kde(), _kde("weights"))
DENOISER_CASES = (
    *(_denoiser(prediction) for prediction in PREDICTIONS),
    _denoiser("x0", per_point=True, full=True),
    _denoiser("score", per_point=True, weights="weights", full=True),
)
MMD_CASES = (
    _mmd("rbf", bandwidth=2.0),
    _mmd("rbf of three widths, biased", bandwidth=(0.5, 2.0, 8.0), unbiased=False),
    _mmd("polynomial", kernel="polynomial"),
    _mmd("polynomial of degree 2, biased", kernel="polynomial", degree=2, gamma=0.3, coef0=0.5, unbiased=False),
)
DIFFERENTIABLE_CASES = (*MIXTURE_CASES, *KDE_CASES, *DENOISER_CASES, *MMD_CASES)
CASES = (*DIFFERENTIABLE_CASES, *EM_CASES)


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    """One output or several."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
