"""Tuning in the interpreter, with times that are made up; run by test_chain.py as the others are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tensorlayers import launch, tune
from tensorlayers.errors import CostModelError
from tensorlayers.kernels import chain as kernel


def test_the_fastest_neighbour_is_kept_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORLAYERS_MACHINES", str(tmp_path))
    launched: list[launch.Tiles] = []
    monkeypatch.setattr(kernel, "run", lambda *operands, table: launched.append(table.rows[0].tiles))

    def timer(call: Callable[[], None]) -> float:
        call()
        return abs(launched[-1].n - 32) + launched[-1].stages / 10  # tiles of 32 columns and few stages are fastest

    before = launch.shipped(launch.DEFAULT)
    found = tune.tune("cpu", timer)
    assert {row.tiles.n for row in found.rows if row.dtype == "half"} <= {16, 32, 64}
    for row, old in zip(found.rows, before.rows, strict=True):
        assert row == old or row.tiles in set(tune.neighbours(old.tiles, is_shared=old.shared))
        assert row.tiles == old.tiles or row.dtype == "half"
    assert tune.write(found) == tmp_path / f"{launch.DEFAULT}.json"
    read = launch.table(launch.DEFAULT)
    assert read.rows == found.rows
    assert tune.to_json(read) == tune.to_json(found)
    launch.table.cache_clear()


def test_the_problem_of_a_row_takes_its_tiles() -> None:
    table = launch.shipped(launch.DEFAULT)
    for row in table.rows:
        if row.dtype == "half":
            problem = kernel.problem(*tune._operands(row, "cpu"))
            only = replace(table, rows=(replace(row, n=None, m=None), *table.rows))
            assert only.row(problem).tiles == row.tiles, row


def test_what_the_chip_lacks_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    class OutOfResources(Exception):
        pass

    def run(*operands: object, table: launch.Table) -> None:
        if table.rows[0].tiles.stages > 1:
            raise OutOfResources

    monkeypatch.setattr(kernel, "run", run)
    found = tune.tune("cpu", lambda call: (call(), 1.0)[1])
    before = launch.shipped(launch.DEFAULT).rows
    for row, old in zip(found.rows, before, strict=True):
        assert row.tiles.stages == 1 or row == old
    monkeypatch.setattr(kernel, "run", lambda *operands, table: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tune.tune("cpu", lambda call: (call(), 1.0)[1])


def test_it_needs_a_gpu() -> None:
    with pytest.raises(CostModelError, match="tune needs a GPU"):
        tune.tune("cpu")
