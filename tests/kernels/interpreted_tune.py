"""Tuning in the interpreter, with times that are made up; run by test_interpreted.py as the others are."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tensorlayers import cli, launch, launch_tables, tune
from tensorlayers.errors import CostModelError
from tensorlayers.kernels import chain as kernel

LAUNCHED = launch.launch


@pytest.fixture(autouse=True)
def _no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is computed: operands are made where they take no memory, as large as on a GPU."""
    monkeypatch.setattr(torch, "randn", lambda shape, dtype, device: torch.empty(shape, dtype=dtype, device="meta"))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[launch_tables.Tiles]:
    """The tiles of all launches, as the kernel takes them."""
    found: list[launch_tables.Tiles] = []

    def run(*operands: Tensor, table: launch_tables.Table) -> None:
        found.append(LAUNCHED(kernel.problem(*operands), table).tiles)

    monkeypatch.setattr(kernel, "run", run)
    return found


def test_the_fastest_neighbour_is_kept_and_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launched: list[launch_tables.Tiles]
) -> None:
    monkeypatch.setenv("TENSORLAYERS_MACHINES", str(tmp_path))

    def timer(call: Callable[[], None]) -> float:
        call()
        return abs(launched[-1].n - 32) + launched[-1].stages / 10  # tiles of 32 columns and few stages are fastest

    before = launch_tables.shipped(launch_tables.DEFAULT)
    found = tune.tune("cpu", timer)
    assert {row.tiles.n for row in found.rows if row.dtype == "half"} <= {16, 32, 64}
    for row, old in zip(found.rows, before.rows, strict=True):
        assert row == old or row.tiles in set(tune.neighbours(old.tiles, is_shared=old.shared))
        assert row.tiles == old.tiles or row.dtype == "half"
    assert replace(found, rows=before.rows, kernels=before.kernels).rates == before.rates
    assert (found.kernels, found.processors) == (before.kernels, before.processors)
    assert tune.write(found) == tmp_path / f"{launch_tables.DEFAULT}.json"
    read = launch_tables.table(launch_tables.DEFAULT)
    assert read.rows == found.rows
    assert tune.to_json(read) == tune.to_json(found)
    launch_tables.table.cache_clear()


@pytest.mark.parametrize("arch", launch_tables.architectures())
@pytest.mark.parametrize("most", [True, False], ids=["the largest", "the smallest"])
def test_what_is_written_is_what_ran(
    arch: str, most: bool, monkeypatch: pytest.MonkeyPatch, launched: list[launch_tables.Tiles]
) -> None:
    monkeypatch.setattr(launch_tables, "architecture", lambda device: arch)
    per_row: list[set[launch_tables.Tiles]] = []

    def progress(rows: Any) -> Any:
        for row in rows:
            launched.clear()
            yield row
            per_row.append(set(launched))

    def timer(call: Callable[[], None]) -> float:
        call()
        size = launched[-1].heads * launched[-1].m * launched[-1].n * launched[-1].p * launched[-1].q
        return 1 / size if most else size

    found = tune.tune("cpu", timer, progress)
    for row, old, ran in zip(found.rows, launch_tables.shipped(arch).rows, per_row, strict=True):
        if row.dtype == "half":
            assert row.tiles in ran
            # Of its neighbours only those columns are passed over that the row has none of.
            possible = set(tune.neighbours(old.tiles, is_shared=old.shared))
            assert ran == {tiles for tiles in possible if old.n is None or tiles.n <= old.n}
        else:
            assert row == old
            assert not ran


def test_the_problem_of_a_row_takes_its_tiles() -> None:
    table = launch_tables.shipped(launch_tables.DEFAULT)
    for row in table.rows:
        if row.dtype == "half":
            problem = kernel.problem(*tune._operands(row, "cpu"))
            only = replace(table, rows=(replace(row, n=None, m=None), *table.rows))
            assert only.row(problem).tiles == row.tiles, row


def test_what_the_chip_lacks_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*operands: object, table: launch_tables.Table) -> None:
        if table.rows[0].tiles.stages > 1:
            raise OutOfResources

    monkeypatch.setattr(kernel, "run", run)
    found = tune.tune("cpu", lambda call: (call(), 1.0)[1])
    before = launch_tables.shipped(launch_tables.DEFAULT).rows
    for row, old in zip(found.rows, before, strict=True):
        assert row.tiles.stages == 1 or row == old
    monkeypatch.setattr(kernel, "run", lambda *operands, table: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tune.tune("cpu", lambda call: (call(), 1.0)[1])


class OutOfResources(Exception):
    """Named as Triton's."""


def test_a_chip_with_less_memory_gets_smaller_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_tables, "architecture", lambda device: "sm_86")
    ran: set[launch_tables.Tiles] = set()

    def run(*operands: Tensor, table: launch_tables.Table) -> None:
        tiles = LAUNCHED(kernel.problem(*operands), table).tiles
        if tiles.stages * tiles.heads * tiles.m * tiles.n > 16 * 64:
            raise OutOfResources
        ran.add(tiles)

    monkeypatch.setattr(kernel, "run", run)
    found = tune.tune("cpu", lambda call: (call(), 1.0)[1])
    assert {row.tiles for row in found.rows if row.dtype == "half"} <= ran
    read = launch_tables.read(tune.write(found, tmp_path / "sm_86.json"), "sm_86")
    before = launch_tables.shipped("sm_86")
    assert (before.arch, len(read.rows)) == ("sm_80", len(before.rows))
    for row in read.rows:
        if row.dtype != "half":
            assert (row.tiles.heads, row.tiles.stages) == (1, 1)
            assert max(row.tiles.m, row.tiles.n, row.tiles.p, row.tiles.q) <= 32
    for name, dtypes in read.kernels.items():
        for dtype, entry in dtypes.items():
            of_tiles = {key: size for key, size in entry.items() if key not in ("ids", "warp", "ragged_warp")}
            assert max(of_tiles.values()) <= 32, name
            assert entry["stages"] == 1
            assert entry.get("warp") == before.kernels[name][dtype].get("warp")
    monkeypatch.setattr(kernel, "run", lambda *operands, table: (_ for _ in ()).throw(OutOfResources))
    with pytest.raises(CostModelError, match=r"the GPU launches no tiles of Row.*, however small"):
        tune.tune("cpu", lambda call: (call(), 1.0)[1])


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cpu", "times are measured on a GPU; got the device cpu"),
        ("cuda", "a GPU is needed, and torch finds none; got the device cuda"),
        ("meta", "Triton kernels run on a GPU; got the device meta"),
        ("nonsense", 'a device as torch names it, such as "cuda" or "cuda:1"; got \'nonsense\''),
    ],
)
def test_it_needs_a_gpu(device: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for measure in (tune.tune, tune.destination):
        with pytest.raises(CostModelError) as caught:
            measure(device)
        assert str(caught.value) == message


def test_it_needs_triton_or_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(CostModelError, match="on the CPU kernels run in Triton's interpreter alone"):
        tune.tune("cpu", lambda call: 1.0)
    monkeypatch.setattr(tune.backend, "is_present", lambda: False)
    with pytest.raises(CostModelError, match="Triton is needed, and it is not installed"):
        tune.tune("cpu", lambda call: 1.0)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The devices that the command tunes for, on a machine that is taken to have GPUs."""
    monkeypatch.setenv("TENSORLAYERS_MACHINES", str(tmp_path / "used"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(launch_tables, "architecture", lambda device: "sm_90")
    devices: list[str] = []
    monkeypatch.setattr(
        tune, "tune", lambda device, progress: (devices.append(device), launch_tables.shipped("sm_90"))[1]
    )
    return devices


def test_the_command(tmp_path: Path, measured: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune"]) == 0
    assert launch_tables.read(tmp_path / "used" / "sm_90.json", "sm_90").rows == launch_tables.shipped("sm_90").rows
    assert "used from now on; delete it" in capsys.readouterr().out
    out = tmp_path / "deep" / "mine.json"
    assert cli.main(["tune", "--device", "cuda:1", "--out", str(out)]) == 0
    assert measured == ["cuda", "cuda:1"]
    assert json.loads(out.read_text())["arch"] == "sm_90"
    assert "TENSORLAYERS_MACHINES names, as sm_90.json" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.rglob("*.json*")) == ["mine.json", "sm_90.json"]  # no probe is left


def test_the_command_measures_nothing_that_cannot_be_written(
    tmp_path: Path, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for out, message in ((tmp_path, "is a directory"), (tmp_path / "file" / "mine.json", "file")):
        assert cli.main(["tune", "--out", str(out)]) == 1
        assert message in capsys.readouterr().err
    assert cli.main(["tune", "--device", "cuda:2"]) == 1
    assert "tensorlayers tune: a GPU is needed, and torch finds 2; got the device cuda:2" in capsys.readouterr().err
    assert measured == []
