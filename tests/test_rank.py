"""Ranks: what may be asked for, what is clamped, and what a fraction means."""

import dataclasses
import math
import re

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensorlayers import testing
from tensorlayers.errors import RankError
from tensorlayers.formats import CP, TT, LowRank, Tucker, available
from tensorlayers.network import linear_axes
from tensorlayers.rank import clamp, resolve, validate

FORMATS = [pytest.param(cls, id=name) for name, cls in available().items()]
OUTS, INS = (4, 3, 2), (2, 3, 3)


def make(cls, rank, order):
    """A format with its default modes; LowRank has no order."""
    named = {field.name for field in dataclasses.fields(cls)}
    return cls(rank, order=order) if "order" in named else cls(rank)


def raised(network, bond):
    return network.with_ranks([size + (name == bond) for name, size in zip(network.bonds, network.ranks, strict=True)])


@st.composite
def layers(draw):
    """Any format with its default or any other modes, and the shape of a layer that it is for."""
    cls = draw(st.sampled_from(list(available().values())))
    if draw(st.booleans()):
        order, out, columns = draw(st.integers(2, 4)), draw(st.integers(2, 200)), draw(st.integers(2, 200))
        return lambda rank: make(cls, rank, order), out, columns
    modes = st.lists(st.integers(2, 7), min_size=1, max_size=3).map(tuple)
    outs, ins = draw(modes), draw(modes.filter(lambda modes: len(modes) > 1))
    out = math.prod(outs) - draw(st.integers(0, 1))
    return lambda rank: cls(rank, out_modes=outs, in_modes=ins), out, math.prod(ins)


# Refused


@pytest.mark.parametrize("cls", FORMATS)
@pytest.mark.parametrize("rank", [0, -1, -(10**9), numpy.int64(0)])
def test_a_rank_below_one_is_refused(cls, rank):
    with pytest.raises(RankError, match=rf"rank {rank}: every {cls.__name__} rank is at least 1"):
        cls(rank)


@pytest.mark.parametrize("cls", FORMATS)
@pytest.mark.parametrize("rank", [0.0, -0.0, -0.5, 1.5, 8.0, math.nan, math.inf, -math.inf, numpy.float32(2)])
def test_a_fraction_outside_zero_and_one_is_refused(cls, rank):
    with pytest.raises(RankError, match=rf"rank {rank}: a float is a fraction of the dense parameters, above 0"):
        cls(rank)


@pytest.mark.parametrize("cls", FORMATS)
@pytest.mark.parametrize(
    "rank", [True, False, None, "8", "half", b"\x08", 1j, {8}, {"rank": 8}, [[8]], numpy.bool_(True)]
)
def test_what_is_no_rank_is_refused(cls, rank):
    with pytest.raises(RankError, match=r"^rank "):
        cls(rank)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        ((4, 0), "rank (4, 0): every TT rank is at least 1; got 0 at bond 2"),
        ((-2, 4), "rank (-2, 4): every TT rank is at least 1; got -2 at bond 1"),
        ((4, 0.5), "rank (4, 0.5): every TT rank is an integer; got 0.5 at bond 2"),
        ((4.0, 4), "rank (4.0, 4): every TT rank is an integer; got 4.0 at bond 1"),
        ((4, True), "rank (4, True): every TT rank is an integer; got True at bond 2"),
        ((4, None), "rank (4, None): every TT rank is an integer; got None at bond 2"),
        ((4, "4"), "rank (4, '4'): every TT rank is an integer; got '4' at bond 2"),
        ((4, math.nan), "rank (4, nan): every TT rank is an integer; got nan at bond 2"),
    ],
)
def test_a_wrong_entry_is_refused_with_its_bond(rank, message):
    with pytest.raises(RankError, match=re.escape(message)):
        TT(rank)
    with pytest.raises(RankError, match=re.escape(message)):
        TT(list(rank))


@pytest.mark.parametrize("cls", FORMATS)
def test_a_wrong_number_of_ranks_is_refused(cls):
    bonds = cls(1, out_modes=OUTS, in_modes=INS).network(24, 18).bonds
    for count in (0, len(bonds) - 1, len(bonds) + 1):
        message = f"this {cls.__name__} network has {len(bonds)} ranks ({', '.join(bonds)}); got {count}"
        with pytest.raises(RankError, match=re.escape(message)):
            cls((2,) * count, out_modes=OUTS, in_modes=INS).network(24, 18)


def test_rank_error_is_a_value_error():
    assert issubclass(RankError, ValueError)


# Accepted


@pytest.mark.parametrize("cls", FORMATS)
def test_numpy_numbers_are_numbers(cls):
    assert cls(numpy.int64(4)) == cls(4)
    assert cls(numpy.uint8(4)) == cls(4)
    assert type(cls(numpy.int32(4)).rank) is int
    assert cls(numpy.float64(0.5)) == cls(0.5)
    assert type(cls(numpy.float32(0.5)).rank) is float
    assert cls((numpy.int64(4), 2)).rank == (4, 2)
    assert [type(entry) for entry in cls([numpy.int64(4), 2]).rank] == [int, int]


@pytest.mark.parametrize(("rank", "valid"), [(1, 1), (1.0, 1.0), ([3, 2], (3, 2)), ((7,), (7,)), (0.25, 0.25)])
def test_validate(rank, valid):
    assert validate(rank) == valid
    assert type(validate(rank)) is type(valid)


@pytest.mark.parametrize("cls", FORMATS)
def test_an_int_is_one_rank_for_every_bond(cls):
    bonds = cls(1, out_modes=OUTS, in_modes=INS).network(24, 18).bonds
    assert cls(2, out_modes=OUTS, in_modes=INS).network(24, 18).ranks == (2,) * len(bonds)


# Clamped


@pytest.mark.parametrize(
    ("format", "ranks", "notes"),
    [
        (LowRank(100), (10,), ("rank r clamped from 100 to 10, the largest useful",)),
        (LowRank(10), (10,), ()),
        (LowRank((11,)), (10,), ("rank r clamped from 11 to 10, the largest useful",)),
        (TT((100, 2), out_modes=(3, 2, 2), in_modes=(2, 1, 5)), (4, 2), ("rank r1 clamped from 100 to 4",)),
        (
            Tucker((9, 1, 9, 1), out_modes=(3, 4), in_modes=(2, 5)),
            (2, 1, 2, 1),
            ("rank r_o1 clamped from 9 to 2", "rank r_i1 clamped from 9 to 2"),
        ),
        (CP(1000, out_modes=(3, 4), in_modes=(2, 5)), (24,), ("rank r clamped from 1000 to 24",)),
    ],
    ids=str,
)
def test_ranks_above_the_largest_useful_are_clamped_and_noted(format, ranks, notes):
    network, said = format.resolve(linear_axes(12, 10))
    assert network.ranks == ranks
    assert len(said) == len(notes)
    assert all(line.startswith(start) for line, start in zip(said, notes))


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("cls", FORMATS)
def test_any_excess_is_the_same_network(cls, order):
    largest = make(cls, 10**9, order).network(36, 48)
    assert all(largest.rank_limit(bond) == size for bond, size in zip(largest.bonds, largest.ranks, strict=True))
    assert clamp(largest) == largest
    assert make(cls, largest.ranks, order).network(36, 48) == largest
    assert make(cls, tuple(rank + 1 for rank in largest.ranks), order).network(36, 48) == largest
    assert make(cls, largest.ranks, order).resolve(linear_axes(36, 48))[1] == ()


@pytest.mark.parametrize("cls", FORMATS)
def test_clamping_loses_nothing(cls):
    # A weight made with one rank too large is still represented exactly with that rank clamped.
    bonds = cls(1, out_modes=OUTS, in_modes=INS).network(24, 18).bonds
    for excessive in bonds:
        ranks = tuple(300 if bond == excessive else 2 for bond in bonds)
        format = cls(ranks, out_modes=OUTS, in_modes=INS)
        network, notes = format.resolve(linear_axes(24, 18))
        assert len(notes) == 1
        assert f"rank {excessive} clamped from 300 to {network.size[excessive]}," in notes[0]
        unclamped = network.with_ranks(ranks)
        cores = [torch.randn(shape, dtype=torch.float64) for shape in unclamped.core_shapes]
        weight = testing.dense_by_hand(unclamped, cores).reshape(24, 18)
        assert format.decompose(weight).error < testing.EXACT


@given(layers(), st.integers(1, 40))
def test_clamping_leaves_no_rank_above_its_limit(layer, rank):
    format, out, columns = layer
    network, notes = format(rank).resolve(linear_axes(out, columns))
    assert all(1 <= size <= network.rank_limit(bond) for bond, size in zip(network.bonds, network.ranks, strict=True))
    assert len(notes) == sum(size < rank for size in network.ranks)
    # The largest such: no rank that was clamped can be raised.
    assert all(network.size[bond] == rank or network.size[bond] == network.rank_limit(bond) for bond in network.bonds)


# Fractions


@given(layers(), st.floats(0.002, 1))
def test_a_fraction_is_the_largest_network_not_above_it(layer, fraction):
    format, out, columns = layer
    budget = fraction * out * columns
    smallest = format(1).network(out, columns).num_parameters
    if smallest > budget:
        with pytest.raises(RankError, match=r"the smallest .* network of this shape \(all ranks 1\)"):
            format(fraction).network(out, columns)
        return
    network, notes = format(fraction).resolve(linear_axes(out, columns))
    assert notes == ()
    assert network.num_parameters <= budget
    for bond in network.bonds:
        assert network.size[bond] <= network.rank_limit(bond)
        if network.size[bond] < network.rank_limit(bond):
            assert raised(network, bond).num_parameters > budget, (network.ranks, bond)


@given(layers(), st.floats(0.002, 1), st.floats(0.002, 1))
def test_a_larger_fraction_never_gives_fewer_parameters(layer, one, two):
    format, out, columns = layer
    least = format(1).network(out, columns).num_parameters / (out * columns)
    low, high = sorted(min(1.0, least + (1 - least) * fraction) for fraction in (one, two))
    if least < low:
        few, many = (format(fraction).network(out, columns).num_parameters for fraction in (low, high))
        assert few <= many


@given(layers())
def test_a_fraction_too_small_is_refused_with_the_smallest(layer):
    format, out, columns = layer
    network = format(1).network(out, columns)
    least = network.num_parameters / (out * columns)
    with pytest.raises(RankError) as caught:
        format(min(least * 0.99, 1.0) if least < 1 else 1e-9).network(out, columns)
    stated = float(re.search(r"has ([0-9.e+-]+) of the dense", str(caught.value))[1])
    assert stated == pytest.approx(least, rel=1e-3)
    assert type(format(1)).__name__ in str(caught.value)
    if stated * 1.001 <= 1:
        assert format(stated * 1.001).network(out, columns).num_parameters >= network.num_parameters


@pytest.mark.parametrize("cls", FORMATS)
def test_a_fraction_counts_the_weight_without_padding(cls):
    # 1009 is prime: its modes hold more.
    network = cls(0.5).network(1009, 1009)
    assert network.num_parameters <= 0.5 * 1009 * 1009
    assert network.num_parameters >= 0.48 * 1009 * 1009


@pytest.mark.parametrize("fraction", [0.02, 0.07, 0.2, 0.5])
@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("cls", FORMATS)
def test_a_fraction_is_used(cls, order, fraction):
    # tltorch's two-core TT at "50 % of the parameters" has 4 %.
    network = make(cls, fraction, order).network(256, 256)
    assert network.num_parameters >= 0.5 * fraction * 256 * 256


def test_ranks_that_limit_each_other_are_raised_together():
    # No one rank of an all-ones Tucker network can be raised (the limit is the product of the others), two can.
    network = Tucker(0.07, order=4).network(64, 64)
    assert network.num_parameters >= 0.5 * 0.07 * 64 * 64


def test_fractions_by_hand():
    # r (768 + 768) <= 0.25 * 768^2
    assert LowRank(0.25).network(768, 768).ranks == (96,)
    # r (24 * 24 + 32 * 32) <= 0.1 * 768^2
    assert TT(0.1).network(768, 768).ranks == (36,)
    # r (24 + 32 + 24 + 32) <= 0.01 * 768^2
    assert CP(0.01).network(768, 768).ranks == (52,)


def test_resolve_ignores_the_ranks_of_the_network():
    network = LowRank(3).network(12, 10)
    assert resolve(network, 0.5, 120)[0] == resolve(network.with_ranks((1,)), 0.5, 120)[0]
