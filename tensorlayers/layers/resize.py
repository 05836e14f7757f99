"""Smaller ranks for a layer in place: the parameters stay the same objects, and their optimizer follows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Optimizer

from .. import contraction
from ..als import least_squares
from ..bond_changes import Kept
from ..decompose import balance
from ..errors import NetworkError, RankError
from ..network import Network
from ..precision import without_autocast
from ..rank import Rank, clamp, resolve
from ..rounding import Rounding, check_finite, keep, round_bonds
from .kind import plain

if TYPE_CHECKING:
    from .base import FactorizedLayer

_SWEEPS = 100
_MOST = 1e3
"""Slices whose size changed by more have no state of an optimizer that follows."""


def refuse_shared(layer: FactorizedLayer, what: str) -> None:
    """Raise `NetworkError` where other layers would have to follow."""
    if layer.stack is not None:
        raise NetworkError(
            f"{what}: a layer with cores of its own; this one shares them with {layer.stack[0] - 1} others, which must "
            f"follow: tensorlayers.{what}(model, ...) of the model that holds them all"
        )


def lowered(layer: FactorizedLayer, rank: Rank) -> Network:
    """The network of a layer with its ranks lowered to what is asked; those that are lower already stay."""
    present = layer.network
    entries = layer.dense_parameters * (layer.stack[0] if layer.stack else 1)
    return resolve(present, rank, entries, type(layer.format).__name__, present.ranks)[0]


def rounded(layer: FactorizedLayer, rank: Rank) -> Rounding:
    """What `FactorizedLayer.truncate` puts into a layer: rounded cores, balanced at the bonds that were lowered."""
    return _round(layer.network, list(layer.cores), lowered(layer, rank).ranks)


def _round(network: Network, cores: Sequence[Tensor], ranks: Sequence[int]) -> Rounding:
    if cores[0].is_meta:
        small = network.with_ranks(ranks)
        empty = tuple(core.new_empty(shape) for core, shape in zip(cores, small.core_shapes, strict=True))
        changed = zip(network.bonds, network.ranks, small.ranks, strict=True)
        return Rounding(small, empty, {bond: () for bond, before, after in changed if after < before})
    wide = [core.detach().double() for core in cores]
    with without_autocast(cores[0]):
        rounding = _fitted(network, wide, round_bonds(network, wide, ranks))
        wide = balance(rounding.network, rounding.cores, bonds=list(rounding.kept))
    result = tuple(
        new.to(core.dtype) if set(names) & set(rounding.kept) else core.detach()
        for names, new, core in zip(network.cores, wide, cores, strict=True)
    )
    check_finite(result)
    return replace(rounding, cores=result)


def _fitted(network: Network, cores: Sequence[Tensor], rounding: Rounding) -> Rounding:
    """Fit the cores at bonds where components were only selected, to the weight that the larger network gives."""
    carriers = [k for k, names in enumerate(network.cores) if set(names) & set(rounding.loose)]
    largest = [float(core.abs().max()) for core in cores]
    if not carriers or not all(largest):
        return rounding
    norm = float(contraction.squared_norm(network, [core / m for core, m in zip(cores, largest, strict=True)]))
    if norm <= 0:
        return rounding
    # So that the weight has norm 1, without a product of all scales.
    scales = [m * norm ** (0.5 / len(cores)) for m in largest]
    target = [core / scale for core, scale in zip(cores, scales, strict=True)]
    start = [core / scale for core, scale in zip(rounding.cores, scales, strict=True)]
    fitted, _ = least_squares(rounding.network, (network, target), start, sweeps=_SWEEPS, only=carriers)
    result = tuple(core * scale for core, scale in zip(fitted, scales, strict=True))
    return replace(rounding, cores=result)


def selected(layer: FactorizedLayer, positions: Mapping[str, Sequence[int]]) -> Rounding:
    """What `FactorizedLayer.select` puts into a layer: some slices of its cores, bit for bit.

    Where a bond that stays is then larger than is useful beside the others, it is rounded to that.
    """
    network = layer.network
    chosen = {bond: plain(tuple(wanted)) for bond, wanted in positions.items()}
    for bond, wanted in chosen.items():
        if bond not in network.bonds:
            raise NetworkError(f"bond {bond!r}: one of {', '.join(network.bonds)}")
        size = network.size[bond]
        if not wanted or list(wanted) != sorted({p for p in wanted if type(p) is int and 0 <= p < size}):
            raise RankError(f"bond {bond!r}: ascending positions below {size}, at least one; got {list(wanted)}")
    cut = keep(
        network,
        [core.detach() for core in layer.cores],
        {
            bond: Kept((), torch.tensor(wanted, device=layer.cores[0].device))
            for bond, wanted in chosen.items()
            if len(wanted) < network.size[bond]
        },
    )
    # A file states ranks, and a layer is built from it with none larger than is useful.
    useful = clamp(cut.network)
    if not cut.kept or useful == cut.network:
        return cut
    again = _round(cut.network, cut.cores, useful.ranks)
    return replace(again, kept={b: cut.kept.get(b, ()) + again.kept.get(b, ()) for b in {**cut.kept, **again.kept}})


def shrink(layers: Sequence[FactorizedLayer], rounding: Rounding, optimizer: Optimizer | None) -> None:
    """Put smaller cores into layers, in place.

    Parameters
    ----------
    layers : sequence of FactorizedLayer
        All that share these cores.
    rounding : Rounding
    optimizer : Optimizer, optional
    """
    if not rounding.kept:
        return
    first = layers[0]
    for k, (parameter, names, values) in enumerate(zip(first.cores, first.network.cores, rounding.cores, strict=True)):
        if set(names) & set(rounding.kept):
            if optimizer is not None:
                _follow(optimizer, parameter, _Change(k, names, parameter, rounding))
            _replace(parameter, values.contiguous())
    for layer in layers:
        layer._set_network(rounding.network)
        layer.format = layer.format.pin(rounding.network)
        layer.error = layer.output_error = None  # it was that of the larger network


class _Change:
    """How what belongs to the entries of a core follows, where the core is made smaller.

    Selected slices are selected. Where values of a bond were mixed, a gradient is mixed by the matrix of the other
    core; where slices of the core were then scaled, to balance or to fit them, it is scaled inversely. The gradient of
    the smaller core is exactly this where one bond was lowered and nothing fitted, and nearly this elsewhere.
    """

    def __init__(self, core: int, names: Sequence[str], before: Tensor, rounding: Rounding) -> None:
        self.core, self.names = core, names
        lowered = [bond for bond in names if bond in rounding.kept]
        self.moves = [(bond, move) for bond in lowered for move in rounding.kept[bond]]
        self.is_known = all(rounding.kept[bond] for bond in lowered)
        moved = before.detach().double()
        for bond, move in self.moves:
            moved = move.of(moved, names, bond) if isinstance(move, Kept) else move.of(core, moved, names, bond)
        after = rounding.cores[core].detach().double()
        self.is_selection = self.is_known and torch.equal(moved, after)
        self._scale = _ratio(moved, after, [axis for axis, name in enumerate(names) if name not in lowered])
        # A slice that all but vanished, or came from nothing, has no gradient of the core to go by.
        self.is_known = self.is_known and bool((self._scale.log().abs() <= math.log(_MOST)).all())

    def of_gradient(self, tensor: Tensor, power: int = 1) -> Tensor:
        """A gradient of the core, or its mean square (power 2), as that of the smaller core."""
        wide = tensor.double()
        for bond, move in self.moves:
            if isinstance(move, Kept):
                wide = move.of(wide, self.names, bond)
            else:
                wide = move.gradient_of(self.core, wide, self.names, bond, power)
        return (wide * self._scale**power).to(tensor.dtype).contiguous()


def _ratio(first: Tensor, second: Tensor, axes: Sequence[int]) -> Tensor:
    """The ratio of the norms of slices along some axes; 1 where one of them is zero, or the shapes are unlike."""
    if first.shape != second.shape:
        return first.new_ones(())
    norms = [
        torch.linalg.vector_norm(tensor, dim=tuple(axes), keepdim=True) if axes else tensor.abs()
        for tensor in (first, second)
    ]
    return torch.where((norms[0] > 0) & (norms[1] > 0), norms[0] / norms[1], 1.0)


_POWERS = {"exp_avg": 1, "grad_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2, "square_avg": 2, "sum": 2}
"""The state of torch's optimizers that is a mean of gradients, or of their squares."""


def _follow(optimizer: Optimizer, parameter: nn.Parameter, change: _Change) -> None:
    """Change the optimizer's state of a parameter as its gradient will be, or drop it: it then starts anew."""
    if isinstance(optimizer, LBFGS):  # one history for all parameters together
        optimizer.state.clear()
        optimizer._numel_cache = None
        return
    state = optimizer.state.get(parameter, {})
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor) and value.dim()}
    others = [value for value in state.values() if not isinstance(value, Tensor)]
    alike = all(tensor.shape == parameter.shape for tensor in tensors.values())
    powers = _POWERS | ({"momentum_buffer": 1} if isinstance(optimizer, SGD) else {})
    if change.is_selection:  # any state is cut alike
        powers = dict.fromkeys(tensors, 1)
    known = change.is_known and alike and tensors.keys() <= powers.keys()
    if known and all(value is None or isinstance(value, (int, float)) for value in others):
        state.update({key: change.of_gradient(tensor, powers[key]) for key, tensor in tensors.items()})
    else:
        optimizer.state.pop(parameter, None)


def _replace(parameter: nn.Parameter, values: Tensor) -> None:
    """Give a parameter other values of another shape; ties, hooks and optimizers keep the same object."""
    parameter.grad = None
    # Of a graph that is still alive (the last loss), torch would reuse the node that accumulates this gradient, and
    # its shape. It makes a new one where the dtype changes.
    parameter.data = values.new_empty(0, dtype=torch.float16 if values.dtype == torch.float32 else torch.float32)
    parameter.data = values
    # A backward through such a graph is then refused, not wrong.
    torch.autograd.graph.increment_version(parameter)
