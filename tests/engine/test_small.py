"""Products so small that they run as a plain chain of torch's operations."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import tensorlayers as tl
from tensorlayers import dispatch, small
from tensorlayers.formats import available
from tensorlayers.testing import assert_close, check_layer
from tests.engine.support import NETWORKS, operands, truth

every_format = pytest.mark.parametrize("cls", available().values(), ids=available())
EDGE = small.SMALL // (2 * 16 * 10)


def build(cls, **options):
    return tl.FactorizedLinear(16, 10, format=cls(2), **options)


def is_chain(y):
    """Whether no function of our own is on the way back."""
    nodes, names = [y.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None:
            names.add(type(node).__name__)
            nodes += [following for following, _ in node.next_functions]
    return not any("Product" in name for name in names)


@every_format
class TestLayers:
    @pytest.mark.parametrize("shape", [(1, 16), (4, 16), (EDGE, 16), (16,), (2, 3, 16)], ids=str)
    def test_run_a_chain_up_to_the_edge(self, cls, shape):
        layer = build(cls, dtype=torch.float64)
        x = torch.randn(shape, dtype=torch.float64)
        check_layer(layer, x)
        assert is_chain(layer(x))

    def test_beyond_the_edge_they_keep_the_input_alone(self, cls):
        layer = build(cls, dtype=torch.float64)
        x = torch.randn(EDGE + 1, 16, dtype=torch.float64)
        check_layer(layer, x)
        assert not is_chain(layer(x))

    def test_no_rows(self, cls):
        layer = build(cls)
        x = torch.randn(0, 16, requires_grad=True)
        y = layer(x)
        assert y.shape == (0, 10)
        y.sum().backward()
        assert all(not parameter.grad.any() for parameter in (x, *layer.parameters()))

    def test_padded_features_too(self, cls):
        layer = tl.FactorizedLinear(17, 11, dtype=torch.float64, format=cls(2))
        check_layer(layer, torch.randn(4, 17, dtype=torch.float64))
        assert is_chain(layer(torch.randn(4, 17, dtype=torch.float64)))

    def test_transforms(self, cls):
        layer = build(cls, dtype=torch.float64)
        x = torch.randn(4, 16, dtype=torch.float64)
        weight = layer.to_dense().detach()
        assert_close(torch.func.vmap(layer)(x), layer(x), torch.float64)
        assert_close(torch.func.vmap(torch.func.jacrev(layer))(x), weight.expand(4, -1, -1), torch.float64)
        assert_close(torch.func.jacfwd(layer)(x[0]), weight, torch.float64)
        assert torch.autograd.gradgradcheck(layer, x.requires_grad_())


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_every_network(network):
    x, cores, bias = operands(network, 3)
    run = small.small(network).run
    y, expected = truth(network, x, cores, torch.ones(3, network.features("out"), dtype=torch.float64))
    leaves = [tensor.requires_grad_() for tensor in (x, *cores)]
    ours = run(x, cores, bias)
    assert_close(ours, y + bias, torch.float64)
    for gradient, theirs in zip(torch.autograd.grad(ours.sum(), leaves), expected, strict=True):
        assert_close(gradient, theirs, torch.float64)
    assert_close(run(x[:1], cores, None), y[:1], torch.float64)


class TestWhatIsSpecial:
    """What must not be passed over where a layer takes the short way to its chain."""

    x = torch.linspace(-1, 1, 64).reshape(4, 16)

    def test_a_demanded_implementation(self):
        layer = build(tl.TT, implementation="rebuild")
        assert not is_chain(layer(self.x))
        layer.implementation = None
        assert is_chain(layer(self.x))

    def test_a_frozen_layer(self):
        layer, other = build(tl.TT), build(tl.TT)
        expected = layer(self.x).detach()
        layer.freeze()
        with torch.no_grad():
            layer.bias.add_(1)
        assert_close(layer(self.x), expected + 1, torch.float32)
        assert is_chain(other(self.x))
        layer.unfreeze()

    def test_dropped_ranks(self):
        layer = build(tl.LowRank)
        layer.rank_dropout = 1.0 - 1e-9
        torch.manual_seed(1)
        assert not torch.equal(layer(self.x), layer.eval()(self.x))

    def test_a_parametrized_core(self):
        class Doubled(nn.Module):
            def forward(self, value):
                return 2 * value

        layer = build(tl.LowRank, bias=False)
        expected = 2 * layer(self.x).detach()
        parametrize.register_parametrization(layer.cores, "0", Doubled())
        assert_close(layer(self.x), expected, torch.float32)

    def test_a_parametrized_bias(self):
        class Doubled(nn.Module):
            def forward(self, value):
                return 2 * value

        layer = build(tl.LowRank)
        expected = layer(self.x).detach() + layer.bias.detach()
        parametrize.register_parametrization(layer, "bias", Doubled())
        assert_close(layer(self.x), expected, torch.float32)

    def test_autocast(self):
        with torch.autocast("cpu", torch.bfloat16):
            assert build(tl.TT)(self.x).dtype == torch.bfloat16

    def test_a_bias_of_another_dtype(self):
        layer = build(tl.TT)
        expected = layer(self.x)
        layer.bias.data = layer.bias.data.double()
        y = layer(self.x)
        assert y.dtype == torch.float32
        assert_close(y, expected, torch.float32)

    def test_a_mode_of_kernels(self):
        layer = build(tl.CP)
        with tl.use_kernels("triton"), pytest.raises(tl.KernelError):
            layer(self.x)

    def test_cores_lent_for_one_call(self):
        layer = build(tl.TT)
        others = {name: 2 * value.detach() for name, value in layer.named_parameters()}
        expected = copy.deepcopy(layer)
        expected.load_state_dict(others)
        assert_close(torch.func.functional_call(layer, others, (self.x,)), expected(self.x), torch.float32)

    def test_truncated_cores(self):
        layer = tl.FactorizedLinear(16, 10, format=tl.LowRank(6)).truncate(2)
        assert_close(layer(self.x), nn.functional.linear(self.x, layer.to_dense(), layer.bias), torch.float32)


def test_it_is_found_once_and_shared_by_copies():
    network = tl.TT(2).network(10, 16)
    found = small.small(network)
    assert found is small.small(tl.TT(2).network(10, 16))
    assert copy.deepcopy(found) is pickle.loads(pickle.dumps(found)) is found
    assert found.run is found.run
    assert found.rows == EDGE
    assert [small.is_small(network, rows) for rows in (0, 1, EDGE, EDGE + 1)] == [False, True, True, False]


def test_large_networks_have_none():
    network = tl.TT(2).network(768, 768)
    assert small.small(network).rows == 0
    assert not small.is_small(network, 1)
    assert dispatch.SMALL == small.SMALL
