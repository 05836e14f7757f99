"""The command line on a small Hugging Face directory."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import transformers

from tensorlayers import FactorizedLinear, __version__, load_pretrained
from tensorlayers.cli import main

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "file", "is", "read", "written", "not", "when"]
TEXT = "the file is read\na file is written\nnot a file\nwhen is the file read\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny BERT with its tokenizer, as a local directory."""
    directory = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128
    )
    transformers.BertModel(config).save_pretrained(directory)
    (directory / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(str(directory / "vocab.txt")).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory, source):
    """A tiny causal language model that shares the tokenizer."""
    directory = tmp_path_factory.mktemp("gpt2")
    config = transformers.GPT2Config(
        vocab_size=len(WORDS), n_embd=64, n_layer=1, n_head=2, n_positions=32, bos_token_id=2, eos_token_id=3
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(directory)
    return directory


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_convert_inspect_eval(source, text, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["convert", str(source), "--format", "lowrank", "--params", "0.5", "--out", str(out)]) == 0
    assert "7 of 10 layers converted" in capsys.readouterr().out
    model = load_pretrained(out)
    assert sum(isinstance(module, FactorizedLinear) for module in model.modules()) == 7
    transformers.AutoTokenizer.from_pretrained(out)
    assert main(["inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "LowRank" in shown
    dense = sum(p.numel() for p in transformers.BertModel.from_pretrained(source).parameters())
    converted = sum(p.numel() for p in model.parameters())
    assert f"{dense:,} -> {converted:,}" in shown
    assert main(["eval", str(out), "--text", str(text)]) == 0
    assert "Spearman" in capsys.readouterr().out


def test_layers_are_fitted_to_text_within_a_budget(source, text, tmp_path, capsys):
    out, planned, drawn = tmp_path / "out", tmp_path / "plan.json", tmp_path / "plan.svg"
    options = ["--text", str(text), "--budget", "--params", "0.4", "--layers", ".*encoder.*", "--force"]
    assert main(["plan", str(source), *options, "--json", str(planned), "--plot", str(drawn)]) == 0
    shown = capsys.readouterr().out
    assert "of output" in shown
    assert re.search(r"few data: \d\d positions for 64 inputs", shown)
    layers = json.loads(planned.read_text())["layers"]
    encoder = [layer for layer in layers if "encoder" in layer["name"]]
    assert sum(layer["parameters"][1] for layer in encoder) <= 0.4 * sum(layer["parameters"][0] for layer in encoder)
    assert drawn.read_text(encoding="utf-8").lstrip().startswith("<?xml")
    assert main(["convert", str(source), "--plan", str(planned), "--text", str(text), "--out", str(out)]) == 0
    assert "of output" in capsys.readouterr().out
    errors = [m.output_error for m in load_pretrained(out).modules() if isinstance(m, FactorizedLinear)]
    assert errors
    assert all(0 <= error < 1 for error in errors)


def test_a_budget_without_text_is_refused(source, capsys):
    assert main(["plan", str(source), "--budget"]) == 1
    assert capsys.readouterr().err == "tensorlayers plan: --budget: with --text FILE, by which it is spent\n"


def test_eval_of_a_language_model_is_perplexity(gpt2, text, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["convert", str(gpt2), "--rank", "100000", "--force", "--out", str(out)]) == 0
    assert main(["eval", str(out), "--text", str(text), "--source", str(gpt2)]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    source, converted = (float(part.split()[-1]) for part in line.split(":")[1].split(","))
    assert source == pytest.approx(converted, rel=1e-2)


def test_plan_changes_nothing_and_can_be_edited(source, tmp_path, capsys):
    before = sorted((path.name, path.stat().st_mtime_ns) for path in source.iterdir())
    plan = tmp_path / "plan.json"
    options = ["--format", "tt", "--rank", "4", "--order", "3", "--skip", "pooler.*", "--json", str(plan)]
    assert main(["plan", str(source), *options]) == 0
    assert "6 of 10 layers converted" in capsys.readouterr().out
    assert before == sorted((path.name, path.stat().st_mtime_ns) for path in source.iterdir())
    data = json.loads(plan.read_text())
    first = next(layer for layer in data["layers"] if layer["format"])
    first["format"] = {"name": "lowrank", "rank": 7}
    plan.write_text(json.dumps(data))
    assert main(["convert", str(source), "--plan", str(plan), "--out", str(tmp_path / "out")]) == 0
    assert load_pretrained(tmp_path / "out").get_submodule(first["name"]).network.ranks == (7,)


def test_economy_is_warned_about_and_forced(source, tmp_path, capsys):
    options = ["convert", str(source), "--format", "cp", "--params", "0.9", "--out", str(tmp_path / "out")]
    assert main(options) == 0
    captured = capsys.readouterr()
    assert "0 of 10 layers converted" in captured.out
    assert "--force" in captured.err
    assert main([*options, "--force"]) == 0
    assert "10 of 10" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "nowhere", "--out", "x"], "config.json"),
        (["plan", "SOURCE", "--rank", "0"], "at least 1"),
        (["plan", "SOURCE", "--params", "1.5"], "fraction"),
        (["plan", "SOURCE", "--order", "2"], "order"),
        (["plan", "SOURCE", "--layers", "nonsense"], "nonsense"),
        (["plan", "SOURCE", "--layers", "("], "regular expression"),
        (["inspect", "nowhere"], "tensorlayers.json"),
        (["eval", "SOURCE", "--text", "TEXT"], "tensorlayers.json"),
        (["convert", "SOURCE", "--plan", "TEXT", "--out", "x"], "not JSON"),
        (["convert", "SOURCE", "--plan", "nowhere.json", "--out", "x"], "nowhere.json"),
        (["convert", "SOURCE", "--plan", "TEXT", "--out", "x", "--rank", "4"], "--plan goes without --rank"),
        (["convert", "SOURCE", "--plan", "TEXT", "--out", "x", "--fold"], "--plan goes without --fold"),
        (["convert", "SOURCE", "--out", "TEXT"], "it is a file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_plain_line_and_exit_1(source, text, capsys, arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = [{"SOURCE": str(source), "TEXT": str(text)}.get(word, word) for word in arguments]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "arguments", [[], ["nonsense"], ["plan"], ["plan", "x", "--rank", "a"], ["plan", "x", "--format", "y"]]
)
def test_wrong_usage_exits_2(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_it_runs_as_a_module_and_help_teaches():
    command = [sys.executable, "-m", "tensorlayers"]
    assert subprocess.run([*command, "--version"], capture_output=True, text=True).stdout.strip() == __version__
    shown = subprocess.run([*command, "convert", "--help"], capture_output=True, text=True).stdout
    for word in ("lowrank", "--params", "50x to 1000x", "--force", "MODEL_DIR"):
        assert word in shown


def test_damaged_input_is_one_plain_line_too(source, gpt2, text, tmp_path, capsys):
    damaged, binary, out = tmp_path / "damaged", tmp_path / "binary", tmp_path / "out"
    shutil.copytree(source, damaged)
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:1000])
    binary.write_bytes(b"\xff\xfe\xfa")
    assert main(["convert", str(source), "--out", str(out)]) == 0
    capsys.readouterr()
    for arguments, message in [
        (["plan", str(damaged)], "cannot load"),
        (["plan", str(out)], "converted already"),
        (["eval", str(out), "--text", str(binary)], "UTF-8"),
        (["convert", str(source), "--plan", str(binary), "--out", str(tmp_path / "x")], "UTF-8"),
        (["eval", str(out), "--text", str(text), "--source", str(gpt2)], "same shape"),
        (["plan", str(source), "--format", "tt", "--order", "99"], "order"),
    ]:
        assert main(arguments) == 1
        error = capsys.readouterr().err.strip().splitlines()
        assert message in error[-1]
        assert "Traceback" not in "".join(error)
