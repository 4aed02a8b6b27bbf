"""Launchers of the density op's Triton kernels, and the forms of them to compile ahead of time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .._core.triton import Grid, Spec, launch, spec
from .op import KINDS
from .triton_backward import (
    grad_x_kernel,
    kernel_grad_kernel,
    mean_grad_kernel,
    mean_kernel,
    moments_kernel,
    weighted_rows_kernel,
)
from .triton_forward import kernel_sum_kernel, lengths_kernel, log_prob_kernel, weights_kernel

_PROGRAMS = 256  # where points alone give fewer, they are cut along the components, too
_LEAST = 512  # components of a split
_WIDEST = 128  # features of a row that a program keeps
_PIECE = 1 << 22  # responsibilities that are in memory at a time
_PIECE_POINTS = 1024  # of these, at least
_PART = 1024  # points that a program of the moments adds up
_WEIGHTED = {"IEEE": False, "STAGES": 2, "WIDE_OUT": 128, "POINTS": 64, "COMPONENTS": 32}  # of weighted_rows_kernel


class Form(NamedTuple):
    """How a kernel that makes scores is cut. Chosen by ahead-of-time compilation: no registers spill on any target.

    Not measured on a GPU.
    """

    wide: int  # features of a product
    ieee: bool
    stages: int  # tiles that are loaded ahead
    points: int
    components: int
    warps: int
    wide_out: int = 0  # features of a result's row

    def constants(self, name: str) -> dict[str, Any]:
        """The arguments of a kernel that it has."""
        constants = {"WIDE": self.wide, "IEEE": self.ieee}
        if name != "weights":
            constants["STAGES"] = self.stages
        if self.wide_out:
            constants["WIDE_OUT"] = self.wide_out
        return constants | {"POINTS": self.points, "COMPONENTS": self.components}


def _form(name: str, features: int, diagonal: bool = False) -> Form:
    """That of the kernel of this name.

    Products of few features are ordinary instructions, which are exact and there no slower than three products of
    tensor cores.
    """
    padded = max(16, triton.next_power_of_2(features))
    if name in ("mean", "grad_x", "mean_grad", "kernel_grad"):
        if features <= 32:
            return Form(16, True, 2, 32, 16, 4, padded)
        if diagonal:
            return Form(16, False, 2, 32, 32, 4, 64)
        return Form(16 if name == "mean_grad" else 32, False, 2, 64, 32, 8, min(_WIDEST, padded))
    if features <= 32:
        return Form(16, True, 2, 32 if diagonal else 64, 32, 4 if diagonal or name == "kernel_sum" else 8)
    if diagonal:
        return Form(16, False, 2, 64, 64, 8)
    return Form(16 if name == "kernel_sum" else 32, False, 2, 128, 64, 8)


def _programs(count: int) -> Grid:
    """Programs of a kernel that takes its own numbers and tile sizes."""
    return Grid((count, 1, 1), (), ())  # type: ignore[arg-type]


def _blocks(count: int, size: int) -> int:
    return -(-count // size)


# ---- Operands


class _Operands(NamedTuple):
    """Points and components as the kernels take them."""

    x: Tensor
    y: Tensor
    inv: Tensor | None  # None: all 1
    q: Tensor | None
    offset: Tensor
    lengths: Tensor  # those of y, squared
    middle: Tensor

    @property
    def diagonal(self) -> bool:
        return self.inv is not None and self.inv.dim() == 2

    @property
    def steps(self) -> tuple[int, int]:
        """From one component's scale and offset to the next."""
        own = self.inv is not None and self.inv.dim() == 1 and self.inv.shape[0] > 1
        return int(own), int(self.offset.shape[0] > 1)

    def cut(self, points: slice, components: slice) -> _Operands:
        """Some of the points and components."""
        count = self.y.shape[0]
        inv = self.inv if self.inv is None or self.inv.shape[0] != count else self.inv[components]
        offset = self.offset if self.offset.shape[0] != count else self.offset[components]
        q = None if self.q is None else self.q[points]
        return _Operands(self.x[points], self.y[components], inv, q, offset, self.lengths[components], self.middle)


def _operands(x: Tensor, y: Tensor, inv: Tensor | None, q: Tensor | None, offset: Tensor) -> _Operands:
    if inv is not None and inv.dim() == 3:
        raise ValueError(f"inv must have one or two dimensions on a GPU, got shape {tuple(inv.shape)}")
    x, y, offset = x.contiguous(), y.contiguous(), offset.contiguous()
    inv, q = (None if t is None else t.contiguous() for t in (inv, q))
    middle = y.mean(0)
    lengths = _lengths(y, middle, inv if inv is not None and inv.dim() == 2 else None)
    return _Operands(x, y, inv, q, offset, lengths, middle)


def _lengths(y: Tensor, middle: Tensor, inv: Tensor | None) -> Tensor:
    """``|A (y - middle)|^2`` of each row."""
    out = y.new_empty(y.shape[0])
    rows, wide = 64, 32
    grid = _programs(_blocks(y.shape[0], rows))
    launch(lengths_kernel, grid, (out, y, middle, inv), (y.shape[0],), (y.shape[1], wide, rows))
    return out


class _Splits(NamedTuple):
    """How many programs share the components, and how many components each takes."""

    number: int
    each: int


def _splits(programs: int, components: int, size: int) -> _Splits:
    wanted = max(1, min(_blocks(_PROGRAMS, programs), components // _LEAST))
    each = _blocks(_blocks(components, wanted), size) * size
    return _Splits(_blocks(components, each), each)


def _rows(
    name: str, kernel: Any, tensors: Sequence[Tensor | None], x: Tensor, components: int, numbers: tuple[float, ...],
    flags: tuple[bool, ...] = (), diagonal: bool = False, more: int = 0,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Runs a kernel that makes a row a point, and ``more`` numbers; one result for each split of the components."""
    points, features = x.shape
    form = _form(name, features, diagonal)
    blocks = _blocks(points, form.points) * _blocks(features, form.wide_out)
    splits = _splits(blocks, components, form.components)
    out = x.new_empty(splits.number, points, features)
    others = tuple(x.new_empty(splits.number, points) for _ in range(more))
    constants = (*flags, features, *form.constants(name).values())
    sizes = (points, components, splits.each, *numbers)
    launch(kernel, _programs(blocks * splits.number), (out, *others, *tensors), sizes, constants, form.warps)
    return out, *others


def _posterior(
    name: str, kernel: Any, tensors: Sequence[Tensor | None], o: _Operands, numbers: tuple[float, ...],
    flags: tuple[bool, ...] = (),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Runs a kernel of ``_rows`` that makes means over the components of a split: means over all, log-probability."""
    means, lse = _rows(name, kernel, tensors, o.x, o.y.shape[0], numbers, flags, o.diagonal, more=1)
    if means.shape[0] == 1:
        return means[0], lse[0]
    total = torch.logsumexp(lse, 0)
    shares = torch.exp(lse - torch.where(total == -torch.inf, 0.0, total))
    return means.mul_(shares[..., None]).sum(0), total


def _sum(partial: Tensor) -> Tensor:
    """Over the splits, in order."""
    return partial[0] if partial.shape[0] == 1 else partial.sum(0)


# ---- Log-probability, responsibilities, moments


def density_log_prob(
    x: Tensor, y: Tensor, inv: Tensor, q: Tensor | None, offset: Tensor, full: bool
) -> tuple[Tensor, Tensor]:
    """``dgm::density_log_prob.triton``; see :func:`dgm_kernels.mixture_log_prob`."""
    weights = x.new_empty((x.shape[0], y.shape[0]) if full else (0, 0))
    if x.shape[0] == 0:
        return x.new_empty(0), weights
    operands = _operands(x, y, inv, q, offset)
    lse = _log_prob(operands)
    if full:
        _weights(weights, lse, None, operands)
        weights /= weights.sum(1, keepdim=True)  # that of roundings of the scores
    return lse, weights


def _log_prob(operands: _Operands) -> Tensor:
    x, y, inv, q, offset, lengths, middle = operands
    form = _form("log_prob", x.shape[1], operands.diagonal)
    blocks = _blocks(x.shape[0], form.points)
    splits = _splits(blocks, y.shape[0], form.components)
    lse = x.new_empty(splits.number, x.shape[0])
    tensors = (lse, x, y, inv, q, offset, lengths, middle)
    numbers = (x.shape[0], y.shape[0], splits.each, *operands.steps)
    constants = (operands.diagonal, x.shape[1], *form.constants("log_prob").values())
    launch(log_prob_kernel, _programs(blocks * splits.number), tensors, numbers, constants, form.warps)
    return lse[0] if splits.number == 1 else torch.logsumexp(lse, 0)


def _weights(out: Tensor, lse: Tensor, factors: Tensor | None, operands: _Operands) -> None:
    """Writes the responsibilities, times the factors of the points if there are any."""
    x, y, inv, q, offset, lengths, middle = operands
    form = _form("weights", x.shape[1], operands.diagonal)
    grid = _programs(_blocks(x.shape[0], form.points) * _blocks(y.shape[0], form.components))
    tensors = (out, lse, factors, x, y, inv, q, offset, lengths, middle)
    numbers = (x.shape[0], y.shape[0], *operands.steps)
    constants = (operands.diagonal, x.shape[1], *form.constants("weights").values())
    launch(weights_kernel, grid, tensors, numbers, constants, form.warps)


class _Pieces(NamedTuple):
    """Points and components in pieces, such that the responsibilities of one of each are few."""

    points: list[slice]
    components: list[slice]
    space: Tensor  # for the responsibilities

    def weights(self, operands: _Operands, points: slice, lse: Tensor, factors: Tensor | None) -> Tensor:
        """The responsibilities of a piece, times factors of the points if there are any."""
        out = self.space[: operands.x.shape[0] * operands.y.shape[0]]
        _weights(out, lse[points], None if factors is None else factors[points], operands)
        return out


def _pieces(operands: _Operands) -> _Pieces:
    points, components = operands.x.shape[0], operands.y.shape[0]
    rows = min(points, max(_PIECE_POINTS, _PIECE // components))
    columns = min(components, max(1, _PIECE // rows))
    return _Pieces(
        [slice(start, start + rows) for start in range(0, points, rows)],
        [slice(start, start + columns) for start in range(0, components, columns)],
        operands.x.new_empty(rows * columns),
    )


def density_moments(
    weight: Tensor, lse: Tensor, x: Tensor, y: Tensor, inv: Tensor, q: Tensor | None, offset: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``dgm::density_moments.triton``: sums of w, w q t and w q t^2 over the points, with ``t = x_n - y_m``.

    Responsibilities are written for a piece of the points and components at a time: sums of differences are no products
    of matrices, and all features of a component read the same ones.
    """
    if x.shape[0] == 0:
        return y.new_zeros(y.shape[0]), y.new_zeros(y.shape), y.new_zeros(y.shape if inv.dim() == 2 else y.shape[:1])
    operands = _operands(x, y, inv, q, offset)
    weight, lse = weight.contiguous(), lse.contiguous()
    pieces = _pieces(operands)
    results = []
    for components in pieces.components:
        totals: list[Tensor] = []
        for points in pieces.points:
            piece = operands.cut(points, components)
            partial = _moments(pieces.weights(piece, points, lse, weight), piece)
            sums = [part.sum(0, dtype=torch.float64) for part in partial]
            totals = [total.add_(part) for total, part in zip(totals, sums, strict=True)] if totals else sums
        results.append(totals)
    count, first, second = (torch.cat(totals).to(y.dtype) for totals in zip(*results, strict=True))
    return count, first, second if inv.dim() == 2 else second.sum(1)


def _moments(weights: Tensor, operands: _Operands) -> tuple[Tensor, Tensor, Tensor]:
    """Of parts of the points, ``[parts, ...]``."""
    x, y = operands.x, operands.y
    (points, features), components = x.shape, y.shape[0]
    parts = _blocks(points, _PART)
    count = x.new_empty(parts, components)
    first, second = (x.new_empty(parts, components, features) for _ in range(2))
    constants = _moments_constants(features)
    slices = _blocks(components, constants["COMPONENTS"]) * _blocks(features, constants["FEATURES"])
    tensors = (count, first, second, weights, x, y, operands.q)
    launch(moments_kernel, _programs(slices * parts), tensors, (points, components, _PART), (*constants.values(),))
    return count, first, second


def _moments_constants(features: int) -> dict[str, int]:
    wide = min(64, max(16, triton.next_power_of_2(features)))
    return {"D": features, "UNROLL": 2, "CHAIN": 64, "FEATURES": wide, "COMPONENTS": 32}


def density_grad_x(
    grad: Tensor, lse: Tensor, x: Tensor, y: Tensor, inv: Tensor, q: Tensor | None, offset: Tensor
) -> Tensor:
    """``dgm::density_grad_x.triton``: the gradient of the log-probability by the points."""
    if x.shape[0] == 0:
        return x.new_empty(x.shape)
    o = _operands(x, y, inv, q, offset)
    tensors = (grad.contiguous(), o.x, o.y, o.inv, o.q, o.offset, o.lengths, o.middle)
    return _posterior("grad_x", grad_x_kernel, tensors, o, o.steps, (o.diagonal,))[0]


# ---- Posterior mean


def density_mean(x: Tensor, y: Tensor, q: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """``dgm::density_mean.triton``: the posterior mean and the log-probability; see ``empirical_denoiser``."""
    if x.shape[0] == 0:
        return x.new_empty(x.shape), x.new_empty(0)
    operands = _operands(x, y, None, q, offset)
    if x.shape[1] > _WIDEST:
        return _wide_mean(operands)
    tensors = (operands.x, operands.y, operands.q, operands.offset, operands.lengths, operands.middle)
    return _posterior("mean", mean_kernel, tensors, operands, operands.steps[1:])


def _wide_mean(operands: _Operands) -> tuple[Tensor, Tensor]:
    """Of rows that no program can keep: first the log-probability, then responsibilities, a piece at a time.

    A program that kept some features of a row would make all scores again for each of these parts of it.
    """
    lse = _log_prob(operands)
    out = torch.empty_like(operands.x)
    pieces = _pieces(operands)
    for points in pieces.points:
        sums: list[Tensor] = []
        for components in pieces.components:
            piece = operands.cut(points, components)
            more = _weighted_rows(pieces.weights(piece, points, lse, None), piece)
            sums = [total.add_(part) for total, part in zip(sums, more, strict=True)] if sums else list(more)
        out[points] = operands.middle + sums[0] / sums[1][:, None]
    return out, lse


def _weighted_rows(weights: Tensor, operands: _Operands) -> tuple[Tensor, Tensor]:
    """Sums over the components of weighted rows, and of the weights."""
    x, y = operands.x, operands.y
    (points, features), components = x.shape, y.shape[0]
    blocks = _blocks(points, _WEIGHTED["POINTS"]) * _blocks(features, _WEIGHTED["WIDE_OUT"])
    splits = _splits(blocks, components, _WEIGHTED["COMPONENTS"])
    out, total = x.new_empty(splits.number, points, features), x.new_empty(splits.number, points)
    tensors, numbers = (out, total, weights, y, operands.middle), (points, components, splits.each)
    constants = (features, *_WEIGHTED.values())
    launch(weighted_rows_kernel, _programs(blocks * splits.number), tensors, numbers, constants, warps=8)
    return _sum(out), _sum(total)


def density_mean_grad(
    grad: Tensor, grad_lse: Tensor | None, mean: Tensor, lse: Tensor, x: Tensor, y: Tensor, q: Tensor, offset: Tensor
) -> Tensor:
    """``dgm::density_mean_grad.triton``: the gradient of the mean and the log-probability by the points."""
    if x.shape[0] == 0:
        return x.new_empty(x.shape)
    o = _operands(x, y, None, q, offset)
    grad = grad.contiguous()
    shift = -(grad * (mean - o.middle)).sum(1)  # the kernel multiplies by rows about the middle
    shift = shift if grad_lse is None else shift + grad_lse
    tensors = (grad, shift, o.x, o.y, o.q, o.offset, o.lengths, o.middle)
    return _posterior("mean_grad", mean_grad_kernel, tensors, o, o.steps[1:])[0]


# ---- Sums of a kernel over all pairs


class _Kernel(NamedTuple):
    """A kernel k(x, y) as the Triton kernels take it."""

    tensors: tuple[Tensor | None, ...]  # lengths of y, middle, numbers; None of a polynomial
    numbers: tuple[int | float, ...]  # count, factor, constant


def _kernel(y: Tensor, kind: int, numbers: Sequence[float]) -> _Kernel:
    if KINDS[kind] == "polynomial":
        factor, constant, degree = numbers
        return _Kernel((None, None, None), (int(degree), factor, constant))
    middle = y.mean(0)
    # Filled on the device: a copy from the host could not be part of a CUDA graph.
    values = torch.cat([y.new_full((1,), number) for number in numbers])
    return _Kernel((_lengths(y, middle, None), middle, values), (len(numbers), 0.0, 0.0))


def density_kernel_sum(x: Tensor, y: Tensor, kind: int, numbers: Sequence[float], same: bool) -> Tensor:
    """``dgm::density_kernel_sum.triton``; see :func:`dgm_kernels.mmd`."""
    if x.shape[0] == 0 or y.shape[0] == 0:
        return x.new_zeros((), dtype=torch.float64)
    x, y = x.contiguous(), y.contiguous()
    kernel = _kernel(y, kind, numbers)
    form = _form("kernel_sum", x.shape[1])
    blocks = _blocks(x.shape[0], form.points)
    splits = _splits(blocks, y.shape[0], form.components)
    out = x.new_empty(blocks * splits.number, dtype=torch.float64)
    sizes = (x.shape[0], y.shape[0], splits.each, *kernel.numbers)
    constants = (same, x.shape[1], *form.constants("kernel_sum").values())
    launch(kernel_sum_kernel, _programs(len(out)), (out, x, y, *kernel.tensors), sizes, constants, form.warps)
    return out.sum()


def density_kernel_sum_grad(x: Tensor, y: Tensor, kind: int, numbers: Sequence[float], same: bool) -> Tensor:
    """``dgm::density_kernel_sum_grad.triton``: the gradient of that sum by x, as if y were other points."""
    if x.shape[0] == 0 or y.shape[0] == 0:
        return x.new_zeros(x.shape)
    x, y = x.contiguous(), y.contiguous()
    kernel = _kernel(y, kind, numbers)
    tensors = (x, y, *kernel.tensors)
    return _sum(_rows("kernel_grad", kernel_grad_kernel, tensors, x, y.shape[0], kernel.numbers, (same,))[0])


# ---- Ahead-of-time compilation


def aot_specs() -> Iterator[Spec]:
    """Forms of the kernels to compile ahead of time: few and many features, rows that are aligned and that are not."""
    for features in (32, 64, 784):
        yield from _number_specs(features)
        yield from _row_specs(features)
        pointers = _pointers("count first second weights x y q")
        yield spec(f"moments_{features}", moments_kernel, pointers, **_moments_constants(features))
    yield spec(
        "weighted_rows_784", weighted_rows_kernel, _pointers("out total weights y middle"), 8, D=784, **_WEIGHTED
    )


def _pointers(names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), "*fp32")


def _number_specs(features: int) -> Iterator[Spec]:
    for shape in ("spherical", "diagonal"):
        diagonal = shape == "diagonal"
        common = _pointers("x y inv offset y_lengths middle")
        for name, kernel, own in (
            ("log_prob", log_prob_kernel, "lse"),
            ("weights", weights_kernel, "weights lse factors"),
        ):
            form = _form(name, features, diagonal)
            constants = {"DIAGONAL": diagonal, "D": features, **form.constants(name)}
            yield spec(f"{name}_{shape}_{features}", kernel, common | _pointers(own), form.warps, **constants)
        lengths = _pointers("out y middle" + " inv" * diagonal)
        yield spec(f"lengths_{shape}_{features}", lengths_kernel, lengths, D=features, WIDE=32, COMPONENTS=64)
    form = _form("kernel_sum", features)
    for kind, names in (("rbf", "x y y_lengths middle numbers"), ("polynomial", "x y")):
        constants = {"SAME": True, "D": features, **form.constants("kernel_sum")}
        pointers = {"out": "*fp64", **_pointers(names)}
        yield spec(f"kernel_sum_{kind}_{features}", kernel_sum_kernel, pointers, form.warps, **constants)


def _row_specs(features: int) -> Iterator[Spec]:
    common = "out x y y_lengths middle"
    forms: dict[str, tuple[str, Any, str, dict[str, Any]]] = {
        "grad_x_spherical": ("grad_x", grad_x_kernel, "grad lse inv offset", {"DIAGONAL": False}),
        "grad_x_diagonal": ("grad_x", grad_x_kernel, "grad lse inv offset", {"DIAGONAL": True}),
        "mean_grad": ("mean_grad", mean_grad_kernel, "grad shift lse q offset", {}),
        "kernel_grad_rbf": ("kernel_grad", kernel_grad_kernel, "numbers", {"SAME": True}),
    }
    if features <= _WIDEST:
        forms["mean"] = ("mean", mean_kernel, "lse q offset", {})
    for title, (name, kernel, own, flags) in forms.items():
        form = _form(name, features, flags.get("DIAGONAL", False))
        constants = {**flags, "D": features, **form.constants(name)}
        yield spec(f"{title}_{features}", kernel, _pointers(f"{common} {own}"), form.warps, **constants)
    form = _form("kernel_grad", features)
    constants = {"SAME": False, "D": features, **form.constants("kernel_grad")}
    yield spec(
        f"kernel_grad_polynomial_{features}", kernel_grad_kernel, _pointers("out x y"), form.warps, **constants
    )  # fmt: skip
