"""Tucker: a factor matrix a mode, and a core tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..decompose import tucker
from ..network import Mode, Network
from .base import Format, names_by_role


@dataclass(frozen=True)
class Tucker(Format):
    r"""Tucker decomposition, :math:`W = G \times_1 U_1 \times_2 U_2 \cdots`, by higher-order orthogonal iteration.

    Parameters
    ----------
    rank : int, float or tuple of int
        The multilinear rank; a tuple has the out modes' ranks first. See `Format`.
    order : int
        Modes a side.
    in_modes, out_modes : tuple of int, optional
        Default: balanced.

    References
    ----------
    De Lathauwer et al. 2000, On the best rank-1 and rank-(R1,...,RN) approximation of higher-order tensors.

    Examples
    --------
    >>> Tucker((8, 8, 12, 12)).network(768, 768).core_shapes
    ((24, 8), (32, 8), (8, 8, 12, 12), (12, 24), (12, 32))
    """

    order: int = 2  # type: ignore[misc]
    name: ClassVar[str] = "tucker"

    def layout(self, modes: Sequence[Mode]) -> tuple[tuple[str, ...], ...]:
        outs, ins = names_by_role(modes, "out"), names_by_role(modes, "in")
        core = tuple(f"r_{name}" for name in (*outs, *ins))
        return (*((name, f"r_{name}") for name in outs), core, *((f"r_{name}", name) for name in ins))

    def fill(self, dense: Tensor, network: Network) -> list[Tensor]:
        core, factors = tucker(dense, network.ranks)
        outs = len(network.names("out"))
        return [*factors[:outs], core, *(factor.T for factor in factors[outs:])]
