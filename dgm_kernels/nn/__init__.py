"""Modules around the ops: chains of invertible layers that train in constant memory, and layers with a state."""

from .actnorm import ActNorm
from .reversible import Coupling, Reversible

__all__ = ["ActNorm", "Coupling", "Reversible"]
