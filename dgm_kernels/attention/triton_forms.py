"""Forms of attention's Triton kernels to compile ahead of time: the common ones, with the tiles of each GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .._core.triton import Spec, spec
from . import triton_sizes as sizes
from .triton_backward import delta_kernel, key_grad_kernel, query_grad_kernel, ranges_kernel
from .triton_decode import combine_kernel, decode_kernel
from .triton_forward import forward_kernel
from .triton_jvp import jvp_kernel
from .triton_rotate import rotate_kernel

# Kernel, its tiles, its operands in the dtype of q, and those in float32.
_KERNELS: dict[str, tuple[Any, Any, str, str]] = {
    "forward": (forward_kernel, sizes.forward, "out q k v", "lse"),
    "query_grad": (query_grad_kernel, sizes.query_grad, "to_q grad q k v", "lse delta"),
    "key_grad": (key_grad_kernel, sizes.key_grad, "to_k to_v grad q k v", "lse delta"),
    "jvp": (jvp_kernel, sizes.jvp, "to q tq k tk v tv out", "lse mean"),
}
_CAPABILITIES = ((80,), (90, 100))  # those of a group have the same tiles

_Restricted = tuple[Spec, tuple[int, ...]]


def aot_specs() -> Iterator[Any]:
    """Forms with the capabilities that they are compiled for, where these are not all."""
    forms = [("half", 64, mask) for mask in ("plain", "bounds", "near", "dense")]
    forms += [("half", 128, "bounds"), ("fp32", 64, "bounds"), ("tf32", 64, "bounds")]
    for kind, features, mask in forms:
        for name in _KERNELS:
            for capabilities in _CAPABILITIES:
                yield (*_form(name, kind, features, mask, capabilities[0]), capabilities)
    yield from _small_specs()


def _form(name: str, kind: str, features: int, mask: str, capability: int) -> Spec:
    kernel, table, operands, floats = _KERNELS[name]
    near, dense = mask == "near", mask == "dense"
    dtype, vector = ("*bf16", 8) if kind == "half" else ("*fp32", 4)
    tile = table(sizes.Form(features, kind, int(dense), near, capability))
    pointers = dict.fromkeys(operands.split(), dtype) | dict.fromkeys(floats.split(), "*fp32")
    if mask != "plain":
        pointers |= {"bounds": "*i32", **({"ranges": "*i32"} if name == "key_grad" else {})}
    if dense:
        pointers |= {"keep": "*i1", "bias": dtype, "slopes": "*fp32"}
    wide = sizes.wide(features, kind)
    constants = {"D": features, "DV": features, "WIDE": wide, "WIDE_V": wide, "NEAR": near, "NEGATIVE": False}
    constants |= {"KEEP": 16 if dense else -1, "BIAS": vector if dense else -1, "TF32": kind == "tf32"}
    constants |= {"VECTOR": vector, "STAGES": tile.stages, "QUERIES": tile.queries, "KEYS": tile.keys}
    title = f"{name}_{mask}_{'bf16' if kind == 'half' else kind}_{features}"
    return spec(title, kernel, pointers, warps=tile.warps, **constants)


def _small_specs() -> Iterator[Spec]:
    """Decoding for one head and for a group, and the kernels that prepare and finish."""
    both: dict[str, Any] = {"D": 64, "DV": 64, "TF32": False, "STAGES": 3, "KEYS": 64, "WIDE": 64, "WIDE_V": 64}
    for name, dtype, vector in (("bf16", "*bf16", 8), ("fp32", "*fp32", 4)):
        rows = dict.fromkeys(("out", "q", "k", "v"), dtype)
        parts = dict.fromkeys(("sums", "largest", "total"), "*fp32")
        for form, one, heads in (("", True, 1), ("_group", False, 16)):
            constants = both | {"NEAR": False, "ONE": one, "HEADS": heads, "VECTOR": vector}
            yield spec(f"decode{form}_{name}", decode_kernel, rows | parts, **constants)
        yield spec(f"combine_{name}", combine_kernel, {"out": dtype} | parts, DV=64, SPLITS=64, VALUES=64)
        turned = {"D": 64, "PAIRS": 32, "INTERLEAVED": False, "BACK": False, "VECTOR": vector, "ROWS": 64, "WIDE": 64}
        yield spec(f"rotate_{name}", rotate_kernel, {"to": dtype, "x": dtype, "table": "*fp32"}, **turned)
        sums = {"delta": "*fp32", "grad": dtype, "out": dtype}
        yield spec(f"delta_{name}", delta_kernel, sums, DV=64, WIDE_V=64, VECTOR=vector, QUERIES=32)
    yield spec("ranges", ranges_kernel, {"ranges": "*i32", "bounds": "*i32"}, KEYS=64, STEP=1024)
