"""What must stay dense stays dense, and right: parametrized, lazy, quantized, fused."""

import copy
import types
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

import tensorlayers as tl
from tensorlayers import FactorizedLinear, convert_model, formats, plan_conversion, summarize
from tensorlayers.testing import TOLERANCE, relative_error
from tests.convert.support import (
    FULL,
    HALF,
    _assert_same,
    _chain,
    _factorized,
    _named,
    _quietly,
    _reasons,
    _state,
    both_ways,
    every_format,
)


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


class OwnAttention(nn.MultiheadAttention):
    """A subclass: what it does with its weights is not known."""


@both_ways
def test_a_subclass_of_attention_keeps_its_projection_dense(inplace):
    model, x = _named(attention=OwnAttention(64, 4, batch_first=True)), torch.randn(2, 5, 64)
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


ATTENTION = [f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "out_proj")]


@pytest.mark.parametrize("norm_first", [False, True], ids=["post norm", "pre norm"])
@pytest.mark.parametrize("activation", ["relu", "gelu", torch.nn.functional.silu], ids=["relu", "gelu", "silu"])
@pytest.mark.parametrize("key", ["*", "linear1", "linear2"])
def test_an_encoder_layer_is_right_on_every_path(key, activation, norm_first):
    model = nn.TransformerEncoderLayer(
        64, 4, 128, dropout=0.0, activation=activation, batch_first=True, norm_first=norm_first
    )
    converted = convert_model(model, {key: FULL}, force=True)
    assert _factorized(converted) == ({"linear1", "linear2", *ATTENTION} if key == "*" else {key})
    x = torch.randn(2, 5, 64)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for training in (True, False):
        for grad in (True, False):
            for padding in (None, mask):
                with torch.set_grad_enabled(grad):
                    ours, theirs = (m.train(training)(x, src_key_padding_mask=padding) for m in (converted, model))
                assert relative_error(ours[~mask], theirs[~mask]) <= TOLERANCE[torch.float32]


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
def test_a_model_without_a_layer_that_can_be_factorized(inplace):
    model = nn.Sequential(nn.LayerNorm(3), nn.ReLU())
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


def test_a_layer_with_a_buffer_of_its_own_stays_dense():
    model = nn.Sequential(nn.Linear(64, 64))
    model[0].register_buffer("scale", torch.ones(1))
    assert plan_conversion(model, HALF, errors=False)["0"].reason == "parametrized: it has scale"
