"""Image GPT: a transformer whose tokens are the pixels in raster order, sampled with a cache of keys and values."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from dgm_kernels import KVCache, NoiseKey, categorical_sample, masks, noise_like, positions
from dgm_kernels.nn import TransformerBlock

from ..flows.conditioners import check_dropout
from ..model import check_natural, check_positive
from ..registry import register_model
from .base import Autoregressive, check_image, check_output, class_bias

POSITIONS = ("learned", "sinusoidal", "rotary")
ROTARY_BASE = 100.0  # pictures have fewer rows than texts have words


@register_model("image_gpt")
class ImageGPT(Autoregressive):
    """A transformer over the pixels in raster order, those of a pixel's colours one after the other.

    The token that comes in is the one before, so that a pixel's own token may see itself: causal attention to all
    tokens so far, or to those near in the picture (``attention_radius``).

    Args:
        image_shape: channels, height and width of a sample.
        width: features of a token.
        depth: number of transformer blocks.
        heads: of their attention, a divisor of the width.
        positions: ``"learned"``, features for each pixel; ``"sinusoidal"``, sines of its row and column; ``"rotary"``,
            rotations by row and column inside attention; or several of them, as in ``"learned+rotary"``. Colours have
            learned features in addition.
        attention_radius: rows and columns to which attention reaches back in every block; None for the whole past.
        dropout: share of what a part of a block adds, and of the first features, that is dropped in training.
        levels: of the data in [-1, 1], equally spaced: with 2 the distributions are Bernoulli, with more categorical.
        networks: how many are trained, each by itself; the model is the mean of their probabilities.
        num_classes: classes to condition on; None for none.

    Source: Chen et al., "Generative Pretraining from Pixels", 2020; Parmar et al., "Image Transformer", 2018.
    """

    default_settings: ClassVar = {"steps": 1300, "batch_size": 32, "lr": 5e-3, "validation_draws": 1}

    def __init__(
        self,
        image_shape: Sequence[int] = (1, 8, 8),
        width: int = 32,
        depth: int = 4,
        heads: int = 4,
        positions: str = "learned+rotary",
        attention_radius: int | None = None,
        dropout: float = 0.2,
        levels: int = 2,
        networks: int = 4,
        num_classes: int | None = None,
    ) -> None:
        shape = check_image(image_shape)
        output, kinds = check_output(None, levels), _check_positions(positions)
        mixture = [
            ImageGPTNetwork(
                shape,
                levels,
                width=check_positive("width", width),
                depth=check_positive("depth", depth),
                heads=_check_heads(width, heads, kinds),
                positions=kinds,
                radius=None if attention_radius is None else check_natural("attention_radius", attention_radius),
                dropout=check_dropout(dropout),
                num_classes=num_classes,
            )
            for _ in range(check_positive("networks", networks))
        ]
        super().__init__(image_shape, mixture, None, output, levels, num_classes)

    def sampler(self, network: int = 0) -> CachedSampler:  # type: ignore[override]
        """The sampler of one of the networks, with a cache of keys and values."""
        return CachedSampler(self.networks[network])  # type: ignore[arg-type]


class ImageGPTNetwork(nn.Module):
    """The network of :class:`ImageGPT`: ``[batch, channels, height, width]`` to as many numbers a level and pixel.

    Args:
        image_shape: channels, height and width of the picture.
        levels: of the data in [-1, 1].
        width, depth, heads, positions, dropout, num_classes: as in :class:`ImageGPT`.
        radius: ``attention_radius`` of :class:`ImageGPT`.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        levels: int,
        *,
        width: int,
        depth: int,
        heads: int,
        positions: tuple[str, ...],
        radius: int | None,
        dropout: float,
        num_classes: int | None,
    ) -> None:
        super().__init__()
        channels, height, columns = self.image_shape = image_shape
        self.levels, self.positions, self.head_features = levels, positions, width // heads
        self.numbers = 1 if levels == 2 else levels  # that describe the distribution of a token
        self.embedding = nn.Embedding(levels + 1, width)  # the last is that of the token before the first
        self.position = nn.Parameter(torch.randn(height * columns, width)) if "learned" in positions else None
        self.channel = nn.Parameter(torch.randn(channels, width)) if channels > 1 else None
        self.class_bias = class_bias(num_classes, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, dropout=dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, self.numbers)
        # A token reaches as far back as its colour and those of its pixel do: at least the radius for each of them.
        reach = None if radius is None else (radius, channels * radius + channels - 1)
        self.mask = None if reach is None else masks.raster_2d(height, channels * columns, reach, include_self=True)

    @property
    def tokens(self) -> int:
        """How many a picture has."""
        return math.prod(self.image_shape)

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:
        """``[batch, channels * numbers, height, width]``, all numbers of the first channel first."""
        level = self.to_tokens(self._level(x))
        before = torch.cat([torch.full_like(level[:, :1], self.levels), level[:, :-1]], dim=1)
        hidden = self.dropout(self._embed(before, self.places(), classes))
        mask = masks.causal() if self.mask is None else self.mask
        for block in self.blocks:
            hidden = block(hidden, mask=mask, rope=self.rope())
        return self._to_image(self.head(self.norm(hidden)))

    def step(
        self,
        before: Tensor,
        places: Tensor | None,
        classes: Tensor | None,
        caches: Sequence[KVCache],
        rope: positions.Rotary | None,
    ) -> Tensor:
        """The numbers ``[batch, numbers]`` of the last of the next n tokens.

        Args:
            before: int64 ``[batch, n]``: the levels of the tokens before each of them.
            places: ``[n, width]``: what says where they are.
            classes: int64 ``[batch]`` or None.
            caches: of the blocks; they hold the tokens before these, and then these too.
            rope: of :meth:`rope`.
        """
        hidden = self._embed(before, places, classes)
        for block, cache in zip(self.blocks, caches, strict=True):
            hidden = block(hidden, mask=self.mask, rope=rope, cache=cache)
        return self.head(self.norm(hidden[:, -1]))

    def places(self) -> Tensor | None:
        """What says where the tokens are, ``[tokens, width]``, added to their features; None for nothing."""
        channels, height, columns = self.image_shape
        pixels: list[Tensor] = [] if self.position is None else [self.position]
        if "sinusoidal" in self.positions:
            like = self.embedding.weight
            table = _sinusoids.__wrapped__ if torch.compiler.is_compiling() else _sinusoids
            pixels.append(table(height, columns, like.shape[1], like.device).to(like.dtype))
        parts = [pixel.repeat_interleave(channels, 0) for pixel in pixels]
        if self.channel is not None:
            parts.append(self.channel.repeat(height * columns, 1))
        return functools.reduce(torch.add, parts) if parts else None

    def rope(self) -> positions.Rotary | None:
        """The rotary positions of the tokens, if the network has any."""
        if "rotary" not in self.positions:
            return None
        channels, height, columns = self.image_shape
        table = _rotary.__wrapped__ if torch.compiler.is_compiling() else _rotary
        return table(height, columns, channels, self.head_features, self.embedding.weight.device)

    def to_tokens(self, x: Tensor) -> Tensor:
        """``[batch, channels, height, width]`` as ``[batch, tokens]``: in raster order, colour after colour."""
        return x.flatten(2).transpose(1, 2).flatten(1)

    def from_tokens(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`to_tokens`."""
        return x.unflatten(1, (-1, self.image_shape[0])).transpose(1, 2).reshape(-1, *self.image_shape)

    def _level(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return ((wide + 1) * ((self.levels - 1) / 2)).round().to(torch.int64)

    def _embed(self, before: Tensor, places: Tensor | None, classes: Tensor | None) -> Tensor:
        hidden = self.embedding(before)
        if places is not None:
            hidden = hidden + places
        return hidden if self.class_bias is None else hidden + self.class_bias(classes)[:, None]

    def _to_image(self, numbers: Tensor) -> Tensor:
        channels, *size = self.image_shape
        return numbers.unflatten(1, (-1, channels)).permute(0, 2, 3, 1).reshape(-1, channels * self.numbers, *size)


class CachedSampler:
    """Draws levels from a network token by token; the keys and values of the tokens before are kept, not recomputed.

    The noise is that of :func:`dgm_kernels.incremental_sampler`: the uniform number of channel c of pixel p is element
    ``4 ceil(channels / 4) p + c`` of the sample.
    """

    def __init__(self, network: ImageGPTNetwork) -> None:
        self.network = network

    def __call__(
        self,
        batch: int,
        *,
        key: NoiseKey,
        condition: Tensor | None = None,
        given: Tensor | None = None,
        known: Tensor | None = None,
    ) -> Tensor:
        """Draws samples.

        Args:
            batch: how many.
            key: names the noise.
            condition: int64 ``[batch]``, the classes, or None.
            given: int64 levels ``[batch, *image_shape]`` that are not drawn where ``known``, bool alike.

        Returns:
            int64 ``[batch, *image_shape]`` in 0 .. levels - 1.
        """
        network = self.network
        caches = [block.new_cache(batch, network.tokens) for block in network.blocks]  # type: ignore[operator]
        places, rope = network.places(), network.rope()
        first = 0  # of the tokens that the caches do not hold yet

        def numbers(before: Tensor) -> Tensor:
            nonlocal first
            begin, first = first, before.shape[1]
            here = None if places is None else places[begin:first]
            return network.step(before[:, begin:], here, condition, caches, rope)

        return self._draw(batch, key, given, known, numbers)

    def naive(
        self,
        batch: int,
        *,
        key: NoiseKey,
        condition: Tensor | None = None,
        given: Tensor | None = None,
        known: Tensor | None = None,
    ) -> Tensor:
        """The same samples by a forward pass of the network for every token."""
        network, channels = self.network, self.network.image_shape[0]

        def numbers(before: Tensor) -> Tensor:
            pixel, channel = divmod(before.shape[1] - 1, channels)
            level = before.new_zeros(batch, network.tokens)
            level[:, : before.shape[1] - 1] = before[:, 1:]
            dtype = network.head.weight.dtype
            x = (
                network.from_tokens(level).to(torch.promote_types(dtype, torch.float32)) * (2 / (network.levels - 1))
                - 1
            )
            return network(x.to(dtype), condition).view(batch, channels, network.numbers, -1)[:, channel, :, pixel]

        return self._draw(batch, key, given, known, numbers)

    @torch.no_grad()
    def _draw(
        self,
        batch: int,
        key: NoiseKey,
        given: Tensor | None,
        known: Tensor | None,
        numbers: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Levels; ``numbers`` gives the distribution of the token after those that it gets, ``[batch, n]``."""
        network = self.network
        device, tokens = network.embedding.weight.device, network.tokens
        uniform = self._uniform(batch, key, device)
        before = torch.full((batch, tokens + 1), network.levels, device=device)
        begin = 0
        if given is not None and known is not None:
            given, known = network.to_tokens(given), network.to_tokens(known)
            begin = int(known.all(0).cumprod(0).sum())  # one pass takes the tokens that all samples know
            before[:, 1 : begin + 1] = given[:, :begin]
        with evaluating(network):
            for place in range(begin, tokens):
                level = self._level(numbers(before[:, : place + 1]), uniform[place])
                if given is not None and known is not None:
                    level = torch.where(known[:, place], given[:, place], level)
                before[:, place + 1] = level
        return network.from_tokens(before[:, 1:])

    def _uniform(self, batch: int, key: NoiseKey, device: torch.device) -> Tensor:
        """``[tokens, batch]``; the numbers of a pixel fill whole groups of four."""
        channels, height, columns = self.network.image_shape
        like = torch.empty(batch, height * columns, 4 * math.ceil(channels / 4), device=device, dtype=torch.float32)
        uniform = noise_like(like, key, distribution="uniform")[..., :channels]
        return uniform.flatten(1).t().contiguous()

    def _level(self, numbers: Tensor, uniform: Tensor) -> Tensor:
        """Levels ``[batch]``."""
        numbers = numbers.to(torch.promote_types(numbers.dtype, torch.float32))
        if self.network.levels == 2:
            return (uniform > torch.sigmoid(-numbers[:, 0])).to(torch.int64)  # that is the probability of level 0
        return categorical_sample(numbers, uniform)


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode within the block."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


@functools.lru_cache(maxsize=16)
def _rotary(height: int, width: int, channels: int, features: int, device: torch.device) -> positions.Rotary:
    """Those of the tokens: the colours of a pixel stand at one place."""
    with torch.inference_mode(False):
        pixels = positions.rotary_2d(height, width, features, base=ROTARY_BASE, device=device)
        return positions.Rotary(pixels.table.repeat_interleave(channels, 0))


@functools.lru_cache(maxsize=16)
def _sinusoids(height: int, width: int, features: int, device: torch.device) -> Tensor:
    """Sines and cosines of the rows and columns of the pixels, half of the features each: ``[pixels, features]``."""
    with torch.inference_mode(False):
        rates = 10000.0 ** (-torch.arange(features // 4, dtype=torch.float32, device=device) / (features // 4))
        rows, columns = (torch.arange(n, dtype=torch.float32, device=device)[:, None] * rates for n in (height, width))
        row, column = (torch.cat([angle.sin(), angle.cos()], 1) for angle in (rows, columns))
        both = (row[:, None].expand(-1, width, -1), column[None].expand(height, -1, -1))
        return torch.cat(both, 2).flatten(0, 1)


def _check_positions(positions: str) -> tuple[str, ...]:
    """The kinds that ``positions`` names, else an error."""
    kinds = tuple(positions.split("+")) if isinstance(positions, str) else ()
    if not kinds or len(set(kinds)) < len(kinds) or not set(kinds) <= set(POSITIONS):
        raise ValueError(f"positions must be some of {', '.join(POSITIONS)}, joined by +, got {positions!r}")
    return kinds


def _check_heads(width: int, heads: int, positions: tuple[str, ...]) -> int:
    """``heads`` if they divide the width and leave features that the positions can use, else an error."""
    if width % check_positive("heads", heads):
        raise ValueError(f"heads must divide width, {width}, got {heads}")
    if "rotary" in positions and width // heads % 4:
        raise ValueError(f"width must be a multiple of 4 for each of {heads} heads with rotary positions, got {width}")
    if "sinusoidal" in positions and width % 4:
        raise ValueError(f"width must be divisible by 4 with sinusoidal positions, got {width}")
    return heads
