"""What a plan promises, and editing it."""

import copy

import pytest
import torch
from torch import nn

from tensorlayers import BTT, TT, LowRank, convert_model, formats, plan_conversion
from tensorlayers.errors import ConversionError, FormatError, ModeError, RankError
from tests.plan.support import HALF, _factorized, _model, _plan, _small, every_format


@every_format
@pytest.mark.parametrize("rank", [3, 0.2], ids=str)
def test_a_plan_is_what_the_conversion_does(form, rank):
    model = _small()
    torch.manual_seed(1)
    plan = plan_conversion(model, formats.get(form)(rank), force=True)
    torch.manual_seed(1)
    layers = _factorized(convert_model(model, plan))
    assert tuple(layers) == plan.converted
    assert len(layers) == 3
    for name, layer in layers.items():
        entry = plan[name]
        assert layer.network == entry.network
        assert layer.error == entry.error
        assert sum(core.numel() for core in layer.cores) == entry.parameters[1]
        assert layer.dense_parameters == entry.parameters[0]
    torch.manual_seed(1)
    direct = _factorized(convert_model(model, formats.get(form)(rank), force=True))
    for name, layer in direct.items():
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(layer.cores, layers[name].cores, strict=True))


def test_a_plan_changes_nothing():
    model = _small()
    before = copy.deepcopy(model.state_dict())
    plan_conversion(model, LowRank(0.5))
    assert _factorized(model) == {}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_without_errors_nothing_is_decomposed(monkeypatch):
    def decompose(*_):
        raise AssertionError("decomposed")

    monkeypatch.setattr(formats.Format, "decompose", decompose)
    plan = plan_conversion(_small(), LowRank(0.5), errors=False)
    assert [entry.error for entry in plan] == [None] * 3


def test_the_costs_of_low_rank_by_hand():
    plan = _plan(format=LowRank(10))
    assert plan["first"].parameters == (64 * 96, 10 * (64 + 96))
    assert plan["first"].macs == (64 * 96, 10 * (64 + 96))
    assert plan.total == 64 * 96 + 96 + 96 * 64 + 64 + 64 * 64 + 64
    after = 10 * (160 + 160 + 128)
    assert plan.parameters == (plan.total, after + 96 + 64 + 64)
    assert plan.macs == (2 * 64 * 96 + 64 * 64, after)


def test_advice_is_what_is_not_worth_converting():
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(64, 64), nn.Linear(64, 1), nn.MultiheadAttention(64, 4))
    plan = _plan(model, {"0": TT(0.5), "1": None, "*": HALF})
    slower, larger = plan["0"].reason, plan["2"].reason
    assert slower.startswith("predicted slower: ")
    assert larger.startswith("nothing saved: ")
    groups = f"1 would be slower (e.g. 0: {slower}); 1 would save nothing (e.g. 2: {larger})"
    assert plan.advice == f"2 of 7 layers stay dense: {groups}"
    assert _plan(model, {"1": HALF}).advice == ""


def test_a_plan_that_was_carried_out_gets_its_errors():
    model = _small()
    plan = _plan(format={"second": None, "*": HALF})
    done = plan.with_errors(convert_model(model, plan))
    assert done["second"] == plan["second"]
    assert [entry.error for entry in plan] == [None] * 3
    assert [entry.error for entry in done] == [
        entry.error for entry in plan_conversion(model, {"second": None, "*": HALF})
    ]
    assert done.parameters == plan.parameters


def test_a_plan_is_a_collection_of_entries():
    plan = _plan()
    assert len(plan) == 3
    assert [entry.name for entry in plan] == ["first", "second", "third"]
    assert "first" in plan
    assert "fourth" not in plan
    assert plan["first"].converted
    with pytest.raises(ConversionError, match="fourth"):
        plan["fourth"]


def test_editing_a_layer():
    model, plan = _small(), plan_conversion(_small(), LowRank(0.5))
    assert plan["first"].error is not None
    plan["first"] = TT(3)
    plan["second"] = None
    assert plan["first"].network == TT(3).network(96, 64)
    assert plan["first"].parameters[1] == plan["first"].network.num_parameters
    assert plan["first"].error is None  # that of another format
    assert plan["second"].reason == "asked to stay dense"
    assert plan["second"].parameters == plan["second"].macs == (6144, 6144)
    assert plan.converted == ("first", "third")
    layers = _factorized(convert_model(model, plan))
    assert {name: layer.network for name, layer in layers.items()} == {
        name: plan[name].network for name in ("first", "third")
    }
    plan["second"] = LowRank(1000)  # an edit is not weighed again
    assert set(_factorized(convert_model(model, plan))) == {"first", "second", "third"}


def test_editing_by_an_alias():
    shared = nn.Linear(64, 64)
    plan = _plan(nn.ModuleDict({"a": shared, "b": shared}))
    assert "b" in plan
    plan["b"] = LowRank(3)
    assert plan["a"].network.ranks == (3,)
    assert len(plan) == 1


def test_a_blocked_layer_cannot_be_converted():
    model = _model()
    model.head.weight = model.tiny.weight
    plan = _plan(model)
    for name, reason in (("head", "tied with tiny.weight"), ("lazy", "lazy")):
        before = plan[name]
        with pytest.raises(ConversionError, match=f"{name}.*{reason}"):
            plan[name] = LowRank(4)
        plan[name] = None
        assert plan[name] == before  # with its reason


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (0.5, ConversionError),
        ("lowrank", ConversionError),
        (LowRank, ConversionError),
        (LowRank((2, 2)), RankError),
        (TT(2, in_modes=(2, 2)), ModeError),
        (BTT(2, order=1), FormatError),
    ],
    ids=str,
)
def test_a_wrong_edit_is_refused_and_changes_nothing(value, error):
    plan = _plan()
    before = list(plan)
    with pytest.raises(error):
        plan["first"] = value
    with pytest.raises(ConversionError, match="fourth"):
        plan["fourth"] = LowRank(3)
    assert list(plan) == before


def test_the_entry_of_another_layer_is_refused():
    plan = _plan()
    with pytest.raises(ConversionError, match="first"):
        plan["first"] = plan["second"]
    assert [entry.name for entry in plan] == ["first", "second", "third"]
