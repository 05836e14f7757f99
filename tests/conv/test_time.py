"""What a convolution is predicted to take: what follows from the model, no time is measured against."""

import dataclasses

import pytest
import torch

import tensorlayers as tl
from tensorlayers import BTT, CP, LowRank, Tucker, conv_cost, convolution
from tensorlayers.conv_cost import Convolution
from tensorlayers.machine import machine, shipped
from tensorlayers.measure_conv import measure_conv
from tests.conv.support import FORMATS, every_kind, example

WIDE = Convolution(before=4096, after=4096, groups=1, channels=64, new=64, sides=(3, 3))


class TestConvolution:
    """One convolution."""

    def seconds(self, **changes):
        return sum(conv_cost.seconds(dataclasses.replace(WIDE, **changes), machine("cpu")))

    def test_time_grows_with_every_size(self):
        for changes in (
            {"before": 8192, "after": 8192},
            {"channels": 128},
            {"new": 128},
            {"sides": (5, 5)},
            {"contiguous": (True, False)},
            {"contiguous": (True, True)},
        ):
            assert self.seconds(**changes) > self.seconds(), changes

    def test_few_channels_cost_what_fills_a_register(self):
        assert self.seconds(channels=1, new=1) > 0.01 * self.seconds()
        assert self.seconds(groups=8, channels=8, new=8) > 8 / 64 * self.seconds()

    def test_a_depthwise_kernel_is_bound_by_memory_and_its_gradient_is_slow_where_it_is_long(self):
        depthwise = {"groups": 64, "channels": 1, "new": 1}
        ahead = [
            conv_cost.seconds(dataclasses.replace(WIDE, sides=s, **depthwise), machine("cpu")) for s in ((3, 3), (5, 5))
        ]
        assert ahead[0][0] == ahead[1][0]
        assert ahead[0][1] < ahead[1][1]

    def test_a_transposed_convolution_works_at_its_input(self):
        grows = self.seconds(after=4 * 4096)
        assert self.seconds(after=4 * 4096, transposed=True) < grows

    def test_a_machine_without_rates_of_convolutions_has_those_of_its_products(self):
        bare = dataclasses.replace(machine("cpu"), conv={})
        assert 0 < sum(conv_cost.seconds(WIDE, bare)) < 1
        assert set(machine("cpu").conv) == set(conv_cost.rates(bare))


@every_kind
@pytest.mark.parametrize("format", FORMATS)
def test_every_layer_has_an_estimate(kind, format):
    layer, on = example(kind, format, (32, 48), stride=2, groups=2), machine("cpu")
    settings = layer.settings_of(layer)
    for rows in (1, 100, 10**6):
        dense = [kind.dense_seconds(settings, rows, on, training) for training in (False, True)]
        ours = [kind.factorized_seconds(layer.network, settings, rows, on, training) for training in (False, True)]
        assert 0 < dense[0] < dense[1]
        assert 0 < ours[0] < ours[1]


def test_what_pays_is_predicted_to_and_what_does_not_is_not():
    on = machine("cpu")
    for channels, groups, format, pays in (
        (256, 1, Tucker(0.25), True),
        (256, 1, LowRank(0.25, split="spatial"), True),
        (256, 1, CP(0.1), True),
        (256, 32, LowRank(0.25), False),
        (8, 1, Tucker(0.25), False),
    ):
        layer = tl.FactorizedConv2d(channels, channels, 3, padding=1, groups=groups, format=format)
        settings, rows = layer.settings_of(layer), 16 * 14 * 14
        for training in (False, True):
            dense = layer.dense_seconds(settings, rows, on, training)
            assert (layer.factorized_seconds(layer.network, settings, rows, on, training) < dense) == pays


def test_every_rate_is_measured_here():
    found = measure_conv(repeats=1)
    assert found.keys() == conv_cost.rates(machine("cpu")).keys()
    assert all(rate > 0 for rate in found.values())


def test_a_small_convolution_is_timed_without_a_margin_and_a_smaller_one_is_not(monkeypatch):
    """64 channels work long enough that a format in narrow groups is seen to lose; 32 do not."""
    monkeypatch.setattr("tensorlayers.entry.machine", shipped)
    small = torch.nn.Conv2d(64, 64, 3, padding=1)
    entry = tl.plan_conversion(torch.nn.Sequential(small), BTT(12), errors=False)["0"]
    assert not entry.converted
    assert "the time of a training step" in entry.reason
    entry = tl.plan_conversion(torch.nn.Sequential(small), LowRank(0.5), errors=False)["0"]
    assert entry.converted
    before, after = entry.seconds(training=True)
    layer = tl.FactorizedConv2d(64, 64, 3, padding=1, format=LowRank(0.5))
    classed = convolution.conv_plan(layer.network, (3, 3), (1, 1), (), False, 4096)
    assert after == classed.seconds(entry.work.machine, entry.rows, training=True)
    assert after < 1.05 * before
    smaller = tl.plan_conversion(torch.nn.Sequential(torch.nn.Conv2d(32, 32, 3)), BTT(6), errors=False)["0"]
    assert smaller.seconds(training=True) is None
