"""Real data that needs no download: scikit-learn's handwritten digits."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

DIGITS_LEVELS = 17  # pixels are integers from 0 to 16


@dataclasses.dataclass(frozen=True)
class Split:
    """Samples ``x`` and their labels."""

    x: Tensor
    label: Tensor

    def __len__(self) -> int:
        return self.x.shape[0]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Three disjoint parts of a data set."""

    train: Split
    validation: Split
    test: Split

    def split(self, name: str) -> Split:
        """The part called ``"train"``, ``"validation"`` or ``"test"``."""
        if name not in ("train", "validation", "test"):
            raise ValueError(f"name must be 'train', 'validation' or 'test', got {name!r}")
        return getattr(self, name)


def digits(levels: int = DIGITS_LEVELS) -> Dataset:
    """The 1797 digits of scikit-learn, ``[n, 1, 8, 8]`` float32 in [-1, 1], labels int64.

    In the order of ``numpy.random.RandomState(0).permutation``: 1200 to train, 200 to validate, 397 to test.

    Args:
        levels: 17 for the grey levels as they are; 2 for -1 up to the middle one, 8 of 16, and 1 above.
    """
    if levels not in (2, DIGITS_LEVELS):
        raise ValueError(f"levels must be 2 or {DIGITS_LEVELS}, got {levels!r}")
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(images))
    x = torch.from_numpy(images[order]).to(torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    if levels == 2:
        x = torch.where(x > 0, 1.0, -1.0)
    label = torch.from_numpy(labels[order]).to(torch.int64)
    parts = [Split(x[part], label[part]) for part in (slice(0, 1200), slice(1200, 1400), slice(1400, None))]
    return Dataset(*parts)
