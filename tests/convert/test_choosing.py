"""Which layers are converted: keys, and what would not pay."""

import warnings

import pytest
import torch
from torch import nn

from tensorlayers import BTT, CP, TT, LowRank, convert_model, plan_conversion, summarize, to_dense
from tensorlayers.errors import ConversionError, FormatError, ModeError, RankError
from tests.convert.support import HALF, Net, _chain, _factorized, _named, _quietly, _reasons


def _blocks():
    block = lambda: _named(up=nn.Linear(64, 128), down=nn.Linear(128, 64))  # noqa: E731
    return _named(layers=nn.Sequential(block(), block()), head=nn.Linear(64, 64))


def _ranks(keys):
    plan = plan_conversion(_blocks(), keys, errors=False)
    return {entry.name: entry.format.rank for entry in plan if entry.converted}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"head": 4}, {"head": 4}),
        ({r"re:layers\.\d+\.up": 4}, {"layers.0.up": 4, "layers.1.up": 4}),
        ({"re:up|.*up": 4}, {"layers.0.up": 4, "layers.1.up": 4}),
        ({"layers.0.up": 4, r"re:.*\.up": 5}, {"layers.0.up": 4, "layers.1.up": 5}),
        ({r"re:.*\.up": 5, "layers.0.up": 4}, {"layers.0.up": 5, "layers.1.up": 5}),
        ({"*": 3, "head": 4, r"re:layers\.1\..*": None}, {"layers.0.up": 3, "layers.0.down": 3, "head": 4}),
        ({r"re:layers.*": None, "*": 3}, {"head": 3}),
        ({"*": None}, {}),
    ],
)
def test_the_first_key_that_matches_wins_and_a_star_is_last(keys, expected):
    assert _ranks({key: None if rank is None else LowRank(rank) for key, rank in keys.items()}) == expected


def test_a_pattern_matches_the_whole_name():
    with pytest.raises(ConversionError, match=r"re:up"):
        _ranks({"re:up": HALF})


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("layers.0", "Sequential"),
        ("layers.7.up", "layers.7.up"),
        ("Head", "Head"),
        ("re:nothing.*", "re:nothing"),
        ("re:(", "not a regular expression"),
        ("", "Sequential"),
    ],
)
def test_a_key_that_matches_nothing_is_refused(key, named):
    for extra in ({}, {"*": HALF}):
        with pytest.raises(ConversionError, match="formats") as caught:
            plan_conversion(_blocks(), {key: HALF, **extra})
        assert repr(key) in str(caught.value)
        assert named in str(caught.value)


@pytest.mark.parametrize("value", [0.5, "lowrank", LowRank, 8, (HALF,), {"rank": 4}])
def test_a_value_that_is_no_format_is_refused(value):
    with pytest.raises(ConversionError, match="head"):
        convert_model(_blocks(), {"head": value})
    if not isinstance(value, dict):
        with pytest.raises(ConversionError, match="format"):
            convert_model(_blocks(), value)


@pytest.mark.parametrize("value", [{}, None, {3: HALF}, {("head",): HALF}])
def test_formats_that_are_no_mapping_of_names_are_refused(value):
    with pytest.raises(ConversionError, match="format"):
        convert_model(_blocks(), value)


def test_where_narrows_the_choice():
    seen = []

    def where(name, module):
        seen.append((name, module))
        return name.endswith("up")

    model = _blocks()
    plan = plan_conversion(model, {"head": LowRank(3), "*": LowRank(4)}, where=where)
    assert plan.converted == ("layers.0.up", "layers.1.up")
    assert {plan[name].reason for name in ("head", "layers.0.down")} == {"asked to stay dense"}
    assert all(model.get_submodule(name) is module for name, module in seen)
    assert _factorized(convert_model(model, LowRank(4), where=where)) == {"layers.0.up", "layers.1.up"}


def test_a_format_that_does_not_fit_names_the_layer():
    cases = [(LowRank((2, 2)), RankError), (TT(4, in_modes=(2, 2)), ModeError), (BTT(4, order=1), FormatError)]
    for format, error in cases:
        model = _blocks()
        with pytest.raises(error, match=r"layers\.0\.up"):
            convert_model(model, format, inplace=True)
        assert _factorized(model) == set()


def test_what_would_be_slower_stays_dense_with_one_warning():
    model = _named(a=nn.Linear(256, 256), b=nn.Linear(256, 256), tanh=nn.Tanh(), c=nn.Linear(256, 256))
    choice = {"c": HALF, "*": TT(0.5)}
    reasons = _reasons(model, choice)
    assert set(reasons) == {"a", "b"}
    forced = plan_conversion(model, choice, errors=False, force=True)
    for name, reason in reasons.items():
        before, after = forced[name].macs
        assert after > 1.05 * before
        assert reason == f"predicted slower: {after / before:.2f} x the MACs"
    with pytest.warns(UserWarning, match="2 of 3 layers stay dense: 2 would be slower") as caught:
        converted = convert_model(model, choice)
    assert _factorized(converted) == {"c"}
    (warning,) = caught
    for part in (reasons["a"], "force=True"):
        assert part in str(warning.message)
    assert warning.filename == __file__
    assert _factorized(_quietly(model, choice, force=True)) == {"a", "b", "c"}


def test_where_nothing_is_saved_a_layer_stays_dense():
    model = _chain(128, 128)
    with pytest.warns(UserWarning, match=r"1 of 1 layers stay dense: 1 would save nothing.*force=True"):
        converted = convert_model(model, LowRank(64))
    assert _factorized(converted) == set()
    assert _reasons(model, LowRank(64)) == {"0": "nothing saved: 1.00 x the parameters"}
    assert _factorized(_quietly(model, LowRank(64), force=True)) == {"0"}
    assert _factorized(_quietly(model, LowRank(63))) == {"0"}


def test_both_economic_reasons_share_one_warning():
    model = _named(slow=nn.Linear(256, 256), large=nn.Linear(256, 256))
    with pytest.warns(
        UserWarning, match=r"2 of 2 .*1 would be slower \(e.g. slow.*1 would save nothing \(e.g. large"
    ) as w:
        convert_model(model, {"slow": TT(0.5), "large": LowRank(200)})
    assert len(w) == 1


def test_what_was_asked_to_stay_dense_is_no_reason_to_warn():
    model = Net()
    assert _factorized(_quietly(model, {"first": HALF, "*": None})) == {"first"}
    assert _factorized(_quietly(model, {"first": HALF})) == {"first"}
    assert _factorized(_quietly(model, HALF, where=lambda name, module: name == "first")) == {"first"}


def test_a_plan_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = plan_conversion(_chain(256, 256), TT(0.5))
        assert plan.converted == ()
        convert_model(_chain(256, 256), plan)


def test_a_fraction_that_one_small_layer_cannot_reach():
    """LowRank at rank 1 has 65 of the 64 parameters of a layer with one output."""
    model = _named(body=nn.Linear(64, 64), score=nn.Linear(64, 1))
    with pytest.warns(UserWarning, match="1 of 2 layers stay dense: 1 would save nothing"):
        converted = convert_model(model, HALF)
    assert _factorized(converted) == {"body"}
    reason = plan_conversion(model, HALF)["score"].reason
    assert reason.startswith("nothing saved: ")
    assert "1.016" in reason  # the smallest fraction there is
    for choice, kwargs in (({"score": HALF, "*": HALF}, {}), (HALF, {"force": True})):
        with pytest.raises(RankError, match=r"'score'.*1\.016"):
            convert_model(model, choice, inplace=True, **kwargs)
    assert _factorized(model) == set()


def test_planning_leaves_the_random_numbers_alone():
    model = nn.Sequential(nn.Linear(64, 64))
    torch.manual_seed(5)
    plan = plan_conversion(model, CP(8), force=True)
    converted = convert_model(model, plan)
    assert converted[0].error == plan["0"].error
    torch.manual_seed(5)
    assert convert_model(model, plan)[0].error == plan["0"].error


@pytest.mark.parametrize(
    "wrong", [None, 3, "model", nn.Linear, [nn.Linear(4, 4)]], ids=["None", "int", "str", "class", "list"]
)
def test_what_is_no_model_is_refused(wrong):
    calls = (
        lambda: plan_conversion(wrong, HALF),
        lambda: convert_model(wrong, HALF),
        lambda: summarize(wrong),
        lambda: to_dense(wrong),
    )
    for call in calls:
        with pytest.raises(ConversionError, match=rf"^model: an nn\.Module; got {type(wrong).__name__}$"):
            call()
