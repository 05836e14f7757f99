"""Factorized layers, drop-in for torch's."""

from .attention import PROJECTIONS, ProjectedAttention
from .base import FactorizedLayer
from .conv import (
    FactorizedConv1d,
    FactorizedConv2d,
    FactorizedConv3d,
    FactorizedConvTranspose1d,
    FactorizedConvTranspose2d,
    FactorizedConvTranspose3d,
)
from .embedding import FactorizedEmbedding, FactorizedEmbeddingBag
from .frozen import freeze, unfreeze
from .kind import Settings
from .linear import FactorizedLinear
from .mlp import FactorizedMLP
from .registry import layer_type, layer_types
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
    "FactorizedMLP",
    "ProjectedAttention",
    "Settings",
    "TensorContraction",
    "TensorLinear",
    "TensorRegression",
    "freeze",
    "layer_type",
    "layer_types",
    "unfreeze",
]
