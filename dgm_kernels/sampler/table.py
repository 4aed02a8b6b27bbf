"""Coefficient tables: one row a step for the fused sampler kernel, one row a training time for the forward process."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

# Columns of a sampler row: x0 = clip(px x + pm m, lo, hi); x' = ax x + a0 x0 + am m + ah history + an noise;
# known pixels become ak known + sk noise.
SAMPLER_COLUMNS = ("px", "pm", "lo", "hi", "ax", "a0", "am", "ah", "an", "ak", "sk", "pad")
# Columns of a training row: x_t = alpha x0 + sigma noise; target = cx x0 + cn noise; loss weight.
TRAINING_COLUMNS = ("alpha", "sigma", "cx", "cn", "weight", "pad0", "pad1", "pad2")

PREDICTIONS = ("eps", "x0", "v", "score", "velocity")


@dataclasses.dataclass(frozen=True, eq=False)
class _Table:
    name: str
    prediction: str
    rows64: Tensor
    times: Tensor
    _on_device: dict[torch.device, Tensor] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        with torch.inference_mode(False):  # a table made for sampling must serve training too
            object.__setattr__(self, "rows64", self.rows64.clone())
            self._on_device[torch.device("cpu")] = self.rows64.to(torch.float32)

    def __getstate__(self) -> dict[str, object]:
        """Without the copies on devices: a pickle may be loaded where there are none."""
        return {**self.__dict__, "_on_device": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        object.__setattr__(self, "_on_device", {})
        object.__setattr__(self, "rows64", self.rows64.cpu())
        self._on_device[torch.device("cpu")] = self.rows64.to(torch.float32)

    def __len__(self) -> int:
        return self.rows64.shape[0]

    @property
    def rows(self) -> Tensor:
        """The rows in float32 on the CPU."""
        return self._on_device[torch.device("cpu")]

    def rows_on(self, device: torch.device) -> Tensor:
        """The rows in float32 on a device; copied there once.

        Call it before a CUDA graph is captured or a step is compiled, so that the copy is not part of the graph.
        """
        rows = self._on_device.get(device)
        if rows is None:
            if torch.compiler.is_compiling():
                return self.rows.to(device)
            with torch.inference_mode(False):
                self._on_device[device] = rows = self.rows.to(device)
        return rows


@dataclasses.dataclass(frozen=True, eq=False)
class SamplerTable(_Table):
    """The steps of one sampler, ready for :func:`sampler_step`. Built by the functions of ``dgm_kernels.tables``.

    Attributes:
        name: the sampler.
        prediction: what the model predicts: ``eps``, ``x0``, ``v``, ``score`` or ``velocity``.
        rows64: ``[steps, 12]`` float64 coefficients on the host.
        times: ``[steps]`` what to tell the model before each step.
        input_scale: ``[steps]`` factor on the state before the model sees it (1 unless the state is kept unscaled).
        initial_sigma: standard deviation of the noise a trajectory starts from.
        history: what ``history`` has to hold: ``"x"`` (the state the step before started from), ``"x0"`` (the clean
            sample the step before predicted) or None.
        dynamic_threshold: ``(quantile, largest)`` or None (Saharia et al., "Imagen", 2022).
    """

    input_scale: Tensor
    initial_sigma: float
    history: str | None = None
    dynamic_threshold: tuple[float, float] | None = None
    stochastic: bool = dataclasses.field(init=False)
    clips: bool = dataclasses.field(init=False)
    needs_history: tuple[bool, ...] = dataclasses.field(init=False, repr=False)
    input_scales: tuple[float, ...] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        column = {name: self.rows64[:, i] for i, name in enumerate(SAMPLER_COLUMNS)}
        object.__setattr__(self, "stochastic", bool((column["an"] != 0).any()))
        object.__setattr__(self, "clips", bool((column["lo"].isfinite() | column["hi"].isfinite()).any()))
        object.__setattr__(self, "needs_history", tuple((column["ah"] != 0).tolist()))
        object.__setattr__(self, "input_scales", tuple(self.input_scale.tolist()))


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingTable(_Table):
    """The forward process and the target at every training time, for :func:`add_noise` and :func:`denoising_loss`.

    Attributes:
        name: ``"training"``.
        prediction: the target: ``eps``, ``x0``, ``v``, ``score`` or ``velocity``.
        rows64: ``[T, 8]`` float64 coefficients on the host.
        times: ``[T]`` what to tell the model at each index.
    """
