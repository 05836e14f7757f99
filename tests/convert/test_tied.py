"""Shared modules and tied weights stay shared and tied."""

import pytest
import torch
from torch import nn

import tensorlayers as tl
from tensorlayers import FactorizedLinear, convert_model, plan_conversion
from tensorlayers.testing import TOLERANCE, relative_error
from tests.convert.support import (
    FULL,
    HALF,
    Net,
    _chain,
    _factorized,
    _ids,
    _named,
    _quietly,
    _reasons,
    _storages,
    both_ways,
)


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
