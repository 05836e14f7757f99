"""The file of a machine's constants: written whole, read with care."""

import json
import os
import re
import stat
import warnings
from pathlib import Path

import pytest
import torch

from tensorlayers import FactorizedLinear, LowRank, cli
from tensorlayers.errors import CostModelError
from tensorlayers.machine import SHIPPED, VARIABLE, machine, measured, read, read_measured, shipped, write
from tests.machine import TYPICAL
from tests.machines.support import KNOWN


def test_a_file_is_read_as_it_was_written_and_used_from_then_on(home):
    assert machine("cpu").to_json() == shipped("cpu").to_json()
    write(TYPICAL, home / "cpu.json")
    assert os.listdir(home) == ["cpu.json"]
    assert read(home / "cpu.json").to_json() == TYPICAL.to_json() == machine("cpu").to_json()
    assert machine("cuda").to_json() == shipped("cuda").to_json()
    write(KNOWN, home / "cpu.json")
    assert machine("cpu").constants() == KNOWN.constants()
    (home / "cpu.json").unlink()
    machine.cache_clear()
    assert machine("cpu").to_json() == shipped("cpu").to_json()


def test_other_accelerators_take_the_constants_of_a_gpu(home):
    write(TYPICAL, home / "cuda.json")
    assert machine("mps").name == machine("cuda").name == "typical"
    assert machine("cpu").name == "cpu"
    assert shipped("mps").name == "cuda"


def test_without_the_variable_the_directory_is_that_of_caches(monkeypatch, home, tmp_path):
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write(TYPICAL, tmp_path / "tensorlayers" / "cpu.json")
    assert machine().name == "typical"


def test_without_a_home_directory_nothing_is_measured(monkeypatch, home, capsys):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    assert measured() is None
    assert machine().to_json() == shipped("cpu").to_json()
    assert cli.main(["calibrate"]) == 1
    assert f"no home directory: pass --out FILE, or name one in {VARIABLE}" in capsys.readouterr().err


def test_in_a_directory_that_may_not_be_searched_nothing_is_measured(monkeypatch, home):
    write(TYPICAL, home / "cpu.json")

    def denied(path):
        if path.is_relative_to(home):
            raise PermissionError(13, "Permission denied")
        return True

    monkeypatch.setattr(Path, "is_file", denied)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert machine().to_json() == shipped("cpu").to_json()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)], ids=oct)
def test_a_file_may_be_read_by_whom_the_umask_lets(home, umask, mode):
    before = os.umask(umask)
    try:
        write(TYPICAL, home / "cpu.json")
    finally:
        os.umask(before)
    assert stat.S_IMODE((home / "cpu.json").stat().st_mode) == mode


def test_a_file_that_cannot_be_written_stays_as_it_was(monkeypatch, home):
    write(TYPICAL, home / "cpu.json")

    def full(*paths):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write(KNOWN, home / "cpu.json")
    assert os.listdir(home) == ["cpu.json"]
    assert read(home / "cpu.json").name == "typical"


def test_all_shipped_files_are_sound():
    for path in SHIPPED.glob("*.json"):
        assert read(path).to_json() == path.read_text()


GOOD = json.loads(TYPICAL.to_json())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "no file of a machine's constants", id="empty"),
        pytest.param("[1]", "no file of a machine's constants", id="list"),
        pytest.param(TYPICAL.to_json()[:100], "no file of a machine's constants", id="cut"),
        pytest.param({**GOOD, "speed": 1}, "speed", id="unknown"),
        pytest.param({name: value for name, value in GOOD.items() if name != "launch"}, "launch", id="missing"),
        pytest.param({**GOOD, "flops": {"float64": 1e9}}, "flops.float32 is missing", id="no float32"),
        pytest.param({**GOOD, "flops": 1e9}, "flops.float32 is missing", id="flops"),
        pytest.param({**GOOD, "half": {"m": 1, "n": 1}}, "half.k is missing", id="half"),
        pytest.param({**GOOD, "memory": 0}, "memory is 0", id="zero"),
        pytest.param({**GOOD, "cache": -1}, "cache is -1", id="negative"),
        pytest.param({**GOOD, "cache": 6e6}, "cache is an integer, at most 10", id="float cache"),
        pytest.param({**GOOD, "cache": 1e300}, "cache is 1e+300", id="huge float cache"),
        pytest.param({**GOOD, "cache": 10**16}, "cache is an integer, at most 10", id="huge cache"),
        pytest.param({**GOOD, "launch": 10**400}, "launch is 1000", id="huge integer"),
        pytest.param({**GOOD, "memory": 1e-300}, "memory is 1e-300", id="tiny"),
        pytest.param({**GOOD, "half": {**GOOD["half"], "m": 1e300}}, "half.m is 1e+300", id="huge"),
        pytest.param({**GOOD, "cached": float("nan")}, "cached is nan", id="nan"),
        pytest.param({**GOOD, "cached": float("inf")}, "cached is inf", id="inf"),
        pytest.param({**GOOD, "launch": "fast"}, "launch is 'fast'", id="text"),
        pytest.param({**GOOD, "launch": True}, "launch is True", id="bool"),
        pytest.param({**GOOD, "conv": {"rate": None}}, "conv.rate is None", id="none"),
        pytest.param({**GOOD, "threads": -1}, "threads", id="threads"),
        pytest.param({**GOOD, "threads": "2"}, "threads", id="text threads"),
        pytest.param({**GOOD, "threads": 2.0}, "threads is an integer", id="float threads"),
        pytest.param({**GOOD, "threads": True}, "threads is an integer", id="bool threads"),
        pytest.param({**GOOD, "threads": 10**7}, "threads is an integer", id="many threads"),
        pytest.param({**GOOD, "name": 7}, "name", id="name"),
    ],
)
def test_a_bad_file_is_named_with_what_to_do(home, text, message):
    home.mkdir()
    path = home / "cpu.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    for reading in (lambda: read(path), read_measured):
        with pytest.raises(CostModelError) as error:
            reading()
        assert str(error.value).startswith(f"{path}: ")
        assert message in str(error.value)
        assert str(error.value).endswith("delete the file, or run `tensorlayers calibrate` again")
    # A forward does without it.
    with pytest.warns(UserWarning, match=re.escape(str(error.value))) as warned:
        assert machine("cpu").to_json() == machine("cpu").to_json() == shipped("cpu").to_json()
    assert len(warned) == 1


def test_a_file_that_is_no_text_is_refused(home):
    home.mkdir()
    (home / "cpu.json").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(CostModelError, match=r"cpu\.json"):
        read_measured()


def test_a_forward_warns_once_of_a_file_that_cannot_be_read(monkeypatch, home):
    write(TYPICAL, home / "cpu.json")
    original = Path.read_text

    def denied(path, *arguments, **options):
        if path.is_relative_to(home):
            raise PermissionError(13, "Permission denied")
        return original(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", denied)
    layer, x = FactorizedLinear(48, 56, format=LowRank(3)), torch.randn(900, 48)
    with pytest.warns(UserWarning, match=r"cpu\.json: .*Permission denied.*tensorlayers calibrate.*shipped") as warned:
        assert [len(layer(x[:rows])) for rows in (900, 300, 40)] == [900, 300, 40]
    assert len(warned) == 1


def test_the_command_refuses_to_plan_by_a_bad_file(home, capsys, tmp_path):
    home.mkdir()
    (home / "cpu.json").write_text("nonsense")
    for arguments in (["plan", str(tmp_path)], ["convert", str(tmp_path), "--out", str(tmp_path / "out")]):
        assert cli.main(arguments) == 1
        assert f"{home / 'cpu.json'}: no file of a machine's constants" in capsys.readouterr().err
