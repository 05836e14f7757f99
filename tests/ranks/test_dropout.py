"""Rank dropout: unbiased by the enumeration of all masks, and off where it should be."""

import copy
import dataclasses
import itertools
import math
import pickle

import pytest
import torch
from torch import nn

from tensorlayers import CP, TT, FactorizedConv1d, FactorizedLinear, LowRank, NetworkError, rank_dropout
from tensorlayers.testing import assert_close
from tests.ranks.support import FORMATS, formats, layer_of, stacked


@pytest.mark.parametrize("p", [0.3, 0.75])
@pytest.mark.parametrize("format", list(formats(2)))
def test_the_expected_weight_is_the_weight(format, p, monkeypatch):
    bonds = len(format.network(8, 8).bonds)
    ranks = (3, *(2 if bond < 4 else 1 for bond in range(1, bonds)))
    layer = FactorizedLinear(8, 8, dtype=torch.float64, format=dataclasses.replace(format, rank=ranks))
    rank_dropout(layer, p)
    sizes = [rank for rank in layer.network.ranks if rank > 1]
    expected = torch.zeros(8, 8, dtype=torch.float64)
    x = torch.eye(8, dtype=torch.float64)
    for mask in itertools.product([0.0, 0.999], repeat=sum(sizes)):
        draws = list(torch.tensor(mask).split(sizes))
        monkeypatch.setattr(torch, "rand", lambda size, draws=draws, **_: draws.pop(0))
        probability = math.prod(1 - p if value else p for value in mask)
        expected += probability * (layer(x) - layer.bias).T
        assert not draws
    assert_close(expected, layer.to_dense(), torch.float64)


def test_the_expectation_with_shared_cores(monkeypatch):
    model = stacked(TT(2), count=2)
    rank_dropout(model, 0.4)
    layer = model[1]
    ranks = layer.own_network.ranks
    expected = torch.zeros(12, 10, dtype=torch.float64)
    x = torch.eye(10, dtype=torch.float64)
    for mask in itertools.product([0.0, 0.999], repeat=sum(ranks)):
        draws = list(torch.tensor(mask).split(list(ranks)))
        monkeypatch.setattr(torch, "rand", lambda size, draws=draws, **_: draws.pop(0))
        expected += math.prod(0.6 if value else 0.4 for value in mask) * (layer(x) - layer.bias).T
    assert_close(expected, layer.to_dense(), torch.float64)


@pytest.mark.parametrize("format", FORMATS)
def test_off_where_it_should_be(format):
    layer = layer_of(format)
    x = torch.randn(3, 11, dtype=torch.float64)
    plain = layer(x)
    rank_dropout(layer, 0.5)
    dense = layer.to_dense()
    assert not torch.equal(layer(x), plain)
    assert_close(torch.nn.functional.linear(x, dense, layer.bias), plain, torch.float64)
    assert torch.equal(layer.eval()(x), plain)
    assert torch.equal(rank_dropout(layer.train(), 0)(x), plain)


def test_the_generator_decides():
    layer = rank_dropout(layer_of(LowRank(8)), 0.5)
    x = torch.randn(3, 11, dtype=torch.float64)
    draws = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        draws.append(layer(x))
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])


def test_the_share_of_values_dropped():
    layer = rank_dropout(FactorizedLinear(4096, 4096, format=LowRank(4096), bias=False, device="meta"), 0.3)
    layer.to_empty(device="cpu")
    with torch.no_grad():
        layer.cores[0].fill_(1)
        masked = next(core for core in layer.active_cores() if core.data_ptr() != layer.cores[1].data_ptr())
    share = float((masked[0] > 0).double().mean())
    assert abs(share - 0.7) < 5 * math.sqrt(0.3 * 0.7 / 4096)
    assert_close(masked[0].max(), torch.tensor(1 / 0.7), torch.float32)


def test_gradients_of_what_was_kept():
    layer = rank_dropout(layer_of(LowRank(8)), 0.5)
    x = torch.randn(3, 11, dtype=torch.float64)
    torch.manual_seed(3)
    cores = [core.detach() for core in layer.active_cores()]
    torch.manual_seed(3)
    layer(x).sum().backward()
    dead = ~(cores[0] != 0).any(dim=0) | ~(cores[1] != 0).any(dim=1)
    assert 0 < int(dead.sum()) < 8
    assert not layer.cores[0].grad[:, dead].any()
    assert not layer.cores[1].grad[dead].any()
    assert layer.cores[0].grad[:, ~dead].any()
    assert_close(layer.cores[1].grad[~dead], 2 * (cores[0].sum(0)[:, None] * x.sum(0))[~dead], torch.float64)


def test_a_bond_of_one_value_is_never_dropped():
    layer = rank_dropout(layer_of(CP(1)), 0.99)
    x = torch.randn(3, 11, dtype=torch.float64)
    assert torch.equal(layer(x), layer.eval()(x))


def test_kept_by_copies_and_config():
    layer = rank_dropout(layer_of(TT(3)), 0.25)
    copies = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), FactorizedLinear.from_config(layer.config())
    assert [other.rank_dropout for other in copies] == [0.25] * 3
    assert layer_of(TT(3)).rank_dropout == 0


@pytest.mark.parametrize("p", [1, 1.5, -0.1, math.nan, True, "0.5", None], ids=str)
def test_other_probabilities_are_refused(p):
    model = nn.Sequential(layer_of(LowRank(2)), layer_of(LowRank(2)))
    with pytest.raises(NetworkError, match="at least 0 and below 1"):
        rank_dropout(model, p)
    with pytest.raises(NetworkError, match="below 1"):
        model[0].rank_dropout = p


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_dtype(dtype):
    layer = rank_dropout(layer_of(TT(4), dtype), 0.5)
    assert layer(torch.randn(3, 11, dtype=dtype)).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(layer(torch.randn(3, 11, dtype=dtype))).all()


def test_under_vmap():
    layer = rank_dropout(layer_of(LowRank(8)), 0.5)
    x = torch.randn(1, 11, dtype=torch.float64).expand(6, 11)
    different = torch.func.vmap(layer, randomness="different")(x)
    assert len({tuple(row.tolist()) for row in different}) > 1
    same = torch.func.vmap(layer, randomness="same")(x)
    assert_close(same, same[:1].expand(6, 13), torch.float64)


@pytest.mark.parametrize("format", FORMATS)
def test_a_grouped_convolution(format, monkeypatch):
    layer = FactorizedConv1d(8, 6, 3, groups=2, dtype=torch.float64, format=format).truncate(2)
    x = torch.randn(2, 8, 5, dtype=torch.float64)
    dense = nn.functional.conv1d(x, layer.to_dense(), layer.bias, groups=2)
    assert_close(layer(x), dense, torch.float64)
    rank_dropout(layer, 0.3)
    sizes = [rank for rank in layer.network.ranks if rank > 1]
    expected = torch.zeros_like(dense)
    for mask in itertools.product([0.0, 0.999], repeat=sum(sizes)):
        draws = list(torch.tensor(mask).split(sizes))
        monkeypatch.setattr(torch, "rand", lambda size, draws=draws, **_: draws.pop(0))
        expected += math.prod(0.7 if value else 0.3 for value in mask) * layer(x)
    assert_close(expected, dense, torch.float64)
