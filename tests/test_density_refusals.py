"""What the functions of the density op refuse, and how."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dgm_kernels import empirical_denoiser, kde_log_prob, mixture_em_statistics, mixture_log_prob, mmd, use_backend
from tests.cases import BACKENDS

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
Call = tuple[Callable[[], Any], type[Exception], str]
X, MEANS, SCALE = torch.randn(7, 3), torch.randn(4, 3), 0.5 + torch.rand(4, 3)
EYES = torch.eye(3).repeat(4, 1, 1)
FIFTHS = torch.tensor([0.2, 0.2, 0.2, 0.4])
NAN, INF = math.nan, math.inf


def of_points(name: str, call: Callable[[Any], Any], good: Tensor, matrix: bool) -> dict[str, Call]:
    """What is no tensor of points, for the argument ``name``; ``matrix``: of two dimensions, with those of x."""
    calls: dict[str, Call] = {
        f"{name} list": (lambda: call(good.tolist()), TypeError, f"^{name} must be a tensor, got list"),
        f"{name} None": (lambda: call(None), TypeError, f"^{name} must be a tensor, got NoneType"),
        f"{name} array": (lambda: call(good.numpy()), TypeError, f"^{name} must be a tensor, got ndarray"),
        f"{name} int": (lambda: call(good.long()), TypeError, f"^{name} must be a floating-point .*torch.int64"),
        f"{name} bool": (lambda: call(good > 0), TypeError, f"^{name} must be a floating-point .*torch.bool"),
        f"{name} complex": (lambda: call(good + 0j), TypeError, f"^{name} must be a floating-point"),
        f"{name} scalar": (lambda: call(good[0, 0]), ValueError, rf"^{name} must have shape .*got \(\)"),
        f"{name} no dimension": (lambda: call(good[:, :0]), ValueError, rf"^{name} must have shape .*got \(\d, 0\)"),
    }
    if matrix:
        wider = torch.cat([good, good], 1)
        calls |= {
            f"{name} wide": (lambda: call(wider), ValueError, rf"^{name} must have shape \[rows, 3\].*got \(\d, 6\)"),
            f"{name} vector": (lambda: call(good[0]), ValueError, rf"^{name} must have shape \[rows, 3\].*got \(3,\)"),
            f"{name} batch": (lambda: call(good[None]), ValueError, rf"^{name} must have shape .*got \(1, \d, 3\)"),
            f"{name} empty": (lambda: call(good[:0]), ValueError, rf"^{name} must have at least .*got shape \(0, 3\)"),
            f"{name} device": (
                lambda: call(good.to("meta")),
                ValueError,
                f"^{name} must be on the device of x(_t)?, cpu, got meta",
            ),
        }
    return calls


def mixture(**changes: Any) -> Callable[[], Any]:
    """A call with other arguments than the good ones; None leaves one out."""
    arguments = {"x": X, "means": MEANS, "scale": SCALE, **changes}
    given = {name: value for name, value in arguments.items() if name in ("x", "means") or value is not None}
    return lambda: mixture_log_prob(**given)


def spoiled(tensor: Tensor, *place: int, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


def full(name: str, value: Any) -> Callable[[], Any]:
    return mixture(scale=None, **{name: value})


def mixture_calls() -> dict[str, Call]:
    calls = of_points("x", lambda x: mixture_log_prob(x, MEANS, scale=SCALE), X, False)
    calls |= of_points("means", lambda means: mixture_log_prob(X, means, scale=SCALE), MEANS, True)
    exactly = "^exactly one of scale, scale_tril, covariance must be given"
    calls |= {
        "no spread": (mixture(scale=None), ValueError, f"{exactly}, got none"),
        "two spreads": (mixture(scale_tril=EYES), ValueError, f"{exactly}, got scale, scale_tril"),
        "three spreads": (mixture(scale_tril=EYES, covariance=EYES), ValueError, exactly),
        "two weights": (
            mixture(weights=FIFTHS, logits=FIFTHS),
            ValueError,
            "^weights and logits must not both be given",
        ),
        "scale number": (mixture(scale=1.0), TypeError, "^scale must be a tensor, got float"),
        "scale int": (mixture(scale=SCALE.long()), TypeError, "^scale must be a floating-point"),
        "scale shape": (
            mixture(scale=SCALE[:3]),
            ValueError,
            r"^scale must have shape \(4,\) or \(4, 3\) or \(1,\), got \(3, 3\)",
        ),
        "scale transposed": (mixture(scale=SCALE.mT), ValueError, r"^scale must have shape .*got \(3, 4\)"),
        "scale device": (mixture(scale=SCALE.to("meta")), ValueError, "^scale must be on the device of x"),
        "covariance shape": (
            full("covariance", EYES[0]),
            ValueError,
            r"^covariance must have shape \(4, 3, 3\), got \(3, 3\)",
        ),
        "covariance list": (full("covariance", EYES.tolist()), TypeError, "^covariance must be a tensor, got list"),
        "factor shape": (
            full("scale_tril", EYES[:, :2]),
            ValueError,
            r"^scale_tril must have shape \(4, 3, 3\), got \(4, 2, 3\)",
        ),
        "weights list": (mixture(weights=FIFTHS.tolist()), TypeError, "^weights must be a tensor, got list"),
        "weights shape": (mixture(weights=FIFTHS[:3]), ValueError, r"^weights must have shape \(4,\), got \(3,\)"),
        "logits shape": (mixture(logits=FIFTHS[None]), ValueError, r"^logits must have shape \(4,\), got \(1, 4\)"),
        "logits int": (mixture(logits=FIFTHS.long()), TypeError, "^logits must be a floating-point"),
    }
    return calls | mixture_values()


def mixture_values() -> dict[str, Call]:
    """Tensors of the right shape with values that no mixture has."""
    calls: dict[str, Call] = {}
    for value in (0.0, -1.0, NAN, INF):
        calls |= {
            f"scale {value}": (
                mixture(scale=spoiled(SCALE, 2, 1, value=value)),
                ValueError,
                rf"^scale must be positive and finite, got {value} at \[2, 1\]",
            ),
            f"scale of components {value}": (
                mixture(scale=spoiled(SCALE[:, 0], 3, value=value)),
                ValueError,
                rf"^scale must be positive and finite, got {value} at \[3\]",
            ),
            f"factor {value}": (
                full("scale_tril", spoiled(EYES, 1, 2, 2, value=value)),
                ValueError,
                rf"^scale_tril must be positive and finite on its diagonals, got {value} at \[1, 2\]",
            ),
        }
    uneven, indefinite = spoiled(EYES, 2, 0, 1, value=0.5), spoiled(EYES, 3, 1, 1, value=-0.5)
    singular, unknown = spoiled(EYES, 0, 1, 1, value=0.0), spoiled(EYES, 1, 1, 1, value=NAN)
    wrong = "must be positive definite, covariance"
    calls |= {
        "uneven": (full("covariance", uneven), ValueError, r"^covariance must be symmetric, covariance\[2\] is not"),
        "indefinite": (full("covariance", indefinite), ValueError, rf"^covariance {wrong}\[3\] is not"),
        "singular": (full("covariance", singular), ValueError, rf"^covariance {wrong}\[0\] is not"),
        "unknown": (full("covariance", unknown), ValueError, r"^covariance must be .*covariance\[1\] is not"),
        "weights below 0": (
            mixture(weights=torch.tensor([0.6, -0.1, 0.3, 0.2])),
            ValueError,
            "^weights must not be negative or NaN, got -0.1",
        ),
        "weights NaN": (mixture(weights=spoiled(FIFTHS, 1, value=NAN)), ValueError, "^weights must not be negative or"),
        "weights infinite": (mixture(weights=spoiled(FIFTHS, 1, value=INF)), ValueError, "^weights must sum to 1"),
        "weights above 1": (mixture(weights=2 * FIFTHS), ValueError, r"^weights must sum to 1, got 2\b"),
        "weights below 1": (mixture(weights=0.999 * FIFTHS), ValueError, r"^weights must sum to 1, got 0.99\d"),
        "weights 0": (mixture(weights=0 * FIFTHS), ValueError, r"^weights must sum to 1, got 0\b"),
        "logits NaN": (mixture(logits=spoiled(FIFTHS, 1, value=NAN)), ValueError, "^logits must be finite"),
        "logits infinite": (mixture(logits=spoiled(FIFTHS, 1, value=INF)), ValueError, "^logits must be finite"),
        "logits of nothing": (mixture(logits=torch.full((4,), -INF)), ValueError, "^logits must be finite, or minus"),
    }
    return calls


def data_calls() -> dict[str, Call]:
    """Of the kernel estimate and the denoiser."""

    def denoise(**changes: Any) -> Callable[[], Any]:
        return lambda: empirical_denoiser(**{"x_t": X, "data": MEANS, "alpha": 0.5, "sigma": 0.5} | changes)

    calls = of_points("data", lambda data: kde_log_prob(X, data, 0.5), MEANS, True)
    calls |= {f"denoiser {k}": v for k, v in of_points("data", lambda d: denoise(data=d)(), MEANS, True).items()}
    calls |= of_points("x_t", lambda x: denoise(x_t=x)(), X, False)
    for value in (0.0, -0.5, NAN, INF):
        got = f"must be a positive finite number, got {value}"
        calls |= {
            f"bandwidth {value}": (lambda v=value: kde_log_prob(X, MEANS, v), ValueError, f"^bandwidth {got}"),
            f"bandwidth tensor {value}": (
                lambda v=value: kde_log_prob(X, MEANS, torch.tensor(v)),
                ValueError,
                f"^bandwidth {got}",
            ),
            f"sigma {value}": (denoise(sigma=value), ValueError, f"^sigma {got}"),
            f"sigma of a point {value}": (
                denoise(sigma=spoiled(torch.ones(7), 2, value=value)),
                ValueError,
                f"^sigma {got}",
            ),
        }
        if value != 0:
            got = f"^alpha must be a non-negative finite number, got {value}"
            calls |= {
                f"alpha {value}": (denoise(alpha=value), ValueError, got),
                f"alpha of a point {value}": (denoise(alpha=spoiled(torch.ones(7), 2, value=value)), ValueError, got),
            }
    calls |= {
        "bandwidth list": (
            lambda: kde_log_prob(X, MEANS, [0.5]),
            TypeError,
            "^bandwidth must be a number or a tensor, got list",
        ),
        "bandwidth bool": (lambda: kde_log_prob(X, MEANS, True), TypeError, "^bandwidth must be a number .*got bool"),
        "bandwidth None": (lambda: kde_log_prob(X, MEANS, None), TypeError, "^bandwidth must be .*got NoneType"),
        "bandwidth a point": (
            lambda: kde_log_prob(X, MEANS, torch.ones(7)),
            ValueError,
            r"^bandwidth must have shape \(\), got \(7,\)",
        ),
        "bandwidth int": (lambda: kde_log_prob(X, MEANS, torch.tensor(1)), TypeError, "^bandwidth must be a floating"),
        "weights": (lambda: kde_log_prob(X, MEANS, 0.5, weights=FIFTHS + 0.1), ValueError, "^weights must sum to 1"),
        "denoiser weights": (denoise(weights=FIFTHS[:2]), ValueError, r"^weights must have shape \(4,\), got \(2,\)"),
        "sigma shape": (
            denoise(sigma=torch.ones(6)),
            ValueError,
            r"^sigma must have shape \(\) or \(7,\), got \(6,\)",
        ),
        "alpha column": (denoise(alpha=torch.ones(7, 1)), ValueError, r"^alpha must have shape .*got \(7, 1\)"),
        "alpha word": (denoise(alpha="0.5"), TypeError, "^alpha must be a number or a tensor, got str"),
        "alpha device": (denoise(alpha=torch.ones((), device="meta")), ValueError, "^alpha must be on the device of x"),
        "prediction": (
            denoise(prediction="x"),
            ValueError,
            "^prediction must be one of 'x0', 'eps', 'score', 'v', 'velocity', got 'x'",
        ),
        "prediction None": (denoise(prediction=None), ValueError, "^prediction must be one of .*got None"),
    }
    return calls


def mmd_calls() -> dict[str, Call]:
    distance = lambda **changes: lambda: mmd(**{"x": X, "y": MEANS} | changes)  # noqa: E731
    calls = of_points("x", lambda x: mmd(x, MEANS), X, False) | of_points("y", lambda y: mmd(X, y), MEANS, True)
    calls = {f"mmd {name}": call for name, call in calls.items()}
    calls |= {
        "mmd vector": (distance(x=X[0]), ValueError, r"^x must have .*got shape \(3,\)|^x must have shape \[N, D\]"),
        "mmd batch": (distance(x=X[None]), ValueError, r"^x must have shape \[N, D\], got \(1, 7, 3\)"),
        "mmd no x": (distance(x=X[:0]), ValueError, r"^x must have at least 2 rows, got shape \(0, 3\)"),
        "mmd one x": (distance(x=X[:1]), ValueError, r"^x must have at least 2 rows, got shape \(1, 3\)"),
        "mmd one y": (distance(y=MEANS[:1]), ValueError, r"^y must have at least 2 rows, got shape \(1, 3\)"),
        "mmd no y, biased": (distance(y=MEANS[:0], unbiased=False), ValueError, r"^y must have at least 1 row, got"),
        "kernel": (distance(kernel="laplace"), ValueError, "^kernel must be one of 'rbf', 'polynomial', got 'laplace'"),
        "bandwidth none": (distance(bandwidth=[]), ValueError, "^bandwidth must hold at least one number"),
        "bandwidth word": (distance(bandwidth="1"), TypeError, "^bandwidth must be a number or a sequence of numbers"),
        "bandwidths word": (distance(bandwidth=[1.0, "2"]), TypeError, "^bandwidth must be a number .*got '2'"),
    }
    for value in (0.0, -1.0, NAN, INF):
        got = f"^bandwidth must be positive and finite, got {value}"
        calls |= {
            f"mmd bandwidth {value}": (distance(bandwidth=value), ValueError, got),
            f"mmd bandwidths {value}": (distance(bandwidth=[1.0, value]), ValueError, got),
        }
    for name, values in {"degree": (0, -1, 2.0, True, None), "gamma": (NAN, INF, "1"), "coef0": (NAN, None)}.items():
        for value in values:
            error = TypeError if name != "degree" and not isinstance(value, float) else ValueError
            calls[f"{name} {value}"] = (distance(kernel="polynomial", **{name: value}), error, f"^{name} must be a")
    return calls


CALLS = mixture_calls() | data_calls() | mmd_calls()


@on_every_backend
@pytest.mark.parametrize("name", CALLS)
def test_refusals(name, backend):
    call, error, message = CALLS[name]
    with use_backend(backend), pytest.raises(error, match=message):
        call()


@on_every_backend
def test_statistics_refuse_what_the_density_refuses(backend):
    with use_backend(backend):
        with pytest.raises(ValueError, match=r"^x must have at least 1 row, got shape \(0, 3\)"):
            mixture_em_statistics(X[:0], MEANS, scale=SCALE)
        with pytest.raises(ValueError, match=r"^scale must be positive and finite"):
            mixture_em_statistics(X, MEANS, scale=-SCALE)
        with pytest.raises(ValueError, match=r"^exactly one of scale, scale_tril, covariance must be given"):
            mixture_em_statistics(X, MEANS)
        with pytest.raises(ValueError, match=r"^weights must sum to 1"):
            mixture_em_statistics(X, MEANS, scale=SCALE, weights=torch.ones(4))


@on_every_backend
def test_what_is_allowed(backend):
    """Numbers of NumPy, whole numbers, weights with the rounding of their dtype, a covariance with a product's."""
    with use_backend(backend):
        expected = kde_log_prob(X, MEANS, 1.0)
        for one in (1, np.float32(1), np.float64(1), np.int64(1)):
            torch.testing.assert_close(kde_log_prob(X, MEANS, one), expected, rtol=0, atol=0)
        assert torch.equal(mmd(X, MEANS, bandwidth=(1, np.float32(2))), mmd(X, MEANS, bandwidth=[1.0, 2.0]))
        for count in (3, 7, 1023, 60_000):
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                weights = torch.rand(count, dtype=torch.float64)
                weights = (weights / weights.sum()).to(dtype)
                given = "auto" if dtype == torch.float64 else backend
                with use_backend(given):
                    assert kde_log_prob(X, torch.randn(count, 3), 1.0, weights=weights).isfinite().all()
        matrix = torch.randn(4, 3, 3)
        covariance = matrix @ matrix.mT + 0.1 * torch.eye(3)
        mixture_log_prob(X, MEANS, covariance=covariance)
        covariance[:, 0, 1] *= 1 + 1e-7
        mixture_log_prob(X, MEANS, covariance=covariance)
        mixture_log_prob(X, MEANS, scale=SCALE, logits=torch.tensor([0.0, -INF, 1e4, -1e4]))


@on_every_backend
def test_non_finite_points_give_nan_and_no_error(backend):
    """Points are data, not parameters: NaN in, NaN out; at infinity there is no density."""
    x = X.clone()
    x[2, 0], x[4, 1] = NAN, INF
    with use_backend(backend):
        log_prob = mixture_log_prob(x, MEANS, scale=SCALE)
    assert log_prob[2].isnan()
    assert bool(log_prob[4].isnan() or log_prob[4] == -INF)
    assert log_prob[torch.tensor([0, 1, 3, 5, 6])].isfinite().all()
