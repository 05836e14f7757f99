"""Finding the programs that a network can be applied to rows by, with the time that each is predicted to take.

Of each order in which groups of cores meet the rows, the layout of every step is found by dynamic programming over the
layouts that a step can leave.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from typing import NamedTuple

from . import contraction
from .contraction import BATCH
from .cost import Cost, volume
from .machine import Machine
from .network import Network
from .orders import Order, Orders, orders
from .program import Candidate, Group, Program, Step, Task

_LAYOUTS = 16  # layouts kept after each step

Indices = tuple[str, ...]


@lru_cache(maxsize=1024)
def candidates(network: Network, task: Task, machine: Machine, threads: int = 0) -> dict[str, Candidate]:
    """The fastest program of each variant, in one pass over all rows; variants that do not exist are left out.

    The rates of a CPU depend on torch's number of threads: `threads` is there to cache by.
    """
    of = orders(network, task, machine, threads)
    return {
        variant: min((_Lowering(of).lowered(order) for order in found), key=lambda candidate: candidate.seconds)
        for variant, found in of.found.items()
    }


@lru_cache(maxsize=1024)
def chunked(network: Network, task: Task, machine: Machine, variant: str, threads: int = 0) -> Candidate | None:
    """The fastest program of a variant that takes the rows in chunks; None where one chunk would hold them all."""
    of = orders(network, task, machine, threads)
    pairs = [(order, chunk) for order in of.found.get(variant, ()) for chunk in of.chunks(order)]
    made = (_Lowering(of, chunk).lowered(order) for order, chunk in pairs)
    return min(made, key=lambda candidate: candidate.seconds, default=None)


class _Way(NamedTuple):
    """A way to see the rows and the core of a group as stacks of matrices, whose products are a step.

    The batch is what both carry and keep, `shared`, then indices of the rows alone that the core is repeated over,
    `repeats`. In the matrices are the other indices of the rows alone, `rest`, those that are `summed`, and those of
    the core alone, that it has `brought`. The core stands on the left, or on the right.
    """

    group: frozenset[int]
    left: bool
    shared: Indices
    repeats: Indices
    rest: Indices
    summed: Indices
    brought: Indices

    @property
    def batch(self) -> Indices:
        return *self.shared, *self.repeats

    @property
    def rows(self) -> tuple[Indices, Indices]:
        """The rows and columns of the matrices of the rows."""
        return (self.summed, self.rest) if self.left else (self.rest, self.summed)

    @property
    def wanted(self) -> Indices:
        """The layout of the rows in which they are these matrices."""
        return *self.batch, *self.rows[0], *self.rows[1]

    @property
    def core(self) -> tuple[Indices, Indices]:
        """Those of the matrices of the core."""
        return (self.brought, self.summed) if self.left else (self.summed, self.brought)

    @property
    def result(self) -> tuple[Indices, Indices]:
        """Those of the matrices of the result."""
        return (self.brought, self.rest) if self.left else (self.rest, self.brought)


class _Core(NamedTuple):
    """How the core of a group becomes matrices."""

    indices: Indices  # as it is stored, or as cores are merged
    order: tuple[int, ...]
    shape: tuple[int, ...]
    transposed: bool
    copied: bool


class _Sizes(NamedTuple):
    """The values that the indices of each part of a way have, and the bytes that it takes and leaves."""

    shared: int
    repeats: int
    rest: int
    summed: int
    brought: int
    taken: int
    left: int


class _Products(NamedTuple):
    """Which products of a step are computed: its result, the gradient of its rows, the gradient of its core."""

    ahead: bool
    back: bool
    core: bool


class _Work(NamedTuple):
    """What the products of a step take, for the rows of one chunk."""

    compute: float  # seconds of arithmetic, and of copies into another order
    moved: int  # bytes between steps
    flops: int
    launches: float
    summed_apart: bool = True  # as of a `Step`


class _Priced(NamedTuple):
    """A step from a layout, with what it costs."""

    layout: Indices
    leaves: Indices  # the layout of the result
    way: _Way
    work: _Work
    fixed: float  # seconds that do not depend on the rows
    left: int  # elements of what it leaves
    largest: int  # elements of the larger of what it takes and leaves


class _Lowering:
    """Programs for `chunk` rows at a time (0: all)."""

    def __init__(self, of: Orders, chunk: int = 0) -> None:
        self.of, self.network, self.task, self.machine = of, of.network, of.task, of.machine
        self.chunk, self.rows = chunk, chunk or of.task.rows
        self.size = {**of.size, BATCH: self.rows}
        self.core = cache(self._core)
        self.viewable = cache(self._viewable)

    # -- the search ---------------------------------------------------------------------------------------------------

    def lowered(self, order: Order) -> Candidate:
        """The program of an order with the best layouts, and its time."""
        done: frozenset[int] = frozenset()
        # The layouts that the rows can have, with the seconds and the steps that lead there.
        layouts: dict[Indices, tuple[float, tuple[_Priced, ...]]] = {self.of.entering: (0.0, ())}
        for group in map(frozenset, order):
            last = done | group == self.of.everything
            products = self._products(first=not done, last=last)
            grown: dict[Indices, tuple[float, tuple[_Priced, ...]]] = {}
            for layout, (seconds, steps) in layouts.items():
                for way in self._ways(layout, done, group):
                    priced = self._priced(layout, way, products)
                    total = seconds + self._seconds(priced) + priced.fixed * self.rows / self.task.rows
                    if last and priced.leaves != self.of.leaving:
                        total += self._copy(self._bytes(priced.leaves))
                    if priced.leaves not in grown or total < grown[priced.leaves][0]:
                        grown[priced.leaves] = (total, (*steps, priced))
            layouts = dict(sorted(grown.items(), key=lambda item: item[1][0])[:_LAYOUTS])
            done |= group
        layout, (_, steps) = min(layouts.items(), key=lambda item: item[1][0])
        return self._candidate(layout, steps)

    def _ways(self, layout: Indices, done: frozenset[int], group: frozenset[int]) -> Iterator[_Way]:
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
                yield _Way(group, False, shared, (), alone, sums, brought)
                for repeats in dict.fromkeys(((), before, alone)):
                    rest = tuple(index for index in alone if index not in repeats)
                    yield _Way(group, True, shared, repeats, rest, sums, brought)

    def _candidate(self, layout: Indices, steps: Sequence[_Priced]) -> Candidate:
        of, task, rows = self.of, self.task, self.rows
        order = _permutation(layout, of.leaving)
        made = tuple(self._step(p) for p in steps)
        held = sum(p.left for p in steps[:-1]) + sum(self._repeats(p.way) for p in steps)
        copies = sum(volume(core.indices, self.size) for core in (self._core_of(p.way) for p in steps) if core.copied)
        features = self.network.features("out")
        program = Program(made, self._open(layout), order, features, held // rows, copies, rows == 1)
        parts = task.rows / rows
        largest = max((p.largest for p in steps[:-1]), default=0)
        moved = sum(p.work.moved for p in steps) + (2 * self._bytes(layout) if order else 0)
        chained = Cost(int(sum(p.work.flops for p in steps) * parts), int(moved * parts) // task.itemsize)
        merged = sum((self._merged(step.group) for step in made), Cost())
        seconds = sum(parts * self._seconds(p) for p in steps) + sum(p.fixed for p in steps)
        seconds += parts * (self._copy(self._bytes(layout)) if order else 0.0)
        # What comes in and goes out passes through memory once, in chunks or not.
        ends = volume(of.entering, of.size) + volume(of.leaving, of.size)
        seconds += ends * task.itemsize * (1 if task.forward else 2) / self._bandwidth(ends)
        launches = int(sum(p.work.launches for p in steps) * math.ceil(parts))
        return Candidate(program, self.chunk, chained + merged, merged, seconds, launches, largest)

    def _merged(self, group: Group) -> Cost:
        """What it takes to multiply the cores of a group, and to take the gradients apart."""
        plans = () if group.merge is None else (group.merge, *(group.adjoints if self.task.cores else ()))
        return sum((plan.cost for plan in plans), Cost())

    # -- the cost of a step -------------------------------------------------------------------------------------------

    def _products(self, *, first: bool, last: bool) -> _Products:
        """The products of a step that the task asks for."""
        if self.task.forward:
            return _Products(ahead=True, back=False, core=False)
        return _Products(self.task.cores and not last, self.task.x or not first, self.task.cores)

    def _priced(self, layout: Indices, way: _Way, products: _Products) -> _Priced:
        sizes, core, itemsize = self._sizes(way), self._core_of(way), self.task.itemsize
        work = self._work(layout, way, sizes, core, products)
        fixed = self._copy(volume(core.indices, self.size) * itemsize) if core.copied else 0.0
        fixed += self.of.merging(way.group, core.indices)
        leaves = (*way.batch, *way.result[0], *way.result[1])
        return _Priced(
            layout, leaves, way, work, fixed, sizes.left // itemsize, max(sizes.taken, sizes.left) // itemsize
        )

    def _work(self, layout: Indices, way: _Way, sizes: _Sizes, core: _Core, products: _Products) -> _Work:
        h, a, r, s, n, taken, left = sizes
        permuted, repeated = layout != way.wanted, self._is_repeated(way, sizes)
        copied = permuted and not self.viewable(layout, (way.batch, *way.rows))
        views = permuted + bool(core.order) + repeated + (core.shape != tuple(self.size[i] for i in core.indices))
        views += len(layout) != (2 if self._is_plain(way, sizes) else 3)
        launches = 1 + copied + views / 4  # a view takes about a quarter of the time of a product
        compute, moved, apart = 0.0, 0, True
        if products.back:
            compute += self._product(way, h * a, r, n, s) + (self._copy(taken) if permuted else 0.0)
            moved += taken + left
        if products.ahead or products.core:
            compute += self._copy(taken) if copied else 0.0
            compute += self._copy(self._repeats(way) * self.task.itemsize)
        if products.ahead:
            compute += self._product(way, h * a, r, s, n)
            moved += taken + left
        if products.core:
            seconds, apart = self._core_gradient(way, sizes) if repeated else (self._product(way, h * a, s, r, n), True)
            compute += seconds
            moved += taken + left + 2 * h * s * n * self.task.itemsize
            launches += 2 * repeated
        launches *= 1 if self.task.forward else 1 + products.core + products.ahead
        return _Work(compute, moved, sum(products) * 2 * h * a * r * s * n, launches, apart)

    def _core_gradient(self, way: _Way, sizes: _Sizes) -> tuple[float, bool]:
        """Seconds for the gradient of a repeated core, and whether that is by one product for each repetition."""
        h, a, r, s, n, taken, left = sizes
        apart = self._product(way, h * a, s, r, n)
        apart += 2 * h * a * s * n * self.task.itemsize / self._bandwidth(h * a * s * n)
        joined = self._product(way, h, s, r * a, n)
        joined += self._copy(taken) + self._copy(left)
        return min(apart, joined), apart <= joined

    def _product(self, way: _Way, batch: int, m: int, k: int, n: int) -> float:
        """Seconds of (m, k) by (k, n) products where the core stands on the right; on the left all is transposed."""
        return self.machine.product(batch, *((n, k, m) if way.left else (m, k, n)), self.task.dtype)

    def _seconds(self, priced: _Priced) -> float:
        work = priced.work
        return work.compute + work.moved / self._bandwidth(priced.largest) + work.launches * self.machine.launch

    def _bandwidth(self, elements: int) -> float:
        """Bytes/s at which an intermediate of this size is written and read again."""
        fits = elements * self.task.itemsize <= self.machine.cache
        return self.machine.cached if fits else self.machine.memory

    def _copy(self, size: int) -> float:
        """Seconds that a copy of this many bytes into another order takes."""
        return 2 * size / self.machine.permuted

    def _bytes(self, layout: Indices) -> int:
        return volume(layout, self.size) * self.task.itemsize

    def _sizes(self, way: _Way) -> _Sizes:
        parts = (way.shared, way.repeats, way.rest, way.summed, way.brought)
        h, a, r, s, n = (volume(part, self.size) for part in parts)
        return _Sizes(h, a, r, s, n, h * a * r * s * self.task.itemsize, h * a * r * n * self.task.itemsize)

    @staticmethod
    def _is_plain(way: _Way, sizes: _Sizes) -> bool:
        """Whether the matrices have no batch."""
        return sizes.shared * sizes.repeats == 1 and BATCH not in way.batch

    @staticmethod
    def _is_repeated(way: _Way, sizes: _Sizes) -> bool:
        return sizes.repeats > 1 or BATCH in way.repeats

    def _repeats(self, way: _Way) -> int:
        """Elements of the copies of a core that is a stack of matrices, for each matrix of the rows; a view if one."""
        sizes = self._sizes(way)
        if sizes.shared == 1 or not self._is_repeated(way, sizes):
            return 0
        return sizes.shared * sizes.repeats * sizes.summed * sizes.brought

    # -- the step itself ----------------------------------------------------------------------------------------------

    def _step(self, priced: _Priced) -> Step:
        layout, way = priced.layout, priced.way
        sizes, core = self._sizes(way), self._core_of(way)
        batch = () if self._is_plain(way, sizes) else (way.batch,)
        return Step(
            group=self._group(way.group, core.indices),
            left=way.left,
            sizes=self._open(layout),
            order=_permutation(layout, way.wanted),
            shape=self._shape(*batch, *way.rows),
            result=self._shape(*batch, *way.result),
            core_order=core.order,
            core_shape=core.shape,
            core_transposed=core.transposed,
            shared=sizes.shared,
            repeated=self._is_repeated(way, sizes),
            summed_apart=priced.work.summed_apart,
        )

    def _open(self, layout: Indices) -> tuple[int, ...]:
        return tuple(-1 if index == BATCH else self.size[index] for index in layout)

    def _shape(self, *parts: Indices) -> tuple[int, ...]:
        return tuple(-1 if BATCH in part else volume(part, self.size) for part in parts)

    def _group(self, group: frozenset[int], indices: Indices) -> Group:
        members, sizes = tuple(sorted(group)), tuple(self.size[index] for index in indices)
        if len(members) == 1:
            return Group(members, sizes)
        adjoints = []
        for k in members:
            others = tuple(self.network.cores[other] for other in members if other != k)
            adjoints.append(contraction.plan((indices, *others), self.network.cores[k], self.network.sizes))
        return Group(members, sizes, self.of.merge(group, indices), tuple(adjoints))

    def _core_of(self, way: _Way) -> _Core:
        return self.core(way.group, way.left, way.shared, way.summed, way.brought)

    def _core(self, group: frozenset[int], left: bool, shared: Indices, summed: Indices, brought: Indices) -> _Core:
        """The core of a group as matrices: as it is stored, straight or transposed; else as a view; else by a copy."""
        way = _Way(group, left, shared, (), (), summed, brought)
        straight, turned = way.core, way.core[::-1]
        wanted, transposed = (*shared, *straight[0], *straight[1]), (*shared, *turned[0], *turned[1])
        # Merged cores come in the order that F.linear takes.
        indices = (wanted if left else transposed) if len(group) > 1 else self.of.indices(group)
        ways = ((wanted, straight, False), (transposed, turned, True))
        as_stored = [one for one in ways if one[0] == indices]
        views = [one for one in ways if self.viewable(indices, (shared, *one[1]))]
        order, (m, n), is_transposed = (*as_stored, *views, ways[0])[0]
        h, *ends = (volume(part, self.size) for part in (shared, m, n))
        shape = tuple(ends) if h == 1 else (h, *ends)
        return _Core(indices, _permutation(indices, order), shape, is_transposed, not (as_stored or views))

    def _viewable(self, layout: Indices, groups: tuple[Indices, ...]) -> bool:
        """Whether a contiguous tensor can be seen as a stack of matrices that BLAS takes, without a copy.

        Any number of rows above 1 gives the same answer, so that chunks share it.
        """
        size = self.size
        strides, stride = {}, 1
        for index in reversed(layout):
            strides[index] = stride
            stride *= size[index]
        last = []
        for group in groups:
            real = [index for index in group if size[index] > 1]
            for a, b in itertools.pairwise(real):
                if strides[a] != strides[b] * size[b]:
                    return False
            last.append(strides[real[-1]] if real else 1)
        return 1 in last[1:]


def _permutation(layout: Indices, wanted: Indices) -> tuple[int, ...]:
    """The order of the axes that brings indices from a layout into another; empty where they are the same."""
    return () if layout == wanted else tuple(layout.index(index) for index in wanted)


def _arrangements(indices: Sequence[str], wanted: Sequence[str]) -> Iterator[Indices]:
    """The orders of a few indices; of many, as they are and as they are wanted at last."""
    if len(indices) <= 3:
        yield from itertools.permutations(indices)
        return
    others = [index for index in indices if index not in wanted]
    yield from dict.fromkeys((tuple(indices), (*wanted, *others), (*others, *wanted)))
