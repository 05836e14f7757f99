"""Cores that meet the rows together: their product, the gradients of each from that of the product, and the cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from . import adjoint, contraction
from .contraction import Plan
from .cost import Cost


@dataclass(frozen=True)
class Group:
    """One core, or several that are multiplied first.

    Parameters
    ----------
    cores : tuple of int
    sizes : tuple of int
        The shape of their product.
    merge : Plan or None
        How they are multiplied, where they are several.
    """

    cores: tuple[int, ...]
    sizes: tuple[int, ...]
    merge: Plan | None = None

    def cost(self, *, gradients: bool) -> Cost:
        """What it takes to multiply the cores, and, for `gradients`, to take that of the product apart."""
        if self.merge is None:
            return Cost()
        return self.merge.cost + (adjoint.cost(self.merge) if gradients else Cost())


# Functions: torch.compile does not trace the methods of a plan that it takes as a constant.
def product(group: Group, cores: Sequence[Tensor]) -> Tensor:
    """The product of a group's cores, which are among these."""
    if group.merge is None:
        return cores[group.cores[0]]
    return contraction.execute(group.merge, [cores[k] for k in group.cores])


def apart(
    group: Group, gradient: Tensor, cores: Sequence[Tensor], needs: Sequence[bool]
) -> Iterator[tuple[int, Tensor]]:
    """The gradients of a group's cores that are needed, with their numbers, from that of their product.

    Of a single core it is given, so it is needed; `needs` has an entry for each of `cores`.
    """
    if group.merge is None:
        yield group.cores[0], gradient.contiguous()
        return
    members, wanted = [cores[k] for k in group.cores], [needs[k] for k in group.cores]
    for k, found in zip(group.cores, adjoint.gradients(group.merge, members, gradient, wanted), strict=True):
        if found is not None:
            yield k, found.contiguous()
