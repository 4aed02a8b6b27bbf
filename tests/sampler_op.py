"""Calls of the sampler op with every option, for a native backend and for the reference in any precision."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dgm_kernels._core.noise import NO_NOISE, NoiseKey, OpArgs
from dgm_kernels.sampler import reference
from tests.contract import assert_parity

SHAPES = [(1, 1), (2, 3), (3, 59), (2, 113), (2, 1023), (2, 1025), (300, 2), (17, 64), (2, 3, 8, 8)]
STEPS = 6
# Options of a step, by name; every form is a test.
FORMS = [
    "",
    "given",
    "drawn",
    "drawn device_step",
    "drawn row_steps",
    "drawn device_key",
    "history guided",
    "drawn known",
    "given known float_mask",
    "known",
    "drawn threshold",
    "drawn mixed history",
    "drawn row_steps device_key history guided known threshold",
]


def key_args(batch: int, device: str, on_device: bool) -> OpArgs:
    """A key with all 64 bits of the seed and sample indices beyond 32 bits; as tensors if ``on_device``."""
    seed, sample = 0xFEDCBA9876543210, (5 << 32) + 0xFFFFFFFE
    if not on_device:
        return NoiseKey(seed, first_sample=sample, step=0xFFFFFFFE, stream=203).op_args()
    samples = sample + 3 * torch.arange(batch, device=device)
    steps = 0xFFFFFFFE + torch.arange(batch, device=device) % 5
    seed_tensor = torch.tensor([seed - (1 << 64)], device=device)
    return NoiseKey(seed_tensor, step=steps, samples=samples, stream=203).op_args()


def _noise(shape: tuple[int, ...], dtype: torch.dtype, device: str, options: set[str]) -> OpArgs:
    if "given" in options:
        return (torch.randn(shape, device=device).to(dtype), *NO_NOISE[1:])
    return key_args(shape[0], device, "device_key" in options) if "drawn" in options else NO_NOISE


def step_call(shape: tuple[int, ...], dtype: torch.dtype, form: str, device: str = "cpu") -> dict[str, Any]:
    """Arguments of ``reference.sampler_step``. Row 1 has no noise, row 2 neither noise nor noise on known pixels."""
    options = set(form.split())

    def like(*needed: str) -> Tensor | None:
        return torch.randn(shape, device=device).to(dtype) if needed and set(needed) <= options else None

    rows = torch.randn(STEPS, 12, device=device)
    rows[:, 2], rows[:, 3] = -1.0, 1.0
    rows[1:3, 8], rows[2, 10] = 0.0, 0.0
    step: int | Tensor = 3
    if "device_step" in options:
        step = torch.tensor(4, device=device)
    elif "row_steps" in options:
        step = torch.arange(shape[0], device=device) % STEPS
    mask = torch.rand(shape, device=device) if "float_mask" in options else torch.rand(shape, device=device) < 0.5
    model_output = torch.randn(shape, device=device).to(torch.bfloat16 if "mixed" in options else dtype)
    history = like("history")
    return {
        "x": torch.randn(shape, device=device).to(dtype),
        "model_output": model_output,
        "rows": rows,
        "step": step,
        "args": _noise(shape, dtype, device, options),
        "history": history.to(torch.float16) if history is not None and "mixed" in options else history,
        "unconditional": like("guided"),
        "guidance_scale": 2.5 if "guided" in options else 1.0,
        "known": like("known"),
        "mask": mask if "known" in options else None,
        "threshold": 0.5 + torch.rand(shape[0], device=device) if "threshold" in options else None,
    }


def training_call(shape: tuple[int, ...], dtype: torch.dtype, form: str, device: str = "cpu") -> dict[str, Any]:
    """Arguments of ``reference.denoising_loss``; without the model output those of ``reference.add_noise``."""
    return {
        "model_output": torch.randn(shape, device=device).to(torch.bfloat16 if "mixed" in form else dtype),
        "x0": torch.randn(shape, device=device).to(dtype),
        "rows": torch.randn(STEPS, 8, device=device),
        "t": torch.arange(shape[0], device=device) % STEPS,
        "args": _noise(shape, dtype, device, set(form.split())),
    }


def in_float64(call: dict[str, Any]) -> dict[str, Any]:
    """The same call with every floating-point tensor in float64."""
    return tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, call)


def step_inputs(call: dict[str, Any]) -> tuple[Any, ...]:
    """A call in the order of the schema, up to ``clips``."""
    step = call["step"]
    index = (step, 0) if isinstance(step, Tensor) else (None, step)
    optional = (call["history"], call["unconditional"], call["guidance_scale"], call["known"], call["mask"])
    return (call["x"], call["model_output"], call["rows"], *index, *call["args"], *optional, call["threshold"], True)


def native_step(backend: str, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return getattr(torch.ops.dgm.sampler_step, backend)(*step_inputs(call), True)


def native_add_noise(backend: str, call: dict[str, Any]) -> Tensor:
    return getattr(torch.ops.dgm.add_noise, backend)(call["x0"], call["rows"], call["t"], *call["args"])


def native_loss(backend: str, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    inputs = (call["model_output"], call["x0"], call["rows"], call["t"], *call["args"])
    return getattr(torch.ops.dgm.denoising_loss, backend)(*inputs, True)


def reference_add_noise(call: dict[str, Any]) -> Tensor:
    return reference.add_noise(call["x0"], call["rows"], call["t"], call["args"])


def native_noise(backend: str, like: Tensor, args: OpArgs, kind: int) -> Tensor:
    return getattr(torch.ops.dgm.noise_like, backend)(like, *args, kind)


def check_parity(actual: Any, eager: Any, reference64: Any, coarse: bool = False) -> None:
    """The parity rule; ``coarse`` instead allows one unit of the last place of bfloat16.

    Triton's interpreter cuts float32 off to bfloat16 where the device rounds.
    """
    if not coarse:
        return assert_parity(actual, eager, reference64)
    for a, r in zip(actual, reference64, strict=True) if isinstance(actual, tuple) else ((actual, reference64),):
        torch.testing.assert_close(a.double(), r, rtol=2**-7, atol=1e-6)


def check_step(backend: str, call: dict[str, Any], coarse: bool = False) -> None:
    expected = reference.sampler_step(**in_float64(call))
    check_parity(native_step(backend, call), reference.sampler_step(**call), expected, coarse)


def check_training(backend: str, call: dict[str, Any], coarse: bool = False) -> None:
    """The forward process, the loss and its residual."""
    exact = in_float64(call)
    check_parity(native_add_noise(backend, call), reference_add_noise(call), reference_add_noise(exact), coarse)
    check_parity(
        native_loss(backend, call), reference.denoising_loss(**call), reference.denoising_loss(**exact), coarse
    )
