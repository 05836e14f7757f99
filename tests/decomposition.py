"""What the tests of decompositions share: formats, modes of a weight of 48 x 36, and the true error."""

import pytest
import torch

from tensorlayers.formats import available
from tensorlayers.testing import dense_by_hand, relative_error

FORMATS = [pytest.param(cls, id=name) for name, cls in available().items()]

MODES = {
    "2": ((6, 8), (4, 9)),
    "3": ((3, 4, 4), (4, 3, 3)),
    "4": ((2, 3, 2, 4), (3, 2, 2, 3)),
    "2x1": ((6, 8), (36,)),
    "1x2": ((48,), (4, 9)),
    "3x2": ((3, 4, 4), (4, 9)),
    "2x3": ((6, 8), (4, 3, 3)),
    "odd": ((5, 7), (3, 11)),
}
MODES_OF = [pytest.param(*modes, id=name) for name, modes in MODES.items()]
SPLIT = {"out_modes": (6, 8), "in_modes": (4, 9)}


def dense_of(decomposition, weight):
    """The dense weight of a decomposition in float64, by hand, padding cut off."""
    network = decomposition.network
    dense = dense_by_hand(network, decomposition.cores).reshape(network.features("out"), network.features("in"))
    return dense[: weight.shape[0], : weight.shape[1]]


def true_error(decomposition, weight):
    return relative_error(dense_of(decomposition, weight), weight)


def form_of(size, rank=None, decay=2.0):
    """A positive semidefinite matrix whose eigenvalues fall by so many powers of ten."""
    rank = rank or size
    vectors = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0][:, :rank]
    return (vectors * torch.logspace(0, -decay, rank, dtype=torch.float64)) @ vectors.T
