"""Transformers over pixels that are small enough to visit every sample."""

from __future__ import annotations

import pytest
import torch

from dgm_models import create_model
from dgm_models.autoregressive import ImageGPT

TINY = {"width": 16, "depth": 2, "heads": 2, "networks": 1}
# name: (options, shape and levels small enough to visit every sample)
SMALL = {
    "learned": ({"positions": "learned"}, (1, 3, 3), 2),
    "sinusoidal": ({"positions": "sinusoidal"}, (1, 2, 3), 3),
    "rotary": ({"positions": "rotary"}, (1, 3, 3), 2),
    "several": ({"positions": "learned+rotary"}, (1, 3, 3), 2),
    "local": ({"attention_radius": 1}, (1, 3, 3), 2),
    "row": ({"attention_radius": 0}, (1, 2, 3), 3),
    "colour": ({"positions": "rotary"}, (3, 1, 2), 3),
    "learned_colour": ({"positions": "learned"}, (2, 2, 2), 2),
    "local_colour": ({"attention_radius": 1}, (3, 3, 1), 2),
    "networks": ({"networks": 3}, (1, 2, 3), 2),
}
every_model = pytest.mark.parametrize("name", SMALL)


def small(name: str, noise: float = 0.3, **config: object) -> ImageGPT:
    """A small model in float64 with parameters that are not those it starts with."""
    options, shape, levels = SMALL[name]
    torch.manual_seed(0)
    model = create_model("image_gpt", **{**TINY, "image_shape": shape, "levels": levels, **options, **config}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=noise)
    return model.eval()
