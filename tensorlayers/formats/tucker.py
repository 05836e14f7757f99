"""Tucker: a factor matrix a mode, and a core tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..fit import tucker
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
        Default: balanced; the channels of a convolution are not split.
    spatial : bool
        Factorize the kernel's dimensions too. By default a convolution becomes 1x1, kxk, 1x1 (Tucker-2).

    References
    ----------
    De Lathauwer et al. 2000, On the best rank-1 and rank-(R1,...,RN) approximation of higher-order tensors;
    Kim et al. 2016, Compression of deep convolutional neural networks for fast and low power mobile applications.

    Examples
    --------
    >>> Tucker((8, 8, 12, 12)).network(768, 768).core_shapes
    ((24, 8), (32, 8), (8, 8, 12, 12), (12, 24), (12, 32))
    """

    order: int = 2  # type: ignore[misc]
    spatial: bool = False
    name: ClassVar[str] = "tucker"

    def layout(self, modes: Sequence[Mode]) -> tuple[tuple[str, ...], ...]:
        whole = () if self.spatial else tuple(names_by_role(modes, "kernel"))
        outs = (*names_by_role(modes, "stack"), *names_by_role(modes, "out"))
        ins = [mode.name for mode in modes if mode.name not in (*outs, *whole)]
        core = tuple(f"r_{name}" for name in (*outs, *ins))
        return (*((name, f"r_{name}") for name in outs), (*core, *whole), *((f"r_{name}", name) for name in ins))

    def fill(self, dense: Tensor, network: Network) -> list[Tensor]:
        names = [mode.name for mode in network.modes]
        ranks = [network.size.get(f"r_{name}", network.size[name]) for name in names]
        core, factors = tucker(dense, ranks)
        factor = dict(zip(names, factors, strict=True))
        for position, name in enumerate(names):
            if f"r_{name}" not in network.bonds:  # a mode of the core itself: its factor is a rotation
                core = torch.tensordot(core, factor.pop(name), dims=([position], [1])).movedim(-1, position)
        filled = []
        for indices in network.cores:
            free = [index for index in indices if index in factor]
            if not free:
                core = core.permute([names.index(index.removeprefix("r_")) for index in indices])
                filled.append(core)
            else:
                filled.append(factor[free[0]] if indices[0] == free[0] else factor[free[0]].T)
        return filled
