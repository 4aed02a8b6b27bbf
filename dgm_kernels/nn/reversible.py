"""A chain of invertible layers that trains in memory constant in its depth: the backward pass rebuilds activations."""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .._core.backends import is_traced
from .._core.checks import check_batch

RngState = tuple[Tensor, ...]  # of the CPU, and of the device if that is another


class Coupling(nn.Module, ABC):
    """Base class of coupling layers: a transform whose parameters are a function of what it leaves unchanged.

    A subclass defines :meth:`condition` and :meth:`transform`. What it gains over a module with ``forward`` and
    ``inverse`` of its own: the backward pass of :class:`Reversible` evaluates ``condition`` once instead of twice.
    """

    @abstractmethod
    def condition(self, x: Tensor, *context: Any) -> Tensor | tuple[Tensor, ...]:
        """The parameter or parameters of the transform.

        May read only those elements of ``x`` that ``transform`` does not change.
        """

    @abstractmethod
    def transform(self, x: Tensor, *parameters: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """``(y, logdet)`` of the layer with these parameters, or of its inverse."""

    def forward(self, x: Tensor, *context: Any) -> tuple[Tensor, Tensor]:
        """y and the log-determinant."""
        return self.transform(x, *_as_tuple(self.condition(x, *context)))

    def inverse(self, y: Tensor, *context: Any) -> tuple[Tensor, Tensor]:
        """x and the log-determinant of the inverse."""
        return self.transform(y, *_as_tuple(self.condition(y, *context)), inverse=True)


def _as_tuple(parameters: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (parameters,) if isinstance(parameters, Tensor) else tuple(parameters)


def _is_plain_coupling(layer: nn.Module) -> TypeGuard[Coupling]:
    """Whether calling the layer is ``condition`` and ``transform`` and nothing else."""
    return (
        isinstance(layer, Coupling)
        and type(layer).forward is Coupling.forward
        and type(layer).inverse is Coupling.inverse
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._compiled_call_impl)
    )


class Reversible(nn.Module):
    """Invertible layers one after the other, trained in memory constant in their number.

    In training mode only the output is kept. The backward pass goes through the layers from the last to the first,
    rebuilds the input of each with the layer's inverse, runs the layer again and differentiates it: the gradients of
    parameters, ``x`` and context are those of the plain chain, to the rounding of the inverses. That costs an inverse
    and a forward pass more than the plain chain (with :class:`Coupling` layers about one evaluation of their networks).

    The plain chain runs where there is nothing to save or no way to: in eval mode, without gradients, in forward-mode
    AD, in ``torch.func`` transforms and under ``torch.compile`` (whose own partitioner decides on memory; to have both,
    compile the layers or their networks one by one). ``create_graph=True`` is refused in training mode.

    Random numbers that a layer draws, such as dropout in its network, are drawn again from the same generator state,
    for the inverse too; autocast is as in the forward pass; buffers, such as the running statistics of a batch
    normalisation in a network, change once, and are in the backward pass what they were. Not supported are layers whose
    inverse in training mode undoes something else than what forward did (batch normalisation of ``x`` itself: use
    :class:`ActNorm`; forward hooks that change the output), and tensors with gradients that are neither parameters of
    the layers nor context: their gradients would be missing.

    Args:
        layers: modules with ``forward(x, *context) -> (y, logdet)`` and ``inverse(y, *context) -> (x, logdet)``,
            logdet of shape ``[batch]``. All of them get the context; they are found as ``.layers``.
        tolerance: if given, the backward pass raises FloatingPointError where an element of the rebuilt ``x`` is off
            by more than that. It keeps ``x`` and waits for the device.
        preserve_rng_state: False saves the bookkeeping if no layer draws random numbers.

    Raises:
        TypeError, ValueError: there is no layer, or one is no module or has no inverse; the message has its index.

    Source: Gomez et al., "The Reversible Residual Network: Backpropagation Without Storing Activations", 2017.

    Example:
        >>> flow = Reversible([ActNorm(8), ActNorm(8)])
        >>> z, logdet = flow(torch.randn(64, 8))
        >>> x, _ = flow.inverse(z)
    """

    def __init__(
        self, layers: Iterable[nn.Module], *, tolerance: float | None = None, preserve_rng_state: bool = True
    ) -> None:
        super().__init__()
        layers = list(layers)
        if not layers:
            raise ValueError("layers must hold at least one layer")
        for i, layer in enumerate(layers):
            if not isinstance(layer, nn.Module):
                raise TypeError(f"layers[{i}] must be a torch.nn.Module, got {type(layer).__name__}")
            if not callable(getattr(layer, "inverse", None)):
                raise TypeError(f"layers[{i}] must have a method inverse, got {type(layer).__name__}, which has none")
        if tolerance is not None and not tolerance > 0:
            raise ValueError(f"tolerance must be None or positive, got {tolerance!r}")
        self.layers = nn.ModuleList(layers)
        self.tolerance = tolerance
        self.preserve_rng_state = preserve_rng_state

    def forward(self, x: Tensor, *context: Tensor | None) -> tuple[Tensor, Tensor]:
        """y and the sum of the layers' log-determinants ``[batch]``."""
        check_batch("x", x)
        return self._run(x, context, inverse=False)

    def inverse(self, y: Tensor, *context: Tensor | None) -> tuple[Tensor, Tensor]:
        """x and the log-determinant of the inverse ``[batch]``; in training mode it saves memory like ``forward``."""
        check_batch("y", y)
        return self._run(y, context, inverse=True)

    def _run(self, x: Tensor, context: tuple[Tensor | None, ...], inverse: bool) -> tuple[Tensor, Tensor]:
        for i, value in enumerate(context):
            if value is not None and not isinstance(value, Tensor):
                raise TypeError(f"context[{i}] must be a tensor or None, got {type(value).__name__}")
        layers = list(reversed(self.layers)) if inverse else list(self.layers)
        if self.training and torch.is_grad_enabled() and not is_traced():
            parameters = list(self.parameters())
            if any(t is not None and t.requires_grad for t in (x, *context, *parameters)):
                return _Chain.apply(self, layers, inverse, len(context), x, *context, *parameters)
        logdets = []
        for layer in layers:
            x, logdet = _call(layer, x, context, inverse)
            logdets.append(logdet)
        return x, functools.reduce(torch.add, logdets)


def _call(layer: Any, x: Tensor, context: Sequence[Tensor | None], inverse: bool) -> tuple[Tensor, Tensor]:
    """The layer or its inverse, whose answer is checked: a logdet that broadcasts would be summed up wrongly."""
    outputs = layer.inverse(x, *context) if inverse else layer(x, *context)
    name = f"{type(layer).__name__}.{'inverse' if inverse else 'forward'}"
    if not (isinstance(outputs, tuple) and len(outputs) == 2 and all(isinstance(t, Tensor) for t in outputs)):
        raise TypeError(f"{name} must return two tensors (y, logdet), got {type(outputs).__name__}")
    if outputs[1].shape != x.shape[:1]:
        raise ValueError(f"{name} must return logdet of shape {tuple(x.shape[:1])}, got {tuple(outputs[1].shape)}")
    return outputs


class _Visit(NamedTuple):
    """What the backward pass has to know about the forward pass of one layer."""

    layer: nn.Module
    dtype: torch.dtype  # of its input
    rng: RngState | None  # at its beginning, if it drew random numbers
    parameters: dict[str, int]  # their places among the chain's
    buffers: dict[str, Tensor]  # at its beginning: copies of those that it changed


class _Chain(torch.autograd.Function):
    """The layers without a graph; saves the output, the context and the parameters.

    The parameters are arguments, so that their gradients take the usual way, with its hooks.
    """

    @staticmethod
    def forward(
        ctx: Any, chain: Reversible, layers: list[nn.Module], inverse: bool, n_context: int, x: Tensor, *others: Any
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.inverse, ctx.n_context, ctx.tolerance, ctx.device = inverse, n_context, chain.tolerance, x.device
        ctx.autocast = _autocast_state(x.device)
        ctx.visits = []
        places = {id(parameter): i for i, parameter in enumerate(others[n_context:])}
        y, logdets = x, []
        rng = _get_rng_state(x.device) if chain.preserve_rng_state else None
        with _autocast(ctx.autocast):
            for layer in layers:
                dtype, before = y.dtype, rng
                buffers = {name: (buffer, buffer._version, buffer.clone()) for name, buffer in layer.named_buffers()}
                y, logdet = _call(layer, y, others[:n_context], inverse)
                logdets.append(logdet)
                if before is not None:
                    rng = _get_rng_state(x.device)
                    before = None if all(map(torch.equal, before, rng)) else before
                parameters = {name: places[id(parameter)] for name, parameter in layer.named_parameters()}
                kept = {n: old if b._version != version else b for n, (b, version, old) in buffers.items()}
                ctx.visits.append(_Visit(layer, dtype, before, parameters, kept))
        ctx.save_for_backward(y, None if chain.tolerance is None else x, *others)
        return y, functools.reduce(torch.add, logdets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_logdet: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # once_differentiable would let torch.autograd.grad leave terms out silently
            raise RuntimeError(
                "Reversible has no second derivatives in training mode; in eval mode, that of the plain chain, it has"
            )
        y, original, *others = ctx.saved_tensors
        context, parameters = others[: ctx.n_context], others[ctx.n_context :]
        grads: list[Tensor | None] = [None] * len(others)
        draws = any(visit.rng is not None for visit in ctx.visits)
        rng = _get_rng_state(ctx.device) if draws else None
        try:
            with _autocast(ctx.autocast):
                for place, visit in reversed(list(enumerate(ctx.visits))):
                    needs = place > 0 or ctx.needs_input_grad[4]
                    y, grad, found = _differentiate(
                        visit, y, context, parameters, (grad, grad_logdet), ctx.inverse, needs
                    )
                    for i, value in found.items():
                        grads[i] = _add(grads[i], value)
        finally:
            _set_rng_state(ctx.device, rng)
        if original is not None and original.numel():
            error = float((y - original).abs().max())
            if not error <= ctx.tolerance:
                raise FloatingPointError(
                    f"the rebuilt x is off by {error:.3g}, above the tolerance of {ctx.tolerance:g}: "
                    "the inverses of the layers lose too much precision"
                )
        return (None, None, None, None, grad, *grads)


def _differentiate(
    visit: _Visit,
    y: Tensor,
    context: list[Tensor | None],
    parameters: list[Tensor],
    grads: tuple[Tensor | None, Tensor | None],
    inverse: bool,
    needs_x: bool,
) -> tuple[Tensor, Tensor | None, dict[int, Tensor | None]]:
    """The layer's input, its gradient, and those of context and parameters, by their places among the two.

    The layer runs with the saved parameters as new leaves: hooks on the parameters see the whole gradient, once, and
    what ``functional_call`` had put in is in again. It gets copies of its buffers, so that they do not change twice.
    """
    own = {name: _leaf(parameters[i], parameters[i].requires_grad) for name, i in visit.parameters.items()}
    buffers = {name: buffer.clone() for name, buffer in visit.buffers.items()}
    given = [None if t is None else _leaf(t, t.requires_grad) for t in context]
    state = {f"layer.{name}": t for name, t in (own | buffers).items()}
    with torch.enable_grad():
        xs, outputs = functional_call(_Rerun(visit), state, (y, given, inverse, needs_x))
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
    leaves = [*xs, *given, *own.values()]
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    if not pairs or not wanted:
        return xs[0].detach(), None, {}
    found = torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
    by_leaf = dict(zip(map(id, wanted), found, strict=True))
    places = (*range(len(given)), *(len(given) + i for i in visit.parameters.values()))
    others = {place: by_leaf.get(id(t)) for place, t in zip(places, leaves[len(xs) :], strict=True)}
    grad = None
    for x in xs:
        grad = _add(grad, by_leaf.get(id(x)))
    return xs[0].detach(), grad, others


class _Rerun(nn.Module):
    """Rebuilds a layer's input and runs it again; a module, because that is what functional_call takes."""

    def __init__(self, visit: _Visit) -> None:
        super().__init__()
        self.layer, self.visit = visit.layer, visit

    def forward(
        self, y: Tensor, context: list[Tensor | None], inverse: bool, needs_x: bool
    ) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
        """Leaves whose gradients add up to that of the input, of which the first is the input, and the outputs."""
        layer, dtype = self.layer, self.visit.dtype
        _set_rng_state(y.device, self.visit.rng)
        if _is_plain_coupling(layer):
            passed = _leaf(y.to(dtype), needs_x)  # where condition reads, it is x
            parameters = _as_tuple(layer.condition(passed, *context))
            with torch.no_grad():
                x, _ = layer.transform(y, *parameters, inverse=not inverse)
            x = _leaf(x.to(dtype), needs_x)
            return [x, passed], layer.transform(x, *parameters, inverse=inverse)
        with torch.no_grad():
            x, _ = _call(layer, y, context, not inverse)
            for name, buffer in layer.named_buffers():
                buffer.copy_(self.visit.buffers[name])
        x = _leaf(x.to(dtype), needs_x)
        _set_rng_state(y.device, self.visit.rng)
        return [x], _call(layer, x, context, inverse)


def _leaf(x: Tensor, requires_grad: bool) -> Tensor:
    return x.detach().requires_grad_(requires_grad)


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _get_rng_state(device: torch.device) -> RngState:
    """Of the CPU and of the device."""
    if device.type in ("cpu", "meta"):
        return (torch.get_rng_state(),)
    return torch.get_rng_state(), torch.get_device_module(device).get_rng_state(device)


def _set_rng_state(device: torch.device, state: RngState | None) -> None:
    if state is None:
        return
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.get_device_module(device).set_rng_state(state[1], device)


def _autocast_state(device: torch.device) -> dict[str, tuple[bool, torch.dtype]]:
    """Of each device type in use: whether autocast is on, and its dtype."""
    types = filter(torch.amp.is_autocast_available, {"cpu", device.type})
    return {t: (torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in types}


@contextlib.contextmanager
def _autocast(state: dict[str, tuple[bool, torch.dtype]]) -> Iterator[None]:
    """Autocast as it was; without its cache, which would hand weights cast without gradients to code with gradients."""
    with contextlib.ExitStack() as stack:
        for device_type, (enabled, dtype) in state.items():
            stack.enter_context(torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False))
        yield
