"""What all autoregressive families share: the distribution of a network's outputs, exact log-probabilities, samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dgm_kernels
from dgm_kernels import IncrementalSampler, NoiseKey, noise_like

from ..model import GenerativeModel, Stream, check_positive, check_sizes

OUTPUTS = ("bernoulli", "categorical", "logistic_mixture")


class Autoregressive(GenerativeModel):
    """A product of distributions, of numbers or pixels given those before them: ``log p(x) = sum_i log p(x_i | x_<i)``.

    This is the base class of the families, and no model by itself: a family is a subclass whose arguments are JSON
    values (see :class:`.GenerativeModel`), from which it makes the network that it hands to this constructor.

    Of several networks, each trained by itself, it is the mean of the probabilities: a mixture, as exact as they are.

    Samples go pixel by pixel, by ``dgm_kernels.incremental_sampler``, which computes every feature of a network once.
    Of several networks, each sample is drawn by one. The noise is a function of the seed, the sample's index and the
    pixel, and so is the sample.

    Images are completed by ``sample(n, known=..., mask=...)``: ``known`` holds pixels, kept where ``mask`` is 1, and
    both broadcast to ``[n, *image_shape]``. A network draws a pixel given those before it in its order, known or drawn.
    Known pixels that come later do not steer it; they only weigh it against the other networks. So the completion has
    the model's conditional distribution if the known pixels come first in the order of every network, as the upper rows
    of a picture do in raster order. A mixture of logistics draws the colours of a pixel together: a colour of it that
    is known does not steer the others.

    Args:
        image_shape: of one sample.
        networks: each is called with x in [-1, 1], shaped ``[batch, *network_shape]``, and with the classes, int64
            ``[batch]`` (None without classes), and returns the parameters of each number's distribution, in the
            dimension after the batch: see :func:`output_channels`.
        network_shape: the shape in which the networks take a sample; None for ``image_shape``.
        output: ``"bernoulli"`` (2 levels), ``"categorical"`` or ``"logistic_mixture"``.
        levels: of the data in [-1, 1], equally spaced.
        num_classes: classes to condition on; None for none.
    """

    levels: int
    exact_likelihood = True

    def __init__(
        self,
        image_shape: Sequence[int],
        networks: Iterable[nn.Module],
        network_shape: Sequence[int] | None,
        output: str,
        levels: int,
        num_classes: int | None,
    ) -> None:
        super().__init__()
        self.sample_shape = check_shape(image_shape)
        self.network_shape = self.sample_shape if network_shape is None else tuple(network_shape)
        self.networks = nn.ModuleList(networks)
        self.output, self.levels, self.num_classes = output, levels, num_classes
        self.conditional = num_classes is not None
        self._samplers: dict[int, IncrementalSampler] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes its own samplers: these hold the networks of this model."""
        return self.__dict__ | {"_samplers": {}}

    def loss_parts(self, x: Tensor, cond: Tensor | None = None, *, key: NoiseKey | None = None) -> dict[str, Tensor]:
        """``nll``: the mean negative log-probability of a sample in nats; in training, the mean of the networks'."""
        # Looking at the values of a tensor on another device would wait for it.
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check_data(x)
        else:
            self._check_batch(x)
        each = self._log_probs(x, self._check_classes(cond, x.shape[0]))
        return {"nll": -(each if self.training else log_mean_exp(each)).mean()}

    def log_prob(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Exact log-probability in nats, ``[batch]``, in one pass over each network.

        Args:
            x: ``[batch, *image_shape]`` on the grey levels.
            cond: int64 ``[batch]``, the classes, if the model has any.
        """
        self._check_data(x)
        with self._evaluating():
            return log_mean_exp(self._log_probs(x, self._check_classes(cond, x.shape[0])))

    def _log_probs(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """Those of each network, ``[networks, batch]``."""
        x = self._to_network(x)
        return torch.stack([self._log_prob(x, network(x, labels)).flatten(1).sum(1) for network in self.networks])

    def _log_prob(self, x: Tensor, parameters: Tensor) -> Tensor:
        """Log-probability of each number of x, in the shape of the networks, under the distributions with parameters.

        That of a mixture of logistics is of all channels together, which have no dimension.
        """
        if self.output == "bernoulli":
            logits = parameters.to(torch.promote_types(parameters.dtype, torch.float32))
            return F.logsigmoid(x * logits)  # sigmoid(-logit) is the probability of level 0
        if self.output == "categorical":
            level = self._level(x)
            logits = parameters.unflatten(1, (x.shape[1], self.levels))
            return dgm_kernels.categorical_log_prob(level, logits, dim=2)
        return dgm_kernels.discretized_logistic_mixture(x, parameters, levels=self.levels)

    def _sample(  # type: ignore[override]
        self,
        n: int,
        seed: int,
        cond: Tensor | None,
        first_sample: int,
        *,
        known: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Samples pixel by pixel.

        Args:
            n, seed, cond, first_sample: see ``sample``.
            known: samples whose pixels are given where ``mask`` is 1, to be completed; both broadcast to the samples.
            mask: 1 (or True) where ``known`` is kept, 0 where the model draws.
        """
        (given, kept), labels = self._given(known, mask, n), self._check_classes(cond, n)
        # The choice of a network has a uniform number of its own.
        key = NoiseKey(seed, first_sample, stream=Stream.INITIAL_STATE)
        like = torch.empty(n, 1, device=self.device, dtype=torch.float32)
        u = noise_like(like, key, distribution="uniform")[:, 0]
        if given is None or kept is None:
            level = self._draw(n, u, seed, first_sample, labels)
        else:
            level = self._complete(n, u, seed, first_sample, labels, given, kept)
        return self._from_network(self._value(level))

    def _draw(self, n: int, u: Tensor, seed: int, first_sample: int, labels: Tensor | None) -> Tensor:
        """Levels, ``[n, *network_shape]``, each sample's by one network, all being as likely."""
        chosen = (u * len(self.networks)).ceil().long() - 1
        levels = torch.empty(n, *self.network_shape, device=self.device, dtype=torch.int64)
        for place in chosen.unique().tolist():
            rows = (chosen == place).nonzero()[:, 0]
            condition = None if labels is None else labels[rows]
            key = NoiseKey(seed, samples=first_sample + rows)
            levels[rows] = self.sampler(place)(len(rows), key=key, condition=condition)
        return levels

    def _complete(
        self, n: int, u: Tensor, seed: int, first_sample: int, labels: Tensor | None, given: Tensor, kept: Tensor
    ) -> Tensor:
        """Levels, of which ``given`` stay where ``kept``: each network completes each sample, and one of them is taken.

        In a mixture that is given the known numbers, the weight of a network is in proportion to its probability of
        them. If they come first in its order, that is the product of their probabilities, each given those before it.
        If drawn ones come between, that product is their probability on average over the draws: a weight of importance
        sampling.
        """
        how: dict[str, Any] = {"key": NoiseKey(seed, first_sample), "condition": labels, "given": given, "known": kept}
        levels = [self.sampler(place)(n, **how) for place in range(len(self.networks))]
        if len(levels) == 1:
            return levels[0]
        counted = kept.all(1) if self.output == "logistic_mixture" else kept
        log_weights = []
        for network, level in zip(self.networks, levels, strict=True):
            x = self._value(level)
            each = self._log_prob(x, network(x, labels)).double()
            log_weights.append(torch.where(counted, each, 0.0).flatten(1).sum(1))
        share = torch.stack(log_weights).softmax(0).cumsum(0)
        chosen = (u > share[:-1]).sum(0)
        return torch.stack(levels)[chosen, torch.arange(n, device=chosen.device)]

    def sampler(self, network: int = 0) -> IncrementalSampler:
        """The cached sampler of one of the networks; it draws levels in the shape of the networks.

        The model keeps it for the next call: weights may change, the structure of the network may not. A network that
        takes the place of another gets a sampler of its own.
        """
        module = self.networks[network]
        kept = self._samplers.get(network)
        if kept is None or kept.network is not getattr(module, "_orig_mod", module):
            kept = self._samplers[network] = dgm_kernels.incremental_sampler(
                module,
                self.network_shape,
                output=self.output,
                levels=self.levels,
                scale=2 / (self.levels - 1),
                offset=-1.0,
            )
        return kept

    def _given(self, known: Tensor | None, mask: Tensor | None, n: int) -> tuple[Tensor | None, Tensor | None]:
        """What is known of n samples as the sampler takes it: levels and where they count, in the network's shape."""
        if (known is None) != (mask is None):
            raise ValueError("known and mask must be given together")
        if known is None or mask is None:
            return None, None
        for name, value in (("known", known), ("mask", mask)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
            try:
                value.expand(n, *self.sample_shape)
            except RuntimeError:
                raise ValueError(
                    f"{name} must broadcast to shape {(n, *self.sample_shape)}, got {tuple(value.shape)}"
                ) from None
        kept = mask.bool().expand(n, *self.sample_shape)
        known = known.to(self.dtype)
        if not bool((self._on_levels(known) | ~kept).all()):
            raise ValueError(f"known must lie on {self.levels} equally spaced levels in [-1, 1] where mask is 1")
        level = self._level(torch.where(kept, known, -1.0))  # what is not known need not be a number
        return self._to_network(level), self._to_network(kept)

    def _to_network(self, x: Tensor) -> Tensor:
        """Samples in the shape that the network takes."""
        return x.reshape(x.shape[0], *self.network_shape)

    def _from_network(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`_to_network`."""
        return x.reshape(x.shape[0], *self.sample_shape)

    def _level(self, x: Tensor) -> Tensor:
        """Grey levels 0 .. levels - 1, int64."""
        return self._grid(x).round().to(torch.int64)

    def _value(self, level: Tensor) -> Tensor:
        """The x of grey levels, rounded once to the dtype of the model."""
        wide = torch.promote_types(self.dtype, torch.float32)
        return (level.to(wide) * (2 / (self.levels - 1)) - 1).to(self.dtype)


def check_output(output: str | None, levels: int) -> str:
    """The distribution; None stands for Bernoulli at 2 levels and categorical at more."""
    if check_positive("levels", levels) < 2:
        raise ValueError(f"levels must be at least 2, got {levels}")
    if output is None:
        return "bernoulli" if levels == 2 else "categorical"
    if output not in OUTPUTS:
        raise ValueError(f"output must be one of {', '.join(OUTPUTS)}, got {output!r}")
    if output == "bernoulli" and levels != 2:
        raise ValueError(f"levels must be 2 with output 'bernoulli', got {levels}")
    return output


def output_channels(output: str, channels: int, levels: int, mixtures: int) -> int:
    """Numbers that the network returns for a pixel.

    Logits of level 1 for each channel; logits of all levels, those of the first channel first; or the parameters of
    ``dgm_kernels.discretized_logistic_mixture``.
    """
    if output == "bernoulli":
        return channels
    if output == "categorical":
        return channels * levels
    if channels not in (1, 3):
        raise ValueError(f"image_shape must have 1 or 3 channels with output 'logistic_mixture', got {channels}")
    return (10 if channels == 3 else 3) * check_positive("mixtures", mixtures)


def check_shape(image_shape: Sequence[int]) -> tuple[int, ...]:
    """``image_shape`` if it has a size, else an error."""
    shape = check_sizes("image_shape", image_shape)
    if not shape:
        raise ValueError("image_shape must have at least one size, got ()")
    return shape


def check_image(image_shape: Sequence[int]) -> tuple[int, int, int]:
    """``image_shape`` if it is channels, height and width, else an error."""
    shape = check_sizes("image_shape", image_shape)
    if len(shape) != 3:
        raise ValueError(f"image_shape must be (channels, height, width), got {shape}")
    return shape[0], shape[1], shape[2]


def check_odd(name: str, value: int) -> int:
    """``value`` if it is a positive odd int, else an error that names it."""
    if check_positive(name, value) % 2 == 0:
        raise ValueError(f"{name} must be odd, got {value}")
    return value


def colour_groups(output: str, channels: int, **widths: int) -> int:
    """Groups of features: one a colour, so that a colour sees those before it.

    A mixture of logistics draws the colours of a pixel together: its features know none of them.
    """
    groups = 1 if output == "logistic_mixture" else channels
    for name, width in widths.items():
        if check_positive(name, width) % groups:
            raise ValueError(f"{name} must be divisible by the {groups} colours, got {width}")
    return groups


def class_bias(num_classes: int | None, width: int) -> nn.Module | None:
    """What a class adds to the features of a layer, 0 at first; None without classes."""
    if num_classes is None:
        return None
    bias = nn.Embedding(check_positive("num_classes", num_classes), width)
    nn.init.zeros_(bias.weight)
    return bias


def log_mean_exp(x: Tensor) -> Tensor:
    """Log of the mean of exp(x) over dimension 0."""
    return torch.logsumexp(x, 0) - math.log(x.shape[0])
