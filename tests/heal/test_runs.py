"""heal: the schedule of a run, and runs that are continued bit for bit."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from tensorlayers import training
from tensorlayers.distillation import squared_error
from tensorlayers.errors import CheckpointError
from tensorlayers.formats import LowRank
from tensorlayers.heal import heal
from tensorlayers.regularize import rank_dropout
from tensorlayers.schedule import Schedule
from tensorlayers.testing import assert_close
from tests.heal.support import pair, rows, same
from tests.snapshot import Snapshot

# -- the schedule -----------------------------------------------------------------------------------------------------


def schedule(**options):
    given = {
        "steps": 100,
        "seconds": None,
        "shares": (1.0,),
        "warmup": 0.1,
        "clip": 1.0,
        "decay": 0.0,
        "patience": None,
        "check": 10,
        "seed": 0,
    }
    return Schedule(**{**given, **options})


@given(st.floats(0, 0.99), st.floats(0, 1))
def test_the_learning_rate_grows_and_falls_to_zero(warmup, done):
    plan = schedule(warmup=warmup)
    assert 0 <= plan.scale(done) <= 1
    assert plan.scale(1.0) == pytest.approx(0, abs=1e-12)
    assert plan.scale(warmup) == pytest.approx(1)
    ahead = plan.scale(min(done + 0.01, 1.0))
    assert (ahead >= plan.scale(done)) if done + 0.01 <= warmup else True
    assert (ahead <= plan.scale(done)) if done >= warmup else True


@given(st.integers(1, 50), st.floats(0, 0.99), st.one_of(st.none(), st.floats(0.1, 10)))
def test_stages_follow_one_another(steps, share, seconds):
    plan = schedule(steps=steps, shares=(share, 1 - share), seconds=seconds)
    found = [plan.place(step, 0.0) for step in range(steps + 1)]
    assert [stage for stage, _ in found] == sorted(stage for stage, _ in found)
    assert all(0 <= done < 1 for _, done in found)
    assert found[-1][0] == 2
    assert all(stage < 2 for stage, _ in found[:-1])
    if seconds is not None:
        assert plan.place(0, seconds)[0] == 2


def test_time_may_be_up():
    model, teacher = pair()
    before = copy.deepcopy(model)
    result = heal(model, teacher, rows(), minutes=1e-9)
    assert (result.steps, result.ended, result.best) == (0, "time", 0)
    assert_close(model(rows()[0]), before.train()(rows()[0]) if before.training else before(rows()[0]), torch.float32)


# -- checkpoints ------------------------------------------------------------------------------------------------------


class Stop(BaseException):
    """As an interruption from the keyboard."""


def interrupted_at(step):
    """A loss that is the squared error, and raises in a step."""
    count = 0

    def loss(found, wanted):
        nonlocal count
        if torch.is_grad_enabled():
            if count == step:
                raise Stop
            count += 1
        return squared_error(found, wanted)

    loss.__qualname__ = "loss"
    return loss


@pytest.mark.parametrize("step", [1, 9, 10, 15, 29])
@pytest.mark.parametrize("options", [{}, {"layerwise": 0.4, "hidden": 0.5}, {"held_out": 0.0}])
def test_a_run_goes_on_bit_for_bit(tmp_path, step, options):
    def start():
        model, teacher = pair()
        return rank_dropout(model, 0.1), teacher

    given = {"steps": 30, "training": True, "every": 5, **options}
    whole, teacher = start()
    expected = heal(whole, teacher, rows(), loss=interrupted_at(None), **given)
    stopped, teacher = start()
    at = max(step - round(30 * options.get("layerwise", 0)), 0)
    path = tmp_path / "healing.safetensors"
    with pytest.raises(Stop):
        heal(stopped, teacher, rows(), loss=interrupted_at(at), checkpoint=path, **given)
    torch.manual_seed(5)
    for model in (stopped, start()[0]):  # what the interrupted run left, or the model as it was before
        copied = tmp_path / "copy.safetensors"
        if path.exists():
            copied.write_bytes(path.read_bytes())
        found = heal(model, teacher, rows(), loss=interrupted_at(None), checkpoint=copied, **given)
        if path.exists() or model is not stopped:
            assert same(model, whole)
            assert (found.losses, found.held_out, found.best) == (expected.losses, expected.held_out, expected.best)
        copied.unlink()


def test_a_finished_run_is_not_repeated(tmp_path):
    path = tmp_path / "healing.safetensors"
    model, teacher = pair()
    first = heal(model, teacher, rows(), steps=10, checkpoint=path)
    again, _ = pair()
    calls = []
    again.register_forward_hook(lambda *_: calls.append(0))
    assert heal(again, teacher, rows(), steps=10, checkpoint=path) == first
    assert same(model, again)
    assert len(calls) == 1  # to see whether the models fit together
    assert [one.name for one in tmp_path.iterdir()] == ["healing.safetensors"]


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "healing.safetensors"
    count = 0

    def half(tensors, file, about):
        nonlocal count
        count += 1
        if count == 2:
            file.write_bytes(b"half")
            raise OSError("no space left")
        save_file(tensors, file, about)

    monkeypatch.setattr(training, "save_file", half)
    model, teacher = pair()
    with pytest.raises(OSError, match="no space"):
        heal(model, teacher, rows(), steps=20, checkpoint=path, every=5)
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    with safe_open(path, "pt") as file:
        assert '"step": 5' in file.metadata()["tensorlayers"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.02}, "another run: lr is 0.003 there, 0.02 here"),
        ({"steps": 30}, "steps is 20 there, 30 here"),
        ({"seed": 1}, "seed is 0 there, 1 here"),
        ({"loss": squared_error}, "loss is None there, squared_error here"),
        ({"batches": rows(seed=3)}, "batches is"),
        ({"format": LowRank(5)}, r"0.cores.0 is \(48, 4\) torch.float32 there, \(48, 5\) torch.float32 here"),
    ],
)
def test_another_runs_checkpoint_is_refused(tmp_path, change, message):
    path = tmp_path / "healing.safetensors"
    model, teacher = pair()
    heal(model, teacher, rows(), steps=20, checkpoint=path)
    held = path.read_bytes()
    other, _ = pair(change.pop("format", None))
    before = Snapshot(other)
    with pytest.raises(CheckpointError, match=message):
        heal(other, teacher, **{"batches": rows(), "steps": 20, "checkpoint": path, **change})
    assert before == Snapshot(other)
    assert path.read_bytes() == held


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-9], lambda data: b"x" * 100])
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    path = tmp_path / "healing.safetensors"
    model, teacher = pair()
    heal(model, teacher, rows(), steps=5, checkpoint=path)
    path.write_bytes(damage(path.read_bytes()))
    other, _ = pair()
    before = Snapshot(other)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        heal(other, teacher, rows(), steps=5, checkpoint=path)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        heal(other, teacher, rows(), steps=5, checkpoint=path)
    assert before == Snapshot(other)
