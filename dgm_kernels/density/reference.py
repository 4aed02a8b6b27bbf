"""The density op in plain PyTorch: the specification, and what runs where no native backend does.

A component m has the score ``s_nm = offset_m - q_n |A_m (x_n - y_m)|^2 / 2`` at a point n. ``A_m`` is a number (one for
all, or one a component), the diagonal of a matrix, or a lower triangular matrix; ``q_n`` is 1 unless it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .._core.backends import is_traced

_PIECE = 1 << 22  # numbers of the largest intermediate: points are worked on in pieces


def pieces(points: int, width: int) -> Iterator[slice]:
    """Slices of the points, such that the intermediate of ``width`` numbers a point stays small."""
    if is_traced():
        yield slice(None)
        return
    step = max(1, _PIECE // max(1, width))
    for start in range(0, points, step):
        yield slice(start, start + step)
    if points == 0:
        yield slice(None)


def _recomputed(function: Callable[..., Any], number: int, *args: Any) -> Any:
    """Of several pieces the backward pass computes each again, so that none is kept."""
    if number == 1 or not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def _width(y: Tensor, inv: Tensor) -> int:
    return y.shape[0] * (y.shape[1] if inv.dim() == 3 else 1)


def scores(x: Tensor, y: Tensor, inv: Tensor, q: Tensor | None, offset: Tensor) -> Tensor:
    """``[points, components]``, in float64 within: of narrow components far apart float32 would lose all digits."""
    dtype = x.dtype
    x, y, inv = (t.to(torch.float64) for t in (x, y, inv))
    middle = y.detach().mean(0)
    x, y = x - middle, y - middle
    if inv.dim() == 3:
        squares = torch.einsum("nmd,med->nme", x[:, None] - y, inv.tril()).square().sum(-1)
    elif inv.dim() == 2:
        p = inv.square()
        squares = x.square() @ p.T - 2 * (x @ (p * y).T) + (p * y.square()).sum(-1)
    else:
        squares = (x.square().sum(-1, keepdim=True) - 2 * (x @ y.T) + y.square().sum(-1)) * inv.square()
    return (offset - 0.5 * (squares if q is None else q[:, None] * squares)).to(dtype)


def log_prob(x: Tensor, y: Tensor, inv: Tensor, q: Tensor | None, offset: Tensor) -> Tensor:
    """``log sum_m exp(s_nm)``, ``[points]``."""

    def piece(x: Tensor, q: Tensor | None) -> Tensor:
        return torch.logsumexp(scores(x, y, inv, q, offset), dim=1)

    parts = list(pieces(x.shape[0], _width(y, inv)))
    return torch.cat([_recomputed(piece, len(parts), x[part], None if q is None else q[part]) for part in parts])


def responsibilities(x: Tensor, y: Tensor, inv: Tensor, q: Tensor | None, offset: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probability ``[points]`` and ``exp(s_nm)`` over its sum, ``[points, components]``."""
    s = scores(x, y, inv, q, offset)
    return torch.logsumexp(s, dim=1), torch.softmax(s, dim=1)


def moments(
    weight: Tensor, x: Tensor, y: Tensor, inv: Tensor, q: Tensor | None, offset: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """With ``w_nm`` the responsibilities times ``weight_n``, and ``t = x_n - y_m``: the sums of w, w q t and w q t t^T.

    Of the last one, what inv has: ``|t|^2`` of a number, the diagonal of a diagonal, or the matrix.
    """
    count = torch.zeros_like(y[:, 0])
    first = torch.zeros_like(y)
    second = y.new_zeros((*y.shape, y.shape[1]) if inv.dim() == 3 else y.shape if inv.dim() == 2 else y.shape[:1])
    for part in pieces(x.shape[0], y.numel()):
        x_part, q_part = x[part], None if q is None else q[part]
        w = responsibilities(x_part, y, inv, q_part, offset)[1] * weight[part, None]
        count = count + w.sum(0)
        w = w if q_part is None else w * q_part[:, None]
        t = x_part[:, None] - y
        wt = w[..., None] * t
        first = first + wt.sum(0)
        if inv.dim() == 3:
            second = second + torch.einsum("nmd,nme->mde", wt, t)
        else:
            second = second + ((wt * t).sum(0) if inv.dim() == 2 else (wt * t).sum((0, 2)))
    return count, first, second


def mean(x: Tensor, y: Tensor, q: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """``sum_m r_nm y_m`` with the responsibilities r, and the log-probability; A = 1."""

    def piece(x: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        lse, r = responsibilities(x, y, y.new_ones(1), q, offset)
        return r @ y, lse

    parts = list(pieces(x.shape[0], y.shape[0]))
    means, lses = zip(*(_recomputed(piece, len(parts), x[part], q[part]) for part in parts), strict=True)
    return torch.cat(means), torch.cat(lses)


def kernel_sum(x: Tensor, y: Tensor, kind: str, numbers: list[float], same: bool) -> Tensor:
    """``sum_nm k(x_n, y_m)``, without n = m if both are the ``same`` points; in float64.

    ``rbf``: the sum over the ``numbers`` f of ``exp(-f |x - y|^2)``; ``polynomial``: of three numbers,
    ``(f x.y + c)^degree``.
    """
    total = x.new_zeros((), dtype=torch.float64)
    rows = torch.arange(x.shape[0], device=x.device)
    x, y = x.to(torch.float64), y.to(torch.float64)
    middle = y.detach().mean(0) if kind == "rbf" and y.shape[0] else 0.0
    x, y = x - middle, y - middle

    def piece(x: Tensor, rows: Tensor) -> Tensor:
        k = _kernel(x, y, kind, numbers)
        if same:
            k = k.masked_fill(rows[:, None] == torch.arange(y.shape[0], device=y.device), 0.0)
        return k.sum()

    parts = list(pieces(x.shape[0], y.shape[0]))
    for part in parts:
        total = total + _recomputed(piece, len(parts), x[part], rows[part])
    return total


def _kernel(x: Tensor, y: Tensor, kind: str, numbers: list[float]) -> Tensor:
    products = x @ y.T
    if kind == "polynomial":
        factor, constant, degree = numbers
        return (factor * products + constant) ** int(degree)
    squares = (x.square().sum(-1, keepdim=True) - 2 * products + y.square().sum(-1)).clamp(min=0.0)
    return torch.stack([torch.exp(-factor * squares) for factor in numbers]).sum(0)


def log_normalizer(dimensions: int) -> float:
    """``log sqrt(2 pi)`` of all dimensions."""
    return 0.5 * dimensions * math.log(2.0 * math.pi)
