"""prune_ranks and select: slices are cut bit for bit, and the optimizer with them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tensorlayers import CP, TT, FactorizedLinear, LowRank, NetworkError, RankError, Tucker, prune_ranks
from tensorlayers.testing import TOLERANCE, assert_close
from tests.ranks.support import FORMATS, OPTIMIZERS, check_whole, layer_of, stacked, step


def weaken(layer, factor, values=1):
    """Scale some slices of every bond on one of its cores; returns the positions that stay as they were."""
    stay = {}
    with torch.no_grad():
        for bond in layer.network.bonds:
            size = layer.network.size[bond]
            weak = list(range(0, min(values, size - 1)))
            k = next(k for k, names in enumerate(layer.network.cores) if bond in names)
            axis = layer.network.cores[k].index(bond)
            for value in weak:
                layer.cores[k].select(axis, value).mul_(factor)
            stay[bond] = [value for value in range(size) if value not in weak]
    return stay


@pytest.mark.parametrize("factor", [0.0, 1e-6])
@pytest.mark.parametrize("format", FORMATS)
def test_weak_values_are_cut_and_the_rest_is_the_same(format, factor):
    layer = layer_of(format)
    stay = weaken(layer, factor)
    before, ranks = layer.to_dense().detach(), layer.network.ranks
    parameters = list(layer.parameters())
    expected = []
    for names, core in zip(layer.network.cores, layer.cores, strict=True):
        part = core.detach()
        for bond in stay:
            if bond in names:
                part = part.index_select(names.index(bond), torch.tensor(stay[bond]))
        expected.append(part)
    changes = prune_ranks(layer, 1e-3)
    kept = tuple(len(stay[bond]) for bond in stay)
    if layer.network.ranks == kept:  # else some bond was larger than is useful beside the others
        assert all(torch.equal(core, part) for core, part in zip(layer.cores, expected, strict=True))
    assert all(rank <= most for rank, most in zip(layer.network.ranks, kept, strict=True))
    assert changes == {"": (ranks, layer.network.ranks)}
    assert all(a is b for a, b in zip(parameters, layer.parameters(), strict=True))
    error = float((layer.to_dense().detach() - before).norm() / before.norm())
    assert error <= (TOLERANCE[torch.float64] if factor == 0 else 1e-3)
    check_whole(layer)


@given(st.sampled_from([LowRank(6), CP(6), TT(6), TT(4, 3)]), st.sets(st.integers(0, 5), max_size=5))
def test_slices_of_zeros_are_cut_without_a_trace(format, zeros):
    layer = FactorizedLinear(64, 64, dtype=torch.float64, format=format)
    bond = layer.network.bonds[-1]
    zeros = {value for value in zeros if value < layer.network.size[bond]}
    if len(zeros) == layer.network.size[bond]:
        zeros.pop()
    with torch.no_grad():
        for names, core in zip(layer.network.cores, layer.cores, strict=True):
            # Integers: sums of their products are exact in any order.
            core.copy_(torch.randint(-3, 4, core.shape)).masked_fill_(core == 0, 1)
            if bond in names:
                core.index_fill_(names.index(bond), torch.tensor(sorted(zeros), dtype=torch.int64), 0)
    before, size = layer.to_dense().detach(), layer.network.size[bond]
    prune_ranks(layer, 0)
    assert torch.equal(layer.to_dense(), before)
    assert layer.network.size[bond] == size - len(zeros)


def test_a_bond_too_large_beside_the_others_is_rounded():
    layer = FactorizedLinear(16, 16, dtype=torch.float64, format=Tucker(4))
    optimizer = torch.optim.Adam(layer.parameters())
    step(layer, optimizer)
    with torch.no_grad():
        layer.cores[1][:, 1:] = 0
        layer.cores[3][1:] = 0
        layer.cores[4][1:] = 0
    before = layer.to_dense().detach()
    prune_ranks(layer, 0, optimizer)
    assert layer.network.ranks == (1, 1, 1, 1)  # the first bond, of rank 4, has one value on the other side
    assert_close(layer.to_dense(), before, torch.float64)
    assert all(optimizer.state[core]["exp_avg"].shape == core.shape for core in layer.cores)
    step(layer, optimizer)
    check_whole(layer)


def test_a_weight_of_zero_keeps_one_value():
    layer = layer_of(LowRank(4))
    with torch.no_grad():
        layer.cores[1].zero_()
    prune_ranks(layer)
    assert layer.network.ranks == (1,)
    assert not layer.to_dense().any()


def test_tiny_weights_do_not_underflow():
    layer = layer_of(CP(4, 3), torch.float32)
    with torch.no_grad():
        for core in layer.cores:
            core.mul_(1e-30)
    assert prune_ranks(layer, 1e-8)[""] == ((4,), (4,))


@pytest.mark.parametrize("make", [OPTIMIZERS[name] for name in ("momentum", "amsgrad", "adafactor")])
def test_the_state_of_the_optimizer_is_cut_alike(make):
    layer = layer_of(TT(4, 3), torch.float32)
    optimizer = make(list(layer.parameters()))
    step(layer, optimizer)
    stay = weaken(layer, 0.0, 2)
    before = {k: dict(optimizer.state[core]) for k, core in enumerate(layer.cores)}
    prune_ranks(layer, 0, optimizer)
    for k, core in enumerate(layer.cores):
        for key, value in optimizer.state.get(core, {}).items():
            old = before[k][key]
            if isinstance(value, torch.Tensor) and value.dim():
                for bond in stay:
                    if bond in layer.network.cores[k]:
                        axis = layer.network.cores[k].index(bond)
                        old = old.index_select(axis, torch.tensor(stay[bond]))
                assert torch.equal(value, old)
    step(layer, optimizer)
    assert all(torch.isfinite(core).all() for core in layer.cores)


def test_shared_cores_are_pruned_together():
    model = stacked(TT(4))
    weaken(model[0], 0.0)
    before = [layer.to_dense().detach() for layer in model]
    changes = prune_ranks(model, 0)
    assert list(changes) == ["0", "1", "2"]
    assert len(set(changes.values())) == 1
    for layer, dense in zip(model, before, strict=True):
        assert_close(layer.to_dense(), dense, torch.float64)
        check_whole(layer)
    with pytest.raises(NetworkError, match=r"2 others.*tensorlayers.prune_ranks"):
        model[0].select({"r1": [0]})


def test_what_is_returned_prints():
    model = nn.Sequential(layer_of(TT(4, 3)), nn.ReLU(), FactorizedLinear(13, 9, format=LowRank(3)))
    weaken(model[2], 0.0)
    lines = str(prune_ranks(model)).splitlines()
    assert lines[0].split() == ["layer", "ranks", "before", "ranks", "after"]
    assert lines[2].split() == ["2", "3", "2"]


@pytest.mark.parametrize("tolerance", [1, 1.5, -0.1, math.nan, True, None], ids=str)
def test_other_tolerances_are_refused(tolerance):
    with pytest.raises(NetworkError, match="tolerance"):
        prune_ranks(layer_of(TT(4)), tolerance)


@pytest.mark.parametrize(
    ("positions", "error", "offender"),
    [
        ({"r9": [0]}, NetworkError, "'r9': one of r1"),
        ({"r1": []}, RankError, "at least one"),
        ({"r1": [0, 4]}, RankError, "below 4"),
        ({"r1": [-1]}, RankError, "below 4"),
        ({"r1": [1, 0]}, RankError, "ascending"),
        ({"r1": [1, 1]}, RankError, "ascending"),
        ({"r1": [0.0]}, RankError, "ascending"),
        ({"r1": torch.tensor([0, 2])}, RankError, "ascending"),
    ],
)
def test_wrong_positions_are_refused(positions, error, offender):
    with pytest.raises(error, match=offender):
        layer_of(TT(4)).select(positions)


def test_positions_that_are_not_named_stay():
    layer = FactorizedLinear(64, 64, dtype=torch.float64, format=TT(4, 3))
    core = layer.cores[0].detach().clone()
    ranks = layer.network.ranks
    layer.select({"r1": [0, 2]})
    assert layer.network.ranks == (2, *ranks[1:])
    assert torch.equal(layer.cores[0], core[..., [0, 2]])
    check_whole(layer)
