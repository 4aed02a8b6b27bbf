"""Modules around the ops: masked and invertible layers, attention, chains that train in constant memory."""

from .actnorm import ActNorm
from .attention import MultiheadAttention, TransformerBlock
from .masked import CausalConv1d, HorizontalConv2d, MaskedConv2d, MaskedLinear, VerticalConv2d
from .norm import GroupNormSiLU, LayerNorm, ModulatedLayerNorm, RMSNorm
from .reversible import Coupling, Reversible

__all__ = [
    "ActNorm",
    "CausalConv1d",
    "Coupling",
    "GroupNormSiLU",
    "HorizontalConv2d",
    "LayerNorm",
    "MaskedConv2d",
    "MaskedLinear",
    "ModulatedLayerNorm",
    "MultiheadAttention",
    "RMSNorm",
    "Reversible",
    "TransformerBlock",
    "VerticalConv2d",
]
