"""The chain kernel without a GPU: in the interpreter, in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels.process import passes


@pytest.mark.parametrize("name", ["chain", "layers", "tune"])
def test_in_the_interpreter(name: str, pytestconfig: pytest.Config, tmp_path: Path) -> None:
    passes(f"interpreted_{name}.py", pytestconfig, tmp_path)
