"""Multi-head attention with the parameters of PyTorch's module, and a transformer block for images and sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._core.autocast import autocast_dtype
from .._core.checks import as_int, check_device
from ..attention import KVCache, attention, attention_decode
from ..attention.checks import check_mask, check_rope
from ..attention.masks import Mask, causal
from ..attention.positions import ALiBi, Rotary


class MultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` on :func:`dgm_kernels.attention`: the same parameters, state dict and results.

    Two defaults are others: ``batch_first`` is True, and weights are only computed if ``need_weights=True``, since they
    take the memory of all scores. A query that sees no key has the result of a value 0, where PyTorch's is NaN. Not
    supported are ``add_bias_kv`` and ``add_zero_attn``.

    Args:
        embed_dim: features of the queries and of the result.
        num_heads: divides ``embed_dim``.
        dropout: share of the probabilities that is dropped in training.
        bias: whether the projections have one.
        add_bias_kv, add_zero_attn: False.
        kdim, vdim: features of keys and values; None for ``embed_dim``.
        batch_first: inputs are ``[batch, length, features]``; otherwise ``[length, batch, features]``.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value; the message names it.

    Source: Vaswani et al., "Attention Is All You Need", 2017.

    Example:
        >>> layer = MultiheadAttention(32, num_heads=4)
        >>> out, _ = layer(torch.randn(2, 64, 32), mask=dgm_kernels.masks.raster_2d(8, 8, 2, include_self=True))
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        embed_dim, num_heads = _positive("embed_dim", embed_dim), _positive("num_heads", num_heads)
        kdim, vdim = (n if n is None else _positive(name, n) for name, n in (("kdim", kdim), ("vdim", vdim)))
        if embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim, {embed_dim}, got {num_heads}")
        for name, flag in (("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
            if flag:
                raise ValueError(f"{name} must be False: such keys are not supported")
        settings: dict[str, Any] = {"kdim": kdim, "vdim": vdim, "batch_first": batch_first}
        settings |= {"device": device, "dtype": dtype}
        super().__init__(embed_dim, num_heads, _check_share("dropout", dropout), bias, **settings)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for so many sequences of at most ``capacity`` tokens."""
        like = self.out_proj.weight
        dtype = autocast_dtype(like.device) or like.dtype
        return KVCache(batch, self.num_heads, capacity, self.head_dim, dtype=dtype, device=like.device)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        mask: Mask | None = None,
        rope: Rotary | None = None,
        bias: Tensor | ALiBi | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of each query to the keys.

        Args:
            query: ``[batch, N, embed_dim]``; ``[N, batch, embed_dim]`` without ``batch_first``; or ``[N, embed_dim]``.
            key, value: alike, of M tokens; None for the query and for the key.
            key_padding_mask: ``[batch, M]``, bool (True: not seen) or added to the scores.
            need_weights: also return the probabilities, in the memory of all scores.
            attn_mask: ``[N, M]`` or ``[batch num_heads, N, M]``, bool (True: not seen) or added to the scores.
            average_attn_weights: return the mean of the heads' probabilities.
            is_causal: queries see the keys up to their own place; ``attn_mask``, which would say so too, is not read.
            mask: structured, in addition to the others; see :mod:`dgm_kernels.masks`.
            rope: rotary positions of queries and keys.
            bias: added to the scores: a tensor that broadcasts to ``[batch, num_heads, N, M]``, or ALiBi.
            cache: of :meth:`new_cache`: holds the tokens so far. Keys and values of these N are appended, and queries
                see those up to their own; ``mask``, ``rope`` and ``bias`` (ALiBi) count all tokens. No gradients, and
                no masks for these tokens alone.

        Returns:
            The result, like query, and the probabilities or None: ``[batch, N, M]``, or with one for each head
            ``[batch, num_heads, N, M]``.

        Raises:
            TypeError, ValueError: an argument has the wrong type, shape, dtype, device or value; the message names it.
        """
        key = query if key is None else key
        value = key if value is None else value
        self._check(query, key, value)
        if mask is not None and not isinstance(mask, Mask):
            raise TypeError(f"mask must be a Mask of dgm_kernels.masks, got {type(mask).__name__}; others: attn_mask")
        if is_causal:
            mask, attn_mask = causal() if mask is None else mask & causal(), None
        q, k, v = (self._split(t) for t in self._project(query, key, value))
        if cache is not None:
            self._check_decoding(key_padding_mask, attn_mask, need_weights)
            return self._merge(self._decode(q, k, v, cache, mask, rope, bias), query), None
        if mask is not None:
            check_mask(mask, q.shape[2], k.shape[2], (*q.shape[:3], k.shape[2]), query)
        hidden, added = self._masks(key_padding_mask, attn_mask, (*q.shape[:3], k.shape[2]), query)
        seen, bias = _two_masks(mask, bias, hidden, added, q, k.shape[2])
        dropout_p = self.dropout if self.training else 0.0
        # The probabilities are the result for values that tell the keys apart.
        ones = torch.eye(k.shape[2], dtype=v.dtype, device=v.device) if need_weights else None
        values = v if ones is None else ones.expand(*k.shape[:2], -1, -1)
        out = cast(Tensor, attention(q, k, values, mask=seen, bias=bias, dropout_p=dropout_p, rope=rope))
        if not need_weights:
            return self._merge(out, query), None
        weights = out.mean(1) if average_attn_weights else out
        return self._merge(out @ v, query), weights if query.dim() == 3 else weights[0]

    def extra_repr(self) -> str:
        """Shown by ``repr``."""
        shown = f"{self.embed_dim}, num_heads={self.num_heads}"
        if not self._qkv_same_embed_dim:
            shown += f", kdim={self.kdim}, vdim={self.vdim}"
        shown += f", dropout={self.dropout}" if self.dropout else ""
        shown += ", bias=False" if self.in_proj_bias is None else ""
        return shown + ("" if self.batch_first else ", batch_first=False")

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values; what is projected from one tensor, in one product."""
        size, bias = self.embed_dim, self.in_proj_bias
        if not self._qkv_same_embed_dim:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        weight = self.in_proj_weight
        if query is key and key is value:
            return F.linear(query, weight, bias).chunk(3, dim=-1)
        parts = (size, 2 * size) if key is value else (size, size, size)
        biases = (None,) * len(parts) if bias is None else bias.split(parts)
        inputs = zip((query, key, value), weight.split(parts), biases, strict=False)
        results = [F.linear(x, w, b) for x, w, b in inputs]
        return (results[0], *results[1].chunk(2, dim=-1)) if key is value else tuple(results)

    def _decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: KVCache,
        mask: Mask | None,
        rope: Rotary | None,
        bias: Tensor | ALiBi | None,
    ) -> Tensor:
        """Appends to the cache and attends; if the call is refused the cache is what it was."""
        if not isinstance(cache, KVCache):
            raise TypeError(f"cache must be a KVCache, got {type(cache).__name__}")
        if k.shape[2] != q.shape[2]:
            raise ValueError(f"key must be as long as query with a cache, {q.shape[2]}, got {k.shape[2]}")
        before = cache.length
        if rope is not None:  # both at once: tokens are few, and calls cost more than they do
            check_rope(rope, before + q.shape[2], self.head_dim, q)
            q, k = rope.apply(torch.cat([q, k], dim=1), before).chunk(2, dim=1)
        cache.append(k, v)
        try:
            return attention_decode(q, cache, mask=mask, bias=bias)  # type: ignore[arg-type]
        except BaseException:  # a call that fails must not leave its tokens behind
            cache.reset(before)
            raise

    def _split(self, x: Tensor) -> Tensor:
        """``[batch, heads, length, features]``."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if x.dim() == 3:
            return x.transpose(0, 1)[None]
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _merge(self, x: Tensor, query: Tensor) -> Tensor:
        """The heads of each token side by side, laid out like the query, and the last projection."""
        if query.dim() == 2:
            x = x[0].transpose(0, 1)
        else:
            x = x.transpose(1, 2) if self.batch_first else x.permute(2, 0, 1, 3)
        return self.out_proj(x.flatten(-2))

    def _masks(
        self, key_padding_mask: Tensor | None, attn_mask: Tensor | None, scores: tuple[int, ...], query: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """PyTorch's masks as two: bool, True where a key is hidden, and what is added to the scores."""
        batch, heads, n, m = scores
        of_keys = [((batch, m) if query.dim() == 3 else (m,), (batch, 1, 1, m))]
        of_scores = [((n, m), (1, 1, n, m)), ((batch * heads, n, m), (batch, heads, n, m))]
        hidden = added = None
        for mask in (
            _as_scores("key_padding_mask", key_padding_mask, of_keys, query),
            _as_scores("attn_mask", attn_mask, of_scores, query),
        ):
            if mask is not None and mask.dtype == torch.bool:
                hidden = mask if hidden is None else hidden | mask
            elif mask is not None:
                added = mask if added is None else added + mask
        return hidden, added

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        sizes = (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim))
        for name, x, size in sizes:
            if not isinstance(x, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
            if x.dim() != query.dim() or x.dim() not in (2, 3) or x.shape[-1] != size:
                layout = "batch, length" if self.batch_first else "length, batch"
                expected = f"[length, {size}]" if query.dim() == 2 else f"[{layout}, {size}]"
                raise ValueError(f"{name} must have shape {expected}, got {tuple(x.shape)}")
        if value.shape[:-1] != key.shape[:-1]:
            expected = f"{tuple(key.shape[:-1])}, got {tuple(value.shape[:-1])}"
            raise ValueError(f"value must have the batch and length of key, {expected}")
        if query.dim() == 3:
            place = 0 if self.batch_first else 1
            if key.shape[place] != query.shape[place]:
                raise ValueError(f"key must have the batch of query, {query.shape[place]}, got {key.shape[place]}")

    def _check_decoding(self, key_padding_mask: Tensor | None, attn_mask: Tensor | None, need_weights: bool) -> None:
        """What decoding from a cache has no use for."""
        for name, value in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if value is not None:
                raise ValueError(f"{name} must be None with a cache, which takes structured masks only: mask=")
        if need_weights:
            raise ValueError("need_weights must be False with a cache")
        if self.training and self.dropout > 0:
            raise ValueError("cache must be None in training with dropout: call eval() first")


def _as_scores(
    name: str, value: object, shapes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], query: Tensor
) -> Tensor | None:
    """A mask in the shape of the scores; ``shapes`` are those that it may have, each with what becomes of it."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {type(value).__name__}")
    if value.dtype != torch.bool and not value.is_floating_point():
        raise TypeError(f"{name} must be bool or floating-point, got {value.dtype}")
    check_device(name, value, query, "query")
    for shape, wide in shapes:
        if tuple(value.shape) == shape:
            return value.reshape(wide)
    expected = " or ".join(str(shape) for shape, _ in shapes)
    raise ValueError(f"{name} must have shape {expected}, got {tuple(value.shape)}")


def _two_masks(
    mask: Mask | None,
    bias: Tensor | ALiBi | None,
    hidden: Tensor | None,
    added: Tensor | None,
    q: Tensor,
    keys: int,
) -> tuple[Mask | Tensor | None, Tensor | ALiBi | None]:
    """All masks and biases as the two arguments of attention; a structured mask stays one as long as there is room."""
    if isinstance(bias, Tensor):
        added, bias = bias if added is None else bias + added, None
    if bias is None:
        if mask is None:
            return None if hidden is None else ~hidden, added
        if hidden is not None:
            added = torch.where(hidden, -torch.inf, q.new_zeros(()) if added is None else added)
        return mask, added
    if hidden is None and added is None:
        return mask, bias
    if mask is not None:
        outside = ~mask.dense(q.shape[2], keys, device=q.device)
        hidden = outside if hidden is None else hidden | outside
    if added is None:
        return None if hidden is None else ~hidden, bias
    return added if hidden is None else torch.where(hidden, -torch.inf, added), bias


class TransformerBlock(nn.Module):
    """Attention among tokens, attention to a context if there is one, and an MLP: each ``x + f(layer_norm(x))``.

    Args:
        width: features of a token.
        heads: of the attentions, a divisor of ``width``.
        mlp_ratio: features inside the MLP, as a multiple of ``width``.
        dropout: share of what each of the three adds that is dropped in training.
        attention_dropout: share of the probabilities of attention that is dropped in training.
        cross_width: features of a context, such as a text, that the tokens also attend to; None for no context.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value; the message names it.

    Source: Vaswani et al., "Attention Is All You Need", 2017; with the normalisation first, Radford et al., "Language
    Models are Unsupervised Multitask Learners", 2019.

    Example:
        >>> block = TransformerBlock(32, heads=4, cross_width=16)
        >>> image = block(torch.randn(2, 32, 8, 8), torch.randn(2, 5, 16))
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        mlp_ratio: float = 4,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        cross_width: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        width, heads = _positive("width", width), _positive("heads", heads)
        if width % heads:
            raise ValueError(f"heads must divide width, {width}, got {heads}")
        if isinstance(mlp_ratio, bool) or not isinstance(mlp_ratio, (int, float)):
            raise TypeError(f"mlp_ratio must be a number, got {type(mlp_ratio).__name__}")
        if not 1 <= (hidden := int(mlp_ratio * width)) < 2**31:
            raise ValueError(f"mlp_ratio must give the MLP at least one feature, got {mlp_ratio}")
        self.width, self.cross_width = width, cross_width
        shared = _check_share("attention_dropout", attention_dropout)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.attention_norm = nn.LayerNorm(width, **where)
        self.attention = MultiheadAttention(width, heads, shared, **where)
        if cross_width is not None:
            size = _positive("cross_width", cross_width)
            self.cross_norm = nn.LayerNorm(width, **where)
            self.cross_attention = MultiheadAttention(width, heads, shared, kdim=size, vdim=size, **where)
        self.mlp_norm = nn.LayerNorm(width, **where)
        layers = (nn.Linear(width, hidden, **where), nn.GELU(), nn.Linear(hidden, width, **where))
        self.mlp = nn.Sequential(*layers)
        self.dropout = nn.Dropout(_check_share("dropout", dropout))

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for so many sequences of at most ``capacity`` tokens."""
        return self.attention.new_cache(batch, capacity)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        context_mask: Tensor | None = None,
        mask: Mask | None = None,
        rope: Rotary | None = None,
        bias: Tensor | ALiBi | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The tokens after the block.

        Args:
            x: ``[batch, tokens, width]``, or an image ``[batch, width, height, columns]``, whose tokens are its pixels
                in raster order.
            context: ``[batch, M, cross_width]``, if the block takes one.
            context_mask: bool ``[batch, M]``, False for tokens of the context that are padding.
            mask, rope, bias: of the attention among the tokens of x; see :class:`MultiheadAttention`.
            cache: of :meth:`new_cache`: x are the next tokens, and those before them are in it.

        Returns:
            Like x.

        Raises:
            TypeError, ValueError: an argument has the wrong type, shape, dtype, device or value; the message names it.
        """
        self._check(x, context, context_mask)
        if x.dim() == 4:
            tokens = x.flatten(2).transpose(1, 2)
            masks: dict[str, Any] = {"context_mask": context_mask, "mask": mask, "rope": rope, "bias": bias}
            return self.forward(tokens, context, cache=cache, **masks).transpose(1, 2).unflatten(2, x.shape[2:])
        x = x + self.dropout(self.attention(self.attention_norm(x), mask=mask, rope=rope, bias=bias, cache=cache)[0])
        if context is not None:
            padding = None if context_mask is None else ~context_mask
            x = x + self.dropout(self.cross_attention(self.cross_norm(x), context, key_padding_mask=padding)[0])
        return x + self.dropout(self.mlp(self.mlp_norm(x)))

    def _check(self, x: Tensor, context: Tensor | None, context_mask: Tensor | None) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        if x.dim() not in (3, 4) or x.shape[2 if x.dim() == 3 else 1] != self.width:
            expected = f"[batch, tokens, {self.width}] or [batch, {self.width}, height, columns]"
            raise ValueError(f"x must have shape {expected}, got {tuple(x.shape)}")
        if self.cross_width is None:
            for name, value in (("context", context), ("context_mask", context_mask)):
                if value is not None:
                    raise ValueError(f"{name} must be None: this block has no cross_width")
            return
        if context is None:
            raise ValueError("context must be given: this block has a cross_width")
        if not isinstance(context, Tensor):
            raise TypeError(f"context must be a tensor, got {type(context).__name__}")
        if context.dim() != 3 or context.shape[0] != x.shape[0] or context.shape[2] != self.cross_width:
            expected = f"[{x.shape[0]}, tokens, {self.cross_width}]"
            raise ValueError(f"context must have shape {expected}, got {tuple(context.shape)}")
        if context_mask is None:
            return
        if not isinstance(context_mask, Tensor) or context_mask.dtype != torch.bool:
            found = getattr(context_mask, "dtype", type(context_mask).__name__)
            raise TypeError(f"context_mask must be a bool tensor, got {found}")
        if context_mask.shape != context.shape[:2]:
            sizes = tuple(context.shape[:2])
            raise ValueError(f"context_mask must have shape {sizes}, got {tuple(context_mask.shape)}")


def _positive(name: str, value: object) -> int:
    number = as_int(value)
    if number is None:
        raise TypeError(f"{name} must be an int, got {value!r}")
    if number < 1:
        raise ValueError(f"{name} must be positive, got {number}")
    return number


def _check_share(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {value}")
    return float(value)
