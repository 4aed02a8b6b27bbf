"""Cases of the sampler op: steps of DDPM and DDIM, the training step, and the noise itself."""

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.compare import (
    Bars,
    Case,
    Contender,
    Setup,
    bars_at_two_threads,
    dtype_name,
    ours,
    size_name,
    variants,
)
from dgm_kernels import NoiseKey, Schedule, add_noise, denoising_loss, noise_like, sampler_step, tables, use_backend
from tests.cases import LARGE_SHAPE, SMALL_SHAPE

SCHEDULE = Schedule.linear(1000)
KEY = NoiseKey(1234)
NOISE_FLOPS = 6  # an element: 12 for a pair of Box-Muller, counting each function as one


class Ancestral(NamedTuple):
    """Coefficients of q(x' | x, x0), with which DDPM steps from time t to time t - 1."""

    alpha: float
    sigma: float
    x0: float
    x: float
    deviation: float

    @classmethod
    def at(cls, t: int) -> "Ancestral":
        """Ho et al., "Denoising Diffusion Probabilistic Models", equation 7, from the schedule's betas."""
        bar, previous = SCHEDULE.alphas_cumprod[t].item(), SCHEDULE.alphas_cumprod[t - 1].item()
        beta = 1 - bar / previous
        mean_x0, mean_x = previous**0.5 * beta / (1 - bar), (1 - beta) ** 0.5 * (1 - previous) / (1 - bar)
        return cls(bar**0.5, (1 - bar) ** 0.5, mean_x0, mean_x, (beta * (1 - previous) / (1 - bar)) ** 0.5)

    def step(self, x: Tensor, eps: Tensor, noise: Tensor | None = None) -> Tensor:
        """The step as a user writes it."""
        x0 = ((x - self.sigma * eps) / self.alpha).clamp(-1, 1)
        mean = self.x0 * x0 + self.x * x
        return mean + self.deviation * (torch.randn_like(x) if noise is None else noise)


def box_muller(uniforms: Tensor) -> Tensor:
    """The noise of docs/design.md from its uniforms, in their precision; samples of a multiple of four elements."""
    u0, u1, u2, u3 = uniforms.reshape(-1, 4).unbind(1)
    r0, r1 = ((-2 * u.log()).sqrt() for u in (u0, u2))
    a0, a1 = (2 * torch.pi * u for u in (u1, u3))
    return torch.stack([r0 * a0.cos(), r0 * a0.sin(), r1 * a1.cos(), r1 * a1.sin()], dim=1).reshape(uniforms.shape)


def uniforms_like(x: Tensor, key: NoiseKey) -> Tensor:
    """The float32 uniforms behind `noise_like(x, key)`."""
    with use_backend("reference"):
        return noise_like(x.float(), key, distribution="uniform")


def diffusers_scheduler(name: str, **settings: Any) -> tuple[Any, dict[str, str]]:
    """A scheduler of diffusers, or None and why it is missing."""
    try:
        diffusers = importlib.import_module("diffusers")
    except ImportError as error:
        return None, {"diffusers": f"not installed ({error})"}
    return getattr(diffusers, name)(**settings), {}


def ddpm(
    setup: Setup, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, bars: Bars = bars_at_two_threads
) -> Case:
    """An ancestral step with clipping and fresh noise."""
    row = 500
    t = len(SCHEDULE) - 1 - row  # a table begins at the noisiest time
    table, ancestral = tables.ddpm(SCHEDULE, prediction="eps", clip=1.0), Ancestral.at(t)

    def make_inputs() -> SimpleNamespace:
        x, eps = (torch.randn(shape, device=setup.device).to(dtype) for _ in range(2))
        return SimpleNamespace(x=x, eps=eps, noise=box_muller(uniforms_like(x, KEY.at(row)).double()))

    def baseline(step: Callable[..., Tensor]) -> Contender:
        return Contender(lambda i: step(i.x, i.eps), lambda i: step(i.x, i.eps, i.noise.to(dtype)))

    contenders, missing = ours(lambda i: sampler_step(i.x, i.eps, table, row, noise=KEY), setup)
    contenders |= {name: baseline(step) for name, step in variants(ancestral.step, setup).items()}
    contenders |= _noise_outside(ancestral.step, setup, dtype)
    if dtype == torch.float32:
        scheduler, reason = diffusers_scheduler("DDPMScheduler", num_train_timesteps=len(SCHEDULE))
        missing |= reason
        if scheduler is not None:
            contenders["diffusers"] = _diffusers_ancestral(scheduler, t)
    elements = torch.Size(shape).numel()
    return Case(
        f"ddpm_step {size_name(shape)} {dtype_name(dtype)}",
        make_inputs,
        contenders,
        lambda i: ancestral.step(i.x.double(), i.eps.double(), i.noise),
        bytes=3 * elements * dtype.itemsize,
        flops=elements * (10 + NOISE_FLOPS),
        bars=bars(setup),
        missing=missing,
    )


def _noise_outside(step: Callable[..., Tensor], setup: Setup, dtype: torch.dtype) -> dict[str, Contender]:
    """The compiled step with eager noise as an argument: on a CPU what torch.compile draws itself is slower."""
    compiled = {name: f for name, f in variants(step, setup).items() if name != "eager"}

    def contender(step: Callable[..., Tensor]) -> Contender:
        return Contender(
            lambda i: step(i.x, i.eps, torch.randn_like(i.x)), lambda i: step(i.x, i.eps, i.noise.to(dtype))
        )

    return {f"{name} noise outside": contender(f) for name, f in compiled.items()}


def _diffusers_ancestral(scheduler: Any, t: int) -> Contender:
    def step(inputs: SimpleNamespace) -> Tensor:
        return scheduler.step(inputs.eps, t, inputs.x, return_dict=False)[0]

    def check(inputs: SimpleNamespace) -> Tensor:
        with mock.patch(f"{type(scheduler).__module__}.randn_tensor", return_value=inputs.noise.float()):
            return step(inputs)

    return Contender(step, check, tolerance=1e-4)


def ddim(setup: Setup, shape: tuple[int, ...], guided: bool = False, bars: Bars = bars_at_two_threads) -> Case:
    """A deterministic step with clipping, with or without classifier-free guidance."""
    steps, row, scale = 50, 25, 3.0
    stride = len(SCHEDULE) // steps
    t = (steps - 1 - row) * stride
    table = tables.ddim(SCHEDULE, steps, eta=0.0, clip=1.0)
    bar, previous = SCHEDULE.alphas_cumprod[t].item(), SCHEDULE.alphas_cumprod[t - stride].item()

    def plain(x: Tensor, eps: Tensor, uncond: Tensor) -> Tensor:
        if guided:
            eps = uncond + scale * (eps - uncond)
        x0 = ((x - (1 - bar) ** 0.5 * eps) / bar**0.5).clamp(-1, 1)
        return previous**0.5 * x0 + (1 - previous) ** 0.5 * eps

    def make_inputs() -> SimpleNamespace:
        x, eps, uncond = (torch.randn(shape, device=setup.device) for _ in range(3))
        return SimpleNamespace(x=x, eps=eps, uncond=uncond, guidance=(uncond, scale) if guided else None)

    def baseline(step: Callable[..., Tensor]) -> Contender:
        return Contender(lambda i: step(i.x, i.eps, i.uncond))

    contenders, missing = ours(lambda i: sampler_step(i.x, i.eps, table, row, guidance=i.guidance), setup)
    contenders |= {name: baseline(step) for name, step in variants(plain, setup).items()}
    if not guided:
        scheduler, reason = diffusers_scheduler("DDIMScheduler", num_train_timesteps=len(SCHEDULE))
        missing |= reason
        if scheduler is not None:
            scheduler.set_timesteps(steps)
            contenders["diffusers"] = Contender(
                lambda i: scheduler.step(i.eps, t, i.x, return_dict=False)[0], tolerance=1e-4
            )
    elements = torch.Size(shape).numel()
    return Case(
        f"ddim_step{' guided' * guided} {size_name(shape)} fp32",
        make_inputs,
        contenders,
        lambda i: plain(i.x.double(), i.eps.double(), i.uncond.double()),
        bytes=(3 + guided) * elements * 4,
        flops=elements * (5 + 3 * guided),
        bars=bars(setup),
        missing=missing,
    )


def plain_training(
    x0: Tensor,
    eps: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    weight: Tensor | None,
    t: Tensor,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The noisy sample and the loss as a user writes them, with weights as diffusers' training scripts apply them.

    `alpha`, `sigma` and `weight` hold every time.
    """
    noise = torch.randn_like(x0) if noise is None else noise
    x_t = alpha[t].view(-1, 1, 1, 1) * x0 + sigma[t].view(-1, 1, 1, 1) * noise
    if weight is None:
        return x_t, F.mse_loss(eps, noise)
    loss = F.mse_loss(eps, noise, reduction="none")
    return x_t, (loss.mean(dim=(1, 2, 3)) * weight[t]).mean()


def with_gradient(x_t: Tensor, loss: Tensor, eps: Tensor) -> tuple[Tensor, ...]:
    """What a training step needs: the noisy sample, the loss and the gradient of the model's output."""
    return x_t, loss, *torch.autograd.grad(loss, eps)


def train_step(
    setup: Setup, shape: tuple[int, ...], weighting: str | None = None, bars: Bars = bars_at_two_threads
) -> Case:
    """`add_noise`, then the (weighted) loss of a model that predicts the noise, forward and backward.

    What must move: x0, the noisy sample, the model output and its gradient.
    """
    table = tables.training(SCHEDULE, prediction="eps", weighting=weighting)
    columns = table.rows64.to(setup.device)
    exact = columns[:, 0], columns[:, 1], None if weighting is None else columns[:, 4]
    rounded = tuple(None if column is None else column.float() for column in exact)

    def make_inputs() -> SimpleNamespace:
        x0, eps = (torch.randn(shape, device=setup.device) for _ in range(2))
        t = torch.randint(len(SCHEDULE), (shape[0],), device=setup.device)
        return SimpleNamespace(x0=x0, eps=eps.requires_grad_(), t=t, noise=box_muller(uniforms_like(x0, KEY).double()))

    def fused(i: SimpleNamespace) -> tuple[Tensor, ...]:
        return with_gradient(add_noise(i.x0, table, i.t, KEY), denoising_loss(i.eps, i.x0, table, i.t, KEY), i.eps)

    @torch.enable_grad()
    def reference(i: SimpleNamespace) -> tuple[Tensor, ...]:
        eps = i.eps.detach().double().requires_grad_()
        return with_gradient(*plain_training(i.x0.double(), eps, *exact, i.t, i.noise), eps)

    def baseline(step: Callable[..., tuple[Tensor, Tensor]]) -> Contender:
        return Contender(
            lambda i: with_gradient(*step(i.x0, i.eps, *rounded, i.t), i.eps),
            lambda i: with_gradient(*step(i.x0, i.eps, *rounded, i.t, i.noise.float()), i.eps),
        )

    contenders, missing = ours(fused, setup)
    contenders |= {name: baseline(step) for name, step in variants(plain_training, setup).items()}
    for name, step in variants(plain_training, setup).items():
        if name != "eager":
            contenders[f"{name} noise outside"] = Contender(
                lambda i, step=step: with_gradient(*step(i.x0, i.eps, *rounded, i.t, torch.randn_like(i.x0)), i.eps),
                baseline(step).check,
            )
    elements = torch.Size(shape).numel()
    return Case(
        f"train_step{' weighted' * (weighting is not None)} {size_name(shape)} fp32",
        make_inputs,
        contenders,
        reference,
        bytes=4 * elements * 4,
        flops=elements * (7 + NOISE_FLOPS),
        bars=bars(setup),
        missing=missing,
        grad=True,
    )


def noise(setup: Setup, shape: tuple[int, ...]) -> Case:
    """The noise alone, against `torch.randn_like`, whose yardstick of error is Box-Muller in float32."""

    def make_inputs() -> SimpleNamespace:
        x = torch.empty(shape, device=setup.device)
        return SimpleNamespace(x=x, uniforms=uniforms_like(x, KEY))

    contenders, missing = ours(lambda i: noise_like(i.x, KEY), setup)
    missing["compile"] = "randn_like takes no given numbers, so there is nothing to check"
    contenders["eager"] = Contender(lambda i: torch.randn_like(i.x), lambda i: box_muller(i.uniforms))
    elements = torch.Size(shape).numel()
    return Case(
        f"noise_like {size_name(shape)} fp32",
        make_inputs,
        contenders,
        lambda i: box_muller(i.uniforms.double()),
        bytes=elements * 4,
        flops=elements * NOISE_FLOPS,
        missing=missing,
    )


def _latency_bar(setup: Setup) -> Mapping[str, float]:
    return {"us": 12} if setup.device.type == "cpu" else {}


CASES: dict[str, Callable[[Setup], Case]] = {
    "ddpm": partial(ddpm, shape=LARGE_SHAPE, bars=partial(bars_at_two_threads, eager=12, compile=8)),
    "ddpm-bf16": partial(ddpm, shape=LARGE_SHAPE, dtype=torch.bfloat16),
    "ddpm-small": partial(ddpm, shape=SMALL_SHAPE, bars=_latency_bar),
    "ddim": partial(ddim, shape=LARGE_SHAPE, bars=partial(bars_at_two_threads, eager=12, compile=1.1, floor=1.5)),
    "ddim-guided": partial(ddim, shape=LARGE_SHAPE, guided=True),
    "ddim-small": partial(ddim, shape=SMALL_SHAPE, bars=_latency_bar),
    "train": partial(train_step, shape=LARGE_SHAPE),
    "train-weighted": partial(
        train_step, shape=LARGE_SHAPE, weighting="min_snr", bars=partial(bars_at_two_threads, eager=8)
    ),
    "noise": partial(noise, shape=LARGE_SHAPE),
}


def test_sampler(compare: Callable[[Callable[[Setup], Case]], None], build: Callable[[Setup], Case]) -> None:
    compare(build)
