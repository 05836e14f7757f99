"""The table that a plan prints."""

from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from tensorlayers import BTT, TT, ConversionPlan, LowRank, Tucker, plan_conversion, table
from tensorlayers.entry import Entry
from tests.machine import TYPICAL, predict
from tests.plan.support import _model, _small


def test_the_table(monkeypatch):
    """With times that stand in for predicted ones: 1 us a dense parameter, 2 a factorized one; in training thrice."""

    def seconds(entry, *, training):
        before, after = entry.parameters
        by = 3e-6 if training else 1e-6
        return (by * before, by * (2 * after if entry.converted else before)) if entry.settings else None

    predict(monkeypatch, TYPICAL)
    monkeypatch.setattr(Entry, "seconds", seconds)
    keys = {
        "up": BTT(0.25),
        "gate": TT(8),
        "down": LowRank(0.5),
        "head": Tucker(1000),
        "attention.out_proj": LowRank(16),
    }
    plan = plan_conversion(_model(), {**keys, "tiny": None}, errors=False, force=True)
    assert (
        str(plan)
        == """\
conversion plan
layer       kind    shape     format   modes        ranks      params        MACs          forward     training    error
up          Linear  1024x256  BTT      256x4|2x128  21         262k->64.5k   262k->64.5k   260->130ms  790->390ms  -
gate        Linear  1024x256  TT       32x32|16x16  8          262k->8.19k   262k->197k    260->16ms   790->49ms   -
down        Linear  256x1024  LowRank  -            102        262k->131k    262k->131k    260->260ms  790->780ms  -
head        Linear  17x256    Tucker   3x6|16x16    3,6,16,16  4.35k->5.17k  4.35k->4.79k  4.4->10ms   13->31ms    -
tiny        Linear  1x64      dense: asked to stay dense
a.q_proj    Linear  64x64     dense: no key matches
a.k_proj    Linear  64x64     dense: no key matches
a.v_proj    Linear  64x64     dense: no key matches
a.out_proj  Linear  64x64     LowRank  -            16         4.1k->2.05k   4.1k->2.05k   4.1->4.1ms  12->12ms    -
lazy        Linear            dense: lazy: it has no shape before its first forward
note: rank r_o1 clamped from 1000 to 3, the largest useful (1 layer)
note: rank r_o2 clamped from 1000 to 6, the largest useful (1 layer)
note: rank r_i1 clamped from 1000 to 16, the largest useful (1 layer)
note: rank r_i2 clamped from 1000 to 16, the largest useful (1 layer)
note: out 17 padded to 18 = 3 x 6 (1 layer)
5 of 10 layers converted; parameters 809,810 -> 225,407 (27.8%)
MACs a row of these layers 807,232 -> 410,872 (50.9%)
predicted time of 1,024 rows: forward 810ms -> 430ms (53.7%); training step 2.4s -> 1.3s (53.7%)
by the constants of 'typical' (float32, measured)"""
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


SETTINGS = {"in_features": 768, "out_features": 3072, "bias": True}


def _table(names, reasons, kind="Linear"):
    """Some wide rows, some dense ones."""
    format, entries = Tucker((8, 4, 3, 2, 9, 5, 4, 3), order=4), []
    for position, name in enumerate(names):
        entry = Entry(name, kind, "linear", SETTINGS, parameters=(10**9, 10**9), macs=(10**9, 10**9))
        dense = reasons and position % 2
        entries.append(entry.dense(reasons[position % len(reasons)]) if dense else entry.with_format(format))
    return str(ConversionPlan(entries, 10**12))


@given(names=NAMES, reasons=st.lists(WORDS, max_size=4), kind=st.sampled_from(["Linear", "K" * 40]))
@example(names=["a." * 60 + "z", "b"], reasons=["r" * 300], kind="Linear")
@example(names=["x" * 240], reasons=[], kind="Linear")
def test_no_line_is_wider_than_the_table(names, reasons, kind):
    lines = _table(names, reasons, kind).splitlines()
    assert max(map(len, lines)) <= table.WIDTH
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
