"""Finding the programs that a network can be applied to rows by, with the time that each is predicted to take.

Of each order in which groups of cores meet the rows, the layout of every step is found by dynamic programming over the
layouts that a step can leave.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, lru_cache

from .contraction import BATCH
from .cost import Cost
from .machine import Machine
from .network import Network
from .orders import Order, Orders, orders
from .program import Candidate, Program, Step, Task
from .slices import slices
from .step_cost import Indices, Priced, StepCosts, Way, permutation

_LAYOUTS = 16  # layouts kept after each step


@lru_cache(maxsize=1024)
def candidates(network: Network, task: Task, machine: Machine, threads: int = 0) -> dict[str, Candidate]:
    """The fastest program of each variant, in one pass over all rows; variants that do not exist are left out.

    The rates of a CPU depend on torch's number of threads: `threads` is there to cache by.
    """
    of = orders(network, task, machine, threads)
    lowering = _Lowering(of)
    found = {variant: _fastest((lowering, order) for order in ranked) for variant, ranked in of.found.items()}
    return {variant: candidate for variant, candidate in found.items() if candidate}


@lru_cache(maxsize=1024)
def chunked(network: Network, task: Task, machine: Machine, variant: str, threads: int = 0) -> Candidate | None:
    """The fastest program of a variant that takes the rows in chunks; None where one chunk would hold them all."""
    of = orders(network, task, machine, threads)
    lowering = cache(lambda chunk: _Lowering(of, chunk))
    pairs = [(order, chunk) for order in of.found.get(variant, ()) for chunk in of.chunks(order)]
    return _fastest((lowering(chunk), order) for order, chunk in pairs)


def _fastest(pairs: Iterable[tuple[_Lowering, Order]]) -> Candidate | None:
    """The fastest program; an order is given up where it is slower than one before. None of none."""
    best: Candidate | None = None
    for lowering, order in pairs:
        made = lowering.lowered(order, best.seconds if best else math.inf)
        best = made if made and (best is None or made.seconds < best.seconds) else best
    return best


class _Lowering:
    """Programs for `chunk` rows at a time (0: all)."""

    def __init__(self, of: Orders, chunk: int = 0) -> None:
        self.of, self.network, self.task = of, of.network, of.task
        self.chunk, self.rows = chunk, chunk or of.task.rows
        self.cost = StepCosts(of, chunk)

    # -- the search ---------------------------------------------------------------------------------------------------

    def lowered(self, order: Order, most: float = math.inf) -> Candidate | None:
        """The program of an order with the best layouts, and its time; None where that is above `most` seconds."""
        done: frozenset[int] = frozenset()
        most = (most - self.cost.ends()) * self.rows / self.task.rows  # for the rows of a chunk
        # The layouts that the rows can have, with the seconds and the steps that lead there.
        layouts: dict[Indices, tuple[float, tuple[Priced, ...]]] = {self.of.entering: (0.0, ())}
        for group in map(frozenset, order):
            last = done | group == self.of.everything
            products = self.cost.products(first=not done, last=last)
            grown: dict[Indices, tuple[float, tuple[Priced, ...]]] = {}
            for layout, (seconds, steps) in layouts.items():
                for way in self._ways(layout, done, group):
                    priced = self.cost.priced(layout, way, products)
                    total = seconds + priced.work.seconds + priced.fixed * self.rows / self.task.rows
                    if last and priced.leaves != self.of.leaving:
                        total += self.cost.copy(self.cost.bytes(priced.leaves))
                    if total > most:
                        continue
                    if priced.leaves not in grown or total < grown[priced.leaves][0]:
                        grown[priced.leaves] = (total, (*steps, priced))
            layouts = dict(sorted(grown.items(), key=lambda item: item[1][0])[:_LAYOUTS])
            if not layouts:
                return None
            done |= group
        layout, (_, steps) = min(layouts.items(), key=lambda item: item[1][0])
        return self._candidate(layout, steps)

    def _ways(self, layout: Indices, done: frozenset[int], group: frozenset[int]) -> Iterator[Way]:
        """The ways to take a step from a layout."""
        after, core = self.of.channels(done | group), self.of.indices(group)
        shared = tuple(index for index in layout if index in core and index in after)
        summed = tuple(index for index in layout if index in core and index not in after)
        alone = tuple(index for index in layout if index not in core)
        new = [index for index in core if index not in layout]
        outs = [index for index in self.of.leaving if index in new]
        first = min((layout.index(index) for index in summed), default=len(layout))
        before = tuple(index for index in alone if layout.index(index) < first)
        for brought in _arrangements(new, outs):
            for sums in _arrangements(summed, [index for index in core if index in summed]):
                yield Way(group, False, shared, (), alone, sums, brought)
                for repeats in dict.fromkeys(((), before, alone)):
                    rest = tuple(index for index in alone if index not in repeats)
                    yield Way(group, True, shared, repeats, rest, sums, brought)

    def _candidate(self, layout: Indices, steps: Sequence[Priced]) -> Candidate:
        of, task, rows = self.of, self.task, self.rows
        order = permutation(layout, of.leaving)
        made = tuple(self._step(p) for p in steps)
        volume, left = self.cost.volume, sum(p.left for p in steps[:-1])
        held = left + sum(self.cost.repeats(p.way, self.cost.sizes(p.way)) for p in steps)
        held += sum(volume(p.layout) for p in steps if p.work.copied) + (volume(layout) if order else 0)
        if not task.forward:
            held += left + sum(volume(p.layout) for p in steps if p.layout != p.way.wanted)
        cores = [self.cost.core_of(p.way) for p in steps]
        copies = sum(volume(core.indices) for core in cores if core.copied)
        features = self.network.features("out")
        program = Program(made, self._open(layout), order, features, held // rows, copies, rows == 1)
        parts = task.rows / rows
        largest = max((p.left for p in steps[:-1]), default=0)
        moved = sum(p.work.moved for p in steps) + (2 * self.cost.bytes(layout) if order else 0)
        chained = Cost(int(sum(p.work.flops for p in steps) * parts), int(moved * parts) // task.itemsize)
        merged = (step.group.cost(gradients=task.cores) for step in made)
        fixed = sum(merged, Cost(0, sum(p.read for p in steps) // task.itemsize))
        seconds = sum(parts * p.work.seconds for p in steps) + sum(p.fixed for p in steps)
        seconds += parts * (self.cost.copy(self.cost.bytes(layout)) if order else 0.0)
        # Of a sum over slices, each but the first reads the rows again, and reads and writes the result.
        seconds += self.cost.ends() * max(1, 2 * len(slices(self.network, program)) - 1)
        launches = int(sum(p.work.launches for p in steps) * math.ceil(parts))
        return Candidate(program, self.chunk, chained + fixed, fixed, seconds, launches, largest)

    # -- the step itself ----------------------------------------------------------------------------------------------

    def _step(self, priced: Priced) -> Step:
        layout, way = priced.layout, priced.way
        sizes, core = self.cost.sizes(way), self.cost.core_of(way)
        batch = () if self.cost.is_plain(way, sizes) else (way.batch,)
        return Step(
            group=self.of.group(way.group, core.indices),
            left=way.left,
            sizes=self._open(layout),
            order=permutation(layout, way.wanted),
            shape=self._shape(*batch, *way.rows),
            result=self._shape(*batch, *way.result),
            core_order=core.order,
            core_shape=core.shape,
            core_transposed=core.transposed,
            shared=sizes.shared,
            repeated=self.cost.is_repeated(way, sizes),
            summed_apart=priced.work.summed_apart,
        )

    def _open(self, layout: Indices) -> tuple[int, ...]:
        return tuple(-1 if index == BATCH else self.cost.size[index] for index in layout)

    def _shape(self, *parts: Indices) -> tuple[int, ...]:
        return tuple(-1 if BATCH in part else self.cost.volume(part) for part in parts)


def _arrangements(indices: Sequence[str], wanted: Sequence[str]) -> Iterator[Indices]:
    """The orders of a few indices; of many, as they are and as they are wanted at last."""
    if len(indices) <= 3:
        yield from itertools.permutations(indices)
        return
    others = [index for index in indices if index not in wanted]
    yield from dict.fromkeys((tuple(indices), (*wanted, *others), (*others, *wanted)))
