"""What is saved is loaded, identically."""

import copy
import shutil

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import tensorlayers as tl
from tensorlayers import FactorizedLinear, LowRank, convert_model, formats, load_pretrained, save_pretrained
from tensorlayers.testing import TOLERANCE
from tests.serialize.support import (
    CONVERTED,
    Net,
    _assert_same,
    _chain,
    _converted,
    _factorized,
    _ids,
    _tensors,
    every_format,
)


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
