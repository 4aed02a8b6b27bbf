"""Denoising diffusion (Ho et al., "Denoising Diffusion Probabilistic Models", 2020), with every sampler of its kind."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import dgm_kernels
from dgm_kernels import NoiseKey, SamplerTable, Schedule, add_noise, denoising_loss, noise_like, tables

from ..model import DensityUnavailable, GenerativeModel, Stream, check_positive, check_sizes
from ..registry import register_model
from . import bound
from .mlp import MLP
from .unet import UNet

__all__ = ["DDPM", "MLP", "SAMPLERS", "UNet"]

# "probability_flow" discretises the flow of the SDE and wants a schedule of small betas: with the best denoiser for
# N(0.3, 0.7^2), T = 1000 and no clip its samples have a standard deviation of 0.71 with "linear" but of 1.41 with
# "cosine", whose last beta is 0.999. "ddim", which follows the same flow, is right with both: 0.70.
SAMPLERS = (
    "ddim",
    "ddpm",
    "dpmpp_2m",
    "euler",
    "euler_ancestral",
    "heun",
    "predictor_corrector",
    "probability_flow",
    "reverse_sde",
)
PREDICTIONS = ("eps", "x0", "v")


@register_model("ddpm")
class DDPM(GenerativeModel):
    """A network that is trained to undo noise, ``x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps``.

    The defaults are those for the 8x8 digits.

    Args:
        image_shape: of one sample; with ``denoiser="mlp"`` of any number of dimensions.
        denoiser: ``"unet"`` or ``"mlp"``.
        width: of the network.
        depth: residual blocks of the network, for the U-Net at each resolution.
        multipliers: of the width at each resolution (U-Net).
        timesteps: number T of noise levels, for a schedule given by its name.
        schedule: ``"linear"`` (betas as for T = 1000, times 1000 / T), ``"cosine"``, ``"scaled_linear"``, or the betas.
        prediction: what the network predicts: ``"eps"``, ``"x0"`` or ``"v"``.
        num_classes: classes to condition on; None for none.
        cond_dropout: share of training samples whose class is hidden, for classifier-free guidance (Ho and Salimans,
            2022).
        clip: bound on the predicted clean sample; None for unbounded data. Samplers use it, unless they are given a
            ``dynamic_threshold``.
        levels: grey levels of the data in [-1, 1], equally spaced, for the ELBO; None for continuous data.
    """

    def __init__(
        self,
        image_shape: Sequence[int] = (1, 8, 8),
        denoiser: str = "unet",
        width: int = 32,
        depth: int = 1,
        multipliers: Sequence[int] = (1, 2),
        timesteps: int = 200,
        schedule: str | Sequence[float] = "cosine",
        prediction: str = "eps",
        num_classes: int | None = None,
        cond_dropout: float = 0.1,
        clip: float | None = 1.0,
        levels: int | None = 17,
    ) -> None:
        super().__init__()
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}")
        if not 0 <= cond_dropout <= 1:
            raise ValueError(f"cond_dropout must be in [0, 1], got {cond_dropout!r}")
        if levels is not None and check_positive("levels", levels) < 2:
            raise ValueError(f"levels must be at least 2, got {levels}")
        self.sample_shape = check_sizes("image_shape", image_shape)
        self.prediction, self.clip, self.levels = prediction, clip, levels
        self.num_classes, self.cond_dropout = num_classes, cond_dropout
        self.conditional = num_classes is not None
        self.schedule = _schedule(schedule, timesteps)
        self.training_table = tables.training(self.schedule, prediction=prediction)
        multipliers = check_sizes("multipliers", multipliers)
        self.denoiser = _denoiser(denoiser, self.sample_shape, width, depth, multipliers, num_classes)

    def loss_parts(self, x: Tensor, cond: Tensor | None = None, *, key: NoiseKey | None = None) -> dict[str, Tensor]:
        """``denoising``: the mean squared error of the prediction at a random time (equation 14 of the paper)."""
        self._check_batch(x)
        key = NoiseKey.draw(device=x.device) if key is None else key
        t = _random_times(x, len(self.schedule), key)
        label = self._labels(cond, x)
        if label is not None:
            hidden = _uniform(x, key, Stream.DROPPED_LABELS) <= self.cond_dropout
            label = label.masked_fill(hidden, self.num_classes or 0)
        noise = dataclasses.replace(key, stream=Stream.TRAINING_NOISE)
        noisy = add_noise(x, self.training_table, t, noise)
        output = self.denoiser(noisy, t.to(torch.float32), label)
        return {"denoising": denoising_loss(output, x, self.training_table, t, noise)}

    def denoise(self, x: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
        """The network's prediction (config: ``prediction``) from noisy samples.

        Args:
            x: ``[batch, *image_shape]``, noisy.
            time: ``[batch]``, 0 .. T - 1.
            cond: int64 ``[batch]`` classes, or None.
        """
        # Never in the dtype of x: bfloat16 has no odd number above 256.
        return self.denoiser(x, time.to(torch.float32), self._labels(cond, x))

    def sampler_table(
        self, sampler: str | SamplerTable = "ddpm", steps: int | None = None, **options: Any
    ) -> SamplerTable:
        """The coefficients of a sampler for this model's schedule and prediction.

        Args:
            sampler: one of ``SAMPLERS``, or a table made by ``dgm_kernels.tables``.
            steps: number of steps; None takes every training time.
            options: of the function of that name in ``dgm_kernels.tables``.
        """
        return self._table(sampler, steps, options, self.sampler_table)

    def _table(
        self, sampler: str | SamplerTable, steps: int | None, options: dict[str, Any], *callers: Callable[..., Any]
    ) -> SamplerTable:
        """:meth:`sampler_table` for the first of ``callers``, whose options are the arguments of all of them."""
        if isinstance(sampler, SamplerTable):
            if sampler.prediction != self.prediction:
                raise ValueError(
                    f"sampler must be a table for prediction {self.prediction!r}, got {sampler.prediction!r}"
                )
            if steps is not None or options:
                raise ValueError("steps and options belong to a sampler given by its name, got a table")
            return sampler
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler must be a table or one of {', '.join(SAMPLERS)}, got {sampler!r}")
        make = getattr(tables, sampler)
        known = [name for name in _parameters(make) if name not in ("schedule", "prediction")]
        for option in options:
            if option not in known:
                own = [name for caller in callers for name in _parameters(caller)]
                names = ", ".join(dict.fromkeys([*own, *known]))
                raise TypeError(
                    f"{callers[0].__name__} with sampler {sampler!r} has no option {option!r}; its options are {names}"
                )
        if options.get("dynamic_threshold") is None:
            options = {"clip": self.clip, **options}
        return make(self.schedule, steps, prediction=self.prediction, **options)

    def _sample(
        self,
        n: int,
        seed: int,
        cond: Tensor | None,
        first_sample: int,
        *,
        sampler: str | SamplerTable = "ddpm",
        steps: int | None = None,
        guidance: float = 1.0,
        known: Tensor | None = None,
        mask: Tensor | None = None,
        callback: Callable[[int, Tensor], None] | None = None,
        **options: Any,
    ) -> Tensor:
        """Samples with a table.

        Args:
            n, seed, cond, first_sample: see ``sample``.
            sampler, steps, options: see :meth:`sampler_table`.
            guidance: scale w of classifier-free guidance, ``m_u + w (m_c - m_u)``: 1 for the class as it is, more to
                exaggerate it, 0 to ignore it. Not 1 only with ``cond``.
            known: samples whose pixels are given where ``mask`` is 1, for inpainting; both broadcast to the samples.
            mask: 1 (or True) where ``known`` is kept, 0 where the model paints.
            callback: called with (step, state) after every step.
        """
        if guidance != 1 and cond is None:
            raise ValueError(f"guidance must be 1 without cond, got {guidance!r}")
        table = self._table(sampler, steps, options, self.sample, self._sample)
        x = self._initial_state(n, seed, first_sample, table)
        guided = guidance != 1

        def denoise(x: Tensor, time: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            output = self.denoise(x, time, cond)
            return (output, self.denoise(x, time)) if guided else output

        return dgm_kernels.sample(
            denoise,
            x,
            table,
            noise=NoiseKey(seed, first_sample),
            guidance=guidance if guided else None,
            known=known,
            mask=mask,
            callback=callback,
        )

    @torch.no_grad()
    def trajectory(
        self,
        n: int,
        seed: int = 0,
        cond: Tensor | int | None = None,
        first_sample: int = 0,
        *,
        frames: int = 10,
        sampler: str | SamplerTable = "ddpm",
        steps: int | None = None,
        guidance: float = 1.0,
        known: Tensor | None = None,
        mask: Tensor | None = None,
        **options: Any,
    ) -> list[tuple[str, Tensor]]:
        """At most ``frames`` states from noise to sample, labelled with their time t; options as in ``sample``."""
        if check_positive("frames", frames) < 2:
            raise ValueError(f"frames must be at least 2, the noise and the sample, got {frames}")
        table = self._table(sampler, steps, options, self.trajectory)
        # A state is labelled with the time the model is told next; some samplers keep it divided by alpha.
        times = [f"t = {int(time) + 1}" for time in table.times] + ["t = 0"]
        scales = [*table.input_scale.tolist(), 1.0]
        states = {0: self._initial_state(n, seed, first_sample, table)}
        kept = set(torch.linspace(0, len(table), frames).round().int().tolist())

        def record(step: int, x: Tensor) -> None:
            if step + 1 in kept:
                states[step + 1] = x

        how: dict[str, Any] = {"sampler": table, "guidance": guidance, "known": known, "mask": mask, "callback": record}
        self.sample(n, seed, cond, first_sample, **how)
        return [(times[step], scales[step] * states[step]) for step in sorted(kept)]

    def log_prob(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Raises DensityUnavailable: the density is an integral over all noisy paths."""
        raise DensityUnavailable(
            "ddpm has no density in closed form: it is an integral over all paths from noise to x; elbo(x) bounds it"
        )

    @torch.no_grad()
    def elbo(
        self,
        x: Tensor,
        k: int = 1,
        cond: Tensor | None = None,
        *,
        times: int | None = None,
        seed: int = 0,
        first_sample: int = 0,
    ) -> Tensor:
        """A random lower bound of the log-probability of ancestral sampling, in nats, ``[batch]``; see :mod:`.bound`.

        Args:
            x: ``[batch, *image_shape]``; on the grey levels unless ``levels`` is None (then it bounds the log-density).
            k: 1 for the sum of the closed-form divergences; more for the importance-weighted bound of k trajectories.
            cond: int64 ``[batch]`` classes, or None.
            times: estimate the sum over the T - 1 divergences from that many random times (only with k = 1); None
                takes all.
            seed, first_sample: name the noise, as in ``sample``.
        """
        k = check_positive("k", k)
        if k == 1:
            return self.elbo_terms(x, cond, times=times, seed=seed, first_sample=first_sample).elbo
        if times is not None:
            raise ValueError(f"times must be None with k > 1: a trajectory visits every time, got {times!r}")
        self._check_data(x)
        with self._evaluating():
            return bound.importance_weighted(self, x, k, cond, seed, first_sample)

    @torch.no_grad()
    def elbo_terms(
        self, x: Tensor, cond: Tensor | None = None, *, times: int | None = None, seed: int = 0, first_sample: int = 0
    ) -> bound.Terms:
        """The three terms of the bound, each ``[batch]`` in nats; arguments as in :meth:`elbo`."""
        self._check_data(x)
        with self._evaluating():
            return bound.variational(self, x, cond, times, seed, first_sample)

    def _initial_state(self, n: int, seed: int, first_sample: int, table: SamplerTable) -> Tensor:
        like = torch.empty(n, *self.sample_shape, device=self.device, dtype=self.dtype)
        return noise_like(like, NoiseKey(seed, first_sample, stream=Stream.INITIAL_STATE)) * table.initial_sigma

    def _labels(self, cond: Tensor | None, x: Tensor) -> Tensor | None:
        """The classes of a batch; the class after the last one stands for none."""
        if self.num_classes is None:
            if cond is not None:
                raise ValueError("cond must be None: num_classes was not given to this ddpm")
            return None
        if cond is None:
            return torch.full((x.shape[0],), self.num_classes, device=x.device)
        if cond.dtype != torch.int64 or cond.shape != x.shape[:1]:
            raise ValueError(
                f"cond must be int64 of shape ({x.shape[0]},), got {cond.dtype} of shape {tuple(cond.shape)}"
            )
        # Looking at the values of a tensor on another device would wait for it.
        if cond.device.type == "cpu" and not bool(((cond >= 0) & (cond < self.num_classes)).all()):
            raise ValueError(f"cond must hold classes in [0, {self.num_classes}), got {cond.tolist()}")
        return cond


def _parameters(function: Callable[..., Any]) -> list[str]:
    """The names of its arguments."""
    every = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in every if parameter.kind is not parameter.VAR_KEYWORD]


def _schedule(schedule: str | Sequence[float], timesteps: int) -> Schedule:
    check_positive("timesteps", timesteps)
    if not isinstance(schedule, str):
        return Schedule.from_betas(schedule)
    if schedule == "linear":
        return Schedule.linear(timesteps, 0.1 / timesteps, 20.0 / timesteps)
    if schedule == "cosine":
        return Schedule.cosine(timesteps)
    if schedule == "scaled_linear":
        return Schedule.scaled_linear(timesteps)
    raise ValueError(f"schedule must be 'linear', 'cosine', 'scaled_linear' or a list of betas, got {schedule!r}")


def _denoiser(
    name: str, shape: Sequence[int], width: int, depth: int, multipliers: Sequence[int], num_classes: int | None
) -> nn.Module:
    if name == "unet":
        return UNet(shape, width, depth, multipliers, num_classes)
    if name == "mlp":
        return MLP(shape, width, depth, num_classes)
    raise ValueError(f"denoiser must be 'unet' or 'mlp', got {name!r}")


def _uniform(x: Tensor, key: NoiseKey, stream: Stream) -> Tensor:
    """One float32 number in (0, 1] for every sample, the same whatever the dtype of ``x``."""
    like = x.new_empty(x.shape[0], 1, dtype=torch.float32)
    return noise_like(like, dataclasses.replace(key, stream=stream), distribution="uniform")[:, 0]


def _random_times(x: Tensor, count: int, key: NoiseKey) -> Tensor:
    """An index in 0 .. count - 1 for every sample, all equally likely."""
    return (_uniform(x, key, Stream.TRAINING_TIMES) * count).ceil().long().clamp(1, count) - 1
