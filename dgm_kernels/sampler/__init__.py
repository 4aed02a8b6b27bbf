"""Fused sampler steps, the forward process and its loss: one affine kernel, one coefficient table a sampler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._core import layout, ops
from .._core.backends import select
from .._core.checks import check_batch, check_index, check_like, check_values
from .._core.noise import NO_NOISE, NoiseKey, OpArgs, noise_args
from . import op, reference, tables
from .checks import check_guidance, check_history, check_known, check_out, check_training, writable
from .schedule import Schedule
from .table import SamplerTable, TrainingTable

__all__ = [
    "NoiseKey",
    "SamplerTable",
    "Schedule",
    "TrainingTable",
    "add_noise",
    "denoising_loss",
    "noise_like",
    "sample",
    "sampler_step",
    "tables",
]

_KINDS = {"normal": 0, "uniform": 1, "bits": 2}


def noise_like(x: Tensor, key: NoiseKey, *, distribution: str = "normal") -> Tensor:
    """Counter-based noise in the shape of ``x``: a pure function of (seed, sample, step, stream, element).

    Args:
        x: ``[batch, ...]``; gives shape, dtype and device.
        key: names the noise; row ``b`` is sample ``key.first_sample + b``.
        distribution: ``"normal"``; ``"uniform"`` in (0, 1]; or ``"bits"``, the Philox words as int32.

    Returns:
        A contiguous tensor of the shape, dtype (int32 for ``"bits"``) and device of ``x``.

    Raises:
        TypeError, ValueError: ``x`` is no floating-point batch, or the key's tensors lie on another device.

    Source: Philox4x32-10, Salmon et al., SC 2011; normals by Box-Muller.
    """
    check_batch("x", x)
    if distribution not in _KINDS:
        raise ValueError(f"distribution must be one of {', '.join(map(repr, _KINDS))}, got {distribution!r}")
    if not isinstance(key, NoiseKey):
        raise TypeError(f"key must be a NoiseKey, got {type(key).__name__}")
    args = noise_args(key, x)
    backend = select(x.device, (x,))
    if backend == "reference":
        return reference.noise_like(x, args, _KINDS[distribution])
    return ops.call(op.noise_like[backend], False, x.detach().contiguous(), *args, _KINDS[distribution])


def sampler_step(
    x: Tensor,
    model_output: Tensor,
    table: SamplerTable,
    step: int | Tensor,
    *,
    noise: NoiseKey | Tensor | None = None,
    history: Tensor | None = None,
    guidance: tuple[Tensor, float] | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    out: Tensor | tuple[Tensor, Tensor] | None = None,
    return_x0: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """One step of any sampler in one pass over memory.

    ``x0 = clip(px x + pm m, lo, hi)``, ``x' = ax x + a0 x0 + am m + ah history + an noise``, with the coefficients of
    row ``step`` of the table. With guidance ``m = m_u + w (m_c - m_u)``. Where ``mask`` is 1 the result is the known
    sample at the new noise level, ``ak known + sk noise``. 16-bit tensors are worked on in float32.

    Args:
        x: ``[batch, ...]`` the state.
        model_output: like ``x``; what ``table.prediction`` says (the conditional output, with guidance).
        table: from ``dgm_kernels.tables``.
        step: row of the table: an int, an int64 tensor without dimensions (read on the device), or one entry a sample.
        noise: a key (its step is added to ``step``), a tensor like ``x``, or None: a fresh seed from PyTorch's
            generator. Tables without noise ignore it, unless known pixels need it.
        history: like ``x``; what ``table.history`` names, for steps that use it.
        guidance: ``(unconditional model output, scale)``; to ``torch.compile`` the scale is a constant.
        known: sample whose pixels are given; broadcasts to ``x``.
        mask: 1 (or True) where ``known`` is given, 0 where it is not, between to blend; broadcasts to ``x``.
        out: where to write the result (with ``return_x0`` a pair); may be ``x`` itself. Not with gradients.
        return_x0: also return the (bounded) prediction of the clean sample.

    Returns:
        The next state, in the dtype and memory format of ``x``; with ``return_x0`` the pair (state, x0).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or range; the message names it.

    Source: see each table; guidance: Ho and Salimans, 2022; known pixels: Song et al., 2021; Lugmayr et al., 2022.
    """
    check_batch("x", x)
    check_like("model_output", model_output, x, "x")
    if not isinstance(table, SamplerTable):
        raise TypeError(f"table must be a SamplerTable (see dgm_kernels.tables), got {type(table).__name__}")
    step = check_index("step", step, x, "x", len(table))
    unconditional, scale = check_guidance(guidance, x)
    check_history(history, table, step, x)
    known, mask = check_known(known, mask, x)
    noisy = table.stochastic or known is not None
    args = noise_args(noise, x) if noisy or noise is not None else NO_NOISE
    tensors = [x, model_output, args[0] if noisy else None, history, unconditional, known, mask]
    if out is not None:
        check_out(out, x, return_x0, _needs_grad(*tensors))
    result = _run_step(tensors, table, step, args if noisy else NO_NOISE, scale, out, return_x0)
    return result if out is None else out


def _run_step(
    tensors: list[Any],
    table: SamplerTable,
    step: int | Tensor,
    args: OpArgs,
    scale: float,
    out: Tensor | tuple[Tensor, Tensor] | None,
    return_x0: bool,
) -> Any:
    """The checked step on the best backend."""
    x, mask = tensors[0], tensors[-1]
    grad = _needs_grad(*tensors)
    mask_grad = grad and mask is not None and mask.requires_grad
    refusal = "the gradient of a mask is computed by the reference" if mask_grad else None
    backend = select(x.device, tensors, refusal)
    order, (state, m, drawn, history, unconditional, known, mask) = _dense(tensors, args[-1] >= 0)
    args = (drawn, *args[1:])
    rows = _rows(table, x)
    if backend == "reference" or table.dynamic_threshold is not None:
        check_values("step", step, len(table))
    threshold = None
    if table.dynamic_threshold is not None:
        threshold = reference.dynamic_threshold(state, m, rows, step, unconditional, scale, *table.dynamic_threshold)
    if backend == "reference":
        options = (history, unconditional, scale, known, mask, threshold)
        result: Any = reference.sampler_step(state, m, rows, step, args, *options)
        return _finish(result if return_x0 else result[0], x, order, out)
    index = (step, 0) if isinstance(step, Tensor) else (None, step)
    inputs = (state, m, rows, *index, *args, history, unconditional, scale, known, mask, threshold, table.clips)
    if out is not None and order is None and writable(out, tensors):
        pair = out if isinstance(out, tuple) else (out, None)
        return ops.call_inplace(op.sampler_step_out[backend], *inputs, outputs=pair)
    result = ops.call(op.sampler_step[backend], grad, *inputs, return_x0)
    return _finish(result if return_x0 else result[0], x, order, out)


def add_noise(x0: Tensor, table: TrainingTable, t: Tensor, noise: NoiseKey | Tensor) -> Tensor:
    """The forward process ``x_t = alpha[t] x0 + sigma[t] noise`` in one pass.

    Args:
        x0: ``[batch, ...]`` clean samples.
        table: from ``tables.training``.
        t: int64 ``[batch]``, index into the table for every sample.
        noise: a key or a tensor like ``x0``.

    Returns:
        ``x_t`` in the dtype and memory format of ``x0``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device; the message names it.

    Source: Ho et al., "Denoising Diffusion Probabilistic Models", 2020, equation 4.
    """
    t, args = check_training(x0, table, t, noise)
    tensors = [x0, args[0]]
    backend = select(x0.device, tensors)
    order, (x, drawn) = _dense(tensors, args[-1] >= 0)
    args = (drawn, *args[1:])
    if backend == "reference":
        check_values("t", t, len(table))
        result = reference.add_noise(x, _rows(table, x0), t, args)
    else:
        result = ops.call(op.add_noise[backend], _needs_grad(*tensors), x, table.rows_on(x0.device), t, *args)
    return _finish(result, x0, order, None)


def denoising_loss(
    model_output: Tensor,
    x0: Tensor,
    table: TrainingTable,
    t: Tensor,
    noise: NoiseKey | Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``weight mean((m - target)^2)`` with ``target = cx[t] x0 + cn[t] noise``, drawing the noise again.

    The noise is that of :func:`add_noise` with the same key and is never stored: the backward pass needs only the
    residual, which takes the place of the saved model output.

    Args:
        model_output: like ``x0``.
        x0: ``[batch, ...]`` clean samples.
        table: from ``tables.training``; its ``prediction`` names the target, and it holds a weight for every time.
        t: int64 ``[batch]``.
        noise: the key or the tensor that made ``x_t``.
        weight: ``[batch]``, multiplies the table's.
        reduction: ``"mean"`` or ``"sum"`` over the batch, or ``"none"``; elements of a sample are always averaged.

    Returns:
        A float32 scalar (float64 for float64 input), or ``[batch]`` with ``reduction="none"``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device; the message names it.

    Source: Ho et al., 2020, equation 14; v: Salimans and Ho, 2022; score: Vincent, 2011.
    """
    t, args = check_training(x0, table, t, noise)
    check_like("model_output", model_output, x0, "x0")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if weight is not None:
        check_like("weight", weight, t, "t")
    tensors = [model_output, x0, args[0]]
    grad = _needs_grad(*tensors)
    backend = select(x0.device, tensors)
    _, (m, x, drawn) = _dense(tensors, args[-1] >= 0)
    args = (drawn, *args[1:])
    if backend == "reference":
        check_values("t", t, len(table))
        loss, _ = reference.denoising_loss(m, x, _rows(table, x0), t, args)
    else:
        loss, _ = ops.call(op.denoising_loss[backend], grad, m, x, table.rows_on(x0.device), t, *args, grad)
    if weight is not None:
        loss = loss * weight
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def sample(
    denoiser: Callable[[Tensor, Tensor], Any],
    x: Tensor,
    table: SamplerTable,
    *,
    noise: NoiseKey | None = None,
    guidance: float | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Runs a table from its first row to its last.

    Args:
        denoiser: ``denoiser(x, time) -> model output``; ``time`` is float32 ``[batch]``, from ``table.times``. With
            guidance it returns the pair (conditional output, unconditional output).
        x: the initial state, ``table.initial_sigma`` times standard normal noise, of another stream than the steps'.
        table: from ``dgm_kernels.tables``.
        noise: key of the trajectory; None draws one seed from PyTorch's generator.
        guidance: scale of classifier-free guidance.
        known, mask: see :func:`sampler_step`.
        callback: called with (step, state) after every step.

    Returns:
        The final state.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or range; the message names it.

    Example:
        >>> key = NoiseKey(seed=0)
        >>> table = tables.ddim(Schedule.linear(1000), 50)
        >>> x = noise_like(torch.empty(4, 3, 8, 8), NoiseKey(seed=0, stream=1)) * table.initial_sigma
        >>> sample(lambda x, time: x, x, table, noise=key).shape
        torch.Size([4, 3, 8, 8])
    """
    check_batch("x", x)
    if not isinstance(table, SamplerTable):
        raise TypeError(f"table must be a SamplerTable (see dgm_kernels.tables), got {type(table).__name__}")
    if noise is not None and not isinstance(noise, NoiseKey):
        raise TypeError(f"noise must be a NoiseKey, new noise for every step, or None, got {type(noise).__name__}")
    if noise is None and (table.stochastic or known is not None):
        noise = NoiseKey.draw(device=x.device)
    times = table.times.to(device=x.device, dtype=torch.float32)
    previous = None
    for step in range(len(table)):
        scale = table.input_scales[step]
        seen = x if scale == 1.0 else x * scale
        output = denoiser(seen, times[step].expand(x.shape[0]))
        m, guided = (output, None) if guidance is None else (output[0], (output[1], guidance))
        history = previous if table.needs_history[step] else None
        options: dict[str, Any] = {"noise": noise, "history": history, "guidance": guided, "known": known, "mask": mask}
        keeps_x0 = table.history == "x0"
        result: Any = sampler_step(x, m, table, step, return_x0=keeps_x0, **options)
        x, previous = result if keeps_x0 else (result, x)
        if callback is not None:
            callback(step, x)
    return x


# Loops, here and in select(): at a few microseconds a call, generators are a tenth of it.
def _needs_grad(*tensors: Tensor | None) -> bool:
    if forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def _row_major(tensors: list[Any]) -> bool:
    for tensor in tensors:  # noqa: SIM110
        if tensor is not None and not tensor.is_contiguous():
            return False
    return True


def _dense(tensors: list[Any], drawn: bool) -> tuple[tuple[int, ...] | None, list[Any]]:
    """The tensors in the form of the kernels, and the permutation that did it (None if they were row-major).

    Noise that is drawn follows the row-major order, so only calls without it may use another common memory order.
    """
    if _row_major(tensors):
        return None, tensors
    order = None if drawn else layout.common_order(tensors)
    if order is not None:
        return order, [None if t is None else t.permute(order) for t in tensors]
    return tuple(range(tensors[0].dim())), [None if t is None else t.contiguous() for t in tensors]


def _finish(result: Any, x: Tensor, order: tuple[int, ...] | None, out: Any) -> Any:
    """Puts results back into the memory format of ``x``, and into ``out``."""
    if order is None and out is None:
        return result
    if isinstance(result, tuple):
        return tuple(_finish(r, x, order, None if out is None else out[i]) for i, r in enumerate(result))
    if order is not None:
        row_major = order == tuple(range(x.dim()))
        result = layout.like_strides(result, x) if row_major else result.permute(layout.inverse(order))
    return result if out is None else out.copy_(result)


def _rows(table: SamplerTable | TrainingTable, x: Tensor) -> Tensor:
    return table.rows64.to(x.device) if x.dtype == torch.float64 else table.rows_on(x.device)
