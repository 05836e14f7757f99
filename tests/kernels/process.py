"""Tests in Triton's interpreter: Triton decides on import whether it interprets, so they run in another process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


def passes(name: str, config: pytest.Config, tmp_path: Path) -> None:
    """Run a file of this directory by pytest, with the interpreter; all its tests must pass, and none be skipped."""
    paths = " ".join(str(path) for path in config.getini("pythonpath"))
    file = Path(__file__).with_name(name)
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", f"pythonpath={paths}", str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=tmp_path,  # so that the checkout is on the path of the child only where it is on this process's
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stdout
    assert re.search(r"^\d+ passed(, \d+ warnings?)? in ", child.stdout.splitlines()[-1]), child.stdout
