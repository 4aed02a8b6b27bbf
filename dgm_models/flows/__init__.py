"""Normalizing flows: exact densities from invertible maps. Importing this registers the families."""

from .autoregressive import MAF
from .base import Chain, Flow
from .checker import Finding, check_invertible
from .coupling import NICE, RealNVP
from .invertible_mlp import InvertibleMLP
from .spline import Spline

__all__ = ["MAF", "NICE", "Chain", "Finding", "Flow", "InvertibleMLP", "RealNVP", "Spline", "check_invertible"]
