"""Shapes, calls and eager yardsticks of the coupling op that tests and bench share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dgm_kernels import (
    actnorm,
    additive_coupling,
    affine_coupling,
    logistic_log_prob,
    rational_quadratic_spline,
    standard_normal_log_prob,
)

Outputs = tuple[Tensor, Tensor]

# Ragged first: no multiple of a vector, a tile or a block; then few elements in many samples; then none.
SHAPES = (
    *((1, 1), (1, 2), (3, 59), (3, 58), (2, 3, 113), (5, 1023), (5, 1022), (2, 4, 7, 9), (1, 2, 3, 1, 5)),
    *((301, 2), (64, 8, 3, 5)),
    *((0, 4), (3, 0), (2, 4, 0, 3)),
)
SMALL_SHAPE = (8, 6)
FLAT_SHAPE = (4096, 512)
IMAGE_SHAPE = (64, 24, 32, 32)
SPLINE_SHAPE, SPLINE_BINS = (1024, 16), 8

MASKS = (None, "checkerboard", "checkerboard_flipped", "channels", "channels_flipped", "random", "row")

SCALE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": lambda a: a,
    "tanh": torch.tanh,
    "sigmoid": lambda a: F.logsigmoid(a + 2),
    "softclip": lambda a: a / (1 + a.abs() / math.log(1000)),
}


def unchanged(mask: str | Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Where a coupling layer leaves x as it is, as a bool tensor of its shape."""
    if isinstance(mask, Tensor):
        return mask.expand(shape)
    if mask is None:
        return torch.zeros(shape, dtype=torch.bool)
    if mask.startswith("channels"):
        first = torch.arange(shape[1]) < shape[1] // 2
        keep = first if mask == "channels" else ~first
        return keep.view(-1, *[1] * (len(shape) - 2)).expand(shape)
    places = shape[2:] or shape[1:]
    parity = sum(torch.meshgrid(*map(torch.arange, places), indexing="ij")) % 2
    return (parity == (0 if mask == "checkerboard" else 1)).expand(shape)


def per_sample_sum(x: Tensor) -> Tensor:
    return x.sum(tuple(range(1, x.dim()))) if x.dim() > 1 else x


def eager_affine(
    x: Tensor,
    shift: Tensor,
    log_scale: Tensor,
    *,
    mask: str | Tensor | None = None,
    scale_map: str = "exp",
    inverse: bool = False,
) -> Outputs:
    """``affine_coupling`` as a user writes it."""
    if mask in ("channels", "channels_flipped"):
        first, second = x.tensor_split(2, 1)
        moved = second if mask == "channels" else first
        y, logdet = eager_affine(moved, shift, log_scale, scale_map=scale_map, inverse=inverse)
        return torch.cat([first, y] if mask == "channels" else [y, second], 1), logdet
    s = SCALE_MAPS[scale_map](log_scale)
    y = (x - shift) * torch.exp(-s) if inverse else x * torch.exp(s) + shift
    s = -s if inverse else s
    if mask is not None:
        keep = unchanged(mask, x.shape)
        y, s = torch.where(keep, x, y), s.masked_fill(keep, 0.0)
    return y, per_sample_sum(s)


def eager_additive(x: Tensor, shift: Tensor, *, mask: str | Tensor | None = None, inverse: bool = False) -> Outputs:
    """``additive_coupling`` as a user writes it."""
    y, logdet = eager_affine(x, shift, torch.zeros_like(shift), mask=mask, inverse=inverse)
    return y, logdet


def eager_actnorm(x: Tensor, shift: Tensor, log_scale: Tensor, *, inverse: bool = False) -> Outputs:
    """``actnorm`` as a user writes it."""
    t, s = (p.view(-1, *[1] * (x.dim() - 2)) for p in (shift, log_scale))
    y = (x - t) * torch.exp(-s) if inverse else x * torch.exp(s) + t
    logdet = x[0, 0].numel() * log_scale.sum() if x.numel() else log_scale.sum() * 0
    return y, (-logdet if inverse else logdet).expand(x.shape[0])


def spline_edges(raw: Tensor, bound: float, least: float) -> Tensor:
    """The knots [..., bins + 1] on one axis from the raw widths or heights."""
    bins = least + (1 - raw.shape[-1] * least) * raw.softmax(-1)
    inner = bound * (2 * bins.cumsum(-1)[..., :-1] - 1)
    end = torch.full_like(raw[..., :1], bound)
    return torch.cat([-end, inner, end], -1)


def eager_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    *,
    bound: float = 3.0,
    tails: str | None = "linear",
    inverse: bool = False,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
) -> Outputs:
    """``rational_quadratic_spline`` as a user writes it, with the quadratic formula of the paper in the inverse."""
    grid, values = spline_edges(widths, bound, min_bin_width), spline_edges(heights, bound, min_bin_height)
    slopes = min_derivative + F.softplus(derivatives)
    slopes = slopes if tails is None else F.pad(slopes, (1, 1), value=1.0)
    inside = (x >= -bound) & (x <= bound)
    known = (values if inverse else grid)[..., 1:-1].detach().contiguous()
    at = x.clamp(-bound, bound)[..., None]
    k = torch.searchsorted(known, at.detach().contiguous(), right=True)
    (x0, x1), (y0, y1), (d0, d1) = (
        (edges.gather(-1, k).squeeze(-1), edges.gather(-1, k + 1).squeeze(-1)) for edges in (grid, values, slopes)
    )
    w, h, at = x1 - x0, y1 - y0, at.squeeze(-1)
    s = h / w
    if inverse:
        bend = (at - y0) * (d0 + d1 - 2 * s)
        a, b, c = h * (s - d0) + bend, h * d0 - bend, -s * (at - y0)
        xi = 2 * c / (-b - (b.square() - 4 * a * c).clamp(min=0).sqrt())
        y = x0 + xi * w
    else:
        xi = (at - x0) / w
        y = y0 + h * (s * xi.square() + d0 * xi * (1 - xi)) / (s + (d0 + d1 - 2 * s) * xi * (1 - xi))
    slope = s.square() * (d1 * xi.square() + 2 * s * xi * (1 - xi) + d0 * (1 - xi).square())
    log_slope = slope.log() - 2 * (s + (d0 + d1 - 2 * s) * xi * (1 - xi)).log()
    log_slope = -log_slope if inverse else log_slope
    return torch.where(inside, y, x), per_sample_sum(torch.where(inside, log_slope, 0.0))


def eager_normal(z: Tensor, logdet: Tensor | None = None) -> Tensor:
    """``standard_normal_log_prob`` as a user writes it."""
    log_prob = per_sample_sum(-0.5 * z.square() - 0.5 * math.log(2 * math.pi))
    return log_prob if logdet is None else log_prob + logdet


def eager_logistic(z: Tensor, logdet: Tensor | None = None) -> Tensor:
    """``logistic_log_prob`` as a user writes it."""
    log_prob = per_sample_sum(F.logsigmoid(z) + F.logsigmoid(-z))
    return log_prob if logdet is None else log_prob + logdet


def mask_of(name: str | None, shape: tuple[int, ...]) -> str | Tensor | None:
    """The argument ``mask`` for a name of ``MASKS``: "random" has the shape of x, "row" that of its last dimension."""
    if name not in ("random", "row"):
        return name
    places = shape if name == "random" else shape[-1:]
    scattered = torch.arange(math.prod(places)) * 37 % 11 < 5  # no generator: torch.compile traces this
    return scattered.view(places)


@dataclasses.dataclass(frozen=True)
class CouplingCase:
    """One way to call a function of the op: its operands, all differentiable, and its options."""

    name: str
    function: Callable[..., Any]
    eager: Callable[..., Any]
    operands: Callable[[tuple[int, ...]], tuple[Tensor, ...]]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether x may have this shape: channels are halved if their number is even, a board has two dimensions."""
        mask = str(self.options.get("mask"))
        return shape[1] % 2 == 0 if mask.startswith("channels") else len(shape) <= 4 or "board" not in mask

    def make(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, grad: bool = False) -> list[Tensor]:
        """Random operands, x first."""
        return [operand.to(dtype).requires_grad_(grad) for operand in self.operands(shape)]

    def call(self, *operands: Tensor, **more: Any) -> Any:
        return self.function(*operands, **self._options(operands[0], more))

    def call_eager(self, *operands: Tensor, **more: Any) -> Any:
        return self.eager(*operands, **self._options(operands[0], more))

    def _options(self, x: Tensor, more: dict[str, Any]) -> dict[str, Any]:
        options = {**self.options, **more}
        return {**options, "mask": mask_of(options["mask"], x.shape)} if "mask" in options else options


def moved_shape(mask: str | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of shift and log_scale."""
    half = mask in ("channels", "channels_flipped")
    return (shape[0], shape[1] // 2, *shape[2:]) if half else shape


def _affine(mask: str | None, scale_map: str, inverse: bool) -> CouplingCase:
    def operands(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        moved = moved_shape(mask, shape)
        return torch.randn(shape), torch.randn(moved), torch.randn(moved)

    name = f"affine {mask or 'all'} {scale_map}{' inverse' * inverse}"
    return CouplingCase(
        name, affine_coupling, eager_affine, operands, {"mask": mask, "scale_map": scale_map, "inverse": inverse}
    )


def _additive(mask: str | None, inverse: bool) -> CouplingCase:
    def operands(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        return torch.randn(shape), torch.randn(moved_shape(mask, shape))

    name = f"additive {mask or 'all'}{' inverse' * inverse}"
    return CouplingCase(name, additive_coupling, eager_additive, operands, {"mask": mask, "inverse": inverse})


def _actnorm(inverse: bool) -> CouplingCase:
    def operands(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        return torch.randn(shape), torch.randn(shape[1]), torch.randn(shape[1])

    return CouplingCase(f"actnorm{' inverse' * inverse}", actnorm, eager_actnorm, operands, {"inverse": inverse})


def spline_operands(shape: tuple[int, ...], bins: int, tails: str | None, bound: float) -> tuple[Tensor, ...]:
    """x, with tails also outside of the bound, and raw widths, heights and derivatives as networks give them."""
    slopes = bins + 1 if tails is None else bins - 1
    x = bound * (1.98 * torch.rand(shape) - 0.99) if tails is None else bound * (2.4 * torch.rand(shape) - 1.2)
    return x, *(0.5 * torch.randn(*shape, count) for count in (bins, bins, slopes))


def _spline(bins: int, inverse: bool, **options: Any) -> CouplingCase:
    tails, bound = options.get("tails", "linear"), options.get("bound", 3.0)

    def operands(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        return spline_operands(shape, bins, tails, bound)

    name = f"spline {bins} bins, tails {tails}{' inverse' * inverse}"
    return CouplingCase(name, rational_quadratic_spline, eager_spline, operands, {"inverse": inverse, **options})


def _log_prob(base: str, function: Callable[..., Tensor], eager: Callable[..., Tensor], logdet: bool) -> CouplingCase:
    def operands(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        return (torch.randn(shape), torch.randn(shape[0])) if logdet else (torch.randn(shape),)

    return CouplingCase(f"{base} log_prob{' and logdet' * logdet}", function, eager, operands)


DIRECTIONS = (False, True)
AFFINE_CASES = tuple(
    _affine(mask, scale_map, inverse)
    for mask, scale_map in (
        *((None, "exp"), (None, "tanh"), ("random", "sigmoid"), ("row", "softclip"), ("checkerboard", "exp")),
        *(("checkerboard_flipped", "tanh"), ("channels", "sigmoid"), ("channels_flipped", "softclip")),
    )
    for inverse in DIRECTIONS
)
ADDITIVE_CASES = tuple(
    _additive(mask, inverse) for mask in (None, "random", "checkerboard", "channels") for inverse in DIRECTIONS
)
ACTNORM_CASES = tuple(_actnorm(inverse) for inverse in DIRECTIONS)
SPLINE_CASES = tuple(
    _spline(bins, inverse, **options)
    for bins, options in (
        (SPLINE_BINS, {}),
        (2, {"bound": 1.5, "min_bin_width": 0.1, "min_bin_height": 0.05, "min_derivative": 0.2}),
        (5, {"tails": None}),
    )
    for inverse in DIRECTIONS
)
LOG_PROB_CASES = tuple(
    _log_prob(base, function, eager, logdet)
    for base, function, eager in (
        ("normal", standard_normal_log_prob, eager_normal),
        ("logistic", logistic_log_prob, eager_logistic),
    )
    for logdet in DIRECTIONS
)
MAP_CASES = (*AFFINE_CASES, *ADDITIVE_CASES, *ACTNORM_CASES, *SPLINE_CASES)
CASES = (*MAP_CASES, *LOG_PROB_CASES)
