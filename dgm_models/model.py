"""The interface of every model: loss, sample, log_prob, elbo, save and load."""

from __future__ import annotations

import contextlib
import enum
import inspect
import itertools
import json
import math
import numbers
import operator
import pathlib
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import safetensors.torch
import torch
from huggingface_hub import ModelHubMixin, hf_hub_download
from torch import Tensor, nn

from dgm_kernels import NoiseKey

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_CARD = """---
{{ card_data }}
---

A generative model of `dgm_models`: `dgm_models.from_pretrained(<this folder or repository>)` loads it.
"""


class DensityUnavailable(RuntimeError):
    """The model has no density (or no lower bound of it) that can be computed; the message says why."""


class Stream(enum.IntEnum):
    """What the streams of a :class:`~dgm_kernels.NoiseKey` are used for, so that no two uses share noise.

    A run of training and a run of sampling may so have the same seed.
    """

    STEPS = 0
    INITIAL_STATE = 1
    TRAINING_TIMES = 2
    DROPPED_LABELS = 3
    DATA_ORDER = 4
    BOUND = 5
    BOUND_TIMES = 6
    TRAINING_NOISE = 7
    BOUND_PATHS = 8
    LEVEL_NOISE = 9
    OBSERVATIONS = 10
    COMPONENTS = 11
    STARTS = 12


class GenerativeModel(nn.Module, ModelHubMixin, ABC, library_name="dgm_models", model_card_template=_CARD):
    """A distribution that can be trained, sampled and evaluated.

    A family implements :meth:`loss_parts` and :meth:`_sample`, and overrides :meth:`log_prob` and :meth:`elbo` where
    it has them. The arguments of ``__init__`` are the config: they must be JSON values.

    Attributes:
        model_name: the name in the registry.
        sample_shape: the shape of one sample.
        conditional: whether ``cond`` is understood.
        num_classes: classes that ``cond`` may name; None for a model that is not conditioned on classes.
        levels: number of grey levels of the data in [-1, 1], equally spaced; None for continuous data.
        exact_likelihood: whether :meth:`log_prob` is that of the data themselves, so that no bound of it is needed.
        default_settings: the values of ``train.Settings`` that suit the family better than the defaults there.
    """

    model_name: ClassVar[str] = "unregistered"
    sample_shape: tuple[int, ...]
    conditional: bool = False
    num_classes: int | None = None
    levels: int | None = None
    exact_likelihood: bool = False
    default_settings: ClassVar[Mapping[str, Any]] = types.MappingProxyType({})

    def __new__(cls, *args: Any, **config: Any) -> Self:
        """Records the arguments as the config; the mixin leaves out, without a word, what JSON cannot hold."""
        values = [_plain(f"argument {place}", value) for place, value in enumerate(args, start=1)]
        return super().__new__(cls, *values, **{name: _plain(name, value) for name, value in config.items()})

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that the model was made with, defaults included, as JSON values (a tuple is a list)."""
        return json.loads(json.dumps(self._hub_mixin_config or {}))

    @property
    def device(self) -> torch.device:
        """Where the parameters are; of a model that only keeps data, where these are."""
        return next(itertools.chain(self.parameters(), self.buffers())).device

    @property
    def dtype(self) -> torch.dtype:
        """What the parameters are; of a model that only keeps data, what these are."""
        return next(itertools.chain(self.parameters(), self.buffers())).dtype

    @abstractmethod
    def loss_parts(self, x: Tensor, cond: Tensor | None = None, *, key: NoiseKey | None = None) -> dict[str, Tensor]:
        """The named terms of the loss, scalars; the loss is their sum. Arguments as in :meth:`loss`."""

    @abstractmethod
    def _sample(self, n: int, seed: int, cond: Tensor | None, first_sample: int, **options: Any) -> Tensor:
        """Draws samples ``first_sample`` .. ``first_sample + n - 1`` of ``seed``."""

    def loss(self, x: Tensor, cond: Tensor | None = None, *, key: NoiseKey | None = None) -> Tensor:
        """The scalar to minimise: the sum of :meth:`loss_parts`.

        Args:
            x: ``[batch, *sample_shape]``.
            cond: what to condition on, one entry a sample, if the model is conditional.
            key: names the noise of this step of training, which is then a pure function of the key (but for its
                stream: see :class:`Stream`); None draws a key from PyTorch's generator.
        """
        return torch.stack(list(self.loss_parts(x, cond, key=key).values())).sum()

    def prepare(self, x: Tensor) -> None:
        """Sets what depends on the data, such as their scale, from training samples; called before the first step.

        A model that was prepared or trained before stays as it is. Most families have nothing to set.
        """

    def forward(self, x: Tensor, cond: Tensor | None = None, *, key: NoiseKey | None = None) -> Tensor:
        """:meth:`loss`, so that wrappers of modules (DistributedDataParallel, torch.compile) can train the model."""
        return self.loss(x, cond, key=key)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        seed: int = 0,
        cond: Tensor | int | None = None,
        first_sample: int = 0,
        *,
        batch_size: int | None = None,
        **options: Any,
    ) -> Tensor:
        """``n`` samples, ``[n, *sample_shape]``.

        Sample ``i`` of a seed does not depend on ``n``, on ``batch_size`` or on which process draws it, up to rounding.

        Args:
            n: how many.
            seed: names the noise.
            cond: what to condition on: ``[n, ...]``, or one int for all.
            first_sample: global index of the first sample; a process of several draws its own range.
            batch_size: how many to work on at a time; None takes all at once.
            options: of the family. A tensor with more dimensions than a sample has one entry a sample, or one for all.
        """
        n = check_positive("n", n)
        batch_size = n if batch_size is None else check_positive("batch_size", batch_size)
        cond = self._check_cond(cond, n)
        self._check_option_names(options)
        options = {name: self._check_option(name, value, n) for name, value in options.items()}
        with self._evaluating():
            parts = [
                self._sample(
                    min(batch_size, n - start),
                    seed,
                    None if cond is None else cond[start : start + batch_size],
                    first_sample + start,
                    **{name: self._entries(value, start, start + batch_size) for name, value in options.items()},
                )
                for start in range(0, n, batch_size)
            ]
        return torch.cat(parts)

    def trajectory(
        self,
        n: int,
        seed: int = 0,
        cond: Tensor | int | None = None,
        first_sample: int = 0,
        *,
        frames: int = 10,
        **options: Any,
    ) -> list[tuple[str, Tensor]]:
        """At most ``frames`` labelled states on the way to samples; a model that samples at once has only the last."""
        return [("sample", self.sample(n, seed, cond, first_sample, **options))]

    def log_prob(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Exact log-density (continuous data) or log-probability (grey levels) in nats, ``[batch]``.

        A family that dequantises grey levels gives the exact log-density of one dequantisation, in nats per level: a
        random number whose mean is a lower bound of the log-probability, which :meth:`elbo` bounds more tightly.

        Raises:
            DensityUnavailable: there is none that can be computed; the message says why.
        """
        raise DensityUnavailable(f"{self.model_name} has no density that can be computed")

    def elbo(self, x: Tensor, k: int = 1, cond: Tensor | None = None) -> Tensor:
        """A random lower bound of the log-likelihood in nats, ``[batch]``; for k > 1 the importance-weighted one.

        It bounds the log-density of continuous data and the log-probability of grey levels, those of a family that
        dequantises them too; where the family has the exact one, it is that.

        Raises:
            DensityUnavailable: there is no such bound; the message says why.
        """
        if self.exact_likelihood:
            return self.log_prob(x, cond)
        raise DensityUnavailable(f"{self.model_name} has no lower bound of its density")

    def bits_per_dim(self, nats: Tensor) -> Tensor:
        """A log-probability in nats as bits to store one number of a sample."""
        return -nats / (math.prod(self.sample_shape) * math.log(2.0))

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode within the block: nothing may depend on the rest of the batch."""
        training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(training)

    def _check_batch(self, x: Tensor) -> None:
        check_batch("x", x, self.sample_shape)

    def _check_data(self, x: Tensor) -> None:
        """:meth:`_check_batch`, and that the values are grey levels if the data has them."""
        self._check_batch(x)
        if self.levels is not None and not bool(self._on_levels(x).all()):
            raise ValueError(f"x must lie on {self.levels} equally spaced levels in [-1, 1] (config: levels)")

    def _grid(self, x: Tensor) -> Tensor:
        """x on the scale where the grey levels are 0 .. levels - 1; few digits are not made fewer."""
        assert self.levels is not None
        return (x.to(torch.promote_types(x.dtype, torch.float32)) + 1) / 2 * (self.levels - 1)

    def _on_levels(self, x: Tensor) -> Tensor:
        """Where x is a grey level, up to the rounding of its dtype."""
        assert self.levels is not None
        grid = self._grid(x)
        rounding = torch.finfo(x.dtype).eps / 8 * (self.levels - 1)  # below 1, numbers are eps / 2 apart
        return ((grid - grid.round()).abs() < 0.01 + rounding) & (x.abs() <= 1)

    def _check_cond(self, cond: Tensor | int | None, n: int) -> Tensor | None:
        if cond is None:
            return None
        if not self.conditional:
            raise ValueError(f"cond must be None: this {self.model_name} is not conditional")
        if not isinstance(cond, Tensor):
            number = _integer(cond)
            if number is None:
                raise TypeError(f"cond must be a tensor or an int, got {type(cond).__name__}")
            return torch.full((n,), number, device=self.device)
        if cond.dim() == 0 or cond.shape[0] != n:
            raise ValueError(f"cond must have one entry for each of the {n} samples, got shape {tuple(cond.shape)}")
        return cond.to(self.device)

    def _check_classes(self, cond: Tensor | int | None, n: int) -> Tensor | None:
        """:meth:`_check_cond` of a model with ``num_classes``, where ``cond`` holds the classes of n samples."""
        cond = self._check_cond(cond, n)
        if self.num_classes is None:
            return None
        if cond is None:
            raise ValueError(f"cond must be given: this {self.model_name} is conditional (config: num_classes)")
        if cond.dtype != torch.int64 or cond.dim() != 1:
            raise TypeError(f"cond must be int64 of shape [batch], got {cond.dtype} of shape {tuple(cond.shape)}")
        # Looking at the values of a tensor on another device would wait for it.
        looks = cond.device.type == "cpu" and not torch.compiler.is_compiling()
        if looks and not bool(((cond >= 0) & (cond < self.num_classes)).all()):
            raise ValueError(f"cond must be in 0 .. {self.num_classes - 1}, got {cond.tolist()}")
        return cond

    def _check_option_names(self, options: Mapping[str, Any]) -> None:
        """That :meth:`_sample` knows them."""
        check_options(f"sample of {self.model_name}", self._sample, ("n", "seed", "cond", "first_sample"), options)

    def _check_option(self, name: str, value: Any, n: int) -> Any:
        """An option of :meth:`sample`; a tensor comes to the model's device."""
        if not isinstance(value, Tensor):
            return value
        if value.dim() > len(self.sample_shape) and value.shape[0] not in (1, n):
            raise ValueError(
                f"{name} must have one entry for each of the {n} samples, or one, got shape {tuple(value.shape)}"
            )
        return value.to(self.device)

    def _entries(self, option: Any, start: int, stop: int) -> Any:
        """What an option of :meth:`sample` says about some of the samples."""
        one_each = isinstance(option, Tensor) and option.dim() > len(self.sample_shape) and option.shape[0] > 1
        return option[start:stop] if one_each else option

    def _save_pretrained(self, save_directory: pathlib.Path) -> None:
        config = {"model": self.model_name, "dtype": str(self.dtype).removeprefix("torch."), **self.config}
        (save_directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        safetensors.torch.save_model(self, str(save_directory / WEIGHTS_FILE))

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | pathlib.Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        config: dict[str, Any] | None = None,
        **model_kwargs: Any,
    ) -> GenerativeModel:
        """Called by the mixin's ``from_pretrained``; ``model_kwargs`` are what ``config`` says for ``__init__``."""
        if config is None:
            raise ValueError(f"{model_id} must hold a saved model, but it has no {CONFIG_FILE}")
        folder = pathlib.Path(model_id)
        if folder.is_dir():
            file = str(folder / WEIGHTS_FILE)
        else:
            file = hf_hub_download(
                model_id,
                WEIGHTS_FILE,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            )
        model = cls(**model_kwargs).to(getattr(torch, config["dtype"]))
        safetensors.torch.load_model(model, file)
        return model.eval()


class FittedModel(GenerativeModel):
    """A model that needs all training samples at once instead of small steps along gradients, as EM does."""

    @abstractmethod
    def fit(
        self,
        x: Tensor,
        validation: Tensor | None = None,
        *,
        steps: int = 200,
        seed: int = 0,
        report: Callable[[float], bool] | None = None,
    ) -> list[float]:
        """Fits the model, or goes on with one that was fitted before.

        Args:
            x: ``[samples, *sample_shape]`` to fit.
            validation: samples that choices, such as that of the best start, are made by; None for ``x`` itself.
            steps: iterations at most.
            seed: names the noise that the fit draws.
            report: is told the loss of each iteration and says whether to go on.

        Returns:
            The loss of each iteration that led to the result.
        """


def check_positive(name: str, value: int) -> int:
    """``value`` if it is a positive int, else an error that names it."""
    number = _integer(value)
    if number is None or number < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}")
    return number


def check_natural(name: str, value: int) -> int:
    """``value`` if it is an int from 0 on, else an error that names it."""
    number = _integer(value)
    if number is None or number < 0:
        raise ValueError(f"{name} must be a non-negative int, got {value!r}")
    return number


def check_number(name: str, value: float) -> float:
    """``value`` if it is a real number, NumPy's too, else an error that names it."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def check_positive_number(name: str, value: float) -> float:
    """``value`` if it is a positive finite number, else an error that names it."""
    number = check_number(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")
    return number


def check_flag(name: str, value: bool) -> bool:
    """``value`` if it is True or False, else an error that names it."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def check_options(
    what: str, function: Callable[..., Any], arguments: Sequence[str], options: Mapping[str, Any]
) -> None:
    """Raises an error that names ``what`` unless ``function`` knows the options; one that takes any looks itself.

    Args:
        what: whose options they are.
        function: is called with them.
        arguments: those of its parameters that are not options.
        options: by name.
    """
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [parameter.name for parameter in parameters if parameter.name not in arguments]
    for name in options:
        if name not in known:
            listing = f"its options are {', '.join(known)}" if known else "it has none"
            raise TypeError(f"{what} has no option {name!r}; {listing}")


def check_batch(name: str, value: Tensor, shape: Sequence[int]) -> None:
    """Raises an error that names ``value`` unless it is a floating-point tensor ``[batch, *shape]``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dim() == 0 or tuple(value.shape[1:]) != tuple(shape):
        expected = ", ".join(["batch", *map(str, shape)])
        raise ValueError(f"{name} must have shape ({expected}), got {tuple(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must hold floating-point numbers, got {value.dtype}")


def check_sizes(name: str, value: Sequence[int]) -> tuple[int, ...]:
    """``value`` as a tuple if it holds positive ints, else an error that names it."""
    try:
        sizes = list(value)
    except TypeError:
        raise TypeError(f"{name} must be a sequence of positive ints, got {value!r}") from None
    return tuple(check_positive(f"{name}[{place}]", size) for place, size in enumerate(sizes))


def _integer(value: object) -> int | None:
    """The number as an int, NumPy's integers too; None for anything else, bool and tensors among it."""
    if isinstance(value, (bool, Tensor)):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def _plain(name: str, value: Any) -> Any:
    """``value`` as JSON holds it; arrays and tensors become lists or numbers."""
    try:
        return json.loads(json.dumps(value, default=lambda array: array.tolist()))
    except (AttributeError, TypeError):
        raise TypeError(f"{name} must be a JSON value, an array or a tensor, got {type(value).__name__}") from None
