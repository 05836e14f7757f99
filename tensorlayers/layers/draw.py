"""Drawing cores so that this draw's dense weight has a wanted standard deviation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .. import contraction
from ..network import Network
from ..precision import at_least_single


def cores(
    network: Network, like: Sequence[Tensor], wanted: float, boxes: Sequence[Mapping[str, slice]], count: int
) -> list[Tensor]:
    """Draw cores uniformly and scale them together.

    Parameters
    ----------
    network : Network
    like : sequence of Tensor
        Whose device and dtype to take; float32 at least, as the deviation is measured before rounding.
    wanted : float
        The standard deviation of the dense weight.
    boxes : sequence of mapping
        Slices of the modes that together cover the dense weight without its padding, each entry once.
    count : int
        The entries of the dense weight without its padding.

    Returns
    -------
    list of Tensor
        Shapes ``network.core_shapes``.
    """
    wide = at_least_single(like[0].dtype)
    bound = math.sqrt(3) * network.core_std(wanted)
    drawn = [torch.empty(core.shape, dtype=wide, device=core.device).uniform_(-bound, bound) for core in like]
    factor = (wanted / _deviation(network, drawn, boxes, count)) ** (1 / len(drawn))
    return [core * factor for core in drawn]


def _deviation(network: Network, cores: Sequence[Tensor], boxes: Sequence[Mapping[str, slice]], count: int) -> Tensor:
    """The standard deviation of the dense weight of these cores, without building it (0-d; nothing is read)."""
    squares = entries = cores[0].new_zeros(())
    for box in boxes:
        cut = [
            core[tuple(box.get(index, slice(None)) for index in names)]
            for names, core in zip(network.cores, cores, strict=True)
        ]
        squares = squares + contraction.squared_norm(network, cut)
        entries = entries + contraction.total(network, cut)
    variance = (squares - entries**2 / count) / max(count - 1, 1)
    # A draw that is constant has no deviation to scale; its size is what there is.
    return torch.where(variance > 1e-6 * squares / count, variance, squares / count).sqrt()
