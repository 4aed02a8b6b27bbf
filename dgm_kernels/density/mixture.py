"""Brings every way to say what a mixture is to the one that the kernels read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import (
    check_all_positive,
    check_logits,
    check_one_of,
    check_points,
    check_positive_definite,
    check_scale,
    check_shape,
    check_weights,
)
from .reference import log_normalizer


class Components(NamedTuple):
    """Components whose score at a point is ``offset_m - |A_m (x - y_m)|^2 / 2``, in float32 or float64, contiguous.

    ``inv`` is A: ``[1]`` or ``[M]`` numbers, ``[M, D]`` diagonals, or ``[M, D, D]`` lower triangles. ``constant`` is
    what the logarithm of the density has beside that of the sum: as a part of every score it would cost them digits.
    """

    y: Tensor
    inv: Tensor
    offset: Tensor
    constant: Tensor

    def points(self, x: Tensor) -> Tensor:
        """``x`` as ``[points, D]``, in the dtype of the components, contiguous."""
        return x.reshape(-1, x.shape[-1]).to(self.y.dtype).contiguous()


def components(
    x: Tensor,
    means: Tensor,
    scale: Tensor | None,
    scale_tril: Tensor | None,
    covariance: Tensor | None,
    weights: Tensor | None,
    logits: Tensor | None,
    scale_name: str = "scale",
) -> Components:
    """Checks the arguments of a mixture."""
    check_points("means", means, x, least=1)
    given = check_one_of(scale=scale, scale_tril=scale_tril, covariance=covariance)
    if weights is not None and logits is not None:
        raise ValueError("weights and logits must not both be given")
    k, d = means.shape
    shapes = [(k,), (k, d), (1,)] if given == "scale" else [(k, d, d)]
    spread = next(value for value in (scale, scale_tril, covariance) if value is not None)
    check_shape(given, spread, shapes, x)
    tensors = [t for t in (x, means, spread, weights, logits) if isinstance(t, Tensor)]
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    inv, logdet = _inverse(given, spread.to(wide), scale_name)
    if inv.dim() == 1:
        logdet = d * logdet
    # What all components share; of different log-determinants one of them, without a gradient.
    shared = logdet if logdet.shape[0] == 1 else logdet.detach().min()
    offset = _log_weights(weights, logits, x, k).to(wide) - (logdet - shared)
    constant = -(shared + log_normalizer(d)).reshape(())
    return Components(means.to(wide).contiguous(), inv.contiguous(), offset.contiguous(), constant)


def _inverse(given: str, spread: Tensor, scale_name: str) -> tuple[Tensor, Tensor]:
    """A, and the log-determinant of its inverse (of a spherical component, a D-th of it)."""
    if given == "scale":
        if spread.dim() == 1:
            check_scale(scale_name, spread)
        else:
            check_all_positive(scale_name, spread)
        log_scale = spread.log()
        return spread.reciprocal(), log_scale.sum(1) if spread.dim() == 2 else log_scale
    if given == "covariance":
        spread = check_positive_definite(spread)
    diagonal = spread.diagonal(dim1=1, dim2=2)
    if given == "scale_tril":
        check_all_positive("scale_tril", diagonal, "positive and finite on its diagonals")
    eye = torch.eye(spread.shape[-1], dtype=spread.dtype, device=spread.device).expand_as(spread)
    return torch.linalg.solve_triangular(spread.tril(), eye, upper=False), diagonal.log().sum(1)


def _log_weights(weights: Tensor | None, logits: Tensor | None, x: Tensor, k: int) -> Tensor:
    if logits is not None:
        check_shape("logits", logits, [(k,)], x)
        check_logits(logits)
        return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), 0)
    if weights is None:
        return -torch.log(torch.full((1,), k, dtype=torch.float64, device=x.device))
    check_shape("weights", weights, [(k,)], x)
    check_weights(weights)
    positive = weights > 0  # of a weight of 0 the logarithm has no gradient
    safe = torch.where(positive, weights, 1.0).to(torch.promote_types(weights.dtype, torch.float32))
    return torch.where(positive, safe.log(), -torch.inf)
