"""Runs programs in PyTorch on any device: the specification of the C++ executor; on GPUs, as two CUDA graphs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from . import reference
from .program import Activation, Block, Instruction, Kind, Operand, Output, Program, Term
from .taps import Rule

_FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.NONE: lambda x: x,
    Activation.RELU: torch.relu,
    Activation.ELU: torch.nn.functional.elu,
    Activation.SILU: torch.nn.functional.silu,
    Activation.TANH: torch.tanh,
    Activation.SIGMOID: torch.sigmoid,
    Activation.GATE: lambda x: torch.tanh(x[..., : x.shape[-1] // 2]) * torch.sigmoid(x[..., x.shape[-1] // 2 :]),
}


@dataclasses.dataclass(frozen=True)
class _Product:
    """The terms of an instruction that read one source, as one matrix ``[taps * inputs, sums]``."""

    source: Operand
    inputs: int
    offsets: Tensor  # of the taps, in places
    matrix: Tensor


@dataclasses.dataclass(frozen=True)
class _Step:
    """One block of an instruction, with its part of the weights."""

    instruction: Instruction
    block: Block
    products: tuple[_Product, ...]
    bias: Tensor
    sums: Tensor | None  # which of the instruction's sums; None for all of them


class Executor:
    """A program with weights, and room for the feature maps of a batch.

    A map is kept as ``[places, batch, channels]``, the places being the pixels with a border of zeros around them, so
    that a tap is a constant distance. Positions are tensors on the device: :meth:`row_step` and :meth:`pixel_step` do
    the same operations everywhere, so that a CUDA graph of them can be replayed.

    Args:
        weights, constants: of the call, in ``dtype``, which is what everything is computed in.
        uniform: ``[pixels, batch, numbers]``, of which each pixel takes ``program.numbers``.
        given, known: ``[pixels, batch, channels]``, int64 and bool: levels that are not drawn.
        scale, offset: level v enters the network as ``v * scale + offset``.
    """

    def __init__(
        self,
        program: Program,
        weights: Sequence[Tensor],
        constants: Sequence[Tensor],
        uniform: Tensor,
        given: Tensor,
        known: Tensor,
        scale: float,
        offset: float,
        dtype: torch.dtype,
    ) -> None:
        self.program, self.device, self.dtype = program, uniform.device, dtype
        self.uniform, self.given, self.known = uniform, given, known
        self.scale, self.offset = scale, offset
        self.levels = torch.zeros_like(given)
        self.row, self.pixel = (torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(2))
        self._lay_out()
        self.maps = [self._new_map(index, constants) for index in range(len(program.nodes))]
        self.steps = [step for instruction in program.instructions for step in self._new_steps(instruction, weights)]
        self.row_steps = [step for step in self.steps if step.instruction.row_phase]
        self.pixel_steps: list[list[_Step]] = [[] for _ in range(len(program.order) + 1)]  # by time
        for step in self.steps:
            if not step.instruction.row_phase:
                self.pixel_steps[step.block.time].append(step)

    # ---- Memory.

    def _lay_out(self) -> None:
        """Where each pixel is among the places."""
        _, height, width = self.program.image
        terms = [term for instruction in self.program.instructions for term in instruction.terms]
        above = max((-term.dy for term in terms), default=0)
        left, right = (max([0, *(sign * term.dx for term in terms)]) for sign in (-1, 1))
        self.stride = left + width + right
        rows = torch.arange(above, above + height, device=self.device)[:, None] * self.stride
        self.places = (rows + torch.arange(left, left + width, device=self.device)).flatten()
        self.size = (above + height) * self.stride
        self.columns = torch.arange(width, device=self.device)

    def _new_map(self, index: int, constants: Sequence[Tensor]) -> Tensor:
        node, batch = self.program.nodes[index], self.given.shape[1]
        if node.kind == Kind.SAMPLE_CONSTANT:
            return constants[node.constant].expand(batch, -1)
        new = torch.zeros(self.size, batch, node.channels, dtype=self.dtype, device=self.device)
        if node.kind == Kind.PIXEL_CONSTANT:
            new[self.places] = constants[node.constant].flatten(2).permute(2, 0, 1).expand(-1, batch, -1)
        return new

    def _new_steps(self, instruction: Instruction, weights: Sequence[Tensor]) -> Iterator[_Step]:
        bias = torch.zeros(instruction.sums, dtype=self.dtype, device=self.device)
        if instruction.bias >= 0:
            bias = weights[instruction.bias]
        sources: dict[tuple[int, int, int], list[Term]] = {}
        for term in instruction.terms:
            key = (term.source.node, term.source.channel, weights[term.weight].shape[1])
            sources.setdefault(key, []).append(term)
        products = []
        for (node, channel, inputs), terms in sources.items():
            offsets = torch.tensor([t.dy * self.stride + t.dx for t in terms], device=self.device)
            matrix = torch.cat([self._matrix(term, weights).t() for term in terms])
            products.append(_Product(Operand(node, channel), inputs, offsets, matrix))
        for block in instruction.blocks:
            rows = instruction.sum_rows(block.begin, block.end)
            if len(rows) == instruction.sums and instruction.gate_groups == 1:
                yield _Step(instruction, block, tuple(products), bias, None)
                continue
            sums = torch.tensor(rows, device=self.device)
            parts = [dataclasses.replace(p, matrix=p.matrix.index_select(1, sums)) for p in products]
            yield _Step(instruction, block, tuple(parts), bias.index_select(0, sums), sums)

    def _matrix(self, term: Term, weights: Sequence[Tensor]) -> Tensor:
        """The weights of a tap that count; what the others hold is not read."""
        matrix = weights[term.weight][:, :, term.row, term.column]
        if term.rule == Rule.FULL:
            return matrix
        before, after = (self.program.degrees[d].to(self.device) for d in (term.in_degrees, term.out_degrees))
        live = before < after[:, None] if term.rule == Rule.LESS else before <= after[:, None]
        return matrix.where(live, 0.0)

    # ---- Instructions.

    def run(self, step: _Step, positions: Tensor) -> None:
        """Computes a block of channels at some places."""
        i, block, batch = step.instruction, step.block, self.given.shape[1]
        sums = step.bias.expand(len(positions) * batch, -1)
        for product in step.products:
            seen = (positions[:, None] + product.offsets).flatten()
            source = self.maps[product.source.node].narrow(2, product.source.channel, product.inputs)
            taps = source.index_select(0, seen).view(len(positions), -1, batch, product.inputs)
            sums = torch.addmm(sums, taps.transpose(1, 2).reshape(len(positions) * batch, -1), product.matrix)
        sums = sums.view(len(positions), batch, -1)
        for operand in i.adds:
            values = self._read(operand, 0, i.sums, positions)
            values = values if step.sums is None else values.index_select(-1, step.sums)
            sums = sums + values * operand.scale
        result = _FUNCTIONS[i.activation](sums)
        if i.factor is not None:
            result = result * self._read(i.factor, block.begin, block.end, positions)
        for operand in i.residuals:
            result = result + self._read(operand, block.begin, block.end, positions) * operand.scale
        out = self.maps[i.out.node].narrow(2, i.out.channel + block.begin, block.end - block.begin)
        out.index_copy_(0, positions, result.contiguous())

    def _read(self, operand: Operand, begin: int, end: int, positions: Tensor) -> Tensor:
        """Channels ``begin .. end - 1`` of an operand at some places, ``[positions, batch, channels]``."""
        values = self.maps[operand.node][..., operand.channel + begin : operand.channel + end]
        return values if values.dim() == 2 else values.index_select(0, positions)

    # ---- Generation.

    def row_step(self) -> None:
        """What a row needs before its pixels."""
        positions = self.places.index_select(0, self.row * len(self.columns) + self.columns)
        for step in self.row_steps:
            self.run(step, positions)
        self.row += 1

    def pixel_step(self) -> None:
        """Draws one pixel; the features that only later pixels see come last."""
        position = self.places.index_select(0, self.pixel)
        for time, steps in enumerate(self.pixel_steps):
            for step in steps:
                self.run(step, position)
            if time < len(self.program.order):
                self._draw(time, position)
        self.pixel += 1

    def _draw(self, time: int, position: Tensor) -> None:
        program, output = self.program, self.program.output
        channels = program.image[0]
        begin, end = 0, channels
        if program.kind != Output.LOGISTIC_MIXTURE:
            begin = program.order[time]
            end = begin + 1
        parameters = self.maps[output.node].index_select(0, position)[0, :, output.channel :]
        drawn = draw(program, parameters, self.uniform.index_select(0, self.pixel)[0], begin)
        given, known = (t.index_select(0, self.pixel)[:, :, begin:end] for t in (self.given, self.known))
        levels = torch.where(known, given, drawn[None])
        self.levels.narrow(2, begin, end - begin).index_copy_(0, self.pixel, levels)
        values = levels.to(self.dtype) * self.scale + self.offset
        self.maps[0].narrow(2, begin, end - begin).index_copy_(0, position, values)

    def generate(self) -> Tensor:
        """Levels ``[pixels, batch, channels]``."""
        _, height, width = self.program.image
        row_step, pixel_step = self.row_step, self.pixel_step
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                row_step, pixel_step = self._captured(row_step), self._captured(pixel_step)
            self._restart()
        for _ in range(height):
            row_step()
            for _ in range(width):
                pixel_step()
        return self.levels

    def _captured(self, function: Callable[[], None]) -> Callable[[], None]:
        """The function as a CUDA graph, after a run that lets libraries set themselves up."""
        self._restart()
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph.replay

    def _restart(self) -> None:
        self.row.zero_()
        self.pixel.zero_()
        for node, features in zip(self.program.nodes, self.maps, strict=True):
            if node.kind in (Kind.INPUT, Kind.VALUE):
                features.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """The network's output for known pixels: ``[pixels, batch, channels]`` to ``[pixels, batch, outputs]``."""
        self.maps[0][self.places] = x
        for step in self.steps:
            for positions in self.places.split(len(self.columns)):
                self.run(step, positions)
        return self.maps[self.program.output.node][self.places][..., self.program.output.channel :]


def draw(program: Program, parameters: Tensor, uniform: Tensor, channel: int) -> Tensor:
    """Levels ``[batch, 1]`` of a channel, or of all channels of a logistic mixture, from the parameters of a pixel.

    Args:
        parameters: ``[batch, outputs]`` of the network.
        uniform: ``[batch, numbers]``.
    """
    if program.kind == Output.LOGISTIC_MIXTURE:
        return reference.discretized_logistic_mixture_sample(parameters, uniform[:, : program.numbers], program.levels)
    if program.kind == Output.BERNOULLI:
        probability_of_0 = 1.0 / (1.0 + torch.exp(parameters[:, channel, None]))
        return (uniform[:, channel, None] > probability_of_0).to(torch.int64)
    logits = parameters[:, channel * program.levels : (channel + 1) * program.levels]
    return reference.categorical_sample(logits, uniform[:, channel])[:, None]
