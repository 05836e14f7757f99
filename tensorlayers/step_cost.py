"""What a step of a program costs: the ways to see rows and a core as stacks of matrices, and the seconds of each."""

from __future__ import annotations

import itertools
from functools import cache
from typing import NamedTuple

from .contraction import BATCH
from .cost import volume
from .orders import Orders

Indices = tuple[str, ...]

WALKED = 8
"""Launches that it takes as long as to walk one step for gradients, beside its products: forward runs generated code,
`matmul.gradients` decides for each step anew. A GPU computes meanwhile."""

CHUNKED = 1.05
"""How much longer products take of some rows at a time than of all: BLAS packs the core anew for each."""

TURNED = 1.4
"""How much longer a product of a core with a matrix of rows takes where the rows are read transposed."""


class Way(NamedTuple):
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


class Core(NamedTuple):
    """How the core of a group becomes matrices."""

    indices: Indices  # as it is stored, or as cores are merged
    order: tuple[int, ...]
    shape: tuple[int, ...]
    transposed: bool
    copied: bool


class Sizes(NamedTuple):
    """The values that the indices of each part of a way have, and the bytes that it takes and leaves."""

    shared: int
    repeats: int
    rest: int
    summed: int
    brought: int
    taken: int
    left: int


class Products(NamedTuple):
    """Which products of a step are computed: its result, the gradient of its rows, the gradient of its core.

    And whether the step is the first, or the last: the rows that come in there, or go out, are `StepCosts.ends`.
    """

    ahead: bool
    back: bool
    core: bool
    first: bool
    last: bool


class Work(NamedTuple):
    """What the products of a step take, for the rows of one chunk."""

    seconds: float
    moved: int  # bytes, those of `StepCosts.ends` among them
    flops: int
    launches: float
    copied: bool  # whether the rows are copied to become matrices
    summed_apart: bool  # as of a `Step`


class Priced(NamedTuple):
    """A step from a layout, with what it costs."""

    layout: Indices
    leaves: Indices  # the layout of the result
    way: Way
    work: Work
    fixed: float  # seconds that do not depend on the rows
    read: int  # bytes of the core
    left: int  # elements of what it leaves


class StepCosts:
    """The costs of the steps of a task, for `chunk` rows at a time (0: all)."""

    def __init__(self, of: Orders, chunk: int = 0) -> None:
        self.of, self.task, self.machine = of, of.task, of.machine
        self.rows = chunk or of.task.rows
        self.slowed = CHUNKED if chunk else 1.0
        self.size = {**of.size, BATCH: self.rows}
        self.core = cache(self._core)
        self.viewable = cache(self._viewable)
        self.volume = cache(lambda indices: volume(indices, self.size))
        weights = sum(map(self.volume, of.network.cores)) * self.task.itemsize
        # Between two calls other layers' weights pass through the cache.
        self.reading = self.machine.cached if weights <= self.machine.cache / 4 else self.machine.memory
        """Bytes/s at which cores are read."""

    def products(self, *, first: bool, last: bool) -> Products:
        """The products of a step that the task asks for."""
        if self.task.forward:
            return Products(True, False, False, first, last)
        return Products(self.task.cores and not last, self.task.x or not first, self.task.cores, first, last)

    def priced(self, layout: Indices, way: Way, products: Products) -> Priced:
        sizes, core, itemsize = self.sizes(way), self.core_of(way), self.task.itemsize
        work = self._work(layout, way, sizes, core, products)
        weight = self.volume(core.indices) * itemsize
        read = weight * (products.ahead + products.back)
        fixed = read / self.reading + (self.copy(weight) if core.copied else 0.0)
        fixed += self.of.merging(way.group, core.indices)
        leaves = (*way.batch, *way.result[0], *way.result[1])
        return Priced(layout, leaves, way, work, fixed, read, sizes.left // itemsize)

    def _work(self, layout: Indices, way: Way, sizes: Sizes, core: Core, products: Products) -> Work:
        h, a, r, s, n, taken, left = sizes
        itemsize, forward = self.task.itemsize, self.task.forward
        permuted, repeated = layout != way.wanted, self.is_repeated(way, sizes)
        copied = permuted and not self.viewable(layout, (way.batch, *way.rows))
        views = permuted + bool(core.order) + repeated + (core.shape != tuple(self.size[i] for i in core.indices))
        views += len(layout) != (2 if self.is_plain(way, sizes) else 3)
        launches = 1 + copied + views / 4  # a view takes about a quarter of the time of a product
        seconds, apart = 0.0, True
        if products.back:
            seconds += self._product(way, h * a, r, n, s) + (self.copy(taken) if permuted else 0.0)
        if products.ahead or products.core:
            seconds += self.copy(taken) if copied else 0.0
            seconds += self.copy(self.repeats(way, sizes) * itemsize)
        if products.ahead:
            # A core on the left of rows that are read transposed is their product with it on the right, and worse.
            turned = way.left and permuted and not copied and self.is_plain(way, sizes)
            ahead = TURNED * self.machine.product(1, r, s, n, self.task.dtype) if turned else 0.0
            seconds += max(ahead, self._product(way, h * a, r, s, n))
        if products.core:
            product, apart = self._core_gradient(way, sizes) if repeated else (self._product(way, h * a, s, r, n), True)
            seconds += product
            launches += 2 * repeated
        if not forward:
            launches = launches * (1 + products.core + products.ahead) + WALKED * bool(self.machine.threads)
        uses = products.ahead + products.back + products.core
        read, weight = uses - products.core, h * s * n * itemsize
        # Each time that something is used it is read or written; what comes in and goes out is in `ends` once.
        of_taken, of_left = uses, uses
        if products.first:
            of_taken -= 1 if forward else self.task.x + products.core
        if products.last and (*way.batch, *way.result[0], *way.result[1]) == self.of.leaving:
            of_left -= 1
        seconds += of_taken * taken / self.machine.bandwidth(taken) + of_left * left / self.machine.bandwidth(left)
        seconds += (read + 2 * products.core) * weight / self.machine.cached  # for each chunk
        seconds += launches * self.machine.launch
        moved = uses * (taken + left) + 2 * products.core * weight
        return Work(seconds, moved, 2 * uses * h * a * r * s * n, launches, copied, apart)

    def _core_gradient(self, way: Way, sizes: Sizes) -> tuple[float, bool]:
        """Seconds for the gradient of a repeated core, and whether that is by one product for each repetition."""
        h, a, r, s, n, taken, left = sizes
        apart = self._product(way, h * a, s, r, n)
        each = h * a * s * n * self.task.itemsize
        apart += 2 * each / self.machine.bandwidth(each)
        joined = self._product(way, h, s, r * a, n)
        joined += self.copy(taken) + self.copy(left)
        return min(apart, joined), apart <= joined

    def _product(self, way: Way, batch: int, m: int, k: int, n: int) -> float:
        """Seconds of (m, k) by (k, n) products where the core stands on the right; on the left all is transposed."""
        return self.slowed * self.machine.product(batch, *((n, k, m) if way.left else (m, k, n)), self.task.dtype)

    def copy(self, size: int) -> float:
        """Seconds that a copy of this many bytes into another order takes."""
        return self.machine.copy(size)

    def bytes(self, layout: Indices) -> int:
        return volume(layout, self.size) * self.task.itemsize

    def sizes(self, way: Way) -> Sizes:
        parts = (way.shared, way.repeats, way.rest, way.summed, way.brought)
        h, a, r, s, n = map(self.volume, parts)
        return Sizes(h, a, r, s, n, h * a * r * s * self.task.itemsize, h * a * r * n * self.task.itemsize)

    @staticmethod
    def is_plain(way: Way, sizes: Sizes) -> bool:
        """Whether the matrices have no batch."""
        return sizes.shared * sizes.repeats == 1 and BATCH not in way.batch

    @staticmethod
    def is_repeated(way: Way, sizes: Sizes) -> bool:
        return sizes.repeats > 1 or BATCH in way.repeats

    def repeats(self, way: Way, sizes: Sizes) -> int:
        """Elements of the copies of a core that is a stack of matrices, for each matrix of the rows; a view if one."""
        if sizes.shared == 1 or not self.is_repeated(way, sizes):
            return 0
        return sizes.shared * sizes.repeats * sizes.summed * sizes.brought

    def ends(self) -> float:
        """Seconds of what comes in and goes out: it passes through memory once, in chunks or not."""
        of, task = self.of, self.task
        entering, leaving = (volume(indices, of.size) * task.itemsize for indices in (of.entering, of.leaving))
        # For gradients: dy, and of the rows and of their gradient what is asked for.
        passed = leaving + entering * (1 if task.forward else task.cores + task.x)
        return passed / self.machine.bandwidth(passed)

    def core_of(self, way: Way) -> Core:
        return self.core(way.group, way.left, way.shared, way.summed, way.brought)

    def _core(self, group: frozenset[int], left: bool, shared: Indices, summed: Indices, brought: Indices) -> Core:
        """The core of a group as matrices: as it is stored, straight or transposed; else as a view; else by a copy."""
        way = Way(group, left, shared, (), (), summed, brought)
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
        return Core(indices, permutation(indices, order), shape, is_transposed, not (as_stored or views))

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


def permutation(layout: Indices, wanted: Indices) -> tuple[int, ...]:
    """The order of the axes that brings indices from a layout into another; empty where they are the same."""
    return () if layout == wanted else tuple(layout.index(index) for index in wanted)
