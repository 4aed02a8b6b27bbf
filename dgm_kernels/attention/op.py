"""Schemas, fake kernels and gradients of the attention op."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._core import ops
from .._core.autocast import full_precision
from .._core.layout import memory_order
from . import reference
from .positions import Rotary

_TRITON = "dgm_kernels.attention.triton"
BACKENDS = ("cpp", "triton")
MOST_FEATURES = 1024  # of a head: the CPU kernels have buffers for a row


class Settings(NamedTuple):
    """What a call says beside q, k and v, in the order of the schema.

    Query i stands at position ``first + i``, key j at position j.
    """

    bounds: Tensor | None  # int32 [queries, 2]: the keys from the first number to before the second are seen,
    width: int  # of these, those whose column in a picture of this width
    radius: int  # is at most so far from the query's; width 0: all
    keep: Tensor | None  # bool [batch, heads, queries, keys]: keys that are seen
    bias: Tensor | None  # [batch, heads, queries, keys]: added to the scores
    slopes: Tensor | None  # float32 [heads]: of ALiBi
    rope: Tensor | None  # float32 [positions, pairs, 2]: cosines and sines
    interleaved: bool  # pairs of features of rope are neighbours
    first: int
    scale: float


_SETTINGS = (
    "Tensor? bounds, int width, int radius, Tensor? keep, Tensor? bias, Tensor? slopes, Tensor? rope, "
    "bool interleaved, SymInt first, float scale"
)
_COUNT = len(Settings._fields)


def dense_form(q: Tensor, k: Tensor, s: Settings) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """q and k rotated, and everything that masks or adds as two tensors: what the reference takes."""
    if s.rope is not None:
        rotary = Rotary(s.rope, s.interleaved)
        q, k = rotary.apply(q, s.first), rotary.apply(k)
    queries, keys = q.shape[-2], k.shape[-2]
    i = torch.arange(s.first, s.first + queries, device=q.device)[:, None]
    j = torch.arange(keys, device=q.device)
    keep, bias = s.keep, s.bias
    if s.bounds is not None:
        seen = (j >= s.bounds[:, :1]) & (j < s.bounds[:, 1:])
        if s.width:
            seen = seen & ((i % s.width - j % s.width).abs() <= s.radius)
        keep = seen if keep is None else seen & keep
    if s.slopes is not None:
        falling = -s.slopes[:, None, None] * (i - j).abs()
        bias = falling if bias is None else bias + falling
    return q, k, keep, bias


def attend_dense(q: Tensor, k: Tensor, v: Tensor, s: Settings) -> tuple[Tensor, Tensor]:
    """The op on the reference."""
    q, k, keep, bias = dense_form(q, k, s)
    return reference.attention(q, k, v, keep, bias, s.scale)


def empty_like_queries(q: Tensor, features: int) -> Tensor:
    """A result ``[batch, heads, queries, features]`` with its dimensions in memory in the order of those of ``q``."""
    order = memory_order(q)
    if order is None or order[-1] != 3:
        return q.new_empty((*q.shape[:3], features))
    return torch.empty_permuted((*q.shape[:3], features), order, dtype=q.dtype, device=q.device)


# ---- Attention. Saves q, k, v, the result and the log of the softmax's denominator.


def _fake(q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return empty_like_queries(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)


def _fake_backward(grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    return tuple(empty_like_queries(t, t.shape[-1]) for t in (q, k, v))


def _fake_jvp(q: Tensor, k: Tensor, v: Tensor, tq: Tensor, tk: Tensor, tv: Tensor, *rest: Any) -> Any:
    return _fake(q, k, v)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *settings = inputs
    s = Settings(*settings)
    ctx.save_for_backward(q, k, v, *output, s.bounds, s.keep, s.bias, s.slopes, s.rope)
    ctx.numbers = {name: getattr(s, name) for name in ("width", "radius", "interleaved", "first", "scale")}
    ctx.set_materialize_grads(False)


def _saved(ctx: Any, tensors: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], Settings]:
    names = ("bounds", "keep", "bias", "slopes", "rope")
    return tensors[:-5], Settings(**dict(zip(names, tensors[-5:], strict=True)), **ctx.numbers)


def _backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    """With P the probabilities and dP = dO V^T: dV = P^T dO, dS = P (dP - sum(dO O) + dlse), dQ = dS K, dK = dS^T Q."""
    (q, k, v, out, lse), s = _saved(ctx, ctx.saved_tensors)
    others = (None,) * _COUNT
    if grad is None and grad_lse is None:
        return (None,) * 3 + others
    if torch.is_grad_enabled():
        seeds = (grad, None if grad_lse is None else grad_lse.to(torch.float32))
        return (*ops.differentiable_vjp(lambda q, k, v: attend_dense(q, k, v, s), (q, k, v), seeds), *others)
    grad = torch.zeros_like(out) if grad is None else grad
    grads = backward[ctx.backend](grad, grad_lse, q, k, v, out, lse, *s)
    return (*(g if n else None for g, n in zip(grads, ctx.needs_input_grad, strict=False)), *others)


attend = ops.define(
    "attention",
    f"(Tensor q, Tensor k, Tensor v, {_SETTINGS}) -> (Tensor, Tensor)",
    _fake,
    _TRITON,
    _context,
    _backward,
    backends=BACKENDS,
)
backward = ops.define(
    "attention_backward",
    "(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_SETTINGS}) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
    _TRITON,
    backends=BACKENDS,
)


# ---- Directional derivative of attention, of the result and of the log of the denominator.


def _jvp_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    s = Settings(*inputs[8:])
    ctx.save_for_backward(*inputs[:6], s.bounds, s.keep, s.bias, s.slopes, s.rope)
    ctx.numbers = {name: getattr(s, name) for name in ("width", "radius", "interleaved", "first", "scale")}
    ctx.set_materialize_grads(False)


def _jvp_backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    """Second derivatives, by the reference."""
    tensors, s = _saved(ctx, ctx.saved_tensors)
    others = (None,) * (2 + _COUNT)
    if grad is None and grad_lse is None:
        return (None,) * 6 + others

    def tangents(*operands: Tensor) -> tuple[Tensor, Tensor]:
        return tangents_dense(operands[:3], operands[3:], s)

    with torch.enable_grad(), full_precision(tensors[0].device):
        return (*ops.differentiable_vjp(tangents, tensors, (grad, grad_lse)), *others)


def tangents_dense(operands: Any, tangents: Any, s: Settings) -> tuple[Tensor, Tensor]:
    """The directional derivative by the product rule, in operations that autograd can differentiate.

    With S' = scale (Q' K^T + Q K'^T) and m = sum P S': O' = (P (S' - m)) V + P V', and m is that of the denominator.
    """
    (q, k, v), (tq, tk, tv) = operands, tangents
    dtype = q.dtype
    wide = [t.to(torch.promote_types(dtype, torch.float32)) for t in (q, k, v, tq, tk, tv)]
    q, k, keep, bias = dense_form(wide[0], wide[1], s)
    tq, tk, *_ = dense_form(wide[3], wide[4], s)
    v, tv = wide[2], wide[5]
    if k.shape[1] != q.shape[1]:
        k, v, tk, tv = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v, tk, tv))
    eye = torch.eye(k.shape[-2], dtype=q.dtype, device=q.device).expand(*k.shape[:2], -1, -1)
    weights, _ = reference.attention(q, k, eye, keep, bias, s.scale)
    moved = s.scale * (tq @ k.transpose(-2, -1) + q @ tk.transpose(-2, -1))
    mean = (weights * moved).sum(-1, keepdim=True)
    tangent = (weights * (moved - mean)) @ v + weights @ tv
    return tangent.to(dtype), mean.squeeze(-1)


jvp = ops.define(
    "attention_jvp",
    "(Tensor q, Tensor k, Tensor v, Tensor tq, Tensor tk, Tensor tv, Tensor out, Tensor lse, "
    f"{_SETTINGS}) -> (Tensor, Tensor)",
    _fake_jvp,
    _TRITON,
    _jvp_context,
    _jvp_backward,
    backends=BACKENDS,
)


class ForwardMode(torch.autograd.Function):
    """The op for forward-mode AD: of dual numbers and under ``torch.func.jvp``, with gradients beside them.

    In the newer form of an autograd function, which functional transforms ask for.
    """

    @staticmethod
    def forward(backend: str, q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> Any:
        return ops.call(attend[backend], False, q, k, v, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.backend, *rest = inputs
        _context(ctx, tuple(rest), output)
        s = Settings(*rest[3:])
        ctx.save_for_forward(*rest[:3], *output, s.bounds, s.keep, s.bias, s.slopes, s.rope)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        ctx_grads = _backward(_Shifted(ctx), grad, grad_lse)
        return (None, *ctx_grads)

    @staticmethod
    def jvp(ctx: Any, _: None, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, *others: Any) -> Any:
        (q, k, v, out, lse), s = _saved(ctx, ctx.saved_tensors)
        # Without their tangents, since Tangent has no forward mode of its own.
        q, k, v, out, lse = (forward_ad.unpack_dual(t).primal for t in (q, k, v, out, lse))
        tangents = [torch.zeros_like(t) if d is None else d.to(t.dtype) for t, d in ((q, tq), (k, tk), (v, tv))]
        operands = [last_contiguous(t) for t in tangents]
        return Tangent.apply(ctx.backend, q, k, v, *operands, out, lse, *s)


class Tangent(torch.autograd.Function):
    """The directional derivative with a gradient of its own; under functional transforms too."""

    @staticmethod
    def forward(backend: str, *inputs: Any) -> Any:
        return ops.call(jvp[backend], False, *inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.backend = inputs[0]
        _jvp_context(ctx, inputs[1:], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        return (None, *_jvp_backward(ctx, grad, grad_lse))


class _Shifted:
    """A context whose first input, the backend's name, is not counted."""

    def __init__(self, ctx: Any) -> None:
        self.saved_tensors, self.numbers, self.backend = ctx.saved_tensors, ctx.numbers, ctx.backend
        self.needs_input_grad = ctx.needs_input_grad[1:]


def last_contiguous(x: Tensor) -> Tensor:
    """``x`` itself if its features lie one after the other, as kernels read them; else a contiguous copy."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


# ---- One query of each head against cached keys.


def _fake_decode(q: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> Tensor:
    return q.new_empty((*q.shape[:3], values.shape[-1]))


decode = ops.define(
    "attention_decode",
    "(Tensor q, Tensor keys, Tensor values, SymInt begin, SymInt end, int width, int radius, Tensor? slopes, "
    "SymInt position, float scale) -> Tensor",
    _fake_decode,
    _TRITON,
    backends=BACKENDS,
)


def refuse_features(q: Tensor, v: Tensor) -> str | None:
    """Why no kernel takes heads of that many features; None if they do."""
    most = max(q.shape[-1], v.shape[-1])
    return f"heads of more than {MOST_FEATURES} features run on the reference" if most > MOST_FEATURES else None


def default_scale(features: int) -> float:
    """``1 / sqrt(features)``, that of F.scaled_dot_product_attention."""
    return 1.0 / math.sqrt(max(1, features))
