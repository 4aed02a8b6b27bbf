"""The training loop: Adam, averaged weights, clipped gradients, checkpoints that resume to the same bits; or a fit."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import time
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from dgm_kernels import NoiseKey, noise_like

from .data import Dataset, Split
from .model import FittedModel, GenerativeModel, Stream, check_natural, check_positive

CHECKPOINT_FILE = "checkpoint.pt"
SETTINGS_FILE = "training.json"
# The same validation noise for every run, so that their losses compare; no training sample has such an index.
_VALIDATION_KEY = NoiseKey(0, first_sample=2**55)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        steps: length of the run; the learning rate falls to 0 over it.
        batch_size: samples a step.
        lr: the largest learning rate.
        warmup: steps over which it rises from 0.
        weight_decay: of AdamW, on parameters with two dimensions and more; 0 is Adam.
        clip_grad: largest norm of the gradient.
        ema: decay of the average of the weights that is saved.
        validate_every: steps between validations and checkpoints.
        validation_draws: noise draws that the validation loss averages over.
        seed: of the weights, the order of the data and the noise.
    """

    steps: int = 3000
    batch_size: int = 64
    lr: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    ema: float = 0.995
    validate_every: int = 250
    validation_draws: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "validate_every", "validation_draws"):
            object.__setattr__(self, name, check_positive(name, getattr(self, name)))
        for name in ("warmup", "seed"):
            object.__setattr__(self, name, check_natural(name, getattr(self, name)))
        for name in ("lr", "clip_grad"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)!r}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema!r}")

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to 0; a pure function of the step."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        return self.lr * (1 + math.cos(math.pi * (step - self.warmup) / max(self.steps - self.warmup, 1))) / 2


class Trainer:
    """Trains a model on the training part of a data set.

    A step is a pure function of the state before it and of ``(settings.seed, step)``: which samples, which noise. So a
    run that was stopped and resumed ends with the same weights as one that was not.

    A :class:`.FittedModel` is fitted instead: its iterations are the steps, and of the settings only ``steps``,
    ``seed`` and ``validation_draws`` count.

    Args:
        model: is trained in place.
        data: its ``train`` part is trained on, its ``validation`` part is evaluated.
        settings: how.
        out: folder for the checkpoint and the trained model; None writes nothing.
    """

    def __init__(
        self, model: GenerativeModel, data: Dataset, settings: Settings, out: pathlib.Path | None = None
    ) -> None:
        self.model, self.settings, self.out = model, settings, out
        self.train_split = _on(data.train, model.device)
        self.validation_split = _on(data.validation, model.device)
        model.prepare(self.train_split.x)
        self.optimizer = _optimizer(model, settings)
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
        self.step = 0
        self.losses: list[float] = []
        self.validation: list[tuple[int, float]] = []
        self._epoch: tuple[int, Tensor] | None = None

    @property
    def averaged_model(self) -> GenerativeModel:
        """The model with the averaged weights: the one to save and to sample from."""
        return cast(GenerativeModel, self.average.module)

    def run(self, until: int | None = None, *, minutes: float = math.inf, progress: bool = True) -> None:
        """Trains to step ``until`` (default: the last of the settings), or for so many minutes."""
        until = self.settings.steps if until is None else min(until, self.settings.steps)
        deadline = time.monotonic() + 60 * minutes
        if isinstance(self.model, FittedModel):
            self._fit(self.model, until, deadline, progress)
            return
        pending: list[Tensor] = []  # losses on the device: reading each at once would wait for every step
        self.model.train()
        with tqdm(total=until, initial=self.step, unit="step", disable=not progress) as bar:
            while self.step < until and time.monotonic() < deadline:
                pending.append(self.train_step())
                bar.update()
                if self.step % self.settings.validate_every == 0 or self.step == until:
                    self._flush(pending)
                    self.validation.append((self.step, self.validation_loss()))
                    self.save()
                elif self.step % 25 == 0:
                    self._flush(pending)
                bar.set_postfix(self._summary(), refresh=False)
            self._flush(pending)
        self.save()

    def _fit(self, model: FittedModel, until: int, deadline: float, progress: bool) -> None:
        """The iterations of a model that is fitted, from several starts if it tries some; then validates and saves."""
        if self.step >= until:
            return
        with tqdm(unit="step", disable=not progress) as bar:

            def report(loss: float) -> bool:
                bar.update()
                bar.set_postfix({"loss": f"{loss:.4f}"}, refresh=False)
                return time.monotonic() < deadline

            x, validation, seed = self.train_split.x, self.validation_split.x, self.settings.seed
            losses = model.fit(x, validation, steps=until - self.step, seed=seed, report=report)
        self._flush(list(torch.tensor(losses, dtype=torch.float64)))
        self.step = len(self.losses)
        self.averaged_model.load_state_dict(model.state_dict())
        self.validation.append((self.step, self.validation_loss()))
        self.save()

    def train_step(self) -> Tensor:
        """One step of the optimizer, or iteration of a fit; returns the loss, still on the device."""
        if isinstance(self.model, FittedModel):
            self._fit(self.model, self.step + 1, math.inf, progress=False)
            return torch.tensor(self.losses[-1])
        lr = self.settings.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        x, cond = self.batch(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model.loss(x, cond, key=NoiseKey(self.settings.seed, step=self.step))
        loss.backward()
        clip_grad_norm_(self.model.parameters(), self.settings.clip_grad)
        self.optimizer.step()
        self.average.update_parameters(self.model)
        self.step += 1
        return loss.detach()

    def batch(self, step: int) -> tuple[Tensor, Tensor | None]:
        """The samples of a step: a part of the epoch's random order (what does not fill a batch is left out)."""
        split = self.train_split
        size = min(self.settings.batch_size, len(split))
        epoch, place = divmod(step, len(split) // size)
        if self._epoch is None or self._epoch[0] != epoch:
            key = NoiseKey(self.settings.seed, step=epoch, stream=Stream.DATA_ORDER)
            like = torch.empty(1, len(split), device=split.x.device)
            self._epoch = epoch, noise_like(like, key, distribution="uniform")[0].argsort(stable=True)
        chosen = self._epoch[1][place * size : (place + 1) * size]
        return split.x[chosen], split.label[chosen] if self.model.conditional else None

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Loss of the averaged model on the validation part, with the same noise whenever it is called."""
        split, model = self.validation_split, self.averaged_model
        cond = split.label if model.conditional else None
        was_training = model.training
        model.eval()
        draws = range(self.settings.validation_draws)
        losses = [model.loss(split.x, cond, key=_VALIDATION_KEY.at(draw)) for draw in draws]
        model.train(was_training)
        return float(torch.stack(losses).mean())

    def _flush(self, pending: list[Tensor]) -> None:
        if pending:
            values = torch.stack(pending).tolist()
            if not all(map(math.isfinite, values)):
                raise FloatingPointError(f"the loss is no longer finite at step {self.step}; try a smaller lr")
            self.losses += values
            pending.clear()

    def _summary(self) -> dict[str, str]:
        recent = self.losses[-50:]
        summary = {"loss": f"{sum(recent) / len(recent):.4f}"} if recent else {}
        if self.validation:
            summary["validation"] = f"{self.validation[-1][1]:.4f}"
        return summary

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, and the curves so far."""
        state = {name: getattr(self, name).state_dict() for name in ("model", "average", "optimizer")}
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        rng = {"cpu": torch.get_rng_state(), "cuda": cuda}
        return {**state, "rng": rng, "step": self.step, "losses": self.losses, "validation": self.validation}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where :meth:`state_dict` was called."""
        for name in ("model", "average", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        torch.set_rng_state(state["rng"]["cpu"])
        if state["rng"]["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["rng"]["cuda"])
        self.step, self.losses, self.validation = state["step"], list(state["losses"]), list(state["validation"])

    def save(self) -> None:
        """Writes the checkpoint, the settings and the averaged model to the output folder."""
        if self.out is None:
            return
        self.averaged_model.save_pretrained(self.out)
        (self.out / SETTINGS_FILE).write_text(json.dumps(dataclasses.asdict(self.settings), indent=2) + "\n")
        partial = self.out / f"{CHECKPOINT_FILE}.partial"
        torch.save(self.state_dict(), partial)
        os.replace(partial, self.out / CHECKPOINT_FILE)  # a run that is killed here leaves the old one whole

    def load(self) -> None:
        """Reads the checkpoint in the output folder."""
        file = None if self.out is None else self.out / CHECKPOINT_FILE
        if file is None or not file.exists():
            raise ValueError(f"out must hold a {CHECKPOINT_FILE} to resume from, got {self.out}")
        self.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))


def _optimizer(model: GenerativeModel, settings: Settings) -> torch.optim.AdamW:
    """Weights decay; biases, gains and the like do not."""
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay)


def _on(split: Split, device: torch.device) -> Split:
    return Split(split.x.to(device), split.label.to(device))
