"""Modules around the ops: chains of invertible layers that train in constant memory, and layers with a state."""

from .actnorm import ActNorm
from .masked import CausalConv1d, HorizontalConv2d, MaskedConv2d, MaskedLinear, VerticalConv2d
from .reversible import Coupling, Reversible

__all__ = [
    "ActNorm",
    "CausalConv1d",
    "Coupling",
    "HorizontalConv2d",
    "MaskedConv2d",
    "MaskedLinear",
    "Reversible",
    "VerticalConv2d",
]
