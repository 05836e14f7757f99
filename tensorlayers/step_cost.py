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
`matmul.gradients` decides for each step anew."""

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
    """Which products of a step are computed: its result, the gradient of its rows, the gradient of its core."""

    ahead: bool
    back: bool
    core: bool


class Work(NamedTuple):
    """What the products of a step take, for the rows of one chunk."""

    compute: float  # seconds of arithmetic, and of copies into another order
    moved: int  # bytes between steps
    flops: int
    launches: float
    summed_apart: bool = True  # as of a `Step`


class Priced(NamedTuple):
    """A step from a layout, with what it costs."""

    layout: Indices
    leaves: Indices  # the layout of the result
    way: Way
    work: Work
    fixed: float  # seconds that do not depend on the rows
    read: int  # bytes of the core
    left: int  # elements of what it leaves
    largest: int  # elements of the larger of what it takes and leaves


class StepCosts:
    """The costs of the steps of a task, for `chunk` rows at a time (0: all)."""

    def __init__(self, of: Orders, chunk: int = 0) -> None:
        self.of, self.task, self.machine = of, of.task, of.machine
        self.rows = chunk or of.task.rows
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
            return Products(ahead=True, back=False, core=False)
        return Products(self.task.cores and not last, self.task.x or not first, self.task.cores)

    def priced(self, layout: Indices, way: Way, products: Products) -> Priced:
        sizes, core, itemsize = self.sizes(way), self.core_of(way), self.task.itemsize
        work = self._work(layout, way, sizes, core, products)
        weight = self.volume(core.indices) * itemsize
        read = weight * (products.ahead + products.back)
        fixed = read / self.reading + (self.copy(weight) if core.copied else 0.0)
        fixed += self.of.merging(way.group, core.indices)
        leaves = (*way.batch, *way.result[0], *way.result[1])
        largest = max(sizes.taken, sizes.left) // itemsize
        return Priced(layout, leaves, way, work, fixed, read, sizes.left // itemsize, largest)

    def _work(self, layout: Indices, way: Way, sizes: Sizes, core: Core, products: Products) -> Work:
        h, a, r, s, n, taken, left = sizes
        permuted, repeated = layout != way.wanted, self.is_repeated(way, sizes)
        copied = permuted and not self.viewable(layout, (way.batch, *way.rows))
        views = permuted + bool(core.order) + repeated + (core.shape != tuple(self.size[i] for i in core.indices))
        views += len(layout) != (2 if self.is_plain(way, sizes) else 3)
        launches = 1 + copied + views / 4  # a view takes about a quarter of the time of a product
        compute, moved, apart = 0.0, 0, True
        if products.back:
            compute += self._product(way, h * a, r, n, s) + (self.copy(taken) if permuted else 0.0)
            moved += taken + left
        if products.ahead or products.core:
            compute += self.copy(taken) if copied else 0.0
            compute += self.copy(self.repeats(way, sizes) * self.task.itemsize)
        if products.ahead:
            # A core on the left of rows that are read transposed is their product with it on the right, and worse.
            turned = way.left and permuted and not copied and self.is_plain(way, sizes)
            ahead = TURNED * self.machine.product(1, r, s, n, self.task.dtype) if turned else 0.0
            compute += max(ahead, self._product(way, h * a, r, s, n))
            moved += taken + left
        if products.core:
            seconds, apart = self._core_gradient(way, sizes) if repeated else (self._product(way, h * a, s, r, n), True)
            compute += seconds
            moved += taken + left + 2 * h * s * n * self.task.itemsize
            launches += 2 * repeated
        if not self.task.forward:
            launches = launches * (1 + products.core + products.ahead) + WALKED
        return Work(compute, moved, sum(products) * 2 * h * a * r * s * n, launches, apart)

    def _core_gradient(self, way: Way, sizes: Sizes) -> tuple[float, bool]:
        """Seconds for the gradient of a repeated core, and whether that is by one product for each repetition."""
        h, a, r, s, n, taken, left = sizes
        apart = self._product(way, h * a, s, r, n)
        apart += 2 * h * a * s * n * self.task.itemsize / self._bandwidth(h * a * s * n)
        joined = self._product(way, h, s, r * a, n)
        joined += self.copy(taken) + self.copy(left)
        return min(apart, joined), apart <= joined

    def _product(self, way: Way, batch: int, m: int, k: int, n: int) -> float:
        """Seconds of (m, k) by (k, n) products where the core stands on the right; on the left all is transposed."""
        return self.machine.product(batch, *((n, k, m) if way.left else (m, k, n)), self.task.dtype)

    def seconds(self, priced: Priced) -> float:
        work = priced.work
        return work.compute + work.moved / self._bandwidth(priced.largest) + work.launches * self.machine.launch

    def _bandwidth(self, elements: int) -> float:
        """Bytes/s at which an intermediate of this size is written and read again."""
        fits = elements * self.task.itemsize <= self.machine.cache
        return self.machine.cached if fits else self.machine.memory

    def copy(self, size: int) -> float:
        """Seconds that a copy of this many bytes into another order takes."""
        return 2 * size / self.machine.permuted

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
        elements = volume(of.entering, of.size) + volume(of.leaving, of.size)
        return elements * task.itemsize * (1 if task.forward else 2) / self._bandwidth(elements)

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
