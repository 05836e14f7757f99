"""In which order the cores of a network best meet the input of a convolution, and which are multiplied beforehand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache

from . import contraction, conv_cost
from .contraction import Plan
from .conv_cost import Convolution
from .cost import Cost, volume
from .machine import machine
from .network import Network

_EXACT = 8  # cores up to which every order is tried (3^8 pairs of subsets)


class Search:
    """The cheapest order, by dynamic programming over the sets of cores that have met the input."""

    def __init__(
        self,
        network: Network,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        plain: Sequence[int],
        transposed: bool,
        positions: int,
    ) -> None:
        self.network, self.stride, self.transposed, self.positions = network, stride, transposed, positions
        self.plain = tuple(plain)
        self.kernel = frozenset(network.names("kernel"))
        self.entering = frozenset((*network.names("in"), *network.names("group")))
        self.leaving = frozenset((*network.names("out"), *network.names("group")))
        self.modes = frozenset(mode.name for mode in network.modes)
        self.everything = frozenset(range(len(network.cores)))
        moving = [d for d, size in enumerate(kernel_size) if size > 1]
        self.dimension = dict(zip(network.names("kernel"), moving, strict=True))
        self.channels = cache(self._channels)
        self.merged = cache(self._merged)
        self.merge = cache(self._merge)
        self.extent = cache(self._extent)

    def indices(self, cores: Iterable[int]) -> set[str]:
        return {index for k in cores for index in self.network.cores[k]}

    def _channels(self, done: frozenset[int]) -> frozenset[str]:
        """The indices of the input's channels once these cores have met it."""
        needed = self.leaving | self.indices(self.everything - done)
        return frozenset((self.entering | self.indices(done)) & needed - self.kernel)

    def _merged(self, cores: frozenset[int]) -> tuple[str, ...]:
        """The indices of the product of these cores."""
        kept = self.modes | self.indices(self.everything - cores)
        return tuple(index for index in self.network.size if index in self.indices(cores) and index in kept)

    def _merge(self, cores: frozenset[int]) -> Plan | None:
        if len(cores) == 1:
            return None
        terms = tuple(self.network.cores[k] for k in sorted(cores))
        used = set().union(*terms)
        sizes = tuple((index, size) for index, size in self.network.sizes if index in used)
        return contraction.plan(terms, self.merged(cores), sizes)

    def strided(self, cores: frozenset[int], done: frozenset[int]) -> tuple[int, ...]:
        """The spatial dimensions that a step with these cores acts on."""
        dims = [self.dimension[index] for index in self.merged(cores) if index in self.kernel]
        # Those without a kernel mode at the end that makes the data smaller.
        first, last = not done, done | cores == self.everything
        return tuple(sorted([*dims, *(self.plain if (last if self.transposed else first) else ())]))

    def _extent(self, done: frozenset[int]) -> float:
        """The number of positions once these cores have met the input."""
        dims = {self.dimension[index] for index in self.indices(done) & self.kernel}
        if done == self.everything or (done and not self.transposed):
            dims.update(self.plain)
        factor = math.prod(self.stride[d] for d in dims)
        return self.positions * factor if self.transposed else self.positions / factor

    def cost(self, done: frozenset[int], cores: frozenset[int]) -> Cost:
        """The cost of a step, the merging of its cores included."""
        size = self.network.size
        before, after, core = self.channels(done), self.channels(done | cores), self.merged(cores)
        taps = volume(set(core) | before | after, size)  # the kernel's size is in the core
        positions = self.extent(done) if self.transposed else self.extent(done | cores)
        moved = volume(before, size) * self.extent(done) + volume(after, size) * self.extent(done | cores)
        merge = self.merge(cores)
        step = Cost(round(2 * taps * positions), round(moved) + volume(core, size))
        return step + (merge.cost if merge else Cost())

    def convolution(self, done: frozenset[int], cores: frozenset[int], last: bool) -> Convolution:
        """The sizes of a step; `last`: whether its input is channels-last. The result of all is to be contiguous."""
        before, after, core = self.channels(done), self.channels(done | cores), self.merged(cores)
        shared = (before & after).intersection(core)
        lead = volume(before.difference(core), self.network.size)
        groups, channels, new = (
            volume(indices, self.network.size)
            for indices in (shared, (before - after).intersection(core), (after - before).intersection(core))
        )
        dims = self.strided(cores, done)
        return Convolution(
            before=lead * self.extent(done),
            after=lead * self.extent(done | cores),
            groups=groups,
            channels=channels,
            new=new,
            sides=tuple(self.network.size[index] for index in core if index in self.kernel),
            mixes=not dims and groups == 1,
            contiguous=(not last, not last or done | cores == self.everything),
            transposed=self.transposed and bool(dims),
        )

    def score(self, cores: frozenset[int], work: Convolution) -> float:
        """What orders are compared by: the time of a step in training, on a CPU, in float32."""
        on = machine("cpu")
        forward, back = conv_cost.seconds(work, on)
        merge = self.merge(cores)
        other = conv_cost.around(volume(self.merged(cores), self.network.size), on) + (
            conv_cost.merging(merge.cost, len(merge.steps), on) if merge else 0.0
        )
        return forward + back + 3 * other

    def allowed(self, done: frozenset[int], cores: frozenset[int]) -> bool:
        """Whether a step makes sense: no kernel mode left over, no outer product."""
        own, rest = self.indices(cores), self.indices(self.everything - cores)
        if own & rest & self.kernel or not (own & self.channels(done) or cores == self.everything):
            return False
        reached, left = {min(cores)}, set(cores) - {min(cores)}
        while left:
            touching = {k for k in left if self.indices([k]) & self.indices(reached)}
            if not touching:
                return False
            reached |= touching
            left -= touching
        return True

    def units(self) -> list[frozenset[int]]:
        """The cores; where they are too many, some multiplied beforehand: the pairs that grow least."""
        units = [frozenset([k]) for k in sorted(self.everything)]
        while len(units) > _EXACT:
            pairs = [(a | b, a, b) for n, a in enumerate(units) for b in units[:n] if self.indices(a) & self.indices(b)]

            def growth(pair: tuple[frozenset[int], ...]) -> int:
                both, a, b = (volume(self.merged(part), self.network.size) for part in pair)
                return both - a - b

            both, a, b = min(pairs, key=growth)
            units = [*(unit for unit in units if unit not in (a, b)), both]
        return units

    def order(self) -> list[frozenset[int]]:
        """The cores that each step takes."""
        units = self.units()
        full = (1 << len(units)) - 1
        joined = [frozenset().union(*(u for k, u in enumerate(units) if mask >> k & 1)) for mask in range(full + 1)]
        # By the cores that have met the input, and whether what came of it is channels-last: the time so far, and the
        # cores of the last step with the layout that it found.
        best: dict[tuple[int, bool], tuple[float, int, bool]] = {(0, False): (0.0, 0, False)}
        for mask in range(1, full + 1):
            part = mask
            while part:
                rest = mask ^ part
                layouts = [last for last in (False, True) if (rest, last) in best]
                if layouts and self.allowed(joined[rest], joined[part]):
                    for last in layouts:
                        work = self.convolution(joined[rest], joined[part], last)
                        score = best[rest, last][0] + self.score(joined[part], work)
                        left = mask, last or work.mixes or work.uneven
                        if left not in best or score < best[left][0]:
                            best[left] = score, part, last
                part = (part - 1) & mask
        steps: list[frozenset[int]] = []
        mask, last = min(((full, last) for last in (False, True) if (full, last) in best), key=lambda end: best[end][0])
        while mask:
            _, part, last = best[mask, last]
            steps.append(joined[part])
            mask ^= part
        return steps[::-1]
