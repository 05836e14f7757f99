"""A product as the sum of those of slices along a bond, where cores that are multiplied with each other would take more
memory than the dense weight: the Khatri-Rao products of a CP whose rank is high."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .network import Network
from .program import KernelProgram, Program


class Slice(NamedTuple):
    """Some of the values of a bond.

    Parameters
    ----------
    network : Network
        With the bond as small as that.
    bond : str
    start, length : int
    """

    network: Network
    bond: str
    start: int
    length: int

    def carries(self, core: int) -> bool:
        """Whether a core has the bond."""
        return self.bond in self.network.cores[core]

    def of(self, core: int, tensor: Tensor) -> Tensor:
        """This part of a core, or of its gradient, as a view; the whole where it does not carry the bond."""
        if not self.carries(core):
            return tensor
        return tensor.narrow(self.network.cores[core].index(self.bond), self.start, self.length)

    def cores(self, cores: Sequence[Tensor]) -> list[Tensor]:
        """This part of each core."""
        return [self.of(k, core) for k, core in enumerate(cores)]

    def add(
        self,
        gradients: Sequence[Tensor | None],  # of each core's part
        sums: list[Tensor | None],  # of those before
        cores: Sequence[Tensor],  # of the whole
    ) -> None:
        """Add the gradients of this slice's cores to those of the slices before."""
        for k, gradient in enumerate(gradients):
            if gradient is None:
                continue
            total = sums[k]
            if self.carries(k):
                total = sums[k] = torch.empty_like(cores[k]) if total is None else total
                self.of(k, total).copy_(gradient)
            else:
                sums[k] = gradient if total is None else total.add_(gradient)


@lru_cache(maxsize=1024)
def slices(network: Network, program: Program | KernelProgram) -> tuple[Slice, ...]:
    """The slices that a program's product is summed over; none where the whole takes no more than the dense weight.

    Parameters
    ----------
    network : Network
    program : Program or KernelProgram
        What would run for the whole.
    """
    if isinstance(program, KernelProgram):
        return ()
    merged = [step.group for step in program.steps if step.group.merge is not None]
    elements = sum(math.prod(group.sizes) for group in merged)
    dense = network.features("out") * network.features("in")
    if elements <= dense or len(program.steps) == 1:  # a single step is the dense weight itself
        return ()
    carried = dict.fromkeys(network.bonds, 0)
    for group in merged:
        assert group.merge is not None
        for bond in carried.keys() & set(group.merge.output):
            carried[bond] += math.prod(group.sizes)
    bond = max(carried, key=carried.__getitem__)
    size = network.size[bond]
    count = min(size, math.ceil(elements / dense))
    bounds = [size * k // count for k in range(count + 1)]
    found = []
    for start, stop in itertools.pairwise(bounds):
        ranks = [
            stop - start if name == bond else rank for name, rank in zip(network.bonds, network.ranks, strict=True)
        ]
        found.append(Slice(network.with_ranks(ranks), bond, start, stop - start))
    return tuple(found) if count > 1 else ()
