"""The sampler step as a user writes it in eager PyTorch: the yardstick of the tests."""

from typing import Any

import torch
from torch import Tensor

from dgm_kernels import (
    SamplerTable,
)


def column(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (x.dim() - 1))


def per_row(x: Tensor) -> Tensor:
    return x.flatten(1) if x.dim() > 1 else x[:, None]


def eager_step(x: Tensor, m: Tensor, table: SamplerTable, step: int, **options: Any) -> tuple[Tensor, Tensor]:
    """The step as a user writes it, in the dtype of ``x``, with the coefficients as Python floats."""
    px, pm, lo, hi, ax, a0, am, ah, an, ak, sk, _ = table.rows64[step].tolist()
    if "guidance" in options:
        unconditional, scale = options["guidance"]
        m = unconditional + scale * (m - unconditional)
    x0 = px * x + pm * m
    if table.dynamic_threshold is None:
        x0 = x0.clamp(lo, hi)
    else:
        quantile, largest = table.dynamic_threshold
        wide = x0.float() if x0.dtype in (torch.bfloat16, torch.float16) else x0
        wide = per_row(wide).abs()
        s = torch.quantile(wide, quantile, dim=1) if wide.numel() else torch.ones(len(wide), dtype=wide.dtype)
        s = s.clamp(1.0, largest).to(x0.dtype)
        x0 = x0.clamp(-column(s, x), column(s, x)) / column(s, x)
    new = ax * x + a0 * x0 + am * m
    if "history" in options:
        new = new + ah * options["history"]
    if "noise" in options:
        new = new + an * options["noise"]
    if "known" in options:
        known = ak * options["known"] + sk * options["noise"]
        new = torch.where(options["mask"], known, new)
    return new, x0


def convert(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Tensors of the options in another dtype; masks stay bool."""

    def one(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(one(v) for v in value)
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: one(value) for name, value in options.items()}
