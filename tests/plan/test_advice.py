"""What a plan says would pay in place of a format that does not: that it is true, found fast, and kept."""

import dataclasses
import json
import math
import re

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tensorlayers as tl
from tensorlayers import BTT, CP, TT, ConversionPlan, LowRank, Tucker, advice, fastest_modes, formats
from tensorlayers.advice import Asked, advise
from tensorlayers.cost import SLOWER
from tensorlayers.entry import SMALL, TINY
from tensorlayers.errors import CostModelError, FormatError, NetworkError
from tests.machine import IDEAL, TYPICAL
from tests.plan.support import _plan, every_format

SETTINGS = (("in_features", 768), ("out_features", 384))
ASKED = Asked("linear", SETTINGS, TT(0.1), None, 1024, TYPICAL, True)
PIECE = re.compile(r"(up to )?(\w+\(.*\)) \((\d+\.\d\d) x the (time|MACs)\)")


pytestmark = pytest.mark.usefixtures("ideal")


@pytest.fixture
def small(monkeypatch):
    """Small layers have no estimate, as they have for users."""
    monkeypatch.setattr("tensorlayers.entry.SMALL", SMALL)
    monkeypatch.setattr("tensorlayers.decide.TINY", TINY)


def _said(advice):
    """The formats that a piece of advice prints, as Python reads them, each with its cost and what that is a cost in;
    the largest rank apart, None where there is none."""
    pieces = [PIECE.fullmatch(piece).groups() for piece in advice.partition("; pays: ")[2].split(", or ")]
    found = [(bool(rank), eval(text, {}, vars(tl)), float(cost), by) for rank, text, cost, by in pieces]
    return next((rest for rank, *rest in found if rank), None), [rest for rank, *rest in found if not rank]


@pytest.mark.parametrize("format", [TT(0.1), TT(0.3), CP(0.15), TT((40,))], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_what_is_said_to_pay_is_predicted_to(format, training):
    asked = dataclasses.replace(ASKED, format=format, training=training)
    network = asked.network(format)
    said = advise(asked)
    assert said.partition("; pays: ")[0] == (
        f"{format} at 384x768: {asked.macs(network):.2f} x the MACs of dense, {asked.cost(network):.2f} x the time"
    )
    (largest, cost, _), others = _said(said)
    assert dataclasses.replace(largest, rank=format.rank) == format
    assert f"{asked.cost(asked.network(largest)):.2f}" == f"{cost:.2f}"
    for smaller in (1, largest.rank // 2, largest.rank):
        assert asked.cost(asked.network(dataclasses.replace(format, rank=max(1, smaller)))) <= 1
    # Within a tenth, and then rounded down to a multiple of 4.
    assert asked.cost(asked.network(dataclasses.replace(format, rank=math.ceil(1.1 * (largest.rank + 3)) + 1))) > 1
    assert largest.rank < 8 or largest.rank % 4 == 0
    same = [type(found) is type(format) for found, *_ in others]  # with other modes; those may not pay in training
    assert same == [True, False] or (training and same == [False])
    for found, cost, by in others:
        assert asked.network(found).num_parameters <= network.num_parameters
        assert f"{asked.cost(asked.network(found)):.2f}" == f"{cost:.2f}"
        assert (by, cost < 1) == ("time", True)


LAYERS = {
    "linear": nn.Linear(256, 320),
    "tall": nn.Linear(768, 192),
    "few": nn.Linear(256, 10),
    "conv": nn.Conv2d(96, 128, 3, padding=1),
    "tensor": tl.TensorLinear((16, 16), (12, 20)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("format", [TT(0.4), Tucker(0.9), BTT(0.98), CP(0.93), CP(2 / 3)], ids=str)
@pytest.mark.parametrize("estimate", ["times", "MACs"])
def test_what_is_advised_can_be_typed_and_is_then_converted(layer, format, estimate, typical, monkeypatch):
    monkeypatch.setattr("tensorlayers.entry.SMALL", 0 if estimate == "times" else 2**40)
    model = nn.Sequential(LAYERS[layer])
    said = _plan(model, format)["0"].advice
    if "; pays: " in said:
        rank, others = _said(said)
        for found, cost, by in filter(None, [rank, *others]):
            entry = _plan(model, found)["0"]
            assert entry.converted
            assert by == ("time" if estimate == "times" else "MACs")
            if by == "MACs":
                assert f"{entry.macs[1] / entry.macs[0]:.2f}" == f"{cost:.2f}"
            for part in re.findall(r"0\.\d+", str(found)):
                assert len(part.removeprefix("0.").lstrip("0")) <= 3 or found.rank == format.rank


@pytest.mark.parametrize("format", [TT(0.1), TT(0.3), CP(0.3), Tucker(0.9), TT((40,)), CP(400)], ids=str)
@pytest.mark.parametrize("sizes", [(768, 384), (512, 512), (256, 1024)], ids=str)
@pytest.mark.parametrize("machine", [IDEAL, TYPICAL], ids=["ideal", "typical"])
def test_the_other_format_is_the_fastest_of_all_registered(format, sizes, machine):
    settings = tuple(zip(("in_features", "out_features"), sizes, strict=True))
    asked = dataclasses.replace(ASKED, settings=settings, format=format, machine=machine)
    network = asked.network(format)
    others = [cls(asked.fraction(network)) for cls in formats.available().values() if cls is not type(format)]
    networks = [n for n in map(asked.network, others) if n.num_parameters >= 0.9 * network.num_parameters]
    least = min(map(asked.cost, networks))
    named = [found for found, *_ in _said(advise(asked))[1] if type(found) is not type(format)]
    assert len(named) == (least < min(1, asked.cost(network)))
    assert [asked.cost(asked.network(found)) for found in named] in ([least], [])


def test_formats_of_the_same_macs_are_both_compared():
    """BTT of this shape has the parameters and MACs of LowRank, but more operations."""
    asked = dataclasses.replace(ASKED, settings=(("in_features", 768), ("out_features", 3072)))
    fraction = asked.fraction(asked.network(asked.format))
    low, block = (asked.network(cls(fraction)) for cls in (LowRank, BTT))
    assert asked.macs(low) == asked.macs(block)
    assert asked.cost(low) < asked.cost(block)
    _, others = _said(advise(asked))
    assert others[-1][0] == LowRank(fraction)


def test_where_macs_decide_advice_is_of_macs(small):
    model = nn.Sequential(nn.Linear(256, 10))
    plan = _plan(model, Tucker(0.9))
    assert plan["0"].seconds(training=True) is None
    assert f"{plan['0'].macs[1] / plan['0'].macs[0]:.2f}" == f"{advised(plan):.2f}"
    assert 1 < advised(plan) < SLOWER
    assert "time" not in plan["0"].advice
    (largest, *_), ((other, *_),) = _said(plan["0"].advice)
    assert type(largest) is Tucker
    for format in (largest, other, LowRank(0.25)):
        assert _plan(model, format).converted == ("0",)


def advised(plan):
    """The MACs that the first layer's advice begins with, over those of dense."""
    return float(re.search(r": (\S+) x the MACs of dense", plan["0"].advice)[1])


def test_where_launches_decide_nothing_pays(small):
    plan = _plan(nn.Sequential(nn.Linear(16, 10)), TT(0.4))
    assert "less work than to launch two operations" in plan["0"].reason
    assert plan["0"].advice == (
        f"TT(rank=0.4) at 10x16: {advised(plan):.2f} x the MACs of dense; no smaller rank, other modes or format pays"
    )


def test_advice_is_searched_for_once_a_shape_and_format(monkeypatch, typical):
    asked = []
    search = advice._largest_rank
    monkeypatch.setattr(advice, "_largest_rank", lambda what: asked.append(what) or search(what))
    advice._advise.cache_clear()
    layers = [nn.Linear(256, 192, bias=k % 2 == 0) for k in range(6)] + [nn.Linear(192, 256)]
    plan = _plan(nn.Sequential(*layers), TT(0.5))
    assert len(asked) == 2
    said = [entry.advice for entry in plan]
    assert len(set(said)) == 2
    advice._advise.cache_clear()
    assert [entry.advice for entry in _plan(nn.Sequential(*layers), TT(0.5))] == said


def test_advice_is_printed_warned_of_and_kept_in_files(typical):
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256), nn.Linear(64, 64))
    plan = _plan(model, {"2": None, "*": TT(0.5)})
    said = plan["0"].advice
    assert said == plan["1"].advice == plan.alternatives
    assert said.startswith("TT(rank=0.5) at 256x256: ")
    assert plan["2"].advice == ""
    assert f"note: {said} (2 layers)" in " ".join(str(plan).split())
    with pytest.warns(UserWarning, match="2 of 3 layers stay dense") as caught:
        tl.convert_model(model, {"2": None, "*": TT(0.5)})
    (warning,) = caught
    assert str(warning.message) == f"{plan.advice}. force=True converts them all the same. {said}"
    again = ConversionPlan.from_json(plan.to_json())
    assert list(again) == list(plan)
    data = json.loads(plan.to_json())
    data["layers"][0]["format"] = {"name": "lowrank", "rank": 2}
    assert [bool(entry.advice) for entry in ConversionPlan.from_json(json.dumps(data))] == [False, True, False]
    plan["0"] = LowRank(2)
    assert plan["0"].advice == ""


def test_a_converted_layer_with_more_macs_than_dense_has_advice_too(monkeypatch):
    for name, time in (("dense_seconds", 1.0), ("factorized_seconds", 1.01)):
        monkeypatch.setattr(tl.FactorizedLinear, name, classmethod(lambda cls, *_, time=time: time))
    model = nn.Sequential(nn.Linear(256, 256))
    plan = _plan(model, TT(0.5))
    assert plan.converted == ("0",)
    assert plan.advice == ""
    count = "1 of 1 layers are converted though they have more MACs than dense (e.g. 0)"
    assert plan.alternatives == f"{count}. {plan['0'].advice}"
    assert "1.06 x the MACs of dense, 1.01 x the time; " in plan.alternatives
    with pytest.warns(UserWarning, match="1 of 1 layers are converted though") as caught:
        tl.convert_model(model, TT(0.5))
    (warning,) = caught
    assert str(warning.message) == plan.alternatives


def test_notes_on_layers_that_stay_dense_and_on_those_converted_are_apart(monkeypatch):
    def seconds(cls, network, settings, *_):
        return 1.01 if settings["out_features"] == 256 else 1.2

    monkeypatch.setattr(tl.FactorizedLinear, "dense_seconds", classmethod(lambda *_: 1.0))
    monkeypatch.setattr(tl.FactorizedLinear, "factorized_seconds", classmethod(seconds))
    plan = _plan(nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 320), nn.Linear(256, 256)), TT(0.5))
    assert plan.converted == ("0", "2")
    count = "2 of 3 layers are converted though they have more MACs than dense (e.g. 0)"
    assert plan.alternatives == f"{plan['1'].advice}. {count}. {plan['0'].advice}"


def test_a_warning_gives_a_few_pieces_of_advice_and_counts_the_others(typical):
    model = nn.Sequential(*(nn.Linear(256, 16 * k) for k in range(12, 17)))
    plan = _plan(model, TT(0.5))
    assert plan.alternatives.count("x the MACs of dense") == 3
    assert plan.alternatives.endswith(". The plan has 2 more such notes")


def test_no_modes_are_advised_where_none_can_be_chosen(typical):
    """The channels of a convolution are not split."""
    plan = _plan(nn.Sequential(nn.Conv2d(64, 64, 3)), CP(0.9))
    assert "in_modes" not in plan["0"].advice
    assert plan["0"].advice.startswith("CP(rank=0.9) at 64x64x3x3: ")


def test_layers_that_are_factorized_jointly_get_advice_together(typical):
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    plan = tl.plan_conversion(model, share={"re:.*": TT(0.5)}, errors=False)
    assert plan.converted == ()
    assert len({entry.advice for entry in plan} - {""}) == 1


@every_format
@settings(max_examples=5)
@given(out=st.integers(8, 700), into=st.integers(8, 700), rank=st.sampled_from([3, 0.3]), training=st.booleans())
def test_the_fastest_modes_are_never_predicted_slower_than_the_formats_own(form, out, into, rank, training):
    format = formats.get(form)(rank)
    fast = fastest_modes(format, out, into, 256, TYPICAL, training=training)
    assert type(fast) is type(format)
    assert math.prod(fast.in_modes) >= into
    assert math.prod(fast.out_modes) >= out
    asked = Asked("linear", (("in_features", into), ("out_features", out)), format, None, 256, TYPICAL, training)
    ours, theirs = fast.network(out, into), format.network(out, into)
    assert 0.9 * theirs.num_parameters <= ours.num_parameters
    assert ours.num_parameters <= (theirs.num_parameters if rank == 3 else 0.3 * out * into)
    assert asked.cost(ours) <= asked.cost(theirs)
    assert fastest_modes(format, out, into, 256, TYPICAL, training=training) == fast


def test_a_tensor_train_is_faster_with_skewed_modes():
    fast = fastest_modes(TT(0.1), 3072, 768, machine=TYPICAL)
    assert fast.rank == 0.1
    own, asked = (
        TT(0.1).network(3072, 768),
        dataclasses.replace(ASKED, settings=(*SETTINGS[:1], ("out_features", 3072))),
    )
    assert asked.cost(fast.network(3072, 768)) < 0.5 < 1 < asked.cost(own)


def test_a_rank_that_is_a_number_becomes_a_fraction_of_its_parameters():
    fast = fastest_modes(TT(40), 384, 768, machine=TYPICAL)
    assert isinstance(fast.rank, float)
    own = TT(40).network(384, 768).num_parameters
    assert 0.9 * own < fast.network(384, 768).num_parameters <= own


def test_a_format_that_fits_no_modes_is_refused():
    with pytest.raises(tl.RankError):
        fastest_modes(TT(0.001), 16, 10, machine=TYPICAL)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "rule"),
    [((TT(0.1), wrong, 768), {}, NetworkError, "out_features: an integer") for wrong in (3072.0, 0, True, "3072", None)]
    + [((TT(0.1), 768, wrong), {}, NetworkError, "in_features: an integer") for wrong in (3072.0, -1, [768])]
    + [((TT(0.1), 768, 768, wrong), {}, NetworkError, "rows: an integer of at least 1") for wrong in (0, 2.0, None)]
    + [((wrong, 768, 768), {}, FormatError, "format: a format such as") for wrong in (0.1, "tt", TT, None)]
    + [((TT(0.1), 768, 768), {"machine": wrong}, CostModelError, "machine: a Machine") for wrong in ("cpu", 1)],
    ids=str,
)
def test_wrong_arguments_are_refused(arguments, options, error, rule):
    with pytest.raises(error, match=f"{rule}.*; got "):
        fastest_modes(*arguments, **options)


def test_a_refused_size_does_not_reach_later_plans():
    model = nn.Sequential(nn.Linear(768, 3072))
    before = _plan(model, TT(0.1))
    with pytest.raises(NetworkError):
        fastest_modes(TT(0.1), 3072.0, 768, machine=TYPICAL)
    for cls in (TT, BTT):
        with pytest.raises(tl.ModeError):
            cls(0.1).network(3072.0, 768)
    assert list(_plan(model, TT(0.1))) == list(before)
    fast = fastest_modes(TT(0.1), numpy.int64(3072), 768, numpy.int32(1024), TYPICAL)
    assert fast == fastest_modes(TT(0.1), 3072, 768, machine=TYPICAL)
    assert {type(mode) for mode in (*fast.in_modes, *fast.out_modes)} == {int}
