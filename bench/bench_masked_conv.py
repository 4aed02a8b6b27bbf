"""Cases of the masked_conv op: masked convolutions, gates, and the distributions of autoregressive models.

No peer library competes: none that installs today leaves the dead taps of a masked convolution out or has these
distributions as one kernel. What is published is PyTorch code, the eager baselines here. Of convolutions a second form
of it takes part: "cropped", whose kernel ends at the pixel's row, so that fewer of its taps are zeros.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.compare import Bars, Case, Contender, Setup, bars_at_two_threads, ours, size_name, variants
from bench.masked_conv_baselines import (
    LEVELS,
    cropped_masked_conv,
    plain_categorical,
    plain_gate,
    plain_masked_conv,
    plain_mixture,
    raster_mask,
)
from dgm_kernels import categorical_log_prob, discretized_logistic_mixture, gated_activation, masked_conv2d

Function = Callable[..., Tensor]
NATIVES = ("cpp", "triton")
CONV_SHAPE, CONV_OUTPUTS = (32, 128, 28, 28), 128
GATE_SHAPE = (32, 256, 28, 28)
PIXELS_SHAPE, MIXTURES = (16, 3, 32, 32), 10
FUNCTION_FLOPS = 12  # of an exponential or a logarithm


def forward(function: Function, data: Sequence[Tensor], operands: Sequence[Tensor], seed: Tensor) -> Tensor:
    """The result."""
    return function(*data, *operands)


def forward_backward(
    function: Function, data: Sequence[Tensor], operands: Sequence[Tensor], seed: Tensor
) -> tuple[Tensor, ...]:
    """What training needs: the result and the gradients of the operands, for a given gradient of the result."""
    with torch.enable_grad():
        y = function(*data, *operands)
        return y.detach(), *torch.autograd.grad(y, operands, seed)


def layer_case(
    setup: Setup,
    name: str,
    fused: Function,
    plain: Function,
    make_operands: Callable[[], tuple[Sequence[Tensor], Sequence[Tensor]]],
    *,
    train: bool,
    exact: Function | None = None,
    others: Mapping[str, Function] = MappingProxyType({}),
    **fields: Any,
) -> Case:
    """`fused` against `plain`, both functions of data and of operands, whose gradients training wants.

    `exact` gives the float64 reference where `plain` is an approximation; `others` compete as they are.
    """
    call = forward_backward if train else forward

    def make_inputs() -> SimpleNamespace:
        made = make_operands()
        data, operands = (tuple(tensor.to(setup.device) for tensor in tensors) for tensors in made)
        seed = torch.randn_like(plain(*data, *operands))
        return SimpleNamespace(data=data, operands=[t.requires_grad_(train) for t in operands], seed=seed)

    def reference(i: SimpleNamespace) -> Tensor | tuple[Tensor, ...]:
        data = [tensor.double() if tensor.is_floating_point() else tensor for tensor in i.data]
        operands = [tensor.detach().double().requires_grad_(train) for tensor in i.operands]
        return call(exact or plain, data, operands, i.seed.double())

    contenders, missing = ours(lambda i: call(fused, i.data, i.operands, i.seed), setup, NATIVES)
    for baseline, function in [*variants(plain, setup).items(), *others.items()]:
        contenders[baseline] = Contender(lambda i, f=function: call(f, i.data, i.operands, i.seed))
    return Case(name, make_inputs, contenders, reference, missing=missing, grad=train, **fields)


def masked_conv(
    setup: Setup, size: int, mask_type: str, *, train: bool = False, bars: Bars = bars_at_two_threads
) -> Case:
    """A square masked kernel. What must be done: the products of live taps inside the image, backward twice as many.

    What must move: x, the live weights and y; backward the gradient of y, x and the weights again, and their gradients.
    """
    batch, inputs, height, width = CONV_SHAPE
    mask = raster_mask(size, mask_type, setup.device)
    weights = CONV_OUTPUTS * inputs * int(mask.sum())
    pairs = F.conv2d(torch.ones(1, 1, height, width), mask.cpu(), padding=size // 2).sum()  # of a live tap and a pixel
    read, written = torch.Size(CONV_SHAPE).numel(), batch * CONV_OUTPUTS * height * width

    def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return masked_conv2d(x, weight, bias, mask_type=mask_type)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return plain_masked_conv(x, weight, bias, mask)

    def cropped(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return cropped_masked_conv(x, weight, bias, mask)

    def make_operands() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        weight = torch.randn(CONV_OUTPUTS, inputs, size, size) / (inputs * size * size) ** 0.5
        return (), (torch.randn(CONV_SHAPE), weight, torch.randn(CONV_OUTPUTS))

    words = [f"{size}x{size} type {mask_type}", *["forward+backward"] * train]
    return layer_case(
        setup,
        " ".join(["masked conv", *words, f"{size_name(CONV_SHAPE)} to {CONV_OUTPUTS} fp32"]),
        fused,
        plain,
        make_operands,
        train=train,
        others={"cropped": cropped},
        bytes=((3 * read + 2 * written + 3 * weights) if train else (read + written + weights)) * 4,
        flops=(3 if train else 1) * 2 * batch * CONV_OUTPUTS * inputs * int(pairs),
        bars=bars(setup),
    )


def gate(setup: Setup, *, conditional: bool = False, bars: Bars = bars_at_two_threads) -> Case:
    """tanh times sigmoid, with a condition of every channel added, forward and backward.

    What must move: x and half as much of y, the gradient of y, x again and its gradient.
    """
    elements = torch.Size(GATE_SHAPE).numel()

    def make_operands() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        condition = [torch.randn(GATE_SHAPE[:2])] if conditional else []
        return (), (torch.randn(GATE_SHAPE), *condition)

    words = ["gated activation", *["conditional"] * conditional, "forward+backward"]
    return layer_case(
        setup,
        " ".join([*words, size_name(GATE_SHAPE), "fp32"]),
        gated_activation,
        plain_gate,
        make_operands,
        train=True,
        bytes=4 * elements * 4,
        flops=2 * elements * (FUNCTION_FLOPS + 4),
        bars=bars(setup),
    )


def mixture(setup: Setup, bars: Bars = bars_at_two_threads) -> Case:
    """Mixture of discretized logistics of three colours, forward and backward.

    What must move: x, the parameters, both again, the gradient of the parameters, and a number a pixel both ways.
    What must be done, as far as functions go: of every component and colour an exponential for the scale, two for the
    probability of a level and a tanh; of every component one for its weight and one for its share.
    """
    batch, colours, *size = PIXELS_SHAPE
    pixels = batch * torch.Size(size).numel()
    parameters = MIXTURES * (1 + 3 * colours)

    def make_operands() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        logits, rest = torch.randn(batch, MIXTURES, *size), torch.randn(batch, colours, 3, MIXTURES, *size) / 2
        rest[:, :, 1] -= 2  # scales of a trained network: a part of the range
        x = torch.randint(LEVELS, PIXELS_SHAPE) * (2 / (LEVELS - 1)) - 1
        return (x,), (torch.cat([logits, rest.flatten(1, 3)], dim=1),)

    functions = colours * (1 + 2 + 1) + 2
    return layer_case(
        setup,
        f"mixture of {MIXTURES} logistics forward+backward {size_name(PIXELS_SHAPE)} fp32",
        discretized_logistic_mixture,
        plain_mixture,
        make_operands,
        train=True,
        exact=discretized_logistic_mixture,
        bytes=pixels * (2 * colours + 3 * parameters + 2) * 4,
        flops=2 * pixels * MIXTURES * functions * FUNCTION_FLOPS,
        bars=bars(setup),
    )


def categorical(setup: Setup) -> Case:
    """Log-probability of 256 levels, forward and backward.

    What must move: the levels, the logits, both again, the gradient of the logits, and a number a level both ways.
    """
    batch, *size = PIXELS_SHAPE
    count = torch.Size(PIXELS_SHAPE).numel()

    def make_operands() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        return (torch.randint(LEVELS, PIXELS_SHAPE),), (torch.randn(batch, LEVELS, *size),)

    return layer_case(
        setup,
        f"categorical of {LEVELS} levels forward+backward {size_name(PIXELS_SHAPE)} fp32",
        categorical_log_prob,
        plain_categorical,
        make_operands,
        train=True,
        bytes=count * (2 * 8 + 3 * LEVELS * 4 + 2 * 4),
        flops=2 * count * LEVELS * (FUNCTION_FLOPS + 2),
    )


CASES: dict[str, Callable[[Setup], Case]] = {
    "conv-7A": partial(masked_conv, size=7, mask_type="A", bars=partial(bars_at_two_threads, eager=1.8)),
    "conv-3B": partial(masked_conv, size=3, mask_type="B", bars=partial(bars_at_two_threads, eager=1.5)),
    "conv-7A-train": partial(
        masked_conv, size=7, mask_type="A", train=True, bars=partial(bars_at_two_threads, eager=1.6)
    ),
    "conv-3B-train": partial(
        masked_conv, size=3, mask_type="B", train=True, bars=partial(bars_at_two_threads, eager=1.4)
    ),
    "gate": partial(gate, bars=partial(bars_at_two_threads, eager=3, compile=1)),
    "gate-conditional": partial(gate, conditional=True, bars=partial(bars_at_two_threads, eager=3, compile=1)),
    "mixture": partial(mixture, bars=partial(bars_at_two_threads, eager=10, compile=2)),
    "categorical": categorical,
}


def test_masked_conv(compare: Callable[[Callable[[Setup], Case]], None], build: Callable[[Setup], Case]) -> None:
    compare(build)
