"""Reads a network with torch.fx: what depends on the image becomes a program, the rest stays with PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from .lowering import Constant, Environment, Lowering, Segment, Unsupported, View
from .operations import FUNCTIONS, METHODS, call_module

# What may be asked of a feature map without reading its values.
_ATTRIBUTES = ("shape", "device", "dtype", "ndim", "requires_grad")
_QUERIES = ("size", "dim", "numel", "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor")
_LIKE = (torch.zeros_like, torch.ones_like, torch.full_like)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """PyTorch's modules; those of this package not, even where PyTorch has made a subclass of them."""
        ours = any(base.__module__.startswith("dgm_kernels") for base in type(m).__mro__)
        return not ours and super().is_leaf_module(m, module_qualified_name)


class _Call(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        return self.network(x)


class _ConditionalCall(_Call):
    def forward(self, x: Tensor, condition: Tensor) -> Any:  # type: ignore[override]
        return self.network(x, condition)


@contextlib.contextmanager
def evaluating(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode without gradients and autocast; every module gets its own mode back."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class Trace:
    """A network as instructions, and as the graph of what does not depend on the image.

    Args:
        network: in eval mode, ``network(x)`` or ``network(x, condition)``.
        image: channels, height and width.
        dimensions: of the network's tensors: 4 for images, 3 for sequences, 2 for features.
        dtype: of the network's input.
        device: of the network.
        condition: of one sample, ``[1, ...]``.

    Raises:
        ValueError: the network cannot be traced, or has an operation that a generator does not know.
    """

    def __init__(
        self,
        network: nn.Module,
        image: tuple[int, int, int],
        dimensions: int,
        dtype: torch.dtype,
        device: torch.device,
        condition: Tensor | None,
    ) -> None:
        self.lowering = Lowering(image, dimensions)
        self._stub = torch.zeros((), dtype=dtype, device=device)
        self._root = _Call(network) if condition is None else _ConditionalCall(network)
        self._graph = _graph(self._root)
        self._constants: list[fx.Node] = []  # in the order in which PyTorch computes them
        self._views: dict[fx.Node, Any] = {}
        self._originals: dict[fx.Node, fx.Node] = {}  # of tensors that in-place operations changed
        self.output = self._walk(condition)

    def evaluate(self, batch: int, condition: Tensor | None) -> Environment:
        """Computes what does not depend on the image for a call."""
        env: Environment = {}
        for node in self._constants:
            env[node] = self._compute(node, env, batch, condition)
        return env

    def _walk(self, condition: Tensor | None) -> View:
        env: Environment = {}
        result: Any = None
        for place, node in enumerate(self._graph.nodes):
            self.lowering.origin = _describe(node)
            if place == 0:
                self._views[node] = View((Segment(0, 0, self.lowering.image[0]),))
            elif node.op == "output":
                result = self._read(node.args[0], env)
            elif self._is_constant(node):
                self._constants.append(node)
                env[node] = self._compute(node, env, 1, condition)
            else:
                self._views[node] = self._lower(node, env)
        if not isinstance(result, (View, Constant)):
            raise ValueError(f"network must return one tensor, got {type(result).__name__}")
        return result if isinstance(result, View) else self.lowering.view(result, result.value.shape[1])

    def _is_constant(self, node: fx.Node) -> bool:
        """Whether PyTorch can compute it before the image is there."""
        if not any(argument in self._views for argument in node.all_input_nodes):
            return True
        if node.op == "call_function":
            return node.target in _LIKE or (node.target is getattr and node.args[1] in _ATTRIBUTES)
        return node.op == "call_method" and node.target in _QUERIES

    def _compute(self, node: fx.Node, env: Environment, batch: int, condition: Tensor | None) -> Any:
        if node.op == "placeholder":
            return condition
        if node.op == "get_attr":
            value: Any = self._root
            for name in str(node.target).split("."):
                value = getattr(value, name)
            return value

        def value_of(argument: fx.Node) -> Any:
            return env[argument] if argument in env else self._like(argument, batch)

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return self._root.get_submodule(str(node.target))(*args, **kwargs)

    def _like(self, node: fx.Node, batch: int) -> Tensor:
        """A tensor of zeros of the shape of a feature map, which takes no memory."""
        pixels = {2: (), 3: self.lowering.image[2:], 4: self.lowering.image[1:]}[self.lowering.dimensions]
        return self._stub.expand(batch, self._views[node].channels, *pixels)

    def _read(self, argument: Any, env: Environment) -> Any:
        """An argument as the handlers of operations take it."""

        def read(node: fx.Node) -> Any:
            if node in self._views:
                return self._views[node]
            value = env[node]
            return Constant(lambda env: env[node], value) if isinstance(value, Tensor) else value

        return _map_nodes(argument, read)

    def _lower(self, node: fx.Node, env: Environment) -> Any:
        args, kwargs = self._read(node.args, env), self._read(node.kwargs, env)
        try:
            if node.op == "call_module":
                module = self._root.get_submodule(str(node.target))
                result = call_module(self.lowering, module, *args, **kwargs)
                in_place = getattr(module, "inplace", False)
            else:
                table: dict[Any, Any] = FUNCTIONS if node.op == "call_function" else METHODS
                if node.target not in table:
                    raise Unsupported("an operation that is not known")
                result = table[node.target](self.lowering, *args, **kwargs)
                written = node.op == "call_method" and str(node.target).endswith("_")
                in_place = written or kwargs.get("inplace", False)
        except Unsupported as error:
            raise ValueError(f"network cannot be generated from pixel by pixel: {_describe(node)}: {error}") from error
        if in_place:
            self._changed(node, result)
        return result

    def _changed(self, node: fx.Node, result: Any) -> None:
        """All names of a tensor that was written to stand for what was written."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        original = self._originals.setdefault(source, source)
        self._originals[node] = original
        for name, first in self._originals.items():
            if first is original:
                self._views[name] = result


def _graph(root: nn.Module) -> fx.Graph:
    try:
        return _Tracer().trace(root)
    except Exception as error:  # whatever the network's code does with a proxy in place of a tensor
        raise ValueError(
            "network cannot be traced by torch.fx: its forward may not decide by values or shapes of tensors, nor turn "
            f"them into numbers ({type(error).__name__}: {error})"
        ) from error


def _describe(node: fx.Node) -> str:
    """The operation and the module that it is in."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path, kind = stack[-1] if stack else ("", None)
    path = str(path).removeprefix("network").removeprefix(".")
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    if node.op == "call_module":
        name = getattr(kind, "__name__", str(kind))
    return f"{name} in module {path!r}" if path else f"{name} in the network"


def _map_nodes(argument: Any, read: Any) -> Any:
    if isinstance(argument, fx.Node):
        return read(argument)
    if isinstance(argument, (tuple, list)):
        return type(argument)(_map_nodes(part, read) for part in argument)
    if isinstance(argument, slice):
        return slice(*(_map_nodes(part, read) for part in (argument.start, argument.stop, argument.step)))
    if isinstance(argument, dict):
        return {key: _map_nodes(part, read) for key, part in argument.items()}
    return argument
