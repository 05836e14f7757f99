"""TT: tensor train; on a linear layer the TT-matrix, one out and one in mode on each core; else a chain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..fit import sequential_svd
from ..network import Mode, Network
from .base import Format, names_by_role


@dataclass(frozen=True)
class TT(Format):
    r"""Tensor train (TT-matrix), :math:`W[o, i] = G_1[o_1, i_1] G_2[o_2, i_2] \cdots G_d[o_d, i_d]`.

    On a convolution it is a chain, :math:`W[o, i, k_1, k_2] = G_1[i] G_2[k_1] G_3[k_2] G_4[o]`.

    A format of extreme compression (50x-1000x): above that it has more FLOPs than the dense layer.
    With unequal numbers of in and out modes the shorter side's missing modes are left out of the last cores.

    Parameters
    ----------
    rank : int, float or tuple of int
        The TT-ranks; see `Format`.
    order : int
        Modes a side.
    in_modes, out_modes : tuple of int, optional
        Default: balanced; the channels of a convolution are not split.

    References
    ----------
    Oseledets 2011, Tensor-train decomposition; Novikov et al. 2015, Tensorizing neural networks, eq. 3.

    Examples
    --------
    >>> TT(8).network(768, 3072).core_shapes
    ((24, 48, 8), (8, 32, 64))
    """

    order: int = 2  # type: ignore[misc]
    name: ClassVar[str] = "tt"

    def layout(self, modes: Sequence[Mode]) -> tuple[tuple[str, ...], ...]:
        outs, ins = names_by_role(modes, "out"), names_by_role(modes, "in")
        kernel, stack = names_by_role(modes, "kernel"), names_by_role(modes, "stack")
        sites = [[name] for name in stack]
        if kernel or len(outs) == len(ins) == 1:
            sites += [[name] for name in (*ins, *kernel, *outs)]
        else:
            sites += [outs[k : k + 1] + ins[k : k + 1] for k in range(max(len(outs), len(ins)))]
        bonds = [f"r{k}" for k in range(1, len(sites))]
        return tuple((*bonds[max(k - 1, 0) : k], *site, *bonds[k : k + 1]) for k, site in enumerate(sites))

    def fill(self, dense: Tensor, network: Network) -> list[Tensor]:
        return sequential_svd(dense, network)
