"""An interrupted save leaves the old model whole."""

import contextlib
import os
import shutil
from pathlib import Path

import pytest

from tensorlayers import LowRank, convert_model, load_pretrained, save_pretrained, serialize
from tests.serialize.support import INDEX, _assert_same, _bert, _chain, _converted, _files, _index, _is

STEPS = [
    (serialize, "save_file"),
    (os, "replace"),
    (os, "fsync"),
    (os, "mkdir"),
    (os, "unlink"),
    (shutil, "copyfile"),
    (Path, "write_text"),
]


"""What a save does to the disk, each time by a call that can be interrupted."""


class Interruption(BaseException):
    """Like KeyboardInterrupt: caught by no `except Exception`."""


class Interrupter:
    """Raises at the given step, before or after it is done."""

    def __init__(self, step, error, after):
        self.step, self.error, self.after, self.count = step, error, after, 0

    def __call__(self, real):
        def call(*args, **kwargs):
            self.count += 1
            now = self.count == self.step
            if now and not self.after:
                raise self.error
            result = real(*args, **kwargs)
            if now:
                raise self.error
            return result

        return call


def _interrupted_saves(model, directory, monkeypatch, error, after):
    """Save again and again, interrupted at the first step, at the second, ...; yield after each of these."""
    for step in range(1, 1000):
        interrupter = Interrupter(step, error, after)
        with monkeypatch.context() as patch:
            for owner, name in STEPS:
                patch.setattr(owner, name, interrupter(getattr(owner, name)))
            with contextlib.suppress(type(error)):
                save_pretrained(model, directory)
        if interrupter.count < step:
            return
        yield step


interruptions = pytest.mark.parametrize(
    ("error", "after"),
    [(OSError("disk full"), False), (Interruption(), False), (Interruption(), True)],
    ids=["failing", "interrupted before", "interrupted after"],
)


@interruptions
def test_an_interrupted_save_leaves_the_old_model_or_the_new_one(error, after, saved, monkeypatch):
    old, new = load_pretrained(saved, _chain()), _converted()
    (saved / "notes.txt").write_text("mine")
    steps = 0
    for _ in _interrupted_saves(new, saved, monkeypatch, error, after):
        steps += 1
        loaded = load_pretrained(saved, _chain())
        assert _is(loaded, old) or _is(loaded, new)
        assert [name for name in _files(saved) if name.startswith(".")] == []
        assert (saved / "notes.txt").read_text() == "mine"
    assert steps >= 4
    _assert_same(load_pretrained(saved, _chain()), new)
    assert _files(saved) == sorted([_index(saved)["weights"], INDEX, "notes.txt"])


def test_a_save_that_fails_leaves_the_old_model(saved, monkeypatch):
    before = {name: (saved / name).read_bytes() for name in _files(saved)}
    for owner, name in [(serialize, "save_file"), (os, "replace"), (os, "fsync")]:
        for after in (False, True):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, Interrupter(1, OSError("disk full"), after)(getattr(owner, name)))
                with pytest.raises(OSError, match="disk full"):
                    save_pretrained(_converted(), saved)
            assert {name: (saved / name).read_bytes() for name in _files(saved)} == before


@interruptions
def test_an_interrupted_first_save_leaves_nothing_or_the_model(error, after, tmp_path, monkeypatch):
    model, directory = _converted(), tmp_path / "new"
    for _ in _interrupted_saves(model, directory, monkeypatch, error, after):
        if directory.exists() and _files(directory):
            _assert_same(load_pretrained(directory, _chain()), model)
            assert _files(directory) == [_index(directory)["weights"], INDEX]
            shutil.rmtree(directory)


@interruptions
def test_an_interrupted_save_of_another_architecture(error, after, tmp_path, monkeypatch):
    """The configuration belongs to the model: old weights with a new config.json would be lost."""
    old, new = (convert_model(_bert(hidden_size=size), LowRank(4)).eval() for size in (16, 32))
    save_pretrained(old, tmp_path)
    for _ in _interrupted_saves(new, tmp_path, monkeypatch, error, after):
        loaded = load_pretrained(tmp_path)
        assert _is(loaded, old) or _is(loaded, new)
        assert [name for name in _files(tmp_path) if name.startswith(".")] == []
    assert _is(load_pretrained(tmp_path), new)
