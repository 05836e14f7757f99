""".weight: dense and differentiable; metadata builds nothing; writes raise."""

import copy
import pickle

import pytest
import torch
from torch import nn

from tensorlayers import TT, FactorizedLinear, ReadOnlyWeightError


@pytest.fixture
def layer():
    return FactorizedLinear(12, 10, format=TT(3))


@pytest.fixture
def builds(monkeypatch):
    """How often a dense weight has been built."""
    count = [0]
    original = FactorizedLinear.to_dense

    def counting(self):
        count[0] += 1
        return original(self)

    monkeypatch.setattr(FactorizedLinear, "to_dense", counting)
    return count


def test_metadata_builds_nothing(layer, builds):
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    assert weight.dtype == torch.float32
    assert weight.device == torch.device("cpu")
    assert weight.shape == weight.size() == (10, 12)
    assert (weight.size(0), weight.dim(), weight.ndim, weight.numel(), len(weight)) == (10, 2, 2, 120, 10)
    assert weight.is_floating_point()
    assert not weight.is_cuda
    assert not weight.is_meta
    assert weight.layout == torch.strided
    assert weight.requires_grad
    assert not weight.is_leaf
    assert weight.grad is None
    assert weight.data.dtype == weight.detach().dtype == torch.float32
    assert not weight.detach().requires_grad
    assert "10, 12" in repr(weight)
    assert hash(weight) is not None
    assert weight.element_size() == 4
    assert weight.type() == "torch.FloatTensor"
    assert torch.numel(weight) == 120
    assert torch.is_floating_point(weight)
    assert not torch.is_complex(weight)
    assert weight.is_signed()
    assert builds == [0]


def test_values_build_once_an_operation(layer, builds):
    weight = layer.weight
    (weight + weight).sum()
    assert builds == [1]
    assert weight.type(torch.float64).dtype == torch.float64
    assert builds == [2]


WRITES = {
    "normal_": lambda w: nn.init.normal_(w),
    "xavier": lambda w: nn.init.xavier_uniform_(w),
    "constant": lambda w: nn.init.constant_(w, 0.0),
    "trunc_normal": lambda w: nn.init.trunc_normal_(w),
    "orthogonal": lambda w: nn.init.orthogonal_(w),
    "zero_": lambda w: w.zero_(),
    "copy_": lambda w: w.copy_(torch.zeros(10, 12)),
    "mul_": lambda w: w.mul_(2),
    "iadd": lambda w: w.__iadd__(1),
    "setitem": lambda w: w.__setitem__(0, 1.0),
    "data": lambda w: w.data.normal_(),
    "detach": lambda w: w.detach().fill_(1),
    "set data": lambda w: setattr(w, "data", torch.zeros(10, 12)),
    "requires_grad_": lambda w: w.requires_grad_(False),
    "set requires_grad": lambda w: setattr(w, "requires_grad", False),
    "set_": lambda w: w.set_(torch.zeros(3)),
    "foreach": lambda w: torch._foreach_zero_([w]),
    "out=": lambda w: torch.add(torch.zeros(10, 12), 1, out=w),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writes_raise_and_name_the_ways_out(layer, write):
    before = layer.to_dense()
    with torch.no_grad(), pytest.raises(ReadOnlyWeightError, match=r"reset_parameters\(\).*from_dense\(\)"):
        write(layer.weight)
    assert torch.equal(layer.to_dense(), before)


def test_assignment_raises(layer):
    with pytest.raises(ReadOnlyWeightError, match="assignment"):
        layer.weight = nn.Parameter(torch.zeros(10, 12))


def test_it_computes_like_the_dense_weight(layer):
    dense, weight = layer.to_dense(), layer.weight
    x = torch.randn(5, 12)
    assert torch.equal(weight, dense)
    assert torch.equal(x @ weight.T, x @ dense.T)
    assert torch.equal(nn.functional.linear(x, weight), nn.functional.linear(x, dense))
    assert torch.equal(weight[2:4], dense[2:4])
    assert torch.equal(torch.cat([weight, weight]), torch.cat([dense, dense]))
    assert torch.equal(1 + weight, 1 + dense)
    assert weight.double().dtype == torch.float64
    assert weight.tolist() == dense.tolist()
    assert type(weight.clone()) is torch.Tensor


def test_gradients_reach_the_cores(layer):
    (layer.weight**2).sum().backward()
    gradients = [core.grad.clone() for core in layer.cores]
    layer.zero_grad()
    (layer.to_dense() ** 2).sum().backward()
    assert all(torch.equal(ours, core.grad) for ours, core in zip(gradients, layer.cores, strict=True))


def test_frozen_cores_give_a_weight_without_gradient(layer):
    layer.cores.requires_grad_(False)
    assert not layer.weight.requires_grad
    with torch.no_grad():
        assert not FactorizedLinear(12, 10).weight.requires_grad


def test_it_is_no_parameter_and_not_in_the_state(layer):
    assert not isinstance(layer.weight, nn.Parameter)
    assert "weight" not in dict(layer.named_parameters())
    assert "weight" not in layer.state_dict()


def test_copies_are_plain_tensors(layer):
    for other in (copy.deepcopy(layer.weight), pickle.loads(pickle.dumps(layer.weight))):
        assert type(other) is torch.Tensor
        assert torch.equal(other, layer.to_dense())


def test_it_follows_the_layer(layer):
    weight = layer.weight
    layer.reset_parameters()
    assert torch.equal(weight, layer.to_dense())
    assert layer.double().weight.dtype == torch.float64


def test_a_compiled_reader_of_the_dtype_builds_nothing(layer):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def read(x):
        return x.to(layer.weight.dtype) if isinstance(layer.weight, torch.Tensor) else x

    assert torch.compile(read, backend=backend, fullgraph=True)(torch.zeros(2)).dtype == torch.float32
