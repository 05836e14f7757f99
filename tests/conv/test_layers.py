"""Factorized convolutions as drop-ins for torch's, over all of their options, against the dense layer in float64."""

import copy
import dataclasses
import json
import pickle
import warnings

import numpy
import pytest
import torch
from torch import nn

import tensorlayers as tl
from tensorlayers import CP, TT, LowRank, NetworkError, Tucker
from tensorlayers.testing import EXACT, INITIAL_STD, assert_close, check_layer
from tests.conv.support import FORMATS, KINDS, VARIANTS, every_kind, example, image


@every_kind
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_output_and_gradients(kind, format, dtype):
    check_layer(example(kind, format, dtype=dtype), image(example(kind, format), size=5, dtype=dtype))


@every_kind
@pytest.mark.parametrize("format", FORMATS)
def test_exact_at_full_rank_and_back(kind, format):
    dense = kind.dense_types[0](6, 9, 3, stride=2, padding=1, groups=3)
    layer = kind.from_dense(dense, dataclasses.replace(format, rank=10**6))
    assert layer.error <= EXACT
    x = image(layer, size=5)
    assert_close(layer(x), dense(x), torch.float32)
    back = layer.to_module()
    assert type(back) is type(dense)
    assert repr(back) == repr(dense)
    assert_close(back.weight, dense.weight, torch.float32)
    assert torch.equal(back.bias, dense.bias)


@every_kind
@pytest.mark.parametrize("format", FORMATS)
def test_initial_deviation_is_that_of_torch(kind, format):
    for channels, options in [((6, 8), {}), ((7, 5), {"kernel": 2}), ((4, 12), {"groups": 2})]:
        layer = example(kind, format, channels, **options)
        dense = layer.dense_types[0](*channels, layer.kernel_size, groups=layer.groups)
        bound = float(dense.bias.detach().abs().max())
        fan_in = nn.init._calculate_fan_in_and_fan_out(dense.weight)[0]
        assert layer.fan_in == fan_in
        wanted = (3 * fan_in) ** -0.5
        assert abs(float(layer.to_dense().double().std()) / wanted - 1) <= INITIAL_STD
        assert bound <= fan_in**-0.5
        assert float(layer.bias.detach().abs().max()) <= fan_in**-0.5


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", [tl.FactorizedConv1d, tl.FactorizedConvTranspose2d], ids=["conv1d", "transposed2d"])
def test_gradcheck(kind, format):
    layer = example(kind, dataclasses.replace(format, rank=1), (2, 3), 2, torch.float64)
    names = [name for name, _ in layer.named_parameters()]
    x = image(layer, 1, 3, torch.float64).requires_grad_()

    def forward(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(forward, (x, *layer.parameters()))
    assert torch.autograd.gradgradcheck(forward, (x, *layer.parameters()))


class TestTensorlyTorchsDefects:
    """What tensorly-torch 0.5 gets wrong or refuses."""

    def test_asymmetric_stride(self):
        layer = tl.FactorizedConv2d(3, 4, 3, stride=(1, 3), format=CP(2))
        assert layer(torch.zeros(1, 3, 12, 12)).shape == (1, 4, 10, 4)

    @pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
    def test_padding_modes(self, mode):
        check_layer(tl.FactorizedConv2d(3, 4, 3, padding=1, padding_mode=mode, format=TT(2)), torch.randn(1, 3, 6, 6))

    def test_same_and_valid(self):
        for padding, size in (("same", 6), ("valid", 3)):
            layer = tl.FactorizedConv2d(3, 4, 4, padding=padding, format=Tucker(2))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert layer(torch.zeros(1, 3, 6, 6)).shape == (1, 4, size, size)

    @every_kind
    @pytest.mark.parametrize("format", FORMATS)
    def test_unbatched_and_empty_batches(self, kind, format):
        layer = example(kind, format)
        x = image(layer, 3, 5)
        assert_close(layer(x[1]), layer(x)[1], torch.float32)
        empty = layer(x[:0])
        assert empty.shape == (0, *layer(x).shape[1:])
        empty.sum().backward()
        assert all(core.grad is not None for core in layer.cores)

    @pytest.mark.parametrize("format", FORMATS)
    @pytest.mark.parametrize("kind", ["conv2d", "conv3d", "conv_transpose2d", "conv_transpose3d"])
    def test_channels_last(self, kind, format):
        layer = example(KINDS[kind], format, groups=2)
        memory = torch.channels_last if layer.dimensions == 2 else torch.channels_last_3d
        x = image(layer, size=6)
        expected = layer(x)
        layer.to(memory_format=memory)
        actual = layer(x.to(memory_format=memory))
        assert actual.is_contiguous(memory_format=memory)
        assert expected.is_contiguous()
        assert_close(actual, expected, torch.float32)

    def test_the_constructor_leaves_no_value_uninitialised(self):
        for kind in KINDS.values():
            layer = example(kind, CP(3))
            assert all(torch.isfinite(parameter).all() and parameter.any() for parameter in layer.parameters())

    def test_a_transposed_convolution_is_one(self):
        layer = tl.FactorizedConvTranspose2d(3, 4, 3, stride=2, format=Tucker(2))
        assert layer(torch.zeros(1, 3, 5, 5)).shape == (1, 4, 11, 11)


@pytest.mark.parametrize("kind", [name for name in KINDS if "transpose" in name])
@pytest.mark.parametrize("format", FORMATS)
def test_output_size(kind, format):
    layer = KINDS[kind](4, 6, 3, stride=3, padding=1, format=format)
    dense = layer.to_module()
    x = image(layer, 2, 4)
    count = layer.dimensions
    for size in (10, 11, 12):
        wanted = [size] * count
        assert_close(layer(x, wanted), dense(x, wanted), torch.float32)
        assert layer(x, torch.Size([2, 6, *wanted])).shape == (2, 6, *wanted)
    for wrong in ([9] * count, [13] * count, [10] * (count + 1)):
        with pytest.raises(ValueError, match="output_size"):
            layer(x, wrong)


@every_kind
@pytest.mark.parametrize("format", FORMATS)
def test_compile_export_and_transforms(kind, format):
    torch._dynamo.reset()
    layer = example(kind, format, stride=2, padding=1)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    x = image(layer, size=5).requires_grad_()
    expected, actual = layer(x), compiled(x)
    assert_close(actual, expected, torch.float32)
    gradients = (torch.autograd.grad(y.sum(), [x, *layer.parameters()]) for y in (actual, expected))
    for ours, truth in zip(*gradients, strict=True):
        assert_close(ours, truth, torch.float32)
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(layer, (x.detach(),), dynamic_shapes=({0: batch},)).module()
    for rows in (2, 5):
        other = image(layer, rows, 5)
        assert_close(exported(other), layer(other), torch.float32)
    assert_close(torch.func.vmap(layer)(x), layer(x), torch.float32)


@pytest.mark.parametrize("format", FORMATS)
def test_sizes_that_a_graph_leaves_open_compile_it_as_seldom_as_the_dense_layer(format):
    layers = [example(tl.FactorizedConv2d, format, (6, 6), stride=2, padding=1) for _ in range(3)]
    model = nn.Sequential(*layers, example(tl.FactorizedConvTranspose2d, format, (6, 6)))
    graphs = []

    def backend(graph, inputs):
        graphs[-1] += 1
        return graph.forward

    for each in (model, tl.to_dense(model)):
        graphs.append(0)
        torch._dynamo.reset()
        compiled = torch.compile(each, fullgraph=True, backend=backend)
        for batch, size in [(2, 8), (3, 16), (2, 40), (5, 33), (4, 100), (2, 160)]:
            x = torch.randn(batch, 6, size, size + 3)
            assert_close(compiled(x), each(x), torch.float32)
    assert graphs[0] <= graphs[1]


def test_a_tuple_of_one_entry_is_for_all_dimensions_as_in_torch():
    options = {"stride": (2,), "padding": (2,), "dilation": (2,)}
    check_layer(tl.FactorizedConv2d(4, 6, 3, **options, format=Tucker(2)), torch.randn(1, 4, 9, 9))
    dense = nn.Conv2d(4, 6, 3, **options)
    layer = tl.FactorizedConv2d.from_dense(dense, Tucker(10**6))
    x = torch.randn(1, 4, 9, 9)
    assert_close(layer(x), dense(x), torch.float32)
    assert layer.stride == (2, 2)


@every_kind
def test_copies_states_and_devices(kind):
    layer = example(kind, TT(2), groups=2)
    x = image(layer, size=5)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    fresh = example(kind, TT(2), groups=2)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))
    meta = example(kind, TT(2), groups=2, device="meta")
    assert meta(x.to("meta")).shape == layer(x).shape
    meta.to_empty(device="cpu")
    meta.reset_parameters()
    assert torch.isfinite(meta.to_dense()).all()
    rebuilt = kind.from_config(layer.config())
    assert rebuilt.settings_of(rebuilt) == layer.settings_of(layer)
    assert rebuilt.network == layer.network


@every_kind
def test_autocast(kind):
    layer = example(kind, Tucker(4))
    x = image(layer, size=5)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == layer.to_module()(x).dtype == torch.bfloat16
    assert_close(y, layer(x), torch.bfloat16)


@every_kind
def test_attributes_are_those_of_torch(kind):
    layer = example(kind, CP(2), stride=2, padding=1, dilation=2, groups=2)
    dense = layer.to_module()
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(layer, name) == getattr(dense, name)
    assert layer.padding_mode == dense.padding_mode
    assert layer.transposed == dense.transposed
    assert layer.output_padding == dense.output_padding
    assert layer.weight.shape == dense.weight.shape


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 4, 3), {}, "in_channels: an integer of at least 1; got 0"),
        ((4, 4.5, 3), {}, "out_channels: an integer of at least 1; got 4.5"),
        ((4, 4, 0), {}, "kernel_size: an integer of at least 1; got 0"),
        ((4, 4, 3), {"stride": 0}, "stride: an integer of at least 1; got 0"),
        ((4, 4, 3), {"dilation": -1}, "dilation: an integer of at least 1; got -1"),
        ((4, 4, (3,)), {}, r"kernel_size \(3,\): one entry for each of 2 dimensions; got 1"),
        ((4, 4, (3, 3, 3)), {}, r"kernel_size \(3, 3, 3\): one entry for each of 2 dimensions; got 3"),
        ((4, 4, 3), {"stride": (1, 1, 1)}, r"stride \(1, 1, 1\): one entry for each of 2 dimensions; got 3"),
        ((4, 4, 3), {"padding": (2, 1, 1)}, r"padding \(2, 1, 1\): one entry for each of 2 dimensions; got 3"),
        ((4, 6, 3), {"groups": 3}, "divisible by groups"),
        ((4, 4, 3), {"padding": "full"}, "Invalid padding string"),
        ((4, 4, 3), {"padding": "same", "stride": 2}, "not supported for strided"),
        ((4, 4, 3), {"padding_mode": "mirror"}, "padding_mode must be one of"),
        ((4, 4, 3), {"format": "cp"}, "format: a Format"),
        ((4, 4, 3), {"dtype": torch.int32}, "dtype: one of"),
    ],
)
def test_bad_arguments_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        tl.FactorizedConv2d(*arguments, **{"format": LowRank(2), **options})


@every_kind
def test_bad_input_is_refused(kind):
    layer = example(kind, LowRank(2))
    for shape in [(6,), (2, 5, *(5,) * layer.dimensions), (1, 2, 6, *(5,) * layer.dimensions)]:
        with pytest.raises(NetworkError, match="in_channels = 6"):
            layer(torch.zeros(shape))
    with pytest.raises(tl.ConversionError, match="from_dense"):
        kind.from_dense(nn.Linear(4, 4), LowRank(2))


def test_a_kernel_mode_of_a_pointwise_convolution_is_left_out():
    layer = tl.FactorizedConv2d(8, 8, 1, stride=2, padding=1, format=TT(2))
    assert layer.network.names("kernel") == ()
    check_layer(layer, torch.randn(2, 8, 5, 5))


def test_integers_of_numpy_are_sizes_as_in_torch():
    four, two = numpy.int64(4), numpy.int32(2)
    for layer in (
        tl.FactorizedConv2d(four, four, (3, two), two, two, groups=two, format=LowRank(1)),
        tl.FactorizedConv2d.from_dense(nn.Conv2d(four, four, (3, two), two, two, groups=two), LowRank(1)),
    ):
        expected = tl.FactorizedConv2d(4, 4, (3, 2), 2, 2, groups=2, format=LowRank(1))
        assert json.dumps(layer.config()) == json.dumps(expected.config())


def test_layers_factorized_jointly_share_their_cores():
    sources = [nn.Conv2d(4, 6, 3) for _ in range(3)]
    for format in VARIANTS:
        shared = tl.FactorizedConv2d.from_dense_jointly(sources, dataclasses.replace(format, rank=10**6))
        assert len({id(core) for layer in shared for core in layer.cores}) == len(shared[0].cores)
        for layer, source in zip(shared, sources, strict=True):
            x = torch.randn(2, 4, 5, 5)
            assert_close(layer(x), source(x), torch.float32)
            check_layer(layer, x)
