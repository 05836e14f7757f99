"""Small layers of every kind to freeze, and the check that one is thawed."""

import copy

import pytest
import torch

import tensorlayers as tl
from tensorlayers import CP, TT, LowRank, Tucker
from tensorlayers.formats import available
from tensorlayers.layers import frozen as freezing
from tensorlayers.layers import layer_types
from tensorlayers.testing import assert_close

LINEAR = {f"linear-{name}": cls(2) for name, cls in sorted(available().items())}

CONVOLUTIONS = {
    "conv1d": (tl.FactorizedConv1d, Tucker(3), (8,)),
    "conv2d": (tl.FactorizedConv2d, CP(3), (5, 6)),
    "conv3d": (tl.FactorizedConv3d, TT(3), (4, 5, 3)),
    "conv_transpose1d": (tl.FactorizedConvTranspose1d, TT(3), (8,)),
    "conv_transpose2d": (tl.FactorizedConvTranspose2d, LowRank(3), (5, 6)),
    "conv_transpose3d": (tl.FactorizedConvTranspose3d, CP(3), (4, 3, 4)),
}

KINDS = sorted(LINEAR) + [cls.kind for cls in layer_types() if cls.kind != "linear"]
OF_EACH_KIND = ["linear-tt", *KINDS[len(LINEAR) :]]
every_kind = pytest.mark.parametrize("kind", KINDS)
each_kind = pytest.mark.parametrize("kind", OF_EACH_KIND)


def build(kind):
    """A small layer, and the arguments of a forward."""
    if kind in LINEAR:
        return tl.FactorizedLinear(12, 10, format=LINEAR[kind]), (torch.randn(4, 12),)
    if kind in CONVOLUTIONS:
        cls, format, spatial = CONVOLUTIONS[kind]
        layer = cls(4, 6, 3, stride=2, padding=1, groups=2, format=format)
        return layer, (torch.randn(2, 4, *spatial),)
    if kind == "embedding":
        return tl.FactorizedEmbedding(20, 12, padding_idx=3, format=TT(3)), (torch.tensor([[0, 3, 19], [4, 4, 3]]),)
    if kind == "embedding_bag":
        weights = torch.randn(2, 3)
        layer = tl.FactorizedEmbeddingBag(20, 12, padding_idx=3, mode="sum", format=TT(3))
        return layer, (torch.tensor([[0, 3, 19], [4, 4, 3]]), None, weights)
    if kind == "regression":
        return tl.TensorRegression((4, 3, 5), (2, 6), format=Tucker(3)), (torch.randn(4, 4, 3, 5),)
    assert kind == "contraction"
    return tl.TensorContraction((4, 3, 5), (2, 6, 3), bias=True), (torch.randn(4, 4, 3, 5),)


def flags(layer):
    return [parameter.requires_grad for parameter in layer.parameters()]


def spoil(layer):
    """Make the cached weight recognizable: NaN in every output that it is used for."""
    freezing._frozen[layer].dense.weight.data.fill_(torch.nan)


def check_thawed(layer, args, expected_flags):
    """The layer computes with its cores as they are now, and trains."""
    assert not layer.frozen
    assert layer.cached_bytes == 0
    assert flags(layer) == expected_flags
    assert_close(layer(*args), copy.deepcopy(layer).to_module()(*args), layer.cores[0].dtype)
