"""Modules around the ops: masked and invertible layers, attention, chains that train in constant memory."""

from .actnorm import ActNorm
from .attention import MultiheadAttention, TransformerBlock
from .masked import CausalConv1d, HorizontalConv2d, MaskedConv2d, MaskedLinear, VerticalConv2d
from .reversible import Coupling, Reversible

__all__ = [
    "ActNorm",
    "CausalConv1d",
    "Coupling",
    "HorizontalConv2d",
    "MaskedConv2d",
    "MaskedLinear",
    "MultiheadAttention",
    "Reversible",
    "TransformerBlock",
    "VerticalConv2d",
]
