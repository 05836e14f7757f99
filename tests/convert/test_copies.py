"""convert_model copies: nothing is aliased, and what a layer had is kept."""

import gc
import weakref

import pytest
import torch
from torch import nn

import tensorlayers as tl
from tensorlayers import FactorizedLinear, convert_model, formats
from tensorlayers.testing import TOLERANCE, relative_error
from tests.convert.support import (
    ATTENTION,
    CONVERTED,
    FULL,
    HALF,
    Net,
    _assert_same,
    _chain,
    _factorized,
    _ids,
    _state,
    _storages,
    _tensors,
    both_ways,
    every_format,
)


@every_format
def test_a_copy_shares_nothing_with_its_source(form):
    model = Net()
    model(_ids()).sum().backward()
    before, modules = _state(model), list(model.named_modules())
    converted = convert_model(model, formats.get(form)(4), force=True)
    assert _factorized(converted) == CONVERTED
    assert list(model.named_modules()) == modules
    assert not _storages(model) & _storages(converted)
    dense = tl.to_dense(converted)
    assert not _storages(dense) & (_storages(converted) | _storages(model))
    for other in (converted, dense):
        with torch.no_grad():
            for tensor in _tensors(other).values():
                tensor.add_(1)
    _assert_same(_state(model), before)


def test_a_copy_trains_without_its_source():
    model = Net()
    before = _state(model)
    converted = convert_model(model, HALF)
    optimizer = torch.optim.SGD(converted.parameters(), lr=0.1)
    converted(_ids()).square().mean().backward()
    optimizer.step()
    _assert_same(_state(model), before)


def test_in_place_returns_the_model_itself():
    model = Net()
    embed, norm, first = model.embed, model.norm, weakref.ref(model.first)
    gone = {name.partition(".")[0] for name in CONVERTED}
    kept = {name: p for name, p in model.named_parameters() if name.partition(".")[0] not in gone}
    assert convert_model(model, HALF, inplace=True) is model
    assert _factorized(model) == CONVERTED
    assert model.embed is embed
    assert model.norm is norm
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in kept.items())
    gc.collect()
    assert first() is None  # the dense layer is not kept


@both_ways
def test_outputs_agree_at_full_rank(inplace):
    model, ids = Net().eval(), _ids()
    expected = model(ids)
    converted = convert_model(model, FULL, force=True, inplace=inplace)
    assert relative_error(converted(ids), expected) <= TOLERANCE[torch.float32]


def test_the_weights_that_are_replaced_are_not_copied(monkeypatch):
    model = Net()
    names = [f"{name}.weight" for name in CONVERTED if name not in ATTENTION[:3]] + ["attention.in_proj_weight"]
    replaced = {id(model.get_parameter(name)): name for name in names}
    copied = []
    real = nn.Parameter.__deepcopy__
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", lambda self, memo: copied.append(id(self)) or real(self, memo))
    converted = convert_model(model, HALF)
    assert id(model.embed.weight) in copied
    assert not [replaced[key] for key in copied if key in replaced]
    copied.clear()
    cores = {id(core) for layer in converted.modules() if isinstance(layer, FactorizedLinear) for core in layer.cores}
    tl.to_dense(converted)
    assert copied
    assert not cores & set(copied)


@both_ways
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_dtype_mode_and_a_missing_bias_are_kept(dtype, training, bias, inplace):
    model = _chain(64, 96, bias=bias, dtype=dtype)
    model[0].train(training)
    stated = model[0].bias.detach().clone() if bias else None
    converted = convert_model(model, HALF, inplace=inplace)
    for layer, kind in ((converted[0], FactorizedLinear), (tl.to_dense(converted)[0], nn.Linear)):
        assert type(layer) is kind
        assert layer.training is training
        assert (layer.in_features, layer.out_features) == (64, 96)
        assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
        assert (layer.bias is None) is (not bias)
        if bias:
            assert torch.equal(layer.bias, stated)
    x = torch.randn(2, 64, dtype=dtype)
    assert converted(x).dtype == dtype


@pytest.mark.parametrize("weight", [True, False], ids=["weight trained", "weight frozen"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias trained", "bias frozen"])
def test_requires_grad_is_kept(weight, bias):
    model = _chain(64, 64)
    model[0].weight.requires_grad_(weight)
    model[0].bias.requires_grad_(bias)
    converted = convert_model(model, HALF)
    assert {core.requires_grad for core in converted[0].cores} == {weight}
    assert converted[0].bias.requires_grad is bias
    dense = tl.to_dense(converted)
    assert (dense[0].weight.requires_grad, dense[0].bias.requires_grad) == (weight, bias)


def test_a_bias_of_another_dtype_is_kept():
    model = _chain(64, 64, dtype=torch.bfloat16)
    model[0].bias = nn.Parameter(torch.randn(64))
    converted = convert_model(model, HALF)
    assert {core.dtype for core in converted[0].cores} == {torch.bfloat16}
    assert torch.equal(converted[0].bias, model[0].bias)
    assert converted[0].bias.dtype == torch.float32
    assert tl.to_dense(converted)[0].bias.dtype == torch.float32
    assert converted(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


class Recorder(nn.Module):
    """Hooks its own layer with a method of its own: a copy must record for itself."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.seen = []
        self.layer.register_forward_hook(self.record)

    def record(self, module, args, output):
        self.seen.append(module)

    def forward(self, x):
        return self.layer(x)


@both_ways
def test_hooks_go_on_working(inplace):
    model, calls = _chain(64, 64), []
    layer = model[0]
    handles = [
        layer.register_forward_pre_hook(lambda *_: calls.append("pre")),
        layer.register_forward_pre_hook(lambda *_: calls.append("pre, kwargs"), with_kwargs=True),
        layer.register_forward_hook(lambda *_: calls.append("forward")),
        layer.register_forward_hook(lambda *_: calls.append("forward, kwargs"), with_kwargs=True),
        layer.register_forward_hook(lambda *_: calls.append("forward, always"), always_call=True),
        layer.register_full_backward_pre_hook(lambda *_: calls.append("backward pre")),
        layer.register_full_backward_hook(lambda *_: calls.append("backward")),
    ]
    x = torch.randn(2, 64, requires_grad=True)
    model(x).sum().backward()
    expected = list(calls)
    assert len(expected) == len(handles)
    converted = convert_model(model, HALF, inplace=inplace)
    for other in (converted, tl.to_dense(converted)):
        calls.clear()
        other(x).sum().backward()
        assert calls == expected
    calls.clear()
    for handle in handles:
        handle.remove()
    converted(x).sum().backward()
    assert calls == ([] if inplace else expected)  # a copy has handles of its own


def test_hooks_of_a_copy_are_its_own():
    model = _chain(64, 64)
    handle = model[0].register_forward_hook(lambda module, args, output: output + 1)
    converted = convert_model(model, FULL, force=True)
    x = torch.randn(2, 64)
    hooked = converted(x)
    converted[0].register_forward_hook(lambda module, args, output: output * 0)
    assert model(x).abs().sum() > 0
    handle.remove()
    assert relative_error(hooked - 1, model(x)) <= TOLERANCE[torch.float32]


@both_ways
@pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")
def test_a_backward_hook_of_the_old_kind_goes_on_working(inplace):
    model, calls = _chain(64, 64), []
    model[0].register_backward_hook(lambda *_: calls.append("backward"))
    converted = convert_model(model, HALF, inplace=inplace)
    converted(torch.randn(2, 64)).sum().backward()
    assert calls == ["backward"]


@both_ways
def test_a_hook_that_is_a_method_of_the_model(inplace):
    model = Recorder()
    converted = convert_model(model, HALF, inplace=inplace)
    converted(torch.randn(2, 64))
    assert converted.seen == [converted.layer]
    assert inplace or model.seen == []
