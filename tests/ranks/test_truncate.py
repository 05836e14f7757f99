"""truncate: lower ranks in place; every format and dtype, shared cores, hooks, saving."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

import tensorlayers
from tensorlayers import (
    CP,
    TT,
    DecompositionError,
    FactorizedLinear,
    LowRank,
    NetworkError,
    RankError,
    Tucker,
    load_pretrained,
    prune_ranks,
    rank_dropout,
    rank_penalty,
    save_pretrained,
    truncate,
)
from tensorlayers.rounding import round_network
from tensorlayers.testing import assert_close, check_linear, dense_by_hand
from tests.ranks.support import FORMATS, check_whole, halved, is_tree, layer_of, stacked, step


@pytest.mark.parametrize("format", FORMATS)
def test_a_layer_shrinks_in_place(format):
    layer = layer_of(format)
    parameters, before = list(layer.parameters()), layer.network
    step(layer, torch.optim.SGD(layer.parameters(), lr=0.1))
    cores = [core.detach().clone() for core in layer.cores]
    wanted = halved(before)
    assert layer.truncate(wanted) is layer
    assert all(a is b for a, b in zip(parameters, layer.parameters(), strict=True))
    for names, core in zip(before.cores, layer.cores, strict=True):
        lowered = any(layer.network.size[bond] < before.size[bond] for bond in before.bonds if bond in names)
        assert (core.grad is None) == lowered
    assert layer.bias.grad is not None
    network, rounded = round_network(before, cores, layer.network.ranks)
    assert layer.network == network
    assert max(layer.network.ranks) <= max(wanted)
    ours, theirs = dense_by_hand(network, list(layer.cores)), dense_by_hand(network, rounded)
    if is_tree(network):
        assert_close(ours, theirs, torch.float64)
    else:  # fitted after components were selected
        dense = dense_by_hand(before, cores)
        assert (ours - dense).norm() < (theirs - dense).norm()
    check_whole(layer)


@pytest.mark.parametrize("format", FORMATS)
def test_cores_are_balanced_where_they_were_lowered(format):
    layer = layer_of(format)
    before = layer.network
    layer.truncate(2)
    for bond in before.bonds:
        norms = [
            core.detach().movedim(names.index(bond), 0).flatten(1).norm(dim=1)
            for names, core in zip(layer.network.cores, layer.cores, strict=True)
            if bond in names
        ]
        if layer.network.size[bond] < before.size[bond]:
            assert max(float((norm / norms[0]).log().abs().max()) for norm in norms) < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_every_dtype(format, dtype):
    layer = layer_of(format, dtype)
    exact = copy.deepcopy(layer).double().truncate(3).to_dense()
    layer.truncate(3)
    assert layer.cores[0].dtype == dtype
    sizes = dense_by_hand(layer.network, [core.abs() for core in layer.cores])
    assert_close(layer.to_dense(), exact, dtype, scale=float(sizes.norm()))
    check_linear(layer)


def test_one_checkpoint_serves_many_ranks():
    weight = torch.randn(48, 64, dtype=torch.float64) @ torch.diag(0.8 ** torch.arange(64.0).double())
    dense = nn.Linear(64, 48, dtype=torch.float64)
    dense.weight.data = weight
    u, s, vh = torch.linalg.svd(weight)
    layer = FactorizedLinear.from_dense(dense, LowRank(16)).truncate(8)
    assert_close(layer.to_dense(), u[:, :8] * s[:8] @ vh[:8], torch.float64)
    for format, bonds in ((TT(16, 3), 2), (Tucker(6), 4)):
        large = FactorizedLinear.from_dense(dense, format)
        target = large.to_dense().detach()
        error = float((large.truncate(3).to_dense().detach() - target).norm())
        # The best of these ranks that we can find is no better than the best there is.
        best = FactorizedLinear.from_dense(dense, dataclasses.replace(format, rank=3))
        assert error <= math.sqrt(bonds) * float((best.to_dense().detach() - target).norm())


def test_ranks_as_of_a_format():
    layer = FactorizedLinear(64, 64, format=TT(8, 3))
    assert copy.deepcopy(layer).truncate(6).network.ranks == (6, 6)
    assert copy.deepcopy(layer).truncate((100, 3)).network.ranks == (8, 3)
    assert copy.deepcopy(layer).truncate(0.1).network.num_parameters <= 0.1 * 64 * 64
    # Within the budget, no single rank that is left to lower could stay larger.
    uneven = copy.deepcopy(layer).truncate((2, 8)).truncate(0.1)
    assert uneven.network.ranks[0] == 2
    assert uneven.network.num_parameters <= 0.1 * 64 * 64
    assert uneven.network.with_ranks((2, uneven.network.ranks[1] + 1)).num_parameters > 0.1 * 64 * 64


@pytest.mark.parametrize("rank", [8, 100, (8, 9), 1.0], ids=str)
def test_nothing_changes_where_nothing_is_lowered(rank):
    layer = FactorizedLinear(64, 64, format=TT(8, 3))
    layer.error = 0.5
    optimizer = torch.optim.Adam(layer.parameters())
    step(layer, optimizer)
    cores, network = [core.detach().clone() for core in layer.cores], layer.network
    layer.truncate(rank, optimizer)
    assert layer.network is network
    assert layer.error == 0.5
    assert all(torch.equal(a, b) for a, b in zip(layer.cores, cores, strict=True))
    assert all(core.grad is not None and core in optimizer.state for core in layer.cores)


@pytest.mark.parametrize(
    ("rank", "offender"), [(0, "0"), ((2, 0), "0 at bond 2"), ((2,), "2 ranks"), (0.001, "smallest"), (2.5, "2.5")]
)
def test_wrong_ranks_are_refused(rank, offender):
    layer = FactorizedLinear(64, 64, format=TT(8, 3))
    with pytest.raises(RankError, match=offender):
        layer.truncate(rank)
    with pytest.raises(RankError, match=rf"layer '0'.*{offender}"):
        truncate(nn.Sequential(layer), rank)
    assert layer.network.ranks == (8, 8)


def test_components_are_fitted_after_they_were_selected():
    dense = nn.Linear(32, 32, dtype=torch.float64)
    layer = FactorizedLinear.from_dense(dense, CP(32))
    target, cores, network = layer.to_dense().detach(), [core.detach() for core in layer.cores], layer.network
    dense.weight.data = target
    selected = dense_by_hand(*round_network(network, cores, (16,))).reshape(32, 32)
    fresh = FactorizedLinear.from_dense(dense, CP(16)).to_dense().detach()
    error, crude, best = (
        float((weight - target).norm()) for weight in (layer.truncate(16).to_dense().detach(), selected, fresh)
    )
    assert error < 0.9 * crude
    assert error < 1.1 * best


@pytest.mark.parametrize("format", [TT(6, 3), CP(6, 3), Tucker(3, 3)], ids=["tt", "cp", "tucker"])
def test_weights_of_terabytes(format):
    modes = (64,) * 3
    format = dataclasses.replace(format, in_modes=modes, out_modes=modes)
    layer = FactorizedLinear(64**3, 64**3, bias=False, format=format).truncate(2)
    assert set(layer.network.ranks) == {2}
    assert all(torch.isfinite(core).all() for core in layer.cores)


def test_shared_cores_shrink_together():
    model = stacked(TT(4))
    before = [layer.to_dense().detach() for layer in model]
    with pytest.raises(NetworkError, match=r"2 others.*tensorlayers.truncate"):
        model[0].truncate(2)
    assert truncate(model, 2) is model
    network = model[0].network
    assert all(layer.network is network and layer.cores[0] is model[0].cores[0] for layer in model)
    assert all(max(layer.own_network.ranks) == 2 for layer in model)
    for layer, dense in zip(model, before, strict=True):
        check_whole(layer)
        assert 0 < float((layer.to_dense().detach() - dense).norm()) < float(dense.norm())


def test_a_fraction_of_shared_cores_is_of_all_their_layers():
    model = truncate(stacked(LowRank(6)), 0.3)
    assert model[0].network.num_parameters <= 0.3 * 3 * 120
    assert model[0].network.with_ranks((model[0].network.ranks[0] + 1,)).num_parameters > 0.3 * 3 * 120


@pytest.mark.parametrize("change", [lambda m: truncate(m, 2), prune_ranks], ids=["truncate", "prune_ranks"])
def test_layers_that_would_be_left_behind_are_refused(change):
    model = stacked(TT(4))
    with pytest.raises(NetworkError, match=r"layer '0'.*positions \[1\] are missing"):
        change(nn.ModuleList([model[0], model[2]]))
    with pytest.raises(NetworkError, match=r"positions \[1, 2\] are missing"):
        change(model[0])
    tied = nn.Sequential(layer_of(LowRank(4)), layer_of(LowRank(4)))
    tied[1].cores[0] = tied[0].cores[0]
    with pytest.raises(NetworkError, match=r"layer '1'.*some of its cores"):
        change(tied)


def test_tied_layers_follow():
    model = nn.Sequential(layer_of(LowRank(4)), layer_of(LowRank(4)))
    model[1].cores = model[0].cores
    truncate(model, 2)
    assert model[0].network == model[1].network
    check_whole(model[1])


def test_a_model_changes_as_a_whole_or_not_at_all():
    model = nn.Sequential(layer_of(LowRank(4)), layer_of(TT(4)))
    with torch.no_grad():
        model[1].cores[0][0] = math.nan
    for change in (lambda m: truncate(m, 2), prune_ranks):
        with pytest.raises(DecompositionError, match="layer '1': core 0"):
            change(model)
    assert model[0].network.ranks == model[1].network.ranks == (4,)


def test_a_truncated_model_is_saved_and_loaded(tmp_path):
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    small = tensorlayers.convert_model(model, TT(6), force=True)
    truncate(small, 3)
    rank_dropout(small, 0.25)
    save_pretrained(small, tmp_path)
    loaded = load_pretrained(tmp_path, model)
    assert loaded[0].network == small[0].network
    assert loaded[2].rank_dropout == 0.25
    x = torch.randn(2, 16)
    assert torch.equal(loaded.eval()(x), small.eval()(x))
    assert "3" in str(tensorlayers.summarize(small))


def test_on_the_meta_device_shapes_change():
    layer = FactorizedLinear(64, 64, device="meta", format=TT(8, 3)).truncate(4)
    assert [tuple(core.shape) for core in layer.cores] == list(layer.network.core_shapes)
    assert layer.format.rank == (4, 4)
    with pytest.raises(DecompositionError, match="meta"):
        prune_ranks(layer)


def test_a_compiled_layer_sees_the_new_ranks():
    torch._dynamo.reset()
    layer = layer_of(TT(4), torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 11)
    compiled(x)
    layer.truncate(2)
    assert_close(compiled(x), layer(x), torch.float32)
    rank_dropout(layer, 0.5)
    torch.manual_seed(5)
    dropped = compiled(x)
    assert not torch.allclose(dropped, layer.eval()(x))


def test_a_model_without_factorized_layers_is_refused():
    for call in (lambda m: truncate(m, 2), lambda m: rank_dropout(m, 0.1), rank_penalty, prune_ranks):
        with pytest.raises(NetworkError, match=r"Linear: .*none"):
            call(nn.Linear(2, 2))
