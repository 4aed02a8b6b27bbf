"""Merges instructions: sums of convolutions into one, and what follows them into the instruction that computes them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator

from .lowering import Lowering, Recipe
from .program import Activation, Instruction, Operand


def fuse(low: Lowering, instructions: list[Instruction], output: int) -> list[Instruction]:
    """The instructions, each merged with those that compute what it alone reads, if they run in the same phase.

    What runs once a row stays apart from what runs once a pixel: merged, it would be computed pixel by pixel.
    """
    reads = Counter([output])
    for i in instructions:
        reads.update(term.source.node for term in i.terms)
        reads.update(operand.node for operand, _ in i.operands())
    writers = Counter(i.out.node for i in instructions)
    fused: dict[int, Instruction] = {}  # by place
    producer: dict[int, int] = {}  # of a node: the place of the instruction that computes it for one reader
    for place, instruction in enumerate(instructions):
        while (merged := _merge_one(low, instruction, fused, producer)) is not None:
            instruction = merged
        fused[place] = instruction
        node = instruction.out.node
        whole = instruction.out.channel == 0 and instruction.channels == low.nodes[node].channels
        if whole and writers[node] == 1 and reads[node] == 1 and node != output:
            producer[node] = place
    return [fused[place] for place in sorted(fused)]


def _merge_one(
    low: Lowering, reader: Instruction, fused: dict[int, Instruction], producer: dict[int, int]
) -> Instruction | None:
    """The reader with one of its sources merged into it, which is taken away from the others; None if there is none."""
    for form in _forms(reader):
        for index, operand in enumerate(form.adds):
            place = producer.get(operand.node)
            if place is None:
                continue
            source = fused[place]
            if source.row_phase != form.row_phase or operand.channel != 0 or source.channels != form.sums:
                continue
            others = form.adds[:index] + form.adds[index + 1 :]
            merged = _into_sum(low, form, others, source, operand.scale) or _behind(form, others, source, operand.scale)
            if merged is not None:
                del fused[place], producer[operand.node]
                return merged
    return None


def _forms(reader: Instruction) -> Iterator[Instruction]:
    """The instruction and, of a product, the one with both factors exchanged."""
    yield reader
    if reader.factor is not None and _passes_on(reader) and len(reader.adds) == 1 and reader.adds[0].scale == 1.0:
        yield dataclasses.replace(reader, adds=(reader.factor,), factor=reader.adds[0])


def _passes_on(instruction: Instruction) -> bool:
    """Whether it only adds, multiplies by a factor and moves."""
    return not instruction.terms and instruction.bias < 0 and instruction.activation == Activation.NONE


def _into_sum(
    low: Lowering, reader: Instruction, others: tuple[Operand, ...], source: Instruction, scale: float
) -> Instruction | None:
    """The source's sum becomes a part of the reader's."""
    linear = source.activation == Activation.NONE and source.factor is None
    if not linear or (scale != 1.0 and (source.terms or source.bias >= 0)):
        return None
    adds = tuple(dataclasses.replace(o, scale=o.scale * scale) for o in (*source.adds, *source.residuals))
    return dataclasses.replace(
        reader,
        terms=source.terms + reader.terms,
        bias=_sum_of_biases(low, source.bias, reader.bias),
        adds=adds + others,
    )


def _behind(reader: Instruction, others: tuple[Operand, ...], source: Instruction, scale: float) -> Instruction | None:
    """The reader's factor and its other summands follow the source's activation."""
    if not _passes_on(reader) or scale != 1.0:
        return None
    if reader.factor is not None and (others or source.residuals or source.factor is not None):
        return None
    return dataclasses.replace(
        source,
        out=reader.out,
        factor=source.factor or reader.factor,
        residuals=source.residuals + others + reader.residuals,
    )


def _sum_of_biases(low: Lowering, first: int, second: int) -> int:
    if first < 0 or second < 0:
        return max(first, second)
    low.weights.append(_sum(low.weights[first], low.weights[second]))
    low.weight_shapes.append(low.weight_shapes[first])
    return len(low.weights) - 1


def _sum(first: Recipe, second: Recipe) -> Recipe:
    return lambda env: first(env) + second(env)
