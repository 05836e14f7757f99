"""plan_conversion with data: one budget over all layers, ranks where outputs need them, and what a plan says."""

import pytest
import torch
from torch import nn

from tensorlayers import (
    BTT,
    CP,
    TT,
    Budget,
    Calibration,
    ConversionError,
    ConversionPlan,
    Energy,
    LowRank,
    RankError,
    Tucker,
    collect,
    convert_model,
    layer_times,
    plan_conversion,
    summarize,
)
from tensorlayers.budget import KINDS
from tensorlayers.formats import Format
from tests.decomposition import FORMATS
from tests.models import Aside, Block, Sometimes, blocks, error, images, narrow
from tests.snapshot import Snapshot


def uneven():
    """Layers of which some matter more than others, and need more ranks."""
    torch.manual_seed(0)
    model = nn.Sequential(*(part for _ in range(4) for part in (nn.Linear(32, 32), nn.Tanh())))
    with torch.no_grad():
        for k in (2, 4):  # nearly of rank one
            model[k].weight.copy_(torch.outer(torch.randn(32), torch.randn(32)) / 8 + 0.02 * model[k].weight)
    batches = [narrow(50, 32) for _ in range(6)]
    return model, batches, collect(model, batches)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("cls", FORMATS)
def test_a_budget_is_kept_and_beats_equal_shares(cls, share):
    model, _, calibration = uneven()
    before = Snapshot(model)
    options = {"calibration": calibration, "force": True}
    plan = plan_conversion(model, cls(1.0), budget=Budget(params=share), errors=False, **options)
    assert before == Snapshot(model)
    sizes = [sum(entry.parameters[side] for entry in plan) for side in (0, 1)]
    assert 0.8 * share < sizes[1] / sizes[0] <= share
    found = convert_model(model, plan, calibration=calibration)
    equal = convert_model(model, cls(share), **options)
    assert error(model, found, narrow(200, 32)) < error(model, equal, narrow(200, 32))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_budget_is_of(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 260), nn.Tanh(), nn.Linear(260, 300))
    calibration = collect(model, [narrow(400, 300)])
    budget = Budget(**{kind: 0.6})
    plan = plan_conversion(model, LowRank(1.0), budget=budget, calibration=calibration, errors=False)
    spent, whole = (sum(budget.costs(entry, 400)[side] for entry in plan) for side in (1, 0))
    assert plan.converted
    assert 0.4 * whole < spent <= 0.6 * whole


def test_macs_are_weighed_by_positions():
    """Two convolutions of one shape, of which one sees sixteen times the positions: there MACs are saved."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.AvgPool2d(4), nn.Conv2d(8, 8, 3, padding=1))
    calibration = collect(model, [torch.randn(20, 8, 16, 16)])
    positions = {"0": 20 * 16 * 16, "2": 20 * 4 * 4}
    assert {name: one.count for name, one in calibration.items()} == positions
    budget = Budget(macs=0.5)
    options = {"calibration": calibration, "force": True, "errors": False}
    plan = plan_conversion(model, Tucker(1.0), budget=budget, **options)
    spent, whole = (sum(entry.macs[side] * positions[entry.name] for entry in plan) for side in (1, 0))
    assert 0.3 * whole < spent <= 0.5 * whole
    assert plan["0"].macs[1] < 0.6 * plan["2"].macs[1]


def test_macs_of_a_transposed_convolution():
    """Whose MACs go with the positions of its input."""
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(4, 4, 2, 2))
    calibration = collect(model, [torch.randn(2, 4, 4, 4)])
    budget = Budget(macs=0.5)
    entries = summarize(model)
    found = [budget.costs(entry, calibration[entry.name].count)[0] for entry in entries]
    assert found == [32 * 16, 32 * 64]


def test_layers_that_the_output_does_not_depend_on_get_the_least():
    model = Aside()
    calibration = collect(model, [narrow(200, 32)])
    plan = plan_conversion(model, LowRank(1.0), budget=Budget(params=0.5), calibration=calibration, force=True)
    assert plan["aside"].parameters[1] < 0.3 * plan["fc"].parameters[1]
    assert "does not depend on it" in str(plan)


def test_memory_of_layers_that_are_not_trained():
    entry = next(iter(summarize(nn.Linear(8, 8))))
    trained, frozen = (Budget(memory=0.5).costs(entry, 1, trained)[0] for trained in (True, False))
    assert trained == 4 * frozen == 4 * 64


def test_times_that_cannot_be_predicted():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    calibration = collect(model, [narrow(200, 64)])
    with pytest.raises(ConversionError, match="whose time can be predicted, or timed=batch; got none"):
        plan_conversion(model, LowRank(1.0), budget=Budget(latency=0.5), calibration=calibration, force=True)


@pytest.fixture
def timed(monkeypatch):
    """What was timed; a module takes as long as it has parameters."""
    seen = []

    def fastest(cases, clock, repeats):
        for case in cases.values():
            case()
        seen.append([str(case.args[0]) for case in cases.values()])
        return {key: 1e-6 * sum(p.numel() for p in case.args[0].parameters()) for key, case in cases.items()}

    monkeypatch.setattr(layer_times, "fastest", fastest)
    return seen


def test_a_latency_is_measured_on_a_batch(timed):
    """Each shape once a rank, and what the clock says decides."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 48), nn.Linear(48, 48)).train()
    calibration = collect(model, [torch.randn(300, 48)])
    before = Snapshot(model)
    budget = Budget(latency=0.6, timed=torch.randn(7, 48))
    plan = plan_conversion(model, LowRank(1.0), budget=budget, calibration=calibration, force=True, errors=False)
    assert before == Snapshot(model)
    assert len(timed) == len({cases[-1] for cases in timed})
    spent = sum(entry.parameters[1] + 48 for entry in plan)
    assert 0.45 < spent / (3 * 49 * 48) <= 0.6


def test_what_did_not_run_in_the_timed_batch_takes_no_time(timed):
    model = Sometimes(64)
    calibration = collect(model, [torch.randn(400, 64)])
    budget = Budget(latency=0.5, timed=torch.randn(5, 64))
    plan = plan_conversion(model, LowRank(1.0), budget=budget, calibration=calibration, force=True, errors=False)
    assert [entry.converted for entry in plan] == [True, False]


def test_formats_from_a_list():
    """Each layer gets the format that suits it: one is a Kronecker product, which a matrix of low rank is not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(36, 36), nn.Linear(36, 36))
    with torch.no_grad():
        model[0].weight.copy_(torch.kron(torch.randn(6, 6), torch.randn(6, 6)) / 6)
        model[1].weight.copy_(torch.randn(36, 4) @ torch.randn(4, 36) / 10)
    calibration = collect(model, [torch.randn(500, 36)])
    formats = [LowRank(1.0), TT(1.0)]
    options = {"budget": Budget(params=0.3), "calibration": calibration, "force": True}
    for choice in (formats, tuple(formats), {"*": formats}):
        plan = plan_conversion(model, choice, **options)
        assert [type(entry.format) for entry in plan] == [TT, LowRank]
        assert all(entry.output_error < 0.1 for entry in plan)
    plan = plan_conversion(model, {"0": LowRank(1.0), "*": formats}, **options)
    assert type(plan["0"].format) is LowRank
    found = convert_model(model, formats, **options)
    assert [type(layer.format) for layer in found] == [TT, LowRank]


def test_a_rank_bounds_what_a_layer_gets():
    model, _, calibration = uneven()
    options = {"budget": Budget(params=0.9), "calibration": calibration, "force": True, "errors": False}
    for format, most in ((LowRank(0.25), 4), (LowRank(3), 3), (LowRank((5,)), 5)):
        plan = plan_conversion(model, format, **options)
        assert max(entry.network.ranks[0] for entry in plan if entry.converted) <= most


def test_ranks_are_multiples():
    model, _, calibration = uneven()
    budget = Budget(params=0.5, round_to=4)
    plan = plan_conversion(model, LowRank(1.0), budget=budget, calibration=calibration, force=True, errors=False)
    assert {entry.network.ranks[0] % 4 for entry in plan if entry.converted and entry.network.ranks[0] >= 4} == {0}


def test_no_layer_is_made_slower_but_by_force():
    """A tensor train of such ranks has more MACs than dense: nothing can be saved."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(576, 576), nn.Linear(576, 576))
    calibration = collect(model, [torch.randn(600, 576)], gradients=1)
    options = {"budget": Budget(params=0.5), "calibration": calibration, "errors": False}
    plan = plan_conversion(model, TT(1.0), **options)
    assert all(after <= 1.05 * before for entry in plan for before, after in [entry.seconds(training=True)])
    assert all(entry.parameters[1] < 0.1 * entry.parameters[0] for entry in plan if entry.converted)
    forced = plan_conversion(model, TT(1.0), force=True, **options)
    assert forced.macs[1] > forced.macs[0]


def test_curves_are_computed_once(monkeypatch):
    model, _, calibration = uneven()
    computed = []
    losses = Format.losses
    monkeypatch.setattr(Format, "losses", lambda *args: computed.append(1) or losses(*args))
    options = {"calibration": calibration, "force": True, "errors": False}
    for budget in (Budget(params=0.3), Budget(params=0.3), Budget(macs=0.3)):
        plan_conversion(model, LowRank(1.0), budget=budget, **options)
    assert len(computed) == 4
    with torch.no_grad():
        model[0].weight.add_(0.1)
    plan_conversion(model, LowRank(1.0), budget=Budget(params=0.3), **options)
    assert len(computed) == 5


def test_layers_outside_a_budget():
    """Asked to stay dense, tied or shared: they are no part of it. What never ran gets its share."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), nn.Linear(24, 24))
    calibration = collect(model, [narrow(20, 7, 24) for _ in range(6)])
    plan = plan_conversion(
        model,
        {"2": None, "*": LowRank(1.0)},
        share={r"re:(\d)\.(?:query|key|value)": TT(6)},
        budget=Budget(params=0.4),
        calibration=calibration,
        force=True,
        errors=False,
    )
    assert plan["2"].reason == "asked to stay dense"
    assert plan["0.query"].share
    spent = [plan[name] for name in ("0.out", "1.out", "0.spare", "1.spare")]
    assert sum(entry.parameters[1] for entry in spent) <= 0.4 * 4 * 576
    for name in ("0.spare", "1.spare"):
        assert plan[name].network.ranks == (4,)
        assert "no data: it never ran" in plan[name].notes[0]


# What the plan says


@pytest.mark.parametrize("cls", FORMATS)
@pytest.mark.parametrize("make", [blocks, images], ids=["blocks", "images"])
def test_a_plan_states_the_errors_of_what_it_gives(make, cls):
    torch.manual_seed(0)
    model, draw = make()
    calibration = collect(model, [draw(20) for _ in range(6)])
    plan = plan_conversion(model, cls(0.4), calibration=calibration, force=True)
    found = convert_model(model, plan, calibration=calibration)
    for entry in plan:
        layer = found.get_submodule(entry.name)
        assert entry.network == layer.network
        if entry.name in calibration:
            assert entry.output_error == pytest.approx(layer.output_error, rel=1e-3)
            assert 0 < entry.output_error < 1
    assert "of output" in str(plan)
    again = ConversionPlan.from_json(plan.to_json())
    assert [entry.output_error for entry in again] == [entry.output_error for entry in plan]
    assert "of output" not in str(plan_conversion(model, LowRank(0.4), force=True))


def test_little_data_is_stated():
    model = nn.Sequential(nn.Linear(64, 24))
    calibration = collect(model, [torch.randn(9, 64)])
    plan = plan_conversion(model, LowRank(0.4), calibration=calibration, force=True)
    assert "few data: 9 positions for 64 inputs" in str(plan)


def test_ranks_by_energy_are_pinned_in_a_plan():
    model, _, calibration = uneven()
    plan = plan_conversion(model, LowRank(Energy(0.9)), force=True, calibration=calibration, errors=False)
    ranks = [entry.network.ranks[0] for entry in plan]
    assert max(ranks) > 2 * min(ranks)
    assert ConversionPlan.from_json(plan.to_json())["0"].network.ranks == plan["0"].network.ranks
    found = convert_model(model, plan, calibration=calibration)
    assert [found[2 * k].network.ranks[0] for k in range(4)] == ranks


def test_of_cp_no_energy_tells_the_rank():
    model, _, _ = uneven()
    with pytest.raises(RankError, match=r"layer '0': .*bonds that alone join two halves"):
        plan_conversion(model, CP(Energy(0.9)), force=True)


# Refused


def bad(**options):
    model, _, calibration = uneven()
    return model, {"calibration": calibration, "budget": Budget(params=0.5), "force": True, **options}


@pytest.mark.parametrize(
    ("formats", "options", "message"),
    [
        (LowRank(1.0), {"calibration": None}, r"budget: calibration=collect\(model, batches\), by which it is spent"),
        (LowRank(1.0), {"budget": 0.5}, r"budget: a Budget such as Budget\(params=0.5\); got 0.5"),
        (LowRank(1.0), {"calibration": {}}, "calibration: what `collect` returns; got dict"),
        (LowRank(1.0), {"budget": Budget(params=0.01)}, "budget: the least that these layers can take is"),
        ([LowRank(1.0), 3], {}, "a string key, and a format, several of them, or None"),
        ([], {}, "a string key, and a format, several of them, or None"),
        ([LowRank(1.0), BTT(1.0)], {"budget": None}, "formats: a format such as"),
        ({"0": [LowRank(1.0), Tucker(1.0)]}, {"budget": None}, "a string key, and a format or None; got"),
    ],
)
def test_bad_requests_are_refused(formats, options, message):
    model, arguments = bad(**options)
    with pytest.raises(ConversionError, match=message):
        plan_conversion(model, formats, **arguments)


def test_a_budget_with_a_plan_is_refused():
    model, options = bad()
    plan = plan_conversion(model, LowRank(1.0), errors=False, **options)
    with pytest.raises(ConversionError, match="a plan is already decided; budget, share"):
        convert_model(model, plan, budget=Budget(params=0.5))


def test_a_budget_needs_gradients():
    model, batches, _ = uneven()
    calibration = collect(model, batches, gradients=0)
    with pytest.raises(ConversionError, match="layer '0': gradients of the output; collect them"):
        plan_conversion(model, LowRank(1.0), budget=Budget(params=0.5), calibration=calibration)
    assert isinstance(calibration, Calibration)
