"""Layers of every format, and what must hold of a layer whose ranks changed."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from tensorlayers import FactorizedLinear
from tensorlayers.formats import available
from tensorlayers.testing import check_linear


def formats(rank=5):
    for name, cls in sorted(available().items()):
        if "order" in {field.name for field in dataclasses.fields(cls)}:
            for order in (2, 3):
                yield pytest.param(cls(rank, order), id=f"{name}-{order}")
        else:
            yield pytest.param(cls(rank), id=name)


FORMATS = list(formats())
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-3),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-3),
}


def layer_of(format, dtype=torch.float64, bias=True):
    return FactorizedLinear(11, 13, bias, dtype=dtype, format=format)


def stacked(format, count=3, dtype=torch.float64):
    dense = [nn.Linear(10, 12, dtype=dtype) for _ in range(count)]
    return nn.ModuleList(FactorizedLinear.from_dense_jointly(dense, format))


def is_tree(network):
    """Whether each bond alone joins two halves of the network."""
    pairs = all(sum(bond in names for names in network.cores) == 2 for bond in network.bonds)
    return pairs and len(network.bonds) == len(network.cores) - 1


def halved(network):
    return tuple(max(1, rank // 2) for rank in network.ranks)


def step(layer, optimizer, rows=4):
    x = torch.randn(rows, layer.in_features, dtype=layer.cores[0].dtype)
    optimizer.zero_grad()
    loss = layer(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss  # which keeps the graph alive


def check_whole(layer):
    """Shapes, config, reload and gradients all speak of the same network."""
    assert tuple(tuple(core.shape) for core in layer.cores) == layer.network.core_shapes
    assert layer.format.rank == layer.network.ranks
    assert f"ranks={layer.network.ranks}" in repr(layer)
    again = type(layer).from_config(json.loads(json.dumps(layer.config()))).to_empty(device="cpu")
    assert again.network == layer.network
    again.to(layer.cores[0].dtype).load_state_dict(layer.state_dict())
    assert torch.equal(again.to_dense(), layer.to_dense())
    check_linear(layer)
