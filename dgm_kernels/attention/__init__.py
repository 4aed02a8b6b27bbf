"""Attention with structured masks, positions and biases inside the kernel, and decoding from a cache."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .._core import ops
from .._core.autocast import autocast_dtype, cast_for_product
from .._core.backends import is_differentiated, is_forward_mode, is_traced, may_keep_tensors, select
from .._core.layout import like_strides
from .._core.noise import NoiseKey, uniform_noise
from . import masks, op, positions, reference
from .checks import check_bias, check_dropout, check_mask, check_operands, check_rope, check_scale
from .decode import KVCache, attention_decode
from .masks import Mask, Region
from .positions import ALiBi, Rotary

__all__ = ["KVCache", "attention", "attention_decode", "masks", "positions"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    bias: Tensor | ALiBi | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    noise: NoiseKey | None = None,
    enable_gqa: bool = False,
    rope: Rotary | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(scale q k^T + bias) v``, as ``F.scaled_dot_product_attention``; memory linear in the number of tokens.

    A query that sees no key has the result 0. Of structured masks the kernels skip what is not seen; keys that are not
    seen must still be finite. Differentiable to any order in q, k, v and a bias; the first derivatives and the
    directional one of forward-mode AD are kernels and bitwise repeatable, second ones, and those of a bias, need the
    memory of all scores. Saves q, k, v, the result and ``lse``.

    Args:
        q: ``[..., heads, N, D]``; other leading dimensions broadcast.
        k: ``[..., heads, M, D]``.
        v: ``[..., heads, M, Dv]``.
        mask: which keys are seen: a :class:`~dgm_kernels.masks.Mask`; or a tensor that broadcasts to
            ``[..., heads, N, M]``, bool (True: seen) or floating-point (added to the scores).
        bias: added to the scores: a tensor that broadcasts to ``[..., heads, N, M]`` or
            :func:`~dgm_kernels.positions.alibi`.
        scale: of the products; None for ``1 / sqrt(D)``.
        dropout_p: share of the probabilities that is set to 0; the others are divided by ``1 - dropout_p``.
        noise: key of the dropout (one sample is one entry of the leading dimensions, with elements
            ``[heads, N, M]``); None draws one from PyTorch's generator.
        enable_gqa: k and v may have fewer heads, a divisor of those of q; neighbouring heads of q share one.
        rope: rotary positions, applied to q and k inside.
        return_lse: also return the log of the softmax's denominator.

    Returns:
        ``[..., heads, N, Dv]`` in the dtype of q, in memory in the order of q; with ``return_lse`` also float32
        (float64 for float64) ``[..., heads, N]``, minus infinity for a query that sees no key.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or value; the message names it.

    Source: Vaswani et al., "Attention Is All You Need", 2017; Dao et al., "FlashAttention", 2022.
    """
    check_operands(q, k, v, enable_gqa)
    check_scale(scale)
    check_dropout(dropout_p)
    lead = q.shape[:-3]
    if not lead == k.shape[:-3] == v.shape[:-3]:  # broadcast_shapes takes its time
        lead = torch.broadcast_shapes(lead, k.shape[:-3], v.shape[:-3])
    heads = () if q.dim() < 3 else (q.shape[-3] if enable_gqa else _broadcast_heads(q, k, v),)
    scores = (*lead, *heads, q.shape[-2], k.shape[-2])
    if mask is not None:
        check_mask(mask, q.shape[-2], k.shape[-2], scores, q)
    if bias is not None:
        check_bias(bias, scores, q)
    if rope is not None:
        check_rope(rope, max(q.shape[-2], k.shape[-2]), q.shape[-1], q)
    if noise is not None and not isinstance(noise, NoiseKey):
        raise TypeError(f"noise must be a NoiseKey or None, got {type(noise).__name__}")
    if dtype := autocast_dtype(q.device):
        q, k, v = (cast_for_product(t, dtype) for t in (q, k, v))
    for name, value in (("k", k), ("v", v)):
        if value.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {value.dtype}")
    # One key head for all is not expanded: its gradients are then added up before they are rounded.
    one = bool(heads) and k.shape[-3] == v.shape[-3] == 1
    shared = k.shape[-3:-2] if enable_gqa or one else heads
    q, k, v = (_to_four(t, lead, kept) for t, kept in ((q, heads), (k, shared), (v, shared)))
    shape = (math.prod(lead), heads[0] if heads else 1, *scores[-2:])
    settings = _settings(mask, bias, rope, shape, scores, q, scale)
    out, lse = _attend(q, k, v, settings, dropout_p, noise)
    out = out.view(*lead, *heads, *out.shape[2:])
    return (out, lse.view(*lead, *heads, lse.shape[2])) if return_lse else out


def _broadcast_heads(*operands: Tensor) -> int:
    """The heads of all; one head serves for any number, none too."""
    numbers = [t.shape[-3] for t in operands]
    return 0 if 0 in numbers else max(numbers)


def _to_four(x: Tensor, lead: tuple[int, ...], heads: tuple[int, ...]) -> Tensor:
    """``[batch, heads, length, features]``."""
    if len(lead) == 1:
        return x if x.shape[:2] == (*lead, *heads) else x.expand(*lead, *heads, -1, -1)
    x = x.expand(*lead, *heads, -1, -1)
    return x.reshape(math.prod(lead), heads[0] if heads else 1, *x.shape[-2:])


def _settings(
    mask: Mask | Tensor | None,
    bias: Tensor | ALiBi | None,
    rope: Rotary | None,
    shape: tuple[int, ...],
    scores: tuple[int, ...],
    q: Tensor,
    scale: float | None,
) -> op.Settings:
    """What the op takes; ``shape`` is that of the scores with one dimension of batch and one of heads."""
    region, keep = _region(mask, shape[2], shape[3], q.device) if isinstance(mask, Mask) else (None, None)
    added = [bias] if isinstance(bias, Tensor) else []
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        keep = mask
    elif isinstance(mask, Tensor):
        added.append(mask)
    if len(added) > 1 or any(map(is_differentiated, added)):  # so that sums, those of gradients too, round once
        added = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in added]
    total = None
    if added:
        total = added[0] if len(added) == 1 else added[0] + added[1]
        total = total.expand(scores).reshape(shape) if len(scores) != 4 else total.expand(scores)
    if keep is not None:
        keep = keep.expand(scores).reshape(shape) if len(scores) != 4 else keep.expand(scores)
    return op.Settings(
        None if region is None else region.bounds,
        0 if region is None else region.columns.width,
        0 if region is None else region.columns.radius,
        keep,
        total,
        bias.slopes.contiguous() if isinstance(bias, ALiBi) else None,
        None if rope is None else rope.table.contiguous(),
        rope is not None and rope.interleaved,
        0,
        op.default_scale(q.shape[-1]) if scale is None else float(scale),
    )


def _region(mask: Mask, queries: int, keys: int, device: torch.device) -> tuple[Region | None, Tensor | None]:
    """The mask as kernels read it; or, of a mask that they cannot, the matrix."""
    find = _cached if may_keep_tensors() else Mask.region
    region = find(mask, queries, keys, device=device)
    return region, None if region is not None else mask.dense(queries, keys, device=device)


@functools.lru_cache(maxsize=64)
def _cached(mask: Mask, queries: int, keys: int, device: torch.device) -> Region | None:
    with torch.inference_mode(False):
        return mask.region(queries, keys, device=device)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, settings: op.Settings, dropout_p: float, noise: NoiseKey | None
) -> tuple[Tensor, Tensor]:
    backend, forward_mode = _choose(q, k, v, settings, dropout_p)
    if backend == "reference":
        return _on_reference(q, k, v, settings, dropout_p, noise)
    q, k, v = (op.last_contiguous(t) for t in (q, k, v))
    if forward_mode:
        return op.ForwardMode.apply(backend, q, k, v, *settings)
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return ops.call(op.attend[backend], grad, q, k, v, *settings)


def _choose(q: Tensor, k: Tensor, v: Tensor, settings: op.Settings, dropout_p: float) -> tuple[str, bool]:
    """The backend, and whether forward-mode AD looks on."""
    refusal = op.refuse_features(q, v)
    if dropout_p > 0:
        refusal = "dropout of attention runs on the reference"
    for name in ("bias", "slopes", "rope"):
        value = getattr(settings, name)
        if value is not None and is_differentiated(value):
            refusal = f"{name} with a derivative is differentiated by the reference"
    operands = (q, k, v, settings.bias)
    forward_mode = is_forward_mode()
    backend = select(q.device, operands, refusal, natives=op.BACKENDS, has_jvp=forward_mode)
    return backend, forward_mode


def _on_reference(
    q: Tensor, k: Tensor, v: Tensor, settings: op.Settings, dropout_p: float, noise: NoiseKey | None
) -> tuple[Tensor, Tensor]:
    multiplier = None
    turned, k, keep, bias = op.dense_form(q, k, settings)
    if dropout_p > 0:
        key = NoiseKey.draw(device=q.device) if noise is None else noise
        uniform = uniform_noise(torch.Size((*q.shape[:3], k.shape[2])), q.device, key.op_args())
        multiplier = (uniform > dropout_p).to(torch.promote_types(q.dtype, torch.float32)) / (1.0 - dropout_p)
    out, lse = reference.attention(turned, k, v, keep, bias, settings.scale, multiplier)
    return (out if is_traced() else like_strides(out, q)), lse
