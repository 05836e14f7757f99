"""Choosing the modes that split a dimension (4096 -> (64, 64)), and padding what does not split well (primes)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from numbers import Integral

from .errors import ModeError

# What an imbalance of one more factor of 2 between largest and smallest mode is worth, as a fraction of padding.
_IMBALANCE = 0.05

# The caches below are typed: 3072.0 == 3072, and what is wrong must not be answered from, or for, what is right.

# Splitting takes trial divisions up to the square root; no dimension of a layer is larger than this.
_LARGEST = 2**31 - 1

MOST_MODES = 10
"""Modes a side: beyond, planning the contraction takes seconds and einsum runs out of index letters."""


@lru_cache(maxsize=4096, typed=True)
def balanced_modes(size: int, order: int) -> tuple[int, ...]:
    """Split a dimension into `order` modes as equal as can be, in ascending order.

    A size that has such a split exactly gets it; another (50257 is prime) is padded to the next that has one.
    Modes within a factor of 2 of each other count as equal; beyond that padding and imbalance are weighed.

    Parameters
    ----------
    size : int
        At least 1.
    order : int
        Number of modes, at least 1.

    Returns
    -------
    tuple of int
        Their product is `size` or slightly above.

    Examples
    --------
    >>> balanced_modes(768, 2), balanced_modes(4096, 3), balanced_modes(17, 2)
    ((24, 32), (16, 16, 16), (3, 6))
    >>> import math
    >>> math.prod(balanced_modes(50257, 2))
    50264
    """
    size, order = _checked(size, order)
    best: tuple[float, tuple[int, ...]] | None = None
    padded = size
    while best is None or padded / size - 1 < best[0]:
        modes = _most_equal(padded, order)
        score = padded / size - 1 + _IMBALANCE * max(0.0, math.log2(modes[-1] / modes[0]) - 1)
        if best is None or score < best[0]:
            best = (score, modes)
        padded += 1
    return best[1]


@lru_cache(maxsize=4096, typed=True)
def skewed_modes(size: int, order: int, inner: int = 128) -> tuple[int, ...]:
    """Split a dimension into small outer modes and one large inner mode, the last.

    Block tensor train multiplies batches of blocks; blocks at least `inner` wide keep a matrix product efficient.
    With two modes the outer one is about 4 (768 -> (4, 192)); with more, each outer mode is 2.

    Parameters
    ----------
    size, order : int
    inner : int
        The width that the last mode keeps where `size` allows it.

    Returns
    -------
    tuple of int
        Their product is `size` or, where that is odd or prime, slightly above.

    Examples
    --------
    >>> skewed_modes(768, 2), skewed_modes(384, 2), skewed_modes(3072, 3), skewed_modes(17, 2)
    ((4, 192), (3, 128), (2, 2, 768), (2, 9))
    """
    size, order = _checked(size, order)
    if order == 1:
        return (size,)
    if order == 2:
        for block in (4, 3, 2):
            if size % block == 0 and size // block >= inner:
                return (block, size // block)
    outer, rest = [], size
    for _ in range(order - 1):
        outer.append(2 if rest >= 4 else 1)
        rest = -(-rest // outer[-1])
    return (*outer, rest)


@lru_cache(maxsize=4096, typed=True)
def mode_choices(size: int, order: int) -> tuple[tuple[int, ...], ...]:
    """Splits of a dimension to choose among for speed: balanced, skewed, and some in between.

    The skewed ones have small outer modes, from 2 upwards by factors of about 4, and one large mode that takes the
    rest. Each comes with the small modes first and last, since that decides what is contracted first.

    Parameters
    ----------
    size, order : int

    Returns
    -------
    tuple of tuple of int
        Distinct; the product of each is `size`, or slightly above where that does not split so.

    Examples
    --------
    >>> mode_choices(768, 2)
    ((24, 32), (32, 24), (2, 384), (384, 2), (8, 96), (96, 8))
    """
    size, order = _checked(size, order)
    balanced = balanced_modes(size, order)
    found = [balanced, balanced[::-1]]
    outer = 2
    while order > 1 and 2 * outer <= balanced[0]:
        modes: tuple[int, ...] = ()
        rest = size
        for _ in range(order - 1):
            exact = [mode for mode in range(outer, 2 * outer) if rest % mode == 0]
            modes = (*modes, exact[0] if exact else outer)
            rest = -(-rest // modes[-1])
        found += [(*modes, rest), (rest, *modes[::-1])]
        outer *= 4
    return tuple(dict.fromkeys(found))


def check_modes(modes: Sequence[int], size: int, what: str) -> tuple[int, ...]:
    """Validate modes that a user gave for a dimension.

    Raises
    ------
    ModeError
        If there is none, one is no integer or below 1, their product is below `size`, or `size` is no integer.
    """
    modes, size = validate_modes(modes, what), _integer(size, "dimension")
    if math.prod(modes) < size:
        raise ModeError(f"{what} {modes}: the product is at least {size}, the dimension; got {math.prod(modes)}")
    return modes


def validate_modes(modes: Sequence[int], what: str) -> tuple[int, ...]:
    """Check the type and range of modes, without knowing the dimension."""
    if isinstance(modes, (str, bytes, bytearray)) or not isinstance(modes, Sequence) or not modes:
        raise ModeError(f"{what} {modes!r}: a non-empty tuple of integers")
    if len(modes) > MOST_MODES:
        raise ModeError(f"{what} {tuple(modes)}: at most {MOST_MODES} modes; got {len(modes)}")
    for entry in modes:
        if isinstance(entry, bool) or not isinstance(entry, Integral) or entry < 1:
            raise ModeError(f"{what} {tuple(modes)}: every mode is an integer of at least 1; got {entry!r}")
    return tuple(int(entry) for entry in modes)


def boxes(size: int, modes: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Cover the first `size` values of a tensorized dimension by disjoint boxes, one slice a mode.

    Padding is not a product of ranges over the modes, but it is what remains of at most ``len(modes)`` of them.

    Examples
    --------
    >>> list(boxes(5, (2, 3)))
    [(slice(0, 1, None), slice(0, 3, None)), (slice(1, 2, None), slice(0, 2, None))]
    """
    prefix: tuple[slice, ...] = ()
    for position in range(len(modes)):
        stride = math.prod(modes[position + 1 :])
        whole, size = divmod(size, stride)
        if whole:
            yield (*prefix, slice(0, whole), *(slice(0, n) for n in modes[position + 1 :]))
        if not size:
            return
        prefix = (*prefix, slice(whole, whole + 1))


def _checked(size: int, order: int) -> tuple[int, int]:
    """A dimension and a number of modes as Python's integers."""
    size, order = _integer(size, "dimension"), _integer(order, "order")
    if not 1 <= size <= _LARGEST:
        raise ModeError(f"dimension {size}: from 1 to {_LARGEST}")
    if order < 1:
        raise ModeError(f"order {order}: at least 1 mode")
    return size, order


def _integer(value: object, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ModeError(f"{what} {value!r}: an integer; got {type(value).__name__}")
    return int(value)


def _most_equal(size: int, order: int) -> tuple[int, ...]:
    """The ascending factorization of `size` into `order` factors with the smallest ratio of largest to smallest."""
    small = [d for d in range(1, math.isqrt(size) + 1) if size % d == 0]

    def factorizations(rest: int, lowest: int, count: int) -> Iterator[tuple[int, ...]]:
        if count == 1:
            yield (rest,)
            return
        for factor in small:
            if factor >= lowest and factor**count <= rest and rest % factor == 0:
                for tail in factorizations(rest // factor, factor, count - 1):
                    yield (factor, *tail)

    return min(factorizations(size, 1, order), key=lambda modes: modes[-1] / modes[0])
