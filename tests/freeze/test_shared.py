"""Shared cores, and whole models."""

import copy

import pytest
import torch
from torch import nn

import tensorlayers as tl
from tensorlayers import TT, LowRank, NetworkError
from tensorlayers.testing import assert_close
from tests.freeze.support import (
    build,
    flags,
)


@pytest.fixture
def pair():
    """Two layers that share their cores."""
    dense = [nn.Linear(12, 10), nn.Linear(12, 10)]
    return nn.ModuleList(tl.FactorizedLinear.from_dense_jointly(dense, TT(3)))


def check_pair(pair, frozen):
    assert [layer.frozen for layer in pair] == frozen
    assert [core.requires_grad for core in pair[0].cores] == [not any(frozen)] * len(pair[0].cores)
    assert [layer.bias.requires_grad for layer in pair] == [not one for one in frozen]
    x = torch.randn(3, 12)
    for layer in pair:
        assert_close(layer(x), copy.deepcopy(layer).to_module()(x), torch.float32)


def test_shared_cores_train_again_once_the_last_layer_is_thawed(pair):
    for position, frozen in ((0, [True, False]), (1, [True, True])):
        pair[position].freeze()
        check_pair(pair, frozen)
    pair[0].unfreeze()
    check_pair(pair, [False, True])
    pair[0].freeze()
    pair[1].unfreeze()
    check_pair(pair, [True, False])
    assert all(flags(copy.deepcopy(pair)))
    pair[0].unfreeze()
    check_pair(pair, [False, False])


def assign(pair):
    pair.load_state_dict({name: value + 1 for name, value in pair.state_dict().items()}, assign=True)


def step(pair):
    for core in pair[0].cores:
        core.grad = torch.ones_like(core)
    torch.optim.SGD(pair[0].cores.parameters(), lr=0.1, fused=True).step()


def write(pair):
    with torch.no_grad():
        pair[0].cores[0].add_(1)


def convert(pair):
    pair.to(torch.bfloat16).to(torch.float32)


SHARED = [assign, step, write, convert, tl.unfreeze]


@pytest.mark.parametrize("event", SHARED, ids=[event.__name__ for event in SHARED])
@pytest.mark.parametrize("which", [[0], [1], [0, 1]], ids=["first", "second", "both"])
def test_what_changes_shared_cores_thaws_all(pair, event, which):
    for position in which:
        pair[position].freeze()
    event(pair)
    check_pair(pair, [False, False])


def test_a_gradient_wanted_for_shared_cores_stays_wanted(pair):
    pair[0].cores.requires_grad_(False)
    pair[0].freeze()
    pair[0].cores.requires_grad_(True)
    pair[1].freeze()
    check_pair(pair, [True, True])
    tl.unfreeze(pair)
    check_pair(pair, [False, False])


def test_a_layer_in_two_places_is_one_layer():
    layer, (x,) = build("linear-tt")
    second = tl.FactorizedLinear(10, 12, format=TT(2))
    model = nn.Sequential(layer, second, layer)
    expected = model(x)
    assert tl.freeze(model) is model
    assert_close(model(x), expected, torch.float32)
    assert not any(flags(model))
    assert tl.unfreeze(model) is model
    assert all(flags(model))


def test_models_without_a_factorized_layer():
    for function in (tl.freeze, tl.unfreeze):
        with pytest.raises(NetworkError, match="Linear: a factorized layer, or a model with one; it has none"):
            function(nn.Linear(2, 2))


@pytest.mark.parametrize("model", [3, None], ids=str)
def test_what_is_no_module_is_refused(model):
    for function in (tl.freeze, tl.unfreeze):
        with pytest.raises(NetworkError, match=f"model: an nn.Module; got {type(model).__name__}"):
            function(model)


def test_an_attention_model():
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    model = tl.convert_model(encoder, LowRank(4), force=True)
    x = torch.randn(2, 5, 16)
    expected = model(x)
    assert_close(tl.freeze(model)(x), expected, torch.float32)
    assert model.self_attn.q_proj.frozen
    dense = tl.to_dense(model)
    assert all(flags(dense))
    assert_close(dense(x), expected, torch.float32)


def test_summaries_count_the_cached_weight():
    model = nn.Sequential(tl.FactorizedLinear(64, 64, format=TT(4)), nn.ReLU(), tl.FactorizedLinear(64, 32))
    before = tl.summarize(model)
    model[0].freeze()
    after = tl.summarize(model)
    assert after["0"].parameters == (4096, before["0"].parameters[1] + 4096)
    assert after["0"].macs == (before["0"].macs[0],) * 2
    assert after["2"] == before["2"]
    assert after.parameters == (before.parameters[0], before.parameters[1] + 4096)
    assert "note: frozen" in str(after)
    assert "frozen" in repr(model[0])
    assert "frozen" not in str(before) + repr(model[2])
    assert str(tl.summarize(tl.unfreeze(model))) == str(before)
