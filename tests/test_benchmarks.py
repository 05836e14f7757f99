"""What the benchmarks count and search for; no time is asserted here."""

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tensorlayers import TT, FactorizedLinear, LowRank, formats, launch_tables, machine

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
MODULES = ("timing", "memory", "compare", "report", "cases", "layers", "peers", "convs", "models", "scaling", "run")
GPU = ("gpu_cases", "gpu_timing", "gpu_layers", "gpu_sections", "gpu_verdict", "gpu", "predicted")


@pytest.fixture(scope="module")
def benchmarks():
    """The modules of the benchmark command, by name; gone again afterwards."""
    before = set(sys.modules), list(sys.path)
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES + GPU})
    finally:
        sys.path[:] = before[1]
        for name in MODULES + GPU:
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


@pytest.mark.parametrize(("in_features", "out_features"), [(768, 3072), (1024, 4096)])
def test_ranks_are_multiples_of_what_blas_is_fast_at(benchmarks, in_features, out_features):
    cases = benchmarks.cases
    for wanted in (cases.LOW, cases.MIDDLE):
        for format in cases.FORMATS:
            chosen = cases.at_share(in_features, out_features, wanted, format)
            ranks = chosen.rank if isinstance(chosen.rank, tuple) else (chosen.rank,)
            assert all(rank < 12 or rank % (4 if rank <= 32 else 8) == 0 for rank in ranks), chosen


def test_every_format_is_compared(benchmarks):
    assert {format.name for format in benchmarks.cases.FORMATS} == set(formats.available())
    assert set(benchmarks.cases.OVERHEAD) == set(benchmarks.cases.FORMATS)


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
    assert benchmarks.report.figure(figure(0.5, 0.4)) == "0.50 (<= 0.40) <<"
    assert benchmarks.report.figure(figure(5.0, 3.0, at_least=True)) == "5.00 (>= 3.00)"
    assert benchmarks.report.figure(figure(3.18, 3.2)) == "3.18 (<= 3.20)"
    assert benchmarks.report.figure(figure(3.18)) == "3.18"


def test_every_column_has_a_head_of_its_own(benchmarks):
    heads = list(benchmarks.report.HEADS.values())
    assert len(set(heads)) == len(heads)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["layer"], "a part is one of"),
        (["plots"], "--out DIR is needed"),
        (["plots", "--out", "."], "no scaling.json"),
        (["--threads", "0"], "--threads is 1 or more; got 0"),
        (["--seconds", "0"], "--seconds is a number above 0; got 0"),
        (["--seconds", "-1"], "--seconds is a number above 0; got -1"),
        (["--seconds", "nan"], "--seconds is a number above 0; got nan"),
    ],
    ids=["part", "nowhere", "nothing", "threads", "zero", "negative", "nan"],
)
def test_the_command_refuses_what_it_cannot_do(benchmarks, words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        benchmarks.run.parse(words)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_plots_are_drawn_from_what_is_there_or_will_be(benchmarks, tmp_path):
    assert benchmarks.run.parse(["scaling", "plots", "--out", str(tmp_path)]).parts == ["scaling", "plots"]
    (tmp_path / "scaling.json").write_text("{}", encoding="utf-8")
    assert benchmarks.run.parse(["plots", "--out", str(tmp_path)]).out == tmp_path


def test_a_row_says_where_a_factor_is_beyond_the_arithmetic(benchmarks):
    figures = {kind: benchmarks.compare.Figure(value) for kind, value in (("forward", 1.8), ("training", 2.5))}
    said = benchmarks.peers.beyond(figures, 0.4, 5.0)
    assert said == "5 x is beyond the arithmetic: at dense's rate forward <= 4.50 x"
    assert not benchmarks.peers.beyond(figures, 0.3, 5.0)


def test_arithmetic_is_that_of_the_cheaper_way(benchmarks):
    for rank, is_factorized in ((4, True), (64, False)):
        layer = FactorizedLinear(768, 3072, format=TT(rank))
        factorized = benchmarks.cases.share(type(layer), layer.settings_of(layer), layer.own_network, 1024)
        rebuilt = 1 + benchmarks.cases.rebuilding(layer, 1024)
        assert benchmarks.cases.least_work(layer, 1024) == (factorized if is_factorized else rebuilt)


@pytest.mark.parametrize("name", sorted(formats.available()))
def test_a_layer_that_stores_is_a_copy(benchmarks, name):
    layer = FactorizedLinear(24, 32, format=formats.available()[name](2))
    other = benchmarks.peers.stored(layer)
    assert (layer.backward, other.backward) == ("recompute", "store")
    x = torch.randn(3, 24)
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize(("pattern", "is_aimed"), [(".*", False), ("2", True)], ids=["few", "most"])
def test_a_model_of_which_little_is_converted_has_no_target(benchmarks, pattern, is_aimed):
    module = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 64))  # two are too small to convert
    model = benchmarks.models.Model("a model", module, torch.randn(2, 12), pattern, {"training": 0.8})
    candidate = benchmarks.models.converted(model, LowRank)
    assert candidate.facts["converted"] == "1 of 3"
    assert candidate.targets == (model.targets if is_aimed else {})
    assert ("convert_model" in candidate.facts) is not is_aimed
    if not is_aimed:
        assert candidate.facts["convert_model"].startswith("converts 1 of the 3 layers asked for (1 without")


# -- on a GPU ---------------------------------------------------------------------------------------------------------


def timed(forward, training, **more):
    return {"forward": {"device_us": forward}, "training": {"device_us": training}, "saved_bytes": 64} | more


def gpu_report(**changes):
    """Of one layer, which is twice as fast as dense, at half the rate of the GEMM."""
    rate = {"chosen": {"forward": {"tflop_per_s": 350.0}}}
    train = {"layer": "4096->4096", "rank": 8, "rows": 4096, "rebuild_share": 0.01, "dense": timed(200.0, 600.0)}
    train |= {"converted": {"forward": True, "training": True}, "fused": timed(100.0, 300.0, **rate)}
    train |= {"None": timed(100.0, 300.0)} | changes
    gemms = [{"dtype": f"torch.{dtype}", "tflop_per_s": 700.0} for dtype in ("bfloat16", "float32")]
    roof = {"gemms": gemms, "copy_bytes_per_s": 4e12, "launch_s": 2e-6}
    empty = {name: [] for name in ("parity", "reruns", "formats", "others", "peers", "lookups", "mlps")}
    return {"trains": [train], "roofline": roof, **empty}


def test_targets_on_a_gpu(benchmarks):
    found = benchmarks.gpu_verdict.targets(gpu_report())
    assert {one["target"]: (one["least"], one["measured"]) for one in found} == {
        "4096->4096, TT(8), 4096 rows, forward": (1.9, 2.0),
        "4096->4096, TT(8), 4096 rows, training": (1.5, 2.0),
        "4096->4096, TT(8), 4096 rows, share of the GEMM rate": (0.5, 0.5),
        **{
            f"trains: layer 4096->4096, rank 8, rows 4096, rebuild_share 0.01, {what}, {why}": (least, 2.0)
            for what in ("forward", "training")
            for why, least in (("a cheap rebuild", 1 / 1.15), ("converted by plans", 1.0))
        },
        "trains: layer 4096->4096, rank 8, rows 4096, rebuild_share 0.01, bytes saved, dense / factorized": (1.0, 1.0),
    }
    assert all(one["passed"] for one in found)
    slow = benchmarks.gpu_verdict.targets(gpu_report(**{"None": timed(250.0, 300.0, saved_bytes=65)}))
    missed = [one["target"] for one in slow if not one["passed"]]
    assert len(missed) == 4
    assert sum("bytes saved" in name for name in missed) == 1
    refused = benchmarks.gpu_verdict.targets(gpu_report(**{"None": {"refused": "parity failed, so it is not timed"}}))
    assert sum(not one["passed"] for one in refused) == 7


@pytest.fixture
def package(tmp_path):
    """A copy of the folders of constants."""
    for folder in ("machines", "launches"):
        shutil.copytree(FOLDER.parent / "tensorlayers" / folder, tmp_path / folder)
    return tmp_path


def test_what_a_gpu_measured_is_adopted(benchmarks, package, tmp_path):
    report = gpu_report()
    found = {**benchmarks.gpu_verdict.constants(report), "arch": "sm_90"}
    on, table = (tmp_path / "machines" / "cuda.json"), (tmp_path / "launches" / "sm_90.json")
    before = {path: path.read_text() for path in tmp_path.rglob("*.json")}
    assert benchmarks.gpu_verdict.adopt({"dry": False, "constants": found}, tmp_path) == [on, table]
    after = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path for path in after if after[path] != before.get(path)} == {on, table}
    made, before = launch_tables.read(table), launch_tables.shipped("sm_90")
    assert (made.rates["half"], made.memory, made.launch) == (350e12, 4e12, 2e-6)
    assert (made.rows, made.kernels, made.rates["tf32"]) == (before.rows, before.kernels, before.rates["tf32"])
    assert machine.read(on).flops["bfloat16"] == 700e12
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(report))
    assert benchmarks.predicted.measured("4096->4096", 8, path) == "2.00 (2.00)"
    assert benchmarks.predicted.measured("4096->4096", 16, path) == "not yet"


GEMM = {"bfloat16": 700.0, "float32": 60.0}
CONSTANTS = {"arch": "sm_90", "gemm_tflop_per_s": GEMM, "copy_bytes_per_s": 4e12, "launch_s": 2e-6}
CONSTANTS |= {"chain_tflop_per_s": 350.0}


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ([], "a report is a JSON object; got list"),
        ({"dry": True, "constants": CONSTANTS}, "this one is of a dry run"),
        ({"versions": {"torch": "2.11"}, "constants": CONSTANTS}, "this one is of a dry run"),
        ({"dry": False}, "a report with constants; this one has none"),
        *(
            ({"dry": False, "constants": CONSTANTS | change}, message)
            for change, message in [
                ({"arch": "sm_86"}, "an architecture that the package has a launch table for; got sm_86"),
                ({"arch": "../machines/cuda"}, "an architecture that the package has"),
                ({"arch": None}, "constants: arch is a text; got None"),
                ({"launch_s": 0.0}, "launch_s is a number from 1e-08 to 0.01; got 0.0"),
                ({"launch_s": True}, "launch_s is .*; got True"),
                ({"copy_bytes_per_s": math.nan}, "copy_bytes_per_s is .*; got nan"),
                ({"copy_bytes_per_s": 1e3}, "copy_bytes_per_s is .*; got 1000.0"),
                ({"chain_tflop_per_s": -1.0}, "chain_tflop_per_s is .*; got -1.0"),
                ({"chain_tflop_per_s": math.inf}, "chain_tflop_per_s is .*; got inf"),
                ({"gemm_tflop_per_s": GEMM | {"float32": 0.0}}, "gemm_tflop_per_s: float32 is .*; got 0.0"),
                ({"gemm_tflop_per_s": None}, "gemm_tflop_per_s: bfloat16 is .*; got None"),
            ]
        ),
    ],
)
def test_a_report_that_is_not_adopted_changes_nothing(benchmarks, package, report, message):
    before = {path: path.read_text() for path in package.rglob("*.json")}
    with pytest.raises(ValueError, match=message):
        benchmarks.gpu_verdict.adopt(report, package)
    assert {path: path.read_text() for path in package.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("at", [1, 2])
def test_both_tables_are_written_or_none(benchmarks, package, monkeypatch, at):
    before = {path: path.read_text() for path in package.rglob("*.json")}
    left, replace = iter(range(1, 3)), os.replace

    def failing(source, target):
        if next(left) == at:
            raise OSError("no space left")
        replace(source, target)

    monkeypatch.setattr(benchmarks.gpu_verdict.os, "replace", failing)
    with pytest.raises(OSError, match="no space left"):
        benchmarks.gpu_verdict.adopt({"dry": False, "constants": CONSTANTS}, package)
    assert {path: path.read_text() for path in package.rglob("*") if path.is_file()} == before


def test_files_of_a_gpu_are_looked_at_before_the_work(benchmarks, tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.json"
    text.write_text("none")
    for options, message in [
        (("--adopt", tmp_path / "missing.json"), "No such file"),
        (("--adopt", text), "no JSON"),
        (("--adopt", text, "--out", tmp_path / "gpu.json"), "it goes without --out"),
        (("--out", tmp_path / "missing" / "gpu.json"), "No such file"),
        (("--out", tmp_path), "Is a directory"),
    ]:
        monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, options)])
        with pytest.raises(SystemExit) as caught:
            benchmarks.gpu.main()
        assert caught.value.code == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["text.json"]


def test_the_benchmark_of_a_gpu_runs_in_the_interpreter(tmp_path):
    file = tmp_path / "gpu.json"
    command = [sys.executable, str(FOLDER / "gpu.py"), "--dry", "--out", str(file)]
    child = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert child.returncode == 0, child.stdout
    report = json.loads(file.read_text())
    assert all(record["passed"] for record in (*report["parity"], *report["reruns"]))
    assert {record["kernel"] for record in report["parity"]} == {"fused", "fused_rebuild", "fused_khatri_rao"}
    assert report["lookups"][0]["parity"]["passed"]
    assert report["mlps"][0]["parity"]["passed"]
    assert report["dry"] is True
    command[2:] = ["--adopt", str(file)]
    child = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert child.returncode == 2
    assert "a report of a GPU; this one is of a dry run" in child.stderr
    assert report["targets"]
    assert all(one["passed"] for one in report["targets"])  # bytes saved are those of dense
