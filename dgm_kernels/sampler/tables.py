"""Every sampler of the field as a table of affine steps, worked out in float64 on the host.

Notation: the state is ``x = alpha x0 + sigma eps`` at a node of the trajectory; ``alpha', sigma'`` belong to the next
node. A model's output ``m`` becomes ``x0 = px x + pm m`` and ``eps = ex x + em m``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .nodes import (
    Clip,
    Nodes,
    Threshold,
    alternate,
    as_float,
    check_kind,
    check_prediction,
    check_threshold,
    make_nodes,
    make_table,
    pack_rows,
    posterior,
    step_rows,
)
from .schedule import Schedule, positive_int
from .table import TRAINING_COLUMNS, SamplerTable, TrainingTable

__all__ = [
    "annealed_langevin",
    "ddim",
    "ddpm",
    "dpmpp_2m",
    "euler",
    "euler_ancestral",
    "flow_euler",
    "flow_midpoint",
    "heun",
    "predictor_corrector",
    "probability_flow",
    "reverse_sde",
    "training",
]


def ddpm(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "eps",
    variance: str = "fixed_small",
    clip: Clip = None,
    dynamic_threshold: Threshold = None,
    spacing: str | None = None,
) -> SamplerTable:
    """Ancestral sampling (Ho et al., "Denoising Diffusion Probabilistic Models", 2020).

    ``x' = sqrt(a)(1 - abar')/(1 - abar) x + sqrt(abar') b/(1 - abar) x0 + sqrt(variance) noise``, where
    ``a = abar/abar'``, ``b = 1 - a``; the last step adds no noise.

    Args:
        schedule: a variance preserving schedule.
        steps: number of steps; None takes every training time.
        prediction: what the model predicts.
        variance: ``"fixed_small"`` (that of the posterior) or ``"fixed_large"`` (``b``).
        clip: bound on x0: a number c for [-c, c], or a pair.
        dynamic_threshold: quantile q of ``|x0|``; a sample is clipped to ``s = max(q-quantile, 1)`` and divided by it;
            a pair (q, largest) bounds s (Saharia et al., "Imagen", 2022). In place of ``clip``.
        spacing: ``"leading"``, ``"linspace"`` or ``"trailing"``.
    """
    check_kind("ddpm", schedule, "vp")
    nodes = make_nodes(schedule, steps, prediction, spacing)
    ax, a0, small, large = posterior(nodes)
    if variance not in ("fixed_small", "fixed_large"):
        raise ValueError(f"variance must be 'fixed_small' or 'fixed_large', got {variance!r}")
    an = (small if variance == "fixed_small" else large).sqrt() * (nodes.next("sigma") > 0)
    rows = step_rows(nodes, clip, ax=ax, a0=a0, an=an)
    return make_table("ddpm", prediction, nodes, rows, dynamic_threshold=check_threshold(dynamic_threshold, clip))


def ddim(
    schedule: Schedule,
    steps: int | None = None,
    *,
    eta: float = 0.0,
    prediction: str = "eps",
    clip: Clip = None,
    dynamic_threshold: Threshold = None,
    spacing: str | None = None,
    final: str = "one",
    use_clipped_model_output: bool = False,
) -> SamplerTable:
    """Implicit sampling (Song et al., "Denoising Diffusion Implicit Models", 2021).

    ``x' = alpha' x0 + sqrt(sigma'^2 - s^2) eps + s noise``, ``s = eta`` times the posterior's standard deviation: 0 is
    deterministic, 1 is DDPM. ``use_clipped_model_output`` works eps out again from the clipped x0.

    Args: as for :func:`ddpm`, and
        final: ``"one"`` ends on the clean sample, ``"first"`` on the schedule's first entry.
    """
    check_kind("ddim", schedule, "vp", "ve", "flow")
    if not 0 <= as_float("eta", eta) <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta!r}")
    nodes = make_nodes(schedule, steps, prediction, spacing, final)
    noise = eta * posterior(nodes)[2].sqrt()
    eps = (nodes.next("sigma") ** 2 - noise**2).clamp(min=0).sqrt()
    if use_clipped_model_output:
        ratio = eps / nodes.here("sigma")
        columns = {"ax": ratio, "a0": nodes.next("alpha") - ratio * nodes.here("alpha")}
    else:
        columns = {"ax": eps * nodes.here("ex"), "am": eps * nodes.here("em"), "a0": nodes.next("alpha")}
    rows = step_rows(nodes, clip, an=noise, **columns)
    return make_table("ddim", prediction, nodes, rows, dynamic_threshold=check_threshold(dynamic_threshold, clip))


def euler(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "eps",
    clip: Clip = None,
    spacing: str | None = None,
) -> SamplerTable:
    """Euler steps of ``dx/dsigma = (x - x0)/sigma`` on the unscaled state (Karras et al., 2022, Algorithm 1).

    The state is ``x / alpha``; multiply it by ``table.input_scale[step]`` before the model sees it.
    """
    check_kind("euler", schedule, "vp", "ve")
    nodes = make_nodes(schedule, steps, prediction, spacing).unscaled()
    ratio = nodes.next("sigma") / nodes.here("sigma")
    return make_table("euler", prediction, nodes, step_rows(nodes, clip, ax=ratio, a0=1 - ratio))


def euler_ancestral(
    schedule: Schedule,
    steps: int | None = None,
    *,
    eta: float = 1.0,
    prediction: str = "eps",
    clip: Clip = None,
    spacing: str | None = None,
) -> SamplerTable:
    """Euler to ``sigma_down``, then noise of ``sigma_up`` (k-diffusion's ``sample_euler_ancestral``); unscaled state.

    ``sigma_up = min(sigma', eta sqrt(sigma'^2 (sigma^2 - sigma'^2) / sigma^2))``,
    ``sigma_down^2 = sigma'^2 - sigma_up^2``.
    """
    check_kind("euler_ancestral", schedule, "vp", "ve")
    if not 0 <= as_float("eta", eta) < math.inf:
        raise ValueError(f"eta must be non-negative and finite, got {eta!r}")
    nodes = make_nodes(schedule, steps, prediction, spacing).unscaled()
    here, then = nodes.here("sigma"), nodes.next("sigma")
    up = torch.minimum(then, eta * (then**2 * (here**2 - then**2) / here**2).sqrt())
    ratio = (then**2 - up**2).clamp(min=0).sqrt() / here
    return make_table("euler_ancestral", prediction, nodes, step_rows(nodes, clip, ax=ratio, a0=1 - ratio, an=up))


def heun(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "eps",
    clip: Clip = None,
    spacing: str | None = None,
) -> SamplerTable:
    """Second-order steps on the unscaled state (Karras et al., 2022, Algorithm 1 without churn).

    Two rows a step: Euler to the next node, then the mean of both slopes, for which ``history`` is the state that the
    Euler row started from. The last step, to sigma = 0, is Euler alone: ``2 steps - 1`` rows.
    """
    check_kind("heun", schedule, "vp", "ve")
    nodes = make_nodes(schedule, steps, prediction, spacing).unscaled()
    here, then = nodes.here("sigma"), nodes.next("sigma")
    ratio = then / here
    first = step_rows(nodes, clip, ax=ratio, a0=1 - ratio)
    half = (then - here)[:-1] / (2 * then[:-1])
    at_next = {name: nodes.next(name)[:-1] for name in ("px", "pm")}
    second = pack_rows(
        len(half), clip, **at_next, ah=0.5, ax=0.5 + half, a0=-half, ak=nodes.next("alpha")[:-1], sk=then[:-1]
    )
    fields = {name: alternate(nodes.here(key), nodes.next(key)[:-1]) for name, key in _PER_ROW}
    return make_table("heun", prediction, nodes, alternate(first, second), history="x", **fields)


_PER_ROW = (("times", "times"), ("input_scale", "scale"))


def dpmpp_2m(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "eps",
    clip: Clip = None,
    dynamic_threshold: Threshold = None,
    spacing: str | None = None,
) -> SamplerTable:
    """Second-order multistep DPM-Solver++ (Lu et al., 2022, Algorithm 2), one model call a step.

    ``x' = sigma'/sigma x - alpha' (e^-h - 1) ((1 + 1/2r) x0 - 1/2r history)`` with ``h`` the step in
    ``log(alpha/sigma)`` and ``r`` the ratio of the last two. The first step and the step to sigma = 0 are first order.
    """
    check_kind("dpmpp_2m", schedule, "vp", "ve")
    nodes = make_nodes(schedule, steps, prediction, spacing)
    log_ratio = (nodes.alpha / nodes.sigma).log()
    h = log_ratio.diff()
    extra = torch.zeros_like(h)
    extra[1:] = h[1:] / (2 * h[:-1])
    extra[~h.isfinite()] = 0.0
    gain = -nodes.next("alpha") * torch.expm1(-h)
    rows = step_rows(nodes, clip, ax=nodes.next("sigma") / nodes.here("sigma"), a0=gain * (1 + extra), ah=-gain * extra)
    return make_table(
        "dpmpp_2m", prediction, nodes, rows, history="x0", dynamic_threshold=check_threshold(dynamic_threshold, clip)
    )


def _reverse_columns(nodes: Nodes, score_share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Reverse diffusion: ``ax, a0`` and the noise's standard deviation; ``score_share`` 1 for the SDE, 1/2 for the ODE.

    With ``f`` the drift and ``g2`` the variance of the forward step, ``x' = x - f + share g2 score + sqrt(g2) noise``.
    """
    a, s, a1 = nodes.here("alpha"), nodes.here("sigma"), nodes.next("alpha")
    added = posterior(nodes)[3]
    pull = score_share * added / s**2  # score = (alpha x0 - x) / sigma^2
    return 2 - a / a1 - pull, pull * a, added.sqrt()


def reverse_sde(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "eps",
    clip: Clip = None,
    spacing: str | None = None,
) -> SamplerTable:
    """Reverse diffusion of the VP or VE SDE (Song et al., "Score-based generative modeling through SDEs", 2021).

    VP: ``x' = (2 - sqrt(1 - b)) x + b score + sqrt(b) noise``;
    VE: ``x' = x + g score + sqrt(g) noise`` with ``g = sigma^2 - sigma'^2``.
    The last step adds no noise.
    """
    check_kind("reverse_sde", schedule, "vp", "ve")
    nodes = make_nodes(schedule, steps, prediction, spacing)
    ax, a0, an = _reverse_columns(nodes, 1.0)
    rows = step_rows(nodes, clip, ax=ax, a0=a0, an=an * (nodes.next("sigma") > 0))
    return make_table("reverse_sde", prediction, nodes, rows)


def probability_flow(
    schedule: Schedule,
    steps: int | None = None,
    *,
    prediction: str = "eps",
    clip: Clip = None,
    spacing: str | None = None,
) -> SamplerTable:
    """The deterministic process with the SDE's marginals: :func:`reverse_sde` with half the score and no noise."""
    check_kind("probability_flow", schedule, "vp", "ve")
    nodes = make_nodes(schedule, steps, prediction, spacing)
    ax, a0, _ = _reverse_columns(nodes, 0.5)
    return make_table("probability_flow", prediction, nodes, step_rows(nodes, clip, ax=ax, a0=a0))


def _langevin_rows(nodes: Nodes, part: Callable[[str], Tensor], size: Tensor, clip: Clip) -> Tensor:
    """``x' = x + size score + sqrt(2 size) noise`` at the nodes that ``part`` picks."""
    alpha, sigma = part("alpha"), part("sigma")
    pull = size / sigma**2
    columns = {"ax": 1 - pull, "a0": pull * alpha, "an": (2 * size).sqrt(), "ak": alpha, "sk": sigma}
    return pack_rows(len(size), clip, px=part("px"), pm=part("pm"), **columns)


def annealed_langevin(
    schedule: Schedule,
    steps_per_level: int = 100,
    *,
    step_size: float = 2e-5,
    prediction: str = "score",
    clip: Clip = None,
    denoise: bool = True,
) -> SamplerTable:
    """Langevin dynamics at every noise level, loudest first (Song and Ermon, NCSN, 2019, Algorithm 1).

    ``x' = x + a/2 score + sqrt(a) noise`` with ``a = step_size sigma^2 / sigma_min^2``. ``denoise`` adds a last row
    that returns x0.

    Args:
        schedule: a variance exploding schedule; its entries are the levels.
        steps_per_level: steps at every level.
        step_size: step at the quietest level.
    """
    check_kind("annealed_langevin", schedule, "ve")
    steps_per_level = positive_int("steps_per_level", steps_per_level)
    limit = 4 * float(schedule.sigma_t[0]) ** 2
    if not 0 < as_float("step_size", step_size) < limit:
        raise ValueError(f"step_size must be in (0, 4 sigma_min^2) = (0, {limit:g}), else x grows, got {step_size!r}")
    nodes = make_nodes(schedule, None, prediction, None)
    size = 0.5 * step_size * (nodes.here("sigma") / schedule.sigma_t[0]) ** 2
    rows = _langevin_rows(nodes, nodes.here, size, clip).repeat_interleave(steps_per_level, 0)
    fields = {name: nodes.here(key).repeat_interleave(steps_per_level) for name, key in _PER_ROW}
    if denoise:
        last = pack_rows(1, clip, px=nodes.here("px")[-1], pm=nodes.here("pm")[-1], a0=1.0, ak=1.0)
        rows = torch.cat([rows, last])
        fields = {name: torch.cat([value, value[-1:]]) for name, value in fields.items()}
    return make_table("annealed_langevin", prediction, nodes, rows, **fields)


def predictor_corrector(
    schedule: Schedule,
    steps: int | None = None,
    *,
    snr: float = 0.16,
    corrector_steps: int = 1,
    prediction: str = "eps",
    clip: Clip = None,
    spacing: str | None = None,
) -> SamplerTable:
    """Reverse diffusion, then Langevin steps at the new noise level (Song et al., 2021, Algorithms 2 and 3).

    The paper sizes a corrector step by the batch's mean norms, ``2 a (snr |noise| / |score|)^2``, with ``a = 1 - b`` of
    the node that is corrected (1 for variance exploding schedules). Here the ratio of the norms is its expectation,
    sigma, so that a sample does not depend on the rest of its batch.
    """
    check_kind("predictor_corrector", schedule, "vp", "ve")
    if not 0 < as_float("snr", snr) < 1:
        raise ValueError(f"snr must be in (0, 1), else x grows, got {snr!r}")
    corrector_steps = positive_int("corrector_steps", corrector_steps)
    nodes = make_nodes(schedule, steps, prediction, spacing)
    ax, a0, an = _reverse_columns(nodes, 1.0)
    predictor = step_rows(nodes, clip, ax=ax, a0=a0, an=an * (nodes.next("sigma") > 0))
    ratio = nodes.alpha[1:-1] / nodes.alpha[2:]
    middle = lambda name: nodes.next(name)[:-1]  # noqa: E731  (every node but the first and the clean last)
    corrector = _langevin_rows(nodes, middle, 2 * ratio**2 * (snr * middle("sigma")) ** 2, clip)
    rows = alternate(predictor, corrector, corrector_steps)
    fields = {n: alternate(nodes.here(k), middle(k), corrector_steps) for n, k in _PER_ROW}
    return make_table("predictor_corrector", prediction, nodes, rows, **fields)


def flow_euler(schedule: Schedule, steps: int | None = None, *, clip: Clip = None) -> SamplerTable:
    """Euler steps ``x' = x + dt velocity`` from noise at t = 0 to data at t = 1 (Lipman et al., 2023)."""
    check_kind("flow_euler", schedule, "flow")
    nodes = make_nodes(schedule, steps, "velocity", None)
    if clip is None:
        rows = step_rows(nodes, None, ax=1.0, am=nodes.alpha.diff())
    else:  # velocity = (x0 - x) / (1 - t), through the clipped x0
        share = nodes.alpha.diff() / nodes.here("sigma")
        rows = step_rows(nodes, clip, ax=1 - share, a0=share)
    return make_table("flow_euler", "velocity", nodes, rows)


def flow_midpoint(schedule: Schedule, steps: int | None = None) -> SamplerTable:
    """Midpoint steps: half an Euler step, then a whole one from ``history`` with the velocity found there.

    Two rows a step; ``history`` is the state that the first of them started from.
    """
    check_kind("flow_midpoint", schedule, "flow")
    nodes = make_nodes(schedule, steps, "velocity", None)
    dt = nodes.alpha.diff()
    middle = nodes.here("alpha") + dt / 2
    first = pack_rows(len(dt), px=nodes.here("px"), pm=nodes.here("pm"), ax=1.0, am=dt / 2, ak=middle, sk=1 - middle)
    second = pack_rows(len(dt), px=1.0, pm=1 - middle, ah=1.0, am=dt, ak=nodes.next("alpha"), sk=nodes.next("sigma"))
    fields = {
        "times": alternate(nodes.here("times"), middle),
        "input_scale": torch.ones(2 * len(dt), dtype=torch.float64),
    }
    return make_table("flow_midpoint", "velocity", nodes, alternate(first, second), history="x", **fields)


def training(
    schedule: Schedule, *, prediction: str = "eps", weighting: str | Tensor | None = None, gamma: float = 5.0
) -> TrainingTable:
    """The forward process ``x_t = alpha x0 + sigma noise``, the target and the loss weight of every training time.

    Targets: ``eps = noise``; ``x0``; ``v = alpha noise - sigma x0``; ``score = -noise / sigma``;
    ``velocity = x0 - noise``.

    Args:
        schedule: any schedule.
        prediction: the target.
        weighting: None (1 everywhere), ``"min_snr"`` (Hang et al., 2023, with ``gamma``), ``"sigma_squared"`` (score
            matching, Song and Ermon, 2019), or a tensor ``[T]`` of non-negative weights.
        gamma: largest signal-to-noise ratio counted in full by ``"min_snr"``.
    """
    check_kind("training", schedule, "vp", "ve", "flow")
    check_prediction(prediction, schedule)
    a, s = schedule.alpha_t, schedule.sigma_t
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    size = (a**2 + s**2).sqrt()
    targets = {"eps": (zero, one), "x0": (one, zero), "v": (-s / size, a / size), "velocity": (one, -one)}
    cx, cn = (zero, -1 / s) if prediction == "score" else targets[prediction]
    weight = _weights(weighting, schedule, prediction, gamma)
    values = {"alpha": a, "sigma": s, "cx": cx, "cn": cn, "weight": weight}
    rows = torch.stack([values.get(name, zero) for name in TRAINING_COLUMNS], dim=1)
    return TrainingTable("training", prediction, rows, schedule.times)


def _weights(weighting: str | Tensor | None, schedule: Schedule, prediction: str, gamma: float) -> Tensor:
    if weighting is None:
        return torch.ones_like(schedule.alpha_t)
    if isinstance(weighting, Tensor):
        values = weighting.detach().to(device="cpu", dtype=torch.float64)
        if values.shape != schedule.alpha_t.shape or not bool((values.isfinite() & (values >= 0)).all()):
            raise ValueError(
                f"weighting must hold {len(schedule)} non-negative numbers, got shape {tuple(values.shape)}"
            )
        return values
    if weighting == "sigma_squared":
        return schedule.sigma_t**2
    if weighting == "min_snr":
        snr = schedule.log_snr.exp()
        scale = {"eps": snr, "x0": torch.ones_like(snr), "v": snr + 1}
        if prediction not in scale:
            raise ValueError(f"weighting 'min_snr' goes with prediction 'eps', 'x0' or 'v', got {prediction!r}")
        return snr.clamp(max=gamma) / scale[prediction]
    raise ValueError(f"weighting must be None, 'min_snr', 'sigma_squared' or a tensor, got {weighting!r}")
