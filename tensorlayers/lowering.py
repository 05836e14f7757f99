"""Finding the programs that a network can be applied to rows by, with the time that each is predicted to take.

The order in which groups of cores meet the rows is found by dynamic programming over the sets of cores that have met
them; then the layout of every step, by dynamic programming over the layouts that a step can leave.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

from . import contraction
from .contraction import BATCH
from .cost import Cost, pair_cost, volume
from .machine import Machine
from .network import Network
from .program import Group, Program, Step

VARIANTS = ("contraction", "merged", "rebuild")
"""How cores are grouped: each by itself, some multiplied first, or all of them: the dense weight."""

_KEPT = 3  # orders, of each variant, whose layouts are compared
_LAYOUTS = 16  # layouts kept after each step
_GROUPED = 6  # cores up to which any set of them may be a group; above, only pairs

Order = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Task:
    """What is to be computed: the result, or the gradients.

    Parameters
    ----------
    rows : int
    x, cores : bool
        Which gradients are wanted; neither: the result itself.
    dtype : str
        "float32", ...
    itemsize : int
        Bytes an element.
    """

    rows: int
    x: bool = False
    cores: bool = False
    dtype: str = "float32"
    itemsize: int = 4

    @property
    def forward(self) -> bool:
        """Whether the result itself is wanted."""
        return not (self.x or self.cores)


@dataclass(frozen=True)
class Candidate:
    """A program and what it is predicted to take.

    Parameters
    ----------
    program : Program
    chunk : int
        Rows at a time; 0: all.
    cost : Cost
        FLOPs and elements moved.
    seconds : float
    launches : int
    largest : int
        Elements of the largest intermediate that is held at a time.
    """

    program: Program
    chunk: int
    cost: Cost
    seconds: float
    launches: int
    largest: int


@dataclass(frozen=True)
class _Priced:
    """A step with what it costs, for all rows at once."""

    step: Step
    flops: int
    compute: float  # seconds of arithmetic, and of copies into another order
    moved: int  # bytes between steps
    fixed: float  # seconds that do not depend on the rows
    launches: float
    left: int  # elements of what it leaves
    largest: int  # elements of the larger of what it takes and leaves


@lru_cache(maxsize=1024)
def candidates(network: Network, task: Task, machine: Machine, threads: int = 0) -> dict[str, Candidate]:
    """The fastest program of each variant, in one pass over all rows; variants that do not exist are left out.

    The rates of a CPU depend on torch's number of threads: `threads` is there to cache by.
    """
    found: dict[str, Candidate] = {}
    search = _Search(network, task, machine)
    for variant, orders in search.orders().items():
        programs = [search.lowered(order) for order in orders]
        found[variant] = min(programs, key=lambda candidate: candidate.seconds)
    return found


@lru_cache(maxsize=1024)
def chunked(network: Network, task: Task, machine: Machine, variant: str, threads: int = 0) -> Candidate | None:
    """The fastest program of a variant that takes the rows in chunks; None where one chunk would hold them all."""
    best = None
    search = _Search(network, task, machine)
    for order in search.orders().get(variant, ()):
        for chunk in search.chunks(order):
            candidate = search.lowered(order, chunk)
            if best is None or candidate.seconds < best.seconds:
                best = candidate
    return best


class _Search:
    def __init__(self, network: Network, task: Task, machine: Machine) -> None:
        self.network, self.task, self.machine = network, task, machine
        self.size: dict[str, int] = {**network.size, BATCH: task.rows}
        self.everything = frozenset(range(len(network.cores)))
        self.entering = (BATCH, *network.names("in"))
        self.leaving = (BATCH, *network.names("out"))
        self.channels = cache(self._channels)
        self.indices = cache(self._indices)
        self.merge = cache(self._merge)
        self.core = cache(self._core)
        self.viewable = cache(self._viewable)

    # -- which cores meet the rows, and when --------------------------------------------------------------------------

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

    def _merge(self, group: frozenset[int], result: tuple[str, ...]) -> contraction.Plan:
        return contraction.plan(tuple(self.network.cores[k] for k in sorted(group)), result, self.network.sizes)

    def orders(self) -> dict[str, list[Order]]:
        """For each variant, the orders with the least estimate, best first."""
        everything, cores = self.everything, len(self.network.cores)
        # (merged some, all in one) is the variant; of each state the few best orders are kept.
        kept: dict[frozenset[int], list[tuple[float, Order]]] = {frozenset(): [(0.0, ())]}
        largest = cores if cores <= _GROUPED else 2
        subsets = [frozenset(c) for size in range(cores) for c in itertools.combinations(range(cores), size)]
        for done in subsets:
            for seconds, order in kept.get(done, ()):
                remaining = sorted(everything - done)
                for size in range(1, min(largest, len(remaining)) + 1):
                    for group in map(frozenset, itertools.combinations(remaining, size)):
                        if len(group) == cores and cores > 1:
                            continue
                        estimate = seconds + self._estimate(done, group)
                        kept.setdefault(done | group, []).append((estimate, (*order, tuple(sorted(group)))))
            kept.pop(done, None) if done else None
            for state in [s for s in kept if len(s) == len(done) + 1]:
                kept[state] = _best(kept[state])
        found: dict[str, list[Order]] = {}
        for _, order in _best(kept.get(everything, [])):
            variant = "contraction" if all(len(group) == 1 for group in order) else "merged"
            found.setdefault(variant, []).append(order)
        if cores > 1:
            found["rebuild"] = [(tuple(sorted(everything)),)]
        return found

    def _estimate(self, done: frozenset[int], group: frozenset[int]) -> float:
        """Seconds of a step, before its layout is known."""
        before, after, core = self.channels(done), self.channels(done | group), set(self.indices(group))
        cost = pair_cost(before, core, after, self.size)
        passes = self._passes(first=not done, last=done | group == self.everything)
        batched = before & core & after != set()  # which takes a few views more
        seconds = passes * (cost.flops / self.machine.rate(self.task.dtype) + (1 + batched) * self.machine.launch)
        seconds += passes * (cost.elements * self.task.itemsize) / self.machine.cached
        return seconds + (self._merging(self.merge(group, self.indices(group))) if len(group) > 1 else 0.0)

    def _passes(self, first: bool, last: bool) -> int:
        """Products of this size that a step takes: forward, the gradients of the rows and of the core."""
        if self.task.forward:
            return 1
        backward = int(self.task.x or not first)
        return backward + (1 + int(not last) if self.task.cores else 0)

    def _merging(self, plan: contraction.Plan) -> float:
        """Seconds to multiply cores with each other, and for their gradients."""
        passes = 1 + (2 if self.task.cores else 0)
        seconds = 0.0
        for step, cost in zip(plan.steps, plan.step_costs(), strict=True):
            seconds += cost.flops / self.machine.rate(self.task.dtype)
            seconds += cost.bytes(self.task.itemsize) / self.machine.cached
            seconds += (1.5 if step.is_product else 3) * self.machine.launch
        return passes * seconds

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

    # -- in which layout ----------------------------------------------------------------------------------------------

    def lowered(self, order: Order, chunk: int = 0) -> Candidate:
        """The program of an order with the best layouts, and its time."""
        rows = chunk or self.task.rows
        size = {**self.size, BATCH: rows}
        done: frozenset[int] = frozenset()
        layouts: dict[tuple[str, ...], tuple[float, tuple[_Priced, ...]]] = {self.entering: (0.0, ())}
        for position, group in enumerate(order):
            members = frozenset(group)
            last = position == len(order) - 1
            grown: dict[tuple[str, ...], tuple[float, tuple[_Priced, ...]]] = {}
            for layout, (seconds, steps) in layouts.items():
                for result, priced in self._steps(layout, done, members, last, size):
                    total = seconds + self._seconds(priced, rows)
                    if last and result != self.leaving:
                        total += self._copy(volume(result, size) * self.task.itemsize)
                    if result not in grown or total < grown[result][0]:
                        grown[result] = (total, (*steps, priced))
            best = sorted(grown.items(), key=lambda item: item[1][0])[:_LAYOUTS]
            layouts = dict(best)
            done |= members
        layout, (_, steps) = min(layouts.items(), key=lambda item: item[1][0])
        return self._candidate(layout, steps, chunk, size)

    def _candidate(
        self, layout: tuple[str, ...], steps: Sequence[_Priced], chunk: int, size: Mapping[str, int]
    ) -> Candidate:
        rows = chunk or self.task.rows
        sizes = tuple(-1 if index == BATCH else size[index] for index in layout)
        order = () if layout == self.leaving else tuple(layout.index(index) for index in self.leaving)
        held = sum(p.left for p in steps[:-1]) // rows
        program = Program(tuple(p.step for p in steps), sizes, order, self.network.features("out"), held, rows == 1)
        parts = self.task.rows / rows
        largest = max((p.largest for p in steps[:-1]), default=0)
        moved = sum(p.moved for p in steps) + (2 * volume(layout, size) * self.task.itemsize if order else 0)
        seconds = sum(parts * self._seconds(p, rows) for p in steps) + sum(p.fixed for p in steps)
        seconds += parts * (self._copy(volume(layout, size) * self.task.itemsize) if order else 0.0)
        # What comes in and goes out passes through memory once, in chunks or not.
        ends = volume(self.entering, self.size) + volume(self.leaving, self.size)
        seconds += ends * self.task.itemsize * (1 if self.task.forward else 2) / self._bandwidth(ends)
        flops = sum(p.flops for p in steps) * parts
        launches = int(sum(p.launches for p in steps) * math.ceil(parts))
        return Candidate(program, chunk, Cost(int(flops), int(moved * parts) // self.task.itemsize), seconds,
                         launches, largest)  # fmt: skip

    def _seconds(self, priced: _Priced, rows: int) -> float:
        return priced.compute + priced.moved / self._bandwidth(priced.largest) + priced.launches * self.machine.launch

    def _bandwidth(self, elements: int) -> float:
        """Bytes/s at which an intermediate of this size is written and read again."""
        fits = elements * self.task.itemsize <= self.machine.cache
        return self.machine.cached if fits else self.machine.memory

    def _copy(self, size: int) -> float:
        """Seconds that a copy of this many bytes into another order takes."""
        return 2 * size / self.machine.permuted

    def _steps(
        self,
        layout: tuple[str, ...],
        done: frozenset[int],
        group: frozenset[int],
        last: bool,
        size: Mapping[str, int],
    ) -> Iterator[tuple[tuple[str, ...], _Priced]]:
        """The ways to take a step from a layout: the layout that each leaves, and its cost."""
        after, core = self.channels(done | group), self.indices(group)
        shared = tuple(index for index in layout if index in core and index in after)
        summed = tuple(index for index in layout if index in core and index not in after)
        alone = tuple(index for index in layout if index not in core)
        new = [index for index in core if index not in layout]
        outs = [index for index in self.leaving if index in new]
        first = min((layout.index(index) for index in summed), default=len(layout))
        before = tuple(index for index in alone if layout.index(index) < first)
        for brought in _arrangements(new, outs):
            for sums in _arrangements(list(summed), [index for index in core if index in summed]):
                yield self._step(layout, group, last, size, shared, (), alone, sums, brought, left=False, done=done)
                for kept in {(), before, alone}:
                    rest = tuple(index for index in alone if index not in kept)
                    yield self._step(layout, group, last, size, shared, kept, rest, sums, brought, left=True, done=done)

    def _step(
        self,
        layout: tuple[str, ...],
        group: frozenset[int],
        last: bool,
        size: Mapping[str, int],
        shared: tuple[str, ...],
        repeats: tuple[str, ...],
        rest: tuple[str, ...],
        summed: tuple[str, ...],
        brought: tuple[str, ...],
        *,
        left: bool,
        done: frozenset[int],
    ) -> tuple[tuple[str, ...], _Priced]:
        task, machine = self.task, self.machine
        batch = (*shared, *repeats)
        ends = (summed, rest) if left else (rest, summed)
        h, a, r, s, n = (volume(part, size) for part in (shared, repeats, rest, summed, brought))
        plain = h * a == 1 and BATCH not in batch
        wanted = (*batch, *ends[0], *ends[1])
        permuted = () if wanted == layout else tuple(layout.index(index) for index in wanted)
        is_copied = bool(permuted) and not self.viewable(layout, (batch, *ends))
        core_step, core_copied = self.core(group, shared, summed, brought, left)
        gemm = (n, s, r) if left else (r, s, n)
        repeated = h * a > h or BATCH in repeats
        # -- the costs
        product = machine.product(h * a, *gemm, task.dtype)
        input_bytes, output_bytes = h * a * r * s * task.itemsize, h * a * r * n * task.itemsize
        flops = 2 * h * a * r * s * n
        copy = self._copy(input_bytes) if is_copied else 0.0
        fixed = self._copy(volume(core_step.group_indices, size) * task.itemsize) if core_copied else 0.0
        if len(group) > 1:
            fixed += self._merging(core_step.group.merge)  # type: ignore[arg-type]
        if repeated and h > 1:
            copy += self._copy(h * a * s * n * task.itemsize)
        views = sum((bool(permuted), bool(core_step.order), repeated, core_step.shape != core_step.group.sizes))
        views += len(layout) != (2 if plain else 3)
        launches = 1 + int(is_copied) + views / 4  # a view takes about a quarter of the time of a product
        summed_apart = True
        if task.forward:
            compute, moved, count = product + copy, input_bytes + output_bytes, flops
        else:
            compute, moved, count = 0.0, 0, 0
            if task.x or done:
                turned = (s, n, r) if left else (r, n, s)
                compute += machine.product(h * a, *turned, task.dtype)
                compute += self._copy(input_bytes) if permuted else 0.0
                moved += input_bytes + output_bytes
                count += flops
            if task.cores:
                compute += copy
                if not last:
                    compute += product
                    moved += input_bytes + output_bytes
                    count += flops
                moved += input_bytes + output_bytes + 2 * h * s * n * task.itemsize
                count += flops
                core = (n, r, s) if left else (s, r, n)
                if repeated:
                    apart = machine.product(h * a, *core, task.dtype)
                    apart += 2 * h * a * s * n * task.itemsize / self._bandwidth(h * a * s * n)
                    joined = machine.product(h, core[0], core[1] * a, core[2], task.dtype)
                    joined += self._copy(input_bytes) + self._copy(output_bytes)
                    summed_apart = apart <= joined
                    compute += min(apart, joined)
                    launches += 2
                else:
                    compute += machine.product(h * a, *core, task.dtype)
            launches *= 1 + int(task.cores) + int(task.cores and not last)
        sized = {**size, BATCH: 1}

        def shape(*parts: tuple[str, ...]) -> tuple[int, ...]:
            return tuple(-1 if BATCH in part else volume(part, sized) for part in parts)

        groups = ends if plain else (batch, *ends)
        after = (brought, rest) if left else (rest, brought)
        step = Step(
            group=core_step.group,
            left=left,
            sizes=tuple(-1 if index == BATCH else size[index] for index in layout),
            order=permuted,
            shape=shape(*groups),
            result=shape(*(after if plain else (batch, *after))),
            core_order=core_step.order,
            core_shape=core_step.shape,
            core_transposed=core_step.transposed,
            shared=h,
            repeated=repeated,
            summed_apart=summed_apart,
        )
        largest = h * a * r * max(n, s)
        flat = (*batch, *after[0], *after[1])
        return flat, _Priced(step, count, compute, moved, fixed, launches, h * a * r * n, largest)

    def _core(
        self,
        group: frozenset[int],
        shared: tuple[str, ...],
        summed: tuple[str, ...],
        brought: tuple[str, ...],
        left: bool,
    ) -> tuple[_Core, bool]:
        """How the core of a group becomes matrices, and whether that takes a copy."""
        size = self.size
        ends = (brought, summed) if left else (summed, brought)
        wanted = (*shared, *ends[0], *ends[1])
        turned = (*shared, *ends[1], *ends[0])
        merged = wanted if left else turned  # as F.linear takes it
        indices = merged if len(group) > 1 else self.indices(group)
        sizes = tuple(size[index] for index in indices)
        members = tuple(sorted(group))
        made = Group(members, sizes)
        if len(group) > 1:
            merge = self.merge(group, indices)
            adjoints = []
            for k in members:
                others = tuple(self.network.cores[other] for other in members if other != k)
                adjoints.append(contraction.plan((indices, *others), self.network.cores[k], self.network.sizes))
            made = Group(members, sizes, merge, tuple(adjoints))
        h = volume(shared, size)
        # As it is stored, straight or transposed; else as a view of that; else by a copy.
        ways = ((wanted, ends, False), (turned, ends[::-1], True))
        as_stored = [way for way in ways if way[0] == indices]
        views = [way for way in ways if self.viewable(indices, (shared, *way[1]))]
        order, (m, n), transposed = (*as_stored, *views, ways[0])[0]
        step = self._core_step(made, indices, order, h, m, n, transposed, size)
        return step, not (as_stored or views)

    def _viewable(self, layout: tuple[str, ...], groups: tuple[tuple[str, ...], ...]) -> bool:
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

    @staticmethod
    def _core_step(
        group: Group,
        indices: tuple[str, ...],
        order: tuple[str, ...],
        h: int,
        m: tuple[str, ...],
        n: tuple[str, ...],
        transposed: bool,
        size: Mapping[str, int],
    ) -> _Core:
        permutation = () if order == indices else tuple(indices.index(index) for index in order)
        ends = volume(m, size), volume(n, size)
        return _Core(group, indices, permutation, ends if h == 1 else (h, *ends), transposed)


@dataclass(frozen=True)
class _Core:
    group: Group
    group_indices: tuple[str, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]
    transposed: bool


def _best(orders: list[tuple[float, Order]]) -> list[tuple[float, Order]]:
    """The few best orders without merged cores, and the few best of the others."""
    plain = sorted(item for item in orders if all(len(group) == 1 for group in item[1]))
    merged = sorted(item for item in orders if any(len(group) > 1 for group in item[1]))
    return plain[:_KEPT] + merged[:_KEPT]


def _arrangements(indices: Sequence[str], wanted: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The orders of a few indices; of many, as they are and as they are wanted at last."""
    if len(indices) <= 3:
        yield from itertools.permutations(indices)
        return
    others = [index for index in indices if index not in wanted]
    yield from dict.fromkeys((tuple(indices), (*wanted, *others), (*others, *wanted)))
