"""Layers as they are compiled, exported and traced."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import tensorlayers as tl
from tensorlayers.formats import available
from tensorlayers.testing import assert_close
from tests.engine.support import layer_of

every_format = pytest.mark.parametrize("cls", available().values(), ids=available())
BATCHES = [1, 2, 3, 4, 5, 7, 8, 12, 16, 20, 24, 33, 40, 64, 65, 100, 128, 200, 300, 600]


@pytest.fixture(autouse=True)
def _reset():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(layer, backend="aot_eager", dynamic=True):
    """A compiled layer, and what counts its graphs."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=counter), counter


def assert_alike(compiled, layer, x, trained=True):
    """Output, its strides, and the gradients of the compiled layer are those of the layer."""
    found = []
    for apply in (compiled, layer):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(trained)
        y = apply(leaf)
        wanted = [t for t in (leaf, *layer.parameters()) if t.requires_grad]
        found.append([y, *(torch.autograd.grad(y.square().sum(), wanted) if y.requires_grad else ())])
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs, x.dtype)
    assert found[0][0].stride() == found[1][0].stride()
    return found[0][0]


@pytest.mark.parametrize("kind", ["cp", "tt"])
def test_at_most_three_graphs_for_twenty_batches(kind):
    layer = layer_of(available()[kind])
    run, counter = compiled(layer)
    for rows in BATCHES:
        assert_alike(run, layer, torch.randn(rows, 64))
    assert counter.frame_count <= 3


def test_at_most_three_graphs_where_nothing_says_that_batches_differ():
    layer = layer_of(available()["tt"])
    run, counter = compiled(layer, dynamic=None)
    for rows in BATCHES:
        assert_alike(run, layer, torch.randn(rows, 64))
    assert counter.frame_count <= 3


def test_dimensions_before_the_last():
    layer = layer_of(available()["tucker"])
    run, counter = compiled(layer)
    for shape in ((2, 30, 64), (5, 7, 64), (3, 400, 64)):
        assert_alike(run, layer, torch.randn(shape))
    assert counter.frame_count <= 3


def test_without_gradients():
    layer = layer_of(available()["btt"])
    run, counter = compiled(layer)
    with torch.no_grad():
        for rows in (2, 40, 300):
            assert_alike(run, layer, torch.randn(rows, 64), trained=False)
    assert counter.frame_count <= 2


def test_frozen_cores():
    layer = layer_of(available()["lowrank"])
    layer.cores.requires_grad_(False)
    for trained in (True, False):
        run, _ = compiled(layer)
        for rows in (40, 300):
            assert_alike(run, layer, torch.randn(rows, 64), trained)


def test_small_products_are_operations_of_torch():
    layer = tl.FactorizedLinear(16, 10, format=available()["tt"](2))
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    run = torch.compile(layer, fullgraph=True, dynamic=False, backend=keep)
    assert_alike(run, layer, torch.randn(4, 16))
    (graph,) = graphs
    assert "tensorlayers" not in graph.code


@pytest.mark.parametrize("forced", ["chunks", "rebuild"])
def test_a_forced_implementation(forced):
    layer = layer_of(available()["tt"], implementation=forced)
    assert_alike(compiled(layer)[0], layer, torch.randn(40, 64))


def test_by_inductor():
    layer = layer_of(available()["tucker"])
    model = torch.nn.Sequential(torch.nn.LayerNorm(64), layer, torch.nn.GELU())
    run = torch.compile(model, fullgraph=True, dynamic=True)
    for rows in (40, 65):
        assert_alike(run, model, torch.randn(rows, 64))


def test_under_autocast():
    layer = layer_of(available()["tt"])
    run, _ = compiled(layer)
    x = torch.randn(40, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = []
        for apply in (run, layer):
            y = apply(x)
            assert y.dtype == torch.bfloat16
            found.append([y, *torch.autograd.grad(y.float().square().sum(), list(layer.parameters()))])
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs, torch.bfloat16)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_strides_of_a_convolution(last):
    layer = tl.FactorizedConv2d(16, 12, 3, padding=1, format=available()["tucker"](4))
    run, counter = compiled(layer)
    layout = torch.channels_last if last else torch.contiguous_format
    for batch in (2, 3, 5):
        x = torch.randn(batch, 16, 9, 8).contiguous(memory_format=layout)
        y = assert_alike(run, layer, x)
        assert y.is_contiguous(memory_format=layout)
    assert counter.frame_count <= 2


def operators(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


class TestExport:
    @every_format
    def test_any_batch_by_operators_of_torch_alone(self, cls):
        layer = layer_of(cls)
        dims = ({0: torch.export.Dim("batch", max=4096)},)
        exported = torch.export.export(layer, (torch.randn(20, 64),), dynamic_shapes=dims)
        assert all(name.startswith(("aten.", "<built-in")) for name in operators(exported))
        for rows in (1, 2, 20, 300, 2000):
            x = torch.randn(rows, 64)
            assert_close(exported.module()(x), layer(x), torch.float32)

    def test_a_convolution(self):
        layer = tl.FactorizedConv2d(16, 12, 3, padding=1, format=available()["tucker"](4))
        dims = ({0: torch.export.Dim("batch", max=512)},)
        exported = torch.export.export(layer, (torch.randn(4, 16, 8, 8),), dynamic_shapes=dims)
        assert all(name.startswith(("aten.", "<built-in")) for name in operators(exported))
        for batch in (1, 30):
            x = torch.randn(batch, 16, 8, 8)
            assert_close(exported.module()(x), layer(x), torch.float32)

    @every_format
    @pytest.mark.parametrize("features", [(64, 48), (16, 10)], ids=["large", "small"])
    @pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
    def test_a_trace_serves_any_batch(self, cls, features):
        layer = tl.FactorizedLinear(*features, format=cls(2))
        traced = torch.jit.trace(layer, torch.randn(20, features[0]))
        assert "tensorlayers::" not in str(traced.inlined_graph)
        for rows in (1, 20, 300):
            x = torch.randn(rows, features[0], requires_grad=True)
            assert_close(traced(x), layer(x), torch.float32)
            assert_close(*(torch.autograd.grad(f(x).sum(), [x])[0] for f in (traced, layer)), torch.float32)
