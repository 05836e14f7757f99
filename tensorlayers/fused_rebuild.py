"""Rows times the dense weight, that a Triton kernel builds of two groups of cores whenever it is needed.

The last product of cores leaves the modes of most networks in another order than those of the weight, so torch copies
all of it; the kernel writes it in place, see `rebuild`. Backward, torch forms the gradient of the weight in an order of
modes from which the gradients of both groups are products without a copy, where that pays.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from . import backend, contraction
from .activation import activation as activation_of
from .chain import Indices
from .contraction import Plan
from .cost import Cost, dense_linear
from .group import Group, apart, product
from .launch_tables import Table
from .launch_tables import table as table_of
from .machine import Machine
from .network import Network
from .orders import Orders, orders
from .program import Candidate, KernelProgram, Task
from .rebuild import Form, form, launch
from .step_cost import StepCosts

_GROUPED = 6  # cores up to which any two groups are tried; above, the first ones and the rest


@dataclass(frozen=True)
class Back:
    """How the gradients of both groups follow from that of the weight, dy^T x, which is formed first.

    Parameters
    ----------
    cut : str
        "in" or "out": whose leading modes come first of all, in the product that forms it.
    lead : int
        The product of their sizes.
    formed, layout : Indices
        The order of the modes that the product leaves, and that it is copied into, if that is another.
    plans : pair of Plan
        The gradients of the groups, from that of the weight and the other group.
    """

    cut: str
    lead: int
    formed: Indices
    layout: Indices
    plans: tuple[Plan, Plan]

    def of_weight(self, dy: Tensor, x: Tensor, sizes: Mapping[str, int]) -> Tensor:
        """The gradient of the weight, in the layout."""
        whole, cut = (dy, x) if self.cut == "in" else (x, dy)
        pieces = cut.reshape(cut.shape[0], self.lead, cut.shape[1] // self.lead).transpose(0, 1)
        found = torch.bmm(whole.mT.expand(self.lead, -1, -1), pieces).view([sizes[index] for index in self.formed])
        if self.layout != self.formed:
            found = found.permute([self.formed.index(index) for index in self.layout]).contiguous()
        return found


class FusedRebuild(KernelProgram):
    """The dense weight by the kernel, whenever it is needed, and dense products with it.

    Parameters
    ----------
    network : Network
    groups : pair of Group
        What the left and the right operand are made of.
    form : Form
    back : Back or None
        None where no gradients of cores are wanted.
    """

    def __init__(self, network: Network, groups: tuple[Group, Group], form: Form, back: Back | None) -> None:
        self.network, self.groups, self.form, self.back = network, groups, form, back

    def _weight(self, left: Tensor, right: Tensor) -> Tensor:
        weight = self.form.run(left, right, self.network.size)
        return weight.reshape(self.network.features("out"), self.network.features("in"))

    def forward(self, x: Tensor, cores: Sequence[Tensor], bias: Tensor | None, activation: str = "none") -> Tensor:
        left, right = (product(group, cores) for group in self.groups)
        return activation_of(activation)(torch.nn.functional.linear(x, self._weight(left, right), bias))

    def gradients(self, dy: Tensor, x: Tensor, cores: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
        products = [product(group, cores) for group in self.groups]
        found: list[Tensor | None] = [None] * len(needs)
        if needs[0]:
            found[0] = dy @ self._weight(*products)
        if not any(needs[1:]):
            return found
        assert self.back is not None
        of_weight = self.back.of_weight(dy, x, self.network.size)
        for group, plan, indices, other in zip(
            self.groups, self.back.plans, (self.form.left, self.form.right), products[::-1], strict=True
        ):
            if any(needs[1 + k] for k in group.cores):
                gradient = contraction.execute(plan, (of_weight, other))
                gradient = gradient.permute([plan.output.index(index) for index in indices])
                for k, of_core in apart(group, gradient, cores, needs[1:]):
                    found[1 + k] = of_core
        return found


# -- planning ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def candidate(network: Network, task: Task, machine: Machine) -> Candidate | None:
    """The fastest program, by its predicted time; None where torch writes the weight in place by itself."""
    if len(network.cores) == 1 or is_written_in_place(network):
        return None
    return min(candidates(network, task, machine), key=lambda one: one.seconds, default=None)


def is_written_in_place(network: Network) -> bool:
    """Whether the last product of torch's own plan leaves the modes in the order of the weight, or its transpose."""
    outs, ins = network.names("out"), network.names("in")
    last = contraction.plan(network.cores, (*outs, *ins), network.sizes).steps[-1]
    return last.natural == last.result


def candidates(network: Network, task: Task, machine: Machine) -> list[Candidate]:
    """The programs of all ways to group the cores that the kernel can take."""
    table, roles = table_of(task.arch), {mode.role for mode in network.modes}
    if roles != {"out", "in"} or backend.elements(task.dtype) not in table.kernels.get("rebuild", ()):
        return []
    planner = _Planner(orders(network, task, machine), table)
    return [made for groups in _groupings(len(network.cores)) if (made := planner.made(groups))]


def _groupings(cores: int) -> Iterator[tuple[frozenset[int], frozenset[int]]]:
    """The ways to put the cores into two groups."""
    others = range(1, cores)
    for size in range(cores - 1):
        for chosen in itertools.combinations(others, size) if cores <= _GROUPED else [tuple(others[:size])]:
            group = frozenset((0, *chosen))
            yield group, frozenset(range(cores)) - group


class _Planner:
    """Programs of a task, with their times."""

    def __init__(self, of: Orders, table: Table) -> None:
        self.of, self.task, self.machine, self.table = of, of.task, of.machine, table
        self.costs = StepCosts(of)
        self.outs, self.ins = of.leaving[1:], of.entering[1:]
        self.weight = (*self.outs, *self.ins)

    def made(self, groups: tuple[frozenset[int], frozenset[int]]) -> Candidate | None:
        """The program of two groups; None where the kernel cannot write the weight, or not in runs."""
        of, task = self.of, self.task
        inner = next((index for index in reversed(self.ins) if of.size[index] > 1), self.ins[-1])
        members = groups[::-1] if inner in of.indices(groups[0]) else groups
        found = form(*self._stored(*members), self.weight)
        if found is None or inner in found.left:
            return None
        names = found.left, found.right
        if max(map(self.costs.bytes, names)) > self.costs.bytes(self.weight):
            return None  # a group that is larger than the weight is not worth it
        outs, ins = self.costs.volume(self.outs), self.costs.volume(self.ins)
        left, right = map(of.group, members, names)
        seconds = sum(map(of.merging, members, names))
        fixed = left.cost(gradients=task.cores) + right.cost(gradients=task.cores)
        count, back = 2 * len(of.everything) - 4, None
        if task.forward or task.x:
            launched = launch(found.problem(of.size, backend.elements(task.dtype)), self.table)
            seconds += launched.seconds + sum(map(self._copying, members, names, found.roles))
            seconds += self._product(1, task.rows, *((ins, outs) if task.forward else (outs, ins)))
            fixed, count = fixed + Cost(launched.flops, launched.loaded + launched.stored), count + 2
        if task.cores:
            priced = (self._back(found, cut, lead, layout) for cut, lead, layout in self._ways(found))
            back, taken, cost = min(priced, key=lambda one: one[1])
            seconds, fixed, count = seconds + taken, fixed + cost, count + 3
        products = task.forward + task.x + task.cores
        cost = sum([dense_linear(outs, ins, task.rows)] * products, fixed)
        program = FusedRebuild(of.network, (left, right), found, back)
        return Candidate(program, 0, cost, fixed, seconds, count, 0)

    def _stored(self, left: frozenset[int], right: frozenset[int]) -> tuple[Indices, Indices]:
        """The order of the axes of both groups: of a single core as it is, of a product as the kernel reads it best."""
        of_left, of_right = self.of.indices(left), self.of.indices(right)
        heads = [index for index in self.weight if index in of_left and index in of_right]
        m = [index for index in self.weight if index not in of_right]
        n = [index for index in self.weight if index not in of_left]
        k = [index for index in (of_right if len(right) == 1 else of_left) if index not in (*heads, *m, *n)]
        return (
            of_left if len(left) == 1 else (*heads, *m, *k),
            of_right if len(right) == 1 else (*heads, *k, *n),
        )

    def _ways(self, of: Form) -> Iterator[tuple[str, int, Indices | None]]:
        """The ways to form the gradient of the weight: whose modes are cut, after how many, what it is copied to."""
        yield "in", 0, (*(index for pair in (of.heads, of.m, of.n) for run in pair for index in run),)
        for cut, modes in (("in", self.ins), ("out", self.outs)):
            for count in range(len(modes)):
                yield cut, count, None

    def _back(self, of: Form, cut: str, count: int, copied: Indices | None) -> tuple[Back, float, Cost]:
        """A way to all gradients of the groups, with its time and what it costs beside the product of rows."""
        whole, modes = (self.outs, self.ins) if cut == "in" else (self.ins, self.outs)
        formed, size = (*modes[:count], *whole, *modes[count:]), self.costs.volume
        layout = copied or formed
        lead = size(modes[:count])
        seconds = self._product(lead, size(whole), self.task.rows, size(modes[count:]))
        seconds += 0.0 if copied is None else self._copy(layout)
        plans = []
        for mine, other in ((of.left, of.right), (of.right, of.left)):
            batch = tuple(index for index in layout if index in mine and index in other)
            rows = tuple(index for index in layout if index not in other)
            summed = tuple(index for index in layout if index not in mine)
            columns = tuple(index for index in mine if index not in layout)
            seconds += self._product(*map(size, (batch, rows, summed, columns))) + self.machine.launch
            seconds += 0.0 if self.costs.viewable(layout, (batch, rows, summed)) else self._copy(layout)
            plans.append(contraction.plan((layout, other), (*batch, *rows, *columns), self.of.network.sizes))
        left, right = plans
        return Back(cut, lead, formed, layout, (left, right)), seconds, left.cost + right.cost

    def _product(self, batch: int, m: int, k: int, n: int) -> float:
        """Seconds of (m, k) by (k, n) products by torch."""
        return self.machine.alone(batch, m, k, n, self.task.dtype, self.task.itemsize)

    def _copying(self, group: frozenset[int], indices: Indices, roles: tuple[Indices, ...]) -> float:
        """Seconds to bring the axes of an operand next to each other where the kernel sees them as one."""
        is_there = len(group) == 1 and self.costs.viewable(indices, ((), *roles))
        return 0.0 if is_there else self._copy(indices)

    def _copy(self, indices: Indices) -> float:
        return self.costs.copy(self.costs.bytes(indices)) + self.machine.launch
