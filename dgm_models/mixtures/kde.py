"""Kernel density estimate: a Gaussian around every data point."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

import dgm_kernels
from dgm_kernels import NoiseKey, noise_like

from ..model import DensityUnavailable, Stream, check_positive, check_positive_number
from ..registry import register_model
from .base import DensityModel

RULES = ("validation", "scott", "silverman")
_GOLDEN = (math.sqrt(5) - 1) / 2


@register_model("kde")
class KernelDensityEstimate(DensityModel):
    """``p(x) = mean_m N(x; x_m, h^2 I)`` over the data points x_m.

    :meth:`fit` keeps the data, which are saved with the model, and sets the bandwidth h. The unit of the bandwidth is
    that of the data; of grey levels it is one level, and x_m is the middle of its cells (see :class:`.DensityModel`).

    Args:
        image_shape: of one sample.
        bandwidth: a positive number; ``"scott"``, ``s n^(-1 / (D + 4))``; ``"silverman"``,
            ``s (n (D + 2) / 4)^(-1 / (D + 4))``, with s^2 the mean variance of an element; or ``"validation"``, the one
            under which the validation samples of :meth:`fit` are likeliest.
        levels: grey levels of the data in [-1, 1], equally spaced; None for continuous data.

    Source: Parzen, "On estimation of a probability density function and mode", 1962; Scott, 1992; Silverman, 1986.
    """

    default_settings: ClassVar = {"steps": 40, "validation_draws": 1}

    def __init__(
        self, image_shape: Sequence[int] = (1, 8, 8), bandwidth: float | str = "validation", levels: int | None = 17
    ) -> None:
        super().__init__(image_shape, levels)
        if isinstance(bandwidth, str):
            if bandwidth not in RULES:
                raise ValueError(f"bandwidth must be a positive number or one of {', '.join(RULES)}, got {bandwidth!r}")
        else:
            check_positive_number("bandwidth", bandwidth)
        self.rule = bandwidth
        self.data: Tensor
        self.bandwidth: Tensor
        self.register_buffer("data", torch.empty(0, self.elements))
        self.register_buffer("bandwidth", torch.ones(()))

    def log_density(self, y: Tensor) -> Tensor:
        """Exact log-density in nats at points ``[N, D]``, ``[N]``."""
        self._check_fitted()
        return dgm_kernels.kde_log_prob(y, self.data, self.bandwidth)

    @torch.no_grad()
    def fit(
        self,
        x: Tensor,
        validation: Tensor | None = None,
        *,
        steps: int = 40,
        seed: int = 0,
        report: Callable[[float], bool] | None = None,
    ) -> list[float]:
        """Keeps the data and sets the bandwidth; see :meth:`.FittedModel.fit`.

        Args:
            x: ``[samples, *image_shape]``, the data points. They take the place of those of an earlier fit; if they are
                the same, the bandwidth stays.
            validation: samples, none of them among the data; needed if the bandwidth is chosen by them.
            steps: bandwidths to try.
            seed: names the noise of the dequantisation.
            report: is told each loss.

        Returns:
            The loss of each bandwidth that was tried, on the validation samples if there are any.
        """
        self._check_data(x)
        if not len(x):
            raise ValueError("x must hold at least one data point, got none")
        if validation is None and self.rule == "validation":
            raise ValueError("validation must be given: the bandwidth is to be chosen by it (config: bandwidth)")
        judges = x if validation is None else validation
        self._check_data(judges)
        data = x.flatten(1).to(self.device, self.dtype)
        data = data if self.levels is None else self._grid(data).round().to(data.dtype) + 0.5
        known = torch.equal(data, self.data)
        self.data = data
        # The indices of training samples belong to them.
        key = NoiseKey(seed, 0 if validation is None else len(x), stream=Stream.TRAINING_NOISE)
        points = self.points(judges.to(data), key)
        if not known and self.rule == "validation":
            return self._search(points, self._rule("silverman"), check_positive("steps", steps), report)
        if not known:
            self.bandwidth.fill_(self._rule(self.rule) if isinstance(self.rule, str) else self.rule)
        losses = [self._loss(points)]
        if report is not None:
            report(losses[0])
        return losses

    def _rule(self, name: str) -> float:
        """A rule's bandwidth for the data."""
        count, elements = self.data.shape
        factor = count if name == "scott" else count * (elements + 2) / 4
        deviation = math.sqrt(float(self.data.double().var(0, correction=0).mean()))
        if deviation == 0:
            raise ValueError("x must not be one point only: no rule gives a bandwidth then")
        return deviation * factor ** (-1 / (elements + 4))

    def _search(self, points: Tensor, start: float, steps: int, report: Callable[[float], bool] | None) -> list[float]:
        """The best bandwidth by golden sections of its logarithm, from 1/100 to 10 times that of a rule."""
        tried: dict[float, float] = {}
        asked = True

        def loss(log_bandwidth: float) -> float:
            nonlocal asked
            self.bandwidth.fill_(math.exp(log_bandwidth))
            tried[log_bandwidth] = self._loss(points)
            asked = report is None or report(tried[log_bandwidth])
            return tried[log_bandwidth]

        low, high = math.log(start) - math.log(100), math.log(start) + math.log(10)
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        loss(left)
        while asked and len(tried) < steps and high - low > 1e-4:
            if left not in tried or right not in tried:
                loss(left if left not in tried else right)
            elif tried[left] <= tried[right]:
                high, right, left = right, left, right - _GOLDEN * (right - low)
            else:
                low, left, right = left, right, left + _GOLDEN * (high - left)
        self.bandwidth.fill_(math.exp(min(tried, key=lambda place: tried[place])))
        return list(tried.values())

    def _loss(self, points: Tensor) -> float:
        return -float(self.log_density(points).mean()) / self.elements

    def _sample(  # type: ignore[override]
        self, n: int, seed: int, cond: Tensor | None, first_sample: int
    ) -> Tensor:
        """A data point, all being as likely, and noise."""
        self._check_fitted()
        like = self.data.new_empty(n, self.elements)
        key = NoiseKey(seed, first_sample, stream=Stream.COMPONENTS)
        u = noise_like(like[:, :1].double(), key, distribution="uniform")[:, 0]
        chosen = (u * len(self.data)).ceil().long() - 1
        noise = noise_like(like, NoiseKey(seed, first_sample, stream=Stream.INITIAL_STATE))
        return self._samples(self.data[chosen] + self.bandwidth * noise)

    def _check_fitted(self) -> None:
        if not len(self.data):
            raise DensityUnavailable("this kde has no density: it holds no data before fit(x)")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Makes room for as many data points as were saved."""
        saved = state_dict.get(prefix + "data")
        if saved is not None:
            self.data = self.data.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
