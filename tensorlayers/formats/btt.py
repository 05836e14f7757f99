"""BTT: block tensor train (at order 2: Monarch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .. import tensorize
from ..fit import sequential_svd
from ..network import Axis, Mode, Network
from .base import Format, names_by_role


@dataclass(frozen=True)
class BTT(Format):
    r"""Block tensor train, :math:`W[o_1 o_2, i_1 i_2] = \sum_r C_2[i_1, o_1, o_2, r]\, C_1[i_1, i_2, o_2, r]`.

    At order c, core t carries the modes i_1..i_(c-t+1), o_(c-t+1)..o_c and the bonds r_(t-1), r_t: a mode on two
    cores is a batch of blocks. FLOPs fall exactly as parameters do, and the product is a batched matrix product.

    Parameters
    ----------
    rank : int, float or tuple of int
        See `Format`.
    order : int
        Modes a side. With unequal numbers of in and out modes, the missing modes are left out of their cores.
    in_modes, out_modes : tuple of int, optional
        Default: the blocks' inner width is at least 128 where the layer is that wide, e.g. in (4, 192), out (192, 4).

    On a convolution the channels are split likewise, and the core of all in modes carries the kernel.

    References
    ----------
    Dao et al. 2022, Monarch; Qiu et al. 2024, Compute better spent: replacing dense layers with structured matrices.

    Examples
    --------
    >>> BTT(3).network(768, 768).core_shapes
    ((4, 192, 4, 3), (4, 192, 4, 3))
    """

    order: int = 2  # type: ignore[misc]
    name: ClassVar[str] = "btt"

    def default_modes(self, axis: Axis) -> tuple[int, ...]:
        modes = tensorize.skewed_modes(axis.size, self.order)
        return modes if axis.role == "in" else modes[::-1]

    def layout(self, modes: Sequence[Mode]) -> tuple[tuple[str, ...], ...]:
        outs, ins = names_by_role(modes, "out"), names_by_role(modes, "in")
        order = max(len(outs), len(ins))
        missing = order - len(ins)  # a missing out mode is the last, a missing in mode the first: so they mirror
        cores = []
        # A kernel goes with all in modes, as a convolution of blocks; a stack shares the other cores.
        others = [*names_by_role(modes, "kernel"), *names_by_role(modes, "stack")]
        for t in range(1, order + 1):
            last = order - t + 1
            bonds = [f"r{k}" for k in (t - 1, t) if 0 < k < order]
            carried, brought = ins[: max(last - missing, 0)], outs[last - 1 :]
            if t == 1:
                cores.append((*carried, *brought, *bonds, *others))
            else:  # batch, new and summed indices each together: a stack of matrices as it is stored
                summed = carried[last - missing - 1 :] if last > missing else []
                kept = carried[: len(carried) - len(summed)]
                cores.append((*kept, *brought[1:], *brought[:1], *bonds[1:], *summed, *bonds[:1]))
        return tuple(cores)

    def fill(self, dense: Tensor, network: Network) -> list[Tensor]:
        return sequential_svd(dense, network)
