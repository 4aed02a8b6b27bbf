"""Defines an op of namespace ``dgm`` once for every native backend."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import extension, interpreted

NATIVE = ("cpp", "cuda", "triton")
_functions: dict[Callable[..., Any], type[torch.autograd.Function]] = {}
_library = torch.library.Library("dgm", "FRAGMENT")


def define(
    name: str,
    schema: str,
    fake: Callable[..., Any],
    triton_module: str,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    backends: Sequence[str] = NATIVE,
) -> dict[str, Callable[..., Any]]:
    """Defines ``dgm::<name>.cpp``, ``.cuda`` and ``.triton`` with one schema, fake kernel and backward formula.

    The C++ kernels register themselves when the extension loads; the Triton launcher is the function ``name`` of
    ``triton_module``, imported at the first call. ``backends`` are those that the op has kernels for; the backward
    formula finds the one that ran as ``ctx.backend``.

    Returns:
        The callable of each backend.
    """
    extension()
    contexts = {backend: _with_backend(setup_context, backend) for backend in backends}
    for backend in backends:
        _library.define(f"{name}.{backend}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"dgm::{name}.{backend}", fake, lib=_library)
        if backward is not None:
            torch.library.register_autograd(
                f"dgm::{name}.{backend}", backward, setup_context=contexts[backend], lib=_library
            )

    def launch(*args: Any) -> Any:
        return getattr(importlib.import_module(triton_module), name)(*args)

    if "triton" in backends:
        for key in ("CUDA", "CPU") if interpreted() else ("CUDA",):
            _library.impl(f"{name}.triton", launch, key)
    packet = getattr(torch.ops.dgm, name)
    overloads = {backend: getattr(packet, backend) for backend in backends}
    if backward is not None:
        for backend, overload in overloads.items():
            _functions[overload] = _function(overload, contexts[backend], backward)
    return overloads


def _with_backend(setup_context: Callable[..., None] | None, backend: str) -> Callable[..., None]:
    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.backend = backend
        if setup_context is not None:
            setup_context(ctx, inputs, output)

    return setup


def _function(
    op: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """The op and its formulas as an autograd function.

    In the older form, whose forward takes the context: the newer one inspects the signature at every call.
    """

    def forward(ctx: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*args)
        setup_context(ctx, args, output)
        return output

    return type(
        "Function", (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    )


def differentiable_vjp(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Gradients of a function with respect to its inputs, themselves differentiable.

    The function gets views of the inputs and is differentiated with respect to those: an input that depends on another
    one, such as an x that was rebuilt from an output and a parameter, brings no second share.
    """
    if torch._C._functorch.maybe_current_level() is not None:
        outputs, pull, *_ = torch.func.vjp(lambda *t: tuple(function(*t)), *inputs)
        return pull(tuple(torch.zeros_like(y) if g is None else g for y, g in zip(outputs, grads, strict=True)))
    views = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in inputs]
    outputs = function(*views)
    outs, seeds = zip(*((out, g) for out, g in zip(outputs, grads, strict=True) if g is not None), strict=True)
    return torch.autograd.grad(outs, views, seeds, create_graph=True, allow_unused=True)


def call(op: Callable[..., Any], needs_grad: bool, *args: Any) -> Any:
    """Calls an op without the Python kernel that ``register_autograd`` puts before it.

    That kernel costs 4 us a call without gradients and 40 us with them; compiled code does not pass through it.
    """
    if torch.compiler.is_compiling():
        return op(*args)
    if needs_grad:
        return _functions[op].apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def call_inplace(op: Callable[..., Any], *args: Any, outputs: Sequence[Tensor | None]) -> None:
    """Calls an op that writes to ``outputs``, its last arguments, and lets autograd know that they changed."""
    call(op, False, *args, *outputs)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([tensor for tensor in outputs if tensor is not None])
