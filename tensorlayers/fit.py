"""Fitting cores to a dense tensor: sequential SVD, Tucker and CP. Least squares over any network: see als.py.

TensorLy does what it can do well; what it does not guard is guarded here: ranks are clamped, weights are normalised by
the caller (regularisation is absolute there), random starts come from torch's generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import tensorly
import torch
import torch.nn.functional as F
from tensorly.decomposition import tucker as tensorly_tucker
from torch import Tensor

from .als import RIDGE, least_squares
from .decompose import balance
from .network import Network

_COMPONENT_BOUND = 3.0
"""CP: the root sum of squares of the components' norms stays below this many times the tensor's norm."""


def sequential_svd(dense: Tensor, network: Network) -> list[Tensor]:
    """Fill a chain of cores by truncated SVDs, one bond after the other (TT-SVD, and its block form).

    At each core, its modes that also sit on later cores are a batch: each of their values has an SVD of its own.
    One bond joins each core to the next. Exact where no rank truncates; optimal for one bond, and within
    sqrt(bonds) of the optimum otherwise.

    Parameters
    ----------
    dense : Tensor
        Shape ``network.shape``.
    network : Network
        Every core but the last brings in one new bond.

    Returns
    -------
    list of Tensor
        Shapes ``network.core_shapes``.

    References
    ----------
    Oseledets 2011, Tensor-train decomposition, algorithm 1.
    """
    names = [mode.name for mode in network.modes]
    rest, cores = dense, []
    for position, core in enumerate(network.cores[:-1]):
        later = {index for other in network.cores[position + 1 :] for index in other}
        (bond,) = [index for index in core if index not in names]
        batch = [index for index in core if index in names and index in later]
        rows = [index for index in core if index in names and index not in later]
        columns = [index for index in names if index not in core]
        sizes = network.size
        rest = rest.permute([names.index(index) for index in (*batch, *rows, *columns)])
        rest = rest.reshape(
            math.prod(sizes[index] for index in batch),
            math.prod(sizes[index] for index in rows),
            math.prod(sizes[index] for index in columns),
        )
        rank = sizes[bond]
        left, right = _best_factors(rest, rank)
        order = [*batch, *rows, bond]
        left = left.reshape([sizes[index] for index in order])
        cores.append(left.permute([order.index(index) for index in core]))
        names = [*batch, bond, *columns]
        rest = right.reshape([sizes[index] for index in names])
    return [*cores, rest.permute([names.index(index) for index in network.cores[-1]])]


def _best_factors(
    matrix: Tensor,  # (..., m, n)
    rank: int,  # beyond min(m, n) it is that
) -> tuple[Tensor, Tensor]:  # (..., m, rank) with orthonormal columns, (..., rank, n)
    """Truncated SVD, the singular values with the right factor."""
    m, n = matrix.shape[-2:]
    if matrix.dtype == torch.float32 and max(m, n) >= 2 * min(m, n):
        # The eigenvectors of the smaller Gram matrix in float64: as good in float32, and ten times as fast.
        wide = matrix.double() if m < n else matrix.double().mT
        vectors = torch.linalg.eigh(wide @ wide.mT)[1].flip(-1)[..., :rank].to(matrix.dtype)
        if m < n:
            return vectors, vectors.mT @ matrix
        left, right = torch.linalg.qr(matrix @ vectors)
        return left, right @ vectors.mT
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[..., :rank], values[..., :rank, None] * right[..., :rank, :]


def _start(matrix: Tensor, n_eigenvecs: int, **options: object) -> tuple[Tensor, Tensor, Tensor]:
    """`_best_factors` as TensorLy calls it for the start of Tucker; of the three it uses the first."""
    left, right = _best_factors(matrix, n_eigenvecs)
    return left, torch.linalg.vector_norm(right, dim=1), right


def tucker(dense: Tensor, ranks: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """TensorLy's higher-order orthogonal iteration.

    Parameters
    ----------
    dense : Tensor
        Shape (n_1, ..., n_d), norm 1.
    ranks : sequence of int
        One a mode. Lowered to its size and to the product of the others, by which nothing is lost: beyond, TensorLy
        0.10 returns garbage without a word.

    Returns
    -------
    core : Tensor
        Shape `ranks`, as lowered.
    factors : list of Tensor
        Shapes (n_k, r_k), orthonormal columns.
    """
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        core, factors = tensorly_tucker(
            dense, rank=_multilinear(ranks, dense.shape), n_iter_max=10, tol=1e-4, svd=_start
        )
    return core, list(factors)


def cp(dense: Tensor, network: Network) -> list[Tensor]:
    """CP by alternating least squares, on the Tucker-compressed tensor where that is smaller.

    At the largest useful rank the decomposition is written down, not fitted. The components' norms are bounded
    (degenerate fits have huge components that cancel): a fit beyond the bound is repeated with more ridge.

    Parameters
    ----------
    dense : Tensor
        Shape ``network.shape``, norm 1.
    network : Network
        One core (mode, bond) a mode.

    Returns
    -------
    list of Tensor
        Shapes (n_k, R).

    References
    ----------
    Kolda and Bader 2009, section 3.4; Phan et al. 2020, Stable low-rank tensor decomposition (the bound).
    """
    (rank,) = network.ranks
    if rank >= network.rank_limit(network.bonds[0]):
        return _cp_exact(dense)
    small = tuple(min(size, rank) for size in dense.shape)
    compressed, bases = (dense, None) if small == tuple(dense.shape) else tucker(dense, small)
    modes = tuple(replace(mode, size=size) for mode, size in zip(network.modes, compressed.shape, strict=True))
    inner = Network(network.cores, ((network.bonds[0], rank),), modes)
    start = balance(inner, [_leading(compressed, k, rank) for k in range(compressed.dim())])
    ridge = RIDGE
    while True:
        cores, _ = least_squares(inner, compressed, start, ridge=ridge)
        if bases is not None:
            # The best subspaces for Tucker are not the best for CP: a few sweeps on the whole tensor.
            cores = [basis @ core for basis, core in zip(bases, cores, strict=True)]
            cores, _ = least_squares(network, dense, cores, ridge=ridge, sweeps=10)
        norms = torch.stack([torch.linalg.vector_norm(core, dim=0) for core in cores]).prod(dim=0)
        if float(torch.linalg.vector_norm(norms)) <= _COMPONENT_BOUND or ridge > 1:
            return cores
        ridge *= 30


def _multilinear(ranks: Sequence[int], shape: Sequence[int]) -> list[int]:
    """Clamp a multilinear rank: no entry exceeds its mode, or the product of the others."""
    clamped = [min(pair) for pair in zip(ranks, shape, strict=True)]
    for k in range(len(clamped)):
        clamped[k] = min(clamped[k], math.prod(clamped[:k] + clamped[k + 1 :]))
    return clamped


def _leading(dense: Tensor, k: int, rank: int) -> Tensor:
    """A start for CP: leading left singular vectors of the mode-k unfolding, random where they are too few."""
    unfolding = dense.movedim(k, 0).flatten(1)
    vectors = _best_factors(unfolding, rank)[0]
    # torch.randn follows torch's generator; TensorLy's own initialisation takes a seed of its own.
    missing = torch.randn(dense.shape[k], rank - vectors.shape[1], dtype=dense.dtype, device=dense.device)
    columns = torch.cat([vectors, F.normalize(missing, dim=0)], dim=1)
    # Singular vectors alone may be a saddle point: those of the identity are orthogonal to it.
    return columns + 0.1 * F.normalize(torch.randn_like(columns), dim=0)


def _cp_exact(dense: Tensor) -> list[Tensor]:
    """Write a tensor as CP: the factor of the largest mode is its unfolding, the others are one-hot."""
    largest = max(range(dense.dim()), key=lambda k: dense.shape[k])
    others = [k for k in range(dense.dim()) if k != largest]
    unfolding = dense.movedim(largest, 0).flatten(1)
    grid = torch.cartesian_prod(*(torch.arange(dense.shape[k], device=dense.device) for k in others))
    grid = grid.reshape(unfolding.shape[1], len(others))
    factors: list[Tensor] = [unfolding] * dense.dim()
    for column, k in enumerate(others):
        factors[k] = F.one_hot(grid[:, column], dense.shape[k]).T.to(dense.dtype)
    return factors
