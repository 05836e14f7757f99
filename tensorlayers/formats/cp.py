"""CP: a sum of rank-one tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..fit import cp
from ..network import Mode, Network
from .base import Format


@dataclass(frozen=True)
class CP(Format):
    r"""Canonical polyadic decomposition, :math:`W = \sum_r a_r \circ b_r \circ c_r \cdots`, by least squares.

    A format of extreme compression: at 2x-16x its FLOPs exceed the dense layer's by far.

    Parameters
    ----------
    rank : int, float or tuple of int
        The CP rank (number of components); see `Format`.
    order : int
        Modes a side.
    in_modes, out_modes : tuple of int, optional
        Default: balanced; the channels of a convolution are not split.

    References
    ----------
    Kolda and Bader 2009, Tensor decompositions and applications, section 3.4; Lebedev et al. 2015, Speeding-up
    convolutional neural networks using fine-tuned CP-decomposition.

    Examples
    --------
    >>> CP(16).network(768, 768).core_shapes
    ((24, 16), (32, 16), (24, 16), (32, 16))
    """

    order: int = 2  # type: ignore[misc]
    name: ClassVar[str] = "cp"

    def layout(self, modes: Sequence[Mode]) -> tuple[tuple[str, ...], ...]:
        return tuple((mode.name, "r") for mode in modes)

    def fill(self, dense: Tensor, network: Network) -> list[Tensor]:
        return cp(dense, network)
