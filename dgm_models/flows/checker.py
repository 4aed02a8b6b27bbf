"""Searches for reasons why a map is no flow: singular Jacobians, folds, and points that it maps to one point."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dgm_kernels import NoiseKey, noise_like

from ..model import check_positive, check_sizes

_SAME = 1e-10  # relative distance below which two images count as one point
_APART = 1e-3  # distance above which two arguments count as two points
_EXPLAINED = 1e-3  # a relative step of Newton's method above which a point was no solution
_SCALINGS = 10  # rounds of scaling the rows and columns of a matrix
_NEWTON_STEPS = 30


@dataclasses.dataclass(frozen=True)
class Finding:
    """A reason why a map is no flow.

    Attributes:
        kind: ``"dimension"``, ``"not finite"``, ``"singular"``, ``"fold"`` or ``"collision"``.
        message: the reason in words.
        points: the arguments that show it, each of the shape of a sample: one for a singular Jacobian, the two ends of
            a short segment for a fold, two for a collision.
    """

    kind: str
    message: str
    points: tuple[Tensor, ...] = ()


@torch.enable_grad()
def check_invertible(
    fn: Callable[[Tensor], Tensor | tuple[Tensor, ...]],
    shape: Sequence[int],
    *,
    points: int = 32,
    scale: float = 1.0,
    seed: int = 0,
) -> list[Finding]:
    """Reasons why ``fn`` is no flow, at most one of each kind; none if the search, which is no proof, finds none.

    A flow is injective and has a Jacobian with non-zero determinant everywhere, or there is no density to compute. At
    random points this looks at the rank of the Jacobian and the sign of its determinant; for collisions it tries the
    null space of the Jacobian, mirrored and swapped elements, and Newton's method from other points.

    All this holds to within rounding. That a map squeezes space does not make it singular, nor do two images that
    nearly agree make a collision where the Jacobian says that they differ by no more: the sigmoid passes at 30. At 40,
    where it rounds to 1 and its derivative to 0, it is singular to a computer, and the findings say so.

    Args:
        fn: maps ``[batch, *shape]`` in float64, sample by sample, differentiably; of several results the first counts.
        shape: of one sample.
        points: how many random points to look at.
        scale: standard deviation of their elements.
        seed: names them.

    Example:
        >>> [finding.kind for finding in check_invertible(torch.relu, (2,))]
        ['singular', 'collision']
    """
    shape = check_sizes("shape", shape)
    like = torch.empty(check_positive("points", points), *shape, dtype=torch.float64)
    x = scale * noise_like(like, NoiseKey(seed)).reshape(points, -1)

    def flat(x: Tensor) -> Tensor:
        y = fn(x.view(-1, *shape))
        y = y if isinstance(y, Tensor) else y[0]
        if y.shape[:1] != x.shape[:1]:
            raise ValueError(f"fn must map sample by sample: it makes shape {tuple(y.shape)} of {len(x)} samples")
        return y.reshape(len(x), -1)

    y = flat(x).detach()
    if y.shape != x.shape:
        return [Finding("dimension", f"maps {x.shape[1]} numbers to {y.shape[1]}: the Jacobian is not square")]
    jacobian = _jacobian(flat, x)
    for what, values in (("image", y), ("Jacobian", jacobian.flatten(1))):
        if not bool(values.isfinite().all()):
            at = x[~values.isfinite().all(1)][0]
            return [Finding("not finite", f"the {what} of a point is not finite", (at.view(shape),))]
    ranks = _rank(jacobian)
    found = [_singular(x, ranks), _fold(flat, x, jacobian, ranks), _collision(flat, x, y, jacobian)]
    return [
        dataclasses.replace(finding, points=tuple(point.view(shape) for point in finding.points))
        for finding in found
        if finding is not None
    ]


def _jacobian(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``[batch, outputs, inputs]``."""
    x = x.detach().requires_grad_()
    y = fn(x)
    if not y.requires_grad:
        return x.new_zeros(x.shape[0], y.shape[1], x.shape[1])
    rows = [
        torch.autograd.grad(column.sum(), x, retain_graph=True, allow_unused=True, materialize_grads=True)[0]
        for column in y.unbind(1)
    ]
    return torch.stack(rows, dim=1).detach()


def _rank(jacobian: Tensor) -> Tensor:
    """The rank of each matrix, whatever the units of its rows and columns: they are first scaled to a largest of 1."""
    scaled = jacobian.nan_to_num()
    for _ in range(_SCALINGS):
        for dim in (1, 2):
            largest = scaled.abs().amax(dim, keepdim=True)
            scaled = scaled / torch.where(largest > 0, largest, 1.0).sqrt()
    return torch.linalg.matrix_rank(scaled)


def _singular(x: Tensor, ranks: Tensor) -> Finding | None:
    size = x.shape[1]
    if bool((ranks == size).all()):
        return None
    worst = int(ranks.argmin())
    share = f"{int((ranks < size).sum())} of {len(x)} random points"
    message = f"the Jacobian is singular at {share}: it has rank {int(ranks[worst])} of {size}"
    return Finding("singular", message, (x[worst],))


def _fold(fn: Callable[[Tensor], Tensor], x: Tensor, jacobian: Tensor, ranks: Tensor) -> Finding | None:
    """The determinant is continuous: where it changes its sign it passes through 0."""
    signs = torch.linalg.slogdet(jacobian).sign * (ranks == x.shape[1])  # that of a singular one is rounding
    if not (bool((signs > 0).any()) and bool((signs < 0).any())):
        return None
    a, b = x[signs > 0][:1], x[signs < 0][:1]
    for _ in range(50):
        middle = (a + b) / 2
        positive = bool(torch.linalg.slogdet(_jacobian(fn, middle)).sign > 0)
        a, b = (middle, b) if positive else (a, middle)
    message = "the determinant of the Jacobian changes its sign, so that it is 0, or jumps, between these points"
    return Finding("fold", message, (a[0], b[0]))


def _collision(fn: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, jacobian: Tensor) -> Finding | None:
    searches = {
        "along the null space of the Jacobian": _along_null_space,
        "by negating or swapping elements": _symmetric,
        "by Newton's method": _newton,
    }
    for how, search in searches.items():
        for other in search(fn, x, y, jacobian):
            image = fn(other).detach()
            same = (image - y).norm(dim=1) <= _SAME * (1 + y.norm(dim=1))
            hits = (same & ((other - x).norm(dim=1) > _APART)).nonzero().flatten()
            hits = hits[~_explained(fn, x[hits], other[hits], y[hits], image[hits])]
            if len(hits):
                i = int(hits[0])
                return Finding("collision", f"maps two points to one (found {how})", (x[i], other[i].detach()))
    return None


def _explained(fn: Callable[[Tensor], Tensor], x: Tensor, other: Tensor, y: Tensor, image: Tensor) -> Tensor:
    """Whether the images are so near only because the map is flat there: their difference is what its slope makes it.

    Then a step of Newton's method from one point towards the other's image goes far; from one of two points with the
    same image it goes nowhere.
    """
    explained = torch.zeros(len(x), dtype=torch.bool)
    size = torch.minimum((other - x).norm(dim=1), x.norm(dim=1))
    rounding = 4 * torch.finfo(x.dtype).eps * y.abs()
    for point in (x, other) if len(x) else ():
        jacobian = _jacobian(fn, point).nan_to_num()
        predicted = (jacobian @ (other - x).unsqueeze(-1)).squeeze(-1)
        difference = torch.where((image - y - predicted).abs() <= rounding, predicted, image - y)
        step = torch.linalg.solve_ex(jacobian, difference).result
        explained |= (step.norm(dim=1) > _EXPLAINED * size) & (_rank(jacobian) == x.shape[1])
    return explained


def _along_null_space(fn: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, jacobian: Tensor) -> list[Tensor]:
    direction = torch.linalg.svd(jacobian).Vh[:, -1]
    return [x + step * direction for step in (1.0, -1.0, 0.1, -0.1, 0.01, -0.01)]


def _symmetric(fn: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, jacobian: Tensor) -> list[Tensor]:
    others = [-x, x.flip(1)]
    for i in range(x.shape[1]):
        mirrored, swapped = x.clone(), x.clone()
        mirrored[:, i] = -x[:, i]
        swapped[:, i], swapped[:, i - 1] = x[:, i - 1], x[:, i]
        others += [mirrored, swapped]
    return others


def _newton(fn: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, jacobian: Tensor) -> list[Tensor]:
    """Solutions of ``fn(other) = y``, started from the mirror image of the point and from the next point."""
    others = []
    for other in (-x, x.roll(1, 0)):
        for _ in range(_NEWTON_STEPS):
            residual = (fn(other).detach() - y).nan_to_num()
            step = (torch.linalg.pinv(_jacobian(fn, other).nan_to_num()) @ residual.unsqueeze(-1)).squeeze(-1)
            tried = [other - damping * step for damping in (1.0, 0.5, 0.1, 0.01)]
            images = [fn(candidate).detach() for candidate in tried]
            errors = torch.stack([(image - y).norm(dim=1).nan_to_num(torch.inf) for image in images])
            best = errors.argmin(0)
            other = torch.stack(tried)[best, torch.arange(len(x))]
            if bool((errors.amin(0) <= _SAME / 10 * (1 + y.norm(dim=1))).all()):
                break
        others.append(other)
    return others
