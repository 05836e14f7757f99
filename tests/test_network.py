"""Mode and Network: the rules they keep, and what follows from the index names alone."""

import itertools
import math
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch

from tensorlayers import contraction, testing
from tensorlayers.errors import NetworkError
from tensorlayers.formats import BTT, CP, TT, LowRank, Tucker, available
from tensorlayers.network import ROLES, Mode, Network, linear_modes

FORMATS = [pytest.param(cls, id=name) for name, cls in available().items()]
COUNTS = [(1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (2, 3), (3, 2), (3, 3), (4, 4), (2, 4), (4, 1)]

O2, I2 = Mode("o", 4, "out"), Mode("i", 5, "in")
PAIR = (("o", "r"), ("r", "i"))


def network_of(cls, rank, out_modes, in_modes):
    return cls(rank, out_modes=out_modes, in_modes=in_modes).network(math.prod(out_modes), math.prod(in_modes))


# Rules


@pytest.mark.parametrize("role", ["row", "", "OUT", None])
def test_mode_refuses_unknown_role(role):
    with pytest.raises(NetworkError, match=rf"mode 'o1': a role is one of out, in, kernel.*got {role!r}"):
        Mode("o1", 4, role)


@pytest.mark.parametrize("size", [0, -3])
def test_mode_refuses_size_below_one(size):
    with pytest.raises(NetworkError, match=rf"mode 'o1': a size is at least 1; got {size}"):
        Mode("o1", size, "out")


@pytest.mark.parametrize(
    ("cores", "sizes", "modes", "message"),
    [
        (PAIR, {}, (O2, I2), "index 'r': every index has a size; got none"),
        (PAIR, {"r": 0}, (O2, I2), "index 'r': a size is at least 1; got 0"),
        (PAIR, {"r": -2}, (O2, I2), "index 'r': a size is at least 1; got -2"),
        (PAIR, (("r", 2), ("r", 3)), (O2, I2), "index 'r': one size each; got 2 and 3"),
        (PAIR, {"r": 2, "o": 3}, (O2, I2), "index 'o': one size each; got 3 and 4"),
        (PAIR, {"r": 2.5}, (O2, I2), "index 'r': one size each; got 2 and 2.5"),
        (PAIR, {"r": 2}, (O2, I2, O2), "modes: names are unique; got .*'o', 'i', 'o'"),
        ((("o", "r"), ("r", "r", "i")), {"r": 2}, (O2, I2), r"core \('r', 'r', 'i'\): an index sits on a core once"),
        (PAIR, {"r": 2}, (O2, I2, Mode("z", 3, "in")), "index 'z': every index sits on a core; it is on none of"),
        (PAIR, {"r": 2, "s": 3}, (O2, I2), "index 's': every index sits on a core; it is on none of"),
        ((("o", "r", "s"), ("r", "i")), {"r": 2, "s": 3}, (O2, I2), "bond 's': a bond joins at least two cores"),
    ],
)
def test_network_states_rule_and_offender(cores, sizes, modes, message):
    with pytest.raises(NetworkError, match=message):
        Network(cores, sizes, modes)


@pytest.mark.parametrize("name", ["batch", "r'"])
def test_index_names_that_contractions_use_are_refused(name):
    # The rows of x are "batch", and squared_norm names the bonds of the second copy with a prime.
    with pytest.raises(NetworkError, match=name):
        Network((("o", "r"), ("r", name), (name, "i")), {"r": 2, name: 2}, (O2, I2))


def test_error_is_a_value_error():
    assert issubclass(NetworkError, ValueError)


# Value semantics


def test_network_is_hashable_and_equal_by_value():
    one = Network(PAIR, {"r": 2}, (O2, I2))
    same = Network([list(core) for core in PAIR], (("i", 5), ("r", 2)), [O2, I2])
    other = Network(PAIR, {"r": 3}, (O2, I2))
    assert one == same
    assert hash(one) == hash(same)
    assert len({one, same, other}) == 2
    assert one.sizes == (("o", 4), ("r", 2), ("i", 5))


def test_network_is_frozen():
    network = Network(PAIR, {"r": 2}, (O2, I2))
    with pytest.raises(FrozenInstanceError):
        network.cores = ()
    with pytest.raises(FrozenInstanceError):
        network.modes[0].size = 3


def test_derived_values_do_not_enter_equality():
    one, two = Network(PAIR, {"r": 2}, (O2, I2)), Network(PAIR, {"r": 2}, (O2, I2))
    for name in ("size", "core_shapes", "num_parameters", "bonds", "shape", "pattern"):
        getattr(one, name)
    assert one == two
    assert hash(one) == hash(two)
    assert [field.name for field in fields(one)] == ["cores", "sizes", "modes"]


# Counts


def test_counts_by_hand():
    network = network_of(TT, (3, 2), (2, 3, 4), (5, 6, 7))
    assert network.core_shapes == ((2, 5, 3), (3, 3, 6, 2), (2, 4, 7))
    assert network.num_parameters == 30 + 108 + 56
    assert network.bonds == ("r1", "r2")
    assert network.ranks == (3, 2)
    assert network.shape == (2, 3, 4, 5, 6, 7)
    assert network.names("out") == ("o1", "o2", "o3")
    assert network.mode_sizes("in") == (5, 6, 7)
    assert (network.features("out"), network.features("in"), network.features("kernel")) == (24, 210, 1)


def test_with_ranks():
    network = network_of(TT, 2, (2, 3, 4), (5, 6, 7)).with_ranks((3, 4))
    assert network.core_shapes == ((2, 5, 3), (3, 3, 6, 4), (4, 4, 7))
    with pytest.raises(NetworkError, match=r"ranks \(3,\): one for each bond \('r1', 'r2'\)"):
        network.with_ranks((3,))
    with pytest.raises(NetworkError, match=r"index 'r2'.*at least 1; got 0"):
        network.with_ranks((3, 0))


@pytest.mark.parametrize(
    ("cls", "out_modes", "in_modes", "ranks", "limits"),
    [
        # TT: min(r_left o i, o i r_right)
        (TT, (3, 7), (2, 5), (4,), (6,)),
        (TT, (3, 7, 2), (2, 5, 3), (4, 5), (6, 6)),
        (TT, (3, 7, 2), (2, 5, 3), (1, 1), (6, 6)),
        (TT, (2, 2, 9), (2, 2, 9), (3, 2), (4, 12)),
        # Tucker: min(n_k, product of the other ranks)
        (Tucker, (6, 7), (8, 9), (2, 3, 4, 5), (6, 7, 8, 9)),
        (Tucker, (6, 7), (8, 9), (2, 1, 2, 2), (4, 7, 4, 4)),
        (Tucker, (6, 7, 5), (8, 9, 4), (1, 1, 1, 1, 1, 3), (3, 3, 3, 3, 3, 1)),
        # CP: the smallest product of all modes but one
        (CP, (4, 3), (2, 5), (7,), (24,)),
        (CP, (2, 2, 2), (2, 2, 9), (7,), (32,)),
        # A matrix of rank min(out, in)
        (LowRank, (12,), (10,), (3,), (10,)),
        (LowRank, (3, 4), (5, 9), (3,), (12,)),
        # BTT: a block of the first core is i_2 x r, of the last r x o_1; the modes that they share are a batch
        (BTT, (3, 4), (5, 6), (2,), (3,)),
        (BTT, (9, 4), (5, 6), (2,), (6,)),
        (BTT, (3, 4, 5), (6, 7, 8), (2, 2), (8, 3)),
        (BTT, (9, 4, 5), (6, 7, 8), (3, 5), (8, 9)),
        (BTT, (9, 4, 5), (6, 2, 3), (3, 5), (3, 6)),
    ],
)
def test_rank_limit_by_hand(cls, out_modes, in_modes, ranks, limits):
    network = network_of(cls, 1, out_modes, in_modes).with_ranks(ranks)
    assert tuple(network.rank_limit(bond) for bond in network.bonds) == limits


def test_rank_limit_of_a_bond_beside_its_neighbour():
    # r1 of this TT is bounded by its left side, 6, and by its right side, 35 r2.
    network = network_of(TT, 1, (3, 7, 2), (2, 5, 3))
    assert network.with_ranks((1, 6)).rank_limit("r1") == 6
    tucker = network_of(Tucker, 1, (6, 7), (8, 9))
    others = ((1, 1, 1), (1, 2, 2), (2, 2, 2))
    assert [tucker.with_ranks((1, *ranks)).rank_limit("r_o1") for ranks in others] == [1, 4, 6]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("cls", FORMATS)
def test_every_bond_is_of_use(cls, counts):
    # A bond whose largest useful size is 1 joins nothing: the network would be the dense weight and more.
    outs, ins = (tuple(range(2, 2 + count)) for count in counts)
    network = network_of(cls, 10**6, outs, ins)
    assert min(network.rank_limit(bond) for bond in network.bonds) > 1


# Initialisation


@pytest.mark.parametrize("counts", [(2, 2), (3, 3), (2, 3)], ids=str)
@pytest.mark.parametrize("cls", FORMATS)
def test_core_std_is_that_of_the_expected_dense_variance(cls, counts):
    # Cores of constant entries s have a dense weight of constant entries (number of terms) s^cores, and of variance
    # (number of terms) s^(2 cores) where the entries are independent.
    outs, ins = (3, 4, 2)[: counts[0]], (2, 5, 3)[: counts[1]]
    network = network_of(cls, 3, outs, ins)
    ones = [torch.ones(shape, dtype=torch.float64) for shape in network.core_shapes]
    terms = testing.dense_by_hand(network, ones)
    std = network.core_std(0.02)
    torch.testing.assert_close(
        terms * std ** (2 * len(network.cores)), torch.full_like(terms, 0.02**2), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("cls", FORMATS)
def test_core_std_in_the_mean_of_many_draws(cls):
    network = network_of(cls, 2, (2, 3), (3, 2))
    std = network.core_std(0.5)
    generator = torch.Generator().manual_seed(0)
    squares = [
        contraction.squared_norm(
            network,
            [torch.randn(shape, generator=generator, dtype=torch.float64) * std for shape in network.core_shapes],
        )
        for _ in range(400)
    ]
    mean, spread = torch.stack(squares).mean() / 36, torch.stack(squares).std() / 36
    assert abs(float(mean) - 0.25) <= 4 * float(spread) / math.sqrt(400)


# Adjoint


@pytest.mark.parametrize("counts", [(2, 2), (3, 3), (1, 2), (3, 2)], ids=str)
@pytest.mark.parametrize("cls", FORMATS)
def test_adjoint_is_the_transpose(cls, counts):
    outs, ins = (3, 4, 2)[: counts[0]], (2, 5, 3)[: counts[1]]
    network = network_of(cls, 2, outs, ins)
    adjoint = network.adjoint()
    cores = [torch.randn(shape, dtype=torch.float64) for shape in network.core_shapes]
    dense = testing.dense_by_hand(network, cores).reshape(math.prod(outs), math.prod(ins))
    transposed = contraction.to_dense(adjoint, cores).reshape(math.prod(ins), math.prod(outs))
    testing.assert_close(transposed, dense.T, torch.float64)
    assert adjoint.core_shapes == network.core_shapes
    assert (adjoint.mode_sizes("out"), adjoint.mode_sizes("in")) == (ins, outs)
    assert adjoint.adjoint() == network


def test_adjoint_keeps_the_other_roles():
    modes = (O2, I2, Mode("k", 3, "kernel"), Mode("g", 2, "group"), Mode("s", 2, "stack"))
    network = Network((("o", "g", "s", "r"), ("r", "i", "k", "g")), {"r": 2}, modes)
    assert {mode.name: mode.role for mode in network.adjoint().modes} == {
        "o": "in",
        "i": "out",
        "k": "kernel",
        "g": "group",
        "s": "stack",
    }
    assert {mode.role for mode in modes} == set(ROLES)


# Pattern


@pytest.mark.parametrize("cls", FORMATS)
def test_pattern_knows_no_names_and_no_sizes(cls):
    network = network_of(cls, 2, (3, 4), (2, 5))
    rename = {index: f"x{k}" for k, (index, _) in enumerate(reversed(network.sizes))}
    renamed = Network(
        tuple(tuple(rename[index] for index in core) for core in network.cores),
        tuple((rename[index], size) for index, size in network.sizes),
        tuple(replace(mode, name=rename[mode.name]) for mode in network.modes),
    )
    assert renamed != network
    assert renamed.pattern == network.pattern
    assert network_of(cls, 3, (7, 2), (6, 4)).pattern == network.pattern
    assert network.adjoint().pattern != network.pattern


def test_pattern_by_hand():
    assert network_of(TT, 2, (3, 4), (2, 5)).pattern == (
        ((0, 1, 2), (2, 3, 4)),
        ((0, "out"), (3, "out"), (1, "in"), (4, "in")),
    )


def test_patterns_of_the_formats_differ():
    patterns = {network_of(cls, 2, (3, 4), (2, 5)).pattern for cls in available().values()}
    assert len(patterns) == len(available())


# Layouts


@pytest.mark.parametrize(
    ("cls", "counts", "cores"),
    [
        (LowRank, (1, 1), "o1 r | r i1"),
        (LowRank, (2, 3), "o1 o2 r | r i1 i2 i3"),
        (CP, (1, 1), "o1 r | i1 r"),
        (CP, (2, 2), "o1 r | o2 r | i1 r | i2 r"),
        (CP, (3, 1), "o1 r | o2 r | o3 r | i1 r"),
        (Tucker, (1, 1), "o1 r_o1 | r_o1 r_i1 | r_i1 i1"),
        (Tucker, (2, 2), "o1 r_o1 | o2 r_o2 | r_o1 r_o2 r_i1 r_i2 | r_i1 i1 | r_i2 i2"),
        (Tucker, (1, 2), "o1 r_o1 | r_o1 r_i1 r_i2 | r_i1 i1 | r_i2 i2"),
        (TT, (2, 2), "o1 i1 r1 | r1 o2 i2"),
        (TT, (3, 3), "o1 i1 r1 | r1 o2 i2 r2 | r2 o3 i3"),
        (TT, (4, 4), "o1 i1 r1 | r1 o2 i2 r2 | r2 o3 i3 r3 | r3 o4 i4"),
        (TT, (3, 1), "o1 i1 r1 | r1 o2 r2 | r2 o3"),
        (TT, (1, 3), "o1 i1 r1 | r1 i2 r2 | r2 i3"),
        (BTT, (2, 2), "i1 i2 o2 r1 | o2 o1 i1 r1"),
        (BTT, (3, 3), "i1 i2 i3 o3 r1 | i1 o3 o2 r2 i2 r1 | o2 o3 o1 i1 r2"),
        (
            BTT,
            (4, 4),
            "i1 i2 i3 i4 o4 r1 | i1 i2 o4 o3 r2 i3 r1 | i1 o3 o4 o2 r3 i2 r2 | o2 o3 o4 o1 i1 r3",
        ),
        # A missing out mode is the last, a missing in mode the first: so that the one is the other's mirror image.
        (BTT, (1, 2), "i1 i2 r1 | o1 i1 r1"),
        (BTT, (2, 1), "i1 o2 r1 | o2 o1 r1"),
    ],
)
def test_layout_by_hand(cls, counts, cores):
    layout = cls(1).layout(linear_modes((2,) * counts[0], (2,) * counts[1]))
    assert layout == tuple(tuple(core.split()) for core in cores.split(" | "))


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("cls", FORMATS)
def test_layout_carries_every_mode(cls, counts):
    modes = linear_modes((2,) * counts[0], (3,) * counts[1])
    cores = cls(1).layout(modes)
    assert {mode.name for mode in modes} <= set(itertools.chain(*cores))


def test_linear_modes():
    assert linear_modes((2, 3), (4,)) == (Mode("o1", 2, "out"), Mode("o2", 3, "out"), Mode("i1", 4, "in"))
