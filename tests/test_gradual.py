"""Gradual rank: which steps lower what, the optimizer goes on, a dense start, pruning, and resuming bit for bit."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tensorlayers as tl
from tensorlayers import BTT, CheckpointError, ConversionError, FactorizedLinear, LowRank, RankError
from tensorlayers.gradual import SHAPES, RankSchedule
from tests.decomposition import FORMATS


def net(format=None, width=24):
    make = nn.Linear if format is None else lambda a, b: FactorizedLinear(a, b, format=format)
    return nn.Sequential(make(16, width), nn.Tanh(), make(width, 16))


def train(model, optimizer, schedule, steps, seed=0):
    """So many steps towards a fixed map; the data depend on the step alone."""
    target = torch.randn(16, 16, generator=torch.Generator().manual_seed(9)) / 4
    found = []
    for _ in range(steps):
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(100 + schedule.count))
        loss = (schedule.model(x) - x @ target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append((float(loss.detach()), schedule.step()))
    return found


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


def ranks_of(model):
    return [layer.network.ranks for layer in model if isinstance(layer, FactorizedLinear)]


@pytest.mark.parametrize("cls", FORMATS)
def test_ranks_fall_to_the_end_and_training_goes_on(cls):
    model = net(cls(0.8))
    optimizer = adam(model)
    parameters = list(model.parameters())
    schedule = RankSchedule(model, optimizer, end=0.4, steps=(3, 12), every=3, shape="linear")
    found = train(model, optimizer, schedule, 15)
    lowered = [k for k, (_, changes) in enumerate(found, 1) if changes]
    assert set(lowered) <= {3, 6, 9, 12}
    assert len(lowered) > 1
    sizes = [size for _, size in schedule.history]
    assert sizes == sorted(sizes, reverse=True)
    once = tl.truncate(net(cls(0.8)), 0.4)
    assert ranks_of(model) == ranks_of(once)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    for core in [core for layer in model if isinstance(layer, FactorizedLinear) for core in layer.cores]:
        assert optimizer.state[core]["step"] == 15
        assert optimizer.state[core]["exp_avg"].shape == core.shape


@given(
    st.sampled_from(sorted(SHAPES)),
    st.integers(1, 8),
    st.integers(0, 9),
    st.one_of(st.none(), st.integers(1, 4)),
    st.integers(1, 6),
    st.integers(0, 6),
)
def test_the_target_falls_from_start_to_end(shape, first, length, every, end, more):
    model = nn.Sequential(FactorizedLinear(8, 8, format=LowRank(8)))
    last, start = first + length, end + more
    schedule = RankSchedule(model, end=end, start=start, steps=(first, last), every=every, shape=shape)
    targets = []
    for count in range(1, last + 3):
        schedule.step()
        assert (schedule.target is None) == (count < first)
        targets += [] if schedule.target is None else [schedule.target]
        assert model[0].network.ranks[0] <= 8 if schedule.target is None else start
    assert targets == sorted(targets, reverse=True)
    assert targets[0] == (start if length else end)
    assert targets[-1] == end
    assert model[0].network.ranks == (end,)
    assert schedule.history[-1] == (last, 16 * end)


def test_the_start_is_the_largest_share_there_is():
    model = nn.Sequential(FactorizedLinear(32, 32, format=LowRank(12)), FactorizedLinear(32, 32, format=LowRank(4)))
    schedule = RankSchedule(model, end=0.25, steps=(1, 11), every=5, shape="linear")
    for count in range(11):
        changes = schedule.step()
        assert "1" not in changes, count
    assert schedule.start == 0.75
    assert ranks_of(model) == [(4,), (4,)]
    assert [size for _, size in schedule.history] == [1024, 64 * 8 + 256, 512]


def test_a_dense_start_is_converted_where_the_steps_begin():
    model = net(width=32)
    optimizer = adam(model)
    schedule = RankSchedule(model, optimizer, end=4, steps=(3, 6), every=1, formats=LowRank(16))
    train(model, optimizer, schedule, 2)
    assert ranks_of(model) == []
    x = torch.randn(5, 16)
    before, weight = model(x).detach(), model[0].weight
    bias_state = optimizer.state[model[0].bias]["exp_avg"]
    assert schedule.step() == {}  # rank 16 is full: nothing is lost
    assert schedule.model is model
    assert ranks_of(model) == [(16,), (16,)]
    torch.testing.assert_close(model(x).detach(), before)
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in model.parameters()}
    assert weight not in optimizer.state
    assert optimizer.state[model[0].bias]["exp_avg"] is bias_state
    train(model, optimizer, schedule, 4)
    assert ranks_of(model) == [(4,), (4,)]


def test_a_model_that_is_a_dense_layer():
    schedule = RankSchedule(nn.Linear(16, 16), end=2, steps=(1, 1), formats=LowRank(8))
    schedule.step()
    assert isinstance(schedule.model, FactorizedLinear)
    assert schedule.model.network.ranks == (2,)


def test_values_that_vanished_are_pruned():
    model = net(LowRank(8))
    with torch.no_grad():
        model[0].cores[1][3:] = 0
    schedule = RankSchedule(model, steps=(2, 4), every=2, tolerance=1e-3)
    found = [schedule.step() for _ in range(4)]
    assert [dict(changes) for changes in found] == [{}, {"0": ((8,), (3,))}, {}, {}]
    assert schedule.target is None


def test_pruning_goes_with_a_schedule():
    model = net(LowRank(8))
    with torch.no_grad():
        model[0].cores[1][3:] = 0
    schedule = RankSchedule(model, end=4, steps=(1, 1), tolerance=0.0)
    schedule.step()
    assert ranks_of(model) == [(3,), (4,)]


def test_layers_that_share_cores_fall_together():
    shared = FactorizedLinear.from_dense_jointly([nn.Linear(16, 16) for _ in range(3)], BTT(4))
    model = nn.ModuleList(shared)
    schedule = RankSchedule(model, adam(model), end=2, steps=(1, 2))
    assert set(schedule.step()) | set(schedule.step()) == {"0", "1", "2"}
    again = RankSchedule(copy.deepcopy(model), end=1, steps=(1, 2))
    again.load_state_dict(schedule.state_dict())
    assert [layer.network for layer in again.model] == [layer.network for layer in model]
    assert again.model[0].cores is again.model[1].cores


@pytest.mark.parametrize("formats", [None, LowRank(12)], ids=["factorized", "dense"])
@pytest.mark.parametrize("stop", [2, 5, 9])
def test_it_resumes_bit_for_bit(formats, stop, tmp_path):
    def build():
        torch.manual_seed(0)
        model = net(None if formats else LowRank(12))
        optimizer = adam(model)
        return model, optimizer, RankSchedule(model, optimizer, end=0.3, steps=(3, 9), every=2, formats=formats)

    whole = build()
    wanted = train(*whole, 12)
    model, optimizer, schedule = build()
    train(model, optimizer, schedule, stop)
    states = [part.state_dict() for part in (schedule, model, optimizer)]
    torch.save(states, tmp_path / "checkpoint.pt")
    parts = build()
    model, optimizer, schedule = parts
    for part, state in zip((schedule, model, optimizer), torch.load(tmp_path / "checkpoint.pt"), strict=True):
        part.load_state_dict(state)
    assert train(model, optimizer, schedule, 12 - stop) == wanted[stop:]
    for ours, theirs in zip(model.parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert schedule.history == whole[2].history


def test_an_entry_that_is_not_finite_stops_it():
    model = net(LowRank(8))
    schedule = RankSchedule(model, end=4, steps=(1, 1))
    with torch.no_grad():
        model[2].cores[0][0, 0] = torch.nan
    with pytest.raises(tl.DecompositionError, match="layer '2': core 0"):
        schedule.step()
    assert (schedule.count, schedule.history, ranks_of(model)) == (0, [], [(8,), (8,)])


def test_it_prints():
    schedule = RankSchedule(net(LowRank(8)), end=0.25, steps=(2, 4), every=2)
    assert str(schedule) == (
        "RankSchedule(end=0.25, steps=(2, 4), start=None, every=2, shape='cubic')\nstep 0: next at step 2"
    )
    for _ in range(4):
        schedule.step()
    lines = str(schedule).splitlines()
    assert lines[1].split() == ["step", "at", "most", "parameters", "of", "factorized", "weights"]
    assert [line.split() for line in lines[2:]] == [["2", "0.833", "640"], ["4", "0.25", "160"], ["step", "4:", "done"]]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": (0, 4)}, ConversionError, r"steps: the first and the last step, from 1, in order; got \(0, 4\)"),
        ({"steps": (4, 3)}, ConversionError, "steps: the first"),
        ({"steps": 4}, ConversionError, "steps: the first"),
        ({"every": 0}, ConversionError, "every: an integer of at least 1; got 0"),
        ({"shape": "square"}, ConversionError, "shape: one of cubic, linear, cosine; got 'square'"),
        ({"tolerance": 1.0}, ConversionError, "tolerance: at least 0 and below 1; got 1.0"),
        ({"end": None}, ConversionError, "end: a share or a rank to lower to, or a tolerance to prune by; got neither"),
        ({"end": (2, 2)}, ConversionError, r"end: a share in \(0, 1\] or a rank; got \(2, 2\)"),
        ({"end": 1.5}, RankError, "1.5"),
        ({"end": 0.01}, RankError, "layer '0': rank 0.01: the smallest LowRank"),
        ({"start": 0.2}, ConversionError, "start: as end, and at least as large; got 0.2 and 0.25"),
        ({"start": 4}, ConversionError, "start: as end"),
        ({"optimizer": adam(nn.Linear(2, 2))}, ConversionError, "optimizer: one of this model"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        RankSchedule(**{"model": net(LowRank(8)), "end": 0.25, "steps": (1, 4), **options})


def test_nothing_to_lower_is_refused():
    with pytest.raises(ConversionError, match="Sequential: a factorized layer, or formats to convert to; got none"):
        RankSchedule(net(), end=0.5, steps=(1, 4))
    with pytest.raises(RankError, match="layer '0': LowRank"):
        RankSchedule(net(), end=0.01, steps=(1, 4), formats=LowRank(8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("count"), "schedule: a state as state_dict gives it"),
        (lambda state: state["formats"].update({"0": {"name": "none"}}), "schedule: a state as state_dict gives it"),
        (lambda state: state["formats"].update({"9": state["formats"]["0"]}), "layer '9' is no factorized layer"),
        (lambda state: state["formats"]["2"].update(rank=(9,)), r"layer '2' has ranks \(8,\); in the state \(9,\)"),
    ],
)
def test_a_bad_state_is_refused(change, message):
    model = net(LowRank(8))
    schedule = RankSchedule(model, end=4, steps=(1, 4))
    other = RankSchedule(net(LowRank(8)), end=4, steps=(1, 4))
    other.step()
    state = copy.deepcopy(other.state_dict())
    change(state)
    with pytest.raises(CheckpointError, match=message):
        schedule.load_state_dict(state)
    assert (schedule.count, ranks_of(model)) == (0, [(8,), (8,)])
