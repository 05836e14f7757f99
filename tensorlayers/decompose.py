"""Decomposing dense weights, guarded: whatever fits the cores (fit.py) gets a finite, normalised tensor.

Half precision is decomposed in float32, cores are balanced and scaled back, and the result is finite or refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import contraction
from .errors import DecompositionError
from .network import Axis, Network, modes_by_axis
from .precision import without_autocast


@dataclass(frozen=True)
class Decomposition:
    """A factorized weight.

    Parameters
    ----------
    network : Network
    cores : tuple of Tensor
        Shapes ``network.core_shapes``; the dtype and device of the weight; balanced: the slices of a bond have the
        same norm on each core that carries it.
    error : float
        Relative error in Frobenius norm, ``||W - W_hat|| / ||W||``, of the cores as returned (rounding included).
    output_error : float or None
        Likewise in the metric that it was made in: that of the layer's outputs. None without one.
    """

    network: Network
    cores: tuple[Tensor, ...]
    error: float
    output_error: float | None = None


def decompose(
    weight: Tensor,  # one dimension an axis
    axes: Sequence[Axis],
    network: Network,
    fill: Callable[[Tensor, Network], Sequence[Tensor]],
) -> Decomposition:
    """Guard a format's `fill`: check, widen, pad, normalise, fill, balance, scale back, cast, measure.

    Parameters
    ----------
    weight : Tensor
        Shape: the sizes of `axes`; floating point. float16 and bfloat16 are decomposed in float32.
    axes : sequence of Axis
    network : Network
        Its modes split the axes, padding included.
    fill : callable
        (dense of shape network.shape and norm 1, network) -> cores.

    Returns
    -------
    Decomposition

    Raises
    ------
    DecompositionError
        If the weight is no floating-point tensor of this shape with values, or has NaN or infinite entries; or if
        the cores came out not finite in the weight's dtype.
    """
    check(weight, axes)
    with without_autocast(weight):
        return _decompose(weight, axes, network, fill)


def check(weight: Tensor, axes: Sequence[Axis]) -> None:
    """Raise `DecompositionError` where a weight has no finite floating-point values, or not the shape of its axes."""
    shape = tuple(axis.size for axis in axes)
    if tuple(weight.shape) != shape:
        raise DecompositionError(f"weight {tuple(weight.shape)}: its axes have the sizes {shape}")
    if not weight.is_floating_point():
        raise DecompositionError(f"weight: a floating-point dtype; got {weight.dtype}")
    if weight.is_meta:
        raise DecompositionError("weight: it is on the meta device, without values to decompose")
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise DecompositionError(f"weight {tuple(weight.shape)}: every entry is finite; {bad} are NaN or infinite")


def _decompose(
    weight: Tensor, axes: Sequence[Axis], network: Network, fill: Callable[[Tensor, Network], Sequence[Tensor]]
) -> Decomposition:
    dense = weight.detach().to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    # The largest entry first: squares of 1e-30 underflow, of 1e30 overflow.
    scale = float(dense.abs().max())
    if scale > 0:
        dense = dense / scale
        norm = float(torch.linalg.vector_norm(dense))
        dense, scale = dense / norm, scale * norm
        cores = list(fill(tensorized(dense, axes, network), network))
        contraction.check_cores(network, cores)
        # A root for each core, not the power at once: 1e-30 has no float32 square.
        cores = [core * scale ** (1 / len(cores)) for core in balance(network, cores)]
    else:
        cores = _zero(network, dense)
    cast = tuple(core.to(weight.dtype).contiguous() for core in cores)
    if not all(bool(torch.isfinite(core).all()) for core in cast):
        raise DecompositionError(f"weight {tuple(weight.shape)}: the cores are not finite in {weight.dtype}")
    return Decomposition(network, cast, _relative_error(dense, axes, network, cast, scale))


def tensorized(weight: Tensor, axes: Sequence[Axis], network: Network) -> Tensor:
    """A weight of one dimension an axis in the modes of a network, padded with zeros: of shape ``network.shape``."""
    padded = [math.prod(mode.size for mode in modes) for modes in modes_by_axis(axes, network)]
    padding = [pair for size, whole in zip(weight.shape, padded, strict=True) for pair in (whole - size, 0)][::-1]
    return F.pad(weight, padding).reshape(network.shape)


def _relative_error(
    unit: Tensor, axes: Sequence[Axis], network: Network, cores: Sequence[Tensor], scale: float
) -> float:
    """The error of the cores against a weight of norm 1 that was scaled by `scale`."""
    if scale == 0:
        return 0.0
    root = scale ** (1 / len(cores))
    dense = contraction.dense_weight(network, [core.to(unit.dtype) / root for core in cores], axes)
    return float(torch.linalg.vector_norm(unit - dense, dtype=torch.float64))


def _zero(network: Network, like: Tensor) -> list[Tensor]:
    """Cores of a zero weight: random but for one zero core, so that gradients still reach it."""
    cores = [torch.randn(shape, dtype=like.dtype, device=like.device) for shape in network.core_shapes[:-1]]
    cores = [core / torch.linalg.vector_norm(core) for core in cores]
    return [*cores, torch.zeros(network.core_shapes[-1], dtype=like.dtype, device=like.device)]


def balance(
    network: Network, cores: Sequence[Tensor], sweeps: int = 20, bonds: Sequence[str] | None = None
) -> list[Tensor]:
    """Give the slices of each bond the same norm on every core that carries it; the dense weight is unchanged.

    Unbalanced cores make fine-tuning diverge: their gradients differ by the ratio of their norms. Slices that are
    zero on one core are left as they are.

    Parameters
    ----------
    network : Network
    cores : sequence of Tensor
        Shapes ``network.core_shapes``.
    sweeps : int
        Passes over the bonds; they interact where a core carries several.
    bonds : sequence of str, optional
        The bonds to balance; by default all. Cores that carry none of them are returned as they are.

    Returns
    -------
    list of Tensor
    """
    cores = list(cores)
    bonds = network.bonds if bonds is None else bonds
    for _ in range(sweeps if len(bonds) > 1 else 1):
        largest = 0.0
        for bond in bonds:
            carriers = [(k, core.index(bond)) for k, core in enumerate(network.cores) if bond in core]
            norms = torch.stack(
                [torch.linalg.vector_norm(cores[k].movedim(axis, 0).flatten(1), dim=1) for k, axis in carriers]
            )
            alive = (norms > 0).all(dim=0)
            logs = torch.where(alive, norms, torch.ones_like(norms)).log()
            shift = logs.mean(dim=0) - logs
            largest = max(largest, float(shift.abs().max()))
            for (k, axis), factor in zip(carriers, shift.exp(), strict=True):
                shape = [1] * cores[k].dim()
                shape[axis] = -1
                cores[k] = cores[k] * factor.reshape(shape)
        if largest < 1e-3:
            break
    return cores
