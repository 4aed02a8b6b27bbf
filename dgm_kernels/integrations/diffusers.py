"""Schedulers of diffusers whose ``step`` is one fused kernel: the same numbers and the same use of ``generator``.

    pipe.scheduler = FastDDIMScheduler.from_config(pipe.scheduler.config)

The coefficients of all steps are worked out once per ``set_timesteps`` call, in the float32 arithmetic of diffusers so
that they are its numbers, and are looked up on the device by the timestep: after the first step of a trajectory no step
waits for the device. 16-bit samples are worked on in float32. What is no affine step (noise inside an Euler step),
float64, and bad input run diffusers' own code, with its results and its errors; that is logged once at INFO.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler, DDIMSchedulerOutput
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler, DDPMSchedulerOutput
    from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler, EulerDiscreteSchedulerOutput
    from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  (from_pretrained looks for it here)
    from diffusers.utils.torch_utils import randn_tensor
except ImportError as error:
    raise ImportError(
        "dgm_kernels.integrations.diffusers needs the package diffusers: pip install diffusers"
    ) from error

from .. import SamplerTable, TrainingTable, add_noise, sampler_step
from ..sampler.nodes import clean_and_noise_maps, pack_rows
from ..sampler.table import SAMPLER_COLUMNS, TRAINING_COLUMNS

__all__ = ["FastDDIMScheduler", "FastDDPMScheduler", "FastEulerDiscreteScheduler"]

logger = logging.getLogger("dgm_kernels")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEARNED = ("learned", "learned_range")
_FACTORS = [i for i, name in enumerate(SAMPLER_COLUMNS) if name not in ("lo", "hi")]
_AN, _AH = SAMPLER_COLUMNS.index("an"), SAMPLER_COLUMNS.index("ah")


class _NotAffine(Exception):
    """Why the steps of a scheduler are not rows of a table."""


@functools.cache
def _log_once(message: str) -> None:
    logger.info(message)


def _stamp(x: Tensor) -> tuple[Tensor, int]:
    """A tensor and the count of its writes, which tensors made in inference mode do not keep."""
    return x, 0 if x.is_inference() else x._version


def _unchanged(old: tuple[Any, ...], new: tuple[Any, ...]) -> bool:
    for a, b in zip(old, new, strict=True):  # noqa: SIM110  (all() takes three times as long, at every step)
        if a is not b and (isinstance(b, Tensor) or a != b):
            return False
    return True


def _row(timestep: Any, sample: Tensor, count: int) -> int | Tensor | None:
    """The row of a timestep: the tensor itself where reading it would wait for the device, None where there is none."""
    if isinstance(timestep, Tensor) and timestep.device.type != "cpu" and timestep.device == sample.device:
        return timestep.reshape(()) if timestep.numel() == 1 and timestep.dtype == torch.int64 else None
    try:
        row = operator.index(timestep)
    except TypeError:
        return None
    return row if 0 <= row < count else None


def _element(values: Tensor, x: Tensor) -> int | None:
    """Which element of ``values`` the int64 tensor ``x`` is, told by its address alone; None if it is none of them."""
    if values.device != x.device or values.dtype != x.dtype or not values.is_contiguous():
        return None
    index, rest = divmod(x.data_ptr() - values.data_ptr(), values.element_size())
    return index if rest == 0 and 0 <= index < values.numel() else None


def _promoted(sample: Tensor, model_output: Tensor) -> Tensor:
    """The sample in the dtype that the arithmetic of diffusers gives the result."""
    if sample.dtype == model_output.dtype:
        return sample
    return sample.to(torch.promote_types(sample.dtype, model_output.dtype))


def _table(name: str, prediction: str, rows: Tensor, threshold: tuple[float, float] | None = None) -> SamplerTable:
    times = torch.arange(len(rows), dtype=torch.float64)
    return SamplerTable(name, prediction, rows, times, torch.ones_like(times), 1.0, dynamic_threshold=threshold)


def _finite(rows: Tensor) -> Tensor:
    """The rows, if they hold numbers: the fused form turns infinities into other results than diffusers' formulas."""
    if not bool(rows[:, _FACTORS].isfinite().all()):
        raise _NotAffine("a coefficient is not finite (sigma = 0, eta > 1, or zero terminal SNR with 'epsilon')")
    return rows


class _Fused:
    """What the schedulers share: tables that live as long as their sources, and when not to use them."""

    config: Any

    def _kept(self, slot: str, sources: tuple[Any, ...], make: Callable[..., Any], *args: Any) -> Any:
        """``make(*args)``, or None if it has no table; made again when a source is replaced, written to or changes."""
        held = self.__dict__.get(slot)
        if held is None or not _unchanged(held[0], sources):
            try:
                made = make(*args)
            except _NotAffine as why:
                made = None
                self._refuse(str(why))
            held = self.__dict__[slot] = (sources, made)
        return held[1]

    def _refuse(self, why: str) -> None:
        """Says why diffusers' own code runs."""
        _log_once(f"{type(self).__name__} runs the code of diffusers: {why}")

    def _fits(self, sample: Tensor, model_output: Tensor) -> bool:
        """Whether the fused op takes the tensors."""
        if sample.dtype not in _DTYPES or model_output.dtype not in _DTYPES:
            self._refuse(f"it got {sample.dtype} and {model_output.dtype}")
        elif sample.shape != model_output.shape or sample.dim() == 0:
            self._refuse("the tensors differ in shape, or have no batch dimension")
        else:
            return True
        return False


class _VariancePreserving(_Fused):
    """What DDPM and DDIM share: the prediction of x0, and the forward process."""

    alphas_cumprod: Tensor

    def _maps(self, alphas_cumprod: Tensor) -> tuple[str, Tensor, Tensor, Tensor, Tensor]:
        """Our name of the prediction, then ``px, pm, ex, em`` at the given noise levels."""
        prediction = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}.get(self.config.prediction_type)
        if prediction is None:
            raise _NotAffine(f"prediction_type is {self.config.prediction_type!r}")
        alpha, sigma = alphas_cumprod**0.5, (1 - alphas_cumprod) ** 0.5
        return prediction, *clean_and_noise_maps(prediction, alpha.double(), sigma.double())

    def _bounds(self) -> dict[str, float]:
        """The columns that bound x0; dynamic thresholding takes the place of clipping."""
        config = self.config
        limit = config.clip_sample_range if config.clip_sample and not config.thresholding else math.inf
        if not limit > 0:
            raise _NotAffine(f"clip_sample_range is {limit!r}")
        return {"lo": -limit, "hi": limit}

    def _threshold(self) -> tuple[float, float] | None:
        config = self.config
        return (config.dynamic_thresholding_ratio, config.sample_max_value) if config.thresholding else None

    def _forward_table(self) -> TrainingTable:
        alphas_cumprod = self.alphas_cumprod.cpu()
        values = {"alpha": alphas_cumprod**0.5, "sigma": (1 - alphas_cumprod) ** 0.5}
        zero = torch.zeros_like(alphas_cumprod)
        rows = torch.stack([values.get(name, zero) for name in TRAINING_COLUMNS], dim=1).double()
        return TrainingTable("training", "eps", rows, torch.arange(len(rows), dtype=torch.float64))

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``sqrt(alphas_cumprod[t]) x0 + sqrt(1 - alphas_cumprod[t]) noise`` in one pass; arguments as in diffusers."""
        batch = original_samples.shape[:1].numel()
        if (
            not self._fits(original_samples, noise)
            or noise.dtype != original_samples.dtype
            or timesteps.is_floating_point()
            or timesteps.numel() not in (1, batch)
        ):
            return super().add_noise(original_samples, noise, timesteps)  # type: ignore[misc]
        t = timesteps.to(device=original_samples.device, dtype=torch.int64).flatten().expand(batch).contiguous()
        table = self._kept("_forward", _stamp(self.alphas_cumprod), self._forward_table)
        return add_noise(original_samples, table, t, noise)


@dataclasses.dataclass(frozen=True)
class _AncestralSteps:
    """The steps of :class:`FastDDPMScheduler`.

    Attributes:
        table: one row for every training timestep; NaN where the timestep is not on the schedule.
        last: the same without noise, for timestep 0.
        timesteps: ``scheduler.timesteps`` on the host.
        known: the timesteps that have a row.
        log_std: ``[T, 2]``: with the learned range ``log std = log_std[t, 0] v + log_std[t, 1]`` for a model output v.
    """

    table: SamplerTable
    last: SamplerTable
    timesteps: list[int]
    known: frozenset[int]
    log_std: Tensor
    _on_device: dict[torch.device, Tensor] = dataclasses.field(default_factory=dict, init=False)

    def log_std_on(self, device: torch.device) -> Tensor:
        """``log_std`` on a device; copied there once."""
        if device not in self._on_device:
            self._on_device[device] = self.log_std.to(device)
        return self._on_device[device]


class FastDDPMScheduler(_VariancePreserving, DDPMScheduler):
    """diffusers' ``DDPMScheduler`` with a fused ``step`` and ``add_noise``; the same configuration and numbers.

    With a learned variance the noise is multiplied by its standard deviation first, element by element, and enters the
    fused step with coefficient 1.
    """

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """One step of ancestral sampling; arguments and result as in diffusers."""
        steps = self._steps()
        row = None if steps is None else _row(timestep, sample, len(steps.table))
        m, learned = self._split(model_output, sample)
        if steps is None or row is None or not self._takes(steps, row, m, learned, sample):
            return super().step(model_output, timestep, sample, generator, return_dict)
        noise, table = None, steps.last
        if self._draws(steps, row):
            noise, table = randn_tensor(m.shape, generator=generator, device=m.device, dtype=m.dtype), steps.table
            if learned is not None:
                noise = noise * self._learned_std(steps, row, learned)
        new, x0 = sampler_step(_promoted(sample, m), m, table, row, noise=noise, return_x0=True)
        if table.prediction == "x0":
            x0 = x0.to(m.dtype)
        return DDPMSchedulerOutput(prev_sample=new, pred_original_sample=x0) if return_dict else (new, x0)

    def _split(self, model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor | None]:
        """The model output proper, and what it says of the variance where that is learned."""
        if self.variance_type in _LEARNED and model_output.shape[1] == 2 * sample.shape[1]:
            return torch.split(model_output, sample.shape[1], dim=1)  # type: ignore[return-value]
        return model_output, None

    def _takes(
        self, steps: _AncestralSteps, row: int | Tensor, m: Tensor, learned: Tensor | None, sample: Tensor
    ) -> bool:
        if not isinstance(row, Tensor) and row not in steps.known:
            self._refuse("the timestep is not on the schedule")
        elif learned is None and self.variance_type in _LEARNED:
            self._refuse("model_output has no channels for the learned variance")
        else:
            return self._fits(sample, m)
        return False

    def _draws(self, steps: _AncestralSteps, row: int | Tensor) -> bool:
        """Whether the step draws noise: everywhere but at timestep 0."""
        if not isinstance(row, Tensor):
            return row > 0
        if 0 not in steps.known:
            return True
        index = _element(self.timesteps, row)
        if index is not None:
            return steps.timesteps[index] > 0
        if row.is_cuda and torch.cuda.is_current_stream_capturing():
            return True  # a graph serves every timestep; at 0 its noise has coefficient 0
        _log_once("FastDDPMScheduler waits for the device: timestep is a tensor, but no element of scheduler.timesteps")
        return int(row) > 0

    def _learned_std(self, steps: _AncestralSteps, row: int | Tensor, learned: Tensor) -> Tensor:
        learned = learned.float()
        if self.variance_type == "learned":
            return learned**0.5
        log_std = steps.log_std_on(learned.device)
        # log_std[row] would read a tensor without dimensions on the host
        scale, shift = log_std.index_select(0, row.reshape(1))[0] if isinstance(row, Tensor) else log_std[row]
        return torch.exp(learned * scale + shift)

    def _steps(self) -> _AncestralSteps | None:
        spaced = bool(self.custom_timesteps or self.num_inference_steps)
        sources = (self.config, self.variance_type, spaced, *_stamp(self.timesteps), *_stamp(self.alphas_cumprod))
        return self._kept("_ancestral_steps", sources, self._make_steps, spaced)

    def _make_steps(self, spaced: bool) -> _AncestralSteps:
        alphas_cumprod, timesteps = self.alphas_cumprod.cpu(), self.timesteps.cpu()
        count = len(alphas_cumprod)
        t = timesteps if spaced else torch.arange(count)
        before = torch.cat([t[1:], t.new_tensor([-1])]) if spaced else t - 1
        known = frozenset(t.tolist())
        if len(known) != len(t) or not 0 <= min(known) <= max(known) < count:
            raise _NotAffine(f"timesteps must be different numbers in [0, {count})")
        levels = torch.cat([alphas_cumprod, self.one.cpu()[None]])  # level -1 is the clean sample
        prediction, px, pm, *_ = self._maps(levels[t])
        columns, log_std = self._ancestral_columns(levels[t], levels[before])
        columns["an"] = columns["an"] * (t > 0)
        rows = _finite(pack_rows(len(t), None, px=px, pm=pm, **columns, **self._bounds()))
        full = torch.full((count, len(SAMPLER_COLUMNS)), math.nan, dtype=torch.float64)
        full[:, [_AN, _AH]] = 0.0  # these columns say whether the table draws noise and needs history
        full[t] = rows
        quiet = full.clone()
        quiet[:, _AN] = 0.0
        table, last = (_table("ddpm", prediction, r, self._threshold()) for r in (full, quiet))
        full_log_std = torch.full((count, 2), math.nan)
        full_log_std[t] = log_std
        return _AncestralSteps(table, last, timesteps.tolist(), known, full_log_std)

    def _ancestral_columns(self, now: Tensor, before: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """``ax, a0, an`` and the learned range, in float32 and in the order of diffusers' operations.

        That matters: ``1 - now / before`` loses four digits where beta is small, so that the exact value of the same
        formula is another number.
        """
        noise_now, noise_before, alpha = 1 - now, 1 - before, now / before
        beta = 1 - alpha
        variance = (noise_before / noise_now * beta).clamp(min=1e-20)
        deviations = {
            "fixed_small": variance**0.5,
            "fixed_small_log": torch.exp(0.5 * torch.log(variance)),
            "fixed_large": beta**0.5,
            **dict.fromkeys(_LEARNED, torch.ones_like(beta)),
        }
        kind = self.variance_type
        if kind not in deviations or kind != self.config.variance_type:
            raise _NotAffine(f"variance_type is {kind!r}, in the configuration {self.config.variance_type!r}")
        if not bool((beta > 0).all()):
            raise _NotAffine("beta is 0 in float32")
        low, high = torch.log(variance), torch.log(beta)
        columns = {
            "ax": alpha**0.5 * noise_before / noise_now,
            "a0": before**0.5 * beta / noise_now,
            "an": deviations[kind],
        }
        return columns, torch.stack([(high - low) / 4, (high + low) / 4], dim=1)


class FastDDIMScheduler(_VariancePreserving, DDIMScheduler):
    """diffusers' ``DDIMScheduler`` with a fused ``step`` and ``add_noise``; the same configuration and numbers."""

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """One implicit step; arguments and result as in diffusers."""
        table = self._steps(eta, use_clipped_model_output)
        row = None if table is None else _row(timestep, sample, len(table))
        if table is None or row is None or not self._takes(sample, model_output, eta, generator, variance_noise):
            return super().step(
                model_output, timestep, sample, eta, use_clipped_model_output, generator, variance_noise, return_dict
            )
        noise = variance_noise if eta > 0 else None
        if eta > 0 and noise is None:
            noise = randn_tensor(
                model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
            )
        x = _promoted(sample, model_output)
        new, x0 = sampler_step(x, model_output, table, row, noise=noise, return_x0=True)
        if table.prediction == "x0":
            x0 = x0.to(model_output.dtype)
        return DDIMSchedulerOutput(prev_sample=new, pred_original_sample=x0) if return_dict else (new, x0)

    def _takes(self, sample: Tensor, model_output: Tensor, eta: float, generator: Any, noise: Tensor | None) -> bool:
        if noise is not None and eta > 0 and (generator is not None or noise.dtype != model_output.dtype):
            self._refuse("variance_noise comes with a generator, or has not the dtype of model_output")
            return False
        return self._fits(sample, model_output) and (noise is None or self._fits(sample, noise))

    def _steps(self, eta: float, clipped: bool) -> SamplerTable | None:
        sources = (
            *(self.config, self.num_inference_steps, eta, clipped),
            *(*_stamp(self.alphas_cumprod), self.final_alpha_cumprod),
        )
        return self._kept("_implicit_steps", sources, self._make_steps, eta, clipped)

    def _make_steps(self, eta: float, clipped: bool) -> SamplerTable:
        if self.num_inference_steps is None or not isinstance(eta, (int, float)):
            raise _NotAffine("set_timesteps was not called, or eta is not a number")
        now = self.alphas_cumprod.cpu()
        before = torch.arange(len(now)) - self.config.num_train_timesteps // self.num_inference_steps
        before = torch.where(before >= 0, now[before], self.final_alpha_cumprod.cpu())
        prediction, px, pm, ex, em = self._maps(now)
        variance = (1 - before) / (1 - now) * (1 - now / before)  # in float32, in the order of diffusers' operations
        std = eta * variance**0.5
        direction = ((1 - before - std**2) ** 0.5).double()
        columns = {"ax": direction * ex, "am": direction * em, "a0": before.double() ** 0.5}
        if clipped:  # eps = (x - alpha x0) / sigma with the bounded x0
            ratio = direction / (1 - now).double() ** 0.5
            columns = {"ax": ratio, "a0": columns["a0"] - ratio * now.double() ** 0.5}
        an = std if eta > 0 else torch.zeros_like(std)
        rows = _finite(pack_rows(len(now), None, px=px, pm=pm, an=an, **columns, **self._bounds()))
        return _table("ddim", prediction, rows, self._threshold())


class FastEulerDiscreteScheduler(_Fused, EulerDiscreteScheduler):
    """diffusers' ``EulerDiscreteScheduler`` with a fused ``step``; the same configuration and numbers.

    Steps with ``s_churn`` run diffusers' own code: their x0 holds noise, which no row of a table can say.
    """

    sigmas: Tensor

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> EulerDiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        """One Euler step; arguments and result as in diffusers."""
        table = self._kept("_euler_steps", (self.config, *_stamp(self.sigmas)), self._make_steps)
        index = None
        if table is not None and self._takes(model_output, timestep, sample, s_churn):
            if self.step_index is None:
                self._init_step_index(timestep)
            index = self.step_index
        if index is None or not 0 <= index < len(table):
            return super().step(
                model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator, return_dict
            )
        new, x0 = sampler_step(sample.float(), model_output, table, index, return_x0=True)
        new = new.to(model_output.dtype)
        if table.prediction == "x0":
            x0 = model_output
        self._step_index = index + 1
        return EulerDiscreteSchedulerOutput(prev_sample=new, pred_original_sample=x0) if return_dict else (new, x0)

    def _takes(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, s_churn: float) -> bool:
        if s_churn != 0:
            self._refuse("s_churn is not 0")
        elif isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point()):
            self._refuse("timestep is an integer")
        elif not self.is_scale_input_called:
            self._refuse("scale_model_input was not called")
        else:
            return self._fits(sample, model_output)
        return False

    def _make_steps(self) -> SamplerTable:
        names = {"epsilon": "eps", "sample": "x0", "original_sample": "x0", "v_prediction": "v"}
        prediction = names.get(self.config.prediction_type)
        if prediction is None:
            raise _NotAffine(f"prediction_type is {self.config.prediction_type!r}")
        sigmas = self.sigmas.cpu().double()
        sigma = sigmas[:-1]
        px, pm, *_ = clean_and_noise_maps(prediction, torch.ones_like(sigma), sigma)
        ratio = sigmas[1:] / sigma
        return _table("euler", prediction, _finite(pack_rows(len(sigma), px=px, pm=pm, ax=ratio, a0=1 - ratio)))
