"""Orders and fuses the instructions of a network: what runs once a row, what once a pixel, and when of a pixel."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

import torch
from torch import Tensor

from .fusion import fuse
from .lowering import Lowering, Recipe, View
from .program import Activation, Block, Instruction, Kind, Node, Operand, Output, Program, Term
from .taps import Rule

_NEVER = -(1 << 40)  # rows above the pixel: a node that does not see the image at all


def compile_program(low: Lowering, output: View, kind: Output, levels: int) -> tuple[Program, list[Recipe]]:
    """The program of a lowered network, and its weights.

    Raises:
        ValueError: a pixel would depend on itself or on a later one; the message names the operation.
    """
    low.origin = "the network's output"
    result = low.contiguous(output)
    node = low.nodes[result.node]
    if node.kind != Kind.VALUE or node.channels != output.channels:  # executors draw from a node that they compute
        result = low.emit(output.channels, adds=(result,)).segments[0].operand()
    _assign_phases(low)
    depends = _same_pixel(low)
    order = _drawing_order(low, result, depends, kind, levels)
    instructions = fuse(low, _alive(low.instructions, result.node), result.node)
    place = torch.zeros(low.image[0], dtype=torch.int64, device="cpu")
    place[list(order)] = torch.arange(len(order), device="cpu")
    instructions = [_with_blocks(i, _times(depends[i.out.node], place)) for i in instructions]
    nodes, instructions, result = _without_unused(low.nodes, instructions, result)
    degrees = tuple(degree.value.to("cpu", copy=True) for degree in low.degrees)
    program = Program(low.image, nodes, tuple(instructions), result, kind, levels, order, degrees)
    return program, low.weights


# ---- What is known when.


def _assign_phases(low: Lowering) -> None:
    """Marks the nodes, and the instructions that write them, that see only the rows above."""
    reach = [0 if node.kind == Kind.INPUT else _NEVER for node in low.nodes]  # the lowest row that a node sees
    for i in low.instructions:
        sees = [reach[term.source.node] + term.dy for term in i.terms]
        sees += [reach[operand.node] for operand, _ in i.operands()]
        reach[i.out.node] = max([reach[i.out.node], *sees])
    low.nodes = [
        dataclasses.replace(node, row_phase=row < 0) if node.kind == Kind.VALUE else node
        for node, row in zip(low.nodes, reach, strict=True)
    ]
    low.instructions = [dataclasses.replace(i, row_phase=low.nodes[i.out.node].row_phase) for i in low.instructions]
    for i, origin in zip(low.instructions, low.origins, strict=True):
        for term in i.terms:
            if term.dy == 0 and term.dx > 0 and not low.nodes[term.source.node].row_phase:
                raise ValueError(
                    f"network is not causal: {origin} sees {term.dx} columns to the right of a pixel, in a feature map "
                    "that is not known there before the pixel is drawn"
                )


def _same_pixel(low: Lowering) -> list[Tensor]:
    """For each node: which of its channels see which input channels of the same pixel, bool ``[channels, C]``."""
    colours = low.image[0]
    depends = [torch.zeros(node.channels, colours, dtype=torch.bool, device="cpu") for node in low.nodes]
    depends[0] = torch.eye(colours, dtype=torch.bool, device="cpu")
    for i in low.instructions:
        if i.row_phase:
            continue
        sums = torch.zeros(i.sums, colours, dtype=torch.bool, device="cpu")
        for term in i.terms:
            if term.dy == term.dx == 0:
                sums |= _through(low, term, depends[term.source.node])
        for operand in i.adds:
            sums |= depends[operand.node][operand.channel : operand.channel + i.sums]
        if i.activation == Activation.GATE:
            sums = sums[i.sum_rows(0, i.channels)].view(2, i.channels, colours).any(0)
        for operand in (*((i.factor,) if i.factor else ()), *i.residuals):
            sums |= depends[operand.node][operand.channel : operand.channel + i.channels]
        depends[i.out.node][i.out.channel : i.out.channel + i.channels] = sums
    return depends


def _through(low: Lowering, term: Term, source: Tensor) -> Tensor:
    outputs, inputs = low.weight_shapes[term.weight][:2]
    source = source[term.source.channel : term.source.channel + inputs]
    if term.rule == Rule.FULL or not source.any():
        return source.any(0).expand(outputs, -1)
    before, after = (low.degrees[index].value.cpu() for index in (term.in_degrees, term.out_degrees))
    live = before < after[:, None] if term.rule == Rule.LESS else before <= after[:, None]
    return live.float() @ source.float() > 0


def _drawing_order(low: Lowering, result: Operand, depends: list[Tensor], kind: Output, levels: int) -> tuple[int, ...]:
    """The channels of a pixel in an order in which each is drawn after those that its parameters depend on."""
    colours = low.image[0]
    parameters = depends[result.node][result.channel :]
    if kind == Output.LOGISTIC_MIXTURE:
        if parameters.any():
            raise _not_causal(low, result, depends, "the parameters of a pixel")
        return (0,)
    per_channel = levels if kind == Output.CATEGORICAL else 1
    needs = parameters[: colours * per_channel].view(colours, per_channel, colours).any(1)
    missing, drawn = needs.sum(1), torch.zeros(colours, dtype=torch.bool, device="cpu")
    order: list[int] = []
    for _ in range(colours):
        ready = ((missing == 0) & ~drawn).nonzero()
        if not len(ready):
            channel = int((~drawn).nonzero()[0])
            raise _not_causal(low, result, depends, f"channel {channel} of a pixel")
        order.append(int(ready[0]))
        drawn[order[-1]] = True
        missing -= needs[:, order[-1]].long()
    return tuple(order)


def _not_causal(low: Lowering, result: Operand, depends: list[Tensor], what: str) -> ValueError:
    """Names the first operation on the way from a pixel to its own parameters."""
    leads = {result.node}
    for i in reversed(low.instructions):
        if i.out.node in leads:
            leads.update(t.source.node for t in i.terms if t.dy == t.dx == 0)
            leads.update(operand.node for operand, _ in i.operands())
    for i, origin in zip(low.instructions, low.origins, strict=True):
        if i.out.node in leads and depends[i.out.node].any():
            return ValueError(
                f"network is not causal: {what} would depend on itself. {origin} sees the pixel itself, and what "
                "follows passes it on to the output"
            )
    return ValueError(f"network is not causal: {what} would depend on itself")


def _times(depends: Tensor, place: Tensor) -> Tensor:
    """How many channels have to be drawn before each channel of a node can be computed."""
    return torch.where(depends, place + 1, 0).amax(1)


def _with_blocks(instruction: Instruction, times: Tensor) -> Instruction:
    begin, blocks = instruction.out.channel, []
    rows = times[begin : begin + instruction.channels].tolist()
    for time, run in itertools.groupby(range(len(rows)), key=rows.__getitem__):
        channels = list(run)
        blocks.append(Block(channels[0], channels[-1] + 1, time))
    return dataclasses.replace(instruction, blocks=tuple(blocks))


# ---- What is needed.


def _alive(instructions: list[Instruction], output: int) -> list[Instruction]:
    """Without those whose result nothing reads."""
    needed, alive = {output}, []
    for i in reversed(instructions):
        if i.out.node in needed:
            needed.update(read_by(i))
            alive.append(i)
    return alive[::-1]


def read_by(instruction: Instruction) -> Counter[int]:
    """How often an instruction reads each node."""
    reads = Counter(term.source.node for term in instruction.terms)
    reads.update(operand.node for operand, _ in instruction.operands())
    return reads


def _without_unused(
    nodes: list[Node], instructions: list[Instruction], output: Operand
) -> tuple[tuple[Node, ...], list[Instruction], Operand]:
    """Numbers the nodes that are left anew."""
    used = {0, output.node}
    for i in instructions:
        used.update((i.out.node, *read_by(i)))
    number = {old: new for new, old in enumerate(sorted(used))}

    def moved(operand: Operand) -> Operand:
        return dataclasses.replace(operand, node=number[operand.node])

    def renumbered(i: Instruction) -> Instruction:
        return dataclasses.replace(
            i,
            out=moved(i.out),
            terms=tuple(dataclasses.replace(term, source=moved(term.source)) for term in i.terms),
            adds=tuple(map(moved, i.adds)),
            factor=None if i.factor is None else moved(i.factor),
            residuals=tuple(map(moved, i.residuals)),
        )

    return tuple(nodes[old] for old in sorted(used)), list(map(renumbered, instructions)), moved(output)
