"""What the ops' Triton backends share: cutting tensors into programs, launches, forms for ahead-of-time compilation."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import interpreted

TILE = 1024  # elements of a program: 8 a thread, two 16-byte accesses in float32 and one in 16 bits
_WARPS = 4

_compiled: dict[tuple[Any, ...], Any] = {}


class Grid(NamedTuple):
    """How a ``[batch, elements]`` tensor is cut into programs."""

    programs: tuple[int, int, int]
    numbers: tuple[int, int, int]  # batch, elements, blocks of columns
    tile: tuple[int, int]  # ROWS, COLUMNS


def cut(batch: int, elements: int, columns: int, size: int = TILE) -> Grid:
    """Programs of ``size`` elements, ``columns`` of them from one sample."""
    rows = size // columns
    blocks = -(-elements // columns)
    # All on the first axis of the grid: the others end at 65535.
    return Grid((-(-batch // rows) * blocks, 1, 1), (batch, elements, blocks), (rows, columns))


def launch(
    kernel: Any,
    grid: Grid,
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[int | float, ...],
    constants: tuple[bool | int, ...],
    warps: int = _WARPS,
) -> None:
    """Launches the kernel on the current stream of the tensors' device.

    From the second call on the compiled kernel is launched as it is: finding out anew which one is meant costs Triton
    several times what a launch costs. Dtypes and alignments of the tensors and constants decide it, numbers do not.
    """
    args = (*tensors, *numbers, *grid.numbers, *constants, *grid.tile)
    forms = [None if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in tensors]
    device = next(t.device for t in tensors if t is not None)
    which = (id(kernel), device, constants, grid.tile, warps, *forms)
    with _on(device):
        compiled = _compiled.get(which)
        if compiled is not None:
            compiled[grid.programs](*args)
        elif not interpreted() and torch.version.hip is None:  # AMD's compiler looks at the sizes of tensors, too
            _compiled[which] = kernel[grid.programs](*args, num_warps=warps)
        else:
            kernel[grid.programs](*args)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device; the interpreter has none."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()


Spec = tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]


def spec(name: str, kernel: Any, pointers: dict[str, str], warps: int = _WARPS, **constants: Any) -> Spec:
    """What one form of a kernel is compiled from; tensors that are not named are absent."""
    constants = {"ALIGNED": True, "ROWS": 1, "COLUMNS": TILE, **constants}
    signature: dict[str, str] = {}
    for parameter in kernel.params:
        if parameter.annotation_type:
            signature[parameter.name] = parameter.annotation_type
        elif not parameter.is_constexpr:
            if (type_ := pointers.get(parameter.name.removesuffix("_ptr"))) is not None:
                signature[parameter.name] = type_
            else:
                constants[parameter.name] = None
    own = {p.name for p in kernel.params} - signature.keys()
    return name, kernel, signature, {k: v for k, v in constants.items() if k in own}, {"num_warps": warps}
