"""The directory: what it holds, and Hugging Face's files in it."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import tensorlayers as tl
from tensorlayers import LowRank, convert_model, load_pretrained, save_pretrained, serialize
from tensorlayers.errors import CheckpointError
from tests.serialize.support import (
    INDEX,
    Net,
    _assert_same,
    _bert,
    _chain,
    _converted,
    _files,
    _index,
    _weights,
    _write,
)


def test_what_a_directory_holds(saved):
    assert _files(saved) == [_weights(saved).name, INDEX]
    assert sorted(_files(saved))[-1] == INDEX
    index = _index(saved)
    assert index["version"] == serialize.VERSION
    assert index["weights"] == _weights(saved).name
    assert index["model"] == "Sequential"
    assert index["library"] is None
    assert set(index["layers"]) == {"0", "2"}
    assert index["layers"]["0"]["kind"] == "linear"
    assert index["layers"]["0"]["format"]["name"] == "tt"
    assert set(load_file(_weights(saved))) == {"0.cores.0", "0.cores.1", "0.bias", "2.cores.0", "2.cores.1"} | {
        "3.weight",
        "3.bias",
    }
    assert serialize.read_index(saved) == index


def test_a_tied_tensor_is_written_once(tmp_path):
    save_pretrained(_converted(Net), tmp_path)
    names = set(load_file(_weights(tmp_path)))
    assert len(names & {"embed.weight", "head.weight"}) == 1
    assert not names & {"again.bias", "again.cores.0"}
    assert "shift" in names


def test_saving_again_replaces_the_old_model_and_keeps_other_files(saved):
    (saved / "notes.txt").write_text("mine")
    (saved / "model.safetensors").write_bytes(b"mine")
    (saved / "sub").mkdir()
    (saved / "sub" / "tensorlayers.json").write_text("mine")
    old = _index(saved)["weights"]
    model = _converted(Net)
    save_pretrained(model, saved)
    new = _index(saved)["weights"]
    assert new != old
    assert _files(saved) == sorted([new, INDEX, "model.safetensors", "notes.txt", "sub"])
    assert (saved / "notes.txt").read_text() == (saved / "sub" / "tensorlayers.json").read_text() == "mine"
    assert (saved / "model.safetensors").read_bytes() == b"mine"
    _assert_same(load_pretrained(saved, Net().eval()), model)


def test_missing_parents_are_made_and_paths_may_be_strings(tmp_path):
    model = _converted()
    save_pretrained(model, str(tmp_path / "a" / "b"))
    _assert_same(load_pretrained(str(tmp_path / "a" / "b"), _chain()), model)


def test_what_a_killed_save_left_is_cleared_by_the_next(saved):
    (saved / ".tensorlayers-killed.tmp").mkdir()
    (saved / ".tensorlayers-killed.tmp" / "tensorlayers.json").write_text("half")
    (saved / "tensorlayers-0123456789ab.safetensors").write_bytes(b"half")
    save_pretrained(_converted(), saved)
    assert _files(saved) == [_index(saved)["weights"], INDEX]


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for call in (lambda: save_pretrained(_converted(), file), lambda: load_pretrained(file, _chain())):
        with pytest.raises(CheckpointError, match=r"file.*directory"):
            call()
    with pytest.raises(CheckpointError, match="file"):
        save_pretrained(_converted(), file / "below")
    assert file.read_text() == "mine"


def test_a_model_on_the_meta_device_cannot_be_saved(saved):
    old = load_pretrained(saved, _chain())
    with torch.device("meta"):
        model = _chain()
    with pytest.raises(CheckpointError, match=r"0\.weight.*meta"):
        save_pretrained(model, saved)
    _assert_same(load_pretrained(saved, _chain()), old)


class Stateful(nn.Linear):
    """A module with a state beside its tensors."""

    def __init__(self, state):
        super().__init__(16, 16)
        self.state = state

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state


@pytest.mark.parametrize("state", [{"step": 3}, torch.tensor([3])], ids=["object", "tensor"])
def test_state_that_is_no_parameter_or_buffer_is_kept_or_refused(state, tmp_path):
    model, message = nn.Sequential(Stateful(state), nn.Linear(16, 16)), ""
    try:
        save_pretrained(model, tmp_path)
    except CheckpointError as error:
        message = str(error)
    if message:
        assert "0._extra_state" in message
        assert _files(tmp_path) == []
    else:
        loaded = load_pretrained(tmp_path, nn.Sequential(Stateful(state * 0), nn.Linear(16, 16)))
        assert torch.equal(loaded[0].state, state)


@pytest.mark.parametrize("build", [_chain, Net], ids=["chain", "with buffers"])
def test_inspecting_a_directory_tells_what_the_model_would(build, tmp_path):
    model = _converted(build)
    save_pretrained(model, tmp_path)
    plan, summary = serialize.inspect(tmp_path), tl.summarize(model)
    assert plan.converted == summary.converted
    assert plan.parameters == summary.parameters
    for name in plan.converted:
        for field in ("kind", "shape", "layer", "network", "parameters", "macs", "error"):
            assert getattr(plan[name], field) == getattr(summary[name], field)


CARRIED = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "special_tokens_map.json": "{}",
    "added_tokens.json": "{}",
    "vocab.txt": "[PAD]",
    "vocab.json": "{}",
    "merges.txt": "#",
    "spiece.model": "pieces",
    "preprocessor_config.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "LICENSE": "Apache-2.0",
}


LEFT = {"model.safetensors": "old", "pytorch_model.bin": "old", "training_args.bin": "old", "notes.txt": "mine"}


def _source(directory, model):
    """A directory as a user has it: weights, configuration, tokenizer, generation settings, other files."""
    model.save_pretrained(directory)
    for name, text in {**CARRIED, **{name: text for name, text in LEFT.items() if name != "model.safetensors"}}.items():
        (directory / name).write_text(text)
    return directory


@pytest.mark.parametrize("known", [True, False], ids=["from_pretrained", "source="])
def test_a_directory_needs_nothing_else(known, tmp_path):
    source = _source(tmp_path / "source", _bert())
    model = transformers.BertForMaskedLM.from_pretrained(source).eval() if known else _bert()
    converted = convert_model(model, LowRank(4))
    out = tmp_path / "out"
    save_pretrained(converted, out, source=None if known else source)
    assert set(_files(out)) == {*CARRIED, "config.json", _index(out)["weights"], INDEX}
    assert all((out / name).read_text() == text for name, text in CARRIED.items())
    assert [name for name in _files(out) if Path(name).suffix in (".bin", ".pt", ".pth", ".pkl", ".pickle")] == []
    assert os.path.samefile(_index(out)["source"], source)
    shutil.rmtree(source)
    loaded = load_pretrained(out)
    assert type(loaded) is transformers.BertForMaskedLM
    assert not loaded.training
    _assert_same(loaded, converted)
    ids = torch.arange(10)[None]
    assert torch.equal(loaded(ids).logits, converted(ids).logits)
    configs = [m.config.to_dict() | {"architectures": None, "_name_or_path": None} for m in (loaded, model)]
    assert configs[0] == configs[1]
    assert json.loads((out / "config.json").read_text())["architectures"] == ["BertForMaskedLM"]


def test_name_or_path_is_where_the_companions_come_from(tmp_path):
    source = _source(tmp_path / "source", _bert())
    model = _bert()
    model.config.name_or_path = str(source)
    save_pretrained(convert_model(model, LowRank(4)), tmp_path / "out")
    assert set(CARRIED) <= set(_files(tmp_path / "out"))


@pytest.mark.parametrize("name", ["", "bert-base-uncased", "/nowhere/at/all"])
def test_a_source_that_is_no_directory_is_no_obstacle(name, tmp_path):
    model = _bert()
    model.config.name_or_path = name
    converted = convert_model(model, LowRank(4))
    save_pretrained(converted, tmp_path)
    assert _files(tmp_path) == sorted(["config.json", _index(tmp_path)["weights"], INDEX])
    assert _index(tmp_path)["source"] == (name or None)
    loaded = load_pretrained(tmp_path)
    _assert_same(loaded, converted)
    save_pretrained(loaded, tmp_path)
    assert _index(tmp_path)["source"] == (name or None)


def test_the_tokenizer_works_from_the_directory(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "tensor", "##s", "network"]
    _bert().save_pretrained(source)
    tokenizer = transformers.BertTokenizer(vocab={word: k for k, word in enumerate(words)})
    tokenizer.save_pretrained(source)
    save_pretrained(convert_model(transformers.AutoModelForMaskedLM.from_pretrained(source), LowRank(4)), out)
    expected = tokenizer("a network tensors")["input_ids"]
    assert len(set(expected)) == 6
    assert transformers.AutoTokenizer.from_pretrained(out)("a network tensors")["input_ids"] == expected


def test_generation_settings_are_carried(tmp_path):
    config = transformers.GPT2Config(
        vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    model.generation_config.max_new_tokens = 5
    model.generation_config.repetition_penalty = 1.5
    converted = convert_model(model, LowRank(4))
    save_pretrained(converted, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert loaded.generation_config.max_new_tokens == 5
    assert loaded.generation_config.repetition_penalty == 1.5
    ids = torch.tensor([[3, 4]])
    assert torch.equal(loaded.generate(ids, do_sample=False), converted.generate(ids, do_sample=False))


def test_saving_what_was_loaded_carries_everything_on(tmp_path):
    source = _source(tmp_path / "source", _bert())
    model = convert_model(transformers.BertForMaskedLM.from_pretrained(source), LowRank(4))
    save_pretrained(model, tmp_path / "one")
    save_pretrained(load_pretrained(tmp_path / "one"), tmp_path / "two")
    save_pretrained(load_pretrained(tmp_path / "two"), tmp_path / "two")
    assert set(_files(tmp_path / "two")) == {*CARRIED, "config.json", _index(tmp_path / "two")["weights"], INDEX}
    _assert_same(load_pretrained(tmp_path / "two"), load_pretrained(tmp_path / "one"))
    assert os.path.samefile(_index(tmp_path / "two")["source"], source)  # of the dense model


def test_saving_beside_the_source_keeps_its_weights(tmp_path):
    source = _source(tmp_path / "source", _bert())
    before = {name: (source / name).read_bytes() for name in _files(source) if name != "config.json"}
    converted = convert_model(transformers.BertForMaskedLM.from_pretrained(source), LowRank(4)).eval()
    save_pretrained(converted, source)
    assert {name: (source / name).read_bytes() for name in before} == before
    _assert_same(load_pretrained(source), converted)


@pytest.fixture
def bert(tmp_path):
    save_pretrained(convert_model(_bert(), LowRank(4)), tmp_path / "bert")
    return tmp_path / "bert"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, "config.json"),
        ("", "config.json"),
        ("{", "config.json"),
        ("[]", "config.json"),
        ('{"hidden_size": "x"}', "config.json"),
        ('{"hidden_size": 32}', "config.json"),  # no multiple of the number of heads
        ("{}", "shape"),
    ],
)
def test_a_directory_without_its_configuration(text, named, bert):
    """Refused; or, where the index makes config.json needless, loaded right all the same."""
    model, path = load_pretrained(bert), bert / "config.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    try:
        loaded = load_pretrained(bert)
    except CheckpointError as error:
        message = str(error)
    else:
        _assert_same(loaded, model)
        return
    assert named in message


@pytest.mark.parametrize(
    "name", ["NoSuchModel", "BertTokenizer", "PreTrainedModel", "AutoModel", "models", "__name__", ""]
)
def test_a_model_that_transformers_does_not_have(name, bert):
    _write(bert, _index(bert) | {"model": name})
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(bert)
    assert repr(name) in str(caught.value)


def test_a_hugging_face_model_can_be_given_too(bert):
    expected = load_pretrained(bert)
    (bert / "config.json").unlink()
    _assert_same(load_pretrained(bert, _bert()), expected)


class Own(transformers.BertForMaskedLM):
    """A user's subclass, which transformers does not know."""


def test_a_subclass_of_the_users_own_is_loaded_onto_a_model(tmp_path):
    model = convert_model(Own(_bert().config), LowRank(4))
    save_pretrained(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"Own.*pass `model`"):
        load_pretrained(tmp_path)
    _assert_same(load_pretrained(tmp_path, Own(_bert().config)), model)
