"""FactorizedEmbedding in every format, over random options, as a drop-in for nn.Embedding."""

import copy
import dataclasses
import io
import math
import pickle

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
    FactorizedEmbedding,
    lookup,
)
from tensorlayers.formats import available
from tensorlayers.testing import EXACT, INITIAL_STD, assert_close, dense_by_hand, relative_error
from tests.embedding import (
    FORMATS,
    NAMES,
    check_compiled,
    check_embedding,
    ids_of,
    layers,
    settings_of_the_lookup,
)


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
