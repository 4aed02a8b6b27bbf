"""Pairs of a scheduler of diffusers and its drop-in, run side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler

from dgm_kernels.integrations import diffusers as fast

PAIRS = {
    "ddpm": (DDPMScheduler, fast.FastDDPMScheduler),
    "ddim": (DDIMScheduler, fast.FastDDIMScheduler),
    "euler": (EulerDiscreteScheduler, fast.FastEulerDiscreteScheduler),
}
SHAPE = (2, 3, 8, 8)


def spy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the fused ops that the schedulers call from now on."""
    made: list[str] = []
    for name in ("sampler_step", "add_noise"):
        op = getattr(fast, name)
        monkeypatch.setattr(fast, name, lambda *a, _op=op, _name=name, **k: (made.append(_name), _op(*a, **k))[1])
    return made


def assert_same(ours: Tensor, theirs: Tensor, noise_floor: float = 0.0) -> None:
    """Equal to 1e-5 (of the largest number, if that is above 1), in the same dtype."""
    size = float(theirs.detach().abs().nan_to_num(0.0).max())
    atol = max(1e-5 * max(size, 1.0), noise_floor)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=atol, equal_nan=True)


def x0_noise_floor(scheduler: Any, t: Tensor, x: Tensor) -> float:
    """Rounding errors of x0 = (x - sigma eps) / alpha in float32, four units: alpha is 0.006 where the default ends.

    The errors of diffusers and ours are alike; a bound on x0 hides how large the numbers are that cancelled.
    """
    if isinstance(scheduler, EulerDiscreteScheduler) or scheduler.config.prediction_type != "epsilon":
        return 0.0
    return 4 * torch.finfo(torch.float32).eps * float(x.abs().max() / scheduler.alphas_cumprod[t] ** 0.5)


def pair(name: str, steps: dict[str, Any] | int = 7, **config: Any) -> tuple[Any, Any]:
    """diffusers' scheduler and ours, with their timesteps set."""
    schedulers = tuple(kind(**config) for kind in PAIRS[name])
    for scheduler in schedulers:
        scheduler.set_timesteps(**(steps if isinstance(steps, dict) else {"num_inference_steps": steps}))
    assert torch.equal(schedulers[0].timesteps, schedulers[1].timesteps)
    return schedulers


def check_against_diffusers(
    theirs: Any, ours: Any, channels: int = 1, seed: Callable[[], Any] | None = None, **options: Any
) -> None:
    """Both over the trajectory of diffusers' scheduler, each with noise of its own but equally seeded generator."""
    seed = seed or (lambda: torch.Generator().manual_seed(3))
    generators = seed(), seed()
    x = torch.randn(SHAPE) * theirs.init_noise_sigma
    for t in theirs.timesteps:
        scaled = [s.scale_model_input(x, t) for s in (theirs, ours)]
        assert torch.equal(*scaled)
        m = torch.randn(SHAPE[0], channels * SHAPE[1], *SHAPE[2:])
        (new, x0), (our_new, our_x0) = (
            s.step(m, t, x, generator=g, return_dict=False, **options)
            for s, g in zip((theirs, ours), generators, strict=True)
        )
        assert_same(our_new, new)
        assert_same(our_x0, x0, x0_noise_floor(theirs, t, x))
        x = new.nan_to_num(0.0)
    for a, b in zip(*(g if isinstance(g, list) else [g] for g in generators), strict=True):
        assert a is None or torch.equal(a.get_state(), b.get_state()), "the generators are not in the same state"
