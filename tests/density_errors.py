"""The parity rule over several draws: how far off a result is, in comparison with eager's two forms."""

import math
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.contract import max_error
from tests.density_cases import Sizes

Results = Sequence[Tensor]
Draw = tuple[Results, Sequence[Results], Results]  # ours, eager's forms, and in float64


def assert_parity_of_draws(
    draw: Callable[[], Draw], sizes: Sizes, names: Sequence[str], slack: float = 1.0, sums: Sequence[str] = ()
) -> None:
    """At most twice as far off as the worse of eager's forms, in the median of several draws.

    Errors are those of the largest element, relative to the largest value above 1. Some draws are ill-conditioned, and
    their errors, which are the largest, luck: those may be four times eager's. What both may be off by are roundings of
    a sum of D terms, and of a log-probability, whose size is D and whose rounding every responsibility has. ``sums``
    are gradients of one number for all: sums over all pairs, whose terms cancel.
    """
    errors, bounds = [], []
    pairs = math.prod(sizes)
    for _ in range(9 if pairs < 20_000 else 3 if pairs < 300_000 else 1):
        actual, forms, exact = draw()
        assert [a.dtype for a in actual] == [e.dtype for e in forms[0]]
        assert all(x.dtype == torch.float64 for x in exact)
        scales = [max(1.0, float(x.abs().max())) if x.numel() else 1.0 for x in exact]
        errors.append([max_error(a, x) / s for a, x, s in zip(actual, exact, scales, strict=True)])
        of_forms = [[max_error(e, x) / s for e, x, s in zip(form, exact, scales, strict=True)] for form in forms]
        bounds.append([max(of_one) for of_one in zip(*of_forms, strict=True)])
    rounding = slack * (1e-6 * max(1.0, math.sqrt(sizes.features) / 4) + sizes.features * 2**-24)
    for name, error, bound in zip(names, zip(*errors, strict=True), zip(*bounds, strict=True), strict=True):
        tiny = (8 if name in sums else 1) * rounding
        for statistic, factor in ((statistics.median, 2), (max, 4)):
            ours, eager = statistic(error), statistic(bound)
            message = f"{name} of {sizes}: off by {ours:.3e}, eager by {eager:.3e}, tiny {tiny:.1e}"
            assert ours <= factor * eager + tiny, message
