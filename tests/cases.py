"""Shapes and calls that tests and bench share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from dgm_kernels import NoiseKey, SamplerTable, Schedule, TrainingTable, backends, tables

NATIVE = [name for name in ("cpp",) if backends()[name].startswith("available")]
BACKENDS = ["reference", *NATIVE]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Ragged first: no multiple of a vector, a tile or a block.
SHAPES = ((1, 1), (3, 59), (2, 3, 113), (5, 1023), (2, 3, 7, 9), (0, 4), (3, 0), (7,))
LARGE_SHAPE = (64, 3, 64, 64)
SMALL_SHAPE = (4, 3, 8, 8)

VP = Schedule.linear(100)
VE = Schedule.karras(50)
FLOW = Schedule.flow(50)


@dataclasses.dataclass(frozen=True)
class StepCase:
    """One call of ``sampler_step``: a table, a row, and which options are used."""

    name: str
    table: SamplerTable
    step: int
    noise: bool = False
    history: bool = False
    guidance: bool = False
    known: bool = False

    def __str__(self) -> str:
        return self.name

    def options(self, x: Tensor, noise: NoiseKey | Tensor | None = None) -> dict[str, object]:
        """Random operands for the options, in the dtype of ``x``."""
        random: Callable[[], Tensor] = lambda: torch.randn_like(x)  # noqa: E731
        options: dict[str, object] = {"noise": noise if noise is not None else random()} if self.noise else {}
        if self.history:
            options["history"] = random()
        if self.guidance:
            options["guidance"] = (random(), 3.5)
        if self.known:
            options |= {"known": random(), "mask": torch.rand(x.shape) > 0.5}
        return options


STEP_CASES = (
    StepCase("ddpm", tables.ddpm(VP), 60, noise=True),
    StepCase("ddpm clipped", tables.ddpm(VP, clip=1.0, variance="fixed_large"), 30, noise=True),
    StepCase("ddpm v guided", tables.ddpm(VP, prediction="v"), 30, noise=True, guidance=True),
    StepCase("ddpm last", tables.ddpm(VP), 99, noise=True),
    StepCase("ddim", tables.ddim(VP, 20), 5),
    StepCase("ddim x0 clipped", tables.ddim(VP, 20, prediction="x0", clip=(-0.5, 2.0)), 5),
    StepCase("ddim eta", tables.ddim(VP, 20, eta=0.7), 5, noise=True),
    StepCase("ddim thresholded", tables.ddim(VP, 20, dynamic_threshold=(0.9, 1.5)), 5),
    StepCase("ddim inpainting", tables.ddim(VP, 20), 5, noise=True, known=True),
    StepCase("ddpm everything", tables.ddpm(VP, clip=2.0), 50, noise=True, guidance=True, known=True),
    StepCase("euler", tables.euler(VP, 20), 3),
    StepCase("euler ancestral", tables.euler_ancestral(VE, 20), 3, noise=True),
    StepCase("heun second", tables.heun(VE, 20, prediction="x0"), 5, history=True),
    StepCase("dpmpp_2m", tables.dpmpp_2m(VP, 20), 4, history=True),
    StepCase("dpmpp_2m thresholded", tables.dpmpp_2m(VP, 20, dynamic_threshold=0.9), 4, history=True, guidance=True),
    StepCase("reverse sde", tables.reverse_sde(VP, prediction="score"), 50, noise=True),
    StepCase("probability flow", tables.probability_flow(VE, 20), 6),
    StepCase("annealed langevin", tables.annealed_langevin(VE, 2, step_size=1e-6), 7, noise=True),
    StepCase("predictor corrector", tables.predictor_corrector(VE, 20), 9, noise=True),
    StepCase("flow euler", tables.flow_euler(FLOW, 10), 4),
    StepCase("flow midpoint", tables.flow_midpoint(FLOW, 10), 5, history=True),
)

TRAINING_TABLES: tuple[TrainingTable, ...] = (
    tables.training(VP),
    tables.training(VP, prediction="x0"),
    tables.training(VP, prediction="v", weighting="min_snr"),
    tables.training(VP, prediction="score", weighting="sigma_squared"),
    tables.training(FLOW, prediction="velocity"),
)
