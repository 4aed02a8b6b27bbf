"""Gaussian mixtures, fitted by expectation maximisation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

import dgm_kernels
from dgm_kernels import NoiseKey, noise_like

from ..model import Stream, check_natural, check_number, check_positive, check_positive_number
from ..registry import register_model
from .base import DensityModel
from .em import Mixture, anneal, check_covariance, em_step
from .starts import RANDOM_STARTS, STARTS, start


@register_model("gaussian_mixture")
class GaussianMixture(DensityModel):
    """``p(x) = sum_k w_k N(x; m_k, S_k)``.

    :meth:`fit` runs EM from several starts and keeps the one with the highest likelihood of the validation samples. The
    loss is differentiable too, so that a mixture can be trained by gradients as part of something else.

    The unit of the parameters is that of the data; of grey levels it is one level (see :class:`.DensityModel`).

    Args:
        image_shape: of one sample.
        components: K.
        covariance: ``"spherical"``, ``"diagonal"`` or ``"full"``.
        init: ``"same"``, ``"variances"``, ``"data"`` or ``"kmeans"``: see :func:`.start`.
        restarts: how many starts :meth:`fit` tries, if ``init`` is random (``"data"`` or ``"kmeans"``).
        annealing: iterations of :func:`.anneal` before those of EM from such a start; 0 for none. They are plain EM in
            up to six dimensions.
        min_variance: the least eigenvalue of a covariance, in the squared unit of the parameters; see :func:`.em_step`.
        tolerance: a fit ends when an iteration raises the mean log-likelihood by less, in nats for each sample.
        dequantizations: of each sample with grey levels, drawn at the beginning of a fit, which then is to all of them.
        level_noise: share of the pixels above the lowest level for which a fit draws a move by one level, up or down
            with equal chances, as part of the dequantisation; a move beyond the highest level is cut off.
        levels: grey levels of the data in [-1, 1], equally spaced; None for continuous data.

    Source: Dempster et al., "Maximum likelihood from incomplete data via the EM algorithm", 1977.
    """

    default_settings: ClassVar = {"steps": 200, "validation_draws": 1}

    def __init__(
        self,
        image_shape: Sequence[int] = (1, 8, 8),
        components: int = 30,
        covariance: str = "diagonal",
        init: str = "kmeans",
        restarts: int = 10,
        annealing: int = 24,
        min_variance: float = 1e-3,
        tolerance: float = 1e-2,
        dequantizations: int = 16,
        level_noise: float = 1.0,
        levels: int | None = 17,
    ) -> None:
        super().__init__(image_shape, levels)
        if init not in STARTS:
            raise ValueError(f"init must be one of {', '.join(STARTS)}, got {init!r}")
        if not check_number("tolerance", tolerance) >= 0:
            raise ValueError(f"tolerance must not be negative, got {tolerance!r}")
        self.components, self.covariance = check_positive("components", components), check_covariance(covariance)
        self.init, self.restarts = init, check_positive("restarts", restarts)
        self.annealing = check_natural("annealing", annealing)
        self.min_variance, self.tolerance = check_positive_number("min_variance", min_variance), tolerance
        if not 0 <= check_number("level_noise", level_noise) <= 1:
            raise ValueError(f"level_noise must be in [0, 1], got {level_noise!r}")
        self.level_noise = level_noise
        self.dequantizations = check_positive("dequantizations", dequantizations)
        centre, width = (0.0, 1.0) if levels is None else (levels / 2, levels / 4)
        self.logits = nn.Parameter(torch.zeros(components))
        self.means = nn.Parameter(centre + width * torch.randn(components, self.elements))
        if covariance == "full":
            self.scale_tril = nn.Parameter(width * torch.eye(self.elements).repeat(components, 1, 1))
        else:
            shape = (components,) if covariance == "spherical" else (components, self.elements)
            self.log_scale = nn.Parameter(torch.full(shape, math.log(width)))
        self.fitted: Tensor
        self.register_buffer("fitted", torch.tensor(False))

    @property
    def mixture(self) -> Mixture:
        """The parameters as EM has them."""
        weights = torch.softmax(self.logits, 0)
        if self.covariance == "full":
            return Mixture(weights, self.means, scale_tril=self.scale_tril)
        return Mixture(weights, self.means, scale=self.log_scale.exp())

    @torch.no_grad()
    def set_mixture(self, mixture: Mixture) -> None:
        """Takes the parameters of a mixture of the same shape; a fit goes on from there."""
        self.logits.copy_(mixture.weights.log())
        self.means.copy_(mixture.means)
        if mixture.scale is not None:
            self.log_scale.copy_(mixture.scale.log())
        else:
            self.scale_tril.copy_(mixture.scale_tril)  # type: ignore[arg-type]
        self.fitted.fill_(True)

    def log_density(self, y: Tensor) -> Tensor:
        """Exact log-density in nats at points ``[N, D]``, ``[N]``."""
        mixture = self.mixture
        result = dgm_kernels.mixture_log_prob(
            y, mixture.means, scale=mixture.scale, scale_tril=mixture.scale_tril, logits=self.logits
        )
        return cast(Tensor, result)

    @torch.no_grad()
    def fit(
        self,
        x: Tensor,
        validation: Tensor | None = None,
        *,
        steps: int = 200,
        seed: int = 0,
        report: Callable[[float], bool] | None = None,
    ) -> list[float]:
        """Runs EM from each start until it converges; see :meth:`.FittedModel.fit`.

        A mixture that was fitted before goes on from its parameters.

        Returns:
            The loss before each iteration of the run that is kept, as :meth:`loss_parts` has it; it never rises, but
            for rounding.
        """
        self._check_data(x)
        steps = check_positive("steps", steps)
        y = self._training_points(x, seed)
        if validation is not None:
            self._check_data(validation)
            # The indices of training samples belong to them.
            judges = self.points(validation, NoiseKey(seed, len(x), stream=Stream.TRAINING_NOISE))
        random = self.init in RANDOM_STARTS and not bool(self.fitted)
        best = None
        for attempt in range(self.restarts if random else 1):
            mixture, losses, go_on = self._run(self._first(y, seed, attempt), y, steps, report)
            score = float(mixture.log_prob(y if validation is None else judges).mean())
            if best is None or score > best[0]:
                best = score, mixture, losses
            if not go_on:
                break
        assert best is not None
        self.set_mixture(best[1])
        return best[2]

    def _training_points(self, x: Tensor, seed: int) -> Tensor:
        """What a fit is to: the samples, or their dequantisations one after the other."""
        if self.levels is None:
            return x.flatten(1)
        points = []
        for draw in range(self.dequantizations):
            moved = x
            if self.level_noise:
                u = noise_like(x, NoiseKey(seed, step=draw, stream=Stream.LEVEL_NOISE), distribution="uniform")
                moved = self._move_levels(x, u)
            points.append(self.points(moved, NoiseKey(seed, step=draw, stream=Stream.TRAINING_NOISE)))
        return torch.cat(points)

    def _move_levels(self, x: Tensor, u: Tensor) -> Tensor:
        assert self.levels is not None
        level = self._grid(x).round()
        step = (u < self.level_noise).to(x.dtype) - 2 * (u < self.level_noise / 2).to(x.dtype)
        level = torch.where(level > 0, level + step, level).clamp(0, self.levels - 1)
        return (level / (self.levels - 1) * 2 - 1).to(x.dtype)

    def _first(self, y: Tensor, seed: int, attempt: int) -> Mixture:
        """Where a run of EM starts."""
        if bool(self.fitted):
            return Mixture(*(None if p is None else p.detach() for p in self.mixture))  # type: ignore[arg-type]
        key = NoiseKey(seed, step=attempt, stream=Stream.STARTS)
        first = start(self.init, y, self.components, self.covariance, key=key, min_variance=self.min_variance)
        if self.init not in RANDOM_STARTS:
            return first
        return anneal(y, first, self.annealing, min_variance=self.min_variance)

    def _run(
        self, mixture: Mixture, y: Tensor, steps: int, report: Callable[[float], bool] | None
    ) -> tuple[Mixture, list[float], bool]:
        """EM to convergence: the mixture, the losses, and whether ``report`` wants more."""
        losses: list[float] = []
        go_on = True
        while go_on and len(losses) < steps:
            mixture, log_likelihood = em_step(y, mixture, min_variance=self.min_variance)
            losses.append(-float(log_likelihood) / self.elements)
            go_on = report is None or report(losses[-1])
            if len(losses) > 1 and (losses[-2] - losses[-1]) * self.elements < self.tolerance:
                break
        return mixture, losses, go_on

    def _sample(  # type: ignore[override]
        self, n: int, seed: int, cond: Tensor | None, first_sample: int
    ) -> Tensor:
        """A component by its weight, then its Gaussian."""
        like = self.means.new_empty(n, self.elements)
        key = NoiseKey(seed, first_sample, stream=Stream.COMPONENTS)
        u = noise_like(like[:, :1], key, distribution="uniform")[:, 0]
        noise = noise_like(like, NoiseKey(seed, first_sample, stream=Stream.INITIAL_STATE))
        weights, means, scale, scale_tril = self.mixture
        chosen = (u[:, None] > weights.cumsum(0)[:-1]).sum(1)
        if scale_tril is not None:
            return self._samples(means[chosen] + (scale_tril.tril()[chosen] @ noise[:, :, None])[:, :, 0])
        assert scale is not None
        return self._samples(means[chosen] + scale[chosen].view(n, -1) * noise)
