"""What each bond of a network cuts off a weight: the spectra of its unfoldings, and ranks that are chosen by them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .metric import Root, Seen, times
from .network import Network
from .normal_equations import Factor, primed
from .rank import clamp

_STEP = 24
"""Ranks are lowered by such a part of themselves at a time."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The energies of a weight's unfolding at a bond: what its singular values contribute, of a squared norm of 1.

    Parameters
    ----------
    energies : Tensor
        Squared singular values, the largest first; (batch, k): modes on both sides of the bond are a batch of
        unfoldings.
    sides : (int, int)
        Rows and columns of an unfolding.
    """

    energies: Tensor
    sides: tuple[int, int]

    @cached_property
    def tails(self) -> list[float]:
        """What is lost at a rank of 0, 1, 2, ...: the sum of the energies from there on."""
        sums = self.energies.sum(0).flip(0).cumsum(0).flip(0)
        return [*map(float, sums.clamp_min(0)), 0.0]

    def tail(self, rank: int) -> float:
        """What is lost at a rank."""
        return self.tails[min(rank, len(self.tails) - 1)]


def spectra(dense: Tensor, network: Network, metric: Sequence[Factor] = ()) -> dict[str, Spectrum]:
    """The spectra at the bonds that alone join two halves of a network; others (CP's, those of a ring) have none.

    In a metric the energies are what is lost of the weight as the metric sees it. Where a form couples directions of
    one half with the other, those that are kept make good what they can of the others, by the form's Cholesky factor.

    Parameters
    ----------
    dense : Tensor
        Shape ``network.shape``.
    network : Network
        Its bonds' sizes do not matter.
    metric : sequence of Factor
        See `Metric.factors`.

    Returns
    -------
    dict of str to Spectrum
    """
    weight, forms = Seen(dense, network, metric).in_basis()
    halves = {bond: _halves(network, bond) for bond in network.bonds}
    return {bond: _spectrum(weight, network, forms, sides) for bond, sides in halves.items() if sides is not None}


def _spectrum(weight: Tensor, network: Network, forms: Sequence[Factor], halves: tuple[set[str], set[str]]) -> Spectrum:
    names = tuple(mode.name for mode in network.modes)
    both = [name for name in names if all(name in half for half in halves)]
    sides = [[name for name in names if name in half and name not in both] for half in halves]
    sizes = [math.prod(network.size[name] for name in side) for side in sides]
    joint = None
    for form in forms:
        if any(set(form.modes) <= set(side) for side in sides):
            weight = times(weight, names, Root.of(form).root)
        elif not set(both) & set(form.modes) and any(set(side) <= set(form.modes) for side in sides):
            joint = form
    kept = min((0, 1), key=lambda k: (joint is not None and not set(sides[k]) <= set(joint.modes), sizes[k]))
    own, other = sides[kept], sides[1 - kept]
    coupled = [name for name in other if joint is not None and name in joint.modes]
    order = (*both, *(name for name in other if name not in coupled), *coupled, *own)
    unfolding = weight.permute([names.index(name) for name in order])
    unfolding = unfolding.reshape(-1, sizes[1 - kept], sizes[kept])
    small = unfolding.mT @ unfolding
    if joint is None:
        energies = torch.linalg.eigvalsh(small).clamp_min(0).flip(-1)
    else:
        energies = _made_good(unfolding, torch.linalg.eigh(small)[1].flip(-1), joint, coupled, own)
    return Spectrum(energies, (sizes[0], sizes[1]))


def _made_good(
    unfolding: Tensor,  # (batch, others * coupled, own)
    basis: Tensor,  # (batch, own, own)
    form: Factor,
    coupled: Sequence[str],
    own: Sequence[str],
) -> Tensor:  # (batch, own)
    """What is lost with each direction of a basis and all after it, beyond what those before it make good."""
    order = (*form.batch, *own, *coupled, *map(primed, own), *map(primed, coupled))
    held = basis.shape[-1]
    values = form.values.permute([form.names.index(name) for name in order])
    others = math.prod(values.shape[len(form.batch) + len(own) : len(form.batch) + len(form.modes)])
    values = values.reshape(-1, held, others, held, others).expand(len(basis), -1, -1, -1, -1)
    values = torch.einsum("bhomp,bhi,bmj->biojp", values, basis, basis).reshape(len(basis), held * others, -1)
    ridge = 1e-10 * values.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(values.dtype).tiny)
    root = torch.linalg.cholesky(values + ridge[:, None, None] * torch.eye(held * others).to(values))
    turned = (unfolding @ basis).reshape(len(basis), -1, others, held).transpose(-1, -2).flatten(-2)
    lost: Tensor = (turned @ root).square().sum(-2).reshape(len(basis), held, others).sum(-1)
    return lost


def _halves(network: Network, bond: str) -> tuple[set[str], set[str]] | None:
    """The indices of the cores on either side of a bond; None where it is not the only link between them."""
    carriers = [core for core in network.cores if bond in core]
    if len(carriers) != 2:
        return None
    links = set(network.bonds) - {bond}
    halves = []
    for carrier in carriers:
        side, reached = set(carrier), [carrier]
        while True:
            more = [core for core in network.cores if core not in reached and not side.isdisjoint(links & set(core))]
            if not more:
                break
            reached += more
            side.update(*more)
        if all(other in reached for other in carriers):
            return None
        halves.append(side)
    return halves[0], halves[1]


def spend(network: Network, measured: Mapping[str, Spectrum], parameters: int) -> Network | None:
    """Spend a number of parameters on ranks so that the energies that are cut off are few.

    From the largest ranks down, always by what loses least for a parameter saved; then single ranks up again as long
    as they fit. By the sum over bonds of what each cuts off: a bound of the squared error, which a sequence of
    truncations reaches at most.

    Parameters
    ----------
    network : Network
        With the largest ranks that are wanted.
    measured : mapping of str to Spectrum
    parameters : int
        Of all cores, at most.

    Returns
    -------
    Network or None
        None where a bond has no spectrum, or no ranks are small enough.

    References
    ----------
    De Lathauwer et al. 2000, A multilinear singular value decomposition, property 10 (the bound).
    """
    if not set(network.bonds) <= set(measured):
        return None
    best = clamp(network)
    while best.num_parameters > parameters:
        lower = [other for bond in best.bonds if (other := _lowered(best, bond)) is not None]
        if not lower:
            return None
        best = min(lower, key=lambda other: _price(best, other, measured))
    while True:
        raised = [
            larger
            for k in range(len(best.bonds))
            if (larger := best.with_ranks([rank + (k == j) for j, rank in enumerate(best.ranks)])).num_parameters
            <= parameters
            and all(map(int.__le__, larger.ranks, network.ranks))
            and clamp(larger) == larger
        ]
        if not raised:
            return best
        best = min(raised, key=lambda other: -_price(other, best, measured))


def _lowered(network: Network, bond: str) -> Network | None:
    """A network with a bond lowered by a step, and others by what is then of no use; None where it is 1."""
    rank = network.size[bond]
    if rank == 1:
        return None
    less = rank - math.ceil(rank / _STEP)
    return clamp(network.with_ranks([less if name == bond else network.size[name] for name in network.bonds]))


def _price(larger: Network, smaller: Network, measured: Mapping[str, Spectrum]) -> float:
    """The energy that is lost for each parameter saved."""
    lost = _lost(smaller, measured) - _lost(larger, measured)
    return lost / max(larger.num_parameters - smaller.num_parameters, 1)


def _lost(network: Network, measured: Mapping[str, Spectrum]) -> float:
    return sum(measured[bond].tail(network.size[bond]) for bond in network.bonds)
