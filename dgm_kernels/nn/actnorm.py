"""Activation normalisation: an affine map per channel that the first batch initialises."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._core.checks import check_batch
from ..coupling import actnorm
from ..coupling.checks import check_count


class ActNorm(nn.Module):
    """``y = x exp(log_scale) + shift`` per channel, initialised so that the first batch comes out normalised.

    The first call of ``forward`` in training mode sets both parameters such that every channel of its output has mean
    0 and variance 1 over the batch and the pixels; a channel that is constant there is only shifted. Until then the
    layer has no map: ``inverse``, and ``forward`` in eval mode, are refused. The buffer ``initialized`` goes with the
    state dict. Processes that train together must start from one initialisation: run the first batch before wrapping
    the model in ``DistributedDataParallel``. So too before ``torch.compile(fullgraph=True)``.

    Args:
        channels: size of dimension 1 of ``x``.
        device, dtype: of the parameters.

    Shape:
        x ``[batch, channels, ...]`` to y of that shape and logdet ``[batch]``, as in :func:`dgm_kernels.actnorm`.
        Further arguments, the context of other layers of a chain, are not read.

    Source: Kingma and Dhariwal, "Glow: Generative Flow with Invertible 1x1 Convolutions", 2018, section 3.1.
    """

    initialized: Tensor

    def __init__(
        self, channels: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        channels = check_count("channels", channels, 1)
        self.shift = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))
        self.log_scale = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))
        self.register_buffer("initialized", torch.tensor(False, device=device))
        self._ready = False  # once the buffer is known to be True, so that a GPU is not asked at every call

    def forward(self, x: Tensor, *context: Any) -> tuple[Tensor, Tensor]:
        """y and the log-determinant; in training mode the first call initialises the parameters."""
        if not self._ready and not self._check_ready():
            if not self.training:
                raise self._not_ready("forward in eval mode")
            self._initialize(x)
        return actnorm(x, self.shift, self.log_scale)

    def inverse(self, y: Tensor, *context: Any) -> tuple[Tensor, Tensor]:
        """x and the log-determinant of the inverse."""
        if not self._ready and not self._check_ready():
            raise self._not_ready("inverse")
        return actnorm(y, self.shift, self.log_scale, inverse=True)

    def extra_repr(self) -> str:
        """Shown by ``repr``."""
        return str(self.shift.shape[0])

    @torch.compiler.disable
    def _check_ready(self) -> bool:
        """Asks the buffer, which may have been written to from outside, as when averages of weights are copied."""
        self._ready = bool(self.initialized)
        return self._ready

    def _not_ready(self, what: str) -> RuntimeError:
        return RuntimeError(f"ActNorm is not initialised: {what} needs a first batch in training mode, or a state dict")

    @torch.compiler.disable
    @torch.no_grad()
    def _initialize(self, x: Tensor) -> None:
        check_batch("x", x)
        channels = self.shift.shape[0]
        if x.dim() < 2 or x.shape[1] != channels:
            raise ValueError(f"x must have shape [batch, {channels}, ...], got {tuple(x.shape)}")
        if x.numel() == 0 or not x.isfinite().all():
            raise ValueError(f"x must be finite and not empty to initialise ActNorm, got shape {tuple(x.shape)}")
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).transpose(0, 1).flatten(1)
        variance, mean = torch.var_mean(wide, dim=1, correction=0)
        rounding = torch.finfo(wide.dtype).eps * wide.abs().amax(1)
        varies = variance > rounding.square()  # a constant channel keeps its scale
        deviation = torch.where(varies, variance.sqrt(), 1.0)
        self.shift.copy_(-mean / deviation)
        self.log_scale.copy_(-deviation.log())
        self.initialized.fill_(True)
        self._ready = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._ready = not self.initialized.is_meta and bool(self.initialized)
