"""convert_model and to_dense: what is replaced, what is kept, what stays dense and why, and what is refused."""

import copy
import gc
import io
import pickle
import sys
import types
import warnings
import weakref
from collections import OrderedDict
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm
from tqdm import tqdm

import tensorlayers as tl
from tensorlayers import TT, FactorizedLinear, LowRank, convert, convert_model, formats, plan_conversion, summarize
from tensorlayers.errors import ConversionError, FormatError, ModeError, RankError
from tensorlayers.testing import TOLERANCE, relative_error

FULL = LowRank(10**6)
HALF = LowRank(0.5)

every_format = pytest.mark.parametrize("form", formats.available())
both_ways = pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])


class Net(nn.Module):
    """One of everything that has to be copied: a norm's buffers, a tie, a shared module, a plain tensor, attention."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(96, 64)
        self.first = nn.Linear(64, 128)
        self.norm = nn.BatchNorm1d(128)
        self.second = nn.Linear(128, 64, bias=False)
        self.shared = nn.Linear(64, 64)
        self.twice = nn.ModuleList([self.shared, nn.Tanh(), self.shared])
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.head = nn.Linear(64, 96, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)
        self.constant = torch.ones(64)

    def forward(self, ids):
        x = self.embed(ids) * self.scale + self.constant
        x = self.norm(self.first(x).flatten(0, 1)).view(*ids.shape, 128)
        for module in [self.second, *self.twice]:
            x = module(x)
        x, _ = self.attention(x, x, x)
        return self.head(x)


CONVERTED = {"first", "second", "shared"}


def _ids():
    return torch.randint(0, 96, (3, 5))


def _chain(*features, **kwargs):
    return nn.Sequential(*(nn.Linear(i, o, **kwargs) for i, o in pairwise(features)))


def _named(**modules):
    return nn.Sequential(OrderedDict(modules))


def _factorized(model):
    return {name for name, module in model.named_modules() if isinstance(module, FactorizedLinear)}


def _reasons(model, format=HALF, **kwargs):
    plan = plan_conversion(model, format, errors=False, **kwargs)
    return {entry.name: entry.reason for entry in plan if not entry.converted}


def _state(model):
    """Every tensor of a model, copied: parameters, buffers in and out of the state_dict, gradients, attributes."""
    return {name: tensor.detach().clone() for name, tensor in _tensors(model).items()}


def _tensors(model):
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    tensors |= {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, module in model.named_modules():
        tensors |= {f"{name}.{key}": value for key, value in vars(module).items() if isinstance(value, torch.Tensor)}
    return tensors


def _storages(model):
    return {tensor.untyped_storage().data_ptr() for tensor in _tensors(model).values()}


def _assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def _quietly(model, format, **kwargs):
    """Convert, and fail at any warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return convert_model(model, format, **kwargs)


# ---------------------------------------------------------------------------------------------- the copy and its source


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
    kept = {name: p for name, p in model.named_parameters() if name.partition(".")[0] not in CONVERTED}
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
    replaced = {id(model.get_submodule(name).weight): name for name in CONVERTED}
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


# ------------------------------------------------------------------------------------------------------- what is kept


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


# -------------------------------------------------------------------------------------------------- shared and tied


@both_ways
def test_a_shared_module_becomes_one_module(inplace):
    model, ids = Net().eval(), _ids()
    expected = model(ids)
    converted = convert_model(model, {"shared": FULL}, force=True, inplace=inplace)
    assert isinstance(converted.shared, FactorizedLinear)
    assert converted.twice[0] is converted.twice[2] is converted.shared
    assert relative_error(converted(ids), expected) <= TOLERANCE[torch.float32]
    dense = tl.to_dense(converted)
    assert type(dense.shared) is nn.Linear
    assert dense.twice[0] is dense.twice[2] is dense.shared


@pytest.mark.parametrize("key", ["shared", "twice.0", "twice.2", r"re:twice\.2"])
def test_every_name_of_a_shared_module_is_a_key(key):
    plan = plan_conversion(Net(), {key: HALF}, errors=False)
    assert plan.converted == ("shared",)
    assert plan["twice.2"] is plan["shared"]
    assert set(plan["shared"].aliases) == {"twice.0", "twice.2"}
    assert _factorized(convert_model(Net(), plan)) == {"shared"}


def test_two_layers_with_one_parameter_are_tied():
    model = _named(a=nn.Linear(64, 64), b=nn.Linear(64, 64), c=nn.Linear(64, 64))
    model.b.weight = model.a.weight
    assert _reasons(model) == {"a": "tied with b.weight", "b": "tied with a.weight"}
    converted = convert_model(model, HALF, force=True)  # no force overrides it
    assert _factorized(converted) == {"c"}
    assert converted.a.weight is converted.b.weight
    assert converted.a.weight is not model.a.weight


def test_a_head_tied_to_its_embedding_stays_tied():
    model = Net()
    assert _reasons(model)["head"] == "tied with embed.weight"
    converted = convert_model(model, {"head": FULL, "*": FULL}, force=True)
    assert converted.head.weight is converted.embed.weight
    assert tl.to_dense(converted).head.weight.shape == (96, 64)


VIEWS = {
    "the same": lambda base: (base[:64], base[:64]),
    "transposed": lambda base: (base[:64], base[:64].T),
    "overlapping rows": lambda base: (base[:64], base[32:96]),
    "overlapping columns": lambda base: (base.view(64, 128)[:, :64], base.view(64, 128)[:, 32:96]),
    "two inside one": lambda base: (base, base[8:32], base[64:96]),
}


def _overlapping(views):
    """A linear layer for each view, and one on its own."""
    parts = VIEWS[views](torch.randn(128, 64))
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in parts), nn.Linear(64, 64))
    for layer, part in zip(model, parts, strict=False):
        layer.weight = nn.Parameter(part)
    return model


@pytest.mark.parametrize("views", VIEWS)
def test_weights_that_overlap_in_memory_are_tied(views):
    model = _overlapping(views)
    reasons = _reasons(model)
    assert sorted(reasons) == [str(k) for k in range(len(model) - 1)]
    assert all(reason.startswith("tied with") for reason in reasons.values())
    assert "1.weight" in reasons["0"]
    assert all("0.weight" in reasons[str(k)] for k in range(1, len(reasons)))


@pytest.mark.parametrize("views", VIEWS)
def test_weights_that_overlap_in_memory_stay_tied_in_a_copy(views):
    model = _overlapping(views)
    converted = convert_model(model, HALF)
    assert _factorized(converted) == {str(len(model) - 1)}
    assert not _storages(model) & _storages(converted)
    for other in (converted, model):
        with torch.no_grad():
            other[0].weight[:48, :48] += 1
    for theirs, ours in list(zip(model, converted, strict=True))[:-1]:
        assert torch.equal(ours.weight, theirs.weight)


@pytest.mark.parametrize(
    "parts",
    [lambda base: base.chunk(2), lambda base: base.view(64, 128).chunk(2, dim=1)],
    ids=["rows", "columns"],
)
def test_weights_side_by_side_in_one_storage_are_not_tied(parts):
    model = _chain(64, 64, 64)
    for layer, part in zip(model, parts(torch.randn(128, 64)), strict=True):
        layer.weight = nn.Parameter(part)
    converted = _quietly(model, FULL, force=True)
    assert _factorized(converted) == {"0", "1"}
    x = torch.randn(3, 64)
    assert relative_error(converted(x), model(x)) <= TOLERANCE[torch.float32]


# ------------------------------------------------------------------------------------------------- what stays dense


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Plain(nn.Linear):
    """A subclass that changes nothing."""


class LoRA(nn.Linear):
    """As in loralib: a linear layer with two more parameters."""

    def __init__(self, *args):
        super().__init__(*args)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(4, 64)), nn.Parameter(torch.randn(64, 4))

    def forward(self, x):
        return super().forward(x) + x @ self.lora_A.T @ self.lora_B.T


class Wrapper(nn.Module):
    """As in peft: a module around a linear layer."""

    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear(64, 64)
        self.lora_A, self.lora_B = nn.Linear(64, 4, bias=False), nn.Linear(4, 64, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def _replaced_forward():
    layer = nn.Linear(64, 64)
    layer.forward = types.MethodType(lambda self, x: 2 * nn.Linear.forward(self, x), layer)
    return layer


def _pruned():
    return prune.l1_unstructured(nn.Linear(64, 64), "weight", 0.5)


def _removed():
    return prune.remove(_pruned(), "weight")


PARAMETRIZED = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(64, 64)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(64, 64)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(64, 64)),
    "bias only": lambda: parametrizations.weight_norm(nn.Linear(64, 64), "bias"),
    "old weight_norm": lambda: old_weight_norm(nn.Linear(64, 64)),
    "old spectral_norm": lambda: old_spectral_norm(nn.Linear(64, 64)),
    "pruned": _pruned,
    "own forward": lambda: Doubled(64, 64),
    "replaced forward": _replaced_forward,
    "LoRA": lambda: LoRA(64, 64),
}


@both_ways
@pytest.mark.parametrize("case", PARAMETRIZED)
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_a_parametrized_layer_stays_dense_and_right(case, inplace):
    model = _named(plain=nn.Linear(64, 64), special=PARAMETRIZED[case]()).eval()
    x = torch.randn(3, 64)
    expected = model(x)
    reasons = _reasons(model)
    assert set(reasons) == {"special"}
    assert reasons["special"].startswith("parametrized: ")
    converted = convert_model(model, FULL, force=True, inplace=inplace)
    assert _factorized(converted) == {"plain"}
    assert relative_error(converted(x), expected) <= TOLERANCE[torch.float32]
    assert relative_error(tl.to_dense(converted)(x), expected) <= TOLERANCE[torch.float32]
    converted.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in converted.parameters())


@pytest.mark.parametrize("build", [lambda: Plain(64, 64), _removed], ids=["subclass", "pruning made permanent"])
def test_a_layer_that_is_plain_after_all_is_converted(build):
    model = nn.Sequential(build())
    x = torch.randn(3, 64)
    converted = convert_model(model, FULL, force=True)
    assert _factorized(converted) == {"0"}
    assert relative_error(converted(x), model(x)) <= TOLERANCE[torch.float32]


def test_the_layers_inside_a_wrapper_are_converted():
    model = nn.Sequential(Wrapper())
    x = torch.randn(3, 64)
    converted = convert_model(model, {"re:.*base_layer": FULL}, force=True)
    assert _factorized(converted) == {"0.base_layer"}
    assert relative_error(converted(x), model(x)) <= TOLERANCE[torch.float32]


@both_ways
def test_a_lazy_layer_stays_lazy(inplace):
    model = _named(plain=nn.Linear(64, 64), lazy=nn.LazyLinear(32))
    assert _reasons(model)["lazy"].startswith("lazy")
    converted = convert_model(model, HALF, inplace=inplace)
    assert _factorized(converted) == {"plain"}
    assert "lazy" in str(summarize(converted))
    assert converted(torch.randn(3, 64)).shape == (3, 32)
    assert _factorized(convert_model(converted, HALF)) == {"plain", "lazy"}  # now it has a shape


@both_ways
def test_a_quantized_layer_stays_quantized(inplace):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces another package
        model = torch.ao.quantization.quantize_dynamic(_chain(64, 64, 64), {"0"}).eval()
    x = torch.randn(3, 64)
    expected = model(x)
    assert _reasons(model) == {"0": "quantized"}
    assert len(plan_conversion(model, HALF)) == 2
    converted = convert_model(model, FULL, force=True, inplace=inplace)
    assert _factorized(converted) == {"1"}
    assert relative_error(converted(x), expected) <= TOLERANCE[torch.float32]


class Linear4bit(nn.Linear):
    __module__ = "bitsandbytes.nn.modules"


def _integer():
    layer = nn.Linear(64, 64)
    layer.weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.int8), requires_grad=False)
    return layer


class Packed(torch.Tensor):
    """A tensor subclass, as quantization libraries store their weights in."""


def _subclassed():
    layer = nn.Linear(64, 64)
    layer.weight = nn.Parameter(torch.randn(64, 64).as_subclass(Packed), requires_grad=False)
    return layer


@pytest.mark.parametrize("build", [lambda: Linear4bit(64, 64), _integer, _subclassed])
def test_other_quantized_layers_stay_as_they_are(build):
    model = _named(plain=nn.Linear(64, 64), quantized=build())
    assert _reasons(model)["quantized"].startswith("quantized")
    # In place: torch cannot deep-copy a tensor subclass that does not say how.
    assert _factorized(convert_model(model, HALF, force=True, inplace=True)) == {"plain"}


# ----------------------------------------------------------------------------------------------- what torch fuses


@both_ways
def test_attention_keeps_its_projection_dense(inplace):
    model, x = _named(attention=nn.MultiheadAttention(64, 4, batch_first=True)), torch.randn(2, 5, 64)
    sources = copy.deepcopy(model)
    reason = "nn.MultiheadAttention reads its weight itself"
    assert _reasons(model, {"attention.out_proj": HALF}) == {"attention.out_proj": reason}
    converted = _quietly(model, FULL, force=True, inplace=inplace)
    for training in (True, False):
        for need_weights in (True, False):
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    ours, theirs = (
                        m.train(training).attention(x, x, x, need_weights=need_weights) for m in (converted, sources)
                    )
                torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post norm", "pre norm"])
@pytest.mark.parametrize("activation", ["relu", "gelu", torch.nn.functional.silu], ids=["relu", "gelu", "silu"])
@pytest.mark.parametrize("key", ["*", "linear1", "linear2"])
def test_an_encoder_layer_is_right_on_every_path(key, activation, norm_first):
    model = nn.TransformerEncoderLayer(
        64, 4, 128, dropout=0.0, activation=activation, batch_first=True, norm_first=norm_first
    )
    converted = convert_model(model, {key: FULL}, force=True)
    assert _factorized(converted) == ({"linear1", "linear2"} if key == "*" else {key})
    x = torch.randn(2, 5, 64)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for training in (True, False):
        for grad in (True, False):
            for padding in (None, mask):
                with torch.set_grad_enabled(grad):
                    ours, theirs = (m.train(training)(x, src_key_padding_mask=padding) for m in (converted, model))
                assert relative_error(ours[~mask], theirs[~mask]) <= TOLERANCE[torch.float32]


# --------------------------------------------------------------------------------------------- unusual models


@both_ways
@every_format
def test_a_model_that_is_itself_a_layer(form, inplace):
    model, x = nn.Linear(64, 64), torch.randn(3, 64)
    before = _state(model)
    converted = convert_model(model, formats.get(form)(10**6), force=True, inplace=inplace)
    assert isinstance(converted, FactorizedLinear)
    assert relative_error(converted(x), model(x)) <= TOLERANCE[torch.float32]
    _assert_same(_state(model), before)
    dense = tl.to_dense(converted, inplace=inplace)
    assert type(dense) is nn.Linear
    assert relative_error(dense(x), model(x)) <= TOLERANCE[torch.float32]
    assert "(model)" in str(summarize(converted))


@both_ways
def test_a_model_without_linear_layers(inplace):
    model = nn.Sequential(nn.Conv1d(3, 3, 1), nn.ReLU())
    plan = plan_conversion(model, HALF)
    assert len(plan) == 0
    assert "0 of 0 layers converted" in str(plan)
    converted = _quietly(model, HALF, inplace=inplace)
    assert (converted is model) is inplace
    assert len(summarize(converted)) == 0


class Conv1D(nn.Module):
    """Known by its name, like the layer of Hugging Face's GPT-2: y = x W + b."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


def test_a_transposed_layer():
    model, x = nn.Sequential(Conv1D(96, 64)), torch.randn(3, 64)
    (entry,) = plan_conversion(model, HALF)
    assert (entry.kind, entry.shape) == ("Conv1D", (96, 64))
    converted = convert_model(model, FULL, force=True)
    assert (converted[0].in_features, converted[0].out_features) == (64, 96)
    assert relative_error(converted(x), model(x)) <= TOLERANCE[torch.float32]
    dense = tl.to_dense(converted)
    assert type(dense[0]).__name__ == "Conv1D"
    assert {name: tensor.shape for name, tensor in dense.state_dict().items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    assert relative_error(dense(x), model(x)) <= TOLERANCE[torch.float32]


# --------------------------------------------------------------------------------------------------------- keys


def _blocks():
    block = lambda: _named(up=nn.Linear(64, 128), down=nn.Linear(128, 64))  # noqa: E731
    return _named(layers=nn.Sequential(block(), block()), head=nn.Linear(64, 64))


def _ranks(keys):
    plan = plan_conversion(_blocks(), keys, errors=False)
    return {entry.name: entry.format.rank for entry in plan if entry.converted}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"head": 4}, {"head": 4}),
        ({r"re:layers\.\d+\.up": 4}, {"layers.0.up": 4, "layers.1.up": 4}),
        ({"re:up|.*up": 4}, {"layers.0.up": 4, "layers.1.up": 4}),
        ({"layers.0.up": 4, r"re:.*\.up": 5}, {"layers.0.up": 4, "layers.1.up": 5}),
        ({r"re:.*\.up": 5, "layers.0.up": 4}, {"layers.0.up": 5, "layers.1.up": 5}),
        ({"*": 3, "head": 4, r"re:layers\.1\..*": None}, {"layers.0.up": 3, "layers.0.down": 3, "head": 4}),
        ({r"re:layers.*": None, "*": 3}, {"head": 3}),
        ({"*": None}, {}),
    ],
)
def test_the_first_key_that_matches_wins_and_a_star_is_last(keys, expected):
    assert _ranks({key: None if rank is None else LowRank(rank) for key, rank in keys.items()}) == expected


def test_a_pattern_matches_the_whole_name():
    with pytest.raises(ConversionError, match=r"re:up"):
        _ranks({"re:up": HALF})


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("layers.0", "Sequential"),
        ("layers.7.up", "layers.7.up"),
        ("Head", "Head"),
        ("re:nothing.*", "re:nothing"),
        ("re:(", "not a regular expression"),
        ("", "Sequential"),
    ],
)
def test_a_key_that_matches_nothing_is_refused(key, named):
    for extra in ({}, {"*": HALF}):
        with pytest.raises(ConversionError, match="formats") as caught:
            plan_conversion(_blocks(), {key: HALF, **extra})
        assert repr(key) in str(caught.value)
        assert named in str(caught.value)


@pytest.mark.parametrize("value", [0.5, "lowrank", LowRank, 8, (HALF,), {"rank": 4}])
def test_a_value_that_is_no_format_is_refused(value):
    with pytest.raises(ConversionError, match="head"):
        convert_model(_blocks(), {"head": value})
    if not isinstance(value, dict):
        with pytest.raises(ConversionError, match="format"):
            convert_model(_blocks(), value)


@pytest.mark.parametrize("value", [{}, None, {3: HALF}, {("head",): HALF}])
def test_formats_that_are_no_mapping_of_names_are_refused(value):
    with pytest.raises(ConversionError, match="format"):
        convert_model(_blocks(), value)


def test_where_narrows_the_choice():
    seen = []

    def where(name, module):
        seen.append((name, module))
        return name.endswith("up")

    model = _blocks()
    plan = plan_conversion(model, {"head": LowRank(3), "*": LowRank(4)}, where=where)
    assert plan.converted == ("layers.0.up", "layers.1.up")
    assert {plan[name].reason for name in ("head", "layers.0.down")} == {"asked to stay dense"}
    assert all(model.get_submodule(name) is module for name, module in seen)
    assert _factorized(convert_model(model, LowRank(4), where=where)) == {"layers.0.up", "layers.1.up"}


def test_a_format_that_does_not_fit_names_the_layer():
    cases = [(LowRank((2, 2)), RankError), (TT(4, in_modes=(2, 2)), ModeError), (TT(4, order=1), FormatError)]
    for format, error in cases:
        model = _blocks()
        with pytest.raises(error, match=r"layers\.0\.up"):
            convert_model(model, format, inplace=True)
        assert _factorized(model) == set()


# ------------------------------------------------------------------------------------------------------ economy


def test_what_would_be_slower_stays_dense_with_one_warning():
    model = _named(a=nn.Linear(256, 256), b=nn.Linear(256, 256), tanh=nn.Tanh(), c=nn.Linear(256, 256))
    choice = {"c": HALF, "*": TT(0.5)}
    reasons = _reasons(model, choice)
    assert set(reasons) == {"a", "b"}
    forced = plan_conversion(model, choice, errors=False, force=True)
    for name, reason in reasons.items():
        before, after = forced[name].macs
        assert after > 1.05 * before
        assert reason == f"predicted slower: {after / before:.2f} x the MACs"
    with pytest.warns(UserWarning, match="2 of 3 layers stay dense: 2 would be slower") as caught:
        converted = convert_model(model, choice)
    assert _factorized(converted) == {"c"}
    (warning,) = caught
    for part in (reasons["a"], "force=True"):
        assert part in str(warning.message)
    assert warning.filename == __file__
    assert _factorized(_quietly(model, choice, force=True)) == {"a", "b", "c"}


def test_where_nothing_is_saved_a_layer_stays_dense():
    model = _chain(128, 128)
    with pytest.warns(UserWarning, match=r"1 of 1 layers stay dense: 1 would save nothing.*force=True"):
        converted = convert_model(model, LowRank(64))
    assert _factorized(converted) == set()
    assert _reasons(model, LowRank(64)) == {"0": "nothing saved: 1.00 x the parameters"}
    assert _factorized(_quietly(model, LowRank(64), force=True)) == {"0"}
    assert _factorized(_quietly(model, LowRank(63))) == {"0"}


def test_both_economic_reasons_share_one_warning():
    model = _named(slow=nn.Linear(256, 256), large=nn.Linear(256, 256))
    with pytest.warns(
        UserWarning, match=r"2 of 2 .*1 would be slower \(e.g. slow.*1 would save nothing \(e.g. large"
    ) as w:
        convert_model(model, {"slow": TT(0.5), "large": LowRank(200)})
    assert len(w) == 1


def test_what_was_asked_to_stay_dense_is_no_reason_to_warn():
    model = Net()
    assert _factorized(_quietly(model, {"first": HALF, "*": None})) == {"first"}
    assert _factorized(_quietly(model, {"first": HALF})) == {"first"}
    assert _factorized(_quietly(model, HALF, where=lambda name, module: name == "first")) == {"first"}


def test_a_plan_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = plan_conversion(_chain(256, 256), TT(0.5))
        assert plan.converted == ()
        convert_model(_chain(256, 256), plan)


def test_a_fraction_that_one_small_layer_cannot_reach():
    """LowRank at rank 1 has 65 of the 64 parameters of a layer with one output."""
    model = _named(body=nn.Linear(64, 64), score=nn.Linear(64, 1))
    with pytest.warns(UserWarning, match="1 of 2 layers stay dense: 1 would save nothing"):
        converted = convert_model(model, HALF)
    assert _factorized(converted) == {"body"}
    reason = plan_conversion(model, HALF)["score"].reason
    assert reason.startswith("nothing saved: ")
    assert "1.016" in reason  # the smallest fraction there is
    for choice, kwargs in (({"score": HALF, "*": HALF}, {}), (HALF, {"force": True})):
        with pytest.raises(RankError, match=r"'score'.*1\.016"):
            convert_model(model, choice, inplace=True, **kwargs)
    assert _factorized(model) == set()


# ------------------------------------------------------------------------------------------------- refused, unchanged


@both_ways
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_and_nothing_is_changed(value, inplace):
    model = _named(good=nn.Linear(64, 64), bad=nn.Linear(64, 64))
    with torch.no_grad():
        model.bad.weight[3, 5] = value
    before = _state(model)
    with pytest.raises(ConversionError, match=r"'bad'.*finite"):
        convert_model(model, HALF, inplace=inplace)
    assert _factorized(model) == set()
    after = _state(model)
    assert torch.equal(after.pop("bad.weight").nan_to_num(), before.pop("bad.weight").nan_to_num())
    _assert_same(after, before)


@both_ways
def test_a_model_on_the_meta_device_can_be_planned_but_not_converted(inplace):
    with torch.device("meta"):
        model = _chain(64, 128, 64)
    plan = plan_conversion(model, HALF)
    assert plan.converted == ("0", "1")
    assert [entry.error for entry in plan] == [None, None]
    assert plan.parameters == plan_conversion(_chain(64, 128, 64), HALF).parameters
    with pytest.raises(ConversionError, match=r"'0'.*meta"):
        convert_model(model, HALF, inplace=inplace)
    assert _factorized(model) == set()


def _head_tied():
    model = _chain(64, 64, 64)
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("other", "rule"),
    [
        (lambda: _chain(64, 64), "'1' is not in this model"),
        (lambda: _chain(64, 64, 96), r"'1' has shape \(96, 64\) in this model, \(64, 64\) in the plan"),
        (lambda: nn.Sequential(nn.Linear(64, 64), nn.Tanh()), "'1' is not in this model"),
        (_head_tied, "'0' cannot be converted: tied"),
        (lambda: convert_model(_chain(64, 64, 64), HALF), "'0' is not in this model, or not dense any more"),
    ],
)
def test_a_plan_of_another_model_is_refused(other, rule):
    plan, model = plan_conversion(_chain(64, 64, 64), HALF), other()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ConversionError, match=rule):
        convert_model(model, plan, inplace=True)
    assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize("kwargs", [{"force": True}, {"where": lambda name, module: True}])
def test_a_plan_is_already_decided(kwargs):
    model = _chain(64, 64)
    with pytest.raises(ConversionError, match="plan"):
        convert_model(model, plan_conversion(model, HALF), **kwargs)


# ---------------------------------------------------------------------------------------- summarize, to_dense, again


def test_summarize_tells_what_was_converted_and_what_was_not():
    model = Net()
    plan = plan_conversion(model, {"first": HALF, "shared": TT(2)}, force=True)
    summary = summarize(convert_model(model, plan))
    assert [entry.name for entry in summary] == [entry.name for entry in plan]
    assert summary.converted == ("first", "shared")
    assert summary.parameters == plan.parameters
    assert summary.macs == plan.macs
    for name in summary.converted:
        for field in ("kind", "shape", "layer", "network", "parameters", "macs", "error", "aliases"):
            assert getattr(summary[name], field) == getattr(plan[name], field)
    assert summary["second"].reason == "not converted"
    assert summary["head"].reason == "tied with embed.weight"
    assert summarize(model).converted == ()
    assert summarize(model).parameters == (plan.total,) * 2


def test_the_totals_are_those_of_the_modules():
    model = Net()
    converted = convert_model(model, HALF)
    before, after = (sum(parameter.numel() for parameter in m.parameters()) for m in (model, converted))
    assert plan_conversion(model, HALF).parameters == (before, after)
    assert summarize(converted).parameters == (before, after)


@both_ways
@every_format
def test_to_dense_gives_back_plain_layers(form, inplace):
    model, ids = Net().eval(), _ids()
    converted = convert_model(model, formats.get(form)(4), force=True)
    expected = converted(ids)
    before = _state(converted)
    dense = tl.to_dense(converted, inplace=inplace)
    assert (dense is converted) is inplace
    assert _factorized(dense) == set()
    assert [type(module) for module in dense.modules()] == [type(module) for module in model.modules()]
    assert dense.head.weight is dense.embed.weight
    assert relative_error(dense(ids), expected) <= TOLERANCE[torch.float32]
    dense.load_state_dict(model.state_dict())
    assert torch.equal(dense(ids), model(ids))
    if not inplace:
        _assert_same(_state(converted), before)


@both_ways
def test_what_is_already_converted_is_left_alone(inplace):
    model = _chain(128, 128, 128)
    first = convert_model(model, {"0": LowRank(4)})
    layer, before = first[0], _state(first)
    second = _quietly(first, {"*": LowRank(8)}, inplace=inplace)
    assert [layer.network.ranks for layer in second] == [(4,), (8,)]
    assert (second[0] is layer) is inplace
    _assert_same(_state(second[0]), {name[2:]: tensor for name, tensor in before.items() if name.startswith("0.")})
    with pytest.raises(ConversionError, match="'0' is a FactorizedLinear"):
        convert_model(first, {"0": LowRank(8)})


# ------------------------------------------------------------------------------------------------------ afterwards


@every_format
@pytest.mark.parametrize(
    "optimizer", [lambda p: torch.optim.SGD(p, lr=0.05), lambda p: torch.optim.AdamW(p, lr=0.003)], ids=["sgd", "adamw"]
)
def test_a_converted_model_trains(form, optimizer):
    model = _named(up=nn.Linear(64, 96), act=nn.Tanh(), down=nn.Linear(96, 64))
    x = torch.randn(64, 64)
    target = model(x).detach()
    converted = convert_model(model, formats.get(form)(4), force=True)
    steps, losses = optimizer(converted.parameters()), []
    for _ in range(8):
        loss = (converted(x) - target).square().mean()
        steps.zero_grad()
        loss.backward()
        steps.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


@every_format
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_converted_model_can_be_copied(form, copied):
    model, ids = convert_model(Net().eval(), formats.get(form)(4), force=True), _ids()
    other = copied(model)
    assert not _storages(model) & _storages(other)
    assert other.twice[0] is other.shared
    assert torch.equal(other(ids), model(ids))
    assert str(summarize(other)) == str(summarize(model))


def test_a_state_dict_goes_into_a_model_converted_alike():
    model, ids = convert_model(Net().eval(), HALF), _ids()
    other = convert_model(Net().eval(), HALF)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids), model(ids))


def test_the_progress_bar_names_the_layer_that_is_worked_on(monkeypatch):
    stream, shown = io.StringIO(), []
    real = formats.Format.decompose

    def decompose(self, weight):
        shown.append(stream.getvalue().rpartition("\r")[2])
        return real(self, weight)

    monkeypatch.setattr(convert, "tqdm", lambda *args, **kwargs: tqdm(*args, **{**kwargs, "delay": 0}))
    monkeypatch.setattr(formats.Format, "decompose", decompose)
    monkeypatch.setattr(sys, "stderr", stream)
    convert_model(Net(), HALF, progress=True)
    assert len(shown) == len(CONVERTED)
    for name, line in zip(("first", "second", "shared"), shown, strict=True):
        assert name in line
    stream.seek(0)
    stream.truncate()
    monkeypatch.setattr(convert, "tqdm", lambda *args, **kwargs: tqdm(*args, **{**kwargs, "delay": 10**6}))
    convert_model(Net(), HALF, progress=True)  # done before it would be shown
    convert_model(Net(), HALF, progress=False)
    convert_model(Net(), HALF)  # this stream is no terminal
    assert stream.getvalue() == ""


def test_a_tied_bias_stays_tied():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].bias = model[0].bias
    plan = plan_conversion(model, LowRank(0.5), errors=False)
    assert [entry.reason for entry in plan] == ["tied with 1.bias", "tied with 0.bias"]
    converted = convert_model(model, LowRank(0.5))
    assert converted[0].bias is converted[1].bias


def test_a_weight_of_eight_bits_stays_as_it_is():
    model = nn.Sequential(nn.Linear(64, 64))
    model[0].weight = nn.Parameter(model[0].weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    assert plan_conversion(model, LowRank(0.5), errors=False)["0"].reason.startswith("quantized")
