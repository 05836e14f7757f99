"""What the benchmarks count and search for; no time is asserted here."""

import importlib
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
MODULES = ("timing", "memory", "compare", "report", "cases", "layers", "peers", "convs", "models", "scaling")


@pytest.fixture(scope="module")
def benchmarks():
    """The modules of the benchmark command, by name; gone again afterwards."""
    before = set(sys.modules), list(sys.path)
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.path[:] = before[1]
        for name in MODULES:
            if name not in before[0]:
                del sys.modules[name]


def test_saved_bytes_are_those_of_the_input_and_not_of_parameters(benchmarks):
    assert benchmarks.memory.saved_bytes(nn.Linear(16, 8), torch.randn(4, 16)) == 4 * 16 * 4
    two = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8))
    assert benchmarks.memory.saved_bytes(two, torch.randn(4, 16)) == 4 * (16 + 8) * 4  # relu's output, once


def test_peak_bytes_are_of_what_is_alive_at_once(benchmarks):
    def run():
        first = torch.zeros(1000, 1000)
        total = first + first
        del first
        return total.sum() + torch.zeros(1000, 1000)[0, 0]

    assert benchmarks.memory.peak_bytes(run) == pytest.approx(2 * 4 * 1000**2, rel=1e-3)


def test_formats_are_found_at_the_wanted_share_of_the_flops(benchmarks):
    cases = benchmarks.cases
    for wanted in (cases.LOW, cases.MIDDLE):
        for format in cases.FORMATS:
            candidate = cases.linear(768, 3072, cases.at_share(768, 3072, wanted, format), 1024)
            assert math.isclose(candidate.facts["flops"], wanted, rel_tol=0.1), candidate.name


def test_every_format_is_compared(benchmarks):
    from tensorlayers import formats

    assert {format.name for format in benchmarks.cases.FORMATS} == set(formats.available())
    assert set(benchmarks.cases.TINY) == set(benchmarks.cases.FORMATS)


def test_what_is_wrong_is_not_timed(benchmarks):
    compare, report = benchmarks.compare, benchmarks.report

    def refuse(module, x):
        raise AssertionError("it is wrong")

    candidates = [
        compare.Candidate("right", nn.Linear(8, 8), targets={"forward": 1e9}, memory=False),
        compare.Candidate("wrong", nn.Linear(8, 8), refuse, memory=False),
    ]
    rows = compare.compare("a case", nn.Linear(8, 8), candidates, torch.randn(2, 8), 0.0)
    assert [row.failed for row in rows] == [False, False, True]
    assert rows[1].figures["forward"].met
    assert not rows[2].figures
    assert "it is wrong" in report.table(rows)
    assert "1 of 1 targets met" in report.summary(rows)


def test_a_figure_states_what_it_misses(benchmarks):
    figure = benchmarks.compare.Figure
    assert benchmarks.report.figure(figure(0.5, 0.4)) == "0.50 <= 0.40 <<"
    assert benchmarks.report.figure(figure(5.0, 3.0, at_least=True)) == "5.00 >= 3.00"
