"""What a contraction costs: FLOPs and elements moved. Counts only; `decision` predicts times."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

SLOWER = 1.05
"""A layer predicted to cost more than this many times the dense layer is left dense by default."""


@dataclass(frozen=True)
class Cost:
    """The cost of a computation.

    Parameters
    ----------
    flops : int
        Floating-point operations; a multiply-accumulate (MAC) counts as 2.
    elements : int
        Array elements read and written, each operand and each result once.
    """

    flops: int = 0
    elements: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.elements + other.elements)

    def __mul__(self, times: int) -> Cost:
        return Cost(self.flops * times, self.elements * times)

    @property
    def macs(self) -> int:
        """Multiply-accumulates: half the FLOPs."""
        return self.flops // 2

    def bytes(self, itemsize: int = 4) -> int:
        """Bytes moved, at `itemsize` bytes an element."""
        return self.elements * itemsize

    @property
    def score(self) -> int:
        """What contraction orders are compared by: FLOPs, an element moved counted as one."""
        return self.flops + self.elements


def volume(indices: Iterable[str], sizes: Mapping[str, int]) -> int:
    """The number of elements of a tensor with these indices."""
    return math.prod(sizes[index] for index in indices)


def pair_cost(left: Iterable[str], right: Iterable[str], result: Iterable[str], sizes: Mapping[str, int]) -> Cost:
    """The cost of contracting two tensors to `result`: one MAC for each value of all their indices together."""
    left, right = set(left), set(right)
    moved = volume(left, sizes) + volume(right, sizes) + volume(result, sizes)
    return Cost(2 * volume(left | right, sizes), moved)


def dense_linear(out_features: int, in_features: int, batch: int) -> Cost:
    """The cost of a dense linear layer on `batch` rows (the bias not counted)."""
    moved = out_features * in_features + batch * (out_features + in_features)
    return Cost(2 * batch * out_features * in_features, moved)
