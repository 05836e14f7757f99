"""Damaged files are refused, and the offender is named."""

import contextlib
import copy
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import tensorlayers as tl
from tensorlayers import FactorizedLinear, LowRank, convert_model, load_pretrained, save_pretrained
from tensorlayers.errors import CheckpointError
from tensorlayers.serialize import VERSION
from tests.junk import places, replaced
from tests.serialize.support import INDEX, Net, _chain, _converted, _factorized, _files, _ids, _index, _weights, _write


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


@pytest.mark.parametrize("version", [0, VERSION - 1, VERSION + 1, str(VERSION), None, [VERSION]], ids=str)
def test_an_unknown_version(version, saved):
    _write(saved, _index(saved) | {"version": version})
    _refused(saved, INDEX, "version", repr(version))


@pytest.mark.parametrize("key", ["version", "weights", "model", "layers", "tied", "transient"])
def test_a_missing_part_of_the_index(key, saved):
    index = _index(saved)
    del index[key]
    _write(saved, index)
    _refused(saved, INDEX, key)


@pytest.mark.parametrize("key", ["kind", "settings", "source", "format"])
def test_a_missing_part_of_a_layer(key, saved):
    index = _index(saved)
    del index["layers"]["2"][key]
    _write(saved, index)
    _refused(saved, "'2'", key)


@pytest.mark.parametrize("key", ["in_features", "out_features", "bias"])
def test_a_missing_setting_of_a_layer(key, saved):
    index = _index(saved)
    del index["layers"]["2"]["settings"][key]
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
        ({"settings": []}, "malformed"),
        ({"settings": {"in_features": 0, "out_features": 16}}, "in_features"),
        ({"settings": {"in_features": "24", "out_features": 16}}, "in_features"),
        ({"settings": {"in_features": 24, "out_features": 17.5}}, "out_features"),
        *(({"stack": wrong}, "stack") for wrong in (5, "", "ab", [], [2], [2, 2], [2, -1], [2.0, 0], [True, 0], {})),
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


@pytest.mark.parametrize(
    ("dense", "other", "named"),
    [
        (nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, stride=2), "stride"),
        (nn.Conv2d(8, 8, 3, padding="same"), nn.Conv2d(8, 8, 3, padding=1), "padding"),
        (nn.Embedding(32, 8, padding_idx=0), nn.Embedding(32, 8), "padding_idx"),
    ],
)
def test_a_layer_of_other_settings_is_refused(dense, other, named, tmp_path):
    save_pretrained(convert_model(nn.Sequential(dense), LowRank(2), force=True), tmp_path)
    load_pretrained(tmp_path, nn.Sequential(dense))
    with pytest.raises(CheckpointError, match=f"layer '0'.*{named}"):
        load_pretrained(tmp_path, nn.Sequential(other))


@pytest.mark.parametrize("key", ["buffers", "transient", "unpacked"])
@pytest.mark.parametrize("junk", [5, None, [], {}], ids=str)
def test_a_list_of_names_that_are_none_is_refused(key, junk, saved):
    _write(saved, _index(saved) | {key: [junk]})
    for read in (load_pretrained, tl.serialize.inspect):
        with pytest.raises(CheckpointError, match=key):
            read(saved)


@pytest.mark.parametrize("case", MISFITS)
def test_a_model_that_does_not_fit(case, saved):
    build, named = MISFITS[case]
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(saved, build())
    assert named in str(caught.value)


def test_a_model_that_is_not_hugging_face_needs_its_architecture(saved):
    with pytest.raises(CheckpointError, match=r"Sequential.*pass `model`"):
        load_pretrained(saved)


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


@pytest.mark.parametrize("path", list(places(SAVED)), ids=lambda path: ".".join(map(str, path)) or "all")
@given(junk=JUNK)
def test_any_value_replaced_by_junk_is_refused_or_harmless(path, junk, net):
    directory, index = net
    _write(directory, replaced(index, path, junk))
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


@pytest.mark.parametrize("bias", [True, False])
def test_a_model_with_another_bias_is_refused(tmp_path, bias):
    save_pretrained(convert_model(nn.Sequential(nn.Linear(64, 64, bias)), LowRank(0.5)), tmp_path)
    with pytest.raises(CheckpointError, match=r"layer '0'.*bias"):
        load_pretrained(tmp_path, nn.Sequential(nn.Linear(64, 64, not bias)))
