"""Pictures of samples, trajectories and losses, written to PNG files."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

Path = str | os.PathLike[str]


def image_grid(images: Tensor, path: Path, *, columns: int | None = None) -> None:
    """Writes images ``[n, channels, height, width]`` in [-1, 1] as one picture, 1 or 3 channels."""
    _check_images("images", images)
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(0.8 * columns, 0.8 * rows), layout="tight")
    for index in range(rows * columns):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.set_axis_off()
        if index < len(images):
            _show(axes, images[index])
    figure.savefig(path, dpi=120)


def trajectory(frames: Sequence[tuple[str, Tensor]], path: Path) -> None:
    """Writes a picture with a row a sample and a column a frame; a frame is (label, images in [-1, 1])."""
    if not frames:
        raise ValueError("frames must not be empty")
    rows = len(frames[0][1])
    figure = Figure(figsize=(0.9 * len(frames), 0.9 * rows + 0.3), layout="tight")
    for column, (label, images) in enumerate(frames):
        _check_images("frames", images)
        for row, image in enumerate(images):
            axes = figure.add_subplot(rows, len(frames), row * len(frames) + column + 1)
            axes.set_axis_off()
            _show(axes, image)
            if row == 0:
                axes.set_title(label, fontsize=8)
    figure.savefig(path, dpi=120)


def loss_curve(
    losses: Sequence[float], validation: Sequence[tuple[int, float]], path: Path, *, window: int = 50
) -> None:
    """Plots the training loss, with its mean over ``window`` steps, and the validation loss, pairs (step, loss)."""
    figure = Figure(figsize=(7, 4), layout="tight")
    axes = figure.add_subplot()
    axes.plot(range(1, len(losses) + 1), losses, color="tab:blue", alpha=0.2, label="training, every step")
    if len(losses) >= window:
        mean = torch.tensor(losses).unfold(0, window, 1).mean(1)
        axes.plot(range(window, len(losses) + 1), mean, color="tab:blue", label=f"training, mean of {window} steps")
    if validation:
        axes.plot(*zip(*validation, strict=True), color="tab:orange", marker="o", markersize=3, label="validation")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _check_images(name: str, images: Tensor) -> None:
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"{name} must have shape (n, 1 or 3, height, width), got {tuple(images.shape)}")


def _show(axes: Axes, image: Tensor) -> None:
    pixels = ((image.detach().float().cpu() + 1) / 2).clamp(0, 1).permute(1, 2, 0)
    axes.imshow(pixels.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
