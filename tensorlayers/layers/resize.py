"""Smaller ranks for a layer in place: the parameters stay the same objects, and their optimizer follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from .. import contraction
from ..als import least_squares
from ..decompose import balance
from ..errors import NetworkError, RankError
from ..network import Network
from ..precision import without_autocast
from ..rank import Rank, clamp, resolve
from ..rounding import Kept, Rounding, check_finite, keep, round_bonds
from .kind import plain

if TYPE_CHECKING:
    from .base import FactorizedLayer

_SWEEPS = 100


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
        return Rounding(small, empty, {bond: None for bond, before, after in changed if after < before})
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
    return replace(rounding, cores=result, kept=dict.fromkeys(rounding.kept))


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
    return replace(again, kept={**cut.kept, **dict.fromkeys(again.kept)})


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
    for parameter, names, values in zip(first.cores, first.network.cores, rounding.cores, strict=True):
        changes = {bond: rounding.kept[bond] for bond in names if bond in rounding.kept}
        if changes:
            if optimizer is not None:
                _follow(optimizer, parameter, _projection(names, changes))
            _replace(parameter, values.contiguous())
    for layer in layers:
        layer._set_network(rounding.network)
        layer.format = layer.format.pin(rounding.network)
        layer.error = layer.output_error = None  # it was that of the larger network


def _projection(names: Sequence[str], changes: Mapping[str, Kept | None]) -> Callable[[Tensor], Tensor] | None:
    """What cuts a tensor like a core as the core is cut; None where the core's slices were mixed."""
    kept = {bond: slices for bond, slices in changes.items() if slices is not None}
    if len(kept) < len(changes):
        return None

    def project(tensor: Tensor) -> Tensor:
        for bond, slices in kept.items():
            tensor = slices.of(tensor, names, bond)
        return tensor.contiguous()

    return project


def _follow(optimizer: Optimizer, parameter: nn.Parameter, project: Callable[[Tensor], Tensor] | None) -> None:
    """Cut the optimizer's state of a parameter as the parameter will be, or drop it: it then starts anew."""
    if isinstance(optimizer, LBFGS):  # one history for all parameters together
        optimizer.state.clear()
        optimizer._numel_cache = None
        return
    state = optimizer.state.get(parameter, {})
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor) and value.dim()}
    others = [value for value in state.values() if not isinstance(value, Tensor)]
    alike = all(tensor.shape == parameter.shape for tensor in tensors.values())
    if project is None or not alike or not all(value is None or isinstance(value, (int, float)) for value in others):
        optimizer.state.pop(parameter, None)
    else:
        state.update({key: project(tensor) for key, tensor in tensors.items()})


def _replace(parameter: nn.Parameter, values: Tensor) -> None:
    """Give a parameter other values of another shape; ties, hooks and optimizers keep the same object."""
    parameter.grad = None
    # Of a graph that is still alive (the last loss), torch would reuse the node that accumulates this gradient, and
    # its shape. It makes a new one where the dtype changes.
    parameter.data = values.new_empty(0, dtype=torch.float16 if values.dtype == torch.float32 else torch.float32)
    parameter.data = values
    # A backward through such a graph is then refused, not wrong.
    torch.autograd.graph.increment_version(parameter)
