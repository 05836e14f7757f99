"""Channels that the modes do not hold exactly: filled up inside of the product, so that nothing of it shows."""

import pytest
import torch

import tensorlayers as tl
from tensorlayers.testing import assert_close, check_layer
from tests.conv.support import FORMATS, every_kind, example, image
from tests.engine.test_saved import saved

SIZES = {1: 512, 2: 24, 3: 8}


def odd(kind, format, groups=1, **options):
    """A layer of odd channels, and an input for which it keeps its input alone."""
    layer = example(kind, format, (13 * groups, 11 * groups), padding=1, groups=groups, **options)
    return layer, image(layer, 4, SIZES[kind.dimensions], options.get("dtype"))


@every_kind
@pytest.mark.parametrize("format", FORMATS)
class TestOddChannels:
    def test_the_input_alone_is_saved(self, kind, format):
        for groups in (1, 2):
            layer, x = odd(kind, format, groups)
            x.requires_grad_()
            assert saved(layer, x) == saved(layer.to_module(), x) == x.nbytes

    def test_a_change_of_the_input_before_the_gradient_is_noticed(self, kind, format):
        layer, x = odd(kind, format)
        for each in (layer, layer.to_module()):
            given = x.clone()
            y = each(given)
            given.mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()

    def test_output_and_gradients(self, kind, format):
        for groups in (1, 3):
            layer, x = odd(kind, format, groups, dtype=torch.float64)
            check_layer(layer, x)

    @pytest.mark.parametrize("batch", [0, 2])
    def test_small_and_empty_batches(self, kind, format, batch):
        for groups in (1, 2):
            layer = example(kind, format, (13 * groups, 11 * groups), groups=groups)
            dense, x = layer.to_module(), image(layer, batch, 5).requires_grad_()
            y, truth = layer(x), dense(x)
            assert_close(y, truth, torch.float32)
            assert y.is_contiguous()
            for ours, theirs in zip(torch.autograd.grad(y.sum(), x), torch.autograd.grad(truth.sum(), x), strict=True):
                assert_close(ours, theirs, torch.float32)
            layer(x).sum().backward()
            assert all(core.grad is not None for core in layer.cores)

    def test_without_a_bias_the_result_has_memory_of_its_own(self, kind, format):
        layer = example(kind, format, (13, 11), bias=False)
        assert layer(image(layer, 2, 5)).is_contiguous()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("groups", [1, 2])
def test_in_the_layout_of_the_input(format, groups):
    layer, x = odd(tl.FactorizedConv2d, format, groups)
    expected = layer(x)
    given = x.to(memory_format=torch.channels_last).requires_grad_()
    for y in (layer(given), layer(given[:, :, :4, :4])):
        assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(layer(given), expected, torch.float32)
