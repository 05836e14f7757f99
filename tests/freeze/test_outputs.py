"""A frozen layer is torch's own, with a cached weight."""

import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tensorlayers as tl
from tensorlayers import TT, LowRank, NetworkError
from tensorlayers.formats import available
from tensorlayers.layers import frozen as freezing
from tensorlayers.testing import assert_close
from tests.freeze.support import build, every_kind, flags


@every_kind
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_outputs_and_input_gradients_are_torchs(kind, training):
    layer, args = build(kind)
    layer.train(training)
    before = layer.eval()(*args)
    layer.train(training).rank_dropout = 0.5
    dense = layer.to_module()
    assert layer.freeze() is layer
    assert layer.frozen
    assert layer.cached_bytes == dense.weight.nbytes
    assert flags(layer) == [False] * len(flags(layer))
    assert_close(layer(*args), before, torch.float32)
    wanted = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.is_floating_point()]
    for arg in wanted:
        arg.requires_grad_()
    ours, truth = layer(*args), dense.requires_grad_(False)(*args)
    assert torch.equal(ours, truth)
    assert ours.requires_grad == bool(wanted)
    if wanted:
        probe = torch.randn_like(ours)
        for mine, theirs in zip(*(torch.autograd.grad(y, wanted, probe) for y in (ours, truth)), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", sorted(available()))
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 3), st.booleans(), st.sampled_from([1, 2, 0.9, 1.0]))
def test_linear_layers_of_any_shape(name, into, out, rows, bias, rank):
    try:
        layer = tl.FactorizedLinear(into, out, bias, dtype=torch.float64, format=available()[name](rank))
    except tl.RankError:  # a fraction that a small layer has no network for
        return
    x = torch.randn(rows, into, dtype=torch.float64)
    expected = layer(x)
    assert_close(layer.freeze()(x), expected, torch.float64)
    assert torch.equal(layer(x), layer.to_module()(x))


@given(st.booleans(), st.sampled_from([1, 2]), st.integers(1, 2), st.integers(0, 2), st.integers(1, 2), st.booleans())
def test_convolutions_of_any_options(transposed, groups, stride, padding, dilation, bias):
    cls = tl.FactorizedConvTranspose2d if transposed else tl.FactorizedConv2d
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "bias": bias}
    layer = cls(4, 6, (3, 2), **options, dtype=torch.float64, format=TT(3))
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    expected = layer(x)
    assert_close(layer.freeze()(x), expected, torch.float64)
    assert_close(layer(x[0]), expected[0], torch.float64)


def test_an_output_size_is_followed():
    layer = tl.FactorizedConvTranspose1d(4, 6, 3, stride=2, format=LowRank(2))
    x = torch.randn(2, 4, 5)
    expected = layer(x, [12])
    assert_close(layer.freeze()(x, output_size=[12]), expected, torch.float32)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_inputs_are_taken_as_before():
    rows = [torch.randn(2, 12), torch.randn(1, 12)]
    layer = tl.FactorizedLinear(12, 10, format=TT(2)).freeze()
    for layout in (torch.strided, torch.jagged):
        nested = layer(torch.nested.nested_tensor(rows, layout=layout))
        assert_close(torch.cat(nested.unbind()), layer(torch.cat(rows)), torch.float32)
    table = torch.randint(0, 20, (3, 5))
    starts, lengths = torch.tensor([0, 1, 0]), torch.tensor([2, 3, 1])
    view = torch.nested.narrow(table, 1, starts, lengths, layout=torch.jagged)  # with holes
    for last in (False, True):
        bag = tl.FactorizedEmbeddingBag(20, 6, mode="sum", include_last_offset=last, format=TT(2))
        expected = bag(view)
        assert_close(bag.freeze()(view), expected, torch.float32)
    embedding = tl.FactorizedEmbedding(20, 6, format=TT(2))
    expected = embedding(view).values()
    assert_close(embedding.freeze()(view).values(), expected, torch.float32)


def test_a_norm_that_is_limited():
    layer = tl.FactorizedEmbedding(20, 6, max_norm=0.5, format=TT(2))
    ids = torch.arange(20)
    expected, weight = layer(ids), layer.to_dense()
    for _ in range(2):
        assert_close(layer.freeze()(ids), expected, torch.float32)
    assert torch.equal(layer.to_dense(), weight)


def test_autocast_is_followed():
    layer, (x,) = build("linear-tt")
    layer.freeze()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert torch.equal(y, layer.to_module()(x))
    assert y.dtype == torch.bfloat16
    assert layer(x).dtype == torch.float32


def test_freezing_in_inference_mode_leaves_a_weight_for_training():
    layer, (x,) = build("linear-tt")
    with torch.inference_mode():
        layer.freeze()
        assert torch.equal(layer(x), layer.to_module()(x))
    layer(x.requires_grad_()).sum().backward()
    assert x.grad is not None


def test_wrong_shapes_are_refused_as_before():
    with pytest.raises(NetworkError, match="in_features = 12"):
        build("linear-tt")[0].freeze()(torch.randn(2, 11))


def test_the_bias_is_the_layers_own():
    layer, (x,) = build("linear-tt")
    layer.freeze()
    spoiled = layer(x)
    with torch.no_grad():
        layer.bias += 1
    assert layer.frozen
    assert_close(layer(x), spoiled + 1, torch.float32)
    layer.bias.requires_grad_()
    layer(x).sum().backward()
    assert layer.frozen
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert layer.frozen
    assert_close(layer(x), layer.to_module()(x), torch.float32)


def test_freezing_again_builds_anew():
    layer, (x,) = build("linear-tt")
    before = flags(layer.freeze())
    y = layer(x)
    layer.cores[0].data.mul_(2)  # which torch does not count
    assert torch.equal(layer(x), y)
    layer.freeze()
    assert torch.equal(layer(x), layer.to_module()(x))
    assert flags(layer) == before
    assert all(flags(layer.unfreeze()))


def test_the_cached_weight_is_the_layers_alone():
    layer = tl.TensorContraction((4,), (3,))  # whose one core is the weight
    assert layer.to_module().weight.data_ptr() != layer.cores[0].data_ptr()
    cached = freezing._frozen[layer.freeze()].dense.weight
    assert cached.data_ptr() != layer.cores[0].data_ptr()


def test_a_frozen_layer_can_be_collected():
    layer, _ = build("conv2d")
    layer.freeze()
    watch, count = weakref.ref(freezing._frozen[layer].dense), len(freezing._frozen)
    del layer
    gc.collect()
    assert watch() is None
    assert len(freezing._frozen) < count


def test_what_cannot_be_frozen():
    meta = tl.FactorizedLinear(12, 10, device="meta", format=TT(2))
    with pytest.raises(NetworkError, match=r"freeze: .*meta device"):
        meta.freeze()
    model = nn.Sequential(build("linear-tt")[0], meta)
    with pytest.raises(NetworkError, match=r"layer '1': freeze: .*meta device"):
        tl.freeze(model)
    assert not model[0].frozen
    assert all(flags(model))
    with torch.inference_mode():
        made = tl.FactorizedLinear(12, 10, format=TT(2))
    with pytest.raises(NetworkError, match="inference mode"):
        made.freeze()
    computed, _ = build("linear-tt")
    nn.utils.parametrize.register_parametrization(computed.cores, "0", nn.Identity())
    with pytest.raises(NetworkError, match="parametrization"):
        computed.freeze()
