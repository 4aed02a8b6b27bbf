"""Launchers of the latent op's Triton kernels, and the forms of them to compile ahead of time."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from .._core import layout
from .._core.triton import TILE, Grid, Spec, cut, launch, spec
from .._core.triton_noise import Key, key_of
from .triton_quantize import code_gradient_kernel, gather_kernel, nearest_kernel, row_gradient_kernel
from .triton_sample import (
    importance_backward_kernel,
    importance_kernel,
    kl_backward_kernel,
    kl_kernel,
    sample_backward_kernel,
    sample_kernel,
)
from .triton_tril import tril_backward_kernel, tril_kernel

_DRAWS_TILE = 128  # elements of a program that goes over all draws: smaller, so that there are more of them
_NEAREST = (64, 32, 16)  # rows of a program, codes and features of a step
_CODES = (32, 64, 32)  # rows of a step, codes and features of a program
_PRODUCT_WARPS = 8  # of the two kernels with products: their tiles would not fit the registers of four
_SPLITS = 16  # parts of the rows that a code's gradient is added up in
_TRIL = (16, 64)  # rows of a program, columns of a step


@functools.lru_cache(maxsize=1024)
def _grid(batch: int, elements: int, size: int = TILE) -> Grid:
    columns = 4 if elements <= 4 else 64 if elements <= 64 else size  # short samples share a program
    return cut(batch, elements, columns, size)


def _elements(mu: Tensor) -> int:
    return math.prod(mu.shape[1:])


def _stride(x: Tensor | None) -> int:
    """Elements from one sample to the next."""
    return x.stride(0) if x is not None and x.shape[0] > 1 else 0


def _check_rows(mu: Tensor, **tensors: Tensor | None) -> None:
    """Every tensor has the shape of ``mu`` and contiguous samples."""
    for name, tensor in {"mu": mu, **tensors}.items():
        if tensor is None:
            continue
        if tensor.shape != mu.shape:
            raise ValueError(f"{name} must have the shape of mu, {tuple(mu.shape)}, got {tuple(tensor.shape)}")
        if layout.rows(tensor) is not tensor:
            raise ValueError(f"each sample of {name} must be contiguous, got strides {tensor.stride()}")


def _key(noise: Tensor | None, args: Any, count: int) -> Key:
    key = key_of(noise, args)
    if noise is None and not key.drawn:
        raise ValueError("noise must be a tensor or a key, got neither")
    if noise is not None and (noise.numel() != count or not noise.is_contiguous()):
        raise ValueError(f"noise must be contiguous and have {count} elements, got {tuple(noise.shape)}")
    return key


def _aligned(*numbers: int) -> bool:
    return all(number % 8 == 0 for number in numbers)


def _new_sums(grid: Grid, like: Tensor, *sizes: int) -> Tensor:
    """What the programs write their parts of the sums over samples to."""
    batch, _, blocks = grid.numbers
    return torch.empty((*sizes, batch, blocks), dtype=torch.float32, device=like.device)


def _added(partial: Tensor) -> Tensor:
    return partial.squeeze(-1) if partial.shape[-1] == 1 else partial.sum(-1)


def _no_sums(like: Tensor, *sizes: int) -> Tensor:
    return torch.zeros((*sizes, like.shape[0]), dtype=torch.float32, device=like.device)


def _least(free_bits: float) -> float:
    return free_bits if free_bits > 0 else -math.inf


def _prior(prior_mu: float, prior_log_var: float) -> tuple[float, float, float]:
    """The mean, the logarithm of the variance, and one over the standard deviation."""
    return prior_mu, prior_log_var, math.exp(-0.5 * prior_log_var)


# ---- A sample and its KL


def latent_sample(mu: Tensor, log_var: Tensor, noise: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    """``dgm::latent_sample.triton``; see :func:`dgm_kernels.gaussian_sample_kl`."""
    *key_args, free_bits, log_normal, prior_mu, prior_log_var, dtype = args
    out = torch.empty(mu.shape, dtype=dtype, device=mu.device)
    if mu.numel() == 0:
        return out, _no_sums(mu)
    _check_rows(mu, log_var=log_var)
    key = _key(noise, key_args, mu.numel())
    grid = _grid(mu.shape[0], _elements(mu))
    partial = _new_sums(grid, mu)
    strides = (_stride(mu), _stride(log_var))
    numbers = (*strides, _least(free_bits), *_prior(prior_mu, prior_log_var), *key.numbers)
    constants = (key.drawn, log_normal, _aligned(_elements(mu), *strides))
    launch(sample_kernel, grid, (out, partial, mu, log_var, noise, *key.tensors), numbers, constants)
    return out, _added(partial)


def latent_sample_backward(
    grad: Tensor | None, grad_kl: Tensor | None, mu: Tensor, log_var: Tensor, noise: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor]:
    """``dgm::latent_sample_backward.triton``: gradients of mu and log_var."""
    *key_args, free_bits, log_normal, prior_mu, prior_log_var = args
    to_mu, to_log_var = mu.new_empty(mu.shape), log_var.new_empty(mu.shape)
    if mu.numel() == 0:
        return to_mu, to_log_var
    _check_rows(mu, log_var=log_var, grad=grad)
    key = _key(noise, key_args, mu.numel())
    strides = (_stride(grad), _stride(mu), _stride(log_var))
    numbers = (*strides, _least(free_bits), *_prior(prior_mu, prior_log_var), *key.numbers)
    constants = (key.drawn, log_normal, _aligned(_elements(mu), *strides))
    tensors = (to_mu, to_log_var, grad, grad_kl, mu, log_var, noise, *key.tensors)
    launch(sample_backward_kernel, _grid(mu.shape[0], _elements(mu)), tensors, numbers, constants)
    return to_mu, to_log_var


# ---- KL alone


def latent_kl(mu: Tensor, *args: Any) -> Tensor:
    """``dgm::latent_kl.triton``; see :func:`dgm_kernels.gaussian_kl`."""
    *others, free_bits = args
    if mu.numel() == 0:
        return _no_sums(mu)
    _check_rows(mu, **dict(zip(("log_var", "prior_mu", "prior_log_var"), others, strict=True)))
    grid = _grid(mu.shape[0], _elements(mu))
    partial = _new_sums(grid, mu)
    strides = tuple(_stride(t) for t in (mu, *others))
    constants = (_aligned(_elements(mu), *strides),)
    launch(kl_kernel, grid, (partial, mu, *others), (*strides, _least(free_bits)), constants)
    return _added(partial)


def latent_kl_backward(grad: Tensor, mu: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """``dgm::latent_kl_backward.triton``: gradients of all four; empty ones of what is absent."""
    *others, free_bits = args
    operands = (mu, *others)
    grads = [None if t is None else t.new_empty(mu.shape) for t in operands]
    if mu.numel():
        _check_rows(mu, **dict(zip(("log_var", "prior_mu", "prior_log_var"), others, strict=True)))
        strides = tuple(_stride(t) for t in operands)
        constants = (_aligned(_elements(mu), *strides),)
        numbers = (*strides, _least(free_bits))
        launch(kl_backward_kernel, _grid(mu.shape[0], _elements(mu)), (*grads, grad, *operands), numbers, constants)
    return tuple(grad.new_empty((0,)) if g is None else g for g in grads)


# ---- Importance samples


def latent_importance(mu: Tensor, log_var: Tensor, noise: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    """``dgm::latent_importance.triton``; see :func:`dgm_kernels.importance_log_weights`."""
    *key_args, draws, log_normal, dtype = args
    out = torch.empty((draws, *mu.shape), dtype=dtype, device=mu.device)
    if out.numel() == 0:
        return out, _no_sums(mu, draws)
    _check_rows(mu, log_var=log_var)
    key = _key(noise, key_args, draws * mu.numel())
    grid = _grid(mu.shape[0], _elements(mu))
    partial = _new_sums(grid, mu, draws)
    programs = grid.programs[0]
    strides = (_stride(mu), _stride(log_var))
    constants = (key.drawn, log_normal, _aligned(_elements(mu), *strides))
    tensors = (out, partial, mu, log_var, noise, *key.tensors)
    grid = grid._replace(programs=(programs * draws, 1, 1))
    launch(importance_kernel, grid, tensors, (*strides, programs, *key.numbers), constants)
    return out, _added(partial)


def latent_importance_backward(
    grad: Tensor | None, grad_ratio: Tensor | None, mu: Tensor, log_var: Tensor, noise: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor]:
    """``dgm::latent_importance_backward.triton``: gradients of mu and log_var."""
    *key_args, draws, log_normal = args
    to_mu, to_log_var = mu.new_empty(mu.shape), log_var.new_empty(mu.shape)
    if mu.numel() == 0:
        return to_mu, to_log_var
    _check_rows(mu, log_var=log_var)
    if not all(g is None or g.is_contiguous() for g in (grad, grad_ratio)):
        raise ValueError("gradients must be contiguous")
    key = _key(noise, key_args, draws * mu.numel())
    strides = (_stride(mu), _stride(log_var))
    constants = (key.drawn, log_normal, _aligned(_elements(mu), *strides))
    tensors = (to_mu, to_log_var, grad, grad_ratio, mu, log_var, noise, *key.tensors)
    grid = _grid(mu.shape[0], _elements(mu), _DRAWS_TILE)
    launch(importance_backward_kernel, grid, tensors, (*strides, draws, *key.numbers), constants, warps=1)
    return to_mu, to_log_var


# ---- Full covariance


def _tril_grid(batch: int, features: int) -> Grid:
    rows, columns = _TRIL
    blocks = -(-features // rows)
    return Grid((batch * blocks, 1, 1), (batch, features, blocks), (rows, columns))


def _check_tril(mu: Tensor, scale_tril: Tensor) -> None:
    if mu.dim() != 2 or scale_tril.shape != (*mu.shape, mu.shape[1]):
        shapes = f"{tuple(mu.shape)} and {tuple(scale_tril.shape)}"
        raise ValueError(f"mu and scale_tril must be [batch, D] and [batch, D, D], got {shapes}")
    if layout.rows(mu) is not mu or layout.rows(scale_tril) is not scale_tril:
        raise ValueError("each sample of mu and of scale_tril must be contiguous")


def latent_tril(mu: Tensor, scale_tril: Tensor, noise: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    """``dgm::latent_tril.triton``; see :func:`dgm_kernels.gaussian_sample_kl`."""
    *key_args, dtype = args
    _check_tril(mu, scale_tril)
    out = torch.empty(mu.shape, dtype=dtype, device=mu.device)
    if mu.numel() == 0:
        return out, _no_sums(mu)
    key = _key(noise, key_args, mu.numel())
    grid = _tril_grid(*mu.shape)
    partial = _new_sums(grid, mu)
    tensors = (out, partial, mu, scale_tril, noise, *key.tensors)
    launch(tril_kernel, grid, tensors, (_stride(mu), _stride(scale_tril), *key.numbers), (key.drawn,))
    return out, _added(partial)


def latent_tril_backward(
    grad: Tensor | None, grad_kl: Tensor | None, mu: Tensor, scale_tril: Tensor, noise: Tensor | None, *key_args: Any
) -> tuple[Tensor, Tensor]:
    """``dgm::latent_tril_backward.triton``: gradients of mu and scale_tril."""
    _check_tril(mu, scale_tril)
    to_mu, to_factor = mu.new_empty(mu.shape), scale_tril.new_empty(scale_tril.shape)
    if mu.numel():
        _check_rows(mu, grad=grad)
        key = _key(noise, key_args, mu.numel())
        tensors = (to_mu, to_factor, grad, grad_kl, mu, scale_tril, noise, *key.tensors)
        numbers = (_stride(grad), _stride(mu), _stride(scale_tril), *key.numbers)
        launch(tril_backward_kernel, _tril_grid(*mu.shape), tensors, numbers, (key.drawn,))
    return to_mu, to_factor


# ---- Vector quantisation


def _programs(
    kernel: Any,
    programs: int,
    tensors: tuple[Any, ...],
    numbers: tuple[Any, ...],
    tile: tuple[int, ...],
    warps: int = 4,
) -> None:
    """Launches a kernel whose constants are the sizes of its tile."""
    grid = Grid((programs, 1, 1), (), ())  # type: ignore[arg-type]
    launch(kernel, grid, tensors, numbers, tile, warps)


def _row_tile(features: int) -> tuple[int, int]:
    """Rows and features of a program that goes over rows."""
    return 16, min(64, max(16, triton.next_power_of_2(features)))


def _check_codes(x: Tensor, codebook: Tensor) -> None:
    if x.dim() != 2 or codebook.dim() != 2 or x.shape[1] != codebook.shape[1] or codebook.shape[0] == 0:
        shapes = f"{tuple(x.shape)} and {tuple(codebook.shape)}"
        raise ValueError(f"x and codebook must be [N, D] and [K, D] with K > 0, got {shapes}")
    if layout.rows(x) is not x or not codebook.is_contiguous():
        raise ValueError("the rows of x and the codebook must be contiguous")


def latent_quantize(x: Tensor, codebook: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``dgm::latent_quantize.triton``; see :func:`dgm_kernels.vector_quantize`."""
    _check_codes(x, codebook)
    (rows, features), codes = x.shape, codebook.shape[0]
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    indices = torch.empty(rows, dtype=torch.int64, device=x.device)
    counts = torch.zeros(codes, dtype=torch.int64, device=x.device)
    if x.numel() == 0:  # the mean of nothing is 0 / 0
        return out, indices.zero_(), counts, torch.full((2,), math.nan, dtype=torch.float32, device=x.device)
    mean = codebook.mean(0, dtype=torch.float32)
    numbers, tile = (_stride(x), rows, features), _row_tile(features)
    tensors = (indices, x, codebook, mean)
    _programs(nearest_kernel, -(-rows // _NEAREST[0]), tensors, (*numbers, codes), _NEAREST, _PRODUCT_WARPS)
    programs = -(-rows // tile[0])
    partial = torch.empty(programs, dtype=torch.float32, device=x.device)
    _programs(gather_kernel, programs, (out, partial, counts, x, codebook, indices), numbers, tile)
    loss = (partial.sum(dtype=torch.float64) / x.numel()).to(torch.float32)
    return out, indices, counts, torch.stack([loss, loss])


def latent_quantize_backward(
    grad: Tensor | None, grad_losses: Tensor, x: Tensor, codebook: Tensor, indices: Tensor
) -> tuple[Tensor, Tensor]:
    """``dgm::latent_quantize_backward.triton``: gradients of x and of the codebook."""
    _check_codes(x, codebook)
    (rows, features), codes = x.shape, codebook.shape[0]
    to_x = x.new_empty(x.shape)
    if x.numel() == 0:
        return to_x, torch.zeros_like(codebook)
    tensors: tuple[Any, ...] = (to_x, grad, grad_losses, x, codebook, indices)
    numbers, tile = (_stride(x), rows, features), _row_tile(features)
    _programs(row_gradient_kernel, -(-rows // tile[0]), tensors, (_stride(grad), *numbers), tile)
    splits = min(_SPLITS, -(-rows // _CODES[0]))
    partial = torch.empty((splits, codes, features), dtype=torch.float32, device=x.device)
    tensors = (partial, x, codebook, indices)
    programs = -(-codes // _CODES[1]) * -(-features // _CODES[2]) * splits
    _programs(code_gradient_kernel, programs, tensors, (*numbers, codes, splits), _CODES, _PRODUCT_WARPS)
    return to_x, (partial.sum(0) * (grad_losses[0] * (2.0 / x.numel()))).to(codebook.dtype)


def aot_specs() -> Iterator[Spec]:
    """Forms of the kernels to compile ahead of time: the common ones, and those with every option."""
    key = {"seed": "*i64", "key_step": "*i64", "samples": "*i64"}
    for name, dtype in (("fp32", "*fp32"), ("bf16", "*bf16")):
        two = {"mu": dtype, "log_var": dtype}
        sums, both = {"partial": "*fp32"}, {"to_mu": dtype, "to_log_var": dtype}
        grads = {"grad": dtype, "grad_kl": "*fp32", "grad_ratio": "*fp32"}
        plain = {"DRAWN": True, "LOG_NORMAL": False}
        forms: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
            "": ({}, plain),
            "_64_columns": ({}, {**plain, "ROWS": 16, "COLUMNS": 64}),
            "_unaligned": ({}, {**plain, "ALIGNED": False}),
            "_log_normal_every_option": (key, {**plain, "LOG_NORMAL": True}),
            "_given": ({"noise": dtype}, {"DRAWN": False, "LOG_NORMAL": False}),
        }
        for form, (more, constants) in forms.items():
            forward = {"out": dtype} | sums | two | more
            yield spec(f"sample{form}_{name}", sample_kernel, forward, **constants)
            yield spec(f"sample_backward{form}_{name}", sample_backward_kernel, both | grads | two | more, **constants)
            yield spec(f"importance{form}_{name}", importance_kernel, forward, **constants)
            small = {"ROWS": 2, "COLUMNS": 64} if "COLUMNS" in constants else {"COLUMNS": _DRAWS_TILE}
            pointers = both | grads | two | more
            yield spec(
                f"importance_backward{form}_{name}", importance_backward_kernel, pointers, 1, **constants | small
            )
        yield from _other_specs(name, dtype)


def _other_specs(name: str, dtype: str) -> Iterator[Spec]:
    four = dict.fromkeys(("mu", "log_var", "prior_mu", "prior_log_var"), dtype)
    yield spec(f"kl_{name}", kl_kernel, {"partial": "*fp32"} | four)
    to_four = {f"to_{key}": type_ for key, type_ in four.items()}
    yield spec(f"kl_backward_{name}", kl_backward_kernel, to_four | {"grad": "*fp32"} | four)
    tile = {"DRAWN": True, "ROWS": _TRIL[0], "COLUMNS": _TRIL[1]}
    factor = {"mu": dtype, "factor": dtype}
    yield spec(f"tril_{name}", tril_kernel, {"out": dtype, "partial": "*fp32"} | factor, **tile)
    back = {"to_mu": dtype, "to_factor": dtype, "grad": dtype, "grad_kl": "*fp32"} | factor
    yield spec(f"tril_backward_{name}", tril_backward_kernel, back, **tile)
    codes = {"x": dtype, "codebook": dtype, "indices": "*i64"}
    sizes = ("ROWS", "CODES", "FEATURES")
    nearest, of_codes = (dict(zip(sizes, tile, strict=True)) for tile in (_NEAREST, _CODES))
    yield spec(f"nearest_{name}", nearest_kernel, codes | {"mean": "*fp32"}, _PRODUCT_WARPS, **nearest)
    yield spec(f"code_gradient_{name}", code_gradient_kernel, codes | {"partial": "*fp32"}, _PRODUCT_WARPS, **of_codes)
    gather = codes | {"out": dtype, "partial": "*fp32", "counts": "*i64"}
    yield spec(f"gather_{name}", gather_kernel, gather, ROWS=16, FEATURES=64)
    rows = codes | {"to_x": dtype, "grad": dtype, "grad_losses": "*fp32"}
    yield spec(f"row_gradient_{name}", row_gradient_kernel, rows, ROWS=16, FEATURES=64)
