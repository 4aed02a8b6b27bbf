"""The attention op in plain PyTorch: the specification, and what runs where no native backend does."""

from __future__ import annotations

import torch
from torch import Tensor

from .._core.autocast import full_precision


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    bias: Tensor | None,
    scale: float,
    multiplier: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T + bias) v over the keys that ``keep`` has True, and the log of the softmax's denominator.

    A query without any key has the result 0 and the denominator 0. The scores and the softmax are float32 at least.

    Args:
        q: ``[batch, heads, queries, features]``.
        k, v: ``[batch, key heads, keys, ...]``; ``heads / key heads`` heads in a row share a key head.
        keep, bias: broadcast to ``[batch, heads, queries, keys]``.
        multiplier: of the probabilities, for dropout.
    """
    with full_precision(q.device):
        return _attention(q, k, v, keep, bias, scale, multiplier)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, bias: Tensor | None, scale: float, multiplier: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = q.dtype
    q, k, v = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k, v))
    if k.shape[1] != q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = scale * (q @ k.transpose(-2, -1))
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if keep is not None:
        scores = scores.masked_fill(~keep, -torch.inf)
    if scores.shape[-1] == 0:
        return (scores @ v).to(dtype), scores.sum(-1) - torch.inf
    # Without torch.logsumexp, whose forward-mode derivative writes in place to what its backward pass needs.
    top = scores.detach().amax(-1, keepdim=True)
    blind = top == -torch.inf
    top = top.masked_fill(blind, 0.0)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True).masked_fill(blind, 1.0)
    weights = weights / total
    if multiplier is not None:
        weights = weights * multiplier
    return (weights @ v).to(dtype), (top + total.log()).masked_fill(blind, -torch.inf).squeeze(-1)
