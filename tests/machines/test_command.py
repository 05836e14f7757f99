"""The command that measures them."""

import os
from dataclasses import replace

import pytest

from tensorlayers import cli, measure
from tensorlayers.machine import VARIABLE, machine, read
from tensorlayers.measure import Measurement
from tensorlayers.timing import share_of_processors
from tests.machine import TYPICAL


@pytest.fixture
def asked(monkeypatch):
    """What the command asks to be measured; the answer is at once `TYPICAL`, within 7 %."""
    asked = []

    def answer(device, threads, *, quick):
        asked.append((device, threads, quick))
        return Measurement(replace(TYPICAL, conv={"rate": 1e11}), 0.07)

    monkeypatch.setattr(cli, "measure", answer)
    return asked


def test_the_command_saves_where_the_constants_are_used(home, asked, capsys):
    assert cli.main(["calibrate"]) == 0
    assert asked == [("cpu", None, False)]
    assert machine("cpu").name == "typical"
    shown = capsys.readouterr().out
    lines = {line.split()[0]: line.split()[1:] for line in shown.splitlines()}
    assert lines["flops.float32"] == ["100G", "156G"]
    assert lines["cache"] == ["6M", "6M"]
    assert lines["flops.float64"][0] == lines["conv.moved"][0] == "-"
    assert "within 7%" in shown
    assert f"{home / 'cpu.json'}, used from now on; delete it" in shown


def test_the_command_says_which_constants_it_kept(home, monkeypatch, capsys):
    kept = ("cached", "half.n")
    monkeypatch.setattr(cli, "measure", lambda *_, **__: Measurement(TYPICAL, 0.07, kept))
    assert cli.main(["calibrate"]) == 0
    assert "as shipped, since the times do not tell: cached, half.n\n" in capsys.readouterr().out


def test_the_command_replaces_a_bad_file(home, asked):
    home.mkdir()
    (home / "cpu.json").write_text("nonsense")
    assert cli.main(["calibrate"]) == 0
    assert machine("cpu").name == "typical"


def test_the_command_saves_where_it_is_told(home, asked, capsys, tmp_path):
    out = tmp_path / "deep" / "mine.json"
    assert cli.main(["calibrate", "--device", "cuda", "--threads", "3", "--quick", "--out", str(out)]) == 0
    assert asked == [("cuda", 3, True)]
    assert read(out).name == "typical"
    assert not home.exists()
    assert f"{VARIABLE} names, as cuda.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("shares", "error", "message"),
    [
        ((0.5,), 0.1, "threads 1: they had a processor for 50%"),
        ((1.0, 0.8), 0.1, "for 80%"),
        ((1.0, 1.0), 0.6, "within 60%"),
    ],
    ids=["before", "after", "fit"],
)
def test_a_disturbed_measurement_is_not_saved(home, monkeypatch, capsys, shares, error, message):
    left = iter(shares)
    monkeypatch.setattr(measure, "share_of_processors", lambda: next(left))
    monkeypatch.setattr(measure, "_measure", lambda *_, **__: Measurement(TYPICAL, error))
    assert cli.main(["calibrate"]) == 1
    assert message in capsys.readouterr().err
    assert not list(left)
    assert not os.listdir(home)


def test_the_share_of_the_processors_is_measured():
    assert share_of_processors(0.05) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "threads 0"),
        (["--device", "cuda", "--threads", "2"], "threads 2"),
        (["--out", "."], "it is a directory"),
        (["--out", "file/cpu.json"], "file"),
    ],
    ids=" ".join,
)
def test_bad_arguments_are_one_plain_line_before_anything_is_measured(home, capsys, arguments, message, monkeypatch):
    monkeypatch.setattr(measure, "_measure", None)
    home.mkdir()
    (home / "file").touch()
    monkeypatch.chdir(home)
    assert cli.main(["calibrate", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize("arguments", [["--device", "tpu"], ["--threads", "two"], ["--nonsense"]], ids=" ".join)
def test_wrong_usage_exits_2(arguments):
    with pytest.raises(SystemExit) as error:
        cli.main(["calibrate", *arguments])
    assert error.value.code == 2
