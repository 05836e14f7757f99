"""What a layer keeps for the backward pass: no more than the dense layer, unless it is told to."""

import dataclasses
import gc
import weakref

import pytest
import torch
from torch import nn

import tensorlayers as tl
from tensorlayers import dispatch
from tensorlayers.formats import available
from tensorlayers.small import SMALL
from tensorlayers.testing import assert_close, check_layer

every_format = pytest.mark.parametrize("name", sorted(available()))
RANKS = {"cp": 40, "lowrank": 40, "tt": 6, "btt": 2, "tucker": 6}


def saved(layer, x):
    """Bytes kept for backward, each memory once, those of the parameters not counted."""
    kept = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), storage)  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    assert y.requires_grad
    return sum(nbytes for nbytes, _ in kept.values())


def linear(name, order=2, **options):
    cls = available()[name]
    orders = {"order": order} if "order" in {field.name for field in dataclasses.fields(cls)} else {}
    return tl.FactorizedLinear(256, 192, format=cls(RANKS[name], **orders), **options)


@pytest.mark.parametrize("order", [2, 3])
@every_format
class TestLinear:
    def test_the_input_alone(self, name, order):
        layer = linear(name, order)
        for lead in ((40,), (4, 10), (1, 8, 5)):
            x = torch.randn(*lead, 256, requires_grad=True)
            assert saved(layer, x) == saved(nn.Linear(256, 192), x) == 40 * 256 * 4

    def test_where_the_input_needs_no_gradient(self, name, order):
        x = torch.randn(40, 256)
        assert saved(linear(name, order), x) == saved(nn.Linear(256, 192), x) == 40 * 256 * 4

    def test_nothing_where_the_cores_are_frozen(self, name, order):
        layer, dense = linear(name, order), nn.Linear(256, 192)
        layer.cores.requires_grad_(False)
        dense.weight.requires_grad_(False)
        for needed in (True, False):  # without a gradient of the input, that of the bias is left
            x = torch.randn(40, 256, requires_grad=needed)
            assert saved(layer, x) == saved(dense, x) == 0

    def test_of_every_implementation(self, name, order):
        for forced in tl.dispatch.decision.NAMES:
            x = torch.randn(40, 256, requires_grad=True)
            assert saved(linear(name, order, implementation=forced), x) == 40 * 256 * 4

    def test_what_is_stored(self, name, order):
        x = torch.randn(40, 256, requires_grad=True)
        dense = 40 * 256 * 4
        stored, auto = (linear(name, order, backward=mode) for mode in ("store", "auto"))
        assert dense <= saved(stored, x) <= 2 * dense
        assert dense <= saved(auto, x) <= 1.1 * dense
        for layer in (stored, auto):
            check_layer(layer.double(), x.detach().double())


def test_stored_are_the_activations_of_the_size_of_the_rank():
    x = torch.randn(40, 256, requires_grad=True)
    for rank, mode, kept in [(64, "store", 64), (64, "auto", 0), (16, "auto", 16), (16, "recompute", 0)]:
        layer = tl.FactorizedLinear(256, 192, format=tl.LowRank(rank), backward=mode)
        assert saved(layer, x) == 40 * (256 + kept) * 4
    layer = tl.FactorizedLinear(256, 512, format=tl.CP(300), backward="store")  # more than the features
    assert saved(layer, x) == 40 * 256 * 4


@pytest.mark.parametrize("name", sorted(available()))
def test_padded_features_are_not_kept(name):
    """The very input is: no padded copy, so that a write to it is noticed."""
    layer = tl.FactorizedLinear(251, 193, format=available()[name](4))
    x = torch.randn(40, 251, requires_grad=True)
    assert saved(layer, x) == 40 * 251 * 4
    copied = x * 1
    y = layer(copied)
    copied.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_small_layers_keep_their_chain():
    """The documented exception: of so few FLOPs, saving is not worth what a function of its own takes."""
    layer = tl.FactorizedLinear(16, 10, format=tl.TT(2))
    rows = SMALL // (2 * 16 * 10)
    less, more = (torch.randn(count, 16, requires_grad=True) for count in (4, rows + 1))
    assert saved(layer, less) > saved(nn.Linear(16, 10), less)
    assert saved(layer, more) == saved(nn.Linear(16, 10), more)


CONVOLUTIONS = {cls.kind: cls for cls in tl.layers.layer_types() if cls.kind.startswith("conv")}


@pytest.mark.parametrize("kind", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@every_format
class TestConvolutions:
    def build(self, kind, name, **options):
        layer = kind(32, 24, 3, padding=1, format=available()[name](4), **options)
        size = {1: 256, 2: 16, 3: 6}[kind.dimensions]
        return layer, layer.to_module(), torch.randn(2, 32, *(size,) * kind.dimensions, requires_grad=True)

    def test_the_input_alone(self, kind, name):
        layer, dense, x = self.build(kind, name)
        assert saved(layer, x) == saved(dense, x) == x.nbytes

    def test_nothing_where_the_cores_are_frozen(self, kind, name):
        layer, _, x = self.build(kind, name)
        _, *expected = torch.autograd.grad(layer(x).square().sum(), [layer.cores[0], x, layer.bias])
        layer.cores.requires_grad_(False)
        assert saved(layer, x) == 0
        found = torch.autograd.grad(layer(x).square().sum(), [x, layer.bias])
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(ours, theirs, torch.float32)

    def test_what_is_stored(self, kind, name):
        for mode, most in (("store", 2.0), ("auto", 1.1)):
            layer, _, x = self.build(kind, name, backward=mode)
            assert x.nbytes <= saved(layer, x) <= most * x.nbytes


def test_the_modes_are_those_of_the_dispatcher():
    assert set(dispatch._ALLOWED) == set(tl.layers.dispatched.BACKWARDS)


def test_no_cache_holds_a_tensor_of_a_layer_that_is_gone():
    """Plans, programs and functions are cached by networks; none of them may keep values."""
    gone = []
    for name in available():
        layer, x = linear(name), torch.randn(40, 256, requires_grad=True)
        y = layer(x)
        y.square().sum().backward()
        gone += [weakref.ref(tensor) for tensor in (x, y, *layer.parameters())]
        del layer, x, y
    gc.collect()
    assert all(reference() is None for reference in gone)
