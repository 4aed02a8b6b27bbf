"""Calls of the latent op's native kernels, and what they must give, on any device."""

from collections.abc import Sequence

import torch

from dgm_kernels import use_backend
from tests.contract import assert_parity
from tests.gradients import values_and_gradients
from tests.latent_cases import CODE_CASE, LatentCase


def check_case(
    backend: str,
    case: LatentCase,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    which: Sequence[int] | None = None,
    coarse: bool = False,
) -> None:
    """Values and gradients against float64: at most twice as far off as eager in float32, rounded once.

    ``coarse`` allows one unit in the last place: Triton's interpreter truncates what it stores in bfloat16.
    """
    operands = case.make(shape, dtype)
    with use_backend(backend):
        actual = [a.cpu() for a in values_and_gradients(case.call, [o.to(device) for o in operands], which)]
    exact = values_and_gradients(case.eager, [o.double() for o in operands], which)
    eager = values_and_gradients(case.eager, [o.float() for o in operands], which)
    for a, e, x in zip(actual, eager, exact, strict=True):
        if not a.is_floating_point():
            assert torch.equal(a, x), f"{case}: {a} instead of {x}"
            continue
        size = max(1.0, float(x.abs().nan_to_num(0.0).max())) if x.numel() else 1.0
        tiny = torch.finfo(dtype).eps if coarse and a.dtype == dtype else 1e-6
        # A loss of rows near their codes is a mean of squares of differences, whose rounding eager shares.
        eager_like = e.to(a.dtype)
        assert_parity([a], [eager_like], [x], tiny=tiny * size * (2 if case is CODE_CASE else 1))
