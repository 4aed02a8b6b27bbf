"""Small ``ddpm`` models for the tests, and the best possible denoiser of Gaussian data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dgm_kernels import NoiseKey, noise_like
from dgm_models import create_model
from dgm_models.ddpm import DDPM


class OptimalDenoiser(nn.Module):
    """The best possible network for data ``N(mean, std^2)``, from ``E[x_0 | x_t]``."""

    def __init__(self, model: DDPM, mean: float, std: float) -> None:
        super().__init__()
        self.parameter = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.schedule, self.prediction, self.mean, self.std = model.schedule, model.prediction, mean, std

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        assert torch.equal(time, time.round()), "the model must be told the index of a training time"
        alpha, sigma = (getattr(self.schedule, name)[time.long()][:, None] for name in ("alpha_t", "sigma_t"))
        shrink = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        x0 = self.mean + shrink * (x - alpha * self.mean)
        eps = (x - alpha * x0) / sigma
        return {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0}[self.prediction]


def gaussian_model(mean: float = 0.3, std: float = 0.7, elements: int = 2, **config: object) -> DDPM:
    """A model in float64 whose denoiser is the best one for ``N(mean, std^2)``."""
    config = {"timesteps": 100, "schedule": "cosine", "clip": None, "levels": None, **config}
    model = create_model("ddpm", image_shape=(elements,), denoiser="mlp", width=8, depth=1, **config)
    model.denoiser = OptimalDenoiser(model, mean, std)
    return model.eval()


def gaussian_data(n: int, mean: float = 0.3, std: float = 0.7, elements: int = 2) -> Tensor:
    return mean + std * noise_like(torch.empty(n, elements, dtype=torch.float64), NoiseKey(123, stream=9))


def small_model(**config: object) -> DDPM:
    return create_model("ddpm", **{"denoiser": "mlp", "width": 32, "depth": 1, "timesteps": 20, **config})
