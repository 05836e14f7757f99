"""The kernels without a GPU: in Triton's interpreter, each file in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels.process import passes

FILES = sorted(path.name for path in Path(__file__).parent.glob("interpreted_*.py"))


@pytest.mark.parametrize("name", FILES)
def test_in_the_interpreter(name: str, pytestconfig: pytest.Config, tmp_path: Path) -> None:
    passes(name, pytestconfig, tmp_path)
