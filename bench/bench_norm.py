"""Cases of the norm op: layer and RMS norm, adaptive layer norm of a DiT block, group norm with SiLU of a U-Net."""

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.compare import Bars, Case, Contender, Setup, bars_at_two_threads, dtype_name, ours, size_name, variants
from dgm_kernels import group_norm_silu, layer_norm, modulated_layer_norm, rms_norm
from tests.norm_cases import DIT_SHAPE, IMAGE_GROUPS, IMAGE_SHAPE, SMALL_SHAPE, TOKENS_SHAPE, eager_modulated

Outputs = Tensor | tuple[Tensor, ...]
Function = Callable[..., Outputs]
NATIVES = ("cpp", "triton")
EPS = 1e-5


def call(function: Function, operands: Sequence[Tensor], seeds: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs, and with gradients of theirs in ``seeds`` those of the operands."""
    if not seeds:
        outputs = function(*operands)
        return outputs if isinstance(outputs, tuple) else (outputs,)
    with torch.enable_grad():
        outputs = function(*operands)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return *outputs, *torch.autograd.grad(outputs, operands, seeds)


def case(
    setup: Setup,
    name: str,
    fused: Function,
    plain: Function,
    make_operands: Callable[[], Sequence[Tensor]],
    shape: tuple[int, ...],
    tensors: tuple[int, int],
    *,
    dtype: torch.dtype,
    train: bool,
    flops: int,
    results: int = 1,
    bars: Bars = bars_at_two_threads,
) -> Case:
    """A normalisation: ``fused`` against ``plain``, which is what a user writes.

    ``tensors`` of the shape of x must be read or written, forward and in training; ``results`` are returned.
    """

    def make_inputs() -> SimpleNamespace:
        operands = [operand.to(setup.device, dtype).requires_grad_(train) for operand in make_operands()]
        seeds = [torch.randn(shape).to(setup.device, dtype) for _ in range(results)] if train else []
        return SimpleNamespace(operands=operands, seeds=seeds)

    def reference(i: SimpleNamespace) -> tuple[Tensor, ...]:
        operands = [t.detach().double().requires_grad_(train) for t in i.operands]
        return call(plain, operands, [seed.double() for seed in i.seeds])

    contenders, missing = ours(lambda i: call(fused, i.operands, i.seeds), setup, NATIVES)
    for baseline, function in variants(plain, setup).items():
        contenders[baseline] = Contender(lambda i, f=function: call(f, i.operands, i.seeds))
    elements = torch.Size(shape).numel()
    return Case(
        " ".join([name, *["forward+backward"] * train, size_name(shape), dtype_name(dtype)]),
        make_inputs,
        contenders,
        reference,
        bytes=tensors[train] * elements * dtype.itemsize,
        flops=(3 if train else 1) * flops * elements,
        bars=bars(setup),
        missing=missing,
        grad=train,
    )


def layer(
    setup: Setup,
    shape: tuple[int, ...] = TOKENS_SHAPE,
    *,
    dtype: torch.dtype = torch.float32,
    train: bool = False,
    bars: Bars = bars_at_two_threads,
) -> Case:
    """Layer norm with weight and bias. What must move: x and y; backward x and the gradients of y and x."""
    size = shape[-1]
    return case(
        setup,
        "layer norm",
        lambda x, w, b: layer_norm(x, (size,), w, b, EPS),
        lambda x, w, b: F.layer_norm(x, (size,), w, b, EPS),
        lambda: (torch.randn(shape), 1 + 0.1 * torch.randn(size), torch.randn(size)),
        shape,
        (2, 5),
        dtype=dtype,
        train=train,
        flops=8,
        bars=bars,
    )


def rms(setup: Setup, *, train: bool = False, bars: Bars = bars_at_two_threads) -> Case:
    """RMS norm with a weight; what must move is as for layer norm."""
    size = TOKENS_SHAPE[-1]
    return case(
        setup,
        "rms norm",
        lambda x, w: rms_norm(x, (size,), w, EPS),
        lambda x, w: F.rms_norm(x, (size,), w, EPS),
        lambda: (torch.randn(TOKENS_SHAPE), 1 + 0.1 * torch.randn(size)),
        TOKENS_SHAPE,
        (2, 5),
        dtype=torch.float32,
        train=train,
        flops=4,
        bars=bars,
    )


def adaptive(
    setup: Setup, *, dtype: torch.dtype = torch.float32, train: bool = False, bars: Bars = bars_at_two_threads
) -> Case:
    """adaLN of a DiT block with gate and residual.

    What must move: x, the residual, h and y; backward h, x, the gradients of y and h, and those of x and the residual.
    """
    batch, _, size = DIT_SHAPE

    def fused(x: Tensor, scale: Tensor, shift: Tensor, gate: Tensor, residual: Tensor) -> Outputs:
        return modulated_layer_norm(x, scale, shift, gate=gate, residual=residual)

    def make_operands() -> Sequence[Tensor]:
        modulation = [0.5 * torch.randn(batch, size) for _ in range(3)]
        return torch.randn(DIT_SHAPE), *modulation, torch.randn(DIT_SHAPE)

    return case(
        setup,
        "adaLN with gate and residual",
        fused,
        eager_modulated,
        make_operands,
        DIT_SHAPE,
        (4, 10),
        dtype=dtype,
        train=train,
        flops=12,
        results=2,
        bars=bars,
    )


def group(
    setup: Setup,
    *,
    dtype: torch.dtype = torch.float32,
    modulated: bool = False,
    train: bool = False,
    bars: Bars = bars_at_two_threads,
) -> Case:
    """Group norm and SiLU, with or without a U-Net's time embedding; what must move is as for layer norm."""
    batch, channels = IMAGE_SHAPE[:2]

    def fused(x: Tensor, w: Tensor, b: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Outputs:
        return group_norm_silu(x, IMAGE_GROUPS, w, b, EPS, scale=scale, shift=shift)

    def plain(x: Tensor, w: Tensor, b: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Outputs:
        y = F.group_norm(x, IMAGE_GROUPS, w, b, EPS)
        if scale is not None and shift is not None:
            y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return F.silu(y)

    def make_operands() -> Sequence[Tensor]:
        time = [0.5 * torch.randn(batch, channels) for _ in range(2 * modulated)]
        return torch.randn(IMAGE_SHAPE), 1 + 0.1 * torch.randn(channels), torch.randn(channels), *time

    return case(
        setup,
        " ".join(["group norm", *["with scale and shift"] * modulated, "SiLU"]),
        fused,
        plain,
        make_operands,
        IMAGE_SHAPE,
        (2, 5),
        dtype=dtype,
        train=train,
        flops=30,
        bars=bars,
    )


bf16 = torch.bfloat16
CASES: dict[str, Callable[[Setup], Case]] = {
    "layer-train": partial(layer, train=True, bars=partial(bars_at_two_threads, eager=1.3, compile=1)),
    "layer": partial(layer, bars=partial(bars_at_two_threads, compile=1)),
    "layer-small": partial(layer, shape=SMALL_SHAPE),
    "layer-bf16-train": partial(layer, dtype=bf16, train=True),
    "rms-train": partial(rms, train=True, bars=partial(bars_at_two_threads, eager=1.3, compile=1)),
    "adaptive-train": partial(adaptive, train=True, bars=partial(bars_at_two_threads, eager=3, compile=1)),
    "adaptive": partial(adaptive, bars=partial(bars_at_two_threads, compile=1)),
    "adaptive-bf16-train": partial(adaptive, dtype=bf16, train=True),
    "group-train": partial(group, train=True, bars=partial(bars_at_two_threads, eager=2.5, compile=1)),
    "group": partial(group, bars=partial(bars_at_two_threads, compile=1)),
    "group-modulated-train": partial(
        group, modulated=True, train=True, bars=partial(bars_at_two_threads, eager=2.5, compile=1)
    ),
    "group-bf16-train": partial(group, dtype=bf16, train=True),
}


def test_norm(compare: Callable[[Callable[[Setup], Case]], None], build: Callable[[Setup], Case]) -> None:
    compare(build)
