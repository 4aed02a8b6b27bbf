"""Cases of the latent op: samples with their KL, importance weights, vector quantisation, forward and backward."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.bench_sampler import NOISE_FLOPS, box_muller, uniforms_like
from bench.compare import Bars, Case, Contender, Setup, bars_at_two_threads, dtype_name, ours, size_name, variants
from dgm_kernels import NoiseKey, gaussian_sample_kl, importance_bound, importance_log_weights, vector_quantize
from tests.latent_cases import (
    CODE_SIZES,
    IMPORTANCE_DRAWS,
    IMPORTANCE_SHAPE,
    LATENT_SHAPE,
    SMALL_SHAPE,
    eager_tril,
    make_tril,
)

KEY = NoiseKey(1234)
NATIVES = ("cpp", "triton")
TRIL_SHAPE = (512, 64)


def trained(outputs: Sequence[Tensor], operands: Sequence[Tensor], seeds: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs and the gradients of the operands, for given gradients of the outputs."""
    return *outputs, *torch.autograd.grad(outputs, operands, seeds)


def plain_sample(mu: Tensor, log_var: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The reparametrised sample of a variational autoencoder and its KL as a user writes them."""
    std = torch.exp(0.5 * log_var)
    z = mu + std * (torch.randn_like(std) if noise is None else noise)
    return z, -0.5 * (1 + log_var - mu.pow(2) - log_var.exp()).sum(1)


def exact_noise(x: Tensor, key: NoiseKey = KEY) -> Tensor:
    """The noise of the key in float64."""
    return box_muller(uniforms_like(x, key).double())


def sample(
    setup: Setup, shape: tuple[int, int], dtype: torch.dtype = torch.float32, bars: Bars = bars_at_two_threads
) -> Case:
    """z, the KL, and the gradients of mu and log_var; the halves of a network's output.

    What must move: mu, log_var and z; backward the gradient of z, mu, log_var and their gradients.
    """

    def make_inputs() -> SimpleNamespace:
        mu, log_var = torch.randn(2, *shape, device=setup.device).to(dtype).unbind()
        seeds = torch.randn(shape, device=setup.device).to(dtype), torch.randn(shape[0], device=setup.device)
        operands = tuple(t.contiguous().requires_grad_() for t in (mu, log_var))
        return SimpleNamespace(operands=operands, seeds=seeds, noise=exact_noise(mu))

    def call(
        i: SimpleNamespace, function: Callable[..., tuple[Tensor, ...]], noise: Tensor | None
    ) -> tuple[Tensor, ...]:
        z, kl = function(*i.operands, noise)
        return trained((z, kl), i.operands, (i.seeds[0], i.seeds[1].to(kl.dtype)))

    def baseline(function: Callable[..., tuple[Tensor, ...]]) -> Contender:
        return Contender(lambda i: call(i, function, None), lambda i: rounded(call(i, function, i.noise.to(dtype))))

    def rounded(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return results[0], results[1].float(), *results[2:]

    def reference(i: SimpleNamespace) -> tuple[Tensor, ...]:
        wide = SimpleNamespace(operands=tuple(t.detach().double().requires_grad_() for t in i.operands))
        wide.seeds = tuple(t.double() for t in i.seeds)
        return call(wide, plain_sample, i.noise)

    fused = lambda i: trained(gaussian_sample_kl(*i.operands, KEY), i.operands, i.seeds)  # noqa: E731
    contenders, missing = ours(fused, setup, NATIVES)
    contenders |= {name: baseline(function) for name, function in variants(plain_sample, setup).items()}
    elements = math.prod(shape)
    return Case(
        f"gaussian_sample_kl forward+backward {size_name(shape)} {dtype_name(dtype)}",
        make_inputs,
        contenders,
        reference,
        bytes=8 * elements * dtype.itemsize,
        flops=elements * (2 * NOISE_FLOPS + 30),
        bars=bars(setup),
        missing=missing,
        grad=True,
    )


def plain_bound(
    mu: Tensor, log_var: Tensor, log_likelihood: Tensor, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The draws and the importance-weighted bound as a user writes them with torch.distributions."""
    draws = log_likelihood.shape[0]
    posterior = torch.distributions.Normal(mu, torch.exp(0.5 * log_var))
    prior = torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    z = posterior.rsample((draws,)) if noise is None else posterior.loc + posterior.scale * noise
    ratio = (prior.log_prob(z) - posterior.log_prob(z)).sum(-1)
    return z, torch.logsumexp(log_likelihood + ratio, 0) - math.log(draws)


def importance(setup: Setup, bars: Bars = bars_at_two_threads) -> Case:
    """Draws, their bound and its gradients, for given log-likelihoods and a decoder's gradient of z.

    What must move: z and its gradient; mu, log_var and their gradients are small beside them.
    """
    draws, shape = IMPORTANCE_DRAWS, IMPORTANCE_SHAPE

    def make_inputs() -> SimpleNamespace:
        mu, log_var = torch.randn(2, *shape, device=setup.device).unbind()
        log_likelihood = torch.randn(draws, shape[0], device=setup.device)
        seeds = torch.randn(draws, *shape, device=setup.device), torch.randn(shape[0], device=setup.device)
        noise = torch.stack([exact_noise(mu, KEY.at(j)) for j in range(draws)])
        operands = tuple(t.contiguous().requires_grad_() for t in (mu, log_var))
        return SimpleNamespace(operands=operands, log_likelihood=log_likelihood, seeds=seeds, noise=noise)

    def fused(i: SimpleNamespace) -> tuple[Tensor, ...]:
        z, ratio = importance_log_weights(*i.operands, KEY, samples=draws)
        return trained((z, importance_bound(i.log_likelihood + ratio)), i.operands, i.seeds)

    def reference(i: SimpleNamespace) -> tuple[Tensor, ...]:
        wide = tuple(t.detach().double().requires_grad_() for t in i.operands)
        outputs = plain_bound(*wide, i.log_likelihood.double(), i.noise)
        return trained(outputs, wide, [seed.double() for seed in i.seeds])

    def baseline(function: Callable[..., tuple[Tensor, Tensor]]) -> Contender:
        return Contender(
            lambda i: trained(function(*i.operands, i.log_likelihood), i.operands, i.seeds),
            lambda i: trained(function(*i.operands, i.log_likelihood, i.noise.float()), i.operands, i.seeds),
        )

    contenders, missing = ours(fused, setup, NATIVES)
    contenders |= {name: baseline(function) for name, function in variants(plain_bound, setup).items()}
    elements = draws * math.prod(shape)
    return Case(
        f"IWAE bound forward+backward k={draws} {size_name(shape)} fp32",
        make_inputs,
        contenders,
        reference,
        bytes=2 * elements * 4,
        flops=elements * (2 * NOISE_FLOPS + 15),
        bars=bars(setup),
        missing=missing,
        grad=True,
    )


def full_covariance(setup: Setup, bars: Bars = bars_at_two_threads) -> Case:
    """z, the KL, and the gradients of mu and of the triangular factor, of which one half is read and all is written."""
    shape = TRIL_SHAPE

    def make_inputs() -> SimpleNamespace:
        mu, factor = (t.nan_to_num(0.0).to(setup.device).requires_grad_() for t in make_tril(shape))
        seeds = torch.randn(shape, device=setup.device), torch.randn(shape[0], device=setup.device)
        return SimpleNamespace(operands=(mu, factor), seeds=seeds, noise=exact_noise(mu))

    def plain(mu: Tensor, factor: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return eager_tril(mu, factor, torch.randn_like(mu) if noise is None else noise)

    def fused(i: SimpleNamespace) -> tuple[Tensor, ...]:
        mu, factor = i.operands
        return trained(gaussian_sample_kl(mu, noise=KEY, scale_tril=factor), i.operands, i.seeds)

    def reference(i: SimpleNamespace) -> tuple[Tensor, ...]:
        wide = tuple(t.detach().double().requires_grad_() for t in i.operands)
        return trained(plain(*wide, i.noise), wide, [seed.double() for seed in i.seeds])

    def baseline(function: Callable[..., tuple[Tensor, Tensor]]) -> Contender:
        return Contender(
            lambda i: trained(function(*i.operands), i.operands, i.seeds),
            lambda i: trained(function(*i.operands, i.noise.float()), i.operands, i.seeds),
        )

    contenders, missing = ours(fused, setup, NATIVES)
    contenders |= {name: baseline(function) for name, function in variants(plain, setup).items()}
    return Case(
        f"gaussian_sample_kl full covariance forward+backward {size_name(shape)} fp32",
        make_inputs,
        contenders,
        reference,
        bytes=shape[0] * shape[1] ** 2 * 4 * 2,
        flops=shape[0] * shape[1] ** 2 * 4,
        bars=bars(setup),
        missing=missing,
        grad=True,
    )


def plain_quantize(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Vector quantisation as a user writes it: straight-through codes, counts, and both losses."""
    indices = torch.cdist(x.detach(), codebook.detach()).argmin(1)
    chosen = codebook[indices]
    counts = torch.zeros(len(codebook), device=x.device).index_add_(0, indices, torch.ones(len(x), device=x.device))
    losses = F.mse_loss(chosen, x.detach()), F.mse_loss(x, chosen.detach())
    return x + (chosen - x).detach(), counts, *losses


def quantize(setup: Setup, bars: Bars = bars_at_two_threads) -> Case:
    """Codes, counts, losses and gradients."""
    rows, features, codes = CODE_SIZES

    def make_inputs() -> SimpleNamespace:
        codebook = torch.randn(codes, features, device=setup.device)
        chosen = torch.randint(codes, (rows,), device=setup.device)
        x = codebook[chosen] + 0.25 * torch.randn(rows, features, device=setup.device)  # two are never equally near
        operands = x.requires_grad_(), codebook.requires_grad_()
        return SimpleNamespace(operands=operands, seeds=(torch.randn_like(x), *torch.ones(2, device=x.device)))

    def call(function: Callable[..., tuple[Tensor, ...]], i: SimpleNamespace) -> tuple[Tensor, ...]:
        quantized, counts, *losses = function(*i.operands)
        grads = torch.autograd.grad((quantized, *losses), i.operands, i.seeds)
        return quantized, counts.to(quantized.dtype), *losses, *grads

    def fused(x: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
        found = vector_quantize(x, codebook)
        return found.quantized, found.counts, found.codebook_loss, found.commitment_loss

    def reference(i: SimpleNamespace) -> tuple[Tensor, ...]:
        wide = tuple(t.detach().double().requires_grad_() for t in i.operands)
        seeds = tuple(seed.double() for seed in i.seeds)
        return call(plain_quantize, SimpleNamespace(operands=wide, seeds=seeds))

    contenders, missing = ours(partial(call, fused), setup, NATIVES)
    for name, function in variants(plain_quantize, setup).items():
        contenders[name] = Contender(partial(call, function))
    return Case(
        f"vector_quantize forward+backward {rows}x{features}, {codes} codes fp32",
        make_inputs,
        contenders,
        reference,
        bytes=(4 * rows * features + 2 * codes * features) * 4,
        flops=2 * rows * features * codes,
        bars=bars(setup),
        missing=missing,
        grad=True,
    )


CASES: dict[str, Callable[[Setup], Case]] = {
    "sample": partial(sample, shape=LATENT_SHAPE, bars=partial(bars_at_two_threads, eager=6, compile=10)),
    "sample-bf16": partial(sample, shape=LATENT_SHAPE, dtype=torch.bfloat16),
    "sample-small": partial(sample, shape=SMALL_SHAPE),
    "full-covariance": full_covariance,
    "importance": partial(importance, bars=partial(bars_at_two_threads, eager=8)),
    "quantize": quantize,
}


def test_latent(compare: Callable[[Callable[[Setup], Case]], None], build: Callable[[Setup], Case]) -> None:
    compare(build)
