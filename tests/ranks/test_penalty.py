"""Rank penalties: values by hand, gradients, and what training with them leaves."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

from tensorlayers import (
    CP,
    TT,
    FactorizedLinear,
    LowRank,
    NetworkError,
    TensorContraction,
    Tucker,
    prune_ranks,
    rank_penalty,
)
from tensorlayers.testing import assert_close
from tests.ranks.support import FORMATS, layer_of, stacked


def test_values_by_hand():
    layer = FactorizedLinear(2, 2, format=LowRank(2), bias=False)
    with torch.no_grad():
        layer.cores[0].copy_(torch.tensor([[3.0, 0.0], [0.0, 0.0]]))  # (out, r)
        layer.cores[1].copy_(torch.tensor([[4.0, 0.0], [5.0, -12.0]]))  # (r, in)
    # r = 0: sqrt(9 + 16); r = 1: sqrt(0 + 25 + 144).
    assert rank_penalty(layer).item() == 18
    assert rank_penalty(layer, "l1").item() == 24


@pytest.mark.parametrize("format", FORMATS)
def test_values_in_general(format):
    layer = layer_of(format)
    group = l1 = 0.0
    for bond in layer.network.bonds:
        for value in range(layer.network.size[bond]):
            squares = 0.0
            for names, core in zip(layer.network.cores, layer.cores, strict=True):
                if bond in names:
                    part = core.detach().select(names.index(bond), value)
                    squares += float(part.square().sum())
                    l1 += float(part.abs().sum())
            group += math.sqrt(squares)
    for kind, value in (("group", group), ("l1", l1)):
        penalty = rank_penalty(layer, kind)
        assert penalty.dim() == 0
        assert_close(penalty, torch.tensor(value, dtype=torch.float64), torch.float64)


@pytest.mark.parametrize("kind", ["group", "l1"])
@pytest.mark.parametrize("format", FORMATS)
def test_gradients(format, kind):
    layer = layer_of(format, bias=False)
    names = [name for name, _ in layer.named_parameters()]

    def penalty(*cores):
        other = copy.copy(layer)
        with torch.nn.utils.stateless._reparametrize_module(other, dict(zip(names, cores, strict=True))):
            return rank_penalty(other, kind)

    assert torch.autograd.gradcheck(penalty, tuple(layer.cores))


@pytest.mark.parametrize("kind", ["group", "l1"])
def test_a_slice_of_zeros_has_the_gradient_zero(kind):
    layer = FactorizedLinear(64, 64, format=TT(4, 3))
    with torch.no_grad():
        for names, core in zip(layer.network.cores, layer.cores, strict=True):
            if "r1" in names:
                core.select(names.index("r1"), 2).zero_()
    rank_penalty(layer, kind).backward()
    assert all(torch.isfinite(core.grad).all() for core in layer.cores)
    assert not layer.cores[0].grad[..., 2].any()
    with torch.no_grad():
        for core in layer.cores:
            core.zero_()
    layer.zero_grad()
    rank_penalty(layer, kind).backward()
    assert not any(core.grad.any() for core in layer.cores)


def test_shared_cores_count_once():
    model = stacked(TT(3))
    once = copy.deepcopy(model[0])
    assert torch.equal(rank_penalty(model), rank_penalty(once))
    both = nn.ModuleList([model, layer_of(TT(3))])
    assert_close(rank_penalty(both), rank_penalty(model) + rank_penalty(both[1]), torch.float64)


def test_half_precision_is_summed_in_single():
    layer = layer_of(TT(3), torch.float16)
    penalty = rank_penalty(layer)
    assert penalty.dtype == torch.float32
    assert_close(penalty, rank_penalty(layer.double()), torch.float32)


@pytest.mark.parametrize("kind", ["group", "l1"])
def test_a_network_without_a_bond_has_none(kind):
    layer = TensorContraction((3, 4), (2, 5))
    penalty = rank_penalty(layer, kind)
    assert penalty.item() == 0
    penalty.backward()
    assert not layer.cores[0].grad.any()


def test_other_kinds_are_refused():
    with pytest.raises(NetworkError, match="group, l1; got 'l2'"):
        rank_penalty(layer_of(TT(3)), "l2")


@pytest.mark.parametrize("format", [LowRank(8), TT(8), CP(8), Tucker(4)], ids=["lowrank", "tt", "cp", "tucker"])
def test_the_penalty_finds_the_ranks_of_a_teacher_and_training_goes_on(format):
    teacher = FactorizedLinear(16, 16, bias=False, format=dataclasses.replace(format, rank=2))
    with torch.no_grad():
        factor = 16 / teacher.to_dense().norm()
        for core in teacher.cores:
            core.mul_(factor ** (1 / len(teacher.cores)))
    layer = FactorizedLinear(16, 16, bias=False, format=format)
    optimizer = torch.optim.Adam(layer.parameters())
    x = torch.randn(256, 16)
    target = teacher(x).detach()

    def train(steps, rate, weight):
        optimizer.param_groups[0]["lr"] = rate
        for _ in range(steps):
            loss = (layer(x) - target).square().mean()
            optimizer.zero_grad()
            (loss + weight * rank_penalty(layer)).backward()
            optimizer.step()
        return float(loss.detach())

    train(300, 2e-2, 0.3)
    train(100, 2e-3, 0.3)
    ((before, after),) = prune_ranks(layer, 1e-2, optimizer).values()
    assert set(after) == {2} != set(before)
    assert train(150, 1e-2, 0.0) < 1e-4 * float(target.square().mean())
