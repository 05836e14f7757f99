"""ConversionPlan: the table, editing, JSON there and back, and what it promises about the conversion."""

import copy
import json
from collections import OrderedDict

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import tensorlayers as tl
from tensorlayers import BTT, CP, TT, ConversionPlan, LowRank, Tucker, convert_model, formats, plan_conversion
from tensorlayers.errors import ConversionError, FormatError, ModeError, RankError, TensorlayersError
from tensorlayers.plan import Entry

every_format = pytest.mark.parametrize("form", formats.available())


def _model():
    return nn.Sequential(
        OrderedDict(
            up=nn.Linear(256, 1024),
            gate=nn.Linear(256, 1024),
            down=nn.Linear(1024, 256),
            head=nn.Linear(256, 17),
            tiny=nn.Linear(64, 1),
            attention=nn.MultiheadAttention(64, 4),
            lazy=nn.LazyLinear(4),
        )
    )


def _small():
    return nn.Sequential(OrderedDict(first=nn.Linear(64, 96), second=nn.Linear(96, 64), third=nn.Linear(64, 64)))


HALF = LowRank(0.5)


def _plan(model=None, format=HALF, **kwargs):
    return plan_conversion(model or _small(), format, errors=False, **kwargs)


def _factorized(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, tl.FactorizedLinear)}


# ------------------------------------------------------------------------------------------------------- the table


def test_the_table():
    keys = {"up": BTT(0.25), "gate": TT(8), "down": LowRank(0.5), "head": Tucker(1000)}
    plan = plan_conversion(_model(), {**keys, "tiny": None}, errors=False, force=True)
    assert (
        str(plan)
        == """\
conversion plan
layer           kind    shape     format   modes        ranks      params        MACs          error
up              Linear  1024x256  BTT      256x4|2x128  21         262k->64.5k   262k->64.5k   -
gate            Linear  1024x256  TT       32x32|16x16  8          262k->8.19k   262k->197k    -
down            Linear  256x1024  LowRank  -            102        262k->131k    262k->131k    -
head            Linear  17x256    Tucker   3x6|16x16    3,6,16,16  4.35k->5.17k  4.35k->4.79k  -
tiny            Linear  1x64      dense: asked to stay dense
a.out_proj      Linear  64x64     dense: nn.MultiheadAttention reads its weight itself
lazy            Linear            dense: lazy: it has no shape before its first forward
note: rank r_o1 clamped from 1000 to 3, the largest useful (1 layer)
note: rank r_o2 clamped from 1000 to 6, the largest useful (1 layer)
note: rank r_i1 clamped from 1000 to 16, the largest useful (1 layer)
note: rank r_i2 clamped from 1000 to 16, the largest useful (1 layer)
note: out 17 padded to 18 = 3 x 6 (1 layer)
4 of 7 layers converted; parameters 809,810 -> 227,455 (28.1%)
MACs a row of these layers 794,944 -> 400,632 (50.4%)"""
    )


def test_the_error_is_in_the_table():
    plan = plan_conversion(_small(), LowRank(0.5))
    for entry in plan:
        assert 0.1 < entry.error < 1
        assert f"{entry.error:.3f}" in str(plan)


NAMES = st.lists(
    st.lists(st.text("abcxyz_019", min_size=1, max_size=24), min_size=1, max_size=7).map(".".join),
    min_size=1,
    max_size=8,
    unique=True,
)
WORDS = st.lists(st.text("abcdefghij:()'.,", min_size=1, max_size=30), min_size=1, max_size=40).map(" ".join)


def _table(names, reasons, kind="Linear"):
    """Some wide rows, some dense ones."""
    format, entries = Tucker((8, 4, 3, 2, 9, 5, 4, 3), order=4), []
    for position, name in enumerate(names):
        entry = Entry(name, kind, (3072, 768), "linear", parameters=(10**9, 10**9), macs=(10**9, 10**9))
        dense = reasons and position % 2
        entries.append(entry.dense(reasons[position % len(reasons)]) if dense else entry.with_format(format))
    return str(ConversionPlan(entries, 10**12))


@given(names=NAMES, reasons=st.lists(WORDS, max_size=4), kind=st.sampled_from(["Linear", "K" * 40]))
@example(names=["a." * 60 + "z", "b"], reasons=["r" * 300], kind="Linear")
@example(names=["x" * 240], reasons=[], kind="Linear")
def test_no_line_is_wider_than_100_columns(names, reasons, kind):
    lines = _table(names, reasons, kind).splitlines()
    assert max(map(len, lines)) <= 100
    assert [line for line in lines if line != line.rstrip()] == []


@given(names=NAMES.filter(lambda names: max(map(len, names)) <= 80), reasons=st.lists(WORDS, max_size=4))
@example(names=["encoder.one.dense", "embed.one.dense", "e.one.dense"], reasons=[])
@example(
    names=[f"{side}.layers.{k}.attention.projection" for side in ["decode", "deform"] for k in range(2)], reasons=[]
)
def test_every_layer_has_a_label_of_its_own(names, reasons):
    """A label is a row's first cell, or a name on a line of its own above its row."""
    lines = _table(names, reasons).splitlines()[2:]
    labels = [line.partition(" ")[0] for line in lines if line[0] != " "][: len(names)]
    assert len(set(labels)) == len(names)
    for name, label in zip(names, labels, strict=True):
        parts, shown = name.split("."), label.split(".")
        assert len(parts) == len(shown)
        assert all(part.startswith(start) for part, start in zip(parts, shown, strict=True))
        assert parts[-1] == shown[-1]


@given(reason=WORDS)
def test_a_reason_is_printed_whole(reason):
    assert " ".join(reason.split()) in " ".join(_table(["a", "b"], [reason]).split())


def test_notes_tell_what_was_padded_and_clamped_and_of_how_many_layers():
    model = nn.Sequential(*(nn.Linear(17, 30522) for _ in range(2)), nn.Linear(64, 64))
    plan = plan_conversion(model, {"2": LowRank(1000), "*": TT(2, order=2)}, errors=False, force=True)
    rows, columns = (plan["0"].network.mode_sizes(role) for role in ("out", "in"))
    for size, modes in ((30522, rows), (17, columns)):
        padded = modes[0] * modes[1]
        assert padded >= size
        note = f"padded to {padded} = {modes[0]} x {modes[1]}"
        assert (note in " ".join(plan["0"].notes)) is (padded > size)
        assert (f"{size} {note} (2 layers)" in str(plan)) is (padded > size)
    assert columns == (3, 6)
    assert plan["2"].notes == ("rank r clamped from 1000 to 64, the largest useful",)
    assert plan["2"].network.ranks == (64,)
    assert "clamped from 1000 to 64, the largest useful (1 layer)" in str(plan)


# ------------------------------------------------------------------------------------------------- what it promises


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
    assert plan.advice == f"2 of 4 layers stay dense: {groups}"
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


# ------------------------------------------------------------------------------------------------------- editing


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
    plan = _plan(_model())
    for name, reason in (("attention.out_proj", "MultiheadAttention"), ("lazy", "lazy")):
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
        (TT(2, order=1), FormatError),
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


# --------------------------------------------------------------------------------------------------------- JSON


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
    data["layers"][2]["format"]["name"] = "btt"  # of the same parameters and MACs
    plan = ConversionPlan.from_json(json.dumps(data))
    assert plan["third"].parameters == before["third"].parameters
    assert plan["third"].macs == before["third"].macs
    assert [entry.error for entry in plan] == [None, before["second"].error, None]
    assert before["second"].error is not None


@pytest.mark.parametrize("text", ["", "{", "[1, 2", "nan", "plan", "[" * 100_000, "1" * 5_000])
def test_text_that_is_no_json_is_refused(text):
    with pytest.raises(ConversionError, match=r"JSON|version"):
        ConversionPlan.from_json(text)


@pytest.mark.parametrize("version", [0, 2, "1", None, [1]])
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


@pytest.mark.parametrize("key", ["name", "kind", "shape", "layer", "parameters", "macs"])
def test_a_layer_with_a_missing_field_is_refused(key):
    data = _json()
    del data["layers"][1][key]
    with pytest.raises(ConversionError, match=key):
        ConversionPlan.from_json(json.dumps(data))


FIELDS = {
    "name": [5, None, [], {}, True],
    "kind": [5, None, [], {}],
    "shape": ["64x64", 64, None, [64], [64, 64, 64], [64, "a"], [64, None], [0, 64], [-1, 64], [64.5, 64], [True, 64]],
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


def _places(value, path=()):
    """The path of every value in plain data."""
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from _places(value[key], (*path, key))


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 64, 2**40, 0.5, -0.5, 1e300, float("inf"), float("nan")]),
    st.sampled_from(["", "x", "second", "linear", "tt", "\0", "\ud800", "x" * 300]),
    st.sampled_from([[], {}, [1], [1, 2], ["x", "y"], [[]], {"name": "tt"}, {"name": "tt", "rank": 2}]),
)


def _replaced(data, path, value):
    if not path:
        return value
    data = copy.copy(data)
    data[path[0]] = _replaced(data[path[0]], path[1:], value)
    return data


SOURCE = _json()


@pytest.mark.parametrize("path", list(_places(SOURCE)), ids=lambda path: ".".join(map(str, path)) or "all")
@given(junk=JUNK)
def test_any_value_replaced_by_junk_is_refused_or_harmless(path, junk):
    model = _small()
    try:
        plan = ConversionPlan.from_json(json.dumps(_replaced(SOURCE, path, junk)))
    except TensorlayersError:
        return
    assert max(map(len, str(plan).splitlines())) <= 100
    assert list(ConversionPlan.from_json(plan.to_json())) == list(plan)
    try:
        convert_model(model, plan)
    except TensorlayersError:
        assert _factorized(model) == {}
