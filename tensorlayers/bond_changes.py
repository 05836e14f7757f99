"""What is done to the values of a bond where it becomes smaller, so that what belongs to a core can follow it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kept:
    """The values of a bond that remain where a network is cut to some of its slices.

    Parameters
    ----------
    batch : tuple of str
        Modes on every core that carries the bond: each of their values keeps slices of its own.
    positions : Tensor
        Shape (\\*sizes of batch, kept), integers in ascending order.
    """

    batch: tuple[str, ...]
    positions: Tensor

    def of(self, tensor: Tensor, names: Sequence[str], bond: str) -> Tensor:
        """The slices that are kept, bit for bit, of a tensor with the axes `names` of a core."""
        positions = aligned(self.positions.to(tensor.device), (*self.batch, bond), names)
        return torch.take_along_dim(tensor, positions, dim=names.index(bond))


@dataclass(frozen=True)
class Mixed:
    """How the values of a bond between two cores were combined to fewer.

    Parameters
    ----------
    batch : tuple of str
        Modes on both cores: each of their values has a matrix of its own.
    transforms : mapping
        Core -> the matrix that it was multiplied with on the bond, shape (values of batch, before, after). Those of the
        two cores are dual: the transpose of one times the other is the identity, where nothing is zero.
    """

    batch: tuple[str, ...]
    transforms: Mapping[int, Tensor]

    def of(self, core: int, tensor: Tensor, names: Sequence[str], bond: str) -> Tensor:
        """A tensor with the axes `names` of a core, changed as the core was."""
        return _multiplied(tensor, names, self.transforms[core].to(tensor), self.batch, bond)

    def gradient_of(self, core: int, tensor: Tensor, names: Sequence[str], bond: str, power: int = 1) -> Tensor:
        """A gradient of the core before, or its powers, as one of the core after: the other core's matrix applies."""
        (other,) = set(self.transforms) - {core}
        return _multiplied(tensor, names, self.transforms[other].to(tensor) ** power, self.batch, bond)


def aligned(tensor: Tensor, indices: Sequence[str], names: Sequence[str]) -> Tensor:
    """A tensor over some of the indices of a core, shaped to be broadcast over it.

    Parameters
    ----------
    tensor : Tensor
        One axis for each of `indices`.
    indices, names : sequence of str
        All of `indices` are among the core's `names`.
    """
    present = [name for name in names if name in indices]
    ordered = tensor.permute([indices.index(name) for name in present])
    return ordered.reshape([ordered.shape[present.index(name)] if name in indices else 1 for name in names])


def _multiplied(core: Tensor, names: Sequence[str], transform: Tensor, batch: Sequence[str], bond: str) -> Tensor:
    """Multiply a core with a matrix on a bond, one for each value of the batch."""
    rest = [index for index in names if index not in batch and index != bond]
    order = [*batch, *rest, bond]
    moved = core.permute([names.index(index) for index in order])
    lead, middle = moved.shape[: len(batch)], moved.shape[len(batch) : -1]
    product = moved.reshape(transform.shape[0], math.prod(middle), moved.shape[-1]) @ transform
    return product.reshape(*lead, *middle, transform.shape[-1]).permute([order.index(index) for index in names])
