"""Samples from autoregressive networks, computing the features of each pixel once."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor, nn

from .._core import noise, ops
from .._core.backends import select
from .._core.checks import as_int, check_device
from .._core.noise import NoiseKey
from . import generate_op
from .analysis import compile_program
from .checks import check_levels, mixtures_of, positive_int
from .generate_reference import Executor, draw
from .lowering import Environment, Recipe
from .program import Output, Program
from .trace import Trace, computing, evaluating

_OUTPUTS = {
    "bernoulli": Output.BERNOULLI,
    "categorical": Output.CATEGORICAL,
    "logistic_mixture": Output.LOGISTIC_MIXTURE,
}
_FORMS = 4  # how many programs a sampler keeps: with and without a condition, say
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of the program's output to the network's; else 0.1


def incremental_sampler(
    network: nn.Module,
    image_shape: Sequence[int],
    *,
    output: str = "categorical",
    levels: int | None = None,
    scale: float | None = None,
    offset: float | None = None,
) -> IncrementalSampler:
    """Turns a stack of masked layers into a generator that computes each pixel's features once.

    A forward pass of the network for every pixel computes the features of all pixels anew. The generator keeps them:
    for a pixel it computes those that depend on it, for a row those that depend on the rows above, and draws. With the
    same key it draws the same samples as those passes (:meth:`IncrementalSampler.naive`), whatever the batch, but for
    draws that rounding decides: rare ones in float32, more in 16 bits, where the generator computes in float32.

    The network may consist of :func:`masked_conv2d`, :func:`vertical_conv2d`, :func:`horizontal_conv2d`,
    :func:`causal_conv1d`, :func:`gated_activation`, :func:`masked_linear` and their modules, convolutions of kernel
    size 1, dense layers over features, relu, elu, silu, tanh, sigmoid, sums, products, concatenating and splitting of
    channels, and dropout, which is off. What depends only on the condition or on parameters may be anything: PyTorch
    computes it at each call. The first call traces the network with torch.fx and compares the result with its output;
    weights may change afterwards, the structure may not: attributes that are numbers, not tensors, are read once.
    Modules with forward hooks are refused. While a network is traced torch.fx has changed how modules are called: no
    other thread may call one.

    Args:
        network: ``network(x)`` or ``network(x, condition)`` with x ``[batch, *image_shape]``, level v as
            ``v * scale + offset``; its output for a pixel may depend only on earlier pixels in raster order, and, with
            ``"categorical"`` and ``"bernoulli"``, on other channels of the pixel as long as they have some order.
        image_shape: ``(channels, height, width)``, ``(channels, length)`` or ``(features,)``.
        output: what the network returns: ``"bernoulli"``, ``[batch, channels, ...]`` logits of level 1;
            ``"categorical"``, ``[batch, channels * levels, ...]`` logits, all levels of the first channel first;
            ``"logistic_mixture"``, parameters as :func:`discretized_logistic_mixture` takes them.
        levels: of a channel; 2 with ``"bernoulli"``, else 256 by default.
        scale, offset: of the network's input; by default level v is ``2 v / (levels - 1) - 1``, with ``"bernoulli"``
            v itself.

    Returns:
        ``sampler(batch, key=..., condition=..., given=..., known=...)``, levels as int64 ``[batch, *image_shape]``.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value; the message names it. The first call raises
            ValueError if the network is not causal or has an operation that is not known, and names the layer.

    Source: Ramachandran et al., "Fast Generation for Convolutional Autoregressive Models", 2017; Paine et al., "Fast
    WaveNet Generation Algorithm", 2016.

    Example:
        >>> import dgm_kernels
        >>> network = dgm_kernels.nn.MaskedConv2d(1, 1, 5, mask_type="A")
        >>> sampler = dgm_kernels.incremental_sampler(network, (1, 8, 8), output="bernoulli")
        >>> sampler(4, key=dgm_kernels.NoiseKey(seed=0)).shape
        torch.Size([4, 1, 8, 8])
    """
    return IncrementalSampler(network, image_shape, output, levels, scale, offset)


def _number(name: str, value: object, default: float) -> float:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


@dataclasses.dataclass
class _Compiled:
    """A traced network, for conditions of one form.

    Args:
        verified: it has computed what the network computes when the network's output depended on the image.
    """

    trace: Trace
    program: Program
    weights: list[Recipe]
    encoded: Tensor
    verified: bool = False


@dataclasses.dataclass(frozen=True)
class _Call:
    """The checked arguments of a call; tensors of levels are ``[batch, C, H, W]``."""

    batch: int
    condition: Tensor | None
    noise: noise.OpArgs
    given: Tensor
    known: Tensor


class IncrementalSampler:
    """What :func:`incremental_sampler` returns."""

    def __init__(
        self,
        network: nn.Module,
        image_shape: Sequence[int],
        output: str,
        levels: int | None,
        scale: float | None,
        offset: float | None,
    ) -> None:
        if not isinstance(network, nn.Module):
            raise TypeError(f"network must be an nn.Module, got {type(network).__name__}")
        if not isinstance(image_shape, (tuple, list)) or not 1 <= len(image_shape) <= 3:
            raise ValueError(f"image_shape must be (C, H, W), (C, T) or (D,), got {image_shape!r}")
        if not isinstance(output, str):
            raise TypeError(f"output must be a str, got {type(output).__name__}")
        if output not in _OUTPUTS:
            raise ValueError(f"output must be one of {', '.join(map(repr, _OUTPUTS))}, got {output!r}")
        self.network = getattr(network, "_orig_mod", network)  # of what torch.compile returned
        self.image_shape = tuple(positive_int(f"image_shape[{i}]", size) for i, size in enumerate(image_shape))
        self.output = _OUTPUTS[output]
        binary = self.output == Output.BERNOULLI
        self.levels = check_levels((2 if binary else 256) if levels is None else levels)
        if binary and self.levels != 2:
            raise ValueError(f"levels must be 2 with output 'bernoulli', got {self.levels}")
        if self.output == Output.LOGISTIC_MIXTURE and self.image_shape[0] not in (1, 3):
            raise ValueError(f"image_shape must have 1 or 3 channels with output {output!r}, got {self.image_shape}")
        self.scale = _number("scale", scale, 1.0 if binary else 2.0 / (self.levels - 1))
        self.offset = _number("offset", offset, 0.0 if binary else -1.0)
        channels, *pixels = self.image_shape
        height, width = [1] * (2 - len(pixels)) + pixels
        self._image = (channels, height, width)
        self._compiled: dict[tuple[object, ...], _Compiled] = {}  # by form, the one that was used last at the end

    def __call__(
        self,
        batch: int,
        *,
        key: NoiseKey | None = None,
        generator: torch.Generator | None = None,
        condition: Tensor | None = None,
        given: Tensor | None = None,
        known: Tensor | None = None,
    ) -> Tensor:
        """Draws samples.

        Args:
            batch: how many.
            key: names the uniform numbers, n of which a pixel takes: element ``4 ceil(n / 4) p + j`` of a sample is
                the j-th of pixel p. n is the number of channels, one for each; a logistic mixture takes one for the
                component before them. None draws a seed from ``generator``, or PyTorch's generator.
            condition: the second argument of the network, ``[batch, ...]``.
            given: int64 levels ``[batch, *image_shape]`` or ``[*image_shape]`` that are not drawn where ``known``.
            known: bool, broadcast to ``[batch, *image_shape]``; of a logistic mixture, whole pixels.

        Returns:
            int64 ``[batch, *image_shape]`` in 0 .. levels - 1.

        Raises:
            TypeError, ValueError: an argument has the wrong type, shape, device or value; the message names it.
        """
        call = self._call(batch, key, generator, condition, given, known)
        if call.batch == 0:
            return call.given.view(0, *self.image_shape)
        with evaluating(self.network, self._device):
            compiled, env = self._compile(call)
            weights, constants = self._operands(compiled, env)
        with computing(self._device):
            if select(self._device, [self._example, *weights], natives=("cpp", "triton")) == "cpp":
                levels = self._run_native(compiled, weights, constants, call)
            else:
                levels = self._run_reference(compiled, weights, constants, call)  # on GPUs, as CUDA graphs
        return levels.view(call.batch, *self.image_shape)

    def __getstate__(self) -> dict[str, object]:
        """Copies are traced anew: the program belongs to this network, not to its copy."""
        return self.__dict__ | {"_compiled": {}}

    def naive(
        self,
        batch: int,
        *,
        key: NoiseKey | None = None,
        generator: torch.Generator | None = None,
        condition: Tensor | None = None,
        given: Tensor | None = None,
        known: Tensor | None = None,
    ) -> Tensor:
        """The same samples by forward passes of the network: one for each pixel, or each channel that sees another."""
        call = self._call(batch, key, generator, condition, given, known)
        if call.batch == 0:
            return call.given.view(0, *self.image_shape)
        with evaluating(self.network, self._device):
            program = self._compile(call)[0].program
            blocks = [b for i in program.instructions if i.out.node == program.output.node for b in i.blocks]
            passes = len(program.order) if any(block.time for block in blocks) else 1
            uniform = self._uniform(call)
            levels = torch.zeros_like(call.given).flatten(2)
            x = torch.zeros_like(levels, dtype=self._example.dtype)
            for pixel in range(levels.shape[2]):
                for time, channel in enumerate(program.order):
                    if time < passes:
                        parameters = self._forward(x.view(batch, *self.image_shape), call.condition)
                        parameters = parameters.view(batch, -1, levels.shape[2])[:, :, pixel]
                        parameters = parameters.to(self._work_dtype)
                    drawn = draw(program, parameters, uniform[pixel], channel)
                    channels = slice(channel, channel + drawn.shape[1])
                    given_here, known_here = (t.flatten(2)[:, channels, pixel] for t in (call.given, call.known))
                    level = torch.where(known_here, given_here, drawn)
                    levels[:, channels, pixel] = level
                    x[:, channels, pixel] = (level.to(self._work_dtype) * self.scale + self.offset).to(x.dtype)
        return levels.view(batch, *self.image_shape)

    # ---- The network.

    @property
    def _example(self) -> Tensor:
        """A tensor on the device and in the dtype of the network."""
        tensors = itertools.chain(self.network.parameters(), self.network.buffers())
        return next((t.detach() for t in tensors if t.is_floating_point()), torch.empty(0))

    @property
    def _device(self) -> torch.device:
        return self._example.device

    @property
    def _work_dtype(self) -> torch.dtype:
        return torch.float64 if self._example.dtype == torch.float64 else torch.float32

    def _forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        x = x.clone()  # which the network may write to
        return self.network(x) if condition is None else self.network(x, condition)

    def _compile(self, call: _Call) -> tuple[_Compiled, Environment]:
        """The program for conditions of this form, and what does not depend on the image for this call."""
        condition = call.condition
        form: tuple[object, ...] = (self._device, self._example.dtype)
        form += () if condition is None else (condition.shape[1:], condition.dtype)
        one = None if condition is None else condition[:1]
        compiled = self._compiled.pop(form, None)
        if compiled is not None:
            env = compiled.trace.evaluate(call.batch, condition)
            pairs = zip(compiled.trace.lowering.degrees, compiled.program.degrees, strict=True)
            if not all(torch.equal(degree.recipe(env).cpu(), value) for degree, value in pairs):
                compiled = None
            elif not compiled.verified:
                self._verify(compiled, one, *self._probe(one))
        if compiled is None:
            x, expected = self._probe(one)
            trace = Trace(self.network, self._image, len(self.image_shape) + 1, x.dtype, self._device, one)
            program, weights = compile_program(trace.lowering, trace.output, self.output, self.levels)
            compiled = _Compiled(trace, program, weights, program.encode())
            self._verify(compiled, one, x, expected)
            env = trace.evaluate(call.batch, condition)
        self._compiled[form] = compiled
        if len(self._compiled) > _FORMS:
            del self._compiled[next(iter(self._compiled))]
        return compiled, env

    def _probe(self, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """An image and the network's output, of the expected shape."""
        pixels = math.prod(self.image_shape)
        image = torch.arange(pixels, device=self._device) * 5 % 7 % self.levels  # of no special form
        x = (image * self.scale + self.offset).to(self._example.dtype).view(1, *self.image_shape)
        expected = self._forward(x, condition)
        if not isinstance(expected, Tensor):
            raise TypeError(f"network must return a tensor, got {type(expected).__name__}")
        channels, *size = self.image_shape
        if tuple(expected.shape[2:]) != tuple(size) or expected.dim() != x.dim():
            wanted = ", ".join(["outputs", *map(str, size)])
            raise ValueError(f"network must return [1, {wanted}] for x {tuple(x.shape)}, got {tuple(expected.shape)}")
        if self.output == Output.LOGISTIC_MIXTURE:
            mixtures_of(expected, channels, "image_shape")
            return x, expected
        outputs = channels * (1 if self.output == Output.BERNOULLI else self.levels)
        if expected.shape[1] != outputs:
            raise ValueError(
                f"network must return {outputs} outputs a pixel for {channels} channels and {self.levels} levels, "
                f"got {tuple(expected.shape)}"
            )
        return x, expected

    def _verify(self, compiled: _Compiled, condition: Tensor | None, x: Tensor, expected: Tensor) -> None:
        """The program computes what the network computes."""
        weights, constants = self._operands(compiled, compiled.trace.evaluate(1, condition))
        levels = torch.zeros(math.prod(self._image[1:]), 1, self._image[0], dtype=torch.int64, device=x.device)
        executor = self._executor(compiled, weights, constants, levels, levels.bool(), levels)
        result = executor.forward(x.to(self._work_dtype).reshape(1, self._image[0], -1).permute(2, 0, 1))
        wanted = expected.to(self._work_dtype).reshape(1, expected.shape[1], -1).permute(2, 0, 1)
        bound = _TOLERANCE.get(x.dtype, 0.1) * max(1.0, float(wanted.abs().max()))
        if not torch.allclose(result, wanted, rtol=0.0, atol=bound, equal_nan=True):
            raise ValueError(
                "network cannot be generated from pixel by pixel: what torch.fx saw of it computes something else, up "
                f"to {float((result - wanted).abs().max()):.3g} away; does it write to tensors or draw random numbers?"
            )
        other = self._forward(2 * self.offset + (self.levels - 1) * self.scale - x, condition)  # all levels reversed
        compiled.verified = not torch.allclose(expected, other, rtol=0.0, atol=0.0, equal_nan=True)

    # ---- Execution.

    def _operands(self, compiled: _Compiled, env: Environment) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and constants as an executor takes them; constants of all samples have a batch of 1."""
        device, work = self._device, self._work_dtype
        weights = [recipe(env).to(device, work).contiguous() for recipe in compiled.weights]
        constants = [recipe(env).to(device, work).contiguous() for recipe in compiled.trace.lowering.constants]
        return weights, constants

    def _run_native(self, compiled: _Compiled, weights: list[Tensor], constants: list[Tensor], call: _Call) -> Tensor:
        degrees = list(compiled.program.degrees)
        packed = ops.call(generate_op.pack["cpp"], False, compiled.encoded, weights, degrees)
        given, known = call.given.contiguous(), call.known.contiguous()
        args = (compiled.encoded, packed, constants, given, known, *call.noise, self.scale, self.offset)
        return ops.call(generate_op.generate["cpp"], False, *args)

    def _run_reference(
        self, compiled: _Compiled, weights: list[Tensor], constants: list[Tensor], call: _Call
    ) -> Tensor:
        given, known = (t.flatten(2).permute(2, 0, 1).contiguous() for t in (call.given, call.known))
        executor = self._executor(compiled, weights, constants, given, known, self._uniform(call))
        return executor.generate().permute(1, 2, 0).contiguous()

    def _executor(
        self,
        compiled: _Compiled,
        weights: list[Tensor],
        constants: list[Tensor],
        given: Tensor,
        known: Tensor,
        uniform: Tensor,
    ) -> Executor:
        settings = (self.scale, self.offset, self._work_dtype)
        return Executor(compiled.program, weights, constants, uniform, given, known, *settings)

    def _uniform(self, call: _Call) -> Tensor:
        """``[pixels, batch, numbers]``; the numbers of a pixel fill whole groups of four."""
        numbers = self._image[0] + (1 if self.output == Output.LOGISTIC_MIXTURE else 0)
        shape = torch.Size((call.batch, math.prod(self._image[1:]), 4 * math.ceil(numbers / 4)))
        return noise.uniform_noise(shape, self._device, call.noise).transpose(0, 1).contiguous()

    # ---- Arguments.

    def _call(
        self,
        batch: object,
        key: NoiseKey | None,
        generator: torch.Generator | None,
        condition: Tensor | None,
        given: Tensor | None,
        known: Tensor | None,
    ) -> _Call:
        number = as_int(batch)
        if number is None:
            raise TypeError(f"batch must be an int, got {batch!r}")
        if number < 0:
            raise ValueError(f"batch must be at least 0, got {number}")
        if key is not None and generator is not None:
            raise ValueError("generator draws a key, got a key as well")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
        if condition is not None:
            if not isinstance(condition, Tensor):
                raise TypeError(f"condition must be a tensor or None, got {type(condition).__name__}")
            if condition.dim() == 0 or condition.shape[0] != number:
                raise ValueError(f"condition must have shape [{number}, ...], got {tuple(condition.shape)}")
            check_device("condition", condition, self._example, "network")
        key = NoiseKey.draw(generator, self._device) if key is None else key
        return _Call(number, condition, self._noise_args(key, number), *self._known(number, given, known))

    def _noise_args(self, key: object, batch: int) -> noise.OpArgs:
        if not isinstance(key, NoiseKey):
            raise TypeError(f"key must be a NoiseKey, got {type(key).__name__}")
        packed: dict[str, Tensor] = {}
        for name, value in (("seed", key.seed), ("step", key.step), ("samples", key.samples)):
            if not isinstance(value, Tensor):
                continue
            check_device(f"key.{name}", value, self._example, "network")
            if tuple(value.shape) != (batch,) and (name == "samples" or value.numel() != 1):
                raise ValueError(f"key.{name} must have {batch} entries, got shape {tuple(value.shape)}")
            packed[name] = value.contiguous()
        return dataclasses.replace(key, **packed).op_args()  # type: ignore[arg-type]

    def _known(self, batch: int, given: Tensor | None, known: Tensor | None) -> tuple[Tensor, Tensor]:
        """Levels and which of them are known, ``[batch, C, H, W]``."""
        full = (batch, *self._image)
        if given is None and known is None:
            nothing = torch.zeros(full, dtype=torch.int64, device=self._device)
            return nothing, nothing.bool()
        if given is None or known is None:
            raise ValueError("given and known go together, got only one of them")
        shape = (batch, *self.image_shape)
        for name, value, dtype in (("given", given, torch.int64), ("known", known, torch.bool)):
            if not isinstance(value, Tensor) or value.dtype != dtype:
                found = getattr(value, "dtype", type(value).__name__)
                raise TypeError(f"{name} must be a tensor of {dtype}, got {found}")
            check_device(name, value, self._example, "network")
        if tuple(given.shape) not in (shape, self.image_shape):
            raise ValueError(f"given must have shape {shape} or {self.image_shape}, got {tuple(given.shape)}")
        try:
            given, known = given.expand(shape), known.expand(shape)
        except RuntimeError:
            raise ValueError(f"known must broadcast to {shape}, got shape {tuple(known.shape)}") from None
        wrong = known & ((given < 0) | (given >= self.levels))
        if bool(wrong.any()):
            raise ValueError(f"given must be in [0, {self.levels}) where known, got {int(given[wrong][0])}")
        given, known = given.reshape(full), known.reshape(full)
        if self.output == Output.LOGISTIC_MIXTURE and not torch.equal(known, known[:, :1].expand_as(known)):
            raise ValueError("known must be the same for all channels of a pixel with output 'logistic_mixture'")
        return given, known
