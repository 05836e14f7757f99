"""Alternating least squares over the cores of any network, in any metric of its modes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from .decompose import balance
from .network import Network
from .normal_equations import Core, Factor, Fit

RIDGE = 1e-7
SWEEPS = 100
TOLERANCE = 1e-5


def least_squares(
    network: Network,
    dense: Tensor | tuple[Network, Sequence[Tensor]],  # shape network.shape, norm 1
    cores: Sequence[Tensor],  # shapes network.core_shapes
    *,
    metric: Sequence[Factor] = (),
    ridge: float = RIDGE,
    anchored: bool = False,
    sweeps: int = SWEEPS,
    tolerance: float = TOLERANCE,
    only: Sequence[int] | None = None,
) -> tuple[list[Tensor], float]:
    r"""Alternating least squares over the cores of any network.

    The dense weight is linear in each core: for core k, :math:`\min_X \|W - E_k X\|^2 + \lambda \|X\|^2`, where
    the environment :math:`E_k` contracts the other cores. Its normal equations follow from the index names, those of
    the metric among them: they are solved for each group of indices that nothing connects (a Kronecker product), and
    by preconditioned conjugate gradients where a group is large.

    Parameters
    ----------
    network : Network
    dense : Tensor, or (Network, sequence of Tensor)
        The weight, of norm 1 in the metric, or another network of the same modes that gives it; that is not
        contracted to it.
    cores : sequence of Tensor
        The start.
    metric : sequence of Factor
        Of distinct modes. By default the Frobenius norm.
    ridge : float
        :math:`\lambda`, relative to the mean diagonal of the normal matrix.
    anchored : bool
        Penalise the change of a core in place of its size, so that the error itself never rises.
    sweeps : int
        The most passes over the cores.
    tolerance : float
        Stop where a sweep explains less than this fraction more of the squared norm. (Of trained weights an extreme
        compression explains a few per cent: the error itself hardly moves while the fit doubles.)
    only : sequence of int, optional
        The cores to solve for; the others stay as they are, and nothing is balanced. By default all.

    Returns
    -------
    list of Tensor, float
        The cores, and their relative error in the metric.
    """
    cores = list(cores)
    fit = Fit(network, dense, tuple(metric))
    error = math.inf
    for _ in range(sweeps):
        before = error
        for k in range(len(cores)) if only is None else only:
            cores[k], error = Core(fit, cores, k).solved(ridge, anchored)
        cores = balance(network, cores) if only is None else cores
        if before**2 - error**2 <= tolerance * (1 - error**2):
            break
    return cores, error
