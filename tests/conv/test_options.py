"""Every kind and format of convolution, over randomly drawn options, against the dense layer in float64."""

import dataclasses
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorlayers.testing import EXACT, INITIAL_STD, check_layer
from tests.conv.support import FORMATS, every_kind


@st.composite
def options(draw, count, transposed):
    """Channels, torch's options, splits of the channels, and the shape of an input."""

    def each(values):
        return draw(st.one_of(st.sampled_from(values), st.tuples(*[st.sampled_from(values)] * count)))

    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels = [groups * draw(st.sampled_from([1, 2, 5, 7])) for _ in range(2)]
    chosen = {
        "kernel_size": each([1, 2, 3, 4]),
        "stride": each([1, 2, 3]),
        "padding": each([0, 1, 2]),
        "dilation": each([1, 2]),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    if not transposed:
        chosen["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        if draw(st.booleans()):
            chosen["padding"] = draw(st.sampled_from(["same", "valid"]))
            chosen["stride"] = 1 if chosen["padding"] == "same" else chosen["stride"]
    elif draw(st.booleans()):
        chosen["output_padding"] = draw(st.integers(0, 1))
        chosen["dilation"] = 2
    splits = {}
    if draw(st.booleans()):
        sizes = [channel // groups for channel in channels]
        splits = {side: (2, -(-size // 2)) for side, size in zip(("in_modes", "out_modes"), sizes, strict=True)}
    lead = draw(st.sampled_from([(2,), (1,), ()]))
    lengths = draw(st.tuples(*[st.integers(7, 9)] * count))
    return channels, chosen, splits, (*lead, channels[0], *lengths)


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
