"""The notebooks: their code runs, in the small form; what is committed has outputs that are nobody's own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = [pytest.param(path, id=path.stem) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
PERSONAL = re.compile(r"(?<![\w.])/(?:root|work|home|Users|tmp|opt|usr|var)/|Warning\b|\bWARNING\b|Traceback")


def cells(path, kind):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def texts(outputs):
    """What a reader sees of outputs as text."""
    for output in outputs:
        yield output.get("text", "")
        yield from output.get("traceback", [])
        yield from (str(value) for kind, value in output.get("data", {}).items() if not kind.startswith("image/"))


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_the_code_runs_in_the_small_form(path, tmp_path):
    script = tmp_path / f"{path.stem}.py"
    script.write_text("\n\n".join(cell.source for cell in cells(path, "code")), encoding="utf-8")
    environment = {
        **os.environ,
        "TENSORLAYERS_SMALL": "1",
        "MPLBACKEND": "agg",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_it_opens_and_ends_with_text(path):
    found = nbformat.read(path, as_version=4).cells
    assert found[0].cell_type == found[-1].cell_type == "markdown"
    assert found[0].source.startswith("# ")


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_outputs_are_committed_and_of_one_run(path):
    found = cells(path, "code")
    assert [cell.execution_count for cell in found] == list(range(1, len(found) + 1))
    assert any(cell.outputs for cell in found)
    assert not [output for cell in found for output in cell.outputs if output.output_type == "error"]


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_no_output_holds_a_path_or_a_warning(path):
    for cell in cells(path, "code"):
        for text in texts(cell.outputs):
            assert not PERSONAL.search(text), text
