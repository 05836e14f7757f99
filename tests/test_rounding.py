"""Rounding against the singular values of the dense tensor, which every format's cores give by hand."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensorlayers import CP, TT, DecompositionError, LowRank, NetworkError, RankError, Tucker
from tensorlayers.als import least_squares
from tensorlayers.formats import available
from tensorlayers.network import Axis, Mode, Network, linear_axes
from tensorlayers.rounding import round_bonds, round_network
from tensorlayers.testing import TOLERANCE, assert_close, dense_by_hand, relative_error
from tests.ranks.support import is_tree

AXES = {
    "linear": linear_axes(13, 11),
    "grouped": (Axis("group", 2), Axis("out", 6), Axis("in", 5), Axis("kernel", 3)),
    "stacked": (Axis("stack", 3), *linear_axes(12, 10)),
}


def _formats(rank):
    for name, cls in sorted(available().items()):
        if "order" in {field.name for field in dataclasses.fields(cls)}:
            yield f"{name}-2", cls(rank, 2)
            yield f"{name}-3", cls(rank, 3)
        else:
            yield name, cls(rank)


NETWORKS = [
    pytest.param(format.resolve(axes)[0], id=f"{name}-{kind}")
    for kind, axes in AXES.items()
    for name, format in _formats(4)
]

RING = Network(
    (("o1", "r1", "r3"), ("r1", "o2", "r2"), ("r2", "i1", "r3")),
    {"r1": 3, "r2": 2, "r3": 4},
    (Mode("o1", 4, "out"), Mode("o2", 5, "out"), Mode("i1", 6, "in")),
)
PARALLEL = Network((("o1", "r1", "r2"), ("r1", "r2", "i1")), {"r1": 3, "r2": 2}, RING.modes[::2])
# h is on cores of both halves, but not on both at the bond r1.
COUPLED = Network(
    (("h", "o1", "r1"), ("r1", "o2", "r2"), ("r2", "h", "i1")), {"r1": 4, "r2": 4}, (Mode("h", 3, "group"), *RING.modes)
)
OTHERS = [pytest.param(RING, id="ring"), pytest.param(PARALLEL, id="parallel"), pytest.param(COUPLED, id="coupled")]


def draw(network, dtype=torch.float64):
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in network.core_shapes]


def carriers(network, bond):
    return [k for k, names in enumerate(network.cores) if bond in names]


def lower(network, by=1):
    return [max(1, rank - by) for rank in network.ranks]


def enlarged(network, cores, by=2):
    """The same dense weight from larger ranks: some slices of each bond are split in parts of unequal weight."""
    cores = list(cores)
    for bond in network.bonds:
        size = network.size[bond]
        source = torch.arange(size + by) % size
        part = 1.0 + torch.arange(size + by, dtype=torch.float64) // size
        part = part / torch.zeros(size, dtype=torch.float64).index_add(0, source, part)[source]
        for position, k in enumerate(carriers(network, bond)):
            axis = network.cores[k].index(bond)
            cores[k] = cores[k].index_select(axis, source)
            if position == 0:
                shape = [-1 if name == bond else 1 for name in network.cores[k]]
                cores[k] = cores[k] * part.reshape(shape)
    return network.with_ranks([rank + by for rank in network.ranks]), cores


def tail(network, dense, bond, rank):
    """The error of the best approximation of this rank between the halves of a bond, from the dense tensor."""
    first, _ = carriers(network, bond)
    reached = {first}
    for _ in network.cores:
        links = {b for b in network.bonds if b != bond and any(b in network.cores[k] for k in reached)}
        reached |= {k for k, names in enumerate(network.cores) if links & set(names)}
    modes = [mode.name for mode in network.modes]
    left = {name for k in reached for name in network.cores[k] if name in modes}
    right = {name for k, core in enumerate(network.cores) if k not in reached for name in core if name in modes}
    order = [[n for n in modes if n in group] for group in (left & right, left - right, right - left)]
    sizes = [math.prod(network.size[n] for n in group) for group in order]
    unfolded = dense.permute([modes.index(n) for group in order for n in group]).reshape(sizes)
    return float(torch.linalg.svdvals(unfolded)[:, rank:].norm())


@pytest.mark.parametrize("network", [*NETWORKS, *OTHERS])
def test_nothing_is_lost_where_nothing_has_to_be(network):
    cores = draw(network)
    large, split = enlarged(network, cores)
    assert_close(dense_by_hand(large, split), dense_by_hand(network, cores), torch.float64)
    small, rounded = round_network(large, split, network.ranks)
    assert small == network
    assert_close(dense_by_hand(small, rounded), dense_by_hand(network, cores), torch.float64)


@pytest.mark.parametrize("network", [param for param in NETWORKS if is_tree(param.values[0])])
def test_one_bond_is_truncated_optimally_and_all_within_their_sum(network):
    cores = draw(network)
    dense = dense_by_hand(network, cores)
    squares = 0.0
    for bond, rank in zip(network.bonds, network.ranks, strict=True):
        wanted = max(1, rank - 1)
        best = tail(network, dense, bond, wanted)
        squares += best**2
        ranks = [wanted if b == bond else network.size[b] for b in network.bonds]
        small, rounded = round_network(network, cores, ranks)
        assert small.ranks == tuple(ranks)
        error = float((dense_by_hand(small, rounded) - dense).norm())
        assert abs(error - best) <= TOLERANCE[torch.float64] * float(dense.norm())
    small, rounded = round_network(network, cores, lower(network))
    assert float((dense_by_hand(small, rounded) - dense).norm()) <= math.sqrt(squares) * (1 + 1e-9)


@st.composite
def trees(draw):
    cls = draw(st.sampled_from([TT, Tucker, available()["btt"]]))
    shape = draw(st.integers(2, 24)), draw(st.integers(2, 24))
    format = cls(draw(st.integers(1, 6)), draw(st.integers(2, 3)))
    network = format.network(*shape)
    ranks = [draw(st.integers(1, rank)) for rank in network.ranks]
    return network, ranks


@given(trees())
def test_quality_for_any_shape_and_ranks(drawn):
    network, ranks = drawn
    cores = draw(network)
    dense = dense_by_hand(network, cores)
    small, rounded = round_network(network, cores, ranks)
    assert small == network.with_ranks(ranks)
    tails = [tail(network, dense, bond, rank) for bond, rank in zip(network.bonds, ranks, strict=True)]
    error = float((dense_by_hand(small, rounded) - dense).norm())
    # At least the worst bond's, at most all together: so within sqrt(bonds) of the optimum.
    slack = TOLERANCE[torch.float64] * float(dense.norm())
    assert max(tails) - slack <= error <= math.hypot(*tails) + slack


def test_two_matrices_become_the_truncated_svd():
    network = LowRank(16).network(30, 24)
    cores = draw(network)
    u, s, vh = torch.linalg.svd(dense_by_hand(network, cores))
    small, rounded = round_network(network, cores, (8,))
    assert_close(dense_by_hand(small, rounded), u[:, :8] * s[:8] @ vh[:8], torch.float64)


@pytest.mark.parametrize("groups", [None, 2])
def test_components_are_selected_and_fitted_again(groups):
    axes = [Axis("out", 4), Axis("in", 3), Axis("kernel", 3)]
    network = CP(5).resolve(axes if groups is None else [Axis("group", groups), *axes])[0]
    cores = draw(network)
    rounding = round_bonds(network, cores, (4,))
    dense, rounded = dense_by_hand(network, cores), dense_by_hand(rounding.network, rounding.cores)
    size = len(dense) if groups else 1
    dense, rounded = dense.reshape(size, -1), rounded.reshape(size, -1)
    stacked = torch.stack(
        [
            dense_by_hand(network.with_ranks((1,)), [core[..., j : j + 1] for core in cores]).reshape(size, -1)
            for j in range(5)
        ],
        dim=2,
    )
    for group in range(size):
        best = min(
            float((dense[group] - kept @ torch.linalg.lstsq(kept, dense[group, :, None])[0][:, 0]).norm())
            for kept in (stacked[group][:, list(subset)] for subset in itertools.combinations(range(5), 4))
        )
        assert abs(float((dense[group] - rounded[group]).norm()) - best) <= 1e-9 * best
    (kept,) = rounding.kept["r"]
    assert kept.positions.shape == ((4,) if groups is None else (groups, 4))
    # All cores but the one that took the scales hold slices of the old ones, bit for bit.
    exact = [
        torch.equal(new, kept.of(old, names, "r"))
        for names, new, old in zip(network.cores, rounding.cores, cores, strict=True)
    ]
    assert exact.count(False) == 1


def test_orthogonal_components_are_dropped_by_their_size():
    network = CP(4).resolve([Axis("out", 4), Axis("in", 4), Axis("kernel", 4)])[0]
    cores = [torch.eye(4, dtype=torch.float64) for _ in range(3)]
    cores[1] = cores[1] * torch.tensor([2.0, 5.0, 1.0, 3.0], dtype=torch.float64)
    rounding = round_bonds(network, cores, (2,))
    assert rounding.kept["r"][0].positions.tolist() == [1, 3]
    assert_close(rounding.cores[0], cores[0][:, [1, 3]], torch.float64)


@pytest.mark.parametrize("network", OTHERS)
def test_networks_with_loops_or_couplings(network):
    cores = draw(network)
    dense = dense_by_hand(network, cores)
    small, rounded = round_network(network, cores, lower(network))
    assert relative_error(dense_by_hand(small, rounded), dense) < 1
    assert small.ranks == tuple(lower(network))


def test_a_coupled_bond_has_the_error_of_the_uncoupled_tensor_at_most():
    cores = draw(COUPLED)
    free = Network((*COUPLED.cores[:2], ("r2", "g", "i1")), {"r1": 4, "r2": 4}, (*COUPLED.modes, Mode("g", 3, "group")))
    bound = tail(free, dense_by_hand(free, cores), "r1", 3)
    small, rounded = round_network(COUPLED, cores, (3, 4))
    assert float((dense_by_hand(small, rounded) - dense_by_hand(COUPLED, cores)).norm()) <= bound


@pytest.mark.parametrize("network", NETWORKS)
def test_what_is_not_lowered_is_left_untouched(network):
    cores = draw(network)
    same, left = round_network(network, cores, network.ranks)
    assert same is network
    assert all(new is old for new, old in zip(left, cores, strict=True))
    bond = next(bond for bond in network.bonds if network.size[bond] > 1)
    _, rounded = round_network(network, cores, [network.size[b] - (b == bond) for b in network.bonds])
    for names, new, old in zip(network.cores, rounded, cores, strict=True):
        assert (new is old) == (bond not in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("network", NETWORKS)
def test_every_dtype(network, dtype):
    cores = draw(network, dtype)
    exact = [core.double() for core in cores]
    small, rounded = round_network(network, cores, lower(network))
    assert all(core.dtype == dtype and core.is_contiguous() for core in rounded)
    expected = dense_by_hand(small, round_network(network, exact, lower(network))[1])
    sizes = dense_by_hand(small, [core.abs() for core in rounded])
    assert_close(dense_by_hand(small, rounded), expected, dtype, scale=float(sizes.norm()))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("network", NETWORKS)
def test_any_scale(network, scale):
    cores = draw(network)
    expected = dense_by_hand(network.with_ranks(lower(network)), round_network(network, cores, lower(network))[1])
    cores[0] = cores[0] * scale
    small, rounded = round_network(network, cores, lower(network))
    assert_close(dense_by_hand(small, rounded) / scale, expected, torch.float64)


@pytest.mark.parametrize("network", [*NETWORKS, *OTHERS])
def test_a_zero_weight_keeps_its_other_cores_alive(network):
    cores = draw(network)
    cores[-1].zero_()
    small, rounded = round_network(network, cores, lower(network))
    assert not dense_by_hand(small, rounded).any()
    assert sum(not core.any() for core in rounded) == 1
    assert all(torch.isfinite(core).all() for core in rounded)


@pytest.mark.parametrize("network", [*NETWORKS, *OTHERS])
def test_a_fit_to_a_network_is_the_fit_to_its_dense_weight(network):
    cores = draw(network)
    norm = float(dense_by_hand(network, cores).norm())
    cores = [core / norm ** (1 / len(cores)) for core in cores]
    small = network.with_ranks(lower(network))
    start = draw(small)
    fitted, error = least_squares(small, (network, cores), start, sweeps=2)
    expected, truth = least_squares(small, dense_by_hand(network, cores), start, sweeps=2)
    assert_close(dense_by_hand(small, fitted), dense_by_hand(small, expected), torch.float32)
    assert_close(torch.tensor(error), torch.tensor(truth), torch.float32)
    some, _ = least_squares(small, (network, cores), start, sweeps=2, only=[1])
    assert [new is old for new, old in zip(some, start, strict=True)] == [k != 1 for k in range(len(start))]


def test_a_deficient_bond_stays_finite():
    network = TT(4).network(16, 16)
    cores = draw(network)
    cores[0][..., 1:] = 0
    small, rounded = round_network(network, cores, (3,))
    assert all(torch.isfinite(core).all() for core in rounded)
    assert_close(dense_by_hand(small, rounded), dense_by_hand(network, cores), torch.float64)


def test_a_dense_weight_of_exabytes_is_never_formed():
    network = TT(8, order=5, in_modes=(64,) * 5, out_modes=(64,) * 5).network(64**5, 64**5)
    small = network.with_ranks((4,) * 4)
    cores = draw(small, torch.float32)
    large, split = enlarged(small, [core.double() for core in cores], by=4)
    assert large == network
    back, rounded = round_network(large, split, small.ranks)
    assert back == small
    # A few fibres of the dense weight say that it is the same.
    picked = [(o, o + 7) for o in range(5)]
    fixed = [
        [core[tuple(o if n[0] == "o" else i if n[0] == "i" else slice(None) for n in names)] for names, core in
         zip(small.cores, some, strict=True)]
        for some in (cores, rounded)
        for o, i in picked
    ]  # fmt: skip
    entries = [torch.linalg.multi_dot([first[None], *middle, last[:, None]]) for first, *middle, last in
               ([core.double() for core in cut] for cut in fixed)]  # fmt: skip
    half = len(entries) // 2
    assert_close(torch.cat(entries[half:]), torch.cat(entries[:half]), torch.float64)


def test_gradients_and_autocast_do_not_enter():
    network = TT(4).network(16, 16)
    cores = [core.requires_grad_() for core in draw(network, torch.float32)]
    plain = round_network(network, cores, (3,))[1]
    with torch.autocast("cpu", torch.bfloat16):
        under = round_network(network, cores, (3,))[1]
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(plain, under, strict=True))


@pytest.mark.parametrize(
    ("ranks", "offender"), [((2, 2), "one for each"), ((0,), "got 0"), ((5,), "has 4, got 5"), ((), "one for each")]
)
def test_wrong_ranks_are_refused(ranks, offender):
    network = TT(4).network(16, 16)
    with pytest.raises(RankError, match=offender):
        round_network(network, draw(network), ranks)


def test_wrong_cores_are_refused():
    network = TT(4).network(16, 16)
    with pytest.raises(NetworkError, match="shapes"):
        round_network(network, draw(network)[:1], (2,))
    broken = draw(network)
    broken[1][0] = math.nan
    with pytest.raises(DecompositionError, match=r"core 1.*16 are NaN"):
        round_network(network, broken, (2,))
    with pytest.raises(DecompositionError, match=r"meta"):
        round_network(network, [core.to("meta") for core in broken], (2,))
