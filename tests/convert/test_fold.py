"""Layers whose weight is computed from other tensors, folded to plain ones on request."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import tensorlayers as tl
from tensorlayers import FactorizedLinear, LowRank, convert_model, plan_conversion
from tensorlayers.testing import assert_close
from tests.convert.support import FULL, both_ways


def _pruned_inside():
    layer = parametrizations.weight_norm(nn.Linear(12, 10))
    prune.l1_unstructured(layer.parametrizations.weight, "original1", 0.5)
    return layer


LAYERS = {
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(12, 10)),
    "weight norm of a convolution": lambda: parametrizations.weight_norm(nn.Conv1d(6, 8, 3, groups=2), dim=2),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(12, 10)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(12, 10)),
    "old weight norm": lambda: weight_norm(nn.Linear(12, 10)),
    "old spectral norm": lambda: spectral_norm(nn.Linear(12, 10)),
    "pruned": lambda: prune.l1_unstructured(nn.Linear(12, 10), "weight", 0.5),
    "pruned and weight-normed": lambda: prune.l1_unstructured(weight_norm(nn.Linear(12, 10)), "weight_v", 0.5),
    "pruned inside its weight norm": _pruned_inside,
}
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")


@pytest.mark.parametrize("name", LAYERS)
@both_ways
def test_a_computed_weight_is_factorized_as_it_is(name, inplace):
    model = nn.Sequential(LAYERS[name](), nn.Tanh()).eval()
    seen = []
    model[0].register_forward_hook(lambda *args: seen.append(1))
    x = torch.randn(2, 6, 9) if "convolution" in name else torch.randn(3, 12)
    expected = model(x).detach()
    source = copy.deepcopy(model.state_dict())
    plan = plan_conversion(model, FULL, errors=False)
    assert plan["0"].reason.startswith("parametrized")
    assert plan["0"].blocked
    converted = convert_model(model, FULL, force=True, fold=True, inplace=inplace)
    assert isinstance(converted[0], tl.layers.FactorizedLayer)
    seen.clear()
    assert_close(converted(x), expected, torch.float32)
    converted(x).sum().backward()
    assert seen == [1, 1]
    if not inplace:
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in source.items())
    assert type(tl.to_dense(converted)[0]) in (nn.Linear, nn.Conv1d)


def test_a_plan_remembers_to_fold():
    model = nn.Sequential(LAYERS["weight norm"]())
    plan = tl.ConversionPlan.from_json(plan_conversion(model, LowRank(4), fold=True, force=True).to_json())
    assert plan["0"].fold
    assert isinstance(convert_model(model, plan)[0], FactorizedLinear)
    blocked = plan_conversion(model, LowRank(4))
    blocked["0"] = plan["0"]
    assert isinstance(convert_model(model, blocked)[0], FactorizedLinear)


@pytest.mark.parametrize("name", ["weight norm", "old weight norm", "old spectral norm", "pruned"])
def test_a_frozen_weight_stays_frozen(name):
    layer = LAYERS[name]().requires_grad_(False)
    layer.bias.requires_grad_(True)
    converted = convert_model(nn.Sequential(layer), LowRank(4), fold=True, force=True)
    assert {key: p.requires_grad for key, p in converted[0].named_parameters()} == {
        "cores.0": False,
        "cores.1": False,
        "bias": True,
    }


@pytest.mark.parametrize("fold", [False, True])
def test_planning_in_training_mode_does_not_iterate_a_spectral_norm(fold):
    model = nn.Sequential(LAYERS["spectral norm"](), LAYERS["old spectral norm"]())
    before = copy.deepcopy(model.state_dict())
    plan_conversion(model, LowRank(4), fold=fold)
    tl.summarize(model)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


@pytest.mark.parametrize("name", LAYERS)
@both_ways
def test_a_model_that_is_itself_a_layer_is_not_changed(name, inplace):
    layer = LAYERS[name]().eval()
    state, hooks = copy.deepcopy(layer.state_dict()), dict(layer._forward_pre_hooks)
    converted = convert_model(layer, FULL, force=True, fold=True, inplace=inplace)
    assert not converted._forward_pre_hooks
    assert dict(layer._forward_pre_hooks) == hooks
    assert all(torch.equal(value, layer.state_dict()[key]) for key, value in state.items())


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_what_a_computed_weight_has_in_common_with_others_stays_tied():
    model = nn.Sequential(nn.Embedding(12, 12), nn.Linear(12, 12))
    model[1].weight = model[0].weight
    parametrize.register_parametrization(model[1], "weight", Doubled())
    plan = plan_conversion(model, LowRank(4), fold=True, force=True)
    assert [entry.reason for entry in plan] == ["tied with 1.parametrizations.weight.original", "tied with 0.weight"]


def test_hooks_that_cannot_be_copied_are_kept_in_place():
    class Counter:
        def __init__(self):
            self.lock, self.calls = threading.Lock(), 0

        def __call__(self, *args):
            self.calls += 1

    model, counter = nn.Sequential(LAYERS["weight norm"]()), Counter()
    model[0].register_forward_hook(counter)
    convert_model(model, LowRank(4), fold=True, force=True, inplace=True)(torch.randn(3, 12))
    assert counter.calls == 1


def test_what_cannot_be_folded_stays():
    model = nn.Sequential(nn.Linear(12, 10))
    model[0].register_buffer("scale", torch.ones(1))
    assert plan_conversion(model, LowRank(4), fold=True, errors=False)["0"].reason == "parametrized: it has scale"


def test_saved_and_loaded_into_the_parametrized_architecture(tmp_path):
    model = nn.Sequential(LAYERS["weight norm"](), nn.Tanh())
    converted = convert_model(model, LowRank(4), fold=True, force=True)
    tl.save_pretrained(converted, tmp_path)
    loaded = tl.load_pretrained(tmp_path, nn.Sequential(LAYERS["weight norm"](), nn.Tanh()))
    x = torch.randn(3, 12)
    assert torch.equal(loaded(x), converted(x))
