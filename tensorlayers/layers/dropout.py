"""Rank dropout: values of the bonds are left out of a forward at random, while the layer trains."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..errors import NetworkError
from ..network import Network


class RankDropout(nn.Module):
    """What rank dropout adds to a factorized layer."""

    own_network: Network
    _rank_dropout: float = 0.0
    _masks: tuple[tuple[int, tuple[int, ...]], ...]

    def own_cores(self) -> list[Tensor]:
        """The cores of this layer alone, shapes ``own_network.core_shapes``."""
        raise NotImplementedError

    @property
    def droppable(self) -> tuple[str, ...]:
        """The indices that `rank_dropout` acts on: the bonds."""
        return self.own_network.bonds

    @property
    def rank_dropout(self) -> float:
        """The probability that a value of a bond is left out of a forward, in training mode; 0.0 by default.

        The others are scaled so that the expected weight is the weight. Each bond is drawn for itself, once for all
        rows; a bond of a single value is never dropped. A frozen layer drops none. See `tensorlayers.rank_dropout`.
        """
        return self._rank_dropout

    @rank_dropout.setter
    def rank_dropout(self, p: float) -> None:
        if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p < 1:
            raise NetworkError(f"rank_dropout: a probability of at least 0 and below 1; got {p!r}")
        self._rank_dropout = float(p)

    def active_cores(self) -> list[Tensor]:
        """The cores that a forward multiplies with: `own_cores`, under rank dropout in training mode."""
        cores = self.own_cores()
        if not self.training or not self.rank_dropout:
            return cores
        for k, shape in self._masks:
            kept = torch.rand(math.prod(shape), device=cores[k].device, dtype=torch.float32) >= self.rank_dropout
            cores[k] = cores[k] * (kept.to(cores[k].dtype) / (1 - self.rank_dropout)).reshape(shape)
        return cores

    def _set_masks(self) -> None:
        """Where the masks act; to be called when `own_network` is new."""
        self._masks = tuple(self._mask(index) for index in self.droppable if self.own_network.size[index] > 1)

    def _mask(self, index: str) -> tuple[int, tuple[int, ...]]:
        """The smallest core that carries an index, and the shape that broadcasts a mask of the index over it."""
        own = self.own_network
        carriers = [k for k, names in enumerate(own.cores) if index in names]
        k = min(carriers, key=lambda k: math.prod(own.core_shapes[k]))
        return k, tuple(own.size[index] if name == index else 1 for name in own.cores[k])
