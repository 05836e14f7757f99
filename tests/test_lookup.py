"""How rows are looked up, and what FactorizedEmbedding takes and refuses."""

import json
import math

import numpy
import pytest
import torch
from torch import nn

from tensorlayers import (
    CP,
    TT,
    ConversionError,
    FactorizedEmbedding,
    LowRank,
    NetworkError,
    contraction,
    gather,
)
from tensorlayers.layers import layer_type
from tensorlayers.testing import EXACT, assert_close, relative_error
from tests.embedding import FORMATS, check_compiled, check_embedding


def test_compile_with_all_options():
    check_compiled(FactorizedEmbedding(17, 10, 3, 2.0, scale_grad_by_freq=True, format=LowRank(2)), "aot_eager", False)


def spied_rows(monkeypatch):
    """A list that gets the number of rows of each contraction."""
    counted = []
    original = contraction.execute

    def counting(plan, operands):
        result = original(plan, operands)
        counted.append(result.shape[0])
        return result

    monkeypatch.setattr(contraction, "execute", counting)
    return counted


def test_a_zipf_batch_costs_its_distinct_ids_alone(monkeypatch):
    layer = FactorizedEmbedding(100_000, 128, format=TT(42))
    ranks = torch.rand(4096).pow(-1.0).clamp(max=100_000).long() - 1
    counted = spied_rows(monkeypatch)
    y = layer(ranks)
    assert sum(counted) == len(ranks.unique()) < 2048
    y.sum().backward()
    assert sum(counted) == 2 * len(ranks.unique())


def test_a_cheap_row_is_not_worth_sorting(monkeypatch):
    layer = FactorizedEmbedding(1000, 16, format=LowRank(1))
    counted = spied_rows(monkeypatch)
    layer(torch.zeros(50, dtype=torch.int64))
    assert counted == [50]


@pytest.mark.parametrize("format", FORMATS)
def test_chunks_do_not_change_the_result(format, sorting):
    layer = FactorizedEmbedding(997, 16, format=format, dtype=torch.float64)
    ids = torch.randperm(997)[:500]
    check_embedding(layer, ids)


def test_a_prime_vocabulary_gets_balanced_modes():
    layer = FactorizedEmbedding(50257, 768, format=TT(16))
    sizes = layer.network.mode_sizes("in")
    assert max(sizes) <= 2 * min(sizes)
    assert math.prod(sizes) < 1.01 * 50257
    ids = torch.tensor([50256, 0, 50255])
    assert_close(layer(ids), layer.weight[ids], torch.float32)
    for wrong in (50257, math.prod(sizes) - 1, math.prod(sizes), -1):
        with pytest.raises(IndexError, match="out of range"):
            layer(torch.tensor([0, wrong]))


@pytest.mark.parametrize("format", FORMATS)
def test_lookups_gather_whole_slices(format):
    """The row modes lead on every core that carries them, so that no core is copied to be gathered."""
    layer = FactorizedEmbedding(101, 12, format=format)
    flats = gather._Lookup(torch.arange(3), layer.network, list(layer.cores)).flats
    for flat, core in zip(flats, layer.cores, strict=True):
        assert flat.data_ptr() == core.data_ptr()
        assert flat.is_contiguous()


@pytest.mark.parametrize("ids", [torch.tensor([1.0]), torch.tensor([1], dtype=torch.uint8), torch.tensor([True])])
def test_other_ids_are_refused_as_torch_does(ids):
    for layer in (nn.Embedding(17, 10), FactorizedEmbedding(17, 10)):
        with pytest.raises(RuntimeError, match=r"indices.*scalar types"):
            layer(ids)


def test_a_frozen_or_partly_frozen_layer():
    layer = FactorizedEmbedding(101, 12, format=TT(3))
    ids = torch.arange(101)
    layer.cores[0].requires_grad_(False)
    layer(ids).sum().backward()
    assert layer.cores[0].grad is None
    assert layer.cores[1].grad is not None
    layer.requires_grad_(False)
    assert not layer(ids).requires_grad
    with torch.inference_mode():
        assert_close(layer(ids), layer.to_dense(), torch.float32)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padding_idx", [None, 1])
def test_jagged_ids(padding_idx):
    layer = FactorizedEmbedding(17, 10, padding_idx)
    parts = [torch.tensor([1, 2, 16]), torch.tensor([3])]
    y = layer(torch.nested.nested_tensor(parts, layout=torch.jagged))
    assert_close(y.values(), layer(torch.cat(parts)), torch.float32)
    with pytest.raises(NetworkError, match="jagged"):
        layer(torch.nested.nested_tensor(parts, layout=torch.strided))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_view_of_jagged_ids_has_holes():
    layer = FactorizedEmbedding(17, 10)
    table = torch.arange(12).reshape(3, 4)
    view = torch.nested.narrow(table, 1, torch.tensor([0, 1, 0]), torch.tensor([2, 3, 1]), layout=torch.jagged)
    for rows, ids in zip(layer(view).unbind(), (table[0, :2], table[1, 1:], table[2, :1]), strict=True):
        assert_close(rows, layer(ids), torch.float32)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_hooks_see_jagged_ids_once():
    layer, seen = FactorizedEmbedding(17, 10), []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.is_nested))
    layer(torch.nested.nested_tensor([torch.tensor([1, 2]), torch.tensor([3])], layout=torch.jagged))
    assert seen == [True]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_from_dense_keeps_what_the_layer_had(dtype):
    source = nn.Embedding(17, 10, padding_idx=-1, max_norm=1.5, norm_type=1.0, dtype=dtype).eval()
    source.weight.requires_grad_(False)
    source.weight[16] = torch.arange(10)
    layer = FactorizedEmbedding.from_dense(source, LowRank(4))
    assert not layer.training
    assert all(core.dtype == dtype and not core.requires_grad for core in layer.cores)
    assert torch.equal(layer.padding_row, source.weight[16])
    assert torch.equal(layer.to_dense()[16], source.weight[16])
    assert layer.padding_row.data_ptr() != source.weight[16].data_ptr()
    assert 0 < layer.error < 1
    assert layer.settings_of(layer) == layer.settings_of(source)
    back = layer.to_module()
    assert type(back) is nn.Embedding
    assert layer.settings_of(back) == layer.settings_of(source)
    assert not back.training
    assert not back.weight.requires_grad


def test_from_pretrained():
    table = torch.randn(17, 10)
    layer = FactorizedEmbedding.from_pretrained(table, padding_idx=-2, max_norm=2.0, format=LowRank(10))
    assert relative_error(layer.to_dense(), table) <= EXACT
    assert layer.padding_idx == 15
    assert layer.max_norm == 2
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert FactorizedEmbedding.from_pretrained(table, freeze=False).cores[0].requires_grad
    for wrong in ((torch.randn(3),), (table, True, 17), (None,), (table, True, 1, 2, 3, 4, 5, 6)):
        with pytest.raises(ConversionError, match="from_pretrained"):
            FactorizedEmbedding.from_pretrained(*wrong)


def test_attributes_are_those_of_embedding():
    ours, theirs = FactorizedEmbedding(17, 10, -1, 2.0, 1.0, True), nn.Embedding(17, 10, -1, 2.0, 1.0, True)
    for name in ours._SETTINGS:
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.weight.shape == theirs.weight.shape
    assert ours.bias is None
    assert list(ours.state_dict()) == ["padding_row", "cores.0", "cores.1"]
    assert list(FactorizedEmbedding(17, 10).state_dict()) == ["cores.0", "cores.1"]
    assert layer_type("embedding") is FactorizedEmbedding
    assert "padding_idx=16" in repr(ours)


def test_the_padding_row_of_a_new_layer_is_zero_and_can_be_changed():
    layer = FactorizedEmbedding(17, 10, padding_idx=0)
    assert not layer(torch.tensor(0)).any()
    layer.padding_row.copy_(torch.arange(10))
    assert torch.equal(layer(torch.tensor([1, 0]))[1], torch.arange(10.0))
    assert torch.equal(layer.to_dense()[0], torch.arange(10.0))


def test_costs():
    layer = FactorizedEmbedding(1000, 128, format=TT(8))
    settings = layer.settings_of(layer)
    assert layer.dense_cost(settings, 4).flops == 0
    assert layer.dense_cost(settings, 4).elements == 2 * 4 * 128
    per_row = 2 * layer.network.features("out") * 8
    assert layer.factorized_cost(layer.own_network, settings, 4).flops == 4 * per_row


@pytest.mark.parametrize(
    ("arguments", "offender"),
    [
        ({"num_embeddings": 0}, "num_embeddings"),
        ({"embedding_dim": True}, "embedding_dim"),
        ({"padding_idx": 17}, "padding_idx 17.*16"),
        ({"padding_idx": -18}, "padding_idx -18"),
        ({"padding_idx": 1.0}, "padding_idx 1.0"),
        ({"sparse": True}, "sparse.*dense"),
        ({"format": "tt"}, "tt"),
        ({"dtype": torch.int8}, "int8"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments, offender):
    with pytest.raises(NetworkError, match=offender):
        FactorizedEmbedding(**{"num_embeddings": 17, "embedding_dim": 10, **arguments})


def test_integers_of_numpy_are_sizes_as_in_torch():
    sizes = numpy.int64(17), numpy.int32(10), numpy.int64(-2)
    for layer in (FactorizedEmbedding(*sizes), FactorizedEmbedding.from_dense(nn.Embedding(*sizes), LowRank(0.25))):
        assert json.dumps(layer.config()) == json.dumps(FactorizedEmbedding(17, 10, 15).config())


def test_a_sparse_layer_stays_dense():
    source = nn.Embedding(17, 10, sparse=True)
    assert FactorizedEmbedding.refusal(source).startswith("sparse: ")
    assert not FactorizedEmbedding.refusal(nn.Embedding(17, 10))
    with pytest.raises(NetworkError, match="sparse"):
        FactorizedEmbedding.from_dense(source, LowRank(2))
    with pytest.raises(ConversionError, match="Linear"):
        FactorizedEmbedding.from_dense(nn.Linear(3, 3), LowRank(2))


def test_under_skip_init_nothing_is_drawn():
    layer = nn.utils.skip_init(FactorizedEmbedding, 17, 10, padding_idx=3, format=CP(2))
    assert layer.cores[0].device.type == layer.padding_row.device.type == "cpu"
