"""All kernels compiled ahead of time."""

from __future__ import annotations

import json

import pytest
import triton

from benchmarks import aot
from benchmarks.aot_cases import Case, cases
from tensorlayers import launch_tables


def hardest() -> list[Case]:
    """Of each row and dtype but float16 the last layout; benchmarks/aot.py compiles the others too."""
    return list({(case.name, case.dtype): case for case in cases("sm_90") if case.dtype != "float16"}.values())


@pytest.mark.parametrize("case", hardest(), ids=lambda case: f"{case.name}-{case.dtype}-{case.layout}")
def test_every_row_of_the_table_compiles_within_the_chip(case: Case) -> None:
    assert aot.faults(case, aot.compiled(case, "sm_90"), launch_tables.shipped("sm_90")) == []


def test_what_was_found_is_of_these_sources() -> None:
    """Where this fails, kernels or tables were changed: `make aot` compiles them all again."""
    found = json.loads((aot.ROOT / "benchmarks" / "aot.json").read_text())
    assert found["sources"] == aot.sources()
    assert {version.rsplit(".", 1)[0] for version in found["triton"]} >= {"3.6", triton.__version__.rsplit(".", 1)[0]}
    for version, archs in found["triton"].items():
        assert archs.pop("faults") == [], version
        for arch in launch_tables.architectures():
            assert archs[arch].keys() == {f"{case.name} {case.dtype}" for case in cases(arch)}
