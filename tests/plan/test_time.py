"""The time that a plan predicts: where it comes from, what it decides, and that it stays out of files."""

import json

import pytest
import torch
from torch import nn

import tensorlayers as tl
from tensorlayers import TT, ConversionPlan, FactorizedLinear, LowRank, decision, plan_conversion
from tensorlayers.cost import SLOWER
from tensorlayers.entry import Work
from tensorlayers.errors import ConversionError
from tensorlayers.program import Task
from tests.machine import IDEAL, TYPICAL
from tests.plan.support import HALF, _plan, _small, every_format

pytestmark = pytest.mark.usefixtures("ideal")


def _times(monkeypatch, forward, training, kind=FactorizedLinear):
    """Let the factorized layers of a kind take these times, and the dense ones a second."""
    for name, times in (("dense_seconds", (1.0, 1.0)), ("factorized_seconds", (forward, training))):

        def seconds(cls, *arguments, times=times):
            return times[arguments[-2]]  # of sizes, ..., training, dtype

        monkeypatch.setattr(kind, name, classmethod(seconds))


@every_format
@pytest.mark.parametrize("rows", [1, 1024])
def test_times_are_those_of_the_cost_model(form, rows, typical):
    entry = plan_conversion(_small(), tl.formats.get(form)(0.2), force=True, errors=False, rows=rows)["first"]
    assert entry.seconds(training=False) == (
        decision.dense_seconds(96, 64, rows, TYPICAL),
        decision.MARGIN * decision.predicted(entry.network, Task(rows), TYPICAL),
    )
    assert entry.seconds(training=True) == (
        decision.dense_seconds(96, 64, rows, TYPICAL, x=True, weight=True),
        decision.MARGIN * decision.training_seconds(entry.network, rows, TYPICAL),
    )


def test_dense_layers_take_as_long_as_before():
    for entry in _plan(format={"first": None, "*": HALF}):
        for training in (False, True):
            before, after = entry.seconds(training=training)
            assert (after == before) is (entry.name == "first")


def test_totals_are_sums_over_the_layers_with_an_estimate():
    model = nn.ModuleDict({"table": nn.Embedding(50, 16), "lazy": nn.LazyLinear(4), "a": nn.Linear(64, 64)})
    plan = _plan(model)
    assert plan["table"].seconds(training=True) is None
    assert plan["lazy"].seconds(training=True) is None
    for training in (False, True):
        assert plan.seconds(training=training) == plan["a"].seconds(training=training)
    last = str(plan).splitlines()[-1]
    assert last == "by the constants of 'ideal' (float32, measured); 1 layer without an estimate not counted"


def test_without_any_estimate_no_time_is_printed():
    assert "predicted" not in str(_plan(nn.Sequential(nn.Embedding(50, 16))))


def test_where_the_constants_come_from(monkeypatch):
    monkeypatch.setattr("tensorlayers.entry.machine", tl.machine.machine)
    for count, threads in ((1, "1 thread"), (2, "2 threads")):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        assert str(_plan()).splitlines()[-1] == f"by the constants of 'cpu' ({threads}, float32, as shipped)"
    assert str(_plan(device="cuda:1")).splitlines()[-1] == "by the constants of 'cuda' (float32, as shipped)"


@pytest.mark.parametrize(
    ("forward", "training", "reason"),
    [
        (1.3, 1.2, "predicted slower: 1.30 x the time of a forward (0.50 x the MACs)"),
        (0.5, 1.2, "predicted slower: 1.20 x the time of a training step (0.50 x the MACs)"),
        (SLOWER, SLOWER, ""),
        (0.5, 0.5, ""),
    ],
)
def test_what_is_slower_in_a_forward_or_a_training_step_stays_dense(monkeypatch, forward, training, reason):
    _times(monkeypatch, forward, training)
    model = nn.Sequential(nn.Linear(64, 64))
    assert _plan(model)["0"].reason == reason
    assert _plan(model, force=True).converted == ("0",)
    assert _plan(model, force=True)["0"].advice == ""


@pytest.mark.parametrize("in_training", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_layer_in_evaluation_mode_is_judged_by_its_forward(monkeypatch, in_training, frozen):
    _times(monkeypatch, 0.5, 1.2)
    model = nn.Sequential(nn.Linear(64, 64)).train(in_training).requires_grad_(not frozen)
    assert _plan(model).converted == (("0",) if frozen and not in_training else ())


def test_layers_that_are_factorized_jointly_are_judged_by_their_sum(monkeypatch):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    slow = [1.4]

    def seconds(cls, *_):
        slow.append(slow.pop(0))
        return slow[-1]

    _times(monkeypatch, 0.0, 0.0)
    monkeypatch.setattr(FactorizedLinear, "factorized_seconds", classmethod(seconds))
    joint = {"formats": None, "share": {"re:.*": TT(2)}, "errors": False}
    assert {entry.reason.split(" (")[0] for entry in plan_conversion(model, **joint)} == {
        "predicted slower: 1.40 x the time of a training step"
    }
    slow[:] = [1.4, 0.6]
    assert plan_conversion(model, **joint).converted == ("0", "1")


def test_without_an_estimate_macs_decide(monkeypatch):
    _times(monkeypatch, None, None)
    plan = _plan(nn.Sequential(nn.Linear(256, 256)), TT(0.5))
    assert plan["0"].reason == "predicted slower: 1.06 x the MACs"


@every_format
def test_a_small_layer_stays_dense(form, typical):
    model = nn.Sequential(nn.Linear(16, 10))
    for rank in (0.4, 1):
        plan = _plan(model, tl.formats.get(form)(rank))
        assert plan["0"].reason.startswith("predicted slower: ")
        assert plan["0"].advice.endswith("no smaller rank, other modes or format pays")
    assert _plan(model, tl.formats.get(form)(1), force=True).converted == ("0",)


def test_lookups_that_are_named_are_converted_for_their_memory():
    plan = _plan(nn.Sequential(nn.Embedding(500, 64)), {"0": HALF})
    assert plan.converted == ("0",)
    assert plan["0"].advice == ""


def test_one_row_is_no_plural():
    assert "predicted time of 1 row: " in str(_plan(rows=1))
    assert "predicted time of 2,048 rows: " in str(_plan(rows=2048))


def test_costs_are_stated_for_the_rows_and_the_device_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr("tensorlayers.entry.machine", lambda device: asked.append(device) or IDEAL)
    model = nn.Sequential(nn.Linear(64, 64, device="meta"))
    for device, expected in ((None, "cpu"), ("meta", "cpu"), ("cuda:3", "cuda"), ("cuda", "cuda")):
        asked.clear()
        plan = _plan(model, rows=7, device=device)
        assert plan.work == plan["0"].work == Work(7, expected)
        assert "predicted time of 7 rows" in str(plan)
        assert set(asked) == {expected}
        again = ConversionPlan.from_json(plan.to_json())
        assert again.work == plan.work
        assert str(again) == str(plan)
    few, many = (_plan(model, TT(32), rows=rows, force=True)["0"].macs[1] for rows in (1, 4096))
    assert few > many  # of few rows it does not pay to multiply the cores with each other first


@pytest.mark.parametrize(
    ("options", "rule"),
    [({"rows": rows}, "rows: an integer of at least 1") for rows in (0, -1, 2.5, True, "x", None)]
    + [({"device": device}, "device: ") for device in ("abacus", 3.5)],
    ids=str,
)
def test_wrong_rows_and_devices_are_refused(options, rule):
    with pytest.raises(ConversionError, match=rule):
        _plan(**options)
    with pytest.raises(ConversionError, match=rule):
        tl.convert_model(_small(), HALF, **options)
    with pytest.raises(ConversionError, match=f"plan: {rule}"):
        ConversionPlan.from_json(json.dumps(json.loads(_plan().to_json()) | options))


def test_a_plan_is_decided_for_its_own_rows_and_device():
    for options in ({"rows": 7}, {"device": "cuda"}):
        with pytest.raises(ConversionError, match="rows and device go to plan_conversion"):
            tl.convert_model(_small(), _plan(), **options)


def test_the_rows_decide_what_is_converted(typical):
    """Of few rows a layer takes little but its launches, of which a factorized one has more."""
    layer, format = nn.Sequential(nn.Linear(256, 256)), LowRank(0.25)
    assert tl.convert_model(layer, format, rows=4096) is not layer
    assert _plan(layer, format, rows=4096).converted == ("0",)
    assert _plan(layer, format, rows=2).converted == ()
    with pytest.warns(UserWarning, match="1 of 1 layers stay dense"):
        assert isinstance(tl.convert_model(layer, format, rows=2)[0], nn.Linear)


def test_times_stay_out_of_files():
    """They are of the machine that prints the plan."""
    assert "seconds" not in _plan().to_json()


def test_a_frozen_layer_takes_the_time_of_a_dense_one():
    model = nn.Sequential(FactorizedLinear(64, 64, format=LowRank(4)))
    free = tl.summarize(model)["0"].seconds(training=False)
    model[0].freeze()
    before, after = tl.summarize(model)["0"].seconds(training=False)
    assert free[1] < free[0] == before == after
    assert torch.is_tensor(model(torch.zeros(1, 64)))


def test_a_plan_that_was_carried_out_keeps_what_it_was_made_for():
    plan = _plan(rows=64)
    assert plan.with_errors(tl.convert_model(_small(), plan)).work == Work(64, "cpu")


KINDS = {
    "linear": nn.Linear(64, 96),
    "tensor": tl.TensorLinear((8, 8), (4, 12)),
    "conv": nn.Conv2d(32, 48, 3, stride=2),
    "grouped": nn.Conv1d(32, 48, 3, groups=4),
    "transposed": nn.ConvTranspose2d(32, 16, 3, stride=2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_kind_that_multiplies_has_an_estimate(kind, typical):
    plan = _plan(nn.ModuleDict({kind: KINDS[kind]}), LowRank(0.3), force=True)
    (forward, short), (training, longer) = (plan[kind].seconds(training=training) for training in (False, True))
    assert 0 < forward < training
    assert 0 < short < longer
    assert "without an estimate" not in str(plan)


def test_the_dtype_is_one_that_a_layer_can_have():
    with pytest.raises(ConversionError, match=r"dtype: one of .*float64.*tf32; got 'int8'"):
        Work(dtype="int8")
