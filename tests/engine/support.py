"""The networks that the tests of the engine run over, and the truth that a product of rows is held against."""

import math

import torch

from tensorlayers import FactorizedLinear, functional
from tensorlayers.formats import available
from tensorlayers.network import Mode, Network

MODES = {
    "order 2": ((4, 6), (5, 3), 3),
    "order 3": ((2, 3, 2), (3, 2, 2), 2),
    "uneven": ((2, 3, 2), (4, 5), 3),
    "ones": ((1, 6), (5, 1), 2),
    "rank 1": ((4, 3), (3, 4), 1),
}
"""Out modes, in modes and rank."""


def network_of(cls, out_modes, in_modes, rank):
    return cls(rank, out_modes=out_modes, in_modes=in_modes).network(math.prod(out_modes), math.prod(in_modes))


NETWORKS = {
    f"{name} {what}": network_of(cls, *modes)
    for name, cls in sorted(available().items())
    for what, modes in MODES.items()
}
NETWORKS["one core"] = Network(
    (("o1", "i1", "i2"),), {}, (Mode("o1", 4, "out"), Mode("i1", 3, "in"), Mode("i2", 2, "in"))
)
NETWORKS["hyperindex"] = Network(
    (("o1", "i1", "r"), ("i1", "o2", "r"), ("o2", "i2", "i1", "r")),
    {"r": 3},
    (Mode("o1", 4, "out"), Mode("o2", 2, "out"), Mode("i1", 3, "in"), Mode("i2", 5, "in")),
)


def large(rank=40):
    """One network of every format that is no small product and takes several chunks: 192 x 256."""
    return {name: cls(rank if name in ("cp", "lowrank") else 4).network(192, 256) for name, cls in available().items()}


def operands(network, rows, dtype=torch.float64):
    """Rows, cores and a bias."""
    shapes = [(rows, network.features("in")), *network.core_shapes, (network.features("out"),)]
    x, *cores, bias = (torch.randn(shape, dtype=dtype) for shape in shapes)
    return x, cores, bias


def truth(network, x, cores, dy):
    """The product by the reference, and the gradients of x and the cores by autograd."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, *cores)]
    y = functional.contract_rows(leaves[0], network, leaves[1:])
    return y.detach(), torch.autograd.grad(y, leaves, dy)


def layer_of(cls, dtype=None, **options):
    """A linear layer that is no small product at 20 rows."""
    return FactorizedLinear(64, 48, dtype=dtype, format=cls(3), **options)
