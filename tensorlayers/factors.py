"""The tensors of a TensorLy-Torch weight as the cores of one of our networks: permuted, merged, never fitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import contraction
from .decompose import balance
from .errors import ConversionError
from .layers import FactorizedLayer, FactorizedLinear, Settings
from .network import Network

Named = tuple[tuple[str, ...], Tensor]
"""The index names of a core, and the core."""


@dataclass(frozen=True)
class Weight:
    """The tensors of a tltorch weight.

    Parameters
    ----------
    named : mapping
        ``"tensor"`` of a dense weight, ``"core"`` of Tucker, ``"weights"`` of CP; None where there is none.
    factors : list of Tensor
        (mode, rank) of CP and Tucker, (rank, mode, rank) of TT, (rank, first, second, rank) of BlockTT, (out, in) of
        a contraction layer.
    """

    named: Mapping[str, Tensor | None] = field(default_factory=dict)
    factors: list[Tensor] = field(default_factory=list)

    @property
    def structure(self) -> str:
        """``"dense"``, ``"tucker"``, ``"cp"``, ``"matrices"``, ``"train"`` or ``"block train"``."""
        if not self.factors:
            return "dense"
        for name, structure in (("core", "tucker"), ("weights", "cp")):
            if self.named.get(name) is not None:
                return structure
        return {2: "matrices", 3: "train"}.get(self.factors[0].dim(), "block train")

    def tensor(self, name: str) -> Tensor:
        """One of the named tensors, which is there."""
        tensor = self.named[name]
        assert tensor is not None
        return tensor


def named_cores(weight: Weight, layer: type[FactorizedLayer], settings: Settings, network: Network) -> list[Named]:
    """The cores of a tltorch weight in float64, with the index names that our network of its structure gives them.

    Parameters
    ----------
    weight : Weight
    layer : type
        Our kind of layer, built with `settings`; it says in which order tltorch has the modes.
    settings : dict
    network : Network
        Names the modes and bonds; its sizes are not looked at.

    Raises
    ------
    ConversionError
        If the number of factors or of their axes does not fit, or no format of ours has this structure.
    """
    stack, out, into = (network.names(role) for role in ("stack", "out", "in"))
    kernel = iter(network.names("kernel"))
    # A kernel of size 1 is no mode here, but one there.
    kernels = [next(kernel) if size > 1 else None for size in settings.get("kernel_size", ())]
    first, second = (out, into) if kernels or issubclass(layer, FactorizedLinear) else (into, out)
    factors = [factor.double() for factor in weight.factors]
    structure = weight.structure
    sites: list[tuple[str | None, ...]] = [(name,) for name in (*stack, *first, *second, *kernels)]
    if structure == "train" and kernels:
        sites = [(name,) for name in (*stack, *into, *kernels, *out)]
    elif structure == "train" and len(sites) > 2:
        raise ConversionError("weight: a tensor train of three or more modes has a format in convolutions only")
    elif structure == "block train":
        sites = [(*first[k : k + 1], *second[k : k + 1]) for k in range(max(len(first), len(second)))]
    elif structure == "matrices":
        sites = [*zip(out, into, strict=True)]
    bonds = {"cp": 1, "tucker": 1, "matrices": 0}.get(structure, 2)
    if [factor.dim() for factor in factors] != [len(site) + bonds for site in sites]:
        axes = ", ".join(str(len(site) + bonds) for site in sites)
        raise ConversionError(f"weight: factors of {axes} axes; got {[tuple(factor.shape) for factor in factors]}")
    if structure == "matrices":
        return [((o, i), factor) for (o, i), factor in zip(zip(out, into), factors, strict=True)]
    if structure == "cp":
        return _cp(weight.tensor("weights").double(), factors, [name for (name,) in sites])
    if structure == "tucker":
        return _tucker(weight.tensor("core").double(), factors, [name for (name,) in sites], network)
    return _train(factors, sites)


def _cp(weights: Tensor, factors: Sequence[Tensor], order: Sequence[str | None]) -> list[Named]:
    cores: list[Named] = []
    for factor, name in zip(factors, order, strict=True):
        if name is None:  # a row of components
            weights = weights * factor[0]
        else:
            cores.append(((name, "r"), factor))
    names, first = cores[0]
    return [(names, first * weights), *cores[1:]]


def _tucker(core: Tensor, factors: Sequence[Tensor], order: Sequence[str | None], network: Network) -> list[Named]:
    cores: list[Named] = []
    names: list[str] = []
    for factor, name in zip(factors, order, strict=True):
        position = len(names)
        if name is not None and f"r_{name}" in network.bonds:
            cores.append(((name, f"r_{name}"), factor))
            names.append(f"r_{name}")
            continue
        core = torch.tensordot(core, factor, dims=([position], [1])).movedim(-1, position)
        if name is None:
            core = core.select(position, 0)
        else:
            names.append(name)
    return [*cores, (tuple(names), core)]


def _train(factors: Sequence[Tensor], sites: Sequence[tuple[str | None, ...]]) -> list[Named]:
    if factors[0].shape[0] != 1 or factors[-1].shape[-1] != 1:
        raise ConversionError("weight: the first and last bond of a tensor train have size 1")
    cores: list[tuple[tuple[str, ...], Tensor]] = []
    for factor, site in zip(factors, sites, strict=True):
        names = tuple(name for name in site if name is not None)
        if names:
            cores.append((names, factor))
        else:
            before, core = cores.pop()
            cores.append((before, torch.tensordot(core, factor[:, 0], 1)))
    last = len(cores) - 1
    cores[0] = cores[0][0], cores[0][1].squeeze(0)
    cores[last] = cores[last][0], cores[last][1].squeeze(-1)
    return [
        ((*([f"r{k}"] if k else []), *names, *([f"r{k + 1}"] if k < last else [])), core)
        for k, (names, core) in enumerate(cores)
    ]


def fitted(cores: Sequence[Named], layer: FactorizedLayer) -> list[Tensor]:
    """The cores in the order and with the axes of a layer's network.

    Ranks above the largest useful one are lowered to it, the weight unchanged.

    Raises
    ------
    ConversionError
        If the indices are not those of the layer's network, or a mode or rank has another size.
    """
    network = layer.network
    by_index = {frozenset(names): (names, core) for names, core in cores}
    if set(by_index) != {frozenset(names) for names in network.cores}:
        raise ConversionError(f"weight: cores {network.cores}; got {tuple(names for names, _ in cores)}")
    ordered = []
    sizes: dict[str, int] = {}
    for names in network.cores:
        given, core = by_index[frozenset(names)]
        ordered.append(core.permute([given.index(name) for name in names]))
        for name, size in zip(names, ordered[-1].shape, strict=True):
            if sizes.setdefault(name, size) != size:
                raise ConversionError(f"weight: index {name} has one size; got {sizes[name]} and {size}")
    for mode in network.modes:
        if sizes[mode.name] != mode.size:
            raise ConversionError(f"weight: mode {mode.name} has size {mode.size}; got {sizes[mode.name]}")
    source, ordered = _useful(network.with_ranks([sizes[bond] for bond in network.bonds]), ordered, layer)
    for bond, wanted, got in zip(network.bonds, network.ranks, source.ranks, strict=True):
        if wanted != got:
            raise ConversionError(f"weight: rank {bond} is {wanted} in the layer; got {got}")
    return ordered


def _useful(source: Network, cores: list[Tensor], layer: FactorizedLayer) -> tuple[Network, list[Tensor]]:
    """Lower every bond to its largest useful size: `rank.clamp` says that nothing is lost, here it is done."""
    for bond in source.bonds:
        limit = source.rank_limit(bond)
        if source.size[bond] <= limit:
            continue
        carriers = [k for k, names in enumerate(source.cores) if bond in names]
        if len(carriers) > 2:
            if layer.network.size[bond] < limit:
                break
            # At its largest rank a format writes the weight down.
            dense = contraction.to_dense(source, cores)
            filled = balance(layer.network, layer.format.fill(dense.detach(), layer.network))
            return layer.network, [core.requires_grad_(dense.requires_grad) for core in filled]
        # small = Q R over its bond: R stays, Q goes to the other core.
        small, large = sorted(carriers, key=lambda k: cores[k].numel())
        axis, other = (source.cores[k].index(bond) for k in (small, large))
        unfolded = cores[small].movedim(axis, 0)
        q, r = torch.linalg.qr(unfolded.flatten(1))
        cores[small] = r.reshape(-1, *unfolded.shape[1:]).movedim(0, axis)
        cores[large] = torch.tensordot(cores[large], q, dims=([other], [0])).movedim(-1, other)
        lowered = source.with_ranks([limit if name == bond else source.size[name] for name in source.bonds])
        return _useful(lowered, cores, layer)  # which may lower the limits of others
    return source, cores
