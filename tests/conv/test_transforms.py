"""Convolutions under torch.func and torch.compile, and inputs that torch refuses."""

import dataclasses

import pytest
import torch
from torch.func import vmap

import tensorlayers as tl
from tensorlayers import BTT, TT
from tensorlayers.testing import assert_close
from tests.conv.support import FORMATS, every_kind, example, image


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@every_kind
@pytest.mark.parametrize("format", FORMATS)
def test_vmap_over_any_dimension(kind, format):
    layer = example(kind, format, (6, 7))
    dense = layer.to_module()
    x = torch.stack([image(layer, 2, 5) for _ in range(3)])
    expected = vmap(dense)(x)
    for dim in range(x.dim()):
        assert_close(vmap(layer, in_dims=dim)(x.movedim(0, dim).contiguous()), expected, torch.float32)
        assert_close(vmap(layer, in_dims=dim)(x.movedim(0, dim)), expected, torch.float32)


@pytest.mark.parametrize("format", FORMATS)
def test_vmap_over_inputs_that_are_not_contiguous(format):
    layer = example(tl.FactorizedConv2d, format, (6, 7))
    dense = layer.to_module()
    x = torch.randn(3, 2, 6, 5, 5)
    last = x.movedim(2, -1).contiguous().movedim(-1, 2)
    for given in (x.transpose(3, 4), last, last[..., 1:]):
        assert_close(vmap(layer)(given), vmap(dense)(given), torch.float32)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("channels", [(16, 8), (13, 11)], ids=["even", "odd"])
def test_no_compiled_convolution_takes_a_view(format, channels, fresh):
    """Inductor lays out none whose sizes the graph leaves open, and makes views of matrix products."""
    layer = example(tl.FactorizedConv2d, format, channels, padding=1)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    run = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for size in (12, 14):
        x = torch.randn(2, channels[0], size, size, requires_grad=True)
        found, expected = (torch.autograd.grad(f(x).square().sum(), [x, *layer.parameters()]) for f in (run, layer))
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(ours, theirs, torch.float32)
    assert len(graphs) == 1
    nodes = [node for node in graphs[0].graph.nodes if "conv" in str(node.target)]
    assert nodes
    assert all(node.args[0].meta["example_value"]._base is None for node in nodes)
    assert not any(name in graphs[0].code for name in ("bmm", "baddbmm"))


@pytest.mark.parametrize(
    "layer",
    [
        tl.FactorizedConv2d(13, 8, 3, format=TT(4), padding=1),
        tl.FactorizedConv2d(32, 32, 3, format=BTT(1), padding=1, groups=2),
    ],
    ids=["steps", "reordered"],
)
def test_by_inductor_at_a_second_size(layer, fresh):
    run = torch.compile(layer)
    for size in (12, 14):
        x = torch.randn(2, layer.in_channels, size, size, requires_grad=True)
        found, expected = (torch.autograd.grad(f(x).square().sum(), [x, *layer.parameters()]) for f in (run, layer))
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(ours, theirs, torch.float32)


@pytest.mark.parametrize("format", [tl.CP(1), tl.TT(1), tl.Tucker(2), tl.BTT(2)], ids=["cp", "tt", "tucker", "btt"])
@pytest.mark.parametrize("groups", [1, 2])
def test_compiled_where_channels_are_reordered(format, groups, fresh):
    splits = {"in_modes": (8, 8), "out_modes": (8, 8)}
    layer = tl.FactorizedConv2d(
        64 * groups, 64 * groups, 3, padding=1, groups=groups, format=dataclasses.replace(format, **splits)
    )
    run = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in (6, 7):
        x = torch.randn(2, 64 * groups, size, size, requires_grad=True)
        found, expected = (torch.autograd.grad(f(x).square().sum(), [x, *layer.parameters()]) for f in (run, layer))
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(ours, theirs, torch.float32)


@every_kind
@pytest.mark.parametrize("format", FORMATS)
def test_an_empty_result_is_refused_as_by_torch(kind, format):
    layer = example(kind, format, padding=2 if kind.transposed else 0)
    x = image(layer, 1, 2)  # transposed: (2 - 1) - 2 * 2 + 3 = 0
    with pytest.raises(RuntimeError, match=r"size|at least 1"):
        layer(x)
    pointwise = example(kind, format, kernel=1)
    with pytest.raises(RuntimeError, match="at least 1"):
        pointwise(image(layer, 2, 0))
    assert pointwise(image(layer, 0, 0)).shape == (0, 8, *(0,) * kind.dimensions)


def test_compiled_under_vmap(fresh):
    layer = example(tl.FactorizedConv2d, BTT(2), (64, 64), padding=1)  # of steps whose channels are made innermost
    x = torch.randn(2, 3, 64, 5, 5)
    run = torch.compile(lambda x: vmap(layer, in_dims=1)(x), backend="aot_eager")
    assert_close(run(x), vmap(layer, in_dims=1)(x), torch.float32)
