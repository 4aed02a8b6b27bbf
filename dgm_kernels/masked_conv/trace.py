"""Reads a network with torch.fx: what depends on the image becomes a program, the rest stays with PyTorch."""

from __future__ import annotations

import contextlib
import operator
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from .lowering import Constant, Environment, Lowering, Segment, Unsupported, View
from .operations import FUNCTIONS, METHODS, aliases, call_module, writes

# What may be asked of a feature map without reading its values.
_ATTRIBUTES = ("shape", "device", "dtype", "ndim", "requires_grad")
_QUERIES = ("size", "dim", "numel", "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor")
_LIKE = (torch.zeros_like, torch.ones_like, torch.full_like)
_REFUSED = "network cannot be generated from pixel by pixel"

_lock = threading.RLock()  # of torch.fx, which changes how every module is called, and of the networks' modes


def _writing(target: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def write(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return write


class _Proxy(fx.Proxy):
    """Records ``h += f(h)`` as the write that it is; torch.fx's records ``h + f(h)``."""

    __iadd__ = _writing(operator.iadd)
    __isub__ = _writing(operator.isub)
    __imul__ = _writing(operator.imul)
    __itruediv__ = _writing(operator.itruediv)


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        """What stands for a node's result in the network's code."""
        return _Proxy(node, self)

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
    """Eval mode without gradients and autocast, in one thread at a time; every module gets its own mode back."""
    with _lock:
        modes = {module: module.training for module in network.modules()}
        network.eval()
        try:
            with computing(device):
                yield
        finally:
            for module, mode in modes.items():
                module.training = mode


@contextlib.contextmanager
def computing(device: torch.device) -> Iterator[None]:
    """Without gradients and autocast."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


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
        self._network = network
        self._root = _Call(network) if condition is None else _ConditionalCall(network)
        _check_hooks(network)
        self._graph = _graph(self._root)
        self._places = {node: place for place, node in enumerate(self._graph.nodes)}
        self._constants: list[fx.Node] = []  # in the order in which PyTorch computes them
        self._variable: set[fx.Node] = set()  # those of them that depend on values of the condition or of parameters
        self._numbers: dict[fx.Node, Any] = {}  # Python's, that the program holds
        self._views: dict[fx.Node, Any] = {}
        self._originals: dict[fx.Node, fx.Node] = {}  # of tensors that in-place operations changed
        self._owners: dict[fx.Node, fx.Node] = {}  # of the memory of tensors that may be parts of another
        self.output = self._walk(condition)

    def evaluate(self, batch: int, condition: Tensor | None) -> Environment:
        """Computes what does not depend on the image for a call.

        Raises:
            ValueError: the network has got hooks, or a number in it depends on how many samples there are.
        """
        _check_hooks(self._network)
        env: Environment = {}
        for node in self._constants:
            env[node] = self._compute(node, env, batch, condition)
        for node, value in self._numbers.items():
            if env[node] != value:
                raise ValueError(
                    f"{_REFUSED}: {_describe(node)}: a number that depends on how many samples there are, {value} with "
                    f"one, {env[node]} with {batch}"
                )
        return env

    def _walk(self, condition: Tensor | None) -> View:
        env: Environment = {}
        result: Any = None
        for node, place in self._places.items():
            self.lowering.origin = _describe(node)
            if place == 0:
                self._views[node] = View((Segment(0, 0, self.lowering.image[0]),))
            elif node.op == "output":
                result = self._read(node.args[0], env)
            elif self._is_constant(node):
                self._constants.append(node)
                self._note_values(node)
                env[node] = self._compute(node, env, 1, condition)
            else:
                self._views[node] = self._lower(node, env)
        if not isinstance(result, (View, Constant)):
            raise ValueError(f"network must return one tensor, got {type(result).__name__}")
        return result if isinstance(result, View) else self.lowering.view(result, result.value.shape[1])

    def _is_constant(self, node: fx.Node) -> bool:
        """Whether PyTorch can compute it before the image is there."""
        return _asks_for_form(node) or not any(argument in self._views for argument in node.all_input_nodes)

    def _note_values(self, node: fx.Node) -> None:
        follows = not self._variable.isdisjoint(node.all_input_nodes) and not _asks_for_form(node)
        if follows or node.op in ("placeholder", "get_attr", "call_module"):
            self._variable.add(node)

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
            if isinstance(value, Tensor):
                return Constant(lambda env: env[node], value)
            if node in self._variable:
                raise Unsupported(
                    f"{_describe(node)} is a number computed from the condition or from parameters; a tensor may be"
                )
            if isinstance(value, (int, float, complex)):
                self._numbers[node] = value
            return value

        return _map_nodes(argument, read)

    def _lower(self, node: fx.Node, env: Environment) -> Any:
        module = self._root.get_submodule(str(node.target)) if node.op == "call_module" else None
        try:
            args, kwargs = self._read(node.args, env), self._read(node.kwargs, env)
            if module is not None:
                result = call_module(self.lowering, module, *args, **kwargs)
            else:
                table: dict[Any, Any] = FUNCTIONS if node.op == "call_function" else METHODS
                if node.target not in table:
                    raise Unsupported("an operation that is not known")
                result = table[node.target](self.lowering, *args, **kwargs)
            self._follow_memory(node, module, result, env)
        except (Unsupported, TypeError) as error:  # TypeError: arguments that an operation's handler does not know
            raise ValueError(f"{_REFUSED}: {_describe(node)}: {error}") from error
        return result

    # ---- Writing to tensors.

    def _follow_memory(self, node: fx.Node, module: nn.Module | None, result: Any, env: Environment) -> None:
        """Notes what shares memory with the first argument, and what a write to that argument changes."""
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return
        if aliases(node.target, module):
            self._owners[node] = self._owners.get(source, source)
        elif writes(node, module) and (source in self._views or isinstance(env[source], Tensor)):
            self._owners[node] = self._owners.get(source, source)
            self._write(node, source, result)

    def _write(self, node: fx.Node, source: fx.Node, result: Any) -> None:
        """All names of a tensor that was written to stand for what was written."""
        original = self._originals.setdefault(source, source)
        self._originals[node] = original
        names = {name for name, first in self._originals.items() if first is original}
        for other, view in self._views.items():
            shared = self._owners.get(other, other) is self._owners[node] and _overlap(view, self._views.get(source))
            if other not in names and shared and any(self._places[user] > self._places[node] for user in other.users):
                raise Unsupported(f"it writes to memory that is read later as the result of {_describe(other)}")
        for name in names:
            self._views[name] = result


def _asks_for_form(node: fx.Node) -> bool:
    """Whether it reads the shape, dtype or device of its argument, not its values."""
    if node.op == "call_function":
        return node.target in _LIKE or (node.target is getattr and node.args[1] in _ATTRIBUTES)
    return node.op == "call_method" and node.target in _QUERIES


def _overlap(left: Any, right: Any) -> bool:
    """Whether views, or tuples of them, have channels of a node in common."""
    return any(
        a.node == b.node and a.channel < b.channel + b.channels and b.channel < a.channel + a.channels
        for a in _segments(left)
        for b in _segments(right)
    )


def _segments(value: Any) -> Iterator[Segment]:
    if isinstance(value, View):
        yield from value.segments
    elif isinstance(value, tuple):
        for part in value:
            yield from _segments(part)


def _check_hooks(network: nn.Module) -> None:
    for name, module in network.named_modules():
        if module._forward_pre_hooks or module._forward_hooks:
            where = f"module {name!r}" if name else "the network"
            raise ValueError(
                f"{_REFUSED}: {type(module).__name__} in {where} has forward hooks, which a generator does not run; "
                "weight_norm and spectral_norm are there without hooks in torch.nn.utils.parametrizations"
            )


@contextlib.contextmanager
def _attributes_kept(network: nn.Module) -> Iterator[None]:
    """What forward stores in modules is taken back: while it is traced, proxies."""
    before = [(module, dict(vars(module))) for module in network.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            for name in vars(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)


def _graph(root: _Call) -> fx.Graph:
    try:
        with _attributes_kept(root.network):
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
