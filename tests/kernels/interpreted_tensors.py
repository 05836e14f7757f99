"""What tensors of torch can be beside plain memory, given to kernels in the interpreter: negated, zero, fake, changed.

Run by test_interpreted.py in a process of its own, as interpreted_chain.py is.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

import tensorlayers as tl
from tensorlayers import autograd, products
from tensorlayers.network import Network, linear_modes
from tests.kernels.interpreted_layers import FORMATS, WAYS, layer_of
from tests.kernels.support import SINGLE, agree

ALL = [(name, way) for name, format in FORMATS.items() for way in WAYS[type(format).__name__]]


def negated(*shape: int) -> Tensor:
    """A tensor of which torch has the values with the other sign in memory."""
    found = torch.randn(*shape, dtype=torch.complex64).conj().imag
    assert found.is_neg()
    return found


def forced(name: str, way: str) -> tl.FactorizedLinear:
    layer = layer_of(FORMATS[name])
    layer.implementation = way
    return layer


@pytest.mark.parametrize(("name", "way"), ALL)
def test_a_result_may_be_changed_in_place(name: str, way: str) -> None:
    layer, x = forced(name, way), torch.randn(2, 3, 20)
    leaves = list(layer.parameters())
    found = torch.autograd.grad(F.relu(layer(x), inplace=True).square().sum(), leaves)
    dense = F.linear(x, layer.to_dense(), layer.bias).relu()
    assert agree(found, [g.double() for g in torch.autograd.grad(dense.square().sum(), leaves)])


@pytest.mark.parametrize(("name", "way"), ALL)
def test_values_that_are_negated_later(name: str, way: str) -> None:
    layer, x, dy = forced(name, way), negated(3, 20), negated(3, 18)
    leaves = list(layer.cores)
    y, plain = layer(x), F.linear(x, layer.to_dense(), layer.bias)
    found, exact = (torch.autograd.grad(t, leaves, dy) for t in (y, plain))
    assert agree([y, *found], [t.double() for t in (plain, *exact)])


def test_a_zero_gradient_without_memory() -> None:
    layer, dy = layer_of(FORMATS["TT"]), torch._efficientzerotensor(3, 18)
    with tl.use_kernels("triton"):
        found = torch.autograd.grad(layer(torch.randn(3, 20)), list(layer.cores), dy)
    assert not any(gradient.any() for gradient in found)


def test_lookups_of_gradients_that_are_negated_later() -> None:
    table, ids, dy = tl.FactorizedEmbedding(30, 12, format=tl.TT(3)), torch.tensor([3, 29, 3]), negated(3, 12)
    with tl.use_kernels("triton"):
        found = torch.autograd.grad(table(ids), list(table.cores), dy)
    exact = torch.autograd.grad(table.to_dense()[ids], list(table.cores), dy)
    assert agree(found, [gradient.double() for gradient in exact])


@pytest.mark.parametrize(("name", "way"), ALL)
def test_shapes_alone(name: str, way: str) -> None:
    with FakeTensorMode():
        layer = forced(name, way)
        x = torch.randn(2, 3, 20, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.shape == (2, 3, 18)
        assert x.grad is not None
        assert x.grad.shape == x.shape


def test_operators_whose_cores_are_transposed() -> None:
    cores = ("i2", "r"), ("r", "o1"), ("o2", "r"), ("r", "i1")
    network = Network(cores, {"r": 3}, linear_modes((2, 3), (4, 2)))
    x, dy = torch.randn(4, 8), torch.randn(4, 6)
    values = [torch.randn(shape) for shape in network.core_shapes]
    for way in ("fused", "fused_khatri_rao"):
        spec = products.row_product(network, way, kernels=True)
        torch.library.opcheck(autograd._product, (x, values, None, spec))
        torch.library.opcheck(autograd._gradients, (dy, x, values, spec, [True] * 5))


def test_a_backward_runs_as_its_forward_did() -> None:
    torch.manual_seed(0)
    mlp, x = tl.FactorizedMLP(20, 24, format=tl.TT(2)), torch.randn(3, 20, requires_grad=True)
    leaves = [x, *mlp.parameters()]
    exact = [t.double() for t in torch.autograd.grad(mlp._plain(x).square().sum(), leaves)]
    for ahead, back in (("triton", "auto"), ("auto", "triton"), ("triton", "torch")):
        with tl.use_kernels(ahead):
            y = mlp(x)
        with tl.use_kernels(back):
            assert agree(torch.autograd.grad(y.square().sum(), leaves), exact, SINGLE)
