"""Learning rates for cores of factorized layers, at which a step changes outputs as the dense layer's step does."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from . import contraction, table
from .contraction import BATCH
from .errors import NetworkError
from .layers import FactorizedEmbedding, FactorizedEmbeddingBag, FactorizedLayer
from .network import Network
from .precision import without_autocast

ROWS = 16
"""Rows of a batch that pull a weight into directions of their own, where nothing else is said."""

_MARGIN = 2.0
"""How many times smaller the step of all cores is than the dense one's, to first order: that of a product of cores has
terms of higher orders, too, and the highest stable rates would else be two to four times below the dense layer's."""

_PER_OCTAVE = 4  # multipliers are rounded to so many steps a factor of two, so that groups can be merged
_NOTHING = 1e-9
_EXPLICIT = 5  # groups of parameters whose names a table gives


class ParameterGroups(list[dict[str, Any]]):
    """Parameter groups for a torch optimizer. Prints as a table: learning rates, and the parameters that have them."""

    def __init__(self, groups: Sequence[dict[str, Any]], lr: float, names: Mapping[int, str]) -> None:
        super().__init__(groups)
        self._lr, self._names = lr, names

    def __str__(self) -> str:
        head = ["lr", "x", "weight decay", "tensors", "parameters", "names"]
        rows = []
        for group in self:
            tensors = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
            names = [self._names[id(tensor)] for tensor in tensors]
            decay = f"{group['weight_decay']:.3g}" if "weight_decay" in group else "-"
            more = [f"and {len(names) - _EXPLICIT} more"] if len(names) > _EXPLICIT else []
            counts = (str(len(tensors)), table.count(sum(tensor.numel() for tensor in tensors)))
            shown = ", ".join([*names[:_EXPLICIT], *more])
            rows.append((f"{group['lr']:.3g}", f"{group['lr'] / self._lr:.3g}", decay, *counts, shown))
        return "\n".join(table.lines(head, rows))


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    weight_decay: float | None = None,
    rows: int = ROWS,
    named: bool = False,
) -> ParameterGroups:
    r"""Groups for AdamW and its kin with which factorized layers train at the learning rate of the dense network.

    Adam moves every entry of a parameter by about its learning rate, whatever the size of the gradient. What that does
    to a layer's output depends on where the entries sit. Let :math:`J_k` be the map from a change of core k to the
    change of the output. A step along the gradient's signs, of :math:`p_k` entries of size :math:`\eta_k`, changes the
    output by

    .. math:: \eta_k \|J_k\|_F \sqrt{f_k}, \qquad f_k = p_k / \operatorname{rank} J_k.

    :math:`f_k` is the fan-in of the core: the entries that each direction of the output has at its disposal; of a dense
    weight and one row, the number of inputs. It follows from the index names, as the smallest cut between the core and
    the output. The steps of all K cores together are to change the output as the dense layer's step, so that with J and
    f of the dense weight

    .. math:: \eta_k = \frac{\eta}{c K}\, \frac{\|J\|_F}{\|J_k\|_F} \sqrt{\frac{f}{f_k}}.

    c = 2 leaves room for the terms of higher orders that a product of cores has. Of cores drawn anew
    :math:`\|J\|_F / \|J_k\|_F` is the ratio of the deviations of core and weight; where that is
    :math:`\propto f_k^{-1/2}`, rates fall as :math:`1/f_k`, as in muP.

    Parameters
    ----------
    model : nn.Module
        Dense layers of any kind, factorized layers, or both.
    lr : float
        The learning rate that suits the dense network. All parameters but cores have it.
    weight_decay : float, optional
        Of all weights; that of biases, norms and other parameters of at most one dimension is 0. That of a core is
        divided by its multiplier and the number of cores, so that the product decays as the dense weight would. By
        default the groups name none, and the optimizer's own holds.
    rows : int
        How many rows of a batch pull in directions of their own. With 1 the steps are as small as they must be where
        all rows agree (muP's assumption); with many, each core's step is in proportion to its size alone.
    named : bool
        Give (name, parameter) pairs, which torch's optimizers keep as ``param_names``.

    Returns
    -------
    ParameterGroups
        A list of dicts, each with ``params`` and ``lr``; prints as a table. Every parameter that requires a gradient
        is in one of them, once, however many layers share it. Multipliers are rounded to quarter octaves, and equal
        groups merged.

    Raises
    ------
    NetworkError
        If lr, weight_decay or rows are out of range, or no parameter requires a gradient.

    Notes
    -----
    The norms are those of the cores as they are, so that the groups serve a network that is trained from scratch, and
    one that was converted; where there are none (meta device, zeros), those of a draw. No dense weight is formed. The
    groups are for optimizers whose step does not depend on the gradient's scale; of SGD they are not.

    References
    ----------
    Yang et al. 2021, Tensor programs V: tuning large neural networks via zero-shot hyperparameter transfer (Adam's
    learning rate in proportion to 1 / fan-in); Qiu et al. 2024, Compute better spent: replacing dense layers with
    structured matrices, section 4 (each core by its own fan-in); Yang et al. 2023, A spectral condition for feature
    learning (relative changes).

    Examples
    --------
    >>> import tensorlayers as tl
    >>> layer = tl.FactorizedLinear(256, 256, format=tl.LowRank(32))
    >>> groups = parameter_groups(layer, 1e-3, weight_decay=0.1)
    >>> optimizer = torch.optim.AdamW(groups)
    >>> len(groups)  # a core each, and the bias
    3
    """
    _check("lr", lr, positive=True)
    if weight_decay is not None:
        _check("weight_decay", weight_decay)
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise NetworkError(f"rows: an integer of at least 1; got {rows!r}")
    found = _multipliers(model, rows)
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not names:
        raise NetworkError(f"{type(model).__name__}: a parameter that requires a gradient; there is none")
    groups: dict[tuple[float, float | None], list[Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        multiplier, cores = found.get(id(parameter), (1.0, 0))
        decay = weight_decay
        if decay is not None:
            decay = decay / (multiplier * cores) if cores else decay if parameter.dim() > 1 else 0.0
        groups.setdefault((lr * multiplier, decay), []).append((name, parameter) if named else parameter)
    made = [
        {"params": members, "lr": rate} | ({} if decay is None else {"weight_decay": decay})
        for (rate, decay), members in sorted(groups.items(), key=lambda item: -item[0][0])
    ]
    return ParameterGroups(made, lr, names)


def _check(what: str, value: object, positive: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise NetworkError(f"{what}: a finite number; got {value!r}")
    if value < 0 or (positive and value == 0):
        raise NetworkError(f"{what}: {'above' if positive else 'at least'} 0; got {value!r}")


def _multipliers(model: nn.Module, rows: int) -> dict[int, tuple[float, int]]:
    """Identity of each core -> its multiplier, and how many cores its layer has; of the first layer that has it."""
    found: dict[int, tuple[float, int]] = {}
    for layer in model.modules():
        if isinstance(layer, FactorizedLayer):
            own = multipliers(layer, rows)
            for core, multiplier in zip(layer.cores, own, strict=True):
                found.setdefault(id(core), (multiplier, len(own)))
    return found


def multipliers(layer: FactorizedLayer, rows: int = ROWS) -> list[float]:
    """What the learning rate of each core is multiplied with; see `parameter_groups`.

    Parameters
    ----------
    layer : FactorizedLayer
    rows : int

    Returns
    -------
    list of float
        Powers of the fourth root of 2, one a core.
    """
    network = layer.own_network
    dense = Network((tuple(mode.name for mode in network.modes),), (), network.modes)
    lookup = isinstance(layer, (FactorizedEmbedding, FactorizedEmbeddingBag))
    whole = fan_in(dense, 0, rows, lookup=lookup)
    made = []
    for k, gain in enumerate(_gains(layer)):
        share = math.sqrt(whole / fan_in(network, k, rows, lookup=lookup)) / gain
        made.append(2.0 ** (round(_PER_OCTAVE * math.log2(share / _MARGIN / len(network.cores))) / _PER_OCTAVE))
    return made


def _gains(layer: FactorizedLayer) -> list[float]:
    """How large a change of the dense weight is that random changes of size 1 of a core make, for each core."""
    network = layer.own_network
    drawn = layer.deviation / network.core_std(layer.deviation)
    if layer.cores[0].is_meta:
        return [drawn] * len(network.cores)
    with torch.no_grad(), without_autocast(layer.cores[0]):
        cores = [core.detach().double() for core in layer.own_cores()]
        largest = [float(core.abs().max()) for core in cores]
        # So that no square overflows or vanishes.
        units = [core / size if 0 < size < math.inf else core for core, size in zip(cores, largest, strict=True)]
        gains = []
        for k in range(len(cores)):
            factor = math.prod(largest[:k] + largest[k + 1 :])
            gain = math.sqrt(max(_squared_gain(network, units, k), 0.0) / math.prod(network.shape)) * factor
            gains.append(gain if 0 < gain < math.inf else drawn)
    return gains


def _squared_gain(network: Network, cores: Sequence[Tensor], k: int) -> float:
    """The squared norm of the network without core k, whose indices are counted as if they were modes."""
    own = set(network.cores[k])
    others = [(names, core) for j, (names, core) in enumerate(zip(network.cores, cores, strict=True)) if j != k]
    copied = set(network.bonds) - own
    copies = [tuple(f"{index}'" if index in copied else index for index in names) for names, _ in others]
    alone = own.difference(*(names for names, _ in others))
    count = math.prod(network.size[index] for index in alone)
    if not others:
        return float(count)
    sizes = {**network.size, **{f"{index}'": network.size[index] for index in copied}}
    terms = [names for names, _ in others]
    tensors = [core for _, core in others]
    return count * float(contraction.contract((*terms, *copies), (), (*tensors, *tensors), sizes))


@lru_cache(maxsize=4096)
def fan_in(network: Network, core: int, rows: int = ROWS, *, lookup: bool = False) -> float:
    """Entries of a core for each independent direction in which a change of it can move the outputs of some rows.

    The directions are as many as the narrowest place between the core and the output lets through: the smallest cut
    of the network of the other cores and the input, in which an index costs the logarithm of its size.

    Parameters
    ----------
    network : Network
    core : int
        Its position.
    rows : int
        How many generic rows are looked at together.
    lookup : bool
        Whether the in modes select a row, as in an embedding.

    Returns
    -------
    float
        From 1 to the number of entries; of a dense matrix and one row, its in features.

    Examples
    --------
    >>> from tensorlayers import LowRank
    >>> network = LowRank(32).network(256, 1024)
    >>> [round(fan_in(network, core, rows=1)) for core in (0, 1)]
    [32, 1024]
    """
    ins = set(network.names("in"))
    size = {**network.size, BATCH: rows}
    cores = [tuple(name for name in names if name not in ins) if lookup else names for names in network.cores]
    if lookup:  # each row has slices of its own
        cores = [
            (*names, BATCH) if ins & set(full) else names for names, full in zip(cores, network.cores, strict=True)
        ]
    own = cores[core]
    others = [names for k, names in enumerate(cores) if k != core]
    if not lookup:
        others.append((BATCH, *ins, *network.names("kernel"), *network.names("group")))
    output = (BATCH, *network.names("out"), *network.names("group"))
    entries = sum(math.log(size[index]) for index in own)
    return math.exp(max(entries - _smallest_cut(own, output, others, size), 0.0))


def _smallest_cut(
    source: Sequence[str], sink: Sequence[str], others: Sequence[Sequence[str]], size: Mapping[str, int]
) -> float:
    """The least logarithm of the sizes of indices that lie on both sides, of all ways to divide the other tensors.

    By the largest flow that tensors pass on to each other through their indices (Edmonds and Karp 1972).
    """
    tensors = [source, sink, *others]
    free: dict[tuple[Any, Any], float] = {}  # what can still flow along an arc
    for index in dict.fromkeys(index for names in tensors for index in names):
        free[(index, "in"), (index, "out")] = math.log(size[index])
        for k, names in enumerate(tensors):
            if index in names:
                free[k, (index, "in")] = free[(index, "out"), k] = math.inf
    arcs: dict[Any, list[Any]] = {}
    for start, end in free:
        arcs.setdefault(start, []).append(end)
        arcs.setdefault(end, []).append(start)
    total = 0.0
    while path := _path(free, arcs):
        amount = min(free[arc] for arc in path)
        total += amount
        for start, end in path:
            free[start, end] -= amount
            free[end, start] = free.get((end, start), 0.0) + amount
    return total


def _path(free: Mapping[tuple[Any, Any], float], arcs: Mapping[Any, Sequence[Any]]) -> list[tuple[Any, Any]]:
    """The shortest path of arcs from node 0 to node 1 along which anything can flow; empty where there is none."""
    before: dict[Any, Any] = {0: None}
    frontier = deque([0])
    while frontier and 1 not in before:
        node = frontier.popleft()
        for other in arcs[node]:
            if other not in before and free.get((node, other), 0.0) > _NOTHING:
                before[other] = node
                frontier.append(other)
    path, node = [], 1 if 1 in before else 0
    while before.get(node) is not None:
        path.append((before[node], node))
        node = before[node]
    return path[::-1]
