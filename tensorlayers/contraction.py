"""The pairwise contraction of a network: planned once, cached, executed; `Plan` prints itself as a table.

No einsum of more than two operands ever reaches torch.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from .cost import Cost, pair_cost, volume
from .errors import NetworkError
from .network import Axis, Network, modes_by_axis

BATCH = "batch"
"""The index name of the rows of a layer's input."""

BATCH_CLASSES = (1, 16, 256, 4096)
"""Contraction orders are chosen for these batch sizes: a batch takes the order of the first class not below it."""

_F = TypeVar("_F", bound=Callable[..., object])

_EXACT = 9  # operands up to which every order is tried (3^9 pairs of subsets)


@dataclass(frozen=True)
class Step:
    """One pairwise contraction: operands `left` and `right` are taken out of the list, the result is appended."""

    left: int
    right: int
    operands: tuple[tuple[str, ...], ...]
    result: tuple[str, ...]
    equation: str
    is_product: bool
    """Whether nothing is summed."""
    natural: tuple[str, ...]
    """The order that the product leaves the indices in: that of the result, or one that is copied into it."""


@dataclass(frozen=True)
class Plan:
    """The order in which a set of tensors is contracted pairwise, and what it costs.

    Parameters
    ----------
    terms : tuple of tuple of str
        The index names of each operand.
    output : tuple of str
        The index names of the result.
    sizes : tuple of (str, int)
        The size of each index.
    steps : tuple of Step
    """

    terms: tuple[tuple[str, ...], ...]
    output: tuple[str, ...]
    sizes: tuple[tuple[str, int], ...]
    steps: tuple[Step, ...]

    def step_costs(self) -> tuple[Cost, ...]:
        """The cost of each step."""
        sizes = dict(self.sizes)
        costs = []
        for step in self.steps:
            if len(step.operands) == 1:
                costs.append(Cost(0, volume(step.operands[0], sizes) + volume(step.result, sizes)))
            else:
                costs.append(pair_cost(step.operands[0], step.operands[1], step.result, sizes))
        return tuple(costs)

    @property
    def cost(self) -> Cost:
        """The cost of all steps together."""
        return sum(self.step_costs(), Cost())

    @property
    def flops(self) -> int:
        """Floating-point operations, 2 a multiply-accumulate."""
        return self.cost.flops

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.cost.macs

    @property
    def largest(self) -> int:
        """Elements of the largest intermediate (the result not counted); 0 where there is none."""
        sizes = dict(self.sizes)
        return max((volume(step.result, sizes) for step in self.steps[:-1]), default=0)

    def resized(self, index: str, size: int) -> Plan:
        """The same order with another size of one index, for instance the batch."""
        return Plan(self.terms, self.output, tuple((k, size if k == index else n) for k, n in self.sizes), self.steps)

    def __str__(self) -> str:
        sizes = dict(self.sizes)
        rows = [("step", "contraction", "result", "FLOPs", "bytes (fp32)")]
        for k, (step, cost) in enumerate(zip(self.steps, self.step_costs(), strict=True), 1):
            names = "  x  ".join(" ".join(operand) or "1" for operand in step.operands)
            shape = "(" + ", ".join(str(sizes[index]) for index in step.result) + ")"
            rows.append((str(k), f"{names} -> {' '.join(step.result)}", shape, f"{cost.flops:,}", f"{cost.bytes():,}"))
        a, b, c, d, e = (max(len(row[column]) for row in rows) for column in range(5))
        lines = [
            f"{n:{a}}  {names:{b}}  {shape:{c}}  {flops:>{d}}  {moved:>{e}}" for n, names, shape, flops, moved in rows
        ]
        total = (
            f"total: {self.flops:,} FLOPs, {self.cost.bytes():,} bytes; largest intermediate: {self.largest:,} elements"
        )
        return "\n".join([*lines, total])


@lru_cache(maxsize=4096)
def plan(terms: tuple[tuple[str, ...], ...], output: tuple[str, ...], sizes: tuple[tuple[str, int], ...]) -> Plan:
    """Find the cheapest pairwise order.

    Every order is tried for up to nine operands (dynamic programming over subsets); more are contracted greedily
    down to nine. Orders are compared by `Cost.score`.

    Parameters
    ----------
    terms : tuple of tuple of str
        The index names of each operand. An index may sit on any number of operands.
    output : tuple of str
        The indices that are kept, in the order wanted; every other index is summed.
    sizes : tuple of (str, int)
        The size of each index.

    Returns
    -------
    Plan

    Examples
    --------
    >>> p = plan((("n", "i"), ("i", "r"), ("r", "o")), ("n", "o"), (("n", 64), ("i", 768), ("r", 8), ("o", 768)))
    >>> [step.equation for step in p.steps]
    ['ab,bc->ac', 'ab,ca->cb']
    >>> p.flops, p.largest
    (1572864, 512)
    """
    missing = set(output).difference(*terms)
    if missing:
        raise NetworkError(f"output {output}: every index sits on an operand; {sorted(missing)} do not")
    size = dict(sizes)
    pairs = _greedy(list(terms), set(output), size) if len(terms) > _EXACT else []
    live = list(terms)
    for left, right in pairs:
        _merge(live, left, right, set(output))
    pairs += _optimal(live, set(output), size)
    return Plan(terms, output, sizes, _steps(terms, output, pairs))


def _kept(left: Sequence[str], right: Sequence[str], needed: set[str]) -> tuple[str, ...]:
    return tuple(index for index in dict.fromkeys((*left, *right)) if index in needed)


def _merge(live: list[tuple[str, ...]], left: int, right: int, output: set[str]) -> tuple[str, ...]:
    """Contract two entries of `live` in place; the result goes to the end."""
    a, b = live[left], live[right]
    for position in sorted((left, right), reverse=True):
        del live[position]
    result = _kept(a, b, output.union(*live))
    live.append(result)
    return result


def _greedy(terms: list[tuple[str, ...]], output: set[str], size: Mapping[str, int]) -> list[tuple[int, int]]:
    """Take the pair that grows the live data least, until few enough operands are left to try every order."""
    live, pairs = list(terms), []
    while len(live) > _EXACT:
        best: tuple[tuple[bool, int, int], int, int] | None = None
        for right in range(1, len(live)):
            for left in range(right):
                a, b = live[left], live[right]
                others = [term for k, term in enumerate(live) if k not in (left, right)]
                result = volume(_kept(a, b, output.union(*others)), size)
                growth = result - volume(a, size) - volume(b, size)
                key = (not set(a) & set(b), growth, volume({*a, *b}, size))
                if best is None or key < best[0]:
                    best = (key, left, right)
        assert best is not None
        pairs.append(best[1:])
        _merge(live, best[1], best[2], output)
    return pairs


def _optimal(terms: list[tuple[str, ...]], output: set[str], size: Mapping[str, int]) -> list[tuple[int, int]]:
    """Dynamic programming over subsets of the operands, as bit masks of operands and of indices."""
    count = len(terms)
    bit = {index: 1 << k for k, index in enumerate(dict.fromkeys(index for term in terms for index in term))}
    masks = [sum(bit[index] for index in term) for term in terms]
    keep = sum(bit[index] for index in output)
    full = (1 << count) - 1
    union = [0] * (full + 1)
    for subset in range(1, full + 1):
        low = subset & -subset
        union[subset] = union[subset ^ low] | masks[low.bit_length() - 1]
    result = [union[subset] & (union[full ^ subset] | keep) for subset in range(full + 1)]
    for k in range(count):
        result[1 << k] = masks[k]
    volumes: dict[int, int] = {}

    def elements(mask: int) -> int:
        if mask not in volumes:
            product = 1
            for index, b in bit.items():
                if mask & b:
                    product *= size[index]
            volumes[mask] = product
        return volumes[mask]

    best = [0 if subset & (subset - 1) == 0 else -1 for subset in range(full + 1)]
    split = [0] * (full + 1)
    for subset in range(1, full + 1):
        if best[subset] == 0:
            continue
        moved = elements(result[subset])
        left = (subset - 1) & subset
        while left:
            right = subset ^ left
            if left > right:
                flops = 2 * elements(result[left] | result[right])
                score = best[left] + best[right] + flops + moved + elements(result[left]) + elements(result[right])
                if best[subset] < 0 or score < best[subset]:
                    best[subset], split[subset] = score, left
            left = (left - 1) & subset

    pairs: list[tuple[int, int]] = []
    live = [1 << k for k in range(count)]

    def emit(subset: int) -> None:
        if subset & (subset - 1) == 0:
            return
        halves = (split[subset], subset ^ split[subset])
        for half in halves:
            emit(half)
        left, right = sorted(live.index(half) for half in halves)
        pairs.append((left, right))
        del live[right], live[left]
        live.append(subset)

    emit(full)
    return pairs


def _steps(
    terms: tuple[tuple[str, ...], ...], output: tuple[str, ...], pairs: list[tuple[int, int]]
) -> tuple[Step, ...]:
    if len(terms) == 1:
        return (Step(0, 0, terms, output, _equation(terms, output), False, output),)
    live, steps = list(terms), []
    for number, (left, right) in enumerate(pairs, 1):
        operands = (live[left], live[right])
        result = _merge(live, left, right, set(output))
        if number == len(pairs):
            result = output
        is_product = set(result) == {*operands[0], *operands[1]}
        natural = result if is_product else _natural(*operands, result)
        steps.append(Step(left, right, operands, result, _equation(operands, result), is_product, natural))
    return tuple(steps)


def _natural(left: tuple[str, ...], right: tuple[str, ...], result: tuple[str, ...]) -> tuple[str, ...]:
    """Batch, rows and columns of a matrix product; or its transpose, if it has no batch and that is the result."""
    batch = tuple(index for index in result if index in left and index in right)
    rows, columns = (tuple(index for index in result if index not in other) for other in (right, left))
    return result if result == (*columns, *rows) else (*batch, *rows, *columns)


def _equation(operands: Sequence[Sequence[str]], result: Sequence[str]) -> str:
    if len(set().union(*operands)) > len(string.ascii_letters):
        raise NetworkError(f"a contraction step has at most {len(string.ascii_letters)} indices; got {operands}")
    letters = dict(zip(dict.fromkeys(index for term in operands for index in term), string.ascii_letters, strict=False))
    left = ",".join("".join(letters[index] for index in term) for term in operands)
    return f"{left}->{''.join(letters[index] for index in result)}"


def execute(plan: Plan, operands: Sequence[Tensor]) -> Tensor:
    """Carry out a plan: one two-operand einsum a step.

    Parameters
    ----------
    plan : Plan
    operands : sequence of Tensor
        One for each of `plan.terms`, axes in that order.

    Returns
    -------
    Tensor
        Axes in the order of `plan.output`; the dtype and device of the operands.
    """
    live = list(operands)
    for step in plan.steps:
        if step.left == step.right:
            return torch.einsum(step.equation, live[0])
        right = live.pop(step.right)
        left = live.pop(step.left)
        live.append(pair(step, left, right))
    return live[0]


def pair(step: Step, left: Tensor, right: Tensor) -> Tensor:
    """One step of a plan. A product that sums nothing (Kronecker, Khatri-Rao) is an elementwise one, and faster so."""
    if not step.is_product:
        return torch.einsum(step.equation, left, right)
    return _spread(left, step.operands[0], step.result) * _spread(right, step.operands[1], step.result)


def _spread(tensor: Tensor, indices: tuple[str, ...], result: tuple[str, ...]) -> Tensor:
    """A tensor with its axes in the order of the result, those that it lacks of size 1."""
    order = [indices.index(index) for index in result if index in indices]
    if order != sorted(order):
        tensor = tensor.permute(order)
    for position, index in enumerate(result):
        if index not in indices:
            tensor = tensor.unsqueeze(position)
    return tensor


def contract(
    terms: Sequence[Sequence[str]], output: Sequence[str], operands: Sequence[Tensor], sizes: Mapping[str, int]
) -> Tensor:
    """Plan (cached) and execute in one call; the sizes of all indices are given by name."""
    names = tuple(tuple(term) for term in terms)
    used = dict.fromkeys(index for term in names for index in term)
    return execute(plan(names, tuple(output), tuple((index, sizes[index]) for index in used)), operands)


def batch_class(batch: int, classes: Sequence[int] = BATCH_CLASSES) -> int:
    """The batch size whose contraction order a batch of this many rows takes."""
    # An exported graph serves every batch, so it must not branch on the one it was traced with.
    if torch.compiler.is_exporting():
        return classes[2]
    for size in classes:
        if batch <= size:
            return size
    return classes[-1]


def constant_when_compiled(function: _F) -> _F:
    """Let torch.compile call a function while it traces and keep the result, rather than trace into it."""
    # What torch.compiler.assume_constant_result does, without importing the compiler (seconds) with this package.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_when_compiled
def linear_plan(network: Network, batch: int) -> Plan:
    """The plan of a linear layer's product, x of (batch, *in modes) with all cores, for a batch class."""
    terms = ((BATCH, *network.names("in")), *network.cores)
    return plan(terms, (BATCH, *network.names("out")), (*network.sizes, (BATCH, batch)))


@constant_when_compiled
def dense_plan(network: Network) -> Plan:
    """The plan of the dense weight: all cores, the modes kept."""
    return plan(network.cores, tuple(mode.name for mode in network.modes), network.sizes)


def to_dense(network: Network, cores: Sequence[Tensor]) -> Tensor:
    """The tensorized dense weight, of shape `network.shape`."""
    check_cores(network, cores)
    return execute(dense_plan(network), cores)


def dense_weight(network: Network, cores: Sequence[Tensor], axes: Sequence[Axis]) -> Tensor:
    """The dense weight with its modes joined to axes, padding cut off; shape: the sizes of `axes`."""
    # Of a list: torch.compile does not trace the product of a generator.
    joined = [math.prod([mode.size for mode in modes]) for modes in modes_by_axis(axes, network)]
    dense = to_dense(network, cores).reshape(joined)
    return dense[tuple(slice(axis.size) for axis in axes)].contiguous()


def check_cores(network: Network, cores: Sequence[Tensor]) -> None:
    """Raise `NetworkError` where the shapes of `cores` are not `network.core_shapes`."""
    shapes = tuple(tuple(core.shape) for core in cores)
    if shapes != network.core_shapes:
        raise NetworkError(f"cores: shapes are {network.core_shapes}; got {shapes}")


def squared_norm(network: Network, cores: Sequence[Tensor]) -> Tensor:
    """The squared Frobenius norm of the dense weight, by contracting the network with itself (0-d tensor).

    The modes of `cores` may be cut to slices of the network's: the order is planned for the whole.
    """
    bonds = set(network.bonds)
    copies = tuple(tuple(f"{index}'" if index in bonds else index for index in core) for core in network.cores)
    sizes = {**network.size, **{f"{bond}'": network.size[bond] for bond in bonds}}
    return contract((*network.cores, *copies), (), (*cores, *cores), sizes)


def total(network: Network, cores: Sequence[Tensor]) -> Tensor:
    """The sum of all entries of the dense weight (0-d tensor). The modes of `cores` may be cut, as above."""
    return contract(network.cores, (), cores, network.size)
