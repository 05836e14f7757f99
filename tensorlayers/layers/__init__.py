"""Factorized layers, drop-in for torch's."""

from .base import FactorizedLayer, Settings, layer_type, layer_types
from .linear import FactorizedLinear

__all__ = ["FactorizedLayer", "FactorizedLinear", "Settings", "layer_type", "layer_types"]
