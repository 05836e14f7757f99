"""The language model of the benchmarks, a tiny one: trained, interrupted, converted, stated."""

import importlib
import json
import math
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers")

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
MODULES = ("language_model", "language_table", "language")
TINY = {"hidden": 16, "inner": 24, "layers": 2, "heads": 2, "vocabulary": 300, "window": 16, "batch": 4, "modules": 4}


@pytest.fixture(scope="module")
def benchmark():
    """The modules of the benchmark, by name; gone again afterwards."""
    before = set(sys.modules), list(sys.path)
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.path[:] = before[1]
        for name in {*MODULES, "common"} - before[0]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def trained(benchmark, tmp_path_factory):
    """A directory with a tiny trained model, and what its training says."""
    out = tmp_path_factory.mktemp("language") / "model"
    settings = benchmark.language_model.Settings(**TINY, tokens=40 * 64, rate=1e-2)
    return out, benchmark.language_model.train(out, settings, every=10, test_windows=8)


def test_the_command_for_all_tables_calls_scripts_that_there_are(tmp_path):
    accuracy = runpy.run_path(str(FOLDER / "accuracy.py"))
    made = accuracy["commands"](tmp_path, tmp_path / "model")
    assert {command[0] for command in made} == {"encoder.py", "language.py", "digits_budget.py"}
    assert all((FOLDER / command[0]).exists() for command in made)


def test_training_lowers_the_held_out_loss(trained):
    out, summary = trained
    assert summary["curve"][-1]["held_out"] < summary["curve"][0]["held_out"] < math.log(300) + 0.1
    assert json.loads((out / "training.json").read_text())["perplexity"] == summary["perplexity"]
    assert summary["in_matrices"] == 2 * (4 * 16 * 16 + 3 * 16 * 24)


def test_an_interrupted_training_goes_on_as_if_it_had_not_been(benchmark, trained, tmp_path, monkeypatch):
    model, (out, summary) = benchmark.language_model, trained
    settings = model.Settings(**TINY, tokens=40 * 64, rate=1e-2)
    whole, calls = model.loss_of, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) > 25:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(model, "loss_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.train(tmp_path, settings, every=10, test_windows=8)
    monkeypatch.setattr(model, "loss_of", whole)
    again = model.train(tmp_path, settings, every=10, test_windows=8)
    assert again["curve"] == summary["curve"]
    assert (tmp_path / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="other settings"):
        model.train(tmp_path, replace(settings, rate=1.0), every=10)


def test_perplexity_is_that_of_each_next_token(benchmark, trained):
    network, _, settings = benchmark.language_model.load(trained[0])
    ids = torch.randint(0, settings.vocabulary, (5, settings.window))
    with torch.no_grad():
        chances = network.double()(input_ids=ids).logits.softmax(-1)
    picked = [float(chances[b, t, ids[b, t + 1]].log()) for b in range(5) for t in range(settings.window - 1)]
    assert benchmark.language_model.perplexity(network, ids, batch=2) == pytest.approx(
        math.exp(-sum(picked) / len(picked)), rel=1e-5
    )


def test_training_and_test_text_have_no_module_in_common(benchmark):
    seen, held = (set(benchmark.language_model.modules_of(part, None)) for part in ("calibration", "test"))
    assert seen
    assert held
    assert seen.isdisjoint(held)


@pytest.mark.parametrize("share", [0.8, 0.6, 0.4, 0.05])
def test_the_smaller_network_has_at_most_the_share_of_the_parameters(benchmark, share):
    settings = benchmark.language_model.Settings()
    smaller = benchmark.language_table.smaller_settings(settings, share)
    count = smaller.hidden * (4 * smaller.hidden + 3 * smaller.inner)
    whole = settings.hidden * (4 * settings.hidden + 3 * settings.inner)
    assert (share - 0.01) * whole < count <= share * whole
    assert smaller.hidden % (2 * settings.heads) == 0
    assert smaller.layers == settings.layers


def test_the_table_is_computed_row_by_row_and_none_twice(benchmark, trained, tmp_path, capsys):
    out = tmp_path / "language.json"
    common = ["table", "--model", str(trained[0]), "--out", str(out), "--removed", "0.5", "--calibration", "8"]
    common += ["--test", "8", "--minutes", "0.01", "--methods"]
    methods = list(benchmark.language_table.METHODS)
    benchmark.language.main([*common, *methods[:2]])
    first = json.loads(out.read_text())
    benchmark.language.main([*common, *methods])
    rows = json.loads(out.read_text())["rows"]
    assert rows[:2] == first["rows"]
    assert [row["method"] for row in rows] == methods
    assert all(0.3 < row["kept"] < 0.6 and row["perplexity"] > 1 for row in rows)
    printed = capsys.readouterr().out
    assert "| plain SVD | " in printed
    assert "50% removed" in printed
