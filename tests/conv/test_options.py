"""Every kind and format of convolution, over randomly drawn options, against the dense layer in float64."""

import dataclasses
import math
import warnings

import pytest
import torch
from hypothesis import given, settings

from tensorlayers.testing import EXACT, INITIAL_STD, check_layer
from tests.conv.support import FORMATS, every_kind, options


@every_kind
@pytest.mark.parametrize("format", FORMATS)
def test_any_options(kind, format):
    """Outputs and gradients; the deviation of this very draw; and that a full-rank conversion is exact."""

    @settings(max_examples=8)
    @given(options(kind.dimensions, kind.transposed))
    def check(drawn):
        channels, chosen, splits, shape = drawn
        layer = kind(*channels, **chosen, format=dataclasses.replace(format, **splits))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's: 'same' with an even kernel copies the input
            check_layer(layer, torch.randn(shape))
        weight = layer.to_dense().detach().double()
        if weight.numel() > 1:
            assert abs(float(weight.std()) * math.sqrt(3 * layer.fan_in) - 1) <= INITIAL_STD
        full = dataclasses.replace(format, rank=10**6, **splits)
        assert kind.from_dense(layer.to_module(), full).error <= EXACT

    check()
