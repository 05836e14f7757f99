"""ModeProducts: one matrix a mode, without bonds: the Kronecker product. The layout of a tensor contraction layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..als import least_squares
from ..errors import FormatError, RankError
from ..network import Axis, Mode, Network, modes_of
from ..rank import Rank
from .base import Format, names_by_role


@dataclass(frozen=True)
class ModeProducts(Format):
    r"""A matrix for each mode, :math:`W[o, i] = A_1[o_1, i_1] A_2[o_2, i_2] \cdots`: a Kronecker product.

    Not listed among the formats that a layer chooses from: it has no rank, so its size follows from the shape alone.

    Parameters
    ----------
    rank : int
        1; there is no bond.
    in_modes, out_modes : tuple of int, optional
        See `Format`.

    References
    ----------
    Kossaifi et al. 2017, Tensor contraction layers for parsimonious deep nets; Van Loan 2000, The ubiquitous
    Kronecker product (the nearest one).
    """

    rank: Rank = 1
    name: ClassVar[str] = "mode_products"
    listed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank != 1 or isinstance(self.rank, float):
            raise RankError(f"rank {self.rank!r}: mode products have no bond, and only rank 1")

    def layout(self, modes: Sequence[Mode]) -> tuple[tuple[str, ...], ...]:
        stack, outs, ins = (names_by_role(modes, role) for role in ("stack", "out", "in"))
        return tuple((*stack, out, into) for out, into in zip(outs, ins, strict=True))

    def resolve(self, axes: Sequence[Axis]) -> tuple[Network, tuple[str, ...]]:
        modes = modes_of(axes, self._splits(axes))
        outs, ins = (tuple(mode.size for mode in modes if mode.role == role) for role in ("out", "in"))
        others = sorted({mode.role for mode in modes} - {"out", "in", "stack"})
        if len(outs) != len(ins) or others:
            got = f"{len(outs)} of {outs} and {len(ins)} of {ins}" + "".join(f", and {role} modes" for role in others)
            raise FormatError(f"mode products: as many out modes as in modes, and no others; got {got}")
        return Network(self.layout(modes), (), modes), ()

    def fill(self, dense: Tensor, network: Network) -> list[Tensor]:
        names = [mode.name for mode in network.modes]
        start = []
        for core, shape in zip(network.cores, network.core_shapes, strict=True):
            others = [name for name in names if name not in core]
            unfolding = dense.permute([names.index(name) for name in (*core, *others)]).flatten(0, len(core) - 1)
            start.append(torch.linalg.svd(unfolding.flatten(1), full_matrices=False)[0][:, 0].reshape(shape))
        cores, _ = least_squares(network, dense, start)
        norms = torch.stack([torch.linalg.vector_norm(core) for core in cores])
        mean = norms.log().mean().exp()  # without a bond, balance has nothing to even out
        return [core * (mean / norm) for core, norm in zip(cores, norms, strict=True)]

    def pin(self, network: Network) -> Format:
        return dataclasses.replace(self, in_modes=network.mode_sizes("in"), out_modes=network.mode_sizes("out"))
