"""Layers whose weight is computed from other tensors, folded to plain ones on request."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import tensorlayers as tl
from tensorlayers import FactorizedLinear, LowRank, convert_model, plan_conversion
from tensorlayers.testing import assert_close
from tests.convert.support import FULL, both_ways

LAYERS = {
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(12, 10)),
    "weight norm of a convolution": lambda: parametrizations.weight_norm(nn.Conv1d(6, 8, 3, groups=2), dim=2),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(12, 10)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(12, 10)),
    "old weight norm": lambda: weight_norm(nn.Linear(12, 10)),
    "old spectral norm": lambda: spectral_norm(nn.Linear(12, 10)),
    "pruned": lambda: prune.l1_unstructured(nn.Linear(12, 10), "weight", 0.5),
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
    plan = tl.ConversionPlan.from_json(plan_conversion(model, LowRank(4), fold=True).to_json())
    assert plan["0"].fold
    assert isinstance(convert_model(model, plan)[0], FactorizedLinear)
    blocked = plan_conversion(model, LowRank(4))
    blocked["0"] = plan["0"]
    assert isinstance(convert_model(model, blocked)[0], FactorizedLinear)


def test_a_frozen_weight_stays_frozen():
    layer = LAYERS["weight norm"]().requires_grad_(False)
    converted = convert_model(nn.Sequential(layer), LowRank(4), fold=True)
    assert not any(parameter.requires_grad for parameter in converted.parameters())


def test_what_cannot_be_folded_stays():
    model = nn.Sequential(nn.Linear(12, 10))
    model[0].register_buffer("scale", torch.ones(1))
    assert plan_conversion(model, LowRank(4), fold=True, errors=False)["0"].reason == "parametrized: it has scale"


def test_saved_and_loaded_into_the_parametrized_architecture(tmp_path):
    model = nn.Sequential(LAYERS["weight norm"](), nn.Tanh())
    converted = convert_model(model, LowRank(4), fold=True)
    tl.save_pretrained(converted, tmp_path)
    loaded = tl.load_pretrained(tmp_path, nn.Sequential(LAYERS["weight norm"](), nn.Tanh()))
    x = torch.randn(3, 12)
    assert torch.equal(loaded(x), converted(x))
