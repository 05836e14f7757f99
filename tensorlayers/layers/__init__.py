"""Factorized layers, drop-in for torch's."""

from .attention import PROJECTIONS, ProjectedAttention
from .base import FactorizedLayer, layer_type, layer_types
from .conv import (
    FactorizedConv1d,
    FactorizedConv2d,
    FactorizedConv3d,
    FactorizedConvTranspose1d,
    FactorizedConvTranspose2d,
    FactorizedConvTranspose3d,
)
from .embedding import FactorizedEmbedding, FactorizedEmbeddingBag
from .kind import Settings
from .linear import FactorizedLinear
from .regression import TensorContraction, TensorLinear, TensorRegression

__all__ = [
    "PROJECTIONS",
    "FactorizedConv1d",
    "FactorizedConv2d",
    "FactorizedConv3d",
    "FactorizedConvTranspose1d",
    "FactorizedConvTranspose2d",
    "FactorizedConvTranspose3d",
    "FactorizedEmbedding",
    "FactorizedEmbeddingBag",
    "FactorizedLayer",
    "FactorizedLinear",
    "ProjectedAttention",
    "Settings",
    "TensorContraction",
    "TensorLinear",
    "TensorRegression",
    "layer_type",
    "layer_types",
]
