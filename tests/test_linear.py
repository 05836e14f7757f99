"""FactorizedLinear as a drop-in for nn.Linear."""

import copy
import dataclasses
import io
import json
import pickle

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tensorlayers import CP, TT, ConversionError, FactorizedLinear, LowRank, NetworkError, contraction
from tensorlayers.formats import available
from tensorlayers.testing import EXACT, assert_close

FORMATS = [pytest.param(cls(2), id=name) for name, cls in sorted(available().items())]


@pytest.mark.parametrize("format", FORMATS)
class TestEveryFormat:
    @pytest.mark.parametrize("lead", [(), (0,), (1,), (3,), (2, 0, 3), (2, 3, 4)], ids=str)
    def test_leading_dimensions(self, format, lead):
        layer = FactorizedLinear(17, 10, format=format)
        x = torch.randn(*lead, 17, requires_grad=True)
        y = layer(x)
        assert y.shape == (*lead, 10)
        assert_close(y, F.linear(x, layer.to_dense(), layer.bias), torch.float32)
        y.sum().backward()
        assert x.grad.shape == x.shape
        assert all(core.grad is not None for core in layer.cores)

    def test_non_contiguous_input(self, format):
        layer = FactorizedLinear(12, 10, format=format)
        x = torch.randn(12, 7).T
        assert_close(layer(x), layer(x.contiguous()), torch.float32)

    def test_copies_are_equal_and_separate(self, format):
        layer = FactorizedLinear(12, 10, format=format)
        x = torch.randn(3, 12)
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        copies = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)
        for other in copies:
            assert torch.equal(other(x), layer(x))
            assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in layer.parameters()}

    def test_state_dict_of_a_converted_layer_loads_into_a_constructed_one(self, format):
        source = nn.Linear(12, 10)
        converted = FactorizedLinear.from_dense(source, format)
        constructed = FactorizedLinear(12, 10, format=format)
        constructed.load_state_dict(converted.state_dict())
        x = torch.randn(3, 12)
        assert torch.equal(constructed(x), converted(x))
        assert list(converted.state_dict()) == ["bias", *(f"cores.{k}" for k in range(len(converted.cores)))]

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compile_fullgraph(self, format, dynamic):
        torch._dynamo.reset()
        layer = FactorizedLinear(12, 10, format=format)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for rows in (5, 3, 40):
            x = torch.randn(rows, 12, requires_grad=True)
            expected, actual = layer(x), compiled(x)
            assert_close(actual, expected, torch.float32)
            gradients = (torch.autograd.grad(y.sum(), [x, *layer.parameters()]) for y in (actual, expected))
            for ours, truth in zip(*gradients, strict=True):
                assert_close(ours, truth, torch.float32)

    def test_export_with_any_batch(self, format):
        layer = FactorizedLinear(12, 10, format=format)
        x = torch.randn(4, 3, 12)
        dimensions = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
        exported = torch.export.export(layer, (x,), dynamic_shapes=(dimensions,)).module()
        for shape in ((4, 3, 12), (50, 7, 12), (600, 2, 12)):
            x = torch.randn(shape)
            assert_close(exported(x), layer(x), torch.float32)

    def test_functional_transforms(self, format):
        layer = FactorizedLinear(12, 10, format=format)
        x = torch.randn(6, 12)
        assert_close(torch.func.vmap(layer)(x), layer(x), torch.float32)
        parameters = {name: value.detach() for name, value in layer.named_parameters()}

        def loss(parameters, row):
            return torch.func.functional_call(layer, parameters, (row,)).square().sum()

        per_row = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        layer(x).square().sum().backward()
        for name, parameter in layer.named_parameters():
            assert_close(per_row[name].sum(0), parameter.grad, torch.float32)
        stacked = {name: torch.stack([value, 2 * value]) for name, value in parameters.items()}
        ensemble = torch.func.vmap(torch.func.functional_call, in_dims=(None, 0, None))(layer, stacked, (x,))
        assert_close(ensemble[0], layer(x), torch.float32)

    def test_autocast(self, format):
        layer = FactorizedLinear(64, 48, format=format)
        x = torch.randn(5, 64, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
            assert y.dtype == F.linear(x, layer.to_dense()).dtype == torch.bfloat16
        assert_close(y, F.linear(x, layer.to_dense(), layer.bias), torch.bfloat16)
        y.sum().backward()
        assert all(core.grad.dtype == torch.float32 for core in layer.cores)

    def test_meta_device(self, format):
        layer = FactorizedLinear(12, 10, device="meta", format=format)
        assert layer(torch.empty(3, 12, device="meta")).shape == (3, 10)
        layer.to_empty(device="cpu")
        layer.reset_parameters()
        assert torch.isfinite(layer.to_dense()).all()
        with torch.device("meta"):
            assert FactorizedLinear(12, 10, format=format).weight.is_meta

    def test_no_einsum_of_more_than_two_operands(self, format, monkeypatch):
        operands = []
        original = torch.einsum

        def counting(equation, *tensors):
            operands.append(len(tensors))
            return original(equation, *tensors)

        monkeypatch.setattr(torch, "einsum", counting)
        layer = FactorizedLinear(12, 10, format=format)
        layer(torch.randn(3, 12))
        layer.to_dense()
        assert operands
        assert max(operands) <= 2

    def test_training_lowers_the_loss(self, format):
        layer = FactorizedLinear(12, 10, format=format)
        x, target = torch.randn(64, 12), torch.randn(64, 10)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
        losses = []
        for _ in range(50):
            loss = (layer(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0]


def test_attributes_are_those_of_linear():
    ours, theirs = FactorizedLinear(12, 10), nn.Linear(12, 10)
    assert (ours.in_features, ours.out_features) == (theirs.in_features, theirs.out_features)
    assert ours.bias.shape == theirs.bias.shape
    assert ours.weight.shape == theirs.weight.shape
    assert not isinstance(ours, nn.Linear)
    assert "in_features=12, out_features=10, bias=True" in repr(ours)
    without = FactorizedLinear(12, 10, False)
    assert without.bias is None
    assert "bias" not in without.state_dict()


def test_positional_arguments_are_those_of_linear():
    layer = FactorizedLinear(12, 10, True, "cpu", torch.float64)
    assert layer.cores[0].dtype == torch.float64


def test_initialisation_follows_the_generator():
    torch.manual_seed(3)
    first = FactorizedLinear(12, 10)
    torch.manual_seed(3)
    second = FactorizedLinear(12, 10)
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)
    assert float(first.bias.detach().abs().max()) <= 12**-0.5


def test_under_skip_init_nothing_is_drawn():
    layer = nn.utils.skip_init(FactorizedLinear, 12, 10, format=CP(2))
    assert layer.cores[0].device.type == "cpu"


@pytest.mark.parametrize(
    ("x", "offender"), [(torch.zeros(3, 11), "11"), (torch.zeros(3, 13), "13"), (torch.tensor(1.0), "")]
)
def test_a_wrong_input_is_refused(x, offender):
    with pytest.raises(NetworkError, match=rf"in_features = 12.*{offender}"):
        FactorizedLinear(12, 10)(x)


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (-1, 3), (2.0, 3), (True, 3), ("4", 3)], ids=str)
def test_bad_sizes_are_refused(sizes):
    with pytest.raises(NetworkError, match="at least 1"):
        FactorizedLinear(*sizes)


def test_a_format_that_is_none_is_refused():
    with pytest.raises(NetworkError, match="tt"):
        FactorizedLinear(3, 3, format="tt")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_from_dense_keeps_what_the_layer_had(dtype):
    source = nn.Linear(12, 10, dtype=dtype).eval()
    source.weight.requires_grad_(False)
    layer = FactorizedLinear.from_dense(source, LowRank(4))
    assert not layer.training
    assert all(core.dtype == dtype and not core.requires_grad for core in layer.cores)
    assert layer.bias.requires_grad
    assert torch.equal(layer.bias, source.bias)
    assert layer.bias.data_ptr() != source.bias.data_ptr()
    assert 0 < layer.error < 1


def test_a_batch_takes_the_order_of_its_class():
    network = TT(8).network(768, 768)
    plans = {contraction.linear_plan(network, contraction.batch_class(rows)) for rows in range(3000)}
    assert len(plans) == len(contraction.BATCH_CLASSES)


@pytest.mark.parametrize("format", FORMATS)
def test_autocast_does_not_reach_what_builds_fits_or_draws_a_weight(format):
    source = nn.Linear(64, 48)
    full = dataclasses.replace(format, rank=10**6)
    with torch.autocast("cpu", torch.bfloat16):
        layer = FactorizedLinear.from_dense(source, full)
        assert layer.error <= EXACT
        assert layer.to_dense().dtype == layer.weight.clone().dtype == layer.to_module().weight.dtype == torch.float32
        layer.reset_parameters()
    torch.testing.assert_close(float(layer.to_dense().detach().std()) * (3 * 64) ** 0.5, 1.0, rtol=1e-5, atol=0)


@pytest.mark.parametrize("format", FORMATS)
def test_construction_without_data(format):
    with FakeTensorMode():
        assert FactorizedLinear(12, 10, format=format)(torch.empty(3, 12)).shape == (3, 10)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_hooks_see_nested_rows_once():
    layer, seen = FactorizedLinear(12, 10), []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.is_nested))
    layer(torch.nested.nested_tensor([torch.randn(2, 12), torch.randn(1, 12)], layout=torch.jagged))
    assert seen == [True]


def test_integers_of_numpy_are_sizes_as_in_torch():
    sizes = numpy.int64(12), numpy.int32(10)
    for layer in (FactorizedLinear(*sizes), FactorizedLinear.from_dense(nn.Linear(*sizes), LowRank(0.25))):
        assert json.dumps(layer.config()) == json.dumps(FactorizedLinear(12, 10).config())


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8, torch.float8_e4m3fn], ids=str)
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(NetworkError, match=f"dtype.*{dtype}"):
        FactorizedLinear(12, 10, dtype=dtype)


@pytest.mark.parametrize(
    ("module", "format", "offender"),
    [
        (nn.Conv2d(3, 3, 1), LowRank(2), "Conv2d"),
        (nn.LazyLinear(4), LowRank(2), "lazy"),
        (nn.Linear(4, 4), "tt", "tt"),
    ],
    ids=["conv", "lazy", "format"],
)
def test_from_dense_refuses_what_it_cannot_take(module, format, offender):
    with pytest.raises(ConversionError, match=offender):
        FactorizedLinear.from_dense(module, format)
