"""The nodes of a trajectory and what every table is built from: predictions, spacings, posteriors, rows.

Notation: see :mod:`.tables`.
"""

from __future__ import annotations

import dataclasses
import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .._core.checks import as_int
from .schedule import Schedule
from .table import PREDICTIONS, SAMPLER_COLUMNS, SamplerTable

Clip = float | tuple[float, float] | None
Threshold = float | tuple[float, float] | None


@dataclasses.dataclass(frozen=True)
class Nodes:
    """The nodes of a trajectory, noisiest first; the last one is where it ends."""

    alpha: Tensor
    sigma: Tensor
    times: Tensor
    px: Tensor
    pm: Tensor
    ex: Tensor
    em: Tensor
    scale: Tensor
    initial_sigma: float

    def here(self, name: str) -> Tensor:
        return getattr(self, name)[:-1]

    def next(self, name: str) -> Tensor:
        return getattr(self, name)[1:]

    def unscaled(self) -> Nodes:
        """The same nodes for the state ``x / alpha``, in which every process has alpha = 1."""
        a = self.alpha
        sigma = self.sigma / a
        maps = {"px": self.px * a, "ex": self.ex * a, "scale": self.scale * a}
        return dataclasses.replace(self, alpha=torch.ones_like(a), sigma=sigma, initial_sigma=float(sigma[0]), **maps)


def clean_and_noise_maps(prediction: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``px, pm, ex, em`` such that ``x0 = px x + pm m`` and ``eps = ex x + em m`` for what the model predicts."""
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    size2 = alpha**2 + sigma**2
    if prediction == "eps":
        return 1 / alpha, -sigma / alpha, zero, one
    if prediction == "x0":
        return zero, one, 1 / sigma, -alpha / sigma
    if prediction == "v":  # v = (alpha eps - sigma x0) / |(alpha, sigma)|; the norm is 1 if variance is preserved
        return alpha / size2, -sigma / size2.sqrt(), sigma / size2, alpha / size2.sqrt()
    if prediction == "score":
        return 1 / alpha, sigma**2 / alpha, zero, -sigma
    return one, sigma, one, -alpha  # velocity x0 - eps of x = alpha x0 + (1 - alpha) eps


def check_prediction(prediction: str, schedule: Schedule) -> None:
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}")
    if (prediction == "velocity") != (schedule.kind == "flow"):
        raise ValueError(
            f"prediction 'velocity' goes with Schedule.flow and only with it, got {prediction!r} with a schedule of "
            f"kind {schedule.kind!r}"
        )


def check_kind(sampler: str, schedule: Schedule, *kinds: str) -> None:
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a Schedule, got {type(schedule).__name__}")
    if schedule.kind not in kinds:
        raise ValueError(f"{sampler} takes a schedule of kind {' or '.join(map(repr, kinds))}, got {schedule.kind!r}")


def timesteps(length: int, steps: int | None, spacing: str) -> Tensor:
    """Indices into a schedule of ``length`` entries, noisiest first (diffusers' names for the spacings)."""
    if steps is None:
        return torch.arange(length - 1, -1, -1)
    number = as_int(steps)
    if number is None or not 1 <= number <= length:
        raise ValueError(f"steps must be an int in [1, {length}] (the length of the schedule), got {steps!r}")
    steps = number
    if spacing == "leading":
        return (torch.arange(steps) * (length // steps)).flip(0)
    if spacing == "linspace":
        return torch.linspace(length - 1, 0, steps, dtype=torch.float64).round().long()
    if spacing == "trailing":
        return (length - torch.arange(steps, dtype=torch.float64) * length / steps).round().long() - 1
    raise ValueError(f"spacing must be 'leading', 'linspace' or 'trailing', got {spacing!r}")


def make_nodes(
    schedule: Schedule, steps: int | None, prediction: str, spacing: str | None, final: str = "one"
) -> Nodes:
    """The chosen entries of the schedule, then where the trajectory ends: the clean sample or the first entry."""
    check_prediction(prediction, schedule)
    if final not in ("one", "first"):
        raise ValueError(
            f"final must be 'one' (the clean sample) or 'first' (the schedule's first entry), got {final!r}"
        )
    spacing = spacing or {"vp": "leading", "ve": "linspace", "flow": "trailing"}[schedule.kind]
    index = timesteps(len(schedule), steps, spacing)
    index = torch.cat([index, index.new_zeros(1)])
    alpha, sigma = schedule.alpha_t[index], schedule.sigma_t[index]
    if final == "one":
        alpha[-1], sigma[-1] = 1.0, 0.0
    maps = clean_and_noise_maps(prediction, alpha, sigma)
    start = (
        float(sigma[0]) if schedule.kind == "ve" else 1.0
    )  # all three kinds are noise alone, or nearly, at the start
    return Nodes(alpha, sigma, schedule.times[index], *maps, scale=torch.ones_like(alpha), initial_sigma=start)


def as_float(name: str, value: object) -> float:
    """``value`` as a float."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def _bounds(clip: Clip) -> tuple[float, float]:
    if clip is None:
        return -math.inf, math.inf
    pair = tuple(clip) if isinstance(clip, (tuple, list)) else (-clip, clip) if isinstance(clip, Real) else ()
    if len(pair) != 2 or not all(isinstance(bound, Real) for bound in pair) or not pair[0] < pair[1]:
        raise ValueError(f"clip must be a positive number or a pair (low, high) with low < high, got {clip!r}")
    return pair


def pack_rows(count: int, clip: Clip = None, **columns: Tensor | float) -> Tensor:
    """``count`` rows from their columns (see ``SAMPLER_COLUMNS``); columns that are not given are 0."""
    low, high = _bounds(clip)
    values = {"lo": low, "hi": high, **columns}
    full = [torch.as_tensor(values.get(name, 0.0), dtype=torch.float64).expand(count) for name in SAMPLER_COLUMNS]
    return torch.stack(full, dim=1)


def step_rows(nodes: Nodes, clip: Clip, **columns: Tensor | float) -> Tensor:
    """One row from every node to the next."""
    here = {"px": nodes.here("px"), "pm": nodes.here("pm")}
    goal = {"ak": nodes.next("alpha"), "sk": nodes.next("sigma")}
    return pack_rows(len(nodes.alpha) - 1, clip, **here, **goal, **columns)


def check_threshold(value: Threshold, clip: Clip) -> tuple[float, float] | None:
    """The quantile and the largest bound; it takes the place of ``clip``."""
    if value is None:
        return None
    if clip is not None:
        raise ValueError("dynamic_threshold and clip both bound x0: give one of them")
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, math.inf)
    real = len(pair) == 2 and all(isinstance(number, Real) for number in pair)
    if not real or not 0 < pair[0] <= 1 or not pair[1] >= 1:
        raise ValueError(
            "dynamic_threshold must be a quantile in (0, 1] or a pair (quantile, largest) with largest >= 1, "
            f"got {value!r}"
        )
    return float(pair[0]), float(pair[1])


def make_table(name: str, prediction: str, nodes: Nodes, rows: Tensor, **fields: Any) -> SamplerTable:
    """Packs rows that go from node to node, one for each unless ``fields`` says otherwise."""
    fields = {"times": nodes.here("times"), "input_scale": nodes.here("scale"), **fields}
    return SamplerTable(name, prediction, rows, initial_sigma=nodes.initial_sigma, **fields)


def posterior(nodes: Nodes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean coefficients of q(x' | x, x0), its variance, and the variance the forward step adds."""
    a, s, a1, s1 = nodes.here("alpha"), nodes.here("sigma"), nodes.next("alpha"), nodes.next("sigma")
    added = (s**2 - (s1 * a / a1) ** 2).clamp(min=0)  # rounding must not make it negative
    return a / a1 * s1**2 / s**2, a1 * added / s**2, added * s1**2 / s**2, added


def alternate(first: Tensor, second: Tensor, repeats: int = 1) -> Tensor:
    """Each entry of ``first``, then ``repeats`` copies of the entry of ``second``, then what ``first`` has more."""
    count = len(second)
    groups = torch.cat([first[:count, None], second[:, None].repeat_interleave(repeats, 1)], dim=1)
    return torch.cat([groups.flatten(0, 1), first[count:]])
