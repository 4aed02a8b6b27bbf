"""Defines an op of namespace ``dgm`` once for every native backend."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import extension, interpreted

NATIVE = ("cpp", "cuda", "triton")
_library = torch.library.Library("dgm", "FRAGMENT")


def define(
    name: str,
    schema: str,
    fake: Callable[..., Any],
    triton_module: str,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> dict[str, Callable[..., Any]]:
    """Defines ``dgm::<name>.cpp``, ``.cuda`` and ``.triton`` with one schema, fake kernel and backward formula.

    The C++ kernels register themselves when the extension loads; the Triton launcher is the function ``name`` of
    ``triton_module``, imported at the first call.

    Returns:
        The callable of each backend.
    """
    extension()
    for backend in NATIVE:
        _library.define(f"{name}.{backend}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"dgm::{name}.{backend}", fake, lib=_library)
        if backward is not None:
            torch.library.register_autograd(
                f"dgm::{name}.{backend}", backward, setup_context=setup_context, lib=_library
            )

    def launch(*args: Any) -> Any:
        return getattr(importlib.import_module(triton_module), name)(*args)

    for key in ("CUDA", "CPU") if interpreted() else ("CUDA",):
        _library.impl(f"{name}.triton", launch, key)
    packet = getattr(torch.ops.dgm, name)
    return {backend: getattr(packet, backend) for backend in NATIVE}


def call(op: Callable[..., Any], needs_grad: bool, *args: Any) -> Any:
    """Calls an op; without gradients it skips the Python autograd kernel, which costs 4 us a call."""
    if needs_grad or torch.compiler.is_compiling():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def call_inplace(op: Callable[..., Any], *args: Any, outputs: Sequence[Tensor | None]) -> None:
    """Calls an op that writes to ``outputs``, its last arguments, and lets autograd know that they changed."""
    call(op, False, *args, *outputs)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([tensor for tensor in outputs if tensor is not None])
