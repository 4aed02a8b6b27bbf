"""End to end on real data: trains a small denoiser on scikit-learn's digits, then times training steps and sampling."""

import copy
import functools
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import dgm_models
from bench.compare import Case, Contender, Setup, ours, variants
from dgm_kernels import NoiseKey, SamplerTable, add_noise, denoising_loss, noise_like, sample
from dgm_models.data import digits
from dgm_models.train import Settings, Trainer

TRAINING_STEPS = 500
PREDICTING_NOTHING = 1.0  # the loss of eps = 0


@functools.cache
def trained(device: torch.device) -> Any:
    """A small U-Net denoiser, trained once a session; a loss that did not fall is an error."""
    torch.manual_seed(0)
    model = dgm_models.create_model("ddpm", width=24, timesteps=200).to(device)
    trainer = Trainer(model, digits(), Settings(steps=TRAINING_STEPS, validate_every=TRAINING_STEPS))
    trainer.run()
    loss = trainer.validation_loss()
    print(f"\ndigits: validation loss {loss:.3f} after {TRAINING_STEPS} steps (1 is that of a blank prediction)")
    if loss > 0.5 * PREDICTING_NOTHING:
        raise RuntimeError(f"the denoiser did not learn: validation loss {loss:.3f}")
    return trainer.averaged_model.eval()


def plain_step(x: Tensor, eps: Tensor, row: tuple[float, ...], noise: Tensor | None) -> Tensor:
    """A step of DDPM or DDIM as a user writes it."""
    alpha, sigma, mean_x0, mean_x, mean_eps, deviation = row
    x0 = ((x - sigma * eps) / alpha).clamp(-1, 1)
    new = mean_x0 * x0 + mean_x * x + mean_eps * eps
    if deviation == 0:
        return new
    return new + deviation * (torch.randn_like(x) if noise is None else noise)


def plain_rows(table: SamplerTable) -> list[tuple[float, ...]]:
    """The textbook's numbers for every step: alpha, sigma, the weights of x0, x and eps, the noise."""
    rows = table.rows64.tolist()
    return [(1 / px, -pm / px, a0, ax, am, an) for px, pm, _, _, ax, a0, am, _, an, _, _, _ in rows]


def sampling(setup: Setup, sampler: str, steps: int, batch: int) -> Case:
    """Samples of digits with the trained denoiser; the network is the same in every contender."""
    model, key = trained(setup.device), NoiseKey(1)
    wide = copy.deepcopy(model).double()
    table = model.sampler_table(sampler, steps)
    shape = (batch, *model.sample_shape)

    def loop(step: Callable[..., Tensor], network: Any, x: Tensor, given: list[Tensor] | None = None) -> Tensor:
        with torch.no_grad():
            for index, row in enumerate(plain_rows(table)):
                time = torch.full((batch,), float(table.times[index]), device=x.device, dtype=x.dtype)
                x = step(x, network(x, time), row, None if given is None else given[index].to(x.dtype))
        return x

    def fused(inputs: SimpleNamespace) -> Tensor:
        with torch.no_grad():
            return sample(model.denoise, inputs.x, table, noise=key)

    def baseline(step: Callable[..., Tensor]) -> Contender:
        return Contender(lambda i: loop(step, model.denoise, i.x), lambda i: loop(step, model.denoise, i.x, i.noise))

    def make_inputs() -> SimpleNamespace:
        like = torch.empty(shape, device=setup.device)
        noise = [noise_like(like, key.at(index)) for index in range(len(table))]
        return SimpleNamespace(x=noise_like(like, NoiseKey(1, stream=1)), noise=noise)

    contenders, missing = ours(fused, setup)
    contenders |= {name: baseline(step) for name, step in variants(plain_step, setup).items()}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.denoise(torch.zeros(shape, device=setup.device), torch.zeros(batch, device=setup.device))
    return Case(
        f"digits {sampler} {len(table)} steps, batch {batch}",
        make_inputs,
        contenders,
        lambda i: loop(plain_step, wide.denoise, i.x.double(), i.noise),
        bytes=2 * state_bytes(shape),
        flops=counter.get_total_flops() * len(table),
        missing=missing,
    )


def state_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of one float32 state."""
    return torch.Size(shape).numel() * 4


def training(setup: Setup, batch: int) -> Case:
    """A training step's loss and gradient through the U-Net."""
    model, key = trained(setup.device), NoiseKey(2)
    wide = copy.deepcopy(model).double()
    table = model.training_table
    alpha, sigma = (table.rows64[:, i].to(setup.device) for i in (0, 1))

    def plain(network: Any, x: Tensor, t: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        noise = torch.randn_like(x) if given is None else given.to(x.dtype)
        a, s = (table[t].to(x.dtype).view(-1, 1, 1, 1) for table in (alpha, sigma))
        return with_gradient(F.mse_loss(network(a * x + s * noise, t.to(x.dtype)), noise), network)

    def fused(inputs: SimpleNamespace) -> tuple[Tensor, Tensor]:
        x, t = inputs.x, inputs.t
        output = model.denoiser(add_noise(x, table, t, key), t.float())
        return with_gradient(denoising_loss(output, x, table, t, key), model.denoiser)

    def make_inputs() -> SimpleNamespace:
        x = digits().train.x[:batch].to(setup.device)
        t = torch.arange(batch, device=setup.device) * len(table) // batch
        return SimpleNamespace(x=x, t=t, noise=noise_like(x, key))

    contenders, missing = ours(fused, setup)
    contenders["eager"] = Contender(
        lambda i: plain(model.denoiser, i.x, i.t), lambda i: plain(model.denoiser, i.x, i.t, i.noise)
    )
    missing["compile"] = "compiling the network would be what is measured"
    with FlopCounterMode(display=False) as counter:
        inputs = make_inputs()
        plain(model.denoiser, inputs.x, inputs.t)
    return Case(
        f"digits training step, batch {batch}",
        make_inputs,
        contenders,
        lambda i: plain(wide.denoiser, i.x.double(), i.t, i.noise),
        bytes=2 * state_bytes((batch, *model.sample_shape)),
        flops=counter.get_total_flops(),
        missing=missing,
        grad=True,
    )


def with_gradient(loss: Tensor, network: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """The loss and the gradient of the first layer, which everything else had to be worked out for."""
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    return loss, gradients[0]


CASES: dict[str, Callable[[Setup], Case]] = {
    "ddpm": partial(sampling, sampler="ddpm", steps=50, batch=64),
    "ddim": partial(sampling, sampler="ddim", steps=25, batch=64),
    "ddim-1": partial(sampling, sampler="ddim", steps=25, batch=1),
    "train": partial(training, batch=128),
}


def test_ddpm(compare: Callable[[Callable[[Setup], Case]], None], build: Callable[[Setup], Case]) -> None:
    compare(build)
