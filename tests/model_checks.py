"""What models of several families promise alike, as assertions."""

from collections.abc import Callable

import torch
from torch import Tensor

from dgm_kernels import NoiseKey, use_backend
from dgm_models import GenerativeModel


def check_backends_agree(model: GenerativeModel, x: Tensor, more: Callable[[], Tensor]) -> None:
    """Native kernels and the reference give the same loss of ``x``, the same gradient and the same ``more()``."""
    found = []
    for backend in ("auto", "reference"):
        with use_backend(backend):
            model.zero_grad()
            loss = model.loss(x, key=NoiseKey(1))
            loss.backward()
            gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
            found.append((loss.detach(), gradient, more().detach()))
    for native, reference in zip(*found, strict=True):
        torch.testing.assert_close(native, reference, rtol=1e-4, atol=1e-4 * float(reference.abs().max()))
