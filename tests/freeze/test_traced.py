"""Where the cached weight is not used: where a graph is made, and in functional calls."""

import gc

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx

import tensorlayers as tl
from tensorlayers import TT
from tensorlayers.testing import assert_close
from tests.freeze.support import build, each_kind, spoil

TRACED = ["linear-tt", "conv2d", "conv_transpose1d", "embedding", "embedding_bag", "regression"]


def compiled(layer, args):
    torch._dynamo.reset()
    return torch.compile(layer, backend="eager", fullgraph=True)(*args)


def exported(layer, args):
    return torch.export.export(layer, args).module()(*args)


def mapped(layer, args):
    return torch.vmap(lambda _: layer(*args))(torch.zeros(1))[0]


def differentiated(layer, args):
    def function(scale):
        y = layer(*args)
        return (y * scale).sum(), y

    return torch.func.grad(function, has_aux=True)(torch.ones(()))[1]


def traced(layer, args):
    return make_fx(layer)(*args)(*args)


WAYS = [compiled, exported, mapped, differentiated, traced]


@pytest.mark.parametrize("kind", TRACED)
@pytest.mark.parametrize("way", WAYS, ids=[way.__name__ for way in WAYS])
def test_the_cores_are_computed_with_when(way, kind):
    layer, args = build(kind)
    layer.eval()
    expected = layer(*args)
    spoil(layer.freeze())
    assert layer(*args).isnan().any()
    assert_close(way(layer, args), expected, torch.float32)
    assert layer.frozen


@pytest.mark.parametrize("size", [12, 300])  # a small product, and one that is an operator
def test_a_graph_does_not_depend_on_the_frozen_layers_that_are_alive(size):
    torch._dynamo.reset()
    counter = CompileCounter()
    layer = tl.FactorizedLinear(size, size, format=TT(2))
    graph = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(3, size)
    for _ in range(3):
        others = [build("linear-tt")[0].freeze() for _ in range(2)]
        assert_close(graph(x), layer(x), torch.float32)
        del others
        gc.collect()
        assert_close(graph(x), layer(x), torch.float32)
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_has_the_cores():
    layer, args = build("linear-tt")
    expected = layer(*args)
    spoil(layer.freeze())
    assert_close(torch.jit.trace(layer, args)(*args), expected, torch.float32)


@each_kind
def test_functional_calls_with_other_cores(kind):
    layer, args = build(kind)
    other = build(kind)[0]
    expected = other(*args)
    state = {name: value.detach().requires_grad_() for name, value in other.named_parameters()}
    spoil(layer.freeze())
    y = torch.func.functional_call(layer, state, args)
    assert_close(y, expected, torch.float32)
    gradients = torch.autograd.grad(y.sum(), list(state.values()))
    truth = torch.autograd.grad(expected.sum(), list(other.parameters()))
    for mine, theirs in zip(gradients, truth, strict=True):
        assert_close(mine, theirs, torch.float32)
    assert layer.frozen
    assert layer(*args).isnan().any()
