"""LowRank: a product of two matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from ..errors import FormatError
from ..fit import sequential_svd
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
    split : {"channel", "spatial"}
        Of a convolution: all of the kernel with the in channels (kxk, then 1x1), or the first half of its dimensions
        with the in and the rest with the out channels (kx1, then 1xk).

    References
    ----------
    Jaderberg et al. 2014, Speeding up convolutional neural networks with low rank expansions, scheme 2 (spatial);
    Zhang et al. 2015, Accelerating very deep convolutional networks (channel).

    Examples
    --------
    >>> LowRank(0.25).network(768, 768).ranks
    (96,)
    """

    split: str = field(default="channel", kw_only=True)
    name: ClassVar[str] = "lowrank"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split not in ("channel", "spatial"):
            raise FormatError(f"LowRank: a split is 'channel' or 'spatial'; got {self.split!r}")

    def layout(self, modes: Sequence[Mode]) -> tuple[tuple[str, ...], ...]:
        kernel = names_by_role(modes, "kernel")
        first = len(kernel) if self.split == "channel" else -(-len(kernel) // 2)
        left = (*names_by_role(modes, "stack"), *names_by_role(modes, "out"), *kernel[first:], "r")
        return left, ("r", *names_by_role(modes, "in"), *kernel[:first])

    def fill(self, dense: Tensor, network: Network) -> list[Tensor]:
        return sequential_svd(dense, network)
