"""Which implementation runs a call: what is there, what is forced, and why something is not used."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import logging
import os
import pathlib
from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

logger = logging.getLogger("dgm_kernels")

NAMES = ("reference", "cpp", "cuda", "triton")
_DEVICES = {"cpp": ("cpu",), "cuda": ("cuda",), "triton": ("cuda",)}
_AUTO = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}
_NATIVE_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.bool))  # bool: masks
_forced: str | None = None


def extension() -> ModuleType | None:
    """The compiled extension, or None."""
    return _load_extension()[0]


@functools.cache
def _load_extension() -> tuple[ModuleType | None, str]:
    """The extension, or None and the reason."""
    record = pathlib.Path(__file__).parents[1] / "_build_info.json"
    if not record.exists():
        return None, "the extension was not built"
    info = json.loads(record.read_text())
    if not info["native"]:
        return None, str(info["reason"])
    if info["torch"] != torch.__version__:  # the C++ interface changes from version to version: loading could crash
        return None, f"the extension was built for torch {info['torch']}, this is {torch.__version__}"
    try:
        return importlib.import_module("dgm_kernels._C"), ""
    except ImportError as error:
        return None, f"the extension does not import ({error})"


@functools.cache
def _why_unavailable(name: str) -> str | None:
    """Why a backend cannot be used in this process; None if it can."""
    module = extension()
    if name == "cpp":
        return None if module else _load_extension()[1]
    if name == "cuda":
        if module is None:
            return _load_extension()[1]
        if module.build_info()["cuda"] is None:
            return "the extension was built without CUDA"
        return None if torch.cuda.is_available() else "no CUDA device"
    if name == "triton":
        try:
            importlib.import_module("triton")
        except ImportError as error:
            return f"triton does not import ({error})"
        return None if torch.cuda.is_available() or interpreted() else "no CUDA device"
    return None


def interpreted() -> bool:
    """Whether Triton runs in its interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def backends() -> dict[str, str]:
    """What each backend is ready for, or why it is not used.

    Returns:
        ``{"reference": ..., "cpp": ..., "cuda": ..., "triton": ...}``; a value begins with ``"available"`` or with
        ``"unavailable: "`` and the reason.

    Example:
        >>> import dgm_kernels
        >>> dgm_kernels.backends()["reference"]
        'available: any device; float64, float32, bfloat16, float16'
    """
    state = {"reference": "available: any device; float64, float32, bfloat16, float16"}
    for name in NAMES[1:]:
        why = _why_unavailable(name)
        state[name] = f"unavailable: {why}" if why else f"available: {_describe(name)}"
    return state


def _describe(name: str) -> str:
    module = extension()
    if name == "cpp" and module:
        return f"CPU, instruction set {module.active_isa()}; float32, bfloat16, float16"
    if name == "triton" and interpreted():
        return "CPU, in the Triton interpreter"
    return "CUDA; float32, bfloat16, float16"


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every op inside the ``with`` on one backend; ``"auto"`` gives the choice back.

    The setting is one of the process, not of the thread.

    Raises:
        ValueError: the name is unknown, or the backend is not available here (the message says why).
    """
    global _forced
    if name != "auto" and name not in NAMES:
        raise ValueError(f"name must be 'auto' or one of {', '.join(NAMES)}, got {name!r}")
    why = _why_unavailable(name)
    if why:
        raise ValueError(f"backend {name!r} is not available: {why}")
    previous, _forced = _forced, None if name == "auto" else name
    try:
        yield
    finally:
        _forced = previous


def select(
    device: torch.device,
    operands: Sequence[Tensor | None],
    refusal: str | None = None,
    natives: Sequence[str] = NAMES[1:],
    has_jvp: bool = False,
) -> str:
    """The backend for a call on this device with these operands.

    Args:
        refusal: why no native backend can take this call, if the op knows of a reason of its own.
        natives: backends that the op has kernels for.
        has_jvp: the op has kernels for forward-mode AD, and nothing but that (and reverse mode) looks on.

    Raises:
        ValueError: a backend is forced that cannot take the call.
    """
    if _forced == "reference":
        return "reference"
    refusal = refusal or _refusal(operands, has_jvp)
    if _forced is not None and _forced not in natives:
        raise ValueError(f"backend {_forced!r} has no kernel for this op, only {', '.join(natives)}")
    if _forced is not None:
        devices = (*_DEVICES[_forced], "cpu") if _forced == "triton" and interpreted() else _DEVICES[_forced]
        if device.type not in devices:
            raise ValueError(f"backend {_forced!r} takes tensors on {devices[0]}, got tensors on {device}")
        if refusal:
            raise ValueError(f"backend {_forced!r} does not take this call: {refusal}")
        return _forced
    best = _best(device.type, tuple(natives))
    if best == "reference" or refusal is None:
        return best
    _note_fallback(best, refusal)
    return "reference"


@torch.compiler.assume_constant_result  # torch.compile calls it and does not trace what it does
def _best(device_type: str, natives: tuple[str, ...]) -> str:
    return _find_best(device_type, natives)


@functools.cache
def _find_best(device_type: str, natives: tuple[str, ...]) -> str:
    for name in _AUTO.get(device_type, ()):
        if name not in natives:
            continue
        why = _why_unavailable(name)
        if why is None:
            return name
        _note_fallback(name, why)
    if not set(natives) & set(_AUTO.get(device_type, ())):
        _note_fallback("/".join(natives), f"this op has no kernel for {device_type}")
    return "reference"


def _refusal(operands: Sequence[Tensor | None], has_jvp: bool) -> str | None:
    """Why no native backend can take a call now."""
    for operand in operands:
        if operand is not None and operand.dtype not in _NATIVE_DTYPES:
            return f"{operand.dtype} is computed by the reference"
    if has_jvp:
        return None
    if forward_ad._current_level >= 0:
        return "forward-mode AD runs on the reference"
    if torch._C._functorch.maybe_current_level() is not None:
        return "torch.func transforms run on the reference"
    return None


def is_traced() -> bool:
    """Whether torch.compile, forward-mode AD or a torch.func transform looks at the operations of this call."""
    return (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or torch._C._functorch.maybe_current_level() is not None
    )


def is_forward_mode() -> bool:
    """Whether forward-mode AD looks on, by dual numbers or torch.func.jvp, and no transform but gradients beside it."""
    if torch.compiler.is_compiling():
        return False
    levels = _functorch_levels()
    differentiates = all(kind in (TransformType.Jvp, TransformType.Grad) for kind in levels)
    once = levels.count(TransformType.Jvp) <= 1  # kernels have no derivative of the derivative in forward mode
    return differentiates and once and (forward_ad._current_level >= 0 or TransformType.Jvp in levels)


def is_differentiated(x: Tensor) -> bool:
    """Whether a derivative by ``x`` is asked for, in any mode and at any level of torch.func transforms."""
    if torch.compiler.is_compiling():
        return x.requires_grad and torch.is_grad_enabled()
    wrapped, unwrap = torch._C._functorch.is_functorch_wrapped_tensor, torch._C._functorch.get_unwrapped
    if TransformType.Jvp in _functorch_levels()[:-1] and wrapped(x):
        return True  # it may be: the tangents of an outer level do not show
    while True:
        if x.requires_grad and torch.is_grad_enabled():
            return True
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
            return True
        if not wrapped(x):
            return False
        x = unwrap(x)


def _functorch_levels() -> list[TransformType]:
    """The torch.func transforms in force, innermost last."""
    if torch._C._functorch.maybe_current_level() is None:
        return []
    return [interpreter.key() for interpreter in torch._C._functorch.get_interpreter_stack() or ()]


def may_keep_tensors() -> bool:
    """Whether a tensor made now may serve later calls: not one that is traced, fake, or part of a CUDA graph."""
    if is_traced() or _get_current_dispatch_mode() is not None:
        return False
    return not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


@functools.cache
def _log_once(message: str) -> None:
    logger.info(message)


def _note_fallback(name: str, why: str) -> None:
    if not torch.compiler.is_compiling():
        _log_once(f"backend {name!r} is not used: {why}")
