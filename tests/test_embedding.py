"""FactorizedEmbedding as a drop-in for nn.Embedding."""

import copy
import dataclasses
import io
import json
import math
import pickle
from contextlib import contextmanager

import numpy
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from tensorlayers import (
    CP,
    TT,
    ConversionError,
    FactorizedEmbedding,
    LowRank,
    NetworkError,
    contraction,
    gather,
    lookup,
    tensorize,
)
from tensorlayers.formats import available
from tensorlayers.layers import layer_type
from tensorlayers.testing import EXACT, INITIAL_STD, assert_close, dense_by_hand, relative_error

FORMATS = [pytest.param(cls(2), id=name) for name, cls in sorted(available().items())]
NAMES = sorted(available())


@contextmanager
def settings_of_the_lookup(wanted=True, sharing=False):
    """Ids are always sorted, and looked up in chunks: of a few rows, or of those that share a core's slice."""
    with pytest.MonkeyPatch.context() as patch:
        if wanted:
            patch.setattr(lookup, "_WORTH_SORTING", 0)
            patch.setattr(lookup, "_FEW_IDS", 0)
            patch.setattr(gather, "_CHUNK_BYTES", {"cpu": 0})
        if sharing:
            patch.setattr(gather, "_SHARED_SLICE", 0)
            patch.setattr(gather, "_SHARED_ROWS", 0)
        yield


@pytest.fixture(params=[False, True], ids=["", "sharing"])
def sorting(request):
    with settings_of_the_lookup(sharing=request.param):
        yield


def renormed(weight, max_norm, norm_type):
    """What torch's embedding_renorm_ makes of all rows, with the gradient of a constant factor."""
    if max_norm is None:
        return weight
    norms = weight.detach().norm(norm_type, dim=1, keepdim=True)
    return weight * torch.where(norms > max_norm, max_norm / (norms + 1e-7), torch.ones_like(norms))


def check_embedding(layer, ids):
    """Output and every gradient are those of the dense table, whose gradient goes on into the cores."""
    y = layer(ids)
    weight = renormed(layer.to_dense(), layer.max_norm, layer.norm_type)
    truth = F.embedding(ids, weight, layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq)
    assert y.shape == truth.shape
    assert_close(y, truth, y.dtype, "output")
    assert_close(y, layer.to_module()(ids), y.dtype, "nn.Embedding's output")
    probe = torch.randn_like(y)
    gradients = (torch.autograd.grad(out, list(layer.cores), probe) for out in (y, truth))
    for k, (ours, dense) in enumerate(zip(*gradients, strict=True)):
        assert_close(ours, dense, y.dtype, f"gradient of core {k}")


@st.composite
def layers(draw, name, cls=FactorizedEmbedding, **options):
    """A small table of any size and modes, with any options."""
    rows, columns = draw(st.integers(2, 60)), draw(st.integers(2, 12))
    kind = available()[name]
    changes = {"rank": draw(st.integers(1, 3))}
    if kind.order != 1:
        changes["order"] = draw(st.integers(2, 3))
        if draw(st.booleans()):
            first = draw(st.integers(1, 8))
            changes["in_modes"] = (first, -(-rows // first) + draw(st.integers(0, 2)))
            changes["out_modes"] = tensorize.balanced_modes(columns, draw(st.integers(1, 2)))
    format = kind(**changes)
    max_norm = draw(st.sampled_from([None, 0.7, 3]))
    return cls(
        rows,
        columns,
        padding_idx=draw(st.sampled_from([None, 0, -1, rows // 2])),
        max_norm=max_norm,
        norm_type=draw(st.sampled_from([1.0, 2.0, math.inf])),
        **{name: draw(values) for name, values in options.items()},
        dtype=torch.float64,
        format=format,
    )


def ids_of(draw, layer, shape):
    """Ids of a shape, with the last row and the padding row among them."""
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, layer.num_embeddings, shape, generator=generator)
    special = torch.randint(0, 5, shape, generator=generator)
    ids = torch.where(special == 0, layer.num_embeddings - 1, ids)
    return ids if layer.padding_idx is None else torch.where(special == 1, layer.padding_idx, ids)


@pytest.mark.parametrize("name", NAMES)
class TestAgainstDense:
    @given(data=st.data())
    def test_any_options(self, name, data):
        layer = data.draw(layers(name, scale_grad_by_freq=st.booleans()))
        shape = data.draw(st.sampled_from([(), (0,), (1,), (7,), (2, 0), (4, 5), (2, 3, 4), (40,)]))
        ids = ids_of(data.draw, layer, shape)
        with settings_of_the_lookup(data.draw(st.booleans()), data.draw(st.booleans())):
            check_embedding(layer, ids.to(data.draw(st.sampled_from([torch.int32, torch.int64]))))

    @given(data=st.data())
    def test_the_dense_weight_is_the_product_of_the_cores(self, name, data):
        layer = data.draw(layers(name))
        network = layer.network
        by_hand = dense_by_hand(network, list(layer.cores)).reshape(network.features("in"), network.features("out"))
        by_hand = by_hand[: layer.num_embeddings, : layer.embedding_dim].clone()
        if layer.padding_idx is not None:
            by_hand[layer.padding_idx] = 0
        assert_close(layer.to_dense(), by_hand, torch.float64)

    @pytest.mark.parametrize("modes", [((7, 8), (4, 3)), ((2, 3, 9), (12,)), ((53,), (3, 2, 2))], ids=str)
    def test_a_core_whose_row_modes_do_not_lead(self, name, modes):
        format = available()[name](2, in_modes=modes[0], out_modes=modes[1])
        layer = FactorizedEmbedding(53, 12, format=format, dtype=torch.float64)
        as_laid_out = format.resolve(layer.axes)[0]
        cores = [
            core.detach().permute([names.index(index) for index in wanted])
            for core, names, wanted in zip(layer.cores, layer.network.cores, as_laid_out.cores, strict=True)
        ]
        ids = torch.arange(53)
        assert_close(lookup.embedding(ids, as_laid_out, cores, (53, 12)), layer.to_dense(), torch.float64)

    @pytest.mark.parametrize("sorted_ids", [False, True], ids=["as they come", "sorted"])
    def test_gradcheck(self, name, sorted_ids, monkeypatch):
        monkeypatch.setattr(lookup, "_WORTH_SORTING", 0 if sorted_ids else math.inf)
        monkeypatch.setattr(lookup, "_FEW_IDS", 0)
        layer = FactorizedEmbedding(7, 4, padding_idx=2, format=available()[name](2), dtype=torch.float64)
        ids = torch.tensor([[0, 6, 2], [6, 1, 6]])

        def function(*cores):
            values = {f"cores.{k}": core for k, core in enumerate(cores)}
            return torch.func.functional_call(layer, values, (ids,))

        assert torch.autograd.gradcheck(function, tuple(layer.cores))
        assert torch.autograd.gradgradcheck(function, tuple(layer.cores))


@pytest.mark.parametrize("format", FORMATS)
class TestEveryFormat:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_other_dtypes(self, format, dtype, sorting):
        layer = FactorizedEmbedding(101, 16, padding_idx=5, format=format, dtype=dtype)
        wide = copy.deepcopy(layer).double()
        ids = torch.randint(0, 101, (200,))
        y, truth = layer(ids), wide(ids)
        assert y.dtype == dtype
        assert_close(y, truth, dtype)
        probe = torch.randn_like(y)
        ours = torch.autograd.grad(y, list(layer.cores), probe)
        for a, b in zip(ours, torch.autograd.grad(truth, list(wide.cores), probe.double()), strict=True):
            assert_close(a, b, dtype)

    @pytest.mark.parametrize("padding_idx", [None, 3])
    def test_copies_are_equal_and_separate(self, format, padding_idx):
        layer = FactorizedEmbedding(17, 10, padding_idx, format=format)
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        copies = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)
        for other in copies:
            assert torch.equal(other(torch.arange(17)), layer(torch.arange(17)))
            assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in layer.parameters()}

    def test_state_dict_of_a_converted_layer_loads_into_a_constructed_one(self, format):
        source = nn.Embedding(17, 10, padding_idx=4)
        source.weight.data[4] = torch.arange(10)
        converted = FactorizedEmbedding.from_dense(source, format)
        constructed = FactorizedEmbedding(17, 10, 4, format=format)
        constructed.load_state_dict(converted.state_dict())
        assert torch.equal(constructed.to_dense(), converted.to_dense())
        again = FactorizedEmbedding.from_config(converted.config())
        again.load_state_dict(converted.state_dict(), assign=True)
        assert torch.equal(again(torch.arange(17)), converted(torch.arange(17)))

    def test_full_rank_is_exact(self, format):
        source = nn.Embedding(17, 10)
        layer = FactorizedEmbedding.from_dense(source, dataclasses.replace(format, rank=10**6))
        assert layer.error <= EXACT
        assert relative_error(layer(torch.arange(17)), source.weight) <= EXACT

    def test_joint_layers_share_the_cores(self, format, sorting):
        sources = [nn.Embedding(17, 10, padding_idx=k) for k in (3, 5)]
        first, second = FactorizedEmbedding.from_dense_jointly(
            [source.double() for source in sources], dataclasses.replace(format, rank=3)
        )
        assert first.cores is second.cores
        ids = torch.randint(0, 17, (5, 9))
        for layer in (first, second):
            check_embedding(layer, ids)
        total = [first(ids).sum() + second(ids).square().sum() for _ in range(2)]
        assert all(g is not None for g in torch.autograd.grad(total[0], list(first.cores)))

    @pytest.mark.parametrize("columns", [12, 11])
    @pytest.mark.parametrize("shape", [(1,), (2, 3)], ids=str)
    def test_the_output_can_be_changed_in_place(self, format, columns, shape):
        layer = FactorizedEmbedding(17, columns, format=format)
        ids = torch.randint(0, 17, shape)
        y = layer(ids)
        actual = torch.autograd.grad(y.mul_(3).sum(), list(layer.cores))
        for ours, truth in zip(actual, torch.autograd.grad(3 * layer(ids).sum(), list(layer.cores)), strict=True):
            assert_close(ours, truth, torch.float32)

    def test_training_lowers_the_loss(self, format):
        layer = FactorizedEmbedding(12, 10, format=format)
        target = torch.randn(12, 10)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
        losses = []
        for _ in range(50):
            loss = (layer(torch.arange(12)) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0]

    def test_initial_deviation(self, format):
        layer = FactorizedEmbedding(1009, 48, format=format)
        assert abs(float(layer.to_dense().detach().std()) - 1) <= INITIAL_STD

    def test_compile_fullgraph(self, format):
        check_compiled(FactorizedEmbedding(17, 10, format=format), "eager", dynamic=True)

    @pytest.mark.parametrize("padding_idx", [None, 3])
    def test_export_with_any_batch(self, format, padding_idx):
        layer = FactorizedEmbedding(17, 10, padding_idx, format=format)
        ids = torch.randint(0, 17, (4, 3))
        dimensions = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
        exported = torch.export.export(layer, (ids,), dynamic_shapes=(dimensions,)).module()
        for shape in ((4, 3), (50, 7), (600, 2)):
            ids = torch.randint(0, 17, shape)
            assert_close(exported(ids), layer(ids), torch.float32)
        with pytest.raises(IndexError):
            exported(torch.full((4, 3), 17))

    @pytest.mark.parametrize("options", [{}, {"padding_idx": 3, "max_norm": 2.0}], ids=str)
    def test_functional_transforms(self, format, options):
        layer = FactorizedEmbedding(17, 10, format=format, **options)
        ids = torch.randint(0, 17, (6, 4))
        assert_close(torch.func.vmap(layer)(ids), layer(ids), torch.float32)
        parameters = {name: value.detach() for name, value in layer.named_parameters()}

        def loss(parameters, row):
            return torch.func.functional_call(layer, parameters, (row,)).square().sum()

        per_row = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, ids)
        layer(ids).square().sum().backward()
        for name, parameter in layer.named_parameters():
            assert_close(per_row[name].sum(0), parameter.grad, torch.float32)
        stacked = {name: torch.stack([value, 2 * value]) for name, value in parameters.items()}
        ensemble = torch.func.vmap(torch.func.functional_call, in_dims=(None, 0, None))(layer, stacked, (ids,))
        assert_close(ensemble[0], layer(ids), torch.float32)

    def test_forward_mode(self, format):
        layer = FactorizedEmbedding(17, 10, format=format)
        ids = torch.randint(0, 17, (6,))
        values = {name: value.detach() for name, value in layer.named_parameters()}
        with forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(value, value) for name, value in values.items()}
            tangent = forward_ad.unpack_dual(torch.func.functional_call(layer, duals, (ids,))).tangent
        assert_close(tangent, len(values) * layer(ids), torch.float32)  # the table is linear in each core

    def test_autocast_leaves_the_lookup_alone(self, format, sorting):
        layer = FactorizedEmbedding(64, 48, format=format)
        ids = torch.randint(0, 64, (50,))
        expected = layer(ids)
        truth = torch.autograd.grad(expected.sum(), list(layer.cores))
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(ids)
            assert y.dtype == F.embedding(ids, layer.to_dense()).dtype == torch.float32
            gradients = torch.autograd.grad(y.sum(), list(layer.cores))
        assert_close(y, expected, torch.float32)
        for ours, core in zip(gradients, truth, strict=True):
            assert_close(ours, core, torch.float32)

    def test_without_values(self, format):
        layer = FactorizedEmbedding(17, 10, padding_idx=3, device="meta", format=format)
        assert layer(torch.empty(3, 2, dtype=torch.int64, device="meta")).shape == (3, 2, 10)
        layer.to_empty(device="cpu")
        layer.reset_parameters()
        assert torch.isfinite(layer.to_dense()).all()
        assert not layer.padding_row.any()
        with FakeTensorMode():
            assert FactorizedEmbedding(17, 10, format=format)(torch.empty(3, dtype=torch.int64)).shape == (3, 10)

    @pytest.mark.parametrize("sorted_ids", [False, True], ids=["as they come", "sorted"])
    def test_only_ids_and_parameters_are_saved_for_the_backward(self, format, sorted_ids, monkeypatch):
        monkeypatch.setattr(lookup, "_WORTH_SORTING", 0 if sorted_ids else math.inf)
        monkeypatch.setattr(lookup, "_FEW_IDS", 0)
        layer = FactorizedEmbedding(101, 16, padding_idx=3, format=format)
        memory = {core.untyped_storage().data_ptr() for core in layer.cores}
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda t: t):
            layer(torch.randint(0, 101, (30, 20)))
        others = [tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in memory]
        assert 1 <= len(others) <= 2
        assert all(tensor.dtype == torch.int64 and tensor.numel() <= 600 for tensor in others)

    def test_nothing_of_the_size_of_the_table_is_formed(self, format):
        layer = FactorizedEmbedding(20011, 32, padding_idx=3, format=format)
        largest = 0

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                nonlocal largest
                result = func(*args, **(kwargs or {}))
                for tensor in result if isinstance(result, (tuple, list)) else (result,):
                    if isinstance(tensor, torch.Tensor):
                        largest = max(largest, tensor.untyped_storage().nbytes())
                return result

        with Watch():
            layer(torch.randint(0, 20011, (50,))).sum().backward()
        assert largest < 20011 * 32 * 4 / 3


def check_compiled(layer, backend, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=dynamic)
    for rows in (5, 12):
        ids = torch.randint(0, 17, (rows, 2))
        expected, actual = layer(ids), compiled(ids)
        assert_close(actual, expected, torch.float32)
        gradients = (torch.autograd.grad(y.sum(), list(layer.cores)) for y in (actual, expected))
        for ours, truth in zip(*gradients, strict=True):
            assert_close(ours, truth, torch.float32)
    for wrong in (17, -1):
        with pytest.raises(IndexError):
            compiled(torch.full((12, 2), wrong))


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
