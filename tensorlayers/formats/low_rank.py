"""LowRank: a product of two matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..decompose import sequential_svd
from ..network import Mode, Network
from .base import Format, names_by_role


@dataclass(frozen=True)
class LowRank(Format):
    r"""Low-rank matrix, :math:`W = \sum_r U_{:,r} V_{r,:}`, by truncated SVD: the best there is in Frobenius norm.

    The default choice at 2x-16x compression: FLOPs fall exactly as parameters do.

    Parameters
    ----------
    rank : int, float or tuple of int
        See `Format`.
    in_modes, out_modes : tuple of int, optional
        Default: not tensorized.

    Examples
    --------
    >>> LowRank(0.25).network(768, 768).ranks
    (96,)
    """

    name: ClassVar[str] = "lowrank"

    def layout(self, modes: Sequence[Mode]) -> tuple[tuple[str, ...], ...]:
        return (*names_by_role(modes, "out"), "r"), ("r", *names_by_role(modes, "in"))

    def fill(self, dense: Tensor, network: Network) -> list[Tensor]:
        return sequential_svd(dense, network)
