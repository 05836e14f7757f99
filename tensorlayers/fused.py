"""Rows times a network where two (groups of) cores at a time meet the rows in one Triton kernel: see `chain`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from . import backend, chain, contraction
from .activation import activation as activation_of
from .chain import Chain, Indices
from .contraction import BATCH, Plan
from .cost import Cost
from .group import Group, apart, product
from .launch_tables import Table
from .launch_tables import table as table_of
from .machine import Machine
from .network import Network
from .orders import Order, Orders, orders
from .program import Candidate, KernelProgram, Task


@dataclass(frozen=True)
class Stage:
    """Groups of cores that meet the rows together: two in one kernel, or one by an operation of torch.

    Parameters
    ----------
    groups : tuple of Group
    operands : tuple of Indices
        Of the rows, "batch" among them, and of the product of each group.
    result : Indices
    ahead : Chain or Plan
        The product.
    back : tuple of Chain or Plan or None
        The gradient of each operand, from that of the result and the other operands; None of what is not wanted.
    """

    groups: tuple[Group, ...]
    operands: tuple[Indices, ...]
    result: Indices
    ahead: Chain | Plan
    back: tuple[Chain | Plan | None, ...]

    def run(
        self,
        how: Chain | Plan,
        tensors: Sequence[Tensor],
        sizes: Mapping[str, int],
        bias: Tensor | None = None,
        activation: str = "none",
    ) -> Tensor:
        """The product, or one of its gradients."""
        if isinstance(how, Plan):
            return contraction.execute(how, tensors)
        out = tensors[0].new_empty([sizes[index] for index in how.result])
        along = None if bias is None else how.as_result(bias, how.result[1:], sizes)
        backend.load("chain").run(*how.views(tensors, sizes), how.as_result(out, how.result, sizes), along, activation)
        return out

    def products(self, cores: Sequence[Tensor]) -> list[Tensor]:
        """Of the cores of each group."""
        return [product(group, cores) for group in self.groups]

    @property
    def takes_bias(self) -> bool:
        """Whether the product can add one that is the same for all rows."""
        return isinstance(self.ahead, Chain) and self.ahead.is_alone(BATCH)


class Fused(KernelProgram):
    """A program of stages.

    Parameters
    ----------
    network : Network
    stages : tuple of Stage
    """

    def __init__(self, network: Network, stages: tuple[Stage, ...]) -> None:
        self.network, self.stages = network, stages
        size = {**network.size, BATCH: 1}
        self.intermediate = sum(math.prod(size[index] for index in stage.result) for stage in stages[:-1])

    def _sizes(self, x: Tensor) -> dict[str, int]:
        return {**self.network.size, BATCH: x.shape[0]}

    def _rows(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], *self.network.mode_sizes("in"))

    def forward(self, x: Tensor, cores: Sequence[Tensor], bias: Tensor | None, activation: str = "none") -> Tensor:
        sizes, rows, last = self._sizes(x), self._rows(x), self.stages[-1]
        for stage in self.stages[:-1]:
            rows = stage.run(stage.ahead, (rows, *stage.products(cores)), sizes)
        operands, shape = (rows, *last.products(cores)), (x.shape[0], self.network.features("out"))
        if last.takes_bias:
            along = None if bias is None else bias.reshape(self.network.mode_sizes("out"))
            return last.run(last.ahead, operands, sizes, along, activation).reshape(shape)
        y = last.run(last.ahead, operands, sizes).reshape(shape)
        return activation_of(activation)(y if bias is None else y + bias)

    def gradients(self, dy: Tensor, x: Tensor, cores: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
        sizes = self._sizes(x)
        taken = [self._rows(x)]
        products = [stage.products(cores) for stage in self.stages]
        for stage, groups in zip(self.stages[:-1], products, strict=False):
            taken.append(stage.run(stage.ahead, (taken[-1], *groups), sizes))
        gradient = dy.reshape(x.shape[0], *self.network.mode_sizes("out"))
        found: list[Tensor | None] = [None] * len(cores)
        for k in range(len(self.stages) - 1, -1, -1):
            stage, operands = self.stages[k], (taken[k], *products[k])
            for position, group in enumerate(stage.groups, 1):
                if any(needs[1 + core] for core in group.cores):
                    of_group = self._back(stage, position, gradient, operands, sizes)
                    for core, of_core in apart(group, of_group, cores, needs[1:]):
                        found[core] = of_core
            if k or needs[0]:
                gradient = self._back(stage, 0, gradient, operands, sizes)
        return [gradient.reshape(x.shape) if needs[0] else None, *found]

    @staticmethod
    def _back(
        stage: Stage, position: int, gradient: Tensor, operands: Sequence[Tensor], sizes: Mapping[str, int]
    ) -> Tensor:
        others = [operand for k, operand in enumerate(operands) if k != position]
        how = stage.back[position]
        assert how is not None
        return stage.run(how, (gradient, *others), sizes)


# -- planning ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def candidate(network: Network, task: Task, machine: Machine) -> Candidate | None:
    """The fastest program, by its predicted time; None where no two cores can meet the rows in one kernel."""
    of, table = orders(network, task, machine), table_of(task.arch)
    found = []
    for order in dict.fromkeys(order for ranked in of.found.values() for order in ranked):
        for split in _stages(order):
            made = _made(of, split, table)
            if made is not None:
                found.append(made)
    return min(found, key=lambda one: one.seconds, default=None)


def _stages(order: Order) -> Iterator[tuple[tuple[tuple[int, ...], ...], ...]]:
    """The ways to take the groups of an order one or two at a time, at least two together."""

    def taken(rest: Order) -> Iterator[tuple[Order, ...]]:
        if not rest:
            yield ()
        for count in (2, 1):
            if len(rest) >= count:
                for others in taken(rest[count:]):
                    yield (rest[:count], *others)

    return (split for split in taken(order) if any(len(stage) == 2 for stage in split))


class _Priced:
    """What the steps of a program take, added up."""

    def __init__(self, of: Orders, table: Table) -> None:
        self.of, self.table = of, table
        self.dtype = backend.elements(of.task.dtype)
        self.seconds, self.cost, self.launches = 0.0, Cost(), 0

    def way(self, operands: Sequence[Indices], result: Indices) -> Chain | Plan | None:
        """The fastest way to compute a product of two or three operands, added to the sums."""
        of = self.of
        if len(operands) == 2:
            plan = contraction.plan(tuple(operands), result, tuple(of.size.items()))
            moved = plan.cost.bytes(of.task.itemsize)
            self._add(
                plan.cost.flops / of.machine.rate(of.task.dtype) + moved / of.machine.memory + 2 * of.machine.launch,
                plan.cost,
                2,
            )
            return plan
        found = chain.best(operands, result, of.size, self.dtype, self.table)
        if found is None:
            return None
        how, launch = found
        self._add(launch.seconds, launch.cost, 1 + (launch.parts > 1))
        return how

    def _add(self, seconds: float, cost: Cost, launches: int) -> None:
        self.seconds, self.cost, self.launches = self.seconds + seconds, self.cost + cost, self.launches + launches


def _made(of: Orders, split: Sequence[Order], table: Table) -> Candidate | None:
    task, priced = of.task, _Priced(of, table)
    stages, done, rows = [], frozenset[int](), of.entering
    for groups in split:
        is_first, members = not done, [frozenset(group) for group in groups]
        done |= frozenset().union(*members)
        is_last = done == of.everything
        channels, names = of.channels(done), [of.indices(group) for group in members]
        appearing = dict.fromkeys((*rows, *(index for name in names for index in name)))
        result = of.leaving if is_last else tuple(index for index in appearing if index in channels)
        # For gradients all but the last are computed again.
        ahead = (priced if task.forward or not is_last else _Priced(of, table)).way((rows, *names), result)
        if ahead is None:
            return None
        operands = (rows, *names)
        wanted = (not task.forward and (task.x or not is_first), *(task.cores,) * len(names))
        back: list[Chain | Plan | None] = []
        for k, is_wanted in enumerate(wanted):
            others = [result, *(operand for j, operand in enumerate(operands) if j != k)]
            back.append(priced.way(others, operands[k]) if is_wanted else None)
            if is_wanted and back[-1] is None:
                return None
        made = tuple(of.group(group, name) for group, name in zip(members, names, strict=True))
        priced.seconds += sum(of.merging(group, name) for group, name in zip(members, names, strict=True))
        stages.append(Stage(made, operands, result, ahead, tuple(back)))
        rows = result
    program = Fused(of.network, tuple(stages))
    largest = max((math.prod(of.size[index] for index in stage.result) for stage in stages[:-1]), default=0)
    return Candidate(program, 0, priced.cost, Cost(), priced.seconds, priced.launches, largest)
