"""Decoding: keys and values kept from step to step, and one query of each head against them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .._core import ops
from .._core.autocast import autocast_dtype, cast_for_product
from .._core.backends import select
from .._core.checks import DTYPES, as_int, check_device, check_float
from . import op
from .checks import check_bias, check_rope, check_scale
from .masks import Mask, causal
from .positions import ALiBi, Rotary


class KVCache:
    """Keys and values of the tokens so far, in buffers that never move: ``[batch, heads, capacity, features]``.

    Args:
        batch, heads: of the keys and values.
        capacity: the greatest number of tokens.
        head_dim: features of a key.
        value_dim: features of a value; None for as many.
        dtype, device: of the buffers.

    Raises:
        TypeError, ValueError: a number is not a positive int, or the dtype none that attention takes.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        capacity: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        value_dim = head_dim if value_dim is None else value_dim
        for name, least, value in (
            *(("batch", 0, batch), ("heads", 1, heads), ("capacity", 1, capacity)),
            *(("head_dim", 1, head_dim), ("value_dim", 1, value_dim)),
        ):
            if (number := as_int(value)) is None:
                raise TypeError(f"{name} must be an int, got {value!r}")
            if number < least:
                raise ValueError(f"{name} must be at least {least}, got {number}")
        if dtype not in DTYPES:
            raise TypeError(f"dtype must be a floating-point dtype of 16, 32 or 64 bits, got {dtype}")
        # Zeros, since what is not written yet could be NaN, and a kernel may read beyond the last token.
        with torch.inference_mode(False):  # a cache made there serves elsewhere too
            self.keys = torch.zeros(batch, heads, capacity, head_dim, dtype=dtype, device=device)
            self.values = torch.zeros(batch, heads, capacity, value_dim, dtype=dtype, device=device)
        self.length = 0

    @property
    def capacity(self) -> int:
        """The greatest number of tokens."""
        return self.keys.shape[2]

    def append(self, k: Tensor, v: Tensor, *, rope: Rotary | None = None) -> None:
        """Copies keys ``[batch, heads, n, head_dim]`` and values of the next n tokens into the buffers.

        Args:
            rope: rotary positions of all tokens; the keys are stored rotated.

        Raises:
            TypeError, ValueError: an operand does not fit the cache, or the cache would overflow; nothing is written.
        """
        for name, value, buffer in (("k", k, self.keys), ("v", v, self.values)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
            check_float(name, value)
            expected = (*buffer.shape[:2], k.shape[-2] if isinstance(k, Tensor) and k.dim() > 1 else 1, buffer.shape[3])
            if tuple(value.shape) != expected:
                raise ValueError(f"{name} must have shape {expected}, that of the cache, got {tuple(value.shape)}")
            if value.device != buffer.device:
                raise ValueError(f"{name} must be on the device of the cache, {buffer.device}, got {value.device}")
        end = self.length + k.shape[2]
        if end > self.capacity:
            raise ValueError(
                f"k must fit into the cache: {self.capacity} tokens, {self.length} taken, {k.shape[2]} new"
            )
        if rope is not None:
            check_rope(rope, end, k.shape[3], k)
            k = rope.apply(k, self.length)
        with torch.no_grad():
            self.keys[:, :, self.length : end] = k
            self.values[:, :, self.length : end] = v
        self.length = end

    def reset(self, length: int = 0) -> None:
        """Forgets all tokens but the first ``length``."""
        number = as_int(length)
        if number is None or not 0 <= number <= self.length:
            raise ValueError(f"length must be an int from 0 to {self.length}, the tokens held, got {length!r}")
        self.length = number


def attention_decode(
    q: Tensor,
    cache: KVCache,
    *,
    mask: Mask | None = None,
    bias: ALiBi | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    rope: Rotary | None = None,
) -> Tensor:
    """Attention of the last N tokens, whose keys the cache already holds, to those that it holds up to each of them.

    The result for N tokens is that of :func:`dgm_kernels.attention` with ``mask=causal()`` over all tokens, at its last
    N queries. For one token the cache is read once, split along keys. No gradients.

    Args:
        q: ``[batch, heads, N, D]``.
        cache: the keys and values of the tokens so far, these N among them.
        mask: in addition to what came before; counted in all tokens, as in attention over the whole sequence.
        bias: :func:`~dgm_kernels.positions.alibi`.
        scale: of the products; None for ``1 / sqrt(D)``.
        enable_gqa: the cache may have fewer heads, a divisor of those of q.
        rope: rotary positions of all tokens, applied to q; the keys were rotated when they were appended.

    Returns:
        ``[batch, heads, N, Dv]`` in the dtype of q.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or value; the message names it.
    """
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache must be a KVCache, got {type(cache).__name__}")
    _check_query(q, cache, enable_gqa)
    check_scale(scale)
    if bias is not None:
        if not isinstance(bias, ALiBi):
            raise TypeError(f"bias must be ALiBi or None, got {type(bias).__name__}")
        check_bias(bias, (*q.shape[:3], cache.length), q)
    _check_mask(mask, cache.length)
    if rope is not None:
        check_rope(rope, cache.length, q.shape[3], q)
        q = rope.apply(q, cache.length - q.shape[2])
    if dtype := autocast_dtype(q.device):
        q = cast_for_product(q, dtype)
    if q.dtype != cache.keys.dtype:
        raise TypeError(f"q must have the dtype of the cache, {cache.keys.dtype}, got {q.dtype}")
    scale = op.default_scale(q.shape[3]) if scale is None else float(scale)
    slopes = None if bias is None else bias.slopes.contiguous()
    with torch.no_grad():
        return _decode(q, cache, mask, slopes, scale)


def _check_query(q: object, cache: KVCache, enable_gqa: bool) -> None:
    """q is a tensor that fits the cache. Short, since a step of decoding is."""
    if not isinstance(q, Tensor):
        raise TypeError(f"q must be a tensor, got {type(q).__name__}")
    batch, key_heads, _, features = cache.keys.shape
    if q.dim() != 4 or q.shape[0] != batch or q.shape[3] != features:
        raise ValueError(f"q must have shape [{batch}, heads, N, {features}], that of the cache, got {tuple(q.shape)}")
    heads, queries = q.shape[1], q.shape[2]
    if heads % key_heads or not (enable_gqa or heads == key_heads):
        expected = f"a multiple of {key_heads}" if enable_gqa else f"{key_heads}"
        hint = "" if enable_gqa else "; enable_gqa=True lets heads share keys"
        raise ValueError(f"q must have {expected} heads, those of the cache, got {heads}{hint}")
    if queries > cache.length:
        raise ValueError(f"q must have at most as many tokens as the cache holds, {cache.length}, got {queries}")
    check_float("q", q)
    check_device("q", q, cache.keys, "the cache")


def _check_mask(mask: object, tokens: int) -> None:
    if mask is None:
        return
    if not isinstance(mask, Mask):
        raise TypeError(f"mask must be a Mask of dgm_kernels.masks or None, got {type(mask).__name__}")
    if mask.length is not None and mask.length < tokens:
        raise ValueError(f"mask {mask} is made for {mask.length} tokens, the cache holds {tokens}")


@functools.lru_cache(maxsize=256)  # all layers of a network ask for the same
def _seen_by_last(mask: Mask, tokens: int) -> tuple[int, int, tuple[int, int]]:
    """Begin and end of the keys that the last token sees, and the rule for columns."""
    region = mask.region(1, tokens, first=tokens - 1, device="cpu")
    assert region is not None
    begin, end = region.bounds[0].tolist()
    return begin, end, region.columns


def _decode(q: Tensor, cache: KVCache, mask: Mask | None, slopes: Tensor | None, scale: float) -> Tensor:
    queries, first = q.shape[2], cache.length - q.shape[2]
    refusal = op.refuse_features(q, cache.values)
    backend = select(q.device, (q, cache.keys), refusal, natives=op.BACKENDS)
    if queries == 1 and backend != "reference" and (mask is None or mask.columns_agree):
        begin, end, columns = (0, cache.length, (0, 0)) if mask is None else _seen_by_last(mask, cache.length)
        return ops.call(
            op.decode[backend], False, q.contiguous(), cache.keys, cache.values, begin, min(end, first + 1), *columns,
            slopes, first, scale,
        )  # fmt: skip
    whole = causal() if mask is None else mask & causal()
    region = whole.region(queries, cache.length, first=first, device=q.device)
    keep = None
    if region is None:
        keep = whole.dense(queries, cache.length, first=first, device=q.device).expand(*q.shape[:3], cache.length)
    bounds, columns = (None, (0, 0)) if region is None else (region.bounds, region.columns)
    settings = op.Settings(bounds, *columns, keep, None, slopes, None, False, first, scale)
    keys, values = (buffer[:, :, : cache.length] for buffer in (cache.keys, cache.values))
    if backend == "reference":
        return op.attend_dense(q, keys, values, settings)[0]
    return ops.call(op.attend[backend], False, op.last_contiguous(q), keys, values, *settings)[0]
