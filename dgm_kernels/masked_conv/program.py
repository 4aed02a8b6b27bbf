"""An autoregressive network as a list of instructions that produce feature maps row by row and pixel by pixel."""

from __future__ import annotations

import dataclasses
import enum
import struct
from collections.abc import Iterator

import torch
from torch import Tensor

from .taps import Rule

_VERSION = 1  # of the encoding


class Output(enum.IntEnum):
    """What the numbers that a network returns for a pixel are the parameters of."""

    BERNOULLI = 0  # a logit for each channel
    CATEGORICAL = 1  # logits of all levels of the first channel, then of the second, ...
    LOGISTIC_MIXTURE = 2  # as discretized_logistic_mixture takes them


class Activation(enum.IntEnum):
    """Functions that end an instruction."""

    NONE = 0
    RELU = 1
    ELU = 2
    SILU = 3
    TANH = 4
    SIGMOID = 5
    GATE = 6  # tanh of one half of the channels of each group times the sigmoid of the other


class Kind(enum.IntEnum):
    """Where the numbers of a node come from."""

    INPUT = 0  # the image
    VALUE = 1  # instructions
    SAMPLE_CONSTANT = 2  # [batch, channels], the same at all pixels
    PIXEL_CONSTANT = 3  # [batch, channels, height, width]


@dataclasses.dataclass(frozen=True)
class Node:
    """A feature map.

    Args:
        row_phase: it depends only on the rows above, so that it is known for a whole row before the row's pixels are.
        constant: index into the constants of a call, or -1.
    """

    channels: int
    kind: Kind = Kind.VALUE
    row_phase: bool = False
    constant: int = -1


@dataclasses.dataclass(frozen=True)
class Operand:
    """Channels of a node from ``channel`` on; how many, the reader knows. ``scale`` counts in sums only."""

    node: int
    channel: int = 0
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Term:
    """One tap of a convolution: a weight matrix times the source at the pixel ``(y + dy, x + dx)``.

    Args:
        weight: index of a tensor ``[outputs, inputs, height, width]``, of which ``[:, :, row, column]`` is meant.
        rule: which of its entries count; by the degrees of inputs and outputs with ``LESS`` and ``LESS_EQUAL``.
        in_degrees, out_degrees: indices into the degrees, -1 without.
    """

    source: Operand
    dy: int
    dx: int
    weight: int
    row: int
    column: int
    rule: Rule
    in_degrees: int = -1
    out_degrees: int = -1


@dataclasses.dataclass(frozen=True)
class Block:
    """Channels ``begin .. end - 1`` of a result, computed once ``time`` channels of the pixel are drawn."""

    begin: int
    end: int
    time: int


@dataclasses.dataclass(frozen=True)
class Instruction:
    """``out = activation(bias + sum of terms + sum of adds) * factor + sum of residuals``.

    The sum in the activation has ``channels`` numbers, with ``GATE`` twice as many: ``gate_groups`` groups, of each of
    which the first half is features, the second half gates.

    Args:
        out: where the result goes.
        channels: of the result.
        bias: index of a weight, or -1.
        row_phase: it runs once a row, for all its pixels, before them; else once a pixel.
        blocks: the channels in the order of their number.
    """

    out: Operand
    channels: int
    terms: tuple[Term, ...] = ()
    bias: int = -1
    adds: tuple[Operand, ...] = ()
    activation: Activation = Activation.NONE
    gate_groups: int = 1
    factor: Operand | None = None
    residuals: tuple[Operand, ...] = ()
    row_phase: bool = False
    blocks: tuple[Block, ...] = ()

    @property
    def sums(self) -> int:
        """How many numbers enter the activation."""
        return 2 * self.channels if self.activation == Activation.GATE else self.channels

    def sum_rows(self, begin: int, end: int) -> list[int]:
        """Which of the sums results ``begin .. end - 1`` are made of; with ``GATE`` all features, then all gates."""
        rows = range(begin, end)
        if self.activation != Activation.GATE:
            return list(rows)
        width = self.channels // self.gate_groups
        features = [2 * (o // width) * width + o % width for o in rows]
        return features + [row + width for row in features]

    def operands(self) -> Iterator[tuple[Operand, int]]:
        """What it reads at the pixel itself, other than through terms, and how many channels of it."""
        for operand in self.adds:
            yield operand, self.sums
        for operand in (*((self.factor,) if self.factor else ()), *self.residuals):
            yield operand, self.channels


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A network, unrolled into instructions in the order in which they run.

    Args:
        image: channels, height and width.
        output: the network's result.
        kind: what the result means.
        levels: of a channel.
        order: the channels of a pixel in the order in which they are drawn; of a logistic mixture, which draws all of
            them together, ``(0,)``.
        degrees: int64 tensors that terms name.
    """

    image: tuple[int, int, int]
    nodes: tuple[Node, ...]
    instructions: tuple[Instruction, ...]
    output: Operand
    kind: Output
    levels: int
    order: tuple[int, ...]
    degrees: tuple[Tensor, ...] = ()

    @property
    def numbers(self) -> int:
        """Uniform numbers that a pixel takes."""
        return self.image[0] + (1 if self.kind == Output.LOGISTIC_MIXTURE else 0)

    def encode(self) -> Tensor:
        """All but the degrees as one int64 tensor, which the C++ executor reads (``csrc/masked_conv``).

        A header, the nodes and the instructions one after the other; scales as the bits of a float64::

            1, C, H, W, nodes, instructions, output node, output channel, kind, levels, steps, order
            node: kind, channels, row_phase, constant
            instruction: out node, out channel, channels, activation, gate_groups, row_phase, bias,
                factor node or -1, factor channel, terms, adds, residuals, blocks (numbers of them), then
                each term: node, channel, dy, dx, weight, row, column, rule, in_degrees, out_degrees
                each add, each residual: node, channel, scale
                each block: begin, end, time
        """
        words = [_VERSION, *self.image, len(self.nodes), len(self.instructions), self.output.node, self.output.channel]
        words += [self.kind, self.levels, len(self.order), *self.order]
        for node in self.nodes:
            words += [node.kind, node.channels, node.row_phase, node.constant]
        for instruction in self.instructions:
            words += _encode(instruction)
        return torch.tensor([int(word) for word in words], dtype=torch.int64, device="cpu")


def _encode(instruction: Instruction) -> list[int]:
    i, factor = instruction, instruction.factor
    words = [i.out.node, i.out.channel, i.channels, i.activation, i.gate_groups, i.row_phase, i.bias]
    words += [-1, 0] if factor is None else [factor.node, factor.channel]
    words += [len(i.terms), len(i.adds), len(i.residuals), len(i.blocks)]
    for t in i.terms:
        words += [t.source.node, t.source.channel, t.dy, t.dx, t.weight, t.row, t.column]
        words += [t.rule, t.in_degrees, t.out_degrees]
    for operand in (*i.adds, *i.residuals):
        words += [operand.node, operand.channel, struct.unpack("<q", struct.pack("<d", operand.scale))[0]]
    for block in i.blocks:
        words += [block.begin, block.end, block.time]
    return words
