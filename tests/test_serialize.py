"""save_pretrained and load_pretrained: round trips, what is refused, interrupted saves, Hugging Face directories."""

import contextlib
import copy
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations, prune

import tensorlayers as tl
from tensorlayers import FactorizedLinear, LowRank, convert_model, formats, load_pretrained, save_pretrained, serialize
from tensorlayers.errors import CheckpointError
from tensorlayers.testing import TOLERANCE

INDEX = "tensorlayers.json"

every_format = pytest.mark.parametrize("form", formats.available())


class Net(nn.Module):
    """Tied, shared, normalised, with buffers in and out of the state_dict."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.up = nn.Linear(16, 48)
        self.norm = nn.BatchNorm1d(48)
        self.down = nn.Linear(48, 16, bias=False)
        self.shared = nn.Linear(16, 16)
        self.again = self.shared
        self.head = nn.Linear(16, 32)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.rand(16))
        self.register_buffer("shift", torch.rand(16), persistent=False)

    def forward(self, ids):
        x = self.embed(ids) * self.scale + self.shift
        x = self.down(self.norm(self.up(x)))
        return self.head(self.again(self.shared(x)))


CONVERTED = {"up", "down", "shared"}


def _ids():
    return torch.arange(12)


def _chain():
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16, bias=False), nn.Linear(16, 4))


def _converted(build=_chain, format=None):
    keys = {"3": None, "*": format or formats.get("tt")(2)} if build is _chain else format or LowRank(4)
    return convert_model(build(), keys, force=True).eval()


def _bert(**kwargs):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, **kwargs}
    config = transformers.BertConfig(vocab_size=30, max_position_embeddings=16, **sizes)
    return transformers.BertForMaskedLM(config).eval()


def _tensors(model):
    return dict(model.state_dict(keep_vars=True)) | dict(model.named_buffers(remove_duplicate=False))


def _assert_same(actual, expected):
    """Bit for bit, dtype and device included."""
    actual, expected = _tensors(actual), _tensors(expected)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (actual[name].dtype, actual[name].device) == (tensor.dtype, tensor.device), name
        assert type(actual[name]) is type(tensor), name
        assert torch.equal(actual[name], tensor), name


def _is(model, other):
    ours, theirs = _tensors(model), _tensors(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def _factorized(model):
    return {name for name, module in model.named_modules() if isinstance(module, FactorizedLinear)}


def _index(directory):
    return json.loads((directory / INDEX).read_text())


def _write(directory, index):
    (directory / INDEX).write_text(json.dumps(index))


def _weights(directory):
    (path,) = directory.glob("*.safetensors")
    return path


def _files(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def saved(tmp_path):
    """A directory with a saved model: Sequential(TT, Tanh, TT, Linear)."""
    save_pretrained(_converted(), tmp_path / "saved")
    return tmp_path / "saved"


# ------------------------------------------------------------------------------------------------------ round trips


@every_format
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_format_and_dtype_comes_back_bit_for_bit(form, dtype, tmp_path):
    model = convert_model(_chain().to(dtype), formats.get(form)(3), force=True)
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path, _chain())
    _assert_same(loaded, model)
    x = torch.randn(5, 16, dtype=dtype)
    assert torch.equal(loaded(x), model(x))
    assert str(tl.summarize(loaded)) == str(tl.summarize(model))
    for name in _factorized(model):
        ours, theirs = loaded.get_submodule(name), model.get_submodule(name)
        assert (ours.network, ours.error, ours.source) == (theirs.network, theirs.error, theirs.source)
        assert ours.format.network(*ours.weight_shape) == theirs.network


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_ties_shared_modules_and_buffers_come_back(training, tmp_path):
    model = _converted(Net).train(training)
    model(_ids())  # the norm's running statistics
    save_pretrained(model, tmp_path)
    architecture = Net().train(training)
    loaded = load_pretrained(tmp_path, architecture)
    assert _factorized(loaded) == CONVERTED
    _assert_same(loaded, model)
    assert loaded.head.weight is loaded.embed.weight
    assert loaded.again is loaded.shared
    assert {module.training for module in loaded.modules()} == {training}
    assert torch.equal(loaded(_ids()), model(_ids()))


def test_weights_that_are_one_memory_stay_tied(tmp_path):
    def build():
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
        model[1].weight = nn.Parameter(model[0].weight.data)
        return model

    model = convert_model(build(), LowRank(4), inplace=True)
    assert _factorized(model) == {"2"}
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path, build())
    _assert_same(loaded, model)
    with torch.no_grad():
        loaded[0].weight.zero_()
    assert loaded[1].weight.abs().sum() == 0


def test_a_model_that_is_itself_a_layer(tmp_path):
    model = convert_model(nn.Linear(16, 24), LowRank(4))
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path, nn.Linear(16, 24))
    assert isinstance(loaded, FactorizedLinear)
    _assert_same(loaded, model)


def test_a_model_without_factorized_layers(tmp_path):
    model = _chain()
    save_pretrained(model, tmp_path)
    _assert_same(load_pretrained(tmp_path, _chain()), model)


def test_a_model_that_is_already_converted_can_be_loaded_onto(tmp_path):
    model = _converted()
    save_pretrained(model, tmp_path)
    _assert_same(load_pretrained(tmp_path, _converted()), model)
    _assert_same(load_pretrained(tmp_path, _converted(format=LowRank(2))), model)


def test_layers_that_were_built_and_not_converted(tmp_path):
    def build():
        return nn.Sequential(FactorizedLinear(16, 24, format=formats.get("btt")(2)), nn.Linear(24, 4))

    model = build()
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path, build())
    _assert_same(loaded, model)
    assert loaded[0].error is None


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "wrap",
    [parametrizations.weight_norm, nn.utils.weight_norm, lambda layer: prune.l1_unstructured(layer, "weight", 0.5)],
    ids=["weight_norm", "old weight_norm", "pruned"],
)
def test_parametrized_layers_come_back(wrap, tmp_path):
    def build():
        return nn.Sequential(nn.Linear(16, 16), wrap(nn.Linear(16, 16)))

    model = convert_model(build(), LowRank(4))
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path, build())
    _assert_same(loaded, model)
    x = torch.randn(3, 16)
    assert torch.equal(loaded(x), model(x))


def test_loading_decomposes_nothing(saved, monkeypatch):
    def decompose(*_, **__):
        raise AssertionError("decomposed")

    monkeypatch.setattr(formats.Format, "decompose", decompose)
    monkeypatch.setattr(torch.linalg, "svd", decompose)
    assert _factorized(load_pretrained(saved, _chain())) == {"0", "2"}


def test_loading_does_not_change_the_model_given(saved):
    architecture = _chain()
    before, modules = copy.deepcopy(architecture.state_dict()), list(architecture)
    loaded = load_pretrained(saved, architecture)
    assert list(architecture) == modules
    assert all(torch.equal(value, before[name]) for name, value in architecture.state_dict().items())
    storages = [{t.untyped_storage().data_ptr() for t in _tensors(m).values()} for m in (loaded, architecture)]
    assert not storages[0] & storages[1]


def test_saving_does_not_change_the_model(tmp_path):
    model = _converted(Net)
    before, tensors = copy.deepcopy(model), {name: id(tensor) for name, tensor in _tensors(model).items()}
    save_pretrained(model, tmp_path)
    assert {name: id(tensor) for name, tensor in _tensors(model).items()} == tensors
    _assert_same(model, before)


def test_a_model_on_the_meta_device_can_be_loaded_onto(tmp_path):
    model = _converted(Net)
    save_pretrained(model, tmp_path)
    with torch.device("meta"):
        architecture = Net().eval()
    loaded = load_pretrained(tmp_path, architecture)
    _assert_same(loaded, model)
    assert torch.equal(loaded(_ids()), model(_ids()))


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "3.weight"])
def test_requires_grad_is_that_of_the_model_given(frozen, saved):
    architecture = _chain()
    architecture.get_parameter(frozen).requires_grad_(False)
    loaded = load_pretrained(saved, architecture)
    names = {"0.weight": {"0.cores.0", "0.cores.1"}}.get(frozen, {frozen})
    assert {name for name, parameter in loaded.named_parameters() if not parameter.requires_grad} == names


def test_a_loaded_model_does_not_need_its_directory(saved):
    model = load_pretrained(saved, _chain())
    before = copy.deepcopy(model)
    save_pretrained(_converted(), saved)
    _assert_same(model, before)
    shutil.rmtree(saved)
    save_pretrained(model, saved)
    _assert_same(load_pretrained(saved, _chain()), model)


def test_a_loaded_model_trains(saved):
    model = load_pretrained(saved, _chain()).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(8, 16)).square().sum().backward()
    optimizer.step()
    assert not any(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---------------------------------------------------------------------------------------------------- the directory


def test_what_a_directory_holds(saved):
    assert _files(saved) == [_weights(saved).name, INDEX]
    assert sorted(_files(saved))[-1] == INDEX
    index = _index(saved)
    assert index["version"] == 1
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


# --------------------------------------------------------------------------------------------------------- refused


def _refused(directory, *named, model=None):
    """Loading is refused, every one of `named` is in the message, and the model given is not changed."""
    model = model if model is not None else _chain()
    types, before = [type(module) for module in model.modules()], copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(directory, model)
    for part in named:
        assert part in str(caught.value)
    assert [type(module) for module in model.modules()] == types
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kept", [0, 4, 8, 50, -300, -1])
def test_truncated_weights(kept, saved):
    path = _weights(saved)
    path.write_bytes(path.read_bytes()[:kept])
    _refused(saved, path.name)


def test_weights_that_are_no_safetensors(saved):
    path = _weights(saved)
    torch.save({"0.bias": torch.zeros(24)}, path)
    _refused(saved, path.name)


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.7, 0.99])
def test_a_truncated_index(share, saved):
    path = saved / INDEX
    text = path.read_text()
    path.write_text(text[: int(share * len(text))])
    _refused(saved, INDEX)


@pytest.mark.parametrize(
    "text", [b"\xff\xfe", b"[]", b"null", b"3", b"[" * 100_000, b"1" * 5_000, b'{"version": NaN}'], ids=range(7)
)
def test_an_index_that_is_no_index(text, saved):
    (saved / INDEX).write_bytes(text)
    _refused(saved, INDEX)


def test_missing_files(saved, tmp_path):
    path = _weights(saved)
    path.rename(tmp_path / "moved.safetensors")
    _refused(saved, path.name, "missing")
    (saved / INDEX).unlink()
    _refused(saved, INDEX, "missing")
    _refused(tmp_path / "nowhere", "nowhere", "missing")
    (saved / INDEX).mkdir()
    _refused(saved, INDEX)


@pytest.mark.parametrize("version", [0, 2, "1", None, [1]], ids=str)
def test_an_unknown_version(version, saved):
    _write(saved, _index(saved) | {"version": version})
    _refused(saved, INDEX, "version", repr(version))


@pytest.mark.parametrize("key", ["version", "weights", "model", "layers", "tied", "transient"])
def test_a_missing_part_of_the_index(key, saved):
    index = _index(saved)
    del index[key]
    _write(saved, index)
    _refused(saved, INDEX, key)


@pytest.mark.parametrize("key", ["kind", "in_features", "out_features", "bias", "source", "format"])
def test_a_missing_part_of_a_layer(key, saved):
    index = _index(saved)
    del index["layers"]["2"][key]
    _write(saved, index)
    _refused(saved, "'2'", key)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"kind": "conv9d"}, "conv9d"),
        ({"format": {"name": "mystery", "rank": 3}}, "mystery"),
        ({"format": {"name": "tt"}}, "rank"),
        ({"format": {"name": "tt", "rank": 0}}, "rank 0"),
        ({"format": {"name": "tt", "rank": 3, "colour": 1}}, "colour"),
        ({"in_features": 0}, "in_features"),
        ({"in_features": "24"}, "in_features"),
        ({"out_features": 17.5}, "out_features"),
    ],
    ids=str,
)
def test_a_layer_that_cannot_be_built(change, named, saved):
    index = _index(saved)
    index["layers"]["2"] |= change
    _write(saved, index)
    _refused(saved, "'2'", named)


def _tampered(directory, change):
    path = _weights(directory)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("name", ["0.cores.1", "2.cores.0", "0.bias", "3.weight"])
def test_a_missing_tensor(name, saved):
    _tampered(saved, lambda tensors: tensors.pop(name))
    _refused(saved, name, "missing")


@pytest.mark.parametrize("name", ["0.cores.2", "2.bias", "3.other", "unknown"])
def test_an_extra_tensor(name, saved):
    _tampered(saved, lambda tensors: tensors.update({name: torch.zeros(3)}))
    _refused(saved, name)


@pytest.mark.parametrize("name", ["0.cores.0", "0.bias", "3.weight"])
@pytest.mark.parametrize("wrong", [lambda t: t[None], lambda t: t[..., :-1].contiguous(), lambda t: t[..., 0].clone()])
def test_a_tensor_of_a_wrong_shape(name, wrong, saved):
    _tampered(saved, lambda tensors: tensors.update({name: wrong(tensors[name])}))
    _refused(saved, name, "shape")


@pytest.mark.parametrize("where", ["absolute", "above", "below", "link", "missing link", "empty", "dot", "nul", "long"])
def test_weights_outside_the_directory(where, saved, tmp_path):
    inside, outside = _weights(saved), tmp_path / "outside.safetensors"
    shutil.copy(inside, outside)
    (saved / "sub").mkdir()
    shutil.copy(inside, saved / "sub" / "x.safetensors")
    (saved / "link.safetensors").symlink_to(outside)
    (saved / "nowhere.safetensors").symlink_to(tmp_path / "nowhere")
    names = {
        "absolute": str(outside),
        "above": "../outside.safetensors",
        "below": "sub/x.safetensors",
        "link": "link.safetensors",
        "missing link": "nowhere.safetensors",
        "empty": "",
        "dot": ".",
        "nul": "a\0b.safetensors",
        "long": "x" * 5000,
    }
    _write(saved, _index(saved) | {"weights": names[where]})
    _refused(saved, "weights")


MISFITS = {
    "a module is missing": (lambda: nn.Sequential(*list(_chain())[:2]), "'2'"),
    "another kind": (lambda: nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Tanh(), nn.Linear(16, 4)), "'2'"),
    "an embedding": (lambda: nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Embedding(16, 24)), "'2'"),
    "another shape": (lambda: nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 17)), "'2'"),
    "transposed": (lambda: nn.Sequential(nn.Linear(24, 16)), "'0'"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(24)), "'0'"),
    "factorized in another shape": (lambda: nn.Sequential(FactorizedLinear(16, 32)), "'0'"),
    "one layer more": (lambda: nn.Sequential(*_chain(), nn.Linear(4, 4)), "4."),
    "one layer less": (lambda: nn.Sequential(*list(_chain())[:3]), "3."),
    "a bias less": (lambda: nn.Sequential(*list(_chain())[:3], nn.Linear(16, 4, bias=False)), "3.bias"),
    "a dense layer of another shape": (lambda: nn.Sequential(*list(_chain())[:3], nn.Linear(16, 5)), "3."),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_model_that_does_not_fit(case, saved):
    build, named = MISFITS[case]
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(saved, build())
    assert named in str(caught.value)


def test_a_model_that_is_not_hugging_face_needs_its_architecture(saved):
    with pytest.raises(CheckpointError, match=r"Sequential.*pass `model`"):
        load_pretrained(saved)


def _places(value, path=()):
    """The path of every value in plain data."""
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from _places(value[key], (*path, key))


def _replaced(data, path, value):
    if not path:
        return value
    data = copy.copy(data)
    data[path[0]] = _replaced(data[path[0]], path[1:], value)
    return data


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 16, 10**30, 10**400, 0.5, -0.5, 1e300, float("inf"), float("nan")]),
    st.sampled_from(
        ["", ".", "..", "/", "x", "up", "linear", "tt", INDEX, "\0", "\ud800", "x" * 5000, "PreTrainedModel"]
    ),
    st.sampled_from([[], {}, [1], [1, 2], ["x", "y"], [[]], {"x": {}}, {"name": "tt"}, {"name": "tt", "rank": 2}]),
)


def _saved_net(directory):
    torch.manual_seed(0)
    save_pretrained(_converted(Net), directory)
    return _index(directory)


with tempfile.TemporaryDirectory() as _directory:
    SAVED = _saved_net(Path(_directory))


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    directory = tmp_path_factory.mktemp("net")
    return directory, _saved_net(directory)


@pytest.mark.parametrize("path", list(_places(SAVED)), ids=lambda path: ".".join(map(str, path)) or "all")
@given(junk=JUNK)
def test_any_value_replaced_by_junk_is_refused_or_harmless(path, junk, net):
    directory, index = net
    _write(directory, _replaced(index, path, junk))
    model = Net()
    try:
        loaded = load_pretrained(directory, model)
    except CheckpointError:
        return
    finally:
        assert _factorized(model) == set()
        assert _files(directory) == sorted([index["weights"], INDEX])
    assert loaded.eval()(_ids()).shape == (12, 32)
    tl.summarize(loaded)


@settings(max_examples=100)
@given(position=st.integers(0, 10**6), byte=st.integers(0, 255))
def test_any_byte_replaced_in_the_header_of_the_weights_is_refused_or_harmless(position, byte, net):
    directory, index = net
    _write(directory, index)
    path = directory / index["weights"]
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    damaged = bytearray(whole)
    damaged[position % header] = byte
    try:
        path.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):  # a byte may be replaced by itself
            load_pretrained(directory, Net())
    finally:
        path.write_bytes(whole)


# ------------------------------------------------------------------------------------------------ interrupted saves

STEPS = [
    (serialize, "save_file"),
    (os, "replace"),
    (os, "fsync"),
    (os, "mkdir"),
    (os, "unlink"),
    (shutil, "copyfile"),
    (Path, "write_text"),
]
"""What a save does to the disk, each time by a call that can be interrupted."""


class Interruption(BaseException):
    """Like KeyboardInterrupt: caught by no `except Exception`."""


class Interrupter:
    """Raises at the given step, before or after it is done."""

    def __init__(self, step, error, after):
        self.step, self.error, self.after, self.count = step, error, after, 0

    def __call__(self, real):
        def call(*args, **kwargs):
            self.count += 1
            now = self.count == self.step
            if now and not self.after:
                raise self.error
            result = real(*args, **kwargs)
            if now:
                raise self.error
            return result

        return call


def _interrupted_saves(model, directory, monkeypatch, error, after):
    """Save again and again, interrupted at the first step, at the second, ...; yield after each of these."""
    for step in range(1, 1000):
        interrupter = Interrupter(step, error, after)
        with monkeypatch.context() as patch:
            for owner, name in STEPS:
                patch.setattr(owner, name, interrupter(getattr(owner, name)))
            with contextlib.suppress(type(error)):
                save_pretrained(model, directory)
        if interrupter.count < step:
            return
        yield step


interruptions = pytest.mark.parametrize(
    ("error", "after"),
    [(OSError("disk full"), False), (Interruption(), False), (Interruption(), True)],
    ids=["failing", "interrupted before", "interrupted after"],
)


@interruptions
def test_an_interrupted_save_leaves_the_old_model_or_the_new_one(error, after, saved, monkeypatch):
    old, new = load_pretrained(saved, _chain()), _converted()
    (saved / "notes.txt").write_text("mine")
    steps = 0
    for _ in _interrupted_saves(new, saved, monkeypatch, error, after):
        steps += 1
        loaded = load_pretrained(saved, _chain())
        assert _is(loaded, old) or _is(loaded, new)
        assert [name for name in _files(saved) if name.startswith(".")] == []
        assert (saved / "notes.txt").read_text() == "mine"
    assert steps >= 4
    _assert_same(load_pretrained(saved, _chain()), new)
    assert _files(saved) == sorted([_index(saved)["weights"], INDEX, "notes.txt"])


def test_a_save_that_fails_leaves_the_old_model(saved, monkeypatch):
    before = {name: (saved / name).read_bytes() for name in _files(saved)}
    for owner, name in [(serialize, "save_file"), (os, "replace"), (os, "fsync")]:
        for after in (False, True):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, Interrupter(1, OSError("disk full"), after)(getattr(owner, name)))
                with pytest.raises(OSError, match="disk full"):
                    save_pretrained(_converted(), saved)
            assert {name: (saved / name).read_bytes() for name in _files(saved)} == before


@interruptions
def test_an_interrupted_first_save_leaves_nothing_or_the_model(error, after, tmp_path, monkeypatch):
    model, directory = _converted(), tmp_path / "new"
    for _ in _interrupted_saves(model, directory, monkeypatch, error, after):
        if directory.exists() and _files(directory):
            _assert_same(load_pretrained(directory, _chain()), model)
            assert _files(directory) == [_index(directory)["weights"], INDEX]
            shutil.rmtree(directory)


@interruptions
def test_an_interrupted_save_of_another_architecture(error, after, tmp_path, monkeypatch):
    """The configuration belongs to the model: old weights with a new config.json would be lost."""
    old, new = (convert_model(_bert(hidden_size=size), LowRank(4)).eval() for size in (16, 32))
    save_pretrained(old, tmp_path)
    for _ in _interrupted_saves(new, tmp_path, monkeypatch, error, after):
        loaded = load_pretrained(tmp_path)
        assert _is(loaded, old) or _is(loaded, new)
        assert [name for name in _files(tmp_path) if name.startswith(".")] == []
    assert _is(load_pretrained(tmp_path), new)


# ------------------------------------------------------------------------------------------ Hugging Face directories

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
