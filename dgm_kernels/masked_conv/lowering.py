"""What the operations of a network become: feature maps and the instructions that produce them, not yet fused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .program import Activation, Instruction, Kind, Node, Operand, Term
from .taps import Kernel, Layout, Rule

Environment = dict[fx.Node, Any]  # what PyTorch computed of the nodes that do not depend on the image
Recipe = Callable[[Environment], Tensor]


class Unsupported(Exception):
    """An operation that a generator cannot do, or not with these arguments."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """Channels ``channel .. channel + channels - 1`` of a node, times ``scale``."""

    node: int
    channel: int
    channels: int
    scale: float = 1.0

    def operand(self) -> Operand:
        """The same without the number of channels."""
        return Operand(self.node, self.channel, self.scale)

    def part(self, begin: int, end: int) -> Segment:
        """Some of its channels."""
        return dataclasses.replace(self, channel=self.channel + begin, channels=end - begin)


@dataclasses.dataclass(frozen=True)
class View:
    """A tensor of the network: channels of nodes one after the other. Concatenating and splitting cost nothing."""

    segments: tuple[Segment, ...]

    @property
    def channels(self) -> int:
        """Size of dimension 1."""
        return sum(segment.channels for segment in self.segments)

    def scaled(self, scale: float) -> View:
        """Times a number."""
        return View(tuple(dataclasses.replace(s, scale=s.scale * scale) for s in self.segments))

    def part(self, begin: int, end: int) -> View:
        """Channels ``begin .. end - 1``."""
        parts, place = [], 0
        for segment in self.segments:
            low, high = max(begin - place, 0), min(end - place, segment.channels)
            if low < high:
                parts.append(segment.part(low, high))
            place += segment.channels
        return View(tuple(parts))


@dataclasses.dataclass(frozen=True)
class Constant:
    """A tensor that does not depend on the image: how to get it for a call, and its value for the call being traced."""

    recipe: Recipe
    value: Tensor


class Lowering:
    """Collects nodes and instructions; node 0 is the image.

    Args:
        image: channels, height and width.
        dimensions: of the network's tensors, the batch among them: 4 for images, 3 for sequences, 2 for features.
    """

    def __init__(self, image: tuple[int, int, int], dimensions: int) -> None:
        self.image, self.dimensions = image, dimensions
        self.nodes = [Node(image[0], Kind.INPUT)]
        self.instructions: list[Instruction] = []
        self.origins: list[str] = []  # of each instruction: the operation that it stands for
        self.weights: list[Recipe] = []
        self.weight_shapes: list[torch.Size] = []
        self.constants: list[Recipe] = []
        self.degrees: list[Constant] = []
        self.origin = ""  # of what is being lowered
        self._copies: dict[View, Operand] = {}
        self._group_degrees: dict[tuple[int, int], int] = {}

    # ---- Nodes and instructions.

    def emit(self, channels: int, out: Operand | None = None, **fields: Any) -> View:
        """An instruction, to a node of its own unless ``out`` is given."""
        if out is None:
            self.nodes.append(Node(channels))
            out = Operand(len(self.nodes) - 1)
        self.instructions.append(Instruction(out, channels, **fields))
        self.origins.append(self.origin)
        return View((Segment(out.node, out.channel, channels),))

    def emit_parts(self, views: Sequence[View], fields: Callable[[list[Segment]], dict[str, Any]]) -> View:
        """A node of as many channels as each of the views, with an instruction for each piece in which all are one."""
        channels = views[0].channels
        if any(view.channels != channels for view in views):
            raise Unsupported(f"tensors of {' and '.join(str(view.channels) for view in views)} channels together")
        if channels == 0:
            return View(())
        ends = sorted({end for view in views for end in _ends(view)})
        self.nodes.append(Node(channels))
        node, begin = len(self.nodes) - 1, 0
        for end in ends:
            pieces = [view.part(begin, end).segments[0] for view in views]
            self.emit(end - begin, Operand(node, begin), **fields(pieces))
            begin = end
        return View((Segment(node, 0, channels),))

    def contiguous(self, view: View) -> Operand:
        """The view as channels of one node, copied if they are not."""
        if not view.segments:
            raise Unsupported("a tensor without channels")
        first = view.segments[0]
        if len(view.segments) == 1 and first.scale == 1.0:
            return first.operand()
        if view not in self._copies:
            copy = self.emit_parts([view], lambda pieces: {"adds": (pieces[0].operand(),)})
            self._copies[view] = copy.segments[0].operand()
        return self._copies[view]

    # ---- Constants, weights, degrees.

    def view(self, value: View | Constant | float, channels: int) -> View:
        """A view, or a constant or a number that is broadcast to this number of channels."""
        if isinstance(value, View):
            return value
        if not isinstance(value, Constant):
            number = torch.tensor(float(value), dtype=torch.float64, device="cpu")
            value = Constant(lambda env: number, number)
        shape = (1,) * (self.dimensions - value.value.dim()) + tuple(value.value.shape)
        spatial = self._spatial()
        fits = all(size in (1, full) for size, full in zip(shape[2:], spatial, strict=False))
        if len(shape) != self.dimensions or shape[1] not in (1, channels) or not fits:
            raise Unsupported(f"a constant of shape {tuple(value.value.shape)} with {channels} channels")
        per_sample, recipe = all(size == 1 for size in shape[2:]), value.recipe

        def expanded(env: Environment) -> Tensor:
            tensor = recipe(env)
            tensor = tensor.view((1,) * (len(spatial) + 2 - tensor.dim()) + tuple(tensor.shape))
            if per_sample:
                return tensor.flatten(1).expand(-1, channels)
            return tensor.expand(-1, channels, *spatial).reshape(-1, channels, *self.image[1:])

        self.constants.append(expanded)
        kind = Kind.SAMPLE_CONSTANT if per_sample else Kind.PIXEL_CONSTANT
        self.nodes.append(Node(channels, kind, True, len(self.constants) - 1))
        return View((Segment(len(self.nodes) - 1, 0, channels),))

    def _spatial(self) -> tuple[int, ...]:
        return {2: (), 3: self.image[2:], 4: self.image[1:]}[self.dimensions]

    def weight(self, constant: Any, shape: Sequence[int]) -> int:
        """Index of a weight, viewed in this shape."""
        if not isinstance(constant, Constant):
            raise Unsupported("a weight that depends on the image")
        recipe, size = constant.recipe, torch.Size(shape)
        self.weights.append(lambda env: recipe(env).reshape(size))
        self.weight_shapes.append(size)
        return len(self.weights) - 1

    def bias(self, constant: Any) -> int:
        """Index of a bias, -1 for None."""
        return -1 if constant is None else self.weight(constant, constant.value.shape)

    def degree(self, constant: Any) -> int:
        """Index of a tensor of degrees."""
        if not isinstance(constant, Constant):
            raise Unsupported("degrees that depend on the image")
        self.degrees.append(constant)
        return len(self.degrees) - 1

    def group_degrees(self, channels: int, groups: int) -> int:
        """Index of the groups that channels belong to."""
        if (channels, groups) not in self._group_degrees:
            value = torch.arange(channels, device="cpu") * groups // channels
            self._group_degrees[channels, groups] = self.degree(Constant(lambda env: value, value))
        return self._group_degrees[channels, groups]

    # ---- Operations.

    def add(self, left: View | Constant | float, right: View | Constant | float, scale: float = 1.0) -> View:
        """``left + scale * right``, at least one of which is a view."""
        channels = _channels(left, right)
        views = [self.view(left, channels), self.view(right, channels).scaled(scale)]
        return self.emit_parts(views, lambda pieces: {"adds": tuple(piece.operand() for piece in pieces)})

    def multiply(self, left: View | Constant | float, right: View | Constant | float) -> View:
        """``left * right``."""
        if isinstance(right, View) and not isinstance(left, View):
            left, right = right, left
        assert isinstance(left, View)
        if not isinstance(right, (View, Constant)):
            return left.scaled(float(right))

        def product(pieces: list[Segment]) -> dict[str, Any]:
            whole = dataclasses.replace(pieces[0], scale=pieces[0].scale * pieces[1].scale)
            factor = dataclasses.replace(pieces[1], scale=1.0)
            return {"adds": (whole.operand(),), "factor": factor.operand()}

        return self.emit_parts([left, self.view(right, left.channels)], product)

    def activate(self, x: View, activation: Activation) -> View:
        """An elementwise function; one instruction for each part of ``x``."""
        return self.emit_parts([x], lambda pieces: {"adds": (pieces[0].operand(),), "activation": activation})

    def gate(self, x: View, condition: View | Constant | None, groups: int) -> View:
        """``gated_activation``."""
        adds = [self.contiguous(x), *self._conditions(condition, x.channels)]
        return self.emit(x.channels // 2, adds=tuple(adds), activation=Activation.GATE, gate_groups=groups)

    def _conditions(self, condition: View | Constant | None, channels: int) -> list[Operand]:
        """The condition of a convolution or a gate, ``[batch, channels]`` too."""
        if condition is None:
            return []
        if isinstance(condition, Constant) and condition.value.dim() == 2 < self.dimensions:
            recipe, pixels = condition.recipe, (1,) * (self.dimensions - 2)
            value = condition.value.view(*condition.value.shape, *pixels)
            condition = Constant(lambda env: (t := recipe(env)).view(*t.shape, *pixels), value)
        return [self.contiguous(self.view(condition, channels))]

    def conv(
        self,
        x: View,
        weight: Any,
        bias: Any,
        kernel: Kernel,
        gated: bool = False,
        condition: View | Constant | None = None,
    ) -> View:
        """A masked convolution, its condition and its gate."""
        outputs, inputs = weight.value.shape[:2]
        _check_inputs(x, inputs)
        index, source = self.weight(weight, (outputs, inputs, kernel.height, kernel.width)), self.contiguous(x)
        terms = []
        for tap in kernel.taps():
            degrees = (-1, -1)
            if tap.rule in (Rule.LESS, Rule.LESS_EQUAL):
                degrees = self.group_degrees(inputs, kernel.groups), self.group_degrees(outputs, kernel.groups)
            terms.append(Term(source, tap.dy, tap.dx, index, tap.row, tap.column, tap.rule, *degrees))
        adds = tuple(self._conditions(condition, outputs))
        gate: dict[str, Any] = {"activation": Activation.GATE, "gate_groups": kernel.groups} if gated else {}
        channels = outputs // 2 if gated else outputs
        return self.emit(channels, terms=tuple(terms), bias=self.bias(bias), adds=adds, **gate)

    def pointwise(self, x: View, weight: Any, bias: Any) -> View:
        """A convolution of kernel size 1, or a dense layer over the channels."""
        if math.prod(weight.value.shape[2:]) != 1:
            raise Unsupported(f"a kernel of size {tuple(weight.value.shape[2:])}, which is not masked")
        return self.conv(x, weight, bias, Kernel(Layout.RASTER, False, 1, 1, 1, (1, 1)))

    def masked_linear(self, x: View, weight: Any, bias: Any, in_degrees: Any, out_degrees: Any, strict: bool) -> View:
        """A dense layer over the channels, masked by degrees."""
        outputs, inputs = weight.value.shape
        _check_inputs(x, inputs)
        rule, degrees = Rule.LESS if strict else Rule.LESS_EQUAL, (self.degree(in_degrees), self.degree(out_degrees))
        index = self.weight(weight, (outputs, inputs, 1, 1))
        term = Term(self.contiguous(x), 0, 0, index, 0, 0, rule, *degrees)
        return self.emit(outputs, terms=(term,), bias=self.bias(bias))


def _ends(view: View) -> list[int]:
    ends = [0]
    for segment in view.segments:
        ends.append(ends[-1] + segment.channels)
    return ends[1:]


def _channels(left: View | Constant | float, right: View | Constant | float) -> int:
    return next(value.channels for value in (left, right) if isinstance(value, View))


def _check_inputs(x: View, inputs: int) -> None:
    if x.channels != inputs:
        raise Unsupported(f"{x.channels} channels for a weight of {inputs} inputs")
