"""Refusals leave the model unchanged; summaries, the way back, and converted models in use."""

import copy
import io
import pickle
import sys

import pytest
import torch
from torch import nn
from tqdm import tqdm

import tensorlayers as tl
from tensorlayers import TT, LowRank, convert, convert_model, formats, plan_conversion, summarize
from tensorlayers.errors import ConversionError
from tensorlayers.testing import TOLERANCE, relative_error
from tests.convert.support import (
    ATTENTION,
    CONVERTED,
    HALF,
    Net,
    _assert_same,
    _chain,
    _factorized,
    _ids,
    _named,
    _quietly,
    _state,
    _storages,
    both_ways,
    every_format,
)


@both_ways
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_and_nothing_is_changed(value, inplace):
    model = _named(good=nn.Linear(64, 64), bad=nn.Linear(64, 64))
    with torch.no_grad():
        model.bad.weight[3, 5] = value
    before = _state(model)
    with pytest.raises(ConversionError, match=r"'bad'.*finite"):
        convert_model(model, HALF, inplace=inplace)
    assert _factorized(model) == set()
    after = _state(model)
    assert torch.equal(after.pop("bad.weight").nan_to_num(), before.pop("bad.weight").nan_to_num())
    _assert_same(after, before)


@both_ways
def test_a_model_on_the_meta_device_can_be_planned_but_not_converted(inplace):
    with torch.device("meta"):
        model = _chain(64, 128, 64)
    plan = plan_conversion(model, HALF)
    assert plan.converted == ("0", "1")
    assert [entry.error for entry in plan] == [None, None]
    assert plan.parameters == plan_conversion(_chain(64, 128, 64), HALF).parameters
    with pytest.raises(ConversionError, match=r"'0'.*meta"):
        convert_model(model, HALF, inplace=inplace)
    assert _factorized(model) == set()


def _head_tied():
    model = _chain(64, 64, 64)
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("other", "rule"),
    [
        (lambda: _chain(64, 64), "'1' is not in this model"),
        (lambda: _chain(64, 64, 96), r"'1' has shape \(96, 64\) in this model, \(64, 64\) in the plan"),
        (lambda: nn.Sequential(nn.Linear(64, 64), nn.Tanh()), "'1' is not in this model"),
        (_head_tied, "'0' cannot be converted: tied"),
        (lambda: convert_model(_chain(64, 64, 64), HALF), "'0' is not in this model, or not dense any more"),
    ],
)
def test_a_plan_of_another_model_is_refused(other, rule):
    plan, model = plan_conversion(_chain(64, 64, 64), HALF), other()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ConversionError, match=rule):
        convert_model(model, plan, inplace=True)
    assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize("kwargs", [{"force": True}, {"where": lambda name, module: True}])
def test_a_plan_is_already_decided(kwargs):
    model = _chain(64, 64)
    with pytest.raises(ConversionError, match="plan"):
        convert_model(model, plan_conversion(model, HALF), **kwargs)


def test_summarize_tells_what_was_converted_and_what_was_not():
    model = Net()
    plan = plan_conversion(model, {"first": HALF, "shared": TT(2)}, force=True)
    summary = summarize(convert_model(model, plan))
    assert [entry.name for entry in summary] == [entry.name for entry in plan]
    assert summary.converted == ("first", "shared")
    assert summary.parameters == plan.parameters
    assert summary.macs == plan.macs
    for name in summary.converted:
        for field in ("kind", "shape", "layer", "network", "parameters", "macs", "error", "aliases"):
            assert getattr(summary[name], field) == getattr(plan[name], field)
    assert summary["second"].reason == "not converted"
    assert summary["head"].reason == "tied with embed.weight"
    assert summarize(model).converted == ()
    assert summarize(model).parameters == (plan.total,) * 2


def test_the_totals_are_those_of_the_modules():
    model = Net()
    converted = convert_model(model, HALF)
    before, after = (sum(parameter.numel() for parameter in m.parameters()) for m in (model, converted))
    assert plan_conversion(model, HALF).parameters == (before, after)
    assert summarize(converted).parameters == (before, after)


@both_ways
@every_format
def test_to_dense_gives_back_plain_layers(form, inplace):
    model, ids = Net().eval(), _ids()
    converted = convert_model(model, formats.get(form)(4), force=True)
    expected = converted(ids)
    before = _state(converted)
    dense = tl.to_dense(converted, inplace=inplace)
    assert (dense is converted) is inplace
    assert _factorized(dense) == set()
    assert [type(module) for module in dense.modules()] == [type(module) for module in model.modules()]
    assert dense.head.weight is dense.embed.weight
    assert relative_error(dense(ids), expected) <= TOLERANCE[torch.float32]
    dense.load_state_dict(model.state_dict())
    assert torch.equal(dense(ids), model(ids))
    if not inplace:
        _assert_same(_state(converted), before)


@both_ways
def test_what_is_already_converted_is_left_alone(inplace):
    model = _chain(128, 128, 128)
    first = convert_model(model, {"0": LowRank(4)})
    layer, before = first[0], _state(first)
    second = _quietly(first, {"*": LowRank(8)}, inplace=inplace)
    assert [layer.network.ranks for layer in second] == [(4,), (8,)]
    assert (second[0] is layer) is inplace
    _assert_same(_state(second[0]), {name[2:]: tensor for name, tensor in before.items() if name.startswith("0.")})
    with pytest.raises(ConversionError, match="'0' is a FactorizedLinear"):
        convert_model(first, {"0": LowRank(8)})


@every_format
@pytest.mark.parametrize(
    "optimizer", [lambda p: torch.optim.SGD(p, lr=0.05), lambda p: torch.optim.AdamW(p, lr=0.003)], ids=["sgd", "adamw"]
)
def test_a_converted_model_trains(form, optimizer):
    model = _named(up=nn.Linear(64, 96), act=nn.Tanh(), down=nn.Linear(96, 64))
    x = torch.randn(64, 64)
    target = model(x).detach()
    converted = convert_model(model, formats.get(form)(4), force=True)
    steps, losses = optimizer(converted.parameters()), []
    for _ in range(8):
        loss = (converted(x) - target).square().mean()
        steps.zero_grad()
        loss.backward()
        steps.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


@every_format
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_converted_model_can_be_copied(form, copied):
    model, ids = convert_model(Net().eval(), formats.get(form)(4), force=True), _ids()
    other = copied(model)
    assert not _storages(model) & _storages(other)
    assert other.twice[0] is other.shared
    assert torch.equal(other(ids), model(ids))
    assert str(summarize(other)) == str(summarize(model))


def test_a_state_dict_goes_into_a_model_converted_alike():
    model, ids = convert_model(Net().eval(), HALF), _ids()
    other = convert_model(Net().eval(), HALF)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids), model(ids))


def test_the_progress_bar_names_the_layer_that_is_worked_on(monkeypatch):
    stream, shown = io.StringIO(), []
    real = formats.Format.decompose

    def decompose(self, *args):
        shown.append(stream.getvalue().rpartition("\r")[2])
        return real(self, *args)

    monkeypatch.setattr(convert, "tqdm", lambda *args, **kwargs: tqdm(*args, **{**kwargs, "delay": 0}))
    monkeypatch.setattr(formats.Format, "decompose", decompose)
    monkeypatch.setattr(sys, "stderr", stream)
    convert_model(Net(), HALF, progress=True)
    assert len(shown) == len(CONVERTED)
    for name, line in zip(("first", "second", "shared", *ATTENTION), shown, strict=True):
        assert name in line
    stream.seek(0)
    stream.truncate()
    monkeypatch.setattr(convert, "tqdm", lambda *args, **kwargs: tqdm(*args, **{**kwargs, "delay": 10**6}))
    convert_model(Net(), HALF, progress=True)  # done before it would be shown
    convert_model(Net(), HALF, progress=False)
    convert_model(Net(), HALF)  # this stream is no terminal
    assert stream.getvalue() == ""


def test_a_tied_bias_stays_tied():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].bias = model[0].bias
    plan = plan_conversion(model, LowRank(0.5), errors=False)
    assert [entry.reason for entry in plan] == ["tied with 1.bias", "tied with 0.bias"]
    converted = convert_model(model, LowRank(0.5))
    assert converted[0].bias is converted[1].bias


def test_a_weight_of_eight_bits_stays_as_it_is():
    model = nn.Sequential(nn.Linear(64, 64))
    model[0].weight = nn.Parameter(model[0].weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    assert plan_conversion(model, LowRank(0.5), errors=False)["0"].reason.startswith("quantized")
