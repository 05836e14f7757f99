"""Rounding: lower ranks of a network, from its cores alone. The dense weight is never formed.

One algorithm, read off the index names. A bond that joins two cores is brought into its canonical gauge by the Gram
matrices of what lies on either side: on a chain this is TT-rounding, on Tucker's core HOSVD, on two matrices the SVD.
A bond that lies on more cores (CP) or on a loop is not the only link between two sides: there components are
selected, and their scales fitted again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import contraction
from .bond_changes import Kept, Mixed, aligned
from .errors import DecompositionError, RankError
from .network import Network
from .precision import without_autocast

_RIDGE = 1e-12


@dataclass(frozen=True)
class Rounding:
    """A network of smaller ranks.

    Parameters
    ----------
    network : Network
    cores : tuple of Tensor
        Shapes ``network.core_shapes``.
    kept : mapping
        The lowered bonds -> what was done to their values, in turn: slices selected, or mixed. Empty where that is not
        known.
    loose : tuple of str
        The lowered bonds of which components were selected: a fit of the cores may still lower the error.
    """

    network: Network
    cores: tuple[Tensor, ...]
    kept: Mapping[str, tuple[Kept | Mixed, ...]]
    loose: tuple[str, ...] = ()


def round_network(
    network: Network,
    cores: Sequence[Tensor],  # shapes network.core_shapes
    ranks: Sequence[int],
) -> tuple[Network, list[Tensor]]:
    r"""Lower the bonds of a network to given ranks, from the cores alone.

    A bond that alone joins two halves of the network, :math:`W = L R^T`, is truncated optimally: with the Gram
    matrices :math:`L^T L = S_L^2`, :math:`R^T R = S_R^2` and the singular value decomposition
    :math:`S_L S_R = U \Sigma V^T`, the halves become :math:`L S_R V_r \Sigma_r^{-1/2}` and
    :math:`R S_L U_r \Sigma_r^{-1/2}`, of which only the two cores at the bond change. Bonds are lowered one after
    the other; on a network without loops the error is at most :math:`\sqrt{\text{bonds}}` times the smallest
    possible.

    Of a bond on more than two cores, or on a loop, components are dropped one by one, always the one that the
    others replace best, and the scales of the rest are fitted by least squares; on a loop, after the bond was brought
    into the gauge of its two cores alone.

    Parameters
    ----------
    network : Network
    cores : sequence of Tensor
        Floating point, any dtype; computed in float64.
    ranks : sequence of int
        One a bond, in the order of ``network.bonds``; none above the present one. A core all of whose bonds keep
        their rank is returned as it is.

    Returns
    -------
    Network, list of Tensor
        The dtype and device of `cores`. Not balanced: see `decompose.balance`.

    Raises
    ------
    RankError
        If a rank is below 1, above the present one, or their number is wrong.
    NetworkError
        If the cores do not have the network's shapes.
    DecompositionError
        If an entry of a core is NaN or infinite.

    Notes
    -----
    Indices that both cores of a bond carry act like a batch (the modes of BTT, groups): each of their values is
    truncated by itself. A mode on cores of both halves but not on both at the bond would couple them: it is counted
    as if it were two modes, which bounds the error and loses nothing where nothing is truncated.
    Singular values below 1e-8 of the largest are not resolved, as everywhere where a Gram matrix stands for its root.
    Memory: the cores in float64, and the Gram matrices of the bonds.

    References
    ----------
    Oseledets 2011, Tensor-train decomposition, algorithm 2; Vannieuwenhoven et al. 2012, A new truncation strategy
    for the higher-order singular value decomposition.

    Examples
    --------
    >>> from tensorlayers import TT
    >>> network = TT(8, order=3).network(512, 512)
    >>> small, cores = round_network(network, [torch.randn(shape) for shape in network.core_shapes], (4, 8))
    >>> [tuple(core.shape) for core in cores]
    [(8, 8, 4), (4, 8, 8, 8), (8, 8, 8)]
    """
    rounding = round_bonds(network, cores, ranks)
    return rounding.network, list(rounding.cores)


def round_bonds(network: Network, cores: Sequence[Tensor], ranks: Sequence[int]) -> Rounding:
    """`round_network`, with what became of each bond."""
    _check_ranks(network, ranks)
    contraction.check_cores(network, cores)
    if tuple(ranks) == network.ranks:
        return Rounding(network, tuple(cores), {})
    check_finite(cores)
    kept: dict[str, tuple[Kept | Mixed, ...]] = {}
    loose: list[str] = []
    lowered = network
    with torch.no_grad(), without_autocast(cores[0]):
        wide = [core.detach().double() for core in cores]
        for bond, rank in zip(network.bonds, ranks, strict=True):
            present = network.size[bond]
            if rank == present:
                continue
            carriers = [k for k, names in enumerate(network.cores) if bond in names]
            pair = len(carriers) == 2
            halves = _halves(network, bond, *carriers) if pair else None
            if pair:
                # Where there is another way round: of the two cores alone, and nothing is cut yet.
                sides = halves or ({carriers[0]}, {carriers[1]})
                lowered, wide, mixed = _gauged(lowered, wide, bond, rank if halves else present, carriers, sides)
                kept[bond] = (mixed,)
            if halves is None:
                lowered, wide, slices = _selected(lowered, wide, bond, rank)
                loose.append(bond)
                kept[bond] = (*kept.get(bond, ()), slices)
        rounded = [
            new.to(core.dtype).contiguous() if set(names) & set(kept) else core
            for names, new, core in zip(network.cores, wide, cores, strict=True)
        ]
    return Rounding(lowered, tuple(rounded), kept, tuple(loose))


def keep(network: Network, cores: Sequence[Tensor], kept: Mapping[str, Kept]) -> Rounding:
    """Cut a network to some of the slices of its bonds, bit for bit."""
    cut = list(cores)
    for bond, slices in kept.items():
        for k, names in enumerate(network.cores):
            if bond in names:
                cut[k] = slices.of(cut[k], names, bond)
    ranks = [kept[b].positions.shape[-1] if b in kept else network.size[b] for b in network.bonds]
    return Rounding(network.with_ranks(ranks), tuple(cut), {bond: (slices,) for bond, slices in kept.items()})


def check_finite(cores: Sequence[Tensor]) -> None:
    """Raise `DecompositionError` where an entry of a core is NaN or infinite, or has no value."""
    for k, core in enumerate(cores):
        if core.is_meta:
            raise DecompositionError(f"core {k}: it is on the meta device, without values")
        bad = int((~torch.isfinite(core)).sum())
        if bad:
            raise DecompositionError(f"core {k}: every entry is finite; {bad} are NaN or infinite")


def _check_ranks(network: Network, ranks: Sequence[int]) -> None:
    if len(ranks) != len(network.bonds):
        raise RankError(f"ranks {tuple(ranks)}: one for each bond {network.bonds}")
    for bond, rank in zip(network.bonds, ranks, strict=True):
        if not 1 <= rank <= network.size[bond]:
            present = network.size[bond]
            raise RankError(f"ranks {tuple(ranks)}: from 1 to the present one; bond {bond!r} has {present}, got {rank}")


def _with_rank(network: Network, bond: str, rank: int) -> Network:
    return network.with_ranks([rank if name == bond else network.size[name] for name in network.bonds])


def _gauged(
    network: Network, cores: Sequence[Tensor], bond: str, rank: int, carriers: Sequence[int], sides: Sequence[set[int]]
) -> tuple[Network, list[Tensor], Mixed]:
    """Bring a bond of two cores into the canonical gauge of its two sides, and keep the `rank` largest values."""
    left, right = carriers
    batch = [index for index in network.cores[left] if index in network.cores[right] and index != bond]
    grams = [_side_gram(network, cores, side, bond, batch) for side in sides]
    mixed = Mixed(tuple(batch), dict(zip(carriers, _gauge(grams[0], grams[1], rank), strict=True)))
    changed = [mixed.of(k, core, network.cores[k], bond) if k in carriers else core for k, core in enumerate(cores)]
    return _with_rank(network, bond, rank), changed, mixed


def _selected(network: Network, cores: Sequence[Tensor], bond: str, rank: int) -> tuple[Network, list[Tensor], Kept]:
    """Keep the components of a bond that fit best, their scales fitted again on the first core that carries it."""
    slices, scales = _select(network, cores, bond, rank)
    selection = keep(network, cores, {bond: slices})
    cores = list(selection.cores)
    first = next(k for k, names in enumerate(network.cores) if bond in names)
    cores[first] = cores[first] * aligned(scales, (*slices.batch, bond), network.cores[first])
    return selection.network, cores, slices


def _halves(network: Network, bond: str, left: int, right: int) -> tuple[set[int], set[int]] | None:
    """The cores on either side of a bond, where it is the only bond between them."""
    bonds = set(network.bonds) - {bond}
    reached, frontier = {left}, [left]
    while frontier:
        here = bonds.intersection(network.cores[frontier.pop()])
        new = [k for k, names in enumerate(network.cores) if k not in reached and here.intersection(names)]
        reached.update(new)
        frontier += new
    return None if right in reached else (reached, set(range(len(network.cores))) - reached)


def _gram(
    network: Network, cores: Sequence[Tensor], chosen: Sequence[int], batch: Sequence[str], bond: str, copied: set[str]
) -> Tensor:
    """Contract some cores with themselves; shape (values of the batch, rank, rank). The scale is left out."""
    names = [network.cores[k] for k in chosen]
    copies = [tuple(f"{index}'" if index in copied else index for index in core) for core in names]
    sizes = {**network.size, **{f"{index}'": network.size[index] for index in copied}}
    # The largest entry out: what is built from a Gram matrix does not depend on its scale, and squares may overflow.
    tensors = [core / core.abs().max().clamp_min(torch.finfo(core.dtype).tiny) for core in (cores[k] for k in chosen)]
    gram = contraction.contract((*names, *copies), (*batch, bond, f"{bond}'"), (*tensors, *tensors), sizes)
    size = network.size[bond]
    return gram.reshape(-1, size, size)


def _side_gram(network: Network, cores: Sequence[Tensor], side: set[int], bond: str, batch: Sequence[str]) -> Tensor:
    chosen = sorted(side)
    # A bond that leads out of the side is, seen from it, a free index.
    outside = {index for k, names in enumerate(network.cores) if k not in side for index in names}
    copied = {index for k in chosen for index in network.cores[k] if index in network.bonds and index not in outside}
    return _gram(network, cores, chosen, batch, bond, copied | {bond})


def _gauge(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """What the two sides of a bond are multiplied with; shapes (values of the batch, present rank, rank)."""
    roots = []
    for gram in (left, right):
        values, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
        roots.append(vectors * values.clamp_min(0).sqrt()[:, None, :] @ vectors.mT)
    u, s, vh = torch.linalg.svd(roots[0] @ roots[1])
    u, s, v = u[..., :rank], s[..., :rank], vh.mT[..., :rank]
    alive = s > s[:, :1] * (left.shape[-1] * torch.finfo(s.dtype).eps)
    power = torch.where(alive, s, torch.ones_like(s)).rsqrt()[:, None, :]
    # A component of no weight is zero on one side only, so that gradients still reach it; and where a whole side is
    # zero already, so it stays.
    zero = (~left.flatten(1).any(dim=1) | ~right.flatten(1).any(dim=1))[:, None, None]
    to_left = torch.where(alive[:, None, :], roots[1] @ v * power, v)
    to_right = torch.where(alive[:, None, :], roots[0] @ u * power, torch.where(zero, v, 0.0))
    return to_left, to_right


def _select(network: Network, cores: Sequence[Tensor], bond: str, rank: int) -> tuple[Kept, Tensor]:
    """The values of a bond to keep, and the scales of their components; shapes (\\*batch, rank)."""
    carriers = [names for names in network.cores if bond in names]
    batch = tuple(
        mode.name for mode in network.modes if all(mode.name in names for names in carriers)
    )  # each of their values has components of its own
    gram = _gram(network, cores, range(len(cores)), batch, bond, set(network.bonds))
    positions, scales = _fit(gram, rank)
    shape = [network.size[index] for index in batch]
    return Kept(batch, positions.reshape(*shape, rank)), scales.reshape(*shape, rank)


def _fit(
    gram: Tensor,  # (batch, components, components), inner products of the components
    rank: int,
) -> tuple[Tensor, Tensor]:  # (batch, rank), (batch, rank)
    """Drop components one by one, each time the one whose loss costs least once the others are fitted again."""
    norms = gram.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    divisor = torch.where(norms > 0, norms, torch.ones_like(norms))
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    unit = gram / divisor[:, :, None] / divisor[:, None, :]
    inverse = torch.linalg.inv(unit + torch.where(norms > 0, _RIDGE, 1.0)[:, :, None] * eye)
    weights, gone = norms.clone(), torch.zeros_like(norms, dtype=torch.bool)
    rows = torch.arange(len(gram), device=gram.device)
    for _ in range(gram.shape[-1] - rank):
        pivots = inverse.diagonal(dim1=1, dim2=2)
        cost = torch.where(gone, math.inf, weights.square() / pivots.clamp_min(_RIDGE))
        worst = cost.argmin(dim=1)
        column = inverse[rows, worst] / inverse[rows, worst, worst][:, None]
        weights = weights - column * weights[rows, worst][:, None]
        inverse = inverse - column[:, :, None] * inverse[rows, worst][:, None, :]
        gone[rows, worst] = True
    positions = torch.sort(torch.argsort(gone.to(torch.int8), dim=1, stable=True)[:, :rank], dim=1)[0]
    inner = unit[rows[:, None, None], positions[:, :, None], positions[:, None, :]]
    right = (unit @ norms[:, :, None]).gather(1, positions[:, :, None])
    # Relative to the components as they are: where they nearly cancel, the ridge then holds on to them.
    start = norms.gather(1, positions)[:, :, None]
    change = torch.linalg.solve(inner + _RIDGE * eye[:rank, :rank], right - inner @ start)
    scales = ((start + change) / divisor.gather(1, positions)[:, :, None]).squeeze(2)
    return positions, torch.where(norms.gather(1, positions) > 0, scales, torch.ones_like(scales))
