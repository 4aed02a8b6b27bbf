"""Neural spline flows, autoregressive and of coupling layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from ..model import check_flag, check_positive, check_positive_number
from ..registry import register_model
from .base import Flow, elements
from .coupling import alternating
from .layers import SplineAutoregressive, SplineCoupling


@register_model("spline")
class Spline(Flow):
    """Layers of monotone rational-quadratic splines whose knots a network computes from other pixels.

    Args:
        image_shape: of one sample; with ``kind="coupling"`` an even number of elements.
        kind: ``"autoregressive"``: a pixel's spline depends on all pixels before it; a sample goes pixel by pixel, in
            ``dgm_kernels.made_inverse``. ``"coupling"``: the splines of one half depend on the other half.
        depth: number of layers; None for one that suits the kind.
        bins: of each spline.
        bound: outside ``[-bound, bound]`` a spline is the identity.
        hidden: sizes of the hidden layers of the networks.
        activation: of the networks: ``"relu"``, ``"tanh"``, ``"elu"`` or ``"silu"``.
        dropout: of the networks' hidden units.
        base, levels, margin, level_noise: see :class:`.Flow`.
        reversible: see :class:`.Flow`; with ``kind="coupling"`` only, for the inverse of the other goes pixel by pixel.

    Source: Durkan et al., "Neural Spline Flows", 2019.
    """

    default_settings: ClassVar = {"steps": 6000, "batch_size": 100, "weight_decay": 1.0}

    def __init__(
        self,
        image_shape: Sequence[int] = (1, 8, 8),
        kind: str = "coupling",
        depth: int | None = None,
        bins: int = 8,
        bound: float = 3.0,
        hidden: Sequence[int] = (256,),
        activation: str = "relu",
        dropout: float = 0.2,
        base: str = "normal",
        levels: int | None = 17,
        margin: float = 1e-3,
        level_noise: float = 0.6,
        reversible: bool = False,
    ) -> None:
        if kind not in ("autoregressive", "coupling"):
            raise ValueError(f"kind must be 'autoregressive' or 'coupling', got {kind!r}")
        if check_flag("reversible", reversible) and kind == "autoregressive":
            raise ValueError("reversible must be False with kind 'autoregressive', whose inverse goes pixel by pixel")
        if check_positive("bins", bins) < 2:
            raise ValueError(f"bins must be at least 2, got {bins}")
        features, bound = elements(image_shape), check_positive_number("bound", bound)
        network = {"hidden": hidden, "activation": activation, "dropout": dropout}

        def autoregressive(place: int) -> nn.Module:
            return SplineAutoregressive(features, place % 2 == 1, bins, bound, **network)

        def coupling(flipped: bool) -> nn.Module:
            return SplineCoupling(features, flipped, bins, bound, **network)

        if kind == "autoregressive":
            depth = 2 if depth is None else check_positive("depth", depth)
            layers = list(map(autoregressive, range(depth)))
        else:
            layers = alternating(features, 6 if depth is None else depth, coupling)
        super().__init__(
            image_shape,
            layers,
            base=base,
            levels=levels,
            margin=margin,
            level_noise=level_noise,
            reversible=reversible,
        )
