"""What networks become: phases, times, fusion, the encoding, and steps that a CUDA graph can replay."""

from __future__ import annotations

import struct
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import dgm_kernels
from dgm_kernels import NoiseKey, incremental_sampler
from dgm_kernels.masked_conv.generate_reference import Executor
from dgm_kernels.masked_conv.program import (
    Activation,
    Block,
    Instruction,
    Kind,
    Node,
    Operand,
    Output,
    Program,
    Term,
)
from dgm_kernels.masked_conv.taps import Rule
from dgm_kernels.nn import CausalConv1d, HorizontalConv2d, MaskedConv2d, MaskedLinear, VerticalConv2d

from .generation_networks import CASES


def program_of(network: nn.Module, shape: tuple[int, ...], condition: Tensor | None = None, **settings: Any) -> Program:
    sampler = incremental_sampler(network, shape, **settings)
    sampler(1 if condition is None else len(condition), condition=condition)
    return list(sampler._compiled.values())[-1].program


def case_program(name: str) -> Program:
    case = CASES[name]
    condition = None if case.condition is None else torch.randn(case.condition)
    return program_of(case.make(), case.shape, condition, **case.settings)


def forms(program: Program) -> list[tuple[int, int, str, int, bool]]:
    """Terms, adds, activation, residuals and phase of each instruction."""
    return [(len(i.terms), len(i.adds), i.activation.name, len(i.residuals), i.row_phase) for i in program.instructions]


# ---- Phases, order and times.


def test_vertical_stack_runs_once_a_row() -> None:
    """And with it all that depends on it alone; the horizontal stack runs once a pixel."""
    program = case_program("gated")
    for i in program.instructions:
        sources = {term.source.node for term in i.terms} | {operand.node for operand, _ in i.operands()}
        seen = [program.nodes[node] for node in sources]
        assert i.row_phase == program.nodes[i.out.node].row_phase
        if i.row_phase:
            above = [term for term in i.terms if not program.nodes[term.source.node].row_phase]
            assert all(term.dy < 0 for term in above)
        else:
            assert any(not node.row_phase for node in seen)
    # depth 3: for the vertical stack a convolution, its gate and the way across, less the last gate, which is not read
    assert sum(i.row_phase for i in program.instructions) == 3 * 3 - 1


def test_causal_stack_has_no_row_phase() -> None:
    program = case_program("wavenet")
    assert not any(i.row_phase for i in program.instructions)
    assert {term.dx for i in program.instructions for term in i.terms} == {0, -1, -2, -4}
    assert {term.dy for i in program.instructions for term in i.terms} == {0}


def test_dead_taps_are_no_terms() -> None:
    network = nn.Sequential(MaskedConv2d(1, 4, (5, 3), mask_type="A"), MaskedConv2d(4, 1, 3, mask_type="B"))
    program = program_of(network, (1, 4, 4), output="bernoulli")
    assert [len(i.terms) for i in program.instructions] == [7, 5]
    taps = {(term.dy, term.dx, term.row, term.column) for term in program.instructions[1].terms}
    assert taps == {(-1, -1, 0, 0), (-1, 0, 0, 1), (-1, 1, 0, 2), (0, -1, 1, 0), (0, 0, 1, 1)}


def test_times_of_colours() -> None:
    """Features of a group see the colours before it (type A), then up to it (type B)."""
    network = nn.Sequential(
        MaskedConv2d(3, 6, 3, mask_type="A", channel_groups=3),
        MaskedConv2d(6, 12, 3, mask_type="B", channel_groups=3, gated=True),
        MaskedConv2d(6, 3, 1, mask_type="B", channel_groups=3),
    )
    program = program_of(network, (3, 3, 3), output="bernoulli")
    assert program.order == (0, 1, 2)
    two = (Block(0, 2, 0), Block(2, 4, 1), Block(4, 6, 2))
    one = (Block(0, 1, 0), Block(1, 2, 1), Block(2, 3, 2))
    assert [i.blocks for i in program.instructions] == [two, two, one]
    gate = program.instructions[1]
    assert gate.sum_rows(2, 4) == [4, 5, 6, 7]
    centre = [term for term in gate.terms if term.dy == term.dx == 0]
    assert [term.rule for term in centre] == [Rule.LESS_EQUAL]
    assert program.degrees[centre[0].in_degrees].tolist() == [0, 0, 1, 1, 2, 2]
    assert program.degrees[centre[0].out_degrees].tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_time_after_the_last_draw() -> None:
    """A feature map that sees its own pixel waits for it: only later pixels read it."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.before = nn.Conv2d(2, 4, 1), MaskedConv2d(4, 2, 3, mask_type="A")

        def forward(self, x: Tensor) -> Tensor:
            return self.before(F.relu(self.own(x)))

    program = program_of(Network(), (2, 4, 4), output="bernoulli")
    assert program.order == (0, 1)
    assert [i.blocks for i in program.instructions] == [(Block(0, 4, 2),), (Block(0, 2, 0),)]


def test_order_of_features() -> None:
    degrees = torch.tensor([2, 0, 3, 1])
    hidden = torch.tensor([0, 0, 2, 1, -1])
    network = nn.Sequential(MaskedLinear(degrees, hidden), nn.ReLU(), MaskedLinear(hidden, degrees, strict=True))
    program = program_of(network, (4,), output="bernoulli")
    assert program.image == (4, 1, 1)
    assert program.order == (1, 3, 0, 2)
    first, last = program.instructions
    assert first.blocks == (Block(0, 2, 1), Block(2, 3, 3), Block(3, 4, 2), Block(4, 5, 0))
    assert last.blocks == (Block(0, 1, 2), Block(1, 2, 0), Block(2, 3, 3), Block(3, 4, 1))
    assert [i.terms[0].rule for i in program.instructions] == [Rule.LESS_EQUAL, Rule.LESS]


def test_mixture_draws_a_pixel_in_one_step() -> None:
    program = case_program("pixelcnnpp")
    assert program.order == (0,) and program.numbers == 4
    copies = [i for i in program.instructions if i.blocks[0].time == 1]  # of the pixel, next to the border's ones
    assert [i.adds for i in copies] == [(Operand(0),)]
    assert {block.time for i in program.instructions for block in i.blocks if i not in copies} == {0}


# ---- Fusion.


class _Sum(nn.Module):
    """Sums of convolutions with biases, of one phase or two."""

    def __init__(self, horizontal: bool) -> None:
        super().__init__()
        self.above = VerticalConv2d(1, 4, (2, 3), mask_type="A")
        self.left: nn.Module = VerticalConv2d(1, 4, 3, mask_type="A")
        if horizontal:
            self.left = HorizontalConv2d(1, 4, 2, mask_type="A")
        self.last = nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.above(x) + self.left(x)))


def test_sum_of_convolutions_is_one_instruction() -> None:
    """Biases too; what runs once a row stays apart from what runs once a pixel."""
    assert forms(program_of(_Sum(False), (1, 4, 4), output="bernoulli")) == [
        (3 + 3, 0, "TANH", 0, True),
        (1, 0, "NONE", 0, True),
    ]
    assert forms(program_of(_Sum(True), (1, 4, 4), output="bernoulli")) == [
        (3, 0, "NONE", 0, True),
        (1, 1, "TANH", 0, False),
        (1, 0, "NONE", 0, False),
    ]


def test_layers_of_the_gated_network() -> None:
    """A layer: the vertical convolution, its gate, the way across; the gated horizontal one; residual; skips."""
    counts = Counter(forms(case_program("gated_sample_condition")))
    assert counts[(6, 0, "NONE", 0, True)] == 2 and counts[(3, 0, "NONE", 0, True)] == 1  # vertical
    assert counts[(0, 2, "GATE", 0, True)] == 2  # of the last layer nothing reads it
    assert counts[(1, 0, "NONE", 0, True)] == 3  # across
    assert counts[(3, 1, "GATE", 0, False)] == 2 and counts[(2, 1, "GATE", 0, False)] == 1  # horizontal
    assert counts[(1, 0, "NONE", 0, False)] == 2 and counts[(1, 1, "NONE", 0, False)] == 1  # first, residual; last
    assert counts[(3, 1, "RELU", 0, False)] == 1  # all skips and the zero that their sum begins with
    assert counts[(1, 0, "ELU", 0, False)] == 1
    assert sum(counts.values()) == 16


def test_residual_layer_of_wavenet() -> None:
    """A gated convolution; the residual; skips, of which the last takes the activation behind them."""
    program = case_program("wavenet")
    assert forms(program) == [
        (1, 0, "NONE", 0, False),
        (2, 0, "GATE", 0, False),
        (1, 1, "NONE", 0, False),
        (2, 0, "GATE", 0, False),
        (1, 1, "NONE", 0, False),
        (2, 0, "GATE", 0, False),
        (3, 0, "RELU", 0, False),
        (1, 0, "NONE", 0, False),
    ]


def test_gates_and_residuals_out_of_single_operations() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = CausalConv1d(1, 4, 2, mask_type="A")
            self.features, self.gates = CausalConv1d(4, 4, 2), CausalConv1d(4, 4, 2)
            self.last = nn.Conv1d(8, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            h = x + torch.tanh(self.features(x)) * torch.sigmoid(self.gates(x))
            return self.last(F.elu(torch.cat([h, -h], dim=1)))

    program = program_of(Network(), (1, 6), output="bernoulli")
    assert forms(program) == [
        (1, 0, "NONE", 0, False),
        (2, 0, "SIGMOID", 0, False),
        (2, 0, "TANH", 1, False),
        (0, 1, "ELU", 0, False),
        (0, 1, "ELU", 0, False),
        (1, 0, "NONE", 0, False),
    ]
    assert program.instructions[2].factor is not None
    assert [i.adds[0].scale for i in program.instructions[3:5]] == [1.0, -1.0]
    assert program.instructions[4].out == Operand(program.instructions[3].out.node, 4)


def test_what_two_read_is_not_merged() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = MaskedConv2d(1, 1, 3, mask_type="A")

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return torch.relu(h) + 0.5 * h

    program = program_of(Network(), (1, 4, 4), output="bernoulli")
    assert forms(program) == [(4, 0, "NONE", 0, False), (0, 1, "RELU", 1, False)]
    assert program.instructions[1].residuals[0].scale == 0.5


@pytest.mark.parametrize("part", [slice(0, 3), slice(2, 5), slice(3, 6)], ids=str)
def test_output_is_a_node_of_its_own(part: slice) -> None:
    """Where the network returns a part of a feature map: executors draw from all channels of a node."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = MaskedConv2d(1, 6, 3, mask_type="A")

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x)[:, part]

    program = program_of(Network(), (1, 4, 4), levels=3)
    assert program.output.channel == 0 and program.nodes[program.output.node].channels == 3


def test_constants_of_all_samples_have_a_batch_of_one() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = MaskedConv2d(1, 1, 3, mask_type="A")
            self.places = nn.Parameter(torch.randn(1, 1, 3, 4))

        def forward(self, x: Tensor, condition: Tensor) -> Tensor:
            return self.first(x) + self.places + condition[:, None, None, None]

    sampler, condition = incremental_sampler(Network(), (1, 3, 4), output="bernoulli"), torch.randn(5)
    with torch.no_grad():
        compiled, env = sampler._compile(sampler._call(5, NoiseKey(0), None, condition, None, None))
        shapes = {tuple(constant.shape) for constant in sampler._operands(compiled, env)[1]}
    assert shapes == {(1, 1, 3, 4), (5, 1)}
    drawn, expected = (draw(5, key=NoiseKey(0), condition=condition) for draw in (sampler, sampler.naive))
    assert torch.equal(drawn, expected)


def test_constants_are_nodes() -> None:
    kinds = Counter(node.kind for node in case_program("gated_sample_condition").nodes)
    assert kinds[Kind.SAMPLE_CONSTANT] > 0 and kinds[Kind.PIXEL_CONSTANT] == 0
    kinds = Counter(node.kind for node in case_program("wavenet_conditioned").nodes)
    assert kinds[Kind.PIXEL_CONSTANT] == 3 and kinds[Kind.SAMPLE_CONSTANT] == 0


# ---- Encoding.


def decode(encoded: Tensor, degrees: tuple[Tensor, ...]) -> Program:
    """The program that a tensor spells out, read as the documentation of Program.encode says."""
    words = iter(encoded.tolist())

    def take(count: int) -> list[int]:
        return [next(words) for _ in range(count)]

    version, channels, height, width, nodes, instructions, node, channel, kind, levels, steps = take(11)
    assert version == 1
    order = tuple(take(steps))
    parsed_nodes = []
    for _ in range(nodes):
        node_kind, node_channels, row_phase, constant = take(4)
        parsed_nodes.append(Node(node_channels, Kind(node_kind), bool(row_phase), constant))
    parsed = []
    for _ in range(instructions):
        out, out_channel, size, activation, groups, row_phase, bias, factor, factor_channel = take(9)
        terms, adds, residuals, blocks = take(4)
        parsed_terms = []
        for _ in range(terms):
            source, first, dy, dx, weight, row, column, rule, in_degrees, out_degrees = take(10)
            place = (dy, dx, weight, row, column)
            parsed_terms.append(Term(Operand(source, first), *place, Rule(rule), in_degrees, out_degrees))
        operands = []
        for _ in range(adds + residuals):
            source, first, bits = take(3)
            operands.append(Operand(source, first, struct.unpack("<d", struct.pack("<q", bits))[0]))
        parsed.append(
            Instruction(
                Operand(out, out_channel),
                size,
                tuple(parsed_terms),
                bias,
                tuple(operands[:adds]),
                Activation(activation),
                groups,
                None if factor < 0 else Operand(factor, factor_channel),
                tuple(operands[adds:]),
                bool(row_phase),
                tuple(Block(*take(3)) for _ in range(blocks)),
            )
        )
    assert next(words, None) is None
    image, result = (channels, height, width), Operand(node, channel)
    return Program(image, tuple(parsed_nodes), tuple(parsed), result, Output(kind), levels, order, degrees)


@pytest.mark.parametrize("name", CASES)
def test_encoding_round_trip(name: str) -> None:
    program = case_program(name)
    encoded = program.encode()
    assert encoded.dtype == torch.int64 and encoded.dim() == 1
    again = decode(encoded, program.degrees)
    for field in ("image", "nodes", "instructions", "output", "kind", "levels", "order"):
        assert getattr(again, field) == getattr(program, field), field


# ---- Steps that can be replayed.


def executor_of(name: str, batch: int, key: NoiseKey) -> tuple[Executor, Tensor]:
    """The reference executor of a case before its first step, and the naive loop's samples."""
    case = CASES[name]
    condition = None if case.condition is None else torch.randn(case.condition)[:batch]
    sampler = incremental_sampler(case.make(), case.shape, **case.settings)  # type: ignore[arg-type]
    expected = sampler.naive(batch, key=key, condition=condition)
    call = sampler._call(batch, key, None, condition, None, None)
    compiled, env = sampler._compile(call)
    weights, constants = sampler._operands(compiled, env)
    given, known = (t.flatten(2).permute(2, 0, 1).contiguous() for t in (call.given, call.known))
    executor = sampler._executor(compiled, weights, constants, given, known, sampler._uniform(call))
    return executor, expected.flatten(2) if expected.dim() > 2 else expected[:, :, None]


class _Recorder(TorchDispatchMode):
    """The operations that run, and the shapes of the tensors that they take."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = tuple(tuple(a.shape) if isinstance(a, Tensor) else a for a in args if not isinstance(a, list))
        self.seen.append((str(func), shapes))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["pixelcnn_rgb", "gated_pixel_condition", "pixelcnnpp", "wavenet", "made"])
def test_steps_are_the_same_everywhere(name: str) -> None:
    """The same operations at every pixel, none of which waits for a device or copies from the host."""
    with torch.no_grad():
        executor, _ = executor_of(name, 2, NoiseKey(0))
        recorded: list[list[Any]] = []
        for step in (executor.row_step, executor.pixel_step, executor.pixel_step):
            with _Recorder() as recorder:
                step()
            recorded.append(recorder.seen)
            if executor.program.image[1:] == (1, 1):
                executor.pixel.zero_()
    assert recorded[1] == recorded[2]
    names = {name for name, _ in recorded[0] + recorded[1]}
    for waits in ("local_scalar", "nonzero", "lift_fresh", "scalar_tensor"):
        assert not [name for name in names if waits in name]


@pytest.mark.parametrize("name", ["pixelcnn_rgb", "gated_sample_condition", "pixelcnnpp_grey", "wavenet_conditioned"])
def test_replayed_steps_draw_the_samples(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One recording of a row and one of a pixel, replayed, as a CUDA graph is: torch.fx stands in for it."""
    with torch.no_grad():
        executor, expected = executor_of(name, 3, NoiseKey(6))

        def step(function: Any) -> Any:
            def returning() -> Tensor:
                function()
                return executor.pixel

            return make_fx(returning)()

        row, pixel = step(executor.row_step), step(executor.pixel_step)
        executor._restart()
        monkeypatch.setattr(executor, "row_step", row)
        monkeypatch.setattr(executor, "pixel_step", pixel)
        assert torch.equal(executor.generate().permute(1, 2, 0), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_generation_on_a_gpu(name: str) -> None:
    """In float64 the CPU's samples; the network moved to the GPU between two calls of one sampler."""
    case = CASES[name]
    network = case.make().double()
    sampler = incremental_sampler(network, case.shape, **case.settings)  # type: ignore[arg-type]
    condition = None if case.condition is None else torch.randn(case.condition, dtype=torch.float64)
    expected = sampler(4, key=NoiseKey(2), condition=condition)
    network.cuda()
    condition = None if condition is None else condition.cuda()
    on_gpu = sampler(4, key=NoiseKey(2), condition=condition)
    assert on_gpu.is_cuda and torch.equal(on_gpu.cpu(), expected)
    network.float()
    condition = None if condition is None else condition.float()
    with dgm_kernels.use_backend("reference"):
        single = sampler(4, key=NoiseKey(2), condition=condition)
    assert torch.equal(single, sampler.naive(4, key=NoiseKey(2), condition=condition))
