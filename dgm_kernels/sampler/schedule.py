"""Noise schedules: how much signal and how much noise a state holds at every training time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._core.checks import as_int


def _numbers(name: str, values: Sequence[float] | Tensor) -> Tensor:
    try:
        return torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a sequence of numbers, got {values!r}") from error


def _checked_betas(betas: Sequence[float] | Tensor) -> Tensor:
    values = _numbers("betas", betas)
    if values.dim() != 1 or values.numel() == 0:
        raise ValueError(f"betas must be a non-empty sequence of numbers, got shape {tuple(values.shape)}")
    for step, beta in enumerate(values.tolist()):
        if not 0.0 < beta < 1.0:
            raise ValueError(f"betas must lie in (0, 1); betas[{step}] = {beta:g}: {_why_not(beta)}")
    return values


def _why_not(beta: float) -> str:
    if math.isnan(beta):
        return "it is not a number"
    if beta == 0:
        return "the step adds no noise, so its posterior variance is 0/0"
    if beta < 0:
        return "a variance cannot be negative"
    if beta == 1:
        return "alphas_cumprod becomes 0: no signal is left to recover"
    return "sqrt(1 - beta) is the root of a negative number"


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """The forward process ``x_t = alpha_t x_0 + sigma_t eps``, tabulated in float64 over the training times.

    Build one with a class method: ``linear``, ``scaled_linear``, ``cosine``, ``from_betas`` (variance preserving),
    ``karras``, ``geometric``, ``from_sigmas`` (variance exploding, EDM and NCSN), ``flow`` (flow matching).

    Attributes:
        kind: ``"vp"``, ``"ve"`` or ``"flow"``.
        alpha_t: ``[T]``, the factor of the clean sample.
        sigma_t: ``[T]``, the standard deviation of the noise. Noise grows with the index.
        betas: ``[T]``, variance added by each step; None unless ``kind`` is ``"vp"``.
        times: ``[T]``, what the model is told: 0 .. T - 1 (``vp``), sigma (``ve``), the time in [0, 1] (``flow``).
    """

    kind: str
    alpha_t: Tensor
    sigma_t: Tensor
    times: Tensor
    betas: Tensor | None = None

    def __len__(self) -> int:
        return self.alpha_t.numel()

    @property
    def alphas(self) -> Tensor:
        """``1 - betas``."""
        if self.betas is None:
            raise ValueError(f"a schedule of kind {self.kind!r} has no betas")
        return 1.0 - self.betas

    @property
    def alphas_cumprod(self) -> Tensor:
        """``alpha_t ** 2``: the product of ``1 - betas`` so far (variance preserving schedules)."""
        return torch.cumprod(self.alphas, 0)

    @property
    def sigmas(self) -> Tensor:
        """Noise-to-signal ratio ``sigma_t / alpha_t``."""
        return self.sigma_t / self.alpha_t

    @property
    def log_snr(self) -> Tensor:
        """``log(alpha_t^2 / sigma_t^2)``."""
        return 2.0 * (self.alpha_t.log() - self.sigma_t.log())

    @classmethod
    def from_betas(cls, betas: Sequence[float] | Tensor) -> Schedule:
        """A variance preserving schedule from the user's own betas.

        Raises:
            ValueError: a beta lies outside (0, 1); the message gives its index and the reason.
        """
        values = _checked_betas(betas)
        cumprod = torch.cumprod(1.0 - values, 0)
        if float(cumprod[0]) == 1.0:
            raise ValueError(f"betas[0] = {float(values[0]):g} is too small: alphas_cumprod is 1, so no noise is added")
        if float(cumprod[-1].sqrt()) < torch.finfo(torch.float32).tiny:
            step = int((cumprod.sqrt() < torch.finfo(torch.float32).tiny).int().argmax())
            raise ValueError(f"betas are too large: alphas_cumprod[{step}] is 0 in float32, so no signal is left")
        times = torch.arange(values.numel(), dtype=torch.float64)
        return cls("vp", cumprod.sqrt(), (1.0 - cumprod).sqrt(), times, values)

    @classmethod
    def linear(cls, steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
        """Betas in equal steps (Ho et al., "Denoising Diffusion Probabilistic Models", 2020)."""
        return cls.from_betas(torch.linspace(beta_start, beta_end, _count(steps), dtype=torch.float64))

    @classmethod
    def scaled_linear(cls, steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Schedule:
        """Square roots of betas in equal steps (Rombach et al., latent diffusion, 2022)."""
        return cls.from_betas(torch.linspace(beta_start**0.5, beta_end**0.5, _count(steps), dtype=torch.float64) ** 2)

    @classmethod
    def cosine(cls, steps: int = 1000, max_beta: float = 0.999, offset: float = 0.008) -> Schedule:
        """``alphas_cumprod = cos^2((t + s) / (1 + s) pi / 2)`` (Nichol and Dhariwal, 2021)."""
        t = torch.arange(_count(steps) + 1, dtype=torch.float64) / steps
        bar = torch.cos((t + offset) / (1.0 + offset) * math.pi / 2) ** 2
        return cls.from_betas((1.0 - bar[1:] / bar[:-1]).clamp(max=max_beta))

    @classmethod
    def from_sigmas(cls, sigmas: Sequence[float] | Tensor) -> Schedule:
        """A variance exploding schedule, ``x_t = x_0 + sigma_t eps``, from rising positive sigmas."""
        values = _numbers("sigmas", sigmas)
        if (
            values.dim() != 1
            or values.numel() == 0
            or not bool((values > 0).all())
            or not bool((values.diff() > 0).all())
        ):
            raise ValueError("sigmas must be a non-empty rising sequence of positive numbers")
        if not bool(values.isfinite().all()):
            raise ValueError("sigmas must be finite")
        return cls("ve", torch.ones_like(values), values, values)

    @classmethod
    def karras(cls, steps: int = 1000, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Schedule:
        """Sigmas whose ``rho``-th roots are equally spaced (Karras et al., "Elucidating the design space", 2022)."""
        _range("sigma_min", sigma_min, "sigma_max", sigma_max)
        roots = torch.linspace(sigma_min ** (1 / rho), sigma_max ** (1 / rho), _count(steps), dtype=torch.float64)
        return cls.from_sigmas(roots**rho)

    @classmethod
    def geometric(cls, steps: int = 1000, sigma_min: float = 0.01, sigma_max: float = 50.0) -> Schedule:
        """Sigmas in a geometric sequence (Song and Ermon, NCSN, 2019)."""
        _range("sigma_min", sigma_min, "sigma_max", sigma_max)
        return cls.from_sigmas(
            torch.linspace(math.log(sigma_min), math.log(sigma_max), _count(steps), dtype=torch.float64).exp()
        )

    @classmethod
    def flow(cls, steps: int = 1000) -> Schedule:
        """Flow matching ``x_t = t x_1 + (1 - t) noise`` (Lipman et al., 2023) at ``t = 1 - (k + 1) / steps``.

        Noise grows with the index here too: the last entry, ``t = 0``, is pure noise.
        """
        t = 1.0 - torch.arange(1, _count(steps) + 1, dtype=torch.float64) / steps
        return cls("flow", t, 1.0 - t, t)


def positive_int(name: str, value: object) -> int:
    """``value`` as an int that is at least 1."""
    number = as_int(value)
    if number is None or number < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}")
    return number


def _count(steps: int) -> int:
    return positive_int("steps", steps)


def _range(low_name: str, low: float, high_name: str, high: float) -> None:
    if not 0 < low < high < math.inf:
        raise ValueError(f"expected 0 < {low_name} < {high_name} < inf, got {low_name}={low:g}, {high_name}={high:g}")
