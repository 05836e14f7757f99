"""Convolution plans below autograd: in chunks of samples, and the gradients that keep nothing but the input."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tensorlayers as tl
from tensorlayers import CP, LowRank, Tucker, conv_chunks, convolution
from tensorlayers.conv_maps import is_last, with_layout
from tensorlayers.testing import assert_close
from tests.conv.support import FORMATS, every_kind, options

POSITIONS = st.sampled_from([1, 16, 4096, 65536])
"""What an order is chosen for; it is right for any other number."""


def taken(plan, x, cores, window):
    """The result in one pass, a gradient of it, and those of the input and the cores by autograd."""
    leaves = [tensor.detach().requires_grad_() for tensor in (x, *cores)]
    y = convolution.execute(plan, leaves[0], leaves[1:], window)
    dy = torch.randn_like(y)
    return y, dy, torch.autograd.grad(y, leaves, dy)


@every_kind
@pytest.mark.parametrize("format", FORMATS)
def test_forward_and_gradients_over_any_options(kind, format):
    @settings(max_examples=12)
    @given(
        drawn=options(kind.dimensions, kind.transposed),
        positions=POSITIONS,
        chunk=st.sampled_from([0, 1, 2]),
        last=st.booleans(),
        needed=st.sets(st.integers(0, 5)),
    )
    def check(drawn, positions, chunk, last, needed):
        channels, chosen, splits, shape = drawn
        layer = kind(*channels, **chosen, format=dataclasses.replace(format, **splits), dtype=torch.float64)
        network, window, cores = layer.own_network, layer._window(), layer.own_cores()
        width = network.features("group") * network.features("in")
        x = with_layout(torch.randn(3, width, *shape[-kind.dimensions :], dtype=torch.float64), last)
        plan = convolution.plan_for(network, window, positions)
        y, dy, expected = taken(plan, x, cores, window)
        needs = [k in needed for k in range(1 + len(cores))]
        with torch.no_grad():
            actual = conv_chunks.forward(plan, x, cores, window, chunk=chunk)
            gradients = conv_chunks.gradients(plan, dy, x, cores, window, needs, chunk)
        assert_close(actual, y, torch.float64)
        for gradient, truth, is_needed in zip(gradients, expected, needs, strict=True):
            assert (gradient is not None) == is_needed
            if is_needed:
                assert_close(gradient, truth, torch.float64)

    check()


def layer_and_input(format, batch=6, dtype=torch.float32, **options):
    layer = tl.FactorizedConv2d(32, 48, 3, padding=1, format=format, dtype=dtype, **options)
    return layer, torch.randn(batch, 32, 8, 8, dtype=dtype)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_results_and_gradients_are_in_the_layout_of_the_input(format, last):
    layer, x = layer_and_input(format)
    x, cores, window = with_layout(x, last), layer.own_cores(), layer._window()
    plan = convolution.plan_for(layer.own_network, window, x[:, 0].numel())
    for chunk in (1, 6):
        with torch.no_grad():
            y = conv_chunks.forward(plan, x, cores, window, chunk=chunk)
            dx, *rest = conv_chunks.gradients(plan, y, x, cores, window, [True] * (1 + len(cores)), chunk)
        assert is_last(y) == is_last(dx) == last
        assert all(gradient.is_contiguous() for gradient in rest)
    for one in (x[:1], x[:0]):
        assert is_last(convolution.execute(plan, one, cores, window)) == is_last(one)


@pytest.mark.parametrize("format", FORMATS)
def test_in_half_precision_chunks_are_summed_in_single(format):
    layer, x = layer_and_input(format, batch=64, dtype=torch.bfloat16)
    cores, window = layer.own_cores(), layer._window()
    plan = convolution.plan_for(layer.own_network, window, x[:, 0].numel())
    dy = torch.randn(64, 48, 8, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        found = conv_chunks.gradients(plan, dy, x, cores, window, [True] * (1 + len(cores)), 1)
        wide = [core.detach().double() for core in cores]
        expected = conv_chunks.gradients(plan, dy.double(), x.double(), wide, window, [True] * (1 + len(cores)))
    for gradient, truth in zip(found, expected, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert_close(gradient, truth, torch.bfloat16)


def test_a_gradient_without_memory_of_its_own():
    """That of a sum is one number seen as a tensor."""
    layer, x = layer_and_input(Tucker(8))
    cores, window = [core.detach() for core in layer.own_cores()], layer._window()
    plan = convolution.plan_for(layer.own_network, window, 4096)
    dy = torch.ones(()).expand(6, 48, 8, 8)
    needs = [True] * (1 + len(cores))
    found, expected = (conv_chunks.gradients(plan, g, x, cores, window, needs) for g in (dy, dy.contiguous()))
    for gradient, truth in zip(found, expected, strict=True):
        assert_close(gradient, truth, torch.float32)


class TestSamples:
    """How many samples are taken at a time."""

    @pytest.mark.parametrize("format", [Tucker(0.25), CP(0.25), LowRank(0.25)], ids=str)
    @pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
    @pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
    def test_no_more_memory_than_the_dense_convolution_works_in(self, format, last, training):
        layer = tl.FactorizedConv2d(64, 96, 3, padding=1, format=format)
        window, dense = layer._window(), 64 * 96 * 9
        for batch, size in ((64, 8), (16, 40), (3, 3)):
            x = with_layout(torch.empty(batch, 64, size, size), last)
            plan = convolution.plan_for(layer.own_network, window, batch * size**2)
            inside = [step.counts[2] * size**2 for step in plan.steps[1:]]  # stride 1: the positions stay
            held = sum(inside) + (max(inside) if training else 0)
            count = conv_chunks.samples(plan, x, window, training)
            allowed = dense * (2 if training else 1) + (0 if last else (64 + 96) * size**2 * batch)
            if training and count >= batch:  # the gradient of x, of which parts are copies otherwise
                allowed = max(allowed, 2**19) + 64 * size**2 * batch
            assert count == 1 or count * held <= max(allowed, 2**19)
            assert count >= 3 or size > 8

    def test_nothing_between_is_one_chunk(self):
        layer = tl.FactorizedConv2d(4, 4, 3, format=Tucker(4))
        plan = convolution.plan_for(layer.own_network, layer._window(), 64)
        assert len(plan.steps) == 1
        assert conv_chunks.samples(plan, torch.empty(100, 4, 8, 8), layer._window()) >= 100
