"""One budget for a model: the choice among levels, against all choices there are."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tensorlayers.budget import Budget, Level, allocate, hull, levels
from tensorlayers.calibrate import collect
from tensorlayers.decide import entry_for
from tensorlayers.entry import Work
from tensorlayers.errors import ConversionError
from tensorlayers.formats import LowRank
from tensorlayers.scan import scan
from tests.decomposition import FORMATS

numbers = st.integers(1, 20)
choices = st.lists(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=4), min_size=1, max_size=4)


def budget_of(**options):
    """A budget, and what layers take of it at 400 positions."""
    budget = Budget(**options)
    return budget, lambda entry: budget.costs(entry, 400)


def levels_of(pairs):
    return [Level(float(cost), float(effect), None) for cost, effect in pairs]


@given(choices, st.floats(0.3, 1.0))
def test_no_choice_on_the_hulls_for_as_much_is_better(pairs, share):
    layers = [levels_of(some) for some in pairs]
    budget = share * sum(max(level.cost for level in some) for some in layers)
    least = sum(min(level.cost for level in some) for some in layers)
    if least > budget * (1 + 1e-9):
        with pytest.raises(ConversionError, match="the least that these layers can take is"):
            allocate(layers, budget)
        return
    found = allocate(layers, budget)
    spent, effect = sum(level.cost for level in found), sum(level.effect for level in found)
    assert spent <= budget * (1 + 1e-9)
    every = [(sum(x.cost for x in some), sum(x.effect for x in some)) for some in itertools.product(*layers)]
    # What is left of the budget is less than a step, which the best choice gains at most.
    hulls = [hull(some) for some in layers]
    step = max((a.effect - b.effect for some in hulls for a, b in itertools.pairwise(some)), default=0.0)
    assert effect <= min(other for cost, other in every if cost <= budget) + step + 1e-9


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=8))
def test_a_hull_is_convex_and_below_all(pairs):
    some = levels_of(pairs)
    found = hull(some)
    slopes = [(b.effect - a.effect) / (b.cost - a.cost) for a, b in itertools.pairwise(found)]
    assert all(slope < 0 for slope in slopes)
    assert all(a < b for a, b in itertools.pairwise(slopes))
    assert found[0].cost == min(level.cost for level in some)
    assert found[-1].effect == min(level.effect for level in some)


@pytest.mark.parametrize("cls", FORMATS)
@pytest.mark.parametrize("round_to", [1, 4])
def test_levels_fall_as_they_cost_more(cls, round_to):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(36, 48), nn.Tanh(), nn.Linear(48, 24))
    calibration = collect(model, [torch.randn(400, 36) * torch.logspace(0, -2, 36)])
    (found, _) = scan(model)
    entry = entry_for(found, Work())
    made = levels(entry, found, [cls(0.5)], calibration["0"], *budget_of(params=0.5, round_to=round_to))
    assert (made[0].cost, made[0].effect, made[0].format) == (36 * 48, 0.0, None)
    assert len(made) > 2
    for level in made[1:]:
        converted = entry.with_format(level.format)
        assert converted.parameters[1] == level.cost < 36 * 48
        assert all(rank % round_to == 0 or rank < round_to for rank in converted.network.ranks)
    best = hull(made)
    assert len(best) > 2
    assert math.isfinite(best[0].effect)


def test_effects_are_those_of_the_models_output():
    """A layer that the output hardly sees loses its parameters first."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"seen": nn.Linear(24, 24), "faint": nn.Linear(24, 24)})
    model.forward = lambda x: model["seen"](x) + 1e-2 * model["faint"](x)
    calibration = collect(model, [torch.randn(400, 24)])
    budget, work = Budget(params=0.6), Work()
    entries = [entry_for(found, work) for found in scan(model)]
    made = [
        levels(entry, found, [LowRank(0.5)], calibration[entry.name], *budget_of(params=0.6))
        for entry, found in zip(entries, scan(model), strict=True)
    ]
    seen, faint = allocate(made, budget.share * sum(budget.costs(entry, 400)[0] for entry in entries))
    assert seen.cost > 2 * faint.cost


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of params, macs, latency, memory; got none"),
        ({"params": 0.5, "macs": 0.5}, "got params, macs"),
        ({"params": 0}, "params is a fraction above 0 and at most 1; got 0"),
        ({"macs": 1.5}, "macs is a fraction"),
        ({"latency": True}, "latency is a fraction"),
        ({"memory": "half"}, "memory is a fraction"),
        ({"params": 0.5, "timed": 1}, "timed is for latency; got params"),
        ({"params": 0.5, "round_to": 0}, "round_to is an integer of at least 1; got 0"),
    ],
)
def test_bad_budgets_are_refused(options, message):
    with pytest.raises(ConversionError, match=message):
        Budget(**options)


def test_gradients_are_needed():
    model = nn.Sequential(nn.Linear(36, 48))
    (found,) = scan(model)
    moments = collect(model, [torch.randn(40, 36)], gradients=0)["0"]
    with pytest.raises(ConversionError, match="layer '0': gradients of the output; collect them"):
        levels(entry_for(found, Work()), found, [LowRank(0.5)], moments, *budget_of(params=0.5))
