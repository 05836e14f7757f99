"""All kernels compiled ahead of time."""

from __future__ import annotations

import pytest

from benchmarks import aot
from benchmarks.aot_cases import Case, cases
from tensorlayers import launch


def hardest() -> list[Case]:
    """Of each row and dtype but float16 the last layout; benchmarks/aot.py compiles the others too."""
    return list({(case.name, case.dtype): case for case in cases("sm_90") if case.dtype != "float16"}.values())


@pytest.mark.parametrize("case", hardest(), ids=lambda case: f"{case.name}-{case.dtype}-{case.layout}")
def test_every_row_of_the_table_compiles_within_the_chip(case: Case) -> None:
    assert aot.faults(case, aot.compiled(case, "sm_90"), launch.shipped("sm_90")) == []
