"""Choosing modes: products, balance, padding; and the boxes that cut padding off."""

import itertools
import math

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorlayers.errors import ModeError
from tensorlayers.formats import BTT, TT, available
from tensorlayers.tensorize import balanced_modes, boxes, check_modes, mode_choices, skewed_modes, validate_modes

FORMATS = [pytest.param(cls, id=name) for name, cls in available().items()]
SIZES = st.one_of(st.integers(1, 300), st.integers(1, 60_000))
AWKWARD = (17, 1009, 1013, 8191, 30522, 50257, 128256, 151936)


def splits_within_two(size, order):
    """Whether `size` is a product of `order` factors, each at most twice the smallest."""
    if order == 1:
        return True

    def search(rest, count, low, high):
        if count == 0:
            return rest == 1
        return any(rest % f == 0 and search(rest // f, count - 1, f, high) for f in range(low, min(high, rest) + 1))

    root = round(size ** (1 / order)) + 1
    return any(size % f == 0 and search(size // f, order - 1, f, 2 * f) for f in range(1, root + 1))


# Balanced modes


@pytest.mark.parametrize(
    ("size", "order", "modes"),
    [
        (768, 2, (24, 32)),
        (3072, 2, (48, 64)),
        (384, 2, (16, 24)),
        (4096, 2, (64, 64)),
        (1024, 2, (32, 32)),
        (512, 2, (16, 32)),
        (1536, 2, (32, 48)),
        (768, 3, (8, 8, 12)),
        (4096, 3, (16, 16, 16)),
        (4096, 4, (8, 8, 8, 8)),
        (3072, 4, (6, 8, 8, 8)),
        (25088, 3, (28, 28, 32)),
        (17, 2, (3, 6)),
        (1, 3, (1, 1, 1)),
        (2, 2, (1, 2)),
        (50257, 1, (50257,)),
    ],
)
def test_balanced_modes_by_hand(size, order, modes):
    assert balanced_modes(size, order) == modes


@given(SIZES, st.integers(1, 4))
def test_balanced_modes_hold_the_dimension(size, order):
    modes = balanced_modes(size, order)
    assert len(modes) == order
    assert all(type(mode) is int and mode >= 1 for mode in modes)
    assert list(modes) == sorted(modes)
    assert math.prod(modes) >= size


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_balanced_modes_are_exact_where_a_split_within_two_exists(order):
    for size in range(1, 400):
        if splits_within_two(size, order):
            modes = balanced_modes(size, order)
            assert math.prod(modes) == size, (size, modes)
            assert modes[-1] <= 2 * modes[0] or order == 1, (size, modes)


@pytest.mark.parametrize(("order", "padding", "imbalance"), [(2, 0.01, 2.1), (3, 0.02, 3), (4, 0.04, 3.5)])
def test_balanced_modes_pad_little_and_stay_balanced(order, padding, imbalance):
    for size in (*range(1000, 1200), *AWKWARD[1:]):
        modes = balanced_modes(size, order)
        assert math.prod(modes) <= (1 + padding) * size, (size, modes)
        assert modes[-1] <= imbalance * modes[0], (size, modes)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_balanced_modes_of_small_dimensions_pad_little(order):
    for size in range(1, 300):
        assert math.prod(balanced_modes(size, order)) <= 1.12 * size, size


def test_a_prime_vocabulary_is_not_left_prime():
    # 50257 = 29 * 1733 is what a split without padding gives.
    modes = balanced_modes(50257, 2)
    assert 50257 <= math.prod(modes) <= 50300
    assert modes[1] <= 2 * modes[0]


# Skewed modes


@pytest.mark.parametrize(
    ("size", "order", "modes"),
    [
        (768, 2, (4, 192)),
        (3072, 2, (4, 768)),
        (384, 2, (3, 128)),
        (4096, 2, (4, 1024)),
        (256, 2, (2, 128)),
        (1009, 2, (2, 505)),
        (3072, 3, (2, 2, 768)),
        (17, 2, (2, 9)),
        (50257, 1, (50257,)),
    ],
)
def test_skewed_modes_by_hand(size, order, modes):
    assert skewed_modes(size, order) == modes


@given(SIZES, st.integers(1, 4))
def test_skewed_modes_hold_the_dimension(size, order):
    modes = skewed_modes(size, order)
    assert len(modes) == order
    assert all(type(mode) is int and mode >= 1 for mode in modes)
    outer = math.prod(modes[:-1])
    assert size <= math.prod(modes) < size + outer
    assert outer <= max(4, 2 ** (order - 1))


@given(st.integers(2, 4), st.integers(1, 50_000))
def test_inner_blocks_are_wide_where_the_dimension_allows(order, extra):
    size = 128 * 2 ** (order - 1) + extra
    assert skewed_modes(size, order)[-1] >= 128


@pytest.mark.parametrize("order", [2, 3, 4])
def test_skewed_modes_of_small_dimensions_pad_little(order):
    # A classifier of one output, or of three: a block of zeros more than the weight itself is no use.
    for size in range(1, 9):
        assert math.prod(skewed_modes(size, order)) <= size + 1, skewed_modes(size, order)


# The formats' defaults


def test_btt_keeps_wide_blocks_on_both_sides():
    network = BTT(2).network(3072, 768)
    assert network.mode_sizes("in") == (4, 192)
    assert network.mode_sizes("out") == (768, 4)
    for size in (384, 768, 1024, 4096, 50257):
        network = BTT(1).network(size, size)
        assert min(max(network.mode_sizes("in")), max(network.mode_sizes("out"))) >= 128


@pytest.mark.parametrize("cls", FORMATS)
def test_default_modes_hold_awkward_dimensions(cls):
    for size in AWKWARD:
        network = cls(1).network(size, 768)
        assert size <= network.features("out") <= 1.08 * size
        assert network.features("in") == 768


@pytest.mark.parametrize("cls", FORMATS)
def test_modes_of_the_user_are_taken_as_they_are(cls):
    network = cls(1, out_modes=(7, 2), in_modes=(3, 4)).network(13, 11)
    assert (network.mode_sizes("out"), network.mode_sizes("in")) == ((7, 2), (3, 4))


# Modes of the user


@pytest.mark.parametrize(
    ("modes", "message"),
    [
        ((), r"in_modes \(\): a non-empty tuple of integers"),
        (12, "in_modes 12: a non-empty tuple of integers"),
        ("34", "in_modes '34': a non-empty tuple of integers"),
        (None, "in_modes None: a non-empty tuple of integers"),
        ((3, 0), r"in_modes \(3, 0\): every mode is an integer of at least 1; got 0"),
        ((3, -4), r"in_modes \(3, -4\): every mode is an integer of at least 1; got -4"),
        ((3, 4.0), r"in_modes \(3, 4.0\): every mode is an integer of at least 1; got 4.0"),
        ((True, 12), r"in_modes \(True, 12\): every mode is an integer of at least 1; got True"),
        ((3, None), r"in_modes \(3, None\): every mode is an integer of at least 1; got None"),
        ((3, "4"), r"in_modes \(3, '4'\): every mode is an integer of at least 1; got '4'"),
    ],
)
def test_modes_are_refused(modes, message):
    with pytest.raises(ModeError, match=message):
        validate_modes(modes, "in_modes")
    with pytest.raises(ModeError, match=message):
        check_modes(modes, 12, "in_modes")


def test_modes_below_the_dimension_are_refused():
    with pytest.raises(ModeError, match=r"out_modes \(3, 4\): the product is at least 13, the dimension; got 12"):
        check_modes((3, 4), 13, "out_modes")
    with pytest.raises(ModeError, match=r"out_modes \(3, 4\)"):
        TT(2, out_modes=(3, 4)).network(13, 12)
    with pytest.raises(ModeError, match=r"dimension 12\.0: an integer; got float"):
        check_modes((3, 4), 12.0, "out_modes")


def test_modes_become_a_tuple_of_python_integers():
    modes = check_modes([numpy.int64(3), 4], 12, "in_modes")
    assert modes == (3, 4)
    assert [type(mode) for mode in modes] == [int, int]
    assert TT(2, in_modes=[3, 4]) == TT(2, in_modes=(3, 4))


@pytest.mark.parametrize("split", [balanced_modes, skewed_modes])
def test_dimensions_and_orders_out_of_range_are_refused(split):
    for size in (-1, 0, 2**31):
        with pytest.raises(ModeError, match=f"dimension {size}: from 1 to {2**31 - 1}"):
            split(size, 2)
    with pytest.raises(ModeError, match="order 0: at least 1 mode"):
        split(12, 0)


@pytest.mark.parametrize("split", [balanced_modes, skewed_modes, mode_choices])
def test_dimensions_and_orders_that_are_no_integers_are_refused_and_not_remembered(split):
    expected = split(3072, 2)  # 3072.0 == 3072: a cache of both would answer one for the other
    for wrong in (3072.0, "3072", None, True):
        with pytest.raises(ModeError, match=f"dimension {wrong!r}: an integer; got {type(wrong).__name__}"):
            split(wrong, 2)
        with pytest.raises(ModeError, match=f"order {wrong!r}: an integer; got {type(wrong).__name__}"):
            split(3072, wrong)
    for size in (numpy.int64(3072), 3072):
        found = split(size, numpy.int32(2))
        assert found == expected
        assert {type(mode) for mode in numpy.ravel(numpy.array(found, dtype=object))} == {int}


# Boxes


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.data())
def test_boxes_cover_exactly_the_first_values_once(modes, data):
    size = data.draw(st.integers(0, math.prod(modes)))
    cover = list(boxes(size, modes))
    counts = numpy.zeros(modes, dtype=int)
    for box in cover:
        assert len(box) == len(modes)
        assert all(0 <= part.start < part.stop <= mode and part.step is None for part, mode in zip(box, modes))
        counts[box] += 1
    assert counts.ravel().tolist() == [1] * size + [0] * (counts.size - size)
    assert len(cover) <= len(modes)


def test_boxes_of_a_full_tensor_are_one():
    assert list(boxes(24, (2, 3, 4))) == [tuple(slice(0, mode) for mode in (2, 3, 4))]
    assert list(boxes(0, (2, 3))) == []


def test_boxes_are_disjoint_by_hand():
    assert list(itertools.chain(boxes(5, (2, 3)))) == [(slice(0, 1), slice(0, 3)), (slice(1, 2), slice(0, 2))]


# Modes to choose among


@given(size=SIZES, order=st.integers(1, 4))
def test_choices_hold_the_dimension_and_the_balanced_modes(size, order):
    choices = mode_choices(size, order)
    assert choices[0] == balanced_modes(size, order)
    assert len(set(choices)) == len(choices) <= 24
    for modes in choices:
        assert len(modes) == order
        assert modes[::-1] in choices
        assert size <= math.prod(modes) <= max(math.prod(choices[0]), size * 1.2 + 2**order)


@pytest.mark.parametrize(
    ("size", "order", "choices"),
    [
        (768, 1, ((768,),)),
        (768, 2, ((24, 32), (32, 24), (2, 384), (384, 2), (8, 96), (96, 8))),
        (17, 2, ((3, 6), (6, 3))),
        (1009, 2, (balanced_modes(1009, 2), balanced_modes(1009, 2)[::-1], (2, 505), (505, 2), (8, 127), (127, 8))),
    ],
)
def test_choices_by_hand(size, order, choices):
    assert mode_choices(size, order) == choices
