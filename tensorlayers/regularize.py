"""Ranks while a model trains: lower them, drop out their values, penalize them, and prune those that vanished.

Each function takes a factorized layer, or a model that holds some; layers that share cores are treated together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import table
from .errors import NetworkError, TensorlayersError
from .layers import FactorizedLayer
from .layers.resize import rounded, selected, shrink
from .precision import at_least_single
from .rank import Rank
from .rounding import Rounding, check_finite

_M = TypeVar("_M", bound=nn.Module)
_Named = list[tuple[str, FactorizedLayer]]

PENALTIES = ("group", "l1")


class RankChanges(dict[str, tuple[tuple[int, ...], tuple[int, ...]]]):
    """Layer name -> its ranks before and after. Prints as a table."""

    def __str__(self) -> str:
        rows = [
            (name or "(the layer)", " ".join(map(str, before)), " ".join(map(str, after)))
            for name, (before, after) in self.items()
        ]
        return "\n".join(table.lines(("layer", "ranks before", "ranks after"), rows))


def truncate(model: _M, rank: Rank, optimizer: Optimizer | None = None) -> _M:
    """Lower the ranks of all factorized layers in place; those that share cores together.

    Parameters
    ----------
    model : nn.Module
        A factorized layer, or a model with some.
    rank : int, float or tuple of int
        For every layer; see `FactorizedLayer.truncate`. A fraction is one of each layer's own dense parameters.
    optimizer : torch.optim.Optimizer, optional
        What trains the model; see `FactorizedLayer.truncate`.

    Returns
    -------
    nn.Module
        The model itself.

    Raises
    ------
    RankError, DecompositionError
        As `FactorizedLayer.truncate`, naming the layer. No layer is then changed.
    NetworkError
        If there is no factorized layer, or cores are shared with layers that the model does not hold.

    Examples
    --------
    >>> import tensorlayers as tl
    >>> model = torch.nn.Sequential(tl.FactorizedLinear(64, 64, format=tl.LowRank(16)))
    >>> tl.truncate(model, 8)[0].network.ranks
    (8,)
    """
    groups = _sharing(model, complete=True)
    new = [_named(group, lambda layer: rounded(layer, rank)) for group in groups]
    for group, rounding in zip(groups, new, strict=True):
        shrink([layer for _, layer in group], rounding, optimizer)
    return model


def rank_dropout(model: _M, p: float) -> _M:
    r"""Set the rank dropout of all factorized layers.

    In training mode, each forward keeps every value of every bond with probability 1 - p and scales it by
    :math:`1 / (1 - p)`, so that the expected weight is the weight; in evaluation mode nothing is dropped.
    A bond of one value is never dropped: that would drop the layer.

    Parameters
    ----------
    model : nn.Module
        A factorized layer, or a model with some.
    p : float
        In [0, 1); 0 switches it off.

    Returns
    -------
    nn.Module
        The model itself.

    Raises
    ------
    NetworkError
        If p is out of range, or there is no factorized layer.

    Notes
    -----
    The masks of all bonds are drawn anew at each forward, by torch's generator of the core's device, one for all
    rows. The probability is saved with the layer.

    References
    ----------
    Kolbeinsson et al. 2021, Tensor dropout for robust learning (Bernoulli dropout on the bonds).
    """
    for layer in [layer for group in _sharing(model) for _, layer in group]:
        layer.rank_dropout = p
    return model


def rank_penalty(model: nn.Module, kind: str = "group") -> Tensor:
    r"""A penalty that makes ranks sparse, to be added to the loss.

    ``"group"``: the group lasso over bond values, :math:`\sum_b \sum_j \sqrt{\sum_k \|C_k[b = j]\|_F^2}` with k over
    the cores that carry bond b: it drives whole slices to zero, on all cores at once. ``"l1"``: the sum of absolute
    entries of all these slices, that is each core's L1 norm times the number of its bonds.

    Parameters
    ----------
    model : nn.Module
        A factorized layer, or a model with some. Cores that several layers share count once.
    kind : {"group", "l1"}

    Returns
    -------
    Tensor
        0-d, float32 at least, differentiable; the gradient at a slice of zeros is 0.

    Raises
    ------
    NetworkError
        If the kind is unknown, or there is no factorized layer.

    References
    ----------
    Yuan and Lin 2006, Model selection and estimation in regression with grouped variables.

    Examples
    --------
    >>> import tensorlayers as tl
    >>> layer = tl.FactorizedLinear(4, 4, format=tl.LowRank(2))
    >>> loss = layer(torch.ones(1, 4)).square().mean() + 1e-3 * tl.rank_penalty(layer)
    """
    if kind not in PENALTIES:
        raise NetworkError(f"rank_penalty: a kind is one of {', '.join(PENALTIES)}; got {kind!r}")
    terms = []
    for group in _sharing(model):
        layer = group[0][1]
        for bond in layer.network.bonds:
            slices = _slices(layer, bond, 2 if kind == "group" else 1)
            terms.append(torch.linalg.vector_norm(slices, dim=0).sum() if kind == "group" else slices.sum())
        if not layer.network.bonds:  # zero, of no entry, and differentiable
            terms.append(layer.cores[0].flatten()[:0].sum(dtype=at_least_single(layer.cores[0].dtype)))
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()


def prune_ranks(model: nn.Module, tolerance: float = 1e-3, optimizer: Optimizer | None = None) -> RankChanges:
    """Cut the values of the bonds that hardly contribute, in place; what remains is the same bit for bit.

    The strength of a value of a bond is the product of the norms of its slices over the cores that carry it: a bound
    of its share in the weight.

    Parameters
    ----------
    model : nn.Module
        A factorized layer, or a model with some; layers that share cores are pruned together.
    tolerance : float
        In [0, 1): values of at most this strength, relative to the largest of the bond, are cut; at least one stays.
        At 0 only slices of zeros are cut, and the weight is unchanged.
    optimizer : torch.optim.Optimizer, optional
        Its state is cut in the same way.

    Returns
    -------
    RankChanges
        Layer name -> (ranks before, ranks after), of every factorized layer; prints as a table.

    Raises
    ------
    NetworkError
        If the tolerance is out of range, there is no factorized layer, or cores are shared with layers that the
        model does not hold.
    DecompositionError
        If an entry of a core is NaN or infinite. No layer is then changed.

    Notes
    -----
    See `FactorizedLayer.select` for bonds that are too large beside those that were cut.
    """
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 <= tolerance < 1:
        raise NetworkError(f"prune_ranks: a tolerance is at least 0 and below 1; got {tolerance!r}")
    groups = _sharing(model, complete=True)
    new = [_named(group, lambda layer: _pruned(layer, tolerance)) for group in groups]
    names = [name for name, module in model.named_modules() if isinstance(module, FactorizedLayer)]
    changes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
        name: (layer.network.ranks, rounding.network.ranks)
        for group, rounding in zip(groups, new, strict=True)
        for name, layer in group
    }
    for group, rounding in zip(groups, new, strict=True):
        shrink([layer for _, layer in group], rounding, optimizer)
    return RankChanges({name: changes[name] for name in names})


def _sharing(model: nn.Module, complete: bool = False) -> list[_Named]:
    """The factorized layers by name, those that share cores in one group.

    With `complete`, refuse a group of which the model lacks a layer: it would be left with cores that do not fit.
    """
    groups: dict[tuple[int, ...], _Named] = {}
    for name, module in model.named_modules():
        if isinstance(module, FactorizedLayer):
            groups.setdefault(tuple(id(core) for core in module.cores), []).append((name, module))
    if not groups:
        raise NetworkError(f"{type(model).__name__}: a factorized layer, or a model with one; it has none")
    if complete:
        owner: dict[int, tuple[int, ...]] = {}
        for key, group in groups.items():
            name, layer = group[0]
            what = f"layer {name!r}" if name else "the layer"
            positions = {layer.stack[1] for _, layer in group if layer.stack}
            if layer.stack and len(positions) < layer.stack[0]:
                missing = sorted(set(range(layer.stack[0])) - positions)
                raise NetworkError(f"{what}: with all layers that share its cores; positions {missing} are missing")
            if any(owner.setdefault(core, key) != key for core in key):
                raise NetworkError(f"{what}: cores shared all or none; another layer has some of its cores")
    return list(groups.values())


def _named(group: _Named, on: Callable[[FactorizedLayer], Rounding]) -> Rounding:
    name, layer = group[0]
    try:
        return on(layer)
    except TensorlayersError as error:
        raise type(error)(f"layer {name!r}: {error}" if name else str(error)) from None


def _slices(layer: FactorizedLayer, bond: str, order: int, dtype: torch.dtype | None = None) -> Tensor:
    """The norms of the slices of a bond; shape (cores that carry it, values of the bond)."""
    return torch.stack(
        [
            torch.linalg.vector_norm(
                core.movedim(names.index(bond), 0).flatten(1), order, dim=1, dtype=dtype or at_least_single(core.dtype)
            )
            for names, core in zip(layer.network.cores, layer.cores, strict=True)
            if bond in names
        ]
    )


def _pruned(layer: FactorizedLayer, tolerance: float) -> Rounding:
    check_finite(list(layer.cores))
    positions: dict[str, list[int]] = {}
    with torch.no_grad():
        for bond in layer.network.bonds:
            # Logarithms: a product of small norms underflows.
            strengths = _slices(layer, bond, 2, torch.float64).log().sum(dim=0)
            limit = float(strengths.max()) + (math.log(tolerance) if tolerance else -math.inf)
            positions[bond] = torch.nonzero(strengths > limit).flatten().tolist() or [0]
    return selected(layer, positions)
