"""What else records or rewrites a product: make_fx, functionalize, torch.fx."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import tensorlayers as tl
from tensorlayers import TT, LowRank
from tensorlayers.formats import available
from tensorlayers.testing import assert_close

KINDS = sorted(available())


def layer_of(kind):
    return tl.FactorizedLinear(256, 192, format=available()[kind](4))


@pytest.mark.parametrize("kind", KINDS)
def test_a_recorded_graph_serves_other_batches(kind):
    layer, x = layer_of(kind), torch.randn(600, 256)

    def step(x):
        leaf = x.detach().requires_grad_()
        y = layer(leaf)
        return y, torch.autograd.grad(y, leaf, y.detach())[0]

    graph = make_fx(step)(x)
    for rows in (600, 7):
        for found, expected in zip(graph(x[:rows]), step(x[:rows]), strict=True):
            assert_close(found, expected, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad", [True, False])
def test_functionalize(kind, grad):
    layer, x = layer_of(kind), torch.randn(40, 256)
    with torch.set_grad_enabled(grad):
        assert_close(torch.func.functionalize(lambda x: layer(x))(x), layer(x), torch.float32)


CALLS = {
    "linear": (tl.FactorizedLinear(64, 48, format=TT(3)), (torch.randn(2, 3, 64),)),
    "small": (tl.FactorizedLinear(12, 10, format=TT(2)), (torch.randn(3, 12),)),
    "conv": (tl.FactorizedConv2d(6, 8, 3, format=TT(3)), (torch.randn(2, 6, 9, 9),)),
    "conv_transpose": (tl.FactorizedConvTranspose1d(6, 8, 3, format=TT(3)), (torch.randn(2, 6, 9),)),
    "embedding": (tl.FactorizedEmbedding(20, 16, format=TT(3)), (torch.tensor([[1, 2], [3, 19]]),)),
    "embedding_bag": (tl.FactorizedEmbeddingBag(20, 16, format=TT(3)), (torch.tensor([[1, 2], [3, 19]]),)),
    "regression": (tl.TensorRegression((4, 6), (3, 2), format=TT(3)), (torch.randn(5, 4, 6),)),
}


@pytest.mark.parametrize("kind", CALLS)
def test_a_layer_is_one_call_of_a_symbolic_trace(kind):
    layer, arguments = CALLS[kind]
    graph = torch.fx.symbolic_trace(nn.Sequential(layer, nn.ReLU()))
    assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    for count in (1, 2):
        cut = [argument[:count] for argument in arguments]
        assert_close(graph(*cut), layer(*cut).relu(), torch.float32)


def test_a_converted_model_is_traced():
    model = nn.Sequential(nn.Linear(64, 300), nn.GELU(), nn.Linear(300, 10))
    converted = tl.convert_model(model, LowRank(0.25), force=True)
    x = torch.randn(4, 64)
    assert_close(torch.fx.symbolic_trace(converted)(x), converted(x), torch.float32)
