"""What all autoregressive families share: the distribution of a network's outputs, exact log-probabilities, samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

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
        self.sample_shape = check_sizes("image_shape", image_shape)
        self.network_shape = self.sample_shape if network_shape is None else tuple(network_shape)
        self.networks = nn.ModuleList(networks)
        self.output, self.levels, self.num_classes = output, levels, num_classes
        self.conditional = num_classes is not None

    def loss_parts(self, x: Tensor, cond: Tensor | None = None, *, key: NoiseKey | None = None) -> dict[str, Tensor]:
        """``nll``: the mean negative log-probability of a sample in nats; in training, the mean of the networks'."""
        self._check_batch(x)
        each = self._log_probs(x, self._labels(cond, x.shape[0]))
        return {"nll": -(each if self.training else log_mean_exp(each)).mean()}

    def log_prob(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Exact log-probability in nats, ``[batch]``, in one pass over each network.

        Args:
            x: ``[batch, *image_shape]`` on the grey levels.
            cond: int64 ``[batch]``, the classes, if the model has any.
        """
        self._check_data(x)
        with self._evaluating():
            return log_mean_exp(self._log_probs(x, self._labels(cond, x.shape[0])))

    def _log_probs(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """Those of each network, ``[networks, batch]``."""
        x = self._to_network(x)
        return torch.stack([self._log_prob(x, network(x, labels)) for network in self.networks])

    def _log_prob(self, x: Tensor, parameters: Tensor) -> Tensor:
        """Log-probability of x, in the shape of the networks, under the distributions with these parameters."""
        if self.output == "bernoulli":
            logits = parameters.to(torch.promote_types(parameters.dtype, torch.float32))
            return F.logsigmoid(x * logits).flatten(1).sum(1)  # sigmoid(-logit) is the probability of level 0
        if self.output == "categorical":
            level = self._level(x)
            logits = parameters.unflatten(1, (x.shape[1], self.levels))
            return dgm_kernels.categorical_log_prob(level, logits, dim=2).flatten(1).sum(1)
        return dgm_kernels.discretized_logistic_mixture(x, parameters, levels=self.levels).flatten(1).sum(1)

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
                A pixel is drawn given those before it in the order of the network: what is known of later ones does
                not steer it.
            mask: 1 (or True) where ``known`` is kept, 0 where the model draws.
        """
        (given, kept), labels = self._given(known, mask, n), self._labels(cond, n)
        chosen = self._choice(n, seed, first_sample)
        samples = torch.empty(n, *self.sample_shape, device=self.device, dtype=self.dtype)
        for place in chosen.unique().tolist():
            rows = (chosen == place).nonzero()[:, 0]
            key = NoiseKey(seed, samples=first_sample + rows)
            condition, levels, known_ = (None if value is None else value[rows] for value in (labels, given, kept))
            level = self.sampler(place)(len(rows), key=key, condition=condition, given=levels, known=known_)
            samples[rows] = self._from_network(self._value(level))
        return samples

    def sampler(self, network: int = 0) -> IncrementalSampler:
        """The cached sampler of one of the networks; it draws levels in the shape of the networks."""
        return dgm_kernels.incremental_sampler(
            self.networks[network],
            self.network_shape,
            output=self.output,
            levels=self.levels,
            scale=2 / (self.levels - 1),
            offset=-1.0,
        )

    def _choice(self, n: int, seed: int, first_sample: int) -> Tensor:
        """The network of each sample, int64 ``[n]``."""
        key = NoiseKey(seed, first_sample, stream=Stream.INITIAL_STATE)
        u = noise_like(torch.empty(n, 1, device=self.device), key, distribution="uniform")[:, 0]
        return (u * len(self.networks)).ceil().long() - 1

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
                torch.broadcast_shapes(value.shape, (n, *self.sample_shape))
            except RuntimeError:
                raise ValueError(
                    f"{name} must broadcast to shape {(n, *self.sample_shape)}, got {tuple(value.shape)}"
                ) from None
        kept = mask.bool().expand(n, *self.sample_shape)
        level = self._level(torch.where(kept, known, -1.0))  # what is not known need not be on a level, nor a number
        exact = (self._value(level) - known).abs() * (self.levels - 1) < 0.02
        if not bool((exact & (level >= 0) & (level < self.levels) | ~kept).all()):
            raise ValueError(f"known must lie on {self.levels} equally spaced levels in [-1, 1] where mask is 1")
        return self._to_network(level), self._to_network(kept)

    def _to_network(self, x: Tensor) -> Tensor:
        """Samples in the shape that the network takes."""
        return x.reshape(x.shape[0], *self.network_shape)

    def _from_network(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`_to_network`."""
        return x.reshape(x.shape[0], *self.sample_shape)

    def _level(self, x: Tensor) -> Tensor:
        """Grey levels 0 .. levels - 1, int64."""
        return ((x + 1) / 2 * (self.levels - 1)).round().to(torch.int64)

    def _value(self, level: Tensor) -> Tensor:
        """The x of grey levels."""
        return level.to(self.dtype) * (2 / (self.levels - 1)) - 1

    def _labels(self, cond: Tensor | None, n: int) -> Tensor | None:
        """The classes of n samples, checked."""
        cond = self._check_cond(cond, n)
        if self.num_classes is None:
            return None
        if cond is None:
            raise ValueError(f"cond must be given: this {self.model_name} is conditional (config: num_classes)")
        if cond.dtype != torch.int64 or cond.dim() != 1:
            raise TypeError(f"cond must be int64 of shape [batch], got {cond.dtype} of shape {tuple(cond.shape)}")
        # Looking at the values of a tensor on another device would wait for it.
        if cond.device.type == "cpu" and not bool(((cond >= 0) & (cond < self.num_classes)).all()):
            raise ValueError(f"cond must be in 0 .. {self.num_classes - 1}, got {cond.tolist()}")
        return cond


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
