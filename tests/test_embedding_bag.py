"""FactorizedEmbeddingBag as a drop-in for nn.EmbeddingBag."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tensorlayers import TT, FactorizedEmbeddingBag, LowRank, NetworkError, gather, lookup, tensorize
from tensorlayers.formats import available
from tensorlayers.layers import layer_type
from tensorlayers.testing import EXACT, assert_close, relative_error

FORMATS = [pytest.param(cls(2), id=name) for name, cls in sorted(available().items())]


def truth(layer, ids, offsets, weights):
    """torch's own function on the dense table, whose gradient goes on into the cores."""
    table = layer.to_dense()
    if layer.max_norm is not None:
        norms = table.detach().norm(layer.norm_type, dim=1, keepdim=True)
        table = table * torch.where(norms > layer.max_norm, layer.max_norm / (norms + 1e-7), torch.ones_like(norms))
    if layer.scale_grad_by_freq:  # divided here: torch 2.13 counts wrongly on the CPU (pytorch#190063)
        counts = torch.bincount(ids.flatten(), minlength=len(table)).clamp(min=1)
        table.register_hook(lambda grad: grad / counts[:, None])
    return F.embedding_bag(
        ids,
        table,
        offsets,
        mode=layer.mode,
        per_sample_weights=weights,
        include_last_offset=layer.include_last_offset,
        padding_idx=layer.padding_idx,
    )


def check_bag(layer, ids, offsets, weights):
    """Output and every gradient, that of the weights of the samples too, are the dense layer's."""
    y, expected = layer(ids, offsets, weights), truth(layer, ids, offsets, weights)
    assert y.shape == expected.shape
    assert_close(y, expected, y.dtype, "output")
    assert_close(y, layer.to_module()(ids, offsets, weights), y.dtype, "nn.EmbeddingBag's output")
    probe = torch.randn_like(y)
    inputs = [*layer.cores, *([] if weights is None else [weights])]
    gradients = (torch.autograd.grad(out, inputs, probe) for out in (y, expected))
    for k, (ours, dense) in enumerate(zip(*gradients, strict=True)):
        assert_close(ours, dense, y.dtype, f"gradient {k}")


@st.composite
def calls(draw, name):
    """A small table with any options, and what it is called with."""
    rows, columns = draw(st.integers(2, 60)), draw(st.integers(2, 12))
    kind = available()[name]
    format = kind(draw(st.integers(1, 3)), in_modes=None if kind.order == 1 else tensorize.balanced_modes(rows, 3))
    mode = draw(st.sampled_from(["sum", "mean", "max"]))
    last = draw(st.booleans())
    layer = FactorizedEmbeddingBag(
        rows,
        columns,
        draw(st.sampled_from([None, 0.7, 3])),
        draw(st.sampled_from([1.0, 2.0, math.inf])),
        mode != "max" and draw(st.booleans()),
        mode,
        include_last_offset=last,
        padding_idx=draw(st.sampled_from([None, 0, -1, rows // 2])),
        dtype=torch.float64,
        format=format,
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    flat, dtype = draw(st.booleans()), draw(st.sampled_from([torch.int32, torch.int64]))
    shape = (draw(st.integers(0, 12)),) if flat else (draw(st.integers(0, 4)), draw(st.integers(1, 4)))
    ids = torch.randint(0, rows, shape, generator=generator)
    if layer.padding_idx is not None:
        ids[torch.rand(shape, generator=generator) < 0.3] = layer.padding_idx
    offsets = None
    if flat:
        starts = sorted(draw(st.lists(st.integers(0, shape[0]), max_size=4)))  # repeated: empty bags
        offsets = torch.tensor([0, *starts, *([shape[0]] if last else [])], dtype=dtype)
    weights = None
    if mode == "sum" and draw(st.booleans()):
        weights = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    return layer, ids.to(dtype), offsets, weights


@pytest.mark.parametrize("name", sorted(available()))
class TestAgainstDense:
    @given(data=st.data())
    def test_any_options(self, name, data):
        with pytest.MonkeyPatch.context() as patch:
            if data.draw(st.booleans()):
                patch.setattr(lookup, "_WORTH_SORTING", 0)
                patch.setattr(lookup, "_FEW_IDS", 0)
                patch.setattr(gather, "_CHUNK_BYTES", {"cpu": 0})
            check_bag(*data.draw(calls(name)))

    @pytest.mark.parametrize("sorted_ids", [False, True], ids=["as they come", "sorted"])
    def test_gradcheck(self, name, sorted_ids, monkeypatch):
        monkeypatch.setattr(lookup, "_WORTH_SORTING", 0 if sorted_ids else math.inf)
        monkeypatch.setattr(lookup, "_FEW_IDS", 0)
        layer = FactorizedEmbeddingBag(
            7, 4, mode="mean", padding_idx=2, format=available()[name](2), dtype=torch.float64
        )
        ids = torch.tensor([[0, 6, 2], [6, 1, 6]])

        def function(*cores):
            values = {f"cores.{k}": core for k, core in enumerate(cores)}
            return torch.func.functional_call(layer, values, (ids,))

        assert torch.autograd.gradcheck(function, tuple(layer.cores))


@pytest.mark.parametrize("format", FORMATS)
class TestEveryFormat:
    def test_copies_and_plain_data(self, format):
        source = nn.EmbeddingBag(17, 10, mode="max", padding_idx=4).eval()
        layer = FactorizedEmbeddingBag.from_dense(source, format)
        ids = torch.randint(0, 17, (3, 4))
        again = FactorizedEmbeddingBag.from_config(layer.config())
        again.load_state_dict(layer.state_dict(), assign=True)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), again):
            assert torch.equal(other(ids), layer(ids))
        assert not layer.training

    def test_joint_layers_share_the_cores(self, format):
        sources = [nn.EmbeddingBag(17, 10, padding_idx=k, mode="sum", dtype=torch.float64) for k in (3, None)]
        layers = FactorizedEmbeddingBag.from_dense_jointly(sources, format)
        assert layers[0].cores is layers[1].cores
        for layer in layers:
            check_bag(layer, torch.randint(0, 17, (5, 9)), None, None)

    def test_export_with_any_batch(self, format):
        layer = FactorizedEmbeddingBag(17, 10, padding_idx=3, format=format)
        dimensions = {0: torch.export.Dim("bags"), 1: torch.export.Dim("length")}
        example = (torch.randint(0, 17, (4, 3)),)
        exported = torch.export.export(layer, example, dynamic_shapes=(dimensions,)).module()
        for shape in ((4, 3), (50, 7)):
            ids = torch.randint(0, 17, shape)
            assert_close(exported(ids), layer(ids), torch.float32)

    def test_without_values(self, format):
        layer = FactorizedEmbeddingBag(17, 10, padding_idx=3, device="meta", format=format)
        assert layer(torch.empty(3, 2, dtype=torch.int64, device="meta")).shape == (3, 10)


@pytest.mark.parametrize("options", [{"mode": "mean"}, {"mode": "sum", "padding_idx": 3}], ids=str)
def test_compile_fullgraph(options):
    torch._dynamo.reset()
    layer = FactorizedEmbeddingBag(17, 10, format=TT(2), **options)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 40):
        ids, offsets = torch.randint(0, 17, (rows,)), torch.tensor([0, 2, 2, rows - 1])
        expected, actual = layer(ids, offsets), compiled(ids, offsets)
        assert_close(actual, expected, torch.float32)
        gradients = (torch.autograd.grad(y.sum(), list(layer.cores)) for y in (actual, expected))
        for ours, dense in zip(*gradients, strict=True):
            assert_close(ours, dense, torch.float32)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}], ids=str)
def test_only_ids_and_parameters_are_saved_for_the_backward(options):
    layer = FactorizedEmbeddingBag(101, 16, mode="sum", format=TT(4), **options)
    memory = {core.untyped_storage().data_ptr() for core in layer.cores}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda t: t):
        layer(torch.randint(0, 101, (30, 20)))
    others = [tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in memory]
    assert not [tensor for tensor in others if tensor.is_floating_point()]


def test_jagged_bags():
    layer = FactorizedEmbeddingBag(17, 10, mode="sum")
    parts = [torch.tensor([1, 2, 16]), torch.tensor([3])]
    weights = [torch.rand(3), torch.rand(1)]
    nested = [torch.nested.nested_tensor(values, layout=torch.jagged) for values in (parts, weights)]
    expected = layer(torch.cat(parts), torch.tensor([0, 3]), torch.cat(weights))
    assert_close(layer(nested[0], None, nested[1]), expected, torch.float32)


def test_a_view_of_jagged_bags_has_holes():
    layer = FactorizedEmbeddingBag(17, 10, mode="sum")
    table = torch.arange(12).reshape(3, 4)
    view = torch.nested.narrow(table, 1, torch.tensor([0, 1, 0]), torch.tensor([2, 3, 1]), layout=torch.jagged)
    expected = [layer(ids[None])[0] for ids in (table[0, :2], table[1, 1:], table[2, :1])]
    assert_close(layer(view), torch.stack(expected), torch.float32)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((torch.tensor([1, 2]),), ValueError),
        ((torch.tensor([[1, 2]]), torch.tensor([0])), ValueError),
        ((torch.zeros(1, 2, 3, dtype=torch.int64),), ValueError),
        ((torch.tensor([1, 2]), torch.tensor([[0]])), ValueError),
        ((torch.tensor([1, 2]), torch.tensor([1])), RuntimeError),
        ((torch.tensor([1, 2]), torch.tensor([0, 3])), RuntimeError),
        ((torch.tensor([1.0, 2.0]), torch.tensor([0])), RuntimeError),
        ((torch.tensor([1, 2]), torch.tensor([0.0])), RuntimeError),
        ((torch.tensor([[1, 2]]), None, torch.ones(2)), ValueError),
        ((torch.tensor([[1, 2]]), None, torch.ones(1, 2)), NotImplementedError),
    ],
)
@pytest.mark.parametrize("padding_idx", [None, 1])
def test_wrong_calls_fail_as_in_torch(arguments, error, padding_idx):
    for layer in (
        nn.EmbeddingBag(17, 10, padding_idx=padding_idx),
        FactorizedEmbeddingBag(17, 10, padding_idx=padding_idx),
    ):
        with pytest.raises(error):
            layer(*arguments)


@pytest.mark.parametrize("wrong", [17, 19, -1])
def test_ids_out_of_range_are_refused(wrong):
    with pytest.raises(IndexError, match="out of range"):
        FactorizedEmbeddingBag(17, 10, format=TT(2))(torch.tensor([[1, wrong]]))


def test_from_dense_and_back_keeps_all_options():
    source = nn.EmbeddingBag(17, 10, 1.5, 1.0, True, "sum", include_last_offset=True, padding_idx=-1).requires_grad_(
        False
    )
    layer = FactorizedEmbeddingBag.from_dense(source, LowRank(4))
    back = layer.to_module()
    assert type(back) is nn.EmbeddingBag
    assert layer.settings_of(layer) == layer.settings_of(source) == layer.settings_of(back)
    assert not any(parameter.requires_grad for module in (layer, back) for parameter in module.parameters())
    assert layer_type("embedding_bag") is FactorizedEmbeddingBag


def test_from_pretrained():
    table = torch.randn(17, 10)
    layer = FactorizedEmbeddingBag.from_pretrained(table, mode="max", padding_idx=-2, format=LowRank(10))
    assert relative_error(layer.to_dense(), table) <= EXACT
    assert (layer.mode, layer.padding_idx) == ("max", 15)
    assert not layer.cores[0].requires_grad


@pytest.mark.parametrize(
    ("arguments", "offender"),
    [
        ({"mode": "min"}, "mode.*min"),
        ({"mode": "max", "scale_grad_by_freq": True}, "scale_grad_by_freq.*max"),
        ({"sparse": True}, "sparse"),
        ({"padding_idx": 17}, "padding_idx 17"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments, offender):
    with pytest.raises(NetworkError, match=offender):
        FactorizedEmbeddingBag(17, 10, **arguments)
    assert FactorizedEmbeddingBag.refusal(nn.EmbeddingBag(17, 10, sparse=True)).startswith("sparse: ")


def test_the_gradient_is_divided_by_how_often_a_row_is_looked_up():
    """torch 2.13 on the CPU divides by the count of another row here (pytorch#190063)."""
    layer = FactorizedEmbeddingBag(4, 3, mode="sum", scale_grad_by_freq=True, format=LowRank(3), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(layer(torch.tensor([[1, 1, 3]])).sum(), [layer.cores[1]])
    other = [index for index in layer.network.cores[0] if index != "r"]
    assert other == ["o1"]
    assert_close(gradient, torch.tensor([0, 1, 0, 1])[:, None] * layer.cores[0].detach().sum(0), torch.float64)
