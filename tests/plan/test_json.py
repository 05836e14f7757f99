"""A plan to JSON and back, edited and damaged."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import tensorlayers as tl
from tensorlayers import BTT, CP, TT, ConversionPlan, LowRank, Tucker, convert_model, plan_conversion, table
from tensorlayers.errors import ConversionError, FormatError, ModeError, RankError, TensorlayersError
from tensorlayers.plan import VERSION
from tests.junk import places, replaced
from tests.plan.support import _factorized, _plan, _small


@st.composite
def _formats(draw):
    cls = draw(st.sampled_from([LowRank, TT, BTT, Tucker, CP]))
    options = {}
    if cls is not LowRank:
        options["order"] = draw(st.sampled_from([2, 3]))
    if draw(st.booleans()):
        options |= {"in_modes": (8, 9), "out_modes": (5, 13)}
    return cls(draw(st.one_of(st.integers(1, 5000), st.floats(0.2, 1))), **options)


@given(first=_formats(), second=_formats())
def test_a_plan_survives_json(first, second):
    model = nn.Sequential(nn.Linear(64, 65), nn.Linear(72, 64), nn.MultiheadAttention(64, 4), nn.LazyLinear(3))
    plan = _plan(model, {"0": first, "1": second}, force=True)
    again = ConversionPlan.from_json(plan.to_json())
    assert list(again) == list(plan)
    assert str(again) == str(plan)
    assert again.to_json() == plan.to_json()


def test_a_plan_with_errors_and_shared_modules_survives_json():
    model = _small()
    model.third = nn.Sequential(model.first, nn.Linear(96, 64))
    plan = plan_conversion(model, {"third.1": TT((5,)), "*": LowRank(0.5)}, force=True)
    again = ConversionPlan.from_json(plan.to_json())
    assert list(again) == list(plan)
    assert again["third.0"].error == plan["first"].error
    assert set(_factorized(convert_model(model, again))) == {"first", "second", "third.1"}


def _json(**kwargs):
    return json.loads(plan_conversion(_small(), LowRank(0.5), errors=False, **kwargs).to_json())


def test_a_format_edited_in_the_json_takes_effect():
    data = json.loads(plan_conversion(_small(), LowRank(0.5)).to_json())
    data["layers"][0]["format"]["rank"] = 3
    data["layers"][1]["format"] = {"name": "tt", "rank": 2, "in_modes": [8, 12]}
    data["layers"][2]["format"] = None
    plan = ConversionPlan.from_json(json.dumps(data))
    assert plan["first"].network.ranks == (3,)
    assert plan["first"].parameters == (6144, 3 * 160)
    assert plan["first"].macs == (6144, 3 * 160)
    assert plan["second"].network == TT(2, in_modes=(8, 12)).network(64, 96)
    assert plan["third"].parameters == (4096, 4096)
    assert plan.converted == ("first", "second")
    layers = _factorized(convert_model(_small(), plan))
    assert {name: layer.network for name, layer in layers.items()} == {
        name: plan[name].network for name in plan.converted
    }


def test_an_edited_format_does_not_keep_the_error_of_the_old_one():
    before = plan_conversion(_small(), LowRank(0.5))
    data = json.loads(before.to_json())
    data["layers"][0]["format"]["rank"] = 3
    data["layers"][2]["format"] = {"name": "btt", "rank": 0.5}  # of the same parameters and MACs
    plan = ConversionPlan.from_json(json.dumps(data))
    assert plan["third"].parameters == before["third"].parameters
    assert plan["third"].macs == before["third"].macs
    assert [entry.error for entry in plan] == [None, before["second"].error, None]
    assert before["second"].error is not None


@pytest.mark.parametrize("text", ["", "{", "[1, 2", "nan", "plan", "[" * 100_000, "1" * 5_000])
def test_text_that_is_no_json_is_refused(text):
    with pytest.raises(ConversionError, match=r"JSON|version"):
        ConversionPlan.from_json(text)


@pytest.mark.parametrize("version", [0, VERSION - 1, VERSION + 1, str(VERSION), None, [VERSION]])
def test_an_unknown_version_is_refused(version):
    with pytest.raises(ConversionError, match="version") as caught:
        ConversionPlan.from_json(json.dumps(_json() | {"version": version}))
    assert repr(version) in str(caught.value)


@pytest.mark.parametrize("key", ["version", "layers", "total"])
def test_a_missing_part_is_refused(key):
    data = _json()
    del data[key]
    with pytest.raises(ConversionError, match=key):
        ConversionPlan.from_json(json.dumps(data))


@pytest.mark.parametrize("key", ["name", "kind", "settings", "layer", "parameters", "macs"])
def test_a_layer_with_a_missing_field_is_refused(key):
    data = _json()
    del data["layers"][1][key]
    with pytest.raises(ConversionError, match=key):
        ConversionPlan.from_json(json.dumps(data))


_WRONG_SIZES = [
    {"in_features": 96, "out_features": size, "bias": True} for size in ("a", None, 0, -1, 64.5, True, [64], 2**80)
]
FIELDS = {
    "name": [5, None, [], {}, True],
    "kind": [5, None, [], {}],
    "settings": ["64x64", 64, None, [64], {"in_features": 64}, {"size": 64}, *_WRONG_SIZES],
    "stack": [5, "ab", [], [2], [2, 2], [1, 2], [-1, 0], [2, -1], [2.0, 0], [2, True], ["2", 0], {"2": 0}],
    "share": [5, None, [], {}, True],
    "layer": [5, None, [], "conv9d", ""],
    "parameters": [5, None, "ab", [1], [1, 2, 3], ["a", 1], [None, 1], [1.5, 1], {"a": 1, "b": 2}, [-1, 1]],
    "macs": [5, None, "ab", [1], [1, 2, 3], ["a", 1], [None, 1], [1.5, 1], {"a": 1, "b": 2}, [-1, 1]],
    "error": ["x", [], {}, True],
    "aliases": [5, "abc", [5], [None], {"a": 1}],
    "format": [5, "tt", [], {}, {"rank": 3}, {"name": 5, "rank": 3}],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in FIELDS for value in FIELDS[field]], ids=str)
def test_a_field_of_a_wrong_type_is_refused(field, value):
    data = _json()
    data["layers"][1][field] = value
    with pytest.raises(TensorlayersError) as caught:
        ConversionPlan.from_json(json.dumps(data))
    message = str(caught.value)
    assert field in message
    if field != "name":
        assert "second" in message


@pytest.mark.parametrize(
    ("field", "value"), [("reason", 5), ("reason", []), ("blocked", "no"), ("blocked", 5)], ids=str
)
def test_a_reason_or_a_block_of_a_wrong_type_is_refused(field, value):
    data = json.loads(_plan(format={"first": LowRank(3)}).to_json())
    data["layers"][1][field] = value
    with pytest.raises(ConversionError, match=f"second.*{field}|{field}.*second"):
        ConversionPlan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("format", "error", "named"),
    [
        ({"name": "mystery", "rank": 3}, FormatError, "mystery"),
        ({"name": "tt"}, FormatError, "rank"),
        ({"name": "tt", "rank": 3, "colour": 1}, FormatError, "colour"),
        ({"name": "lowrank", "rank": 3, "order": 2}, FormatError, "order"),
        ({"name": "tt", "rank": 3, "order": "2"}, FormatError, "order"),
        ({"name": "tt", "rank": 0}, RankError, "rank 0"),
        ({"name": "tt", "rank": [2, 2]}, RankError, "(2, 2)"),
        ({"name": "tt", "rank": 0.00001}, RankError, "1e-05"),
        ({"name": "tt", "rank": "3"}, RankError, "'3'"),
        ({"name": "tt", "rank": None}, RankError, "None"),
        ({"name": "tt", "rank": 3, "in_modes": [2, 2]}, ModeError, "in_modes"),
        ({"name": "tt", "rank": 3, "out_modes": [8, "8"]}, ModeError, "out_modes"),
        ({"name": "tt", "rank": 3, "out_modes": 64}, ModeError, "out_modes"),
    ],
    ids=str,
)
def test_a_wrong_format_in_the_json_is_refused(format, error, named):
    data = _json()
    data["layers"][1]["format"] = format
    with pytest.raises(error) as caught:
        ConversionPlan.from_json(json.dumps(data))
    assert named in str(caught.value)
    assert "second" in str(caught.value)


@pytest.mark.parametrize("layers", [5, "x", None, {}, {"name": "x"}, [5], [None], [[]], ["x"]], ids=str)
def test_layers_that_are_no_list_of_objects_are_refused(layers):
    with pytest.raises(ConversionError, match="layer"):
        ConversionPlan.from_json(json.dumps(_json() | {"layers": layers}))


@pytest.mark.parametrize("total", ["x", None, [], {}, 1.5, -1], ids=str)
def test_a_total_of_a_wrong_type_is_refused(total):
    with pytest.raises(ConversionError, match="total"):
        ConversionPlan.from_json(json.dumps(_json() | {"total": total}))


def test_a_layer_that_is_listed_twice_is_refused():
    data = _json()
    data["layers"].append(data["layers"][1])
    with pytest.raises(ConversionError, match="second"):
        ConversionPlan.from_json(json.dumps(data))


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 64, 2**40, 0.5, -0.5, 1e300, float("inf"), float("nan")]),
    st.sampled_from(["", "x", "second", "linear", "tt", "\0", "\ud800", "x" * 300]),
    st.sampled_from([[], {}, [1], [1, 2], ["x", "y"], [[]], {"name": "tt"}, {"name": "tt", "rank": 2}]),
)


SOURCE = _json()


@pytest.mark.parametrize("path", list(places(SOURCE)), ids=lambda path: ".".join(map(str, path)) or "all")
@given(junk=JUNK)
def test_any_value_replaced_by_junk_is_refused_or_harmless(path, junk):
    model = _small()
    try:
        plan = ConversionPlan.from_json(json.dumps(replaced(SOURCE, path, junk)))
    except TensorlayersError:
        return
    assert max(map(len, str(plan).splitlines())) <= table.WIDTH
    assert list(ConversionPlan.from_json(plan.to_json())) == list(plan)
    try:
        convert_model(model, plan)
    except TensorlayersError:
        assert _factorized(model) == {}


def _every_kind():
    return nn.ModuleDict(
        {
            "embedding": nn.Embedding(30, 16, padding_idx=3),
            "bag": nn.EmbeddingBag(30, 16, mode="sum"),
            "conv": nn.Conv2d(8, 8, (3, 5), padding=(1, 2), groups=2),
            "transpose": nn.ConvTranspose1d(8, 8, 3, stride=2, output_padding=1),
            "same": nn.Conv1d(8, 8, 3, padding="same", padding_mode="circular"),
            "attention": nn.MultiheadAttention(16, 2),
            "one": nn.Linear(16, 16),
            "two": nn.Linear(16, 16),
        }
    )


def _every_plan():
    return plan_conversion(_every_kind(), {"re:.*": LowRank(2)}, share={"re:one|two": TT(2)}, force=True, errors=False)


def test_a_plan_of_every_layer_kind_survives_json():
    plan = _every_plan()
    again = ConversionPlan.from_json(plan.to_json())
    assert list(again) == list(plan)
    assert len(again.converted) == len(plan)
    assert all(
        entry.settings == plan[entry.name].settings for entry in tl.summarize(convert_model(_every_kind(), again))
    )


def _edited(**fields):
    """The plan of every kind, with fields of the first of the two layers that share cores replaced."""
    data = json.loads(_every_plan().to_json())
    next(layer for layer in data["layers"] if layer["name"] == "one").update(fields)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"stack": None}, "stack and share go together"),
        ({"share": ""}, "stack and share go together"),
        ({"stack": [1, 0]}, "stack is"),
        ({"stack": [3, 0]}, "all there, in order"),
        ({"format": {"name": "tt", "rank": 3}}, "one format for all"),
        ({"format": None}, "all there, in order"),
    ],
    ids=str,
)
def test_a_group_of_layers_is_edited_together_or_not_at_all(fields, rule):
    with pytest.raises(ConversionError, match=rule):
        convert_model(_every_kind(), ConversionPlan.from_json(_edited(**fields)))


def test_layers_that_are_no_group_are_refused():
    plan = plan_conversion(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 24)), LowRank(2), errors=False)
    data = json.loads(plan.to_json())
    for position, layer in enumerate(data["layers"]):
        layer.update(stack=[2, position], share="all")
    with pytest.raises(ConversionError, match="'1' is unlike '0'"):
        convert_model(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 24)), ConversionPlan.from_json(json.dumps(data)))


def test_a_layer_of_another_kind_is_refused():
    plan = plan_conversion(nn.Sequential(nn.Embedding(30, 16)), LowRank(2), force=True, errors=False)
    with pytest.raises(ConversionError, match="'0' is of kind 'linear'; in the plan 'embedding'"):
        convert_model(nn.Sequential(nn.Linear(16, 30)), plan)


EVERY = json.loads(_every_plan().to_json())
STEPS = [path for path in places(EVERY) if "settings" in path]


@given(path=st.sampled_from(STEPS), junk=JUNK)
@example(path=("layers", 0, "settings", "padding_idx"), junk=float("nan"))
@example(path=("layers", 1, "settings", "padding_idx"), junk=float("nan"))
@example(path=("layers", 2, "settings", "stride"), junk=0)
@example(path=("layers", 2, "settings", "stride"), junk=float("nan"))
@example(path=("layers", 2, "settings", "dilation", 1), junk=float("inf"))
@example(path=("layers", 3, "settings", "stride", 0), junk="x")
@example(path=("layers", 3, "settings", "stride", 0), junk={})
def test_junk_in_the_settings_of_any_layer_is_refused_or_harmless(path, junk):
    try:
        plan = ConversionPlan.from_json(json.dumps(replaced(EVERY, path, junk)))
        convert_model(_every_kind(), plan)
    except TensorlayersError:
        return
    assert list(ConversionPlan.from_json(plan.to_json())) == list(plan)
