"""What a user may ask for as a rank (int, tuple, fraction), turned into one validated size per bond."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from numbers import Integral, Real
from typing import TypeAlias

from .errors import RankError
from .network import Network


class RankRule:
    """What chooses ranks by the weight: see rules.py. It stands for a rank where there is a weight to decompose."""


Rank: TypeAlias = "int | float | tuple[int, ...] | RankRule"


def validate(rank: object, what: str = "") -> Rank:
    """Check the type and range of a rank, without knowing the network.

    Parameters
    ----------
    rank : int, float, sequence of int or RankRule
        One rank for all bonds, a fraction of the dense parameters in (0, 1], one rank a bond, or what chooses them.
    what : str
        The format's name, for the error.

    Returns
    -------
    int, float, tuple of int or RankRule

    Raises
    ------
    RankError
        If a rank is below 1 or no integer, or a fraction is outside (0, 1].
    """
    if isinstance(rank, RankRule):
        return rank
    if isinstance(rank, Sequence) and not isinstance(rank, (str, bytes, bytearray)):
        for bond, entry in enumerate(rank, 1):
            if isinstance(entry, bool) or not isinstance(entry, Integral):
                raise RankError(f"rank {tuple(rank)}: every {what} rank is an integer; got {entry!r} at bond {bond}")
            if entry < 1:
                raise RankError(f"rank {tuple(rank)}: every {what} rank is at least 1; got {entry} at bond {bond}")
        return tuple(int(entry) for entry in rank)
    if isinstance(rank, bool) or not isinstance(rank, Real):
        raise RankError(f"rank {rank!r}: an int, a tuple of ints, or a float fraction of the dense parameters")
    if isinstance(rank, Integral):
        if rank < 1:
            raise RankError(f"rank {rank}: every {what} rank is at least 1")
        return int(rank)
    fraction = float(rank)
    if not 0 < fraction <= 1:
        raise RankError(
            f"rank {rank}: a float is a fraction of the dense parameters, above 0 and at most 1; a rank is an int"
        )
    return fraction


def resolve(
    network: Network, rank: Rank, dense_parameters: int, what: str = "", most: Sequence[int] | None = None
) -> tuple[Network, tuple[str, ...]]:
    """Give every bond of a network its size.

    Parameters
    ----------
    network : Network
        Its present bond sizes are ignored.
    rank : int, float or tuple of int
        An int or an entry above the largest useful size is clamped. A float is a fraction: the result is the
        largest network with at most ``rank * dense_parameters`` parameters, in the sense that no single rank can be
        raised by one without exceeding that.
    dense_parameters : int
        Parameters of the layer's dense weight (no bias, no padding).
    what : str
        The format's name, for errors.
    most : sequence of int, optional
        Bounds of the ranks besides the largest useful ones, one a bond: those of a network that is to shrink.

    Returns
    -------
    Network, tuple of str
        The network, and one note for each rank that was clamped.

    Raises
    ------
    RankError
        If a tuple has the wrong length, a fraction is smaller than that of the network with all ranks 1, or the rank
        is a rule: it needs a weight.
    """
    rank = validate(rank, what)
    if isinstance(rank, RankRule):
        raise RankError(
            f"rank {rank}: a weight to choose it by, as from_dense and convert_model have; there is none here"
        )
    if isinstance(rank, float):
        return _largest_within(network, rank, dense_parameters, what, most), ()
    bonds = network.bonds
    if isinstance(rank, tuple) and len(rank) != len(bonds):
        names = ", ".join(bonds)
        raise RankError(f"rank {rank}: this {what} network has {len(bonds)} ranks ({names}); got {len(rank)}")
    wanted = rank if isinstance(rank, tuple) else (rank,) * len(bonds)
    clamped = clamp(_bounded(network, wanted, most))
    notes = tuple(
        f"rank {bond} clamped from {asked} to {got}, the largest useful"
        for bond, asked, got in zip(bonds, wanted, clamped.ranks, strict=True)
        if got < asked
    )
    return clamped, notes


def clamp(network: Network) -> Network:
    """Lower every bond to the largest size that is still useful beside the others; nothing is lost."""
    while True:
        limits = [network.rank_limit(bond) for bond in network.bonds]
        ranks = [min(pair) for pair in zip(network.ranks, limits, strict=True)]
        if tuple(ranks) == network.ranks:
            return network
        network = network.with_ranks(ranks)  # which may lower the limits of others


def _bounded(network: Network, ranks: Sequence[int], most: Sequence[int] | None) -> Network:
    return network.with_ranks(ranks if most is None else [min(pair) for pair in zip(ranks, most, strict=True)])


def _largest_within(
    network: Network, fraction: float, dense_parameters: int, what: str, most: Sequence[int] | None
) -> Network:
    budget = math.floor(fraction * dense_parameters)
    count = len(network.bonds)

    def uniform(rank: int) -> Network:
        return clamp(_bounded(network, [rank] * count, most))

    smallest = uniform(1)
    if smallest.num_parameters > budget:
        least = smallest.num_parameters / dense_parameters
        raise RankError(
            f"rank {fraction}: the smallest {what} network of this shape (all ranks 1) has "
            f"{least:.4g} of the dense layer's parameters"
        )
    low, high = 1, max(uniform(math.prod(network.shape)).ranks, default=1)
    while low < high:
        middle = (low + high + 1) // 2
        if uniform(middle).num_parameters <= budget:
            low = middle
        else:
            high = middle - 1
    best = uniform(low)
    raised = True
    while raised:
        raised = False
        names = sorted(best.bonds, key=lambda name: best.size[name])
        for group in (*((name,) for name in names), *combinations(names, 2)):
            if raised and len(group) == 2:
                break  # pairs, of ranks that limit each other, only where no single rank can be raised
            larger = best.with_ranks([best.size[name] + (name in group) for name in best.bonds])
            if larger.num_parameters <= budget and clamp(_bounded(larger, larger.ranks, most)) == larger:
                best, raised = larger, True
    return best
