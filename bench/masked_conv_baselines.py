"""Masked convolutions, distributions and autoregressive networks as a user writes them: baselines of masked_conv."""

import abc
import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dgm_kernels import categorical_sample, gated_activation
from dgm_kernels.nn import CausalConv1d, HorizontalConv2d, VerticalConv2d

LEVELS = 256
GAIN = 1.7  # of random weights: with PyTorch's, what was drawn far above and to the left would hardly move the logits


def raster_mask(size: int, mask_type: str, device: torch.device) -> Tensor:
    """1 where a square kernel's weights count: the taps before the centre in raster order, with type B the centre."""
    live = torch.arange(size * size, device=device) < size * size // 2 + (mask_type == "B")
    return live.float().view(1, 1, size, size)


def plain_masked_conv(x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """As published networks write it: the weight times the mask at every call."""
    return F.conv2d(x, weight * mask, bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2))


def cropped_masked_conv(x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """Without the rows of dead taps below the pixel, of a square kernel: one convolution of an image padded above."""
    side = weight.shape[2] // 2
    live = weight[:, :, : side + 1] * mask[:, :, : side + 1]
    return F.conv2d(F.pad(x, (side, side, side, 0)), live, bias)


def plain_gate(x: Tensor, condition: Tensor | None = None) -> Tensor:
    """tanh of half of the channels times the sigmoid of the others."""
    if condition is not None:
        x = x + condition[:, :, None, None]
    features, gate = x.chunk(2, dim=1)
    return torch.tanh(features) * torch.sigmoid(gate)


def plain_mixture(x: Tensor, parameters: Tensor) -> Tensor:
    """Log-probability of every pixel of three colours, by the formula and the cases of the published PixelCNN++.

    Where a level has little probability, the density at its middle takes the place of the difference of two sigmoids.
    """
    logits, rest = parameters.tensor_split([parameters.shape[1] // 10], dim=1)
    means, log_scales, coefficients = rest.unflatten(1, (3, 3, -1)).unbind(2)
    log_scales, coefficients = log_scales.clamp(min=-7.0), torch.tanh(coefficients)
    x = x[:, :, None]
    red, green, _ = x.unbind(1)
    of_red, of_green, of_blue = means.unbind(1)
    by_red, by_red_too, by_green = coefficients.unbind(1)
    means = torch.stack([of_red, of_green + by_red * red, of_blue + by_red_too * red + by_green * green], dim=1)
    half, centred, inverse = 1 / (LEVELS - 1), x - means, torch.exp(-log_scales)
    upper, lower, middle = inverse * (centred + half), inverse * (centred - half), inverse * centred
    probability = torch.sigmoid(upper) - torch.sigmoid(lower)
    log_density = middle - log_scales - 2 * F.softplus(middle) + math.log(2 * half)
    inside = torch.where(probability > 1e-5, torch.log(probability.clamp(min=1e-12)), log_density)
    each = torch.where(x < -0.999, upper - F.softplus(upper), torch.where(x > 0.999, -F.softplus(lower), inside))
    return torch.logsumexp(each.sum(1) + F.log_softmax(logits, dim=1), dim=1)


def plain_categorical(x: Tensor, logits: Tensor) -> Tensor:
    """Log-probability of every level."""
    return -F.cross_entropy(logits, x, reduction="none")


class PaddedConv2d(nn.Conv2d):
    """A convolution behind zeros at the sides that a stack looks to, without rows and columns of dead taps.

    Mask type A leaves taps in the last row (or, of one row, the last column) that do not count: `mask_once`.
    """

    def __init__(self, inputs: int, outputs: int, size: tuple[int, int], border: tuple[int, ...], strict: bool) -> None:
        super().__init__(inputs, outputs, size)
        self.border, self.strict = border, strict

    def mask_once(self) -> None:
        """Writes zeros to the taps that do not count, so that no forward pass has to."""
        if self.strict:
            rows = slice(None) if self.weight.shape[2] == 1 else slice(-1, None)
            columns = slice(-1, None) if self.weight.shape[2] == 1 else slice(None)
            self.weight.data[:, :, rows, columns] = 0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, self.border))


class PaddedConv1d(nn.Conv1d):
    """Likewise for sequences."""

    def __init__(self, inputs: int, outputs: int, size: int, *, mask_type: str = "B", dilation: int = 1) -> None:
        super().__init__(inputs, outputs, size, dilation=dilation)
        self.before, self.strict = (size - 1) * dilation, mask_type == "A"

    def mask_once(self) -> None:
        """Writes zeros to the tap that does not count."""
        if self.strict:
            self.weight.data[:, :, -1] = 0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (self.before, 0)))


def plain_vertical(inputs: int, outputs: int, size: int, *, mask_type: str = "B") -> PaddedConv2d:
    """The rows up to the pixel's."""
    side = size // 2
    return PaddedConv2d(inputs, outputs, (side + 1, size), (side, side, side, 0), mask_type == "A")


def plain_horizontal(inputs: int, outputs: int, size: int, *, mask_type: str = "B") -> PaddedConv2d:
    """The pixels of the row up to this one."""
    return PaddedConv2d(inputs, outputs, (1, size), (size - 1, 0, 0, 0), mask_type == "A")


class Layers(NamedTuple):
    """What the networks below are made of."""

    vertical: Callable[..., nn.Module]
    horizontal: Callable[..., nn.Module]
    causal: Callable[..., nn.Module]
    gate: Callable[[Tensor], Tensor]


OURS = Layers(VerticalConv2d, HorizontalConv2d, CausalConv1d, gated_activation)
PLAIN = Layers(plain_vertical, plain_horizontal, PaddedConv1d, plain_gate)


class GatedPixelCNN(nn.Module):
    """Two stacks without a blind spot, gates, residual and skip connections; logits of binary pixels.

    Source: van den Oord et al., "Conditional Image Generation with PixelCNN Decoders", 2016.
    """

    def __init__(self, layers: Layers, width: int, depth: int) -> None:
        super().__init__()
        self.gate = layers.gate
        self.first_vertical = layers.vertical(1, width, 7, mask_type="A")
        self.first_horizontal = layers.horizontal(1, width, 4, mask_type="A")
        self.vertical = nn.ModuleList(layers.vertical(width, 2 * width, 3) for _ in range(depth))
        self.horizontal = nn.ModuleList(layers.horizontal(width, 2 * width, 2) for _ in range(depth))
        self.link = nn.ModuleList(nn.Conv2d(2 * width, 2 * width, 1) for _ in range(depth))
        self.residual = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(depth))
        self.skip = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(depth))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        above, left = self.first_vertical(x), self.first_horizontal(x)
        total = None
        for vertical, horizontal, link, residual, skip in zip(
            self.vertical, self.horizontal, self.link, self.residual, self.skip, strict=True
        ):
            above = vertical(above)
            features = self.gate(horizontal(left) + link(above))
            above, left = self.gate(above), left + residual(features)
            total = skip(features) if total is None else total + skip(features)
        return self.head(total)


class WaveNet(nn.Module):
    """Dilated causal convolutions, gates, residual and skip connections; logits of 256 levels.

    Source: van den Oord et al., "WaveNet: A Generative Model for Raw Audio", 2016.
    """

    def __init__(self, layers: Layers, width: int, depth: int, cycle: int = 10) -> None:
        super().__init__()
        self.gate = layers.gate
        dilations = [2 ** (i % cycle) for i in range(depth)]
        self.field = 2 + sum(dilations)  # inputs up to and with the sample's own, which is not seen
        self.first = layers.causal(1, width, 2, mask_type="A")
        self.dilated = nn.ModuleList(layers.causal(width, 2 * width, 2, dilation=dilation) for dilation in dilations)
        self.residual = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in dilations)
        self.skip = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in dilations)
        self.head = nn.Sequential(nn.ReLU(), nn.Conv1d(width, width, 1), nn.ReLU(), nn.Conv1d(width, LEVELS, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.first(x), None
        for dilated, residual, skip in zip(self.dilated, self.residual, self.skip, strict=True):
            features = self.gate(dilated(x))
            x = x + residual(features)
            total = skip(features) if total is None else total + skip(features)
        return self.head(total)


Network = GatedPixelCNN | WaveNet


def twins(family: type[Network], width: int, depth: int, device: torch.device) -> tuple[Network, Network]:
    """A network of our layers and its twin of PyTorch's with the same parameters, masked once."""
    torch.manual_seed(0)
    ours, plain = (family(layers, width, depth).to(device).eval() for layers in (OURS, PLAIN))
    with torch.no_grad():
        for weight in ours.parameters():
            if weight.dim() > 1:
                weight.normal_(std=GAIN / weight[0].numel() ** 0.5)
    plain.load_state_dict(ours.state_dict())
    for module in plain.modules():
        if hasattr(module, "mask_once"):
            module.mask_once()
    return ours.requires_grad_(False), plain.requires_grad_(False)


def wide(network: Network) -> Network:
    """A copy in float64."""
    return copy.deepcopy(network).double()


class Work(NamedTuple):
    """What an image or a sequence takes at least: weights to read, and products with them."""

    weights: int
    products: int


def least_work(network: Network, shape: tuple[int, ...]) -> Work:
    """Of a masked plain network, for one image or sequence of `shape`.

    A weight of zero does not count, nor a layer that the outputs do not depend on, nor a product with a border.
    """
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    layers = [module for module in network.modules() if isinstance(module, (nn.Conv1d, nn.Conv2d))]
    hooks = [layer.register_forward_hook(lambda layer, args, y: calls.append((layer, *args, y))) for layer in layers]
    x = torch.zeros(1, *shape, device=layers[0].weight.device, requires_grad=True)
    with torch.enable_grad():
        result = network(x).sum()
    for hook in hooks:
        hook.remove()
    gradients = torch.autograd.grad(result, [y for *_, y in calls], allow_unused=True)
    weights = products = 0
    for (layer, inputs, _), gradient in zip(calls, gradients, strict=True):
        if gradient is not None:
            # Ones for numbers: each output is then the number of its products.
            ones = {"weight": (layer.weight != 0).float(), "bias": torch.zeros_like(layer.bias)}
            weights += int(ones["weight"].sum(dtype=torch.float64))
            products += int(functional_call(layer, ones, torch.ones_like(inputs)).sum(dtype=torch.float64))
    return Work(weights, products)


class Loop(abc.ABC):
    """Draws the pixels of images or sequences of one channel one after the other; `step` draws one."""

    def __init__(self, network: Callable[[Tensor], Tensor], levels: int) -> None:
        self.network, self.levels = network, levels

    def draw(self, outputs: Tensor, uniform: Tensor) -> Tensor:
        """Levels of `[batch, outputs, ...]` by uniform numbers `[batch, ...]`."""
        return categorical_sample(F.pad(outputs, (0, 0, 1, 0)) if self.levels == 2 else outputs, uniform)

    def values(self, levels: Tensor) -> Tensor:
        """What the network takes for the levels: 0 and 1, or numbers from -1 to 1."""
        return levels if self.levels == 2 else levels * (2 / (self.levels - 1)) - 1

    def steps(self, pixels: int) -> int:
        """Steps at the last pixel that are as much work as a step at each of them."""
        return pixels

    @abc.abstractmethod
    def outputs(self, x: Tensor, pixel: int) -> Tensor:
        """The network's outputs for a pixel of x, `[batch, 1, ...]`."""

    def step(self, x: Tensor, pixel: int, uniform: Tensor) -> Tensor:
        """Draws a pixel of x by a number for each sample, and writes it there."""
        level = self.draw(self.outputs(x, pixel)[:, :, None], uniform[:, None])[:, 0]
        x.view(len(x), -1)[:, pixel] = self.values(level)
        return level

    def generate(self, shape: tuple[int, ...], uniform: Tensor) -> Tensor:
        """Levels `[batch, *shape]` by uniform numbers `[batch, pixels]`."""
        x = torch.zeros(len(uniform), *shape, dtype=next(self.network.parameters()).dtype, device=uniform.device)
        levels = [self.step(x, pixel, uniform[:, pixel]) for pixel in range(uniform.shape[1])]
        return torch.stack(levels, dim=1).view(len(uniform), *shape)


class NaiveLoop(Loop):
    """A pass through the network for each pixel.

    `field` limits a pass over a sequence to as many inputs, those that the network can see; None stands for all.
    """

    def __init__(self, network: Callable[[Tensor], Tensor], levels: int, field: int | None = None) -> None:
        super().__init__(network, levels)
        self.field = field

    def steps(self, pixels: int) -> int:
        """The first passes over a part of a sequence see 1, 2, 3, ... inputs until they see the field."""
        return pixels if self.field is None else pixels - (min(self.field, pixels) - 1) // 2

    def outputs(self, x: Tensor, pixel: int) -> Tensor:
        if self.field is None:
            return self.network(x).flatten(2)[:, :, pixel]
        return self.network(x[:, :, max(0, pixel + 1 - self.field) : pixel + 1])[:, :, -1]


class QueueLoop(Loop):
    """A WaveNet's layers in PyTorch, each with a queue of what it saw, so that a sample's features are computed once.

    Source: Paine et al., "Fast WaveNet Generation Algorithm", 2016.
    """

    def __init__(self, network: WaveNet, levels: int) -> None:
        super().__init__(network, levels)
        self.weights = []  # of each layer the two taps as one matrix, and residual and skip as one
        for dilated, residual, skip in zip(network.dilated, network.residual, network.skip, strict=True):
            taps = torch.cat(dilated.weight.unbind(2), dim=1)
            both = torch.cat([residual.weight, skip.weight])[:, :, 0]
            self.weights.append((taps, dilated.bias, both, torch.cat([residual.bias, skip.bias])))
        self.queues: list[Tensor] = []

    def generate(self, shape: tuple[int, ...], uniform: Tensor) -> Tensor:
        self.queues = []
        return super().generate(shape, uniform)

    def outputs(self, x: Tensor, pixel: int) -> Tensor:
        if not self.queues:
            channels = self.network.first.weight.shape[0]
            self.queues = [x.new_zeros(d.dilation[0], len(x), channels) for d in self.network.dilated]
        before = x[:, :, pixel - 1] if pixel else torch.zeros_like(x[:, :, 0])
        features = F.linear(before, self.network.first.weight[:, :, 0], self.network.first.bias)
        total: Tensor | float = 0.0
        for queue, (taps, bias, both, both_bias) in zip(self.queues, self.weights, strict=True):
            place = pixel % len(queue)
            pair = torch.cat([queue[place], features], dim=1)
            queue[place] = features
            left, right = F.linear(pair, taps, bias).chunk(2, dim=1)
            residual, skip = F.linear(torch.tanh(left) * torch.sigmoid(right), both, both_bias).chunk(2, dim=1)
            features, total = features + residual, total + skip
        return self.network.head(total[:, :, None])[:, :, 0]
