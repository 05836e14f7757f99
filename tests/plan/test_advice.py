"""What a plan says would pay in place of a format that does not: that it is true, found fast, and kept."""

import dataclasses
import json
import math
import re
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tensorlayers as tl
from tensorlayers import CP, TT, ConversionPlan, LowRank, advice, fastest_modes, formats
from tensorlayers.advice import Asked, advise
from tests.machine import IDEAL, TYPICAL, predict
from tests.plan.support import _plan, every_format

SETTINGS = (("in_features", 768), ("out_features", 384))
ASKED = Asked("linear", SETTINGS, TT(0.1), None, 1024, TYPICAL, True)
PAYS = re.compile(r"(?:in_modes=(.+), out_modes=(.+)|(\w+)) at the same parameters \((.+) x the time\)")


@pytest.fixture(autouse=True)
def _ideal(monkeypatch):
    predict(monkeypatch, IDEAL)


@pytest.fixture
def typical(monkeypatch):
    predict(monkeypatch, TYPICAL)


@pytest.mark.parametrize("format", [TT(0.1), TT(0.3), CP(0.15), TT((40,))], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_what_is_said_to_pay_is_predicted_to(format, training):
    asked = dataclasses.replace(ASKED, format=format, training=training)
    network = asked.network(format)
    head, _, pays = advise(asked).partition("; pays: ")
    assert head == (
        f"{format} at 384x768: {asked.macs(network):.2f} x the MACs of dense, {asked.time(network):.2f} x the time"
    )
    rank, *others = pays.split(", or ")
    rank = int(rank.removeprefix("rank <= "))
    for smaller in (1, rank // 2, rank):
        assert asked.time(asked.network(dataclasses.replace(format, rank=max(1, smaller)))) <= 1
    assert asked.time(asked.network(dataclasses.replace(format, rank=math.ceil(1.1 * rank) + 1))) > 1
    assert len(others) == 2
    for other in others:
        in_modes, out_modes, name, time = PAYS.fullmatch(other).groups()
        fraction = network.num_parameters / (768 * 384)
        if name:
            assert name != type(format).__name__
            found = formats.get(name.lower())(fraction)
        else:
            modes = {"in_modes": eval(in_modes), "out_modes": eval(out_modes)}
            found = dataclasses.replace(format, rank=fraction, **modes)
        assert asked.network(found).num_parameters <= network.num_parameters
        assert f"{asked.time(asked.network(found)):.2f}" == time
        assert float(time) < 1


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
    assert plan.alternatives == plan["0"].advice
    assert "1.06 x the MACs of dense, 1.01 x the time; " in plan.alternatives
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing stays dense: the plan's note is enough
        tl.convert_model(model, TT(0.5))


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
    assert asked.time(ours) <= asked.time(theirs)
    assert fastest_modes(format, out, into, 256, TYPICAL, training=training) == fast


def test_a_tensor_train_is_faster_with_skewed_modes():
    fast = fastest_modes(TT(0.1), 3072, 768, machine=TYPICAL)
    assert fast.rank == 0.1
    own, asked = (
        TT(0.1).network(3072, 768),
        dataclasses.replace(ASKED, settings=(*SETTINGS[:1], ("out_features", 3072))),
    )
    assert asked.time(fast.network(3072, 768)) < 0.5 < 1 < asked.time(own)


def test_a_rank_that_is_a_number_becomes_a_fraction_of_its_parameters():
    fast = fastest_modes(TT(40), 384, 768, machine=TYPICAL)
    assert isinstance(fast.rank, float)
    own = TT(40).network(384, 768).num_parameters
    assert 0.9 * own < fast.network(384, 768).num_parameters <= own


def test_a_format_that_fits_no_modes_is_refused():
    with pytest.raises(tl.RankError):
        fastest_modes(TT(0.001), 16, 10, machine=TYPICAL)
