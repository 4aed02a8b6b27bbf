"""Checks of the arguments of the density op."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._core.checks import check_device, check_float, values_known

MOST_BANDWIDTHS = 32  # the kernels hold them in their arguments


def check_points(name: str, value: object, like: Tensor | None = None, least: int = 0, like_name: str = "x") -> Tensor:
    """``value`` is a floating-point tensor ``[..., D]`` of ``least`` rows or more; of the D and device of ``like``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    check_float(name, value)
    if value.dim() == 0 or value.shape[-1] == 0:
        raise ValueError(f"{name} must have shape [..., D] with at least one dimension D, got {tuple(value.shape)}")
    if like is not None:
        if value.dim() != 2 or value.shape[1] != like.shape[-1]:
            raise ValueError(
                f"{name} must have shape [rows, {like.shape[-1]}] as {like_name} has it, got {tuple(value.shape)}"
            )
        check_device(name, value, like, like_name)
    if least and math.prod(value.shape[:-1]) < least:
        raise ValueError(f"{name} must have at least {least} row{'s' * (least > 1)}, got shape {tuple(value.shape)}")
    return value


def check_shape(
    name: str, value: object, shapes: Sequence[tuple[int, ...]], like: Tensor, like_name: str = "x"
) -> Tensor:
    """``value`` is a floating-point tensor of one of the shapes on the device of ``like``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    check_float(name, value)
    if tuple(value.shape) not in shapes:
        raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}, got {tuple(value.shape)}")
    check_device(name, value, like, like_name)
    return value


def check_all_positive(name: str, value: Tensor, what: str = "positive and finite") -> None:
    """All numbers of a CPU tensor are positive and finite; another device is not awaited."""
    if not values_known(value) or value.numel() == 0:
        return
    wrong = ~((value > 0) & value.isfinite())
    if bool(wrong.any()):
        place = tuple(int(i) for i in wrong.nonzero()[0])
        raise ValueError(f"{name} must be {what}, got {float(value[place])} at {list(place)}")


def check_one_of(**options: object) -> str:
    """The name of the one option that is given."""
    given = [name for name, value in options.items() if value is not None]
    if len(given) != 1:
        names = ", ".join(options)
        raise ValueError(f"exactly one of {names} must be given, got {', '.join(given) or 'none'}")
    return given[0]


def check_weights(weights: Tensor) -> None:
    """The weights of a CPU tensor are probabilities that sum to 1."""
    if not values_known(weights):
        return
    wide = weights.detach().double()
    if not bool((wide >= 0).all()):
        raise ValueError(f"weights must not be negative or NaN, got {float(wide.nan_to_num(-math.inf).min())}")
    total, slack = float(wide.sum()), max(1e-6, 4 * torch.finfo(weights.dtype).eps * math.sqrt(len(weights)))
    if not abs(total - 1.0) <= slack:
        raise ValueError(f"weights must sum to 1, got {total:.9g}")


def check_logits(logits: Tensor) -> None:
    """The logits of a CPU tensor leave a component with a positive weight."""
    if values_known(logits) and not bool(torch.isfinite(torch.logsumexp(logits.detach().double(), 0))):
        raise ValueError("logits must be finite, or minus infinity for some of the components")


def check_positive(
    name: str, value: float | Tensor, like: Tensor, per_row: bool = False, zero: bool = False, like_name: str = "x"
) -> float | Tensor:
    """``value`` is a positive finite number, or a tensor of them: without dimensions, or one a row of ``like``."""
    what = "a non-negative finite number" if zero else "a positive finite number"
    if isinstance(value, Tensor):
        shapes = [(), tuple(like.shape[:-1])] if per_row else [()]
        check_shape(name, value, shapes, like, like_name)
        if values_known(value) and value.numel():
            least, most = (float(bound) for bound in value.detach().aminmax())
            if not (most < math.inf and (least > 0 or (zero and least == 0))):
                raise ValueError(f"{name} must be {what}, got {most if least > 0 else least}")
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")
    number = float(value)
    if not (number < math.inf and (number > 0 or (zero and number == 0))):
        raise ValueError(f"{name} must be {what}, got {value!r}")
    return number


def check_positive_definite(covariance: Tensor) -> Tensor:
    """The Cholesky factors of ``[K, D, D]``; of a CPU tensor those that have none are an error (others give NaN)."""
    if values_known(covariance):
        skew = (covariance - covariance.mT).detach().abs().amax((1, 2))
        size = covariance.detach().abs().amax((1, 2))
        uneven = ~(skew <= 16 * torch.finfo(covariance.dtype).eps * size)
        if bool(uneven.any()):
            raise ValueError(f"covariance must be symmetric, covariance[{int(uneven.nonzero()[0])}] is not")
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if values_known(covariance) and bool((failed != 0).any()):
        raise ValueError(f"covariance must be positive definite, covariance[{int(failed.nonzero()[0])}] is not")
    return factor


def check_scale(name: str, scale: Tensor) -> None:
    """The scales of a CPU tensor, a number a component, are positive, and 1 / scale^2 is a number of their dtype."""
    check_all_positive(name, scale)
    check_all_positive(
        name, scale.reciprocal().square(), f"such that 1 / {name}^2 is positive and finite; 1 / {name}^2"
    )


def check_bandwidths(bandwidth: object, dtype: torch.dtype) -> list[float]:
    """One positive number h or several, with ``1 / h^2`` in the range of the dtype."""
    values: list[Any] = list(bandwidth) if isinstance(bandwidth, (list, tuple)) else [bandwidth]
    if not values:
        raise ValueError("bandwidth must hold at least one number")
    if len(values) > MOST_BANDWIDTHS:
        raise ValueError(f"bandwidth must hold at most {MOST_BANDWIDTHS} numbers, got {len(values)}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"bandwidth must be a number or a sequence of numbers, got {value!r}")
        if not 0 < float(value) < math.inf:
            raise ValueError(f"bandwidth must be positive and finite, got {value!r}")
        if 1.0 / float(value) / float(value) > torch.finfo(dtype).max:
            raise ValueError(f"bandwidth must be such that 1 / bandwidth^2 is a {dtype}, got {value!r}")
    return [float(value) for value in values]
