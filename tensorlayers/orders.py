"""Which groups of cores meet the rows, and when: by dynamic programming over the sets of cores that have met them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache, lru_cache

from . import contraction
from .contraction import BATCH
from .cost import pair_cost, volume
from .group import Group
from .machine import Machine
from .network import Network
from .program import Task

Order = tuple[tuple[int, ...], ...]
"""The groups of cores, in the order in which they meet the rows."""

_Ranked = list[tuple[float, Order]]

_KEPT = 3  # orders, of each variant, whose layouts are compared
_GROUPED = 6  # cores up to which any set of them may be a group; above, only pairs
_EXACT = 9  # cores up to which all sets of cores that can have met the rows are followed; above, of each size a few
_BEAM = 16


@lru_cache(maxsize=1024)
def orders(network: Network, task: Task, machine: Machine, threads: int = 0) -> Orders:
    """The `Orders` of a task, found once. The rates of a CPU depend on `threads`: it is there to cache by."""
    return Orders(network, task, machine)


class Orders:
    """The orders of a network's cores, and the indices that the rows and the groups of cores have.

    Parameters
    ----------
    network : Network
    task : Task
    machine : Machine
    """

    def __init__(self, network: Network, task: Task, machine: Machine) -> None:
        self.network, self.task, self.machine = network, task, machine
        self.size: dict[str, int] = {**network.size, BATCH: task.rows}
        self.everything = frozenset(range(len(network.cores)))
        self.entering = (BATCH, *network.names("in"))
        self.leaving = (BATCH, *network.names("out"))
        self.channels = cache(self._channels)
        self.indices = cache(self._indices)
        self.merging = cache(self._merging)
        self.found = self._search()
        """For each variant that exists, the orders with the least estimate, best first. It says how cores are grouped:
        "contraction", each by itself; "merged", some multiplied first; "rebuild", all of them, to the dense weight."""

    def _channels(self, done: frozenset[int]) -> frozenset[str]:
        """The indices of the rows once these cores have met them."""
        needed = {*self.leaving, *(index for k in self.everything - done for index in self.network.cores[k])}
        met = {index for k in done for index in self.network.cores[k]}
        return frozenset((met | set(self.entering)) & needed)

    def _indices(self, group: frozenset[int]) -> tuple[str, ...]:
        """The indices of the product of these cores."""
        if len(group) == 1:
            return self.network.cores[min(group)]
        others = {index for k in self.everything - group for index in self.network.cores[k]}
        kept = others | {mode.name for mode in self.network.modes}
        return tuple(dict.fromkeys(index for k in sorted(group) for index in self.network.cores[k] if index in kept))

    def merge(self, group: frozenset[int], result: tuple[str, ...]) -> contraction.Plan:
        """How these cores are multiplied with each other."""
        return contraction.plan(tuple(self.network.cores[k] for k in sorted(group)), result, self.network.sizes)

    def group(self, members: frozenset[int], indices: tuple[str, ...]) -> Group:
        """These cores, with the axes of their product in this order."""
        sizes = tuple(self.size[index] for index in indices)
        return Group(tuple(sorted(members)), sizes, None if len(members) == 1 else self.merge(members, indices))

    def _merging(self, group: frozenset[int], result: tuple[str, ...]) -> float:
        """Seconds to multiply cores with each other, and for their gradients; 0 for a single one."""
        if len(group) == 1:
            return 0.0
        plan = self.merge(group, result)
        costs = plan.step_costs()
        seconds = 0.0
        for step, cost in zip(plan.steps, costs, strict=True):
            once = cost.flops / self.machine.rate(self.task.dtype)
            moved = cost.bytes(self.task.itemsize)
            once += moved / self.machine.bandwidth(moved)
            once += (1 if step.is_product else 3) * self.machine.launch
            if step.natural != step.result:  # the result is copied, and its gradient
                size = volume(step.result, self.size) * self.task.itemsize
                seconds += (1 + int(self.task.cores)) * (self.machine.copy(size) + self.machine.launch)
            # For the gradients of both operands, and all but the last are computed again.
            passes = 1 + (2 + int(step is not plan.steps[-1]) if self.task.cores else 0)
            seconds += passes * once
        return seconds

    def chunks(self, order: Order) -> list[int]:
        """The powers of two from 16, below the rows, at which an intermediate of this order begins to fit the cache.

        Between these a larger chunk is never slower. Where all fit, or none does, the largest or the smallest one.
        """
        found, done, rows = set(), frozenset[int](), self.task.rows
        most = 1 << (rows - 1).bit_length() - 1 if rows > 1 else 0  # the largest below the rows
        for group in ((), *order):
            done |= frozenset(group)
            bytes_a_row = volume(self.channels(done), {**self.size, BATCH: 1}) * self.task.itemsize
            fits = max(16, self.machine.cache // bytes_a_row)
            found.add(min(most, 1 << fits.bit_length() - 1))
        return sorted(chunk for chunk in found if chunk >= 16)

    # -- the search ---------------------------------------------------------------------------------------------------

    def _search(self) -> dict[str, list[Order]]:
        cores = len(self.network.cores)
        # (merged some, all in one) is the variant; of each state the few best orders are kept.
        kept: dict[frozenset[int], _Ranked] = {frozenset(): [(0.0, ())]}
        for count in range(cores):
            for done in self._followed([state for state in kept if len(state) == count], kept):
                ranked = _best(kept.pop(done))
                for group in self._groups(done):
                    step = self._estimate(done, group)
                    grown = kept.setdefault(done | group, [])
                    grown += [(seconds + step, (*order, tuple(sorted(group)))) for seconds, order in ranked]
        found: dict[str, list[Order]] = {}
        for _, order in _best(kept[self.everything]):
            found.setdefault("contraction" if _is_plain(order) else "merged", []).append(order)
        if cores > 1:
            found["rebuild"] = [(tuple(sorted(self.everything)),)]
        return found

    def _followed(self, states: list[frozenset[int]], kept: dict[frozenset[int], _Ranked]) -> list[frozenset[int]]:
        """The sets of as many cores that the search goes on from: all, or of many cores the best few."""
        if len(self.everything) <= _EXACT:
            return states
        best: list[frozenset[int]] = []
        for is_plain in (True, False):
            ranked = [(s, order, state) for state in states for s, order in kept[state] if _is_plain(order) == is_plain]
            best += list(dict.fromkeys(state for *_, state in sorted(ranked)))[:_BEAM]
        return list(dict.fromkeys(best))

    def _groups(self, done: frozenset[int]) -> Iterator[frozenset[int]]:
        """The sets of cores that can meet the rows next; all at once is left to the rebuild."""
        cores, remaining = len(self.everything), sorted(self.everything - done)
        largest = cores if cores <= _GROUPED else 2
        for size in range(1, min(largest, len(remaining)) + 1):
            if size < cores or cores == 1:
                yield from map(frozenset, itertools.combinations(remaining, size))

    def _estimate(self, done: frozenset[int], group: frozenset[int]) -> float:
        """Seconds of a step, before its layout is known."""
        before, after, core = self.channels(done), self.channels(done | group), set(self.indices(group))
        cost = pair_cost(before, core, after, self.size)
        passes = self._passes(first=not done, last=done | group == self.everything)
        # A batch takes a few views more, and what the core does not carry a few less.
        batched = (before & core & after != set()) + (len(before - core) > 1) / 2
        seconds = passes * (cost.flops / self.machine.rate(self.task.dtype) + (1 + batched) * self.machine.launch)
        seconds += passes * (cost.elements * self.task.itemsize) / self.machine.cached
        return seconds + self.merging(group, self.indices(group))

    def _passes(self, first: bool, last: bool) -> int:
        """Products of this size that a step takes: forward, the gradients of the rows and of the core."""
        if self.task.forward:
            return 1
        backward = int(self.task.x or not first)
        return backward + (1 + int(not last) if self.task.cores else 0)


def _is_plain(order: Order) -> bool:
    """Whether no cores are merged."""
    return all(len(group) == 1 for group in order)


def _best(orders: _Ranked) -> _Ranked:
    """The few best orders without merged cores, and the few best of the others."""
    plain = sorted(item for item in orders if _is_plain(item[1]))
    merged = sorted(item for item in orders if not _is_plain(item[1]))
    return plain[:_KEPT] + merged[:_KEPT]
