"""A small, ragged call of every kernel, forward and backward: what compute-sanitizer watches.

`python -m bench.run_once --small` runs them. Sizes are no multiples of a tile or a vector, so that a read or write
beyond an end would show.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import dgm_kernels as dgm

Call = Callable[[torch.device], Any]


def _operands(device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, device=device).requires_grad_() for shape in shapes]


def _trained(outputs: Any, operands: list[Tensor]) -> None:
    """Takes the gradients of all outputs."""
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    total = torch.stack([o.float().square().sum() for o in outputs if o.requires_grad]).sum()
    torch.autograd.grad(total, operands, allow_unused=True)


def _sampler(device: torch.device) -> None:
    schedule, key = dgm.Schedule.linear(100), dgm.NoiseKey(seed=1)
    x, m = _operands(device, (3, 3, 7, 9), (3, 3, 7, 9))
    for table in (
        dgm.tables.ddpm(schedule, clip=1.0),
        dgm.tables.ddim(schedule, 10),
        dgm.tables.dpmpp_2m(schedule, 10),
    ):
        history = torch.randn_like(x) if table.needs_history[3] else None
        _trained(dgm.sampler_step(x, m, table, 3, noise=key, history=history), [x, m])
    train, t = dgm.tables.training(schedule), torch.arange(3, device=device)
    _trained(dgm.denoising_loss(m, dgm.add_noise(x, train, t, key), train, t, key), [x, m])
    dgm.noise_like(x, key, distribution="uniform")


def _coupling(device: torch.device) -> None:
    x, shift, log_scale = _operands(device, (5, 59), (5, 59), (5, 59))
    for inverse in (False, True):
        _trained(dgm.affine_coupling(x, shift, log_scale, scale_map="tanh", inverse=inverse), [x, shift, log_scale])
        spline = _operands(device, (5, 59), (5, 59, 8), (5, 59, 8), (5, 59, 7))
        _trained(dgm.rational_quadratic_spline(*spline, inverse=inverse), spline)
    _trained(dgm.additive_coupling(x, shift, mask="checkerboard"), [x, shift])
    _trained([dgm.standard_normal_log_prob(x), dgm.logistic_log_prob(x)], [x])


def _masked_conv(device: torch.device) -> None:
    x, weight, gated, bias = _operands(device, (2, 6, 7, 9), (12, 6, 3, 3), (12, 6, 3, 3), (12,))
    _trained(dgm.masked_conv2d(x, weight, bias, mask_type="B"), [x, weight, bias])
    _trained(dgm.vertical_conv2d(x, gated, bias, gated=True), [x, gated, bias])
    row, taps = _operands(device, (2, 6, 59), (12, 6, 2))
    _trained(dgm.causal_conv1d(row, taps, bias, dilation=4), [row, taps, bias])
    _trained(dgm.gated_activation(x), [x])
    image, parameters = torch.rand(2, 3, 5, 7, device=device) * 2 - 1, torch.randn(2, 50, 5, 7, device=device)
    parameters.requires_grad_()
    _trained(dgm.discretized_logistic_mixture(image, parameters), [parameters])
    logits = torch.randn(2, 5, 7, 9, device=device, requires_grad=True)
    _trained(dgm.categorical_log_prob(torch.randint(5, (2, 7, 9), device=device), logits), [logits])


def _attention(device: torch.device) -> None:
    q, k, v = operands = _operands(device, (2, 4, 59, 40), (2, 2, 59, 40), (2, 2, 59, 40))
    for mask in (None, dgm.masks.causal(), dgm.masks.sliding_window(7)):
        _trained(dgm.attention(q, k, v, mask=mask, enable_gqa=True), operands)
    rope, near = dgm.positions.rotary_2d(7, 9, 40).to(device), dgm.masks.raster_2d(7, 9, 2)
    q, k, v = operands = _operands(device, *3 * [(2, 4, 63, 40)])
    _trained(dgm.attention(q, k, v, mask=near, rope=rope), operands)
    cache = dgm.KVCache(batch=2, heads=4, capacity=5, head_dim=40, device=device)
    with torch.no_grad():
        cache.append(k[:, :, :3], v[:, :, :3])
        dgm.attention_decode(q[:, :, :1], cache)


def _latent(device: torch.device) -> None:
    mu, log_var, tril = _operands(device, (5, 59), (5, 59), (5, 59, 59))
    with torch.no_grad():
        tril.diagonal(dim1=1, dim2=2).abs_().add_(0.5)
    key = dgm.NoiseKey(seed=1)
    _trained(dgm.gaussian_sample_kl(mu, log_var, key), [mu, log_var])
    _trained(dgm.gaussian_sample_kl(mu, noise=key, scale_tril=tril), [mu, tril])
    _trained(dgm.lognormal_sample_kl(mu, log_var, key, free_bits=0.1), [mu, log_var])
    _trained(dgm.gaussian_kl(mu, log_var), [mu, log_var])
    _trained(dgm.importance_log_weights(mu, log_var, key, samples=3), [mu, log_var])
    x, codes = _operands(device, (113, 13), (31, 13))
    found = dgm.vector_quantize(x, codes)
    _trained([found.quantized, found.codebook_loss, found.commitment_loss], [x, codes])


def _density(device: torch.device) -> None:
    x, means, data = _operands(device, (113, 13), (31, 13), (300, 13))
    for shape in ((31,), (31, 13)):
        scale = (torch.rand(shape, device=device) + 0.5).requires_grad_()
        _trained(dgm.mixture_log_prob(x, means, scale=scale), [x, means, scale])
        dgm.mixture_em_statistics(x, means, scale=scale)
    _trained(dgm.kde_log_prob(x, data, 0.7), [x, data])
    for sigma in (0.01, 0.5):
        _trained(dgm.empirical_denoiser(x, data.detach(), 0.8, sigma), [x])
    _trained(dgm.mmd(x, data, bandwidth=[0.5, 2.0]), [x, data])
    _trained(dgm.mmd(x, data, kernel="polynomial"), [x, data])


def _norm(device: torch.device) -> None:
    x, weight, bias = _operands(device, (3, 7, 59), (59,), (59,))
    _trained(dgm.layer_norm(x, (59,), weight, bias), [x, weight, bias])
    _trained(dgm.rms_norm(x, (59,), weight), [x, weight])
    scale, shift, gate, residual = _operands(device, (3, 59), (3, 59), (3, 59), (3, 7, 59))
    operands = [x, scale, shift, gate, residual]
    _trained(dgm.modulated_layer_norm(x, scale, shift, gate=gate, residual=residual), operands)
    image, weight, bias = _operands(device, (3, 12, 7, 9), (12,), (12,))
    _trained(dgm.group_norm_silu(image, 4, weight, bias), [image, weight, bias])


CALLS: dict[str, Call] = {
    "attention": _attention,
    "coupling": _coupling,
    "density": _density,
    "latent": _latent,
    "masked_conv": _masked_conv,
    "norm": _norm,
    "sampler": _sampler,
}


def small_calls(only: str | None = None) -> Iterator[tuple[str, Call]]:
    """The calls of every op, or of one."""
    return ((op, call) for op, call in CALLS.items() if only in (None, op))
