"""What an error of a weight counts for: the metric of a layer's inputs and outputs, and decomposing in it.

The mean squared error of the outputs is that of the weight in the metric of the inputs,

    E ||(W - W_hat) x||^2 = ||(W - W_hat) C^(1/2)||^2,    C = E x x^T

and, where not all outputs count alike, ``||G^(1/2) (W - W_hat) C^(1/2)||^2``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import contraction
from .als import least_squares
from .decompose import balance
from .errors import DecompositionError
from .network import Axis, Mode, Network, modes_by_axis
from .normal_equations import Factor, Indices, primed
from .rounding import round_network

SWEEPS = 10
TOLERANCE = 1e-4
_NOTHING = 1e-12
"""Directions that weigh less than this share of the heaviest count for nothing."""

Fill = Callable[[Tensor, Network], Sequence[Tensor]]


@dataclass(frozen=True, eq=False)
class Metric:
    """Second moments of what a layer takes, and of the gradients of what it gives.

    Parameters
    ----------
    inputs : Tensor
        Shape (n, n), where n is the product of the axes of role in and kernel; or (groups, n, n); or (n,): weights, as
        the frequencies of the rows of a table. Positive semidefinite.
    outputs : Tensor, optional
        Shape (m, m), where m is the product of the axes of role out; or (groups, m, m). By default all outputs count
        alike.
    """

    inputs: Tensor
    outputs: Tensor | None = None

    def factors(self, axes: Sequence[Axis], network: Network) -> list[Factor]:
        """The metric in the modes that a network splits these axes into; padded inputs count for nothing.

        Raises
        ------
        DecompositionError
            If the sizes are not those of the axes, or not all is finite.
        """
        found = [_form("inputs", self.inputs, ("in", "kernel"), axes, network)]
        if self.outputs is not None:
            found.append(_form("outputs", self.outputs, ("out",), axes, network))
        return found


def _form(what: str, form: Tensor, roles: Sequence[str], axes: Sequence[Axis], network: Network) -> Factor:
    """A form, or weights, of the axes of some roles, in the modes of a network."""
    split = [pair for pair in zip(axes, modes_by_axis(axes, network), strict=True) if pair[0].role in roles]
    modes: list[Mode] = [mode for _, some in split for mode in some]
    groups = network.names("group") if form.dim() == 3 else ()
    lead, sizes = [network.size[name] for name in groups], [axis.size for axis, _ in split]
    sides = 1 if form.dim() == 1 else 2
    expected = (*([math.prod(lead)] if form.dim() == 3 else []), *[math.prod(sizes)] * sides)
    if tuple(form.shape) != expected:
        raise DecompositionError(f"metric: {what} of shape {expected}, by the axes; got {tuple(form.shape)}")
    if not bool(torch.isfinite(form).all()):
        raise DecompositionError(f"metric: {what}: every entry is finite; some are NaN or infinite")
    padding = [math.prod(mode.size for mode in some) - axis.size for axis, some in split] * sides
    values = form.detach().double().reshape(*lead, *sizes * sides)
    values = F.pad(values, [n for more in reversed(padding) for n in (0, more)])
    values = values.reshape(*lead, *[mode.size for mode in modes] * sides)
    names = tuple(mode.name for mode in modes)
    return Factor(values, names, groups) if sides == 2 else Factor(values, (), names)


def _carriers(network: Network, names: Sequence[str]) -> int:
    """How many cores carry any of some modes."""
    return sum(not set(names).isdisjoint(core) for core in network.cores)


def _kronecker(factor: Factor) -> list[Factor]:
    """A form as a product of forms of one mode each: its partial traces. Weights likewise, by their sums."""
    names = factor.modes or factor.batch
    if len(names) == 1:
        return [factor]
    total = _partial_trace(factor, None).clamp_min(torch.finfo(factor.values.dtype).tiny)
    share = total ** ((len(names) - 1) / len(names))
    found = []
    for name in names:
        part = _partial_trace(factor, name)
        part = part / share.reshape(*share.shape, *[1] * (part.dim() - share.dim()))
        found.append(Factor(part, (name,), factor.batch) if factor.modes else Factor(part, (), (name,)))
    return found


def _partial_trace(factor: Factor, kept: str | None) -> Tensor:
    """The form of one mode, the others traced: (*batch, n, n), or (*batch) if none is kept; of weights (n) or ()."""
    names, values = list(factor.names), factor.values
    for mode in factor.modes or factor.batch:
        if mode != kept and factor.modes:
            first, second = (place for place, name in enumerate(names) if name in (mode, primed(mode)))
            values = values.diagonal(dim1=first, dim2=second).sum(-1)
            names = [name for name in names if name not in (mode, primed(mode))]
        elif mode != kept:
            values = values.sum(names.index(mode))
            names.remove(mode)
    return values


# -- decomposing ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Root:
    """The symmetric square root of a factor, and its inverse where it counts for anything."""

    root: Factor
    inverse: Factor

    @classmethod
    def of(cls, factor: Factor) -> Root:
        if not factor.modes:
            values, vectors = factor.values, None
        else:
            lead = factor.values.shape[: len(factor.batch)]
            n = math.prod(factor.values.shape[len(lead) : len(lead) + len(factor.modes)])
            values, vectors = torch.linalg.eigh(factor.values.reshape(*lead, n, n))
        counts = values > _NOTHING * values.amax()
        root = values.clamp_min(0).sqrt()
        inverse = torch.where(counts, 1 / root, 0.0)
        made = []
        for some in (torch.where(counts, root, 0.0), inverse):
            whole = some if vectors is None else (vectors * some[..., None, :]) @ vectors.mT
            made.append(Factor(whole.reshape(factor.values.shape), factor.modes, factor.batch))
        return cls(*made)

    def carrier(self, network: Network) -> int:
        """The core that its modes sit on."""
        own = set(self.root.modes or self.root.batch)
        return next(k for k, core in enumerate(network.cores) if own <= set(core))


def _is_absorbed(factor: Factor, network: Network) -> bool:
    """Whether a factor is a change of the basis of one core."""
    own = set(factor.modes or factor.batch)
    holds = [core for core in network.cores if own <= set(core)]
    return _carriers(network, tuple(own)) == len(holds) == 1 and set(factor.batch) <= set(holds[0])


def times(tensor: Tensor, names: Indices, factor: Factor) -> Tensor:
    """A tensor with a factor applied to its modes."""
    sizes = dict(zip(names, tensor.shape, strict=True))
    sizes |= {primed(name): sizes[name] for name in factor.modes}
    result = tuple(primed(name) if name in factor.modes else name for name in names)
    return contraction.contract((names, factor.names), result, (tensor, factor.values), sizes)


def _changed(network: Network, cores: Sequence[Tensor], roots: Sequence[Root], inverse: bool) -> list[Tensor]:
    """Cores in the basis of some roots, or back."""
    cores = list(cores)
    for root in roots:
        k = root.carrier(network)
        cores[k] = times(cores[k], network.cores[k], root.inverse if inverse else root.root)
    return cores


def _squared(dense: Tensor, names: Indices, metric: Sequence[Factor]) -> float:
    """The squared norm in a metric."""
    applied = dense
    for factor in metric:
        applied = times(applied, names, factor)
    return max(float((dense * applied).sum()), 0.0)


def relative_error(dense: Tensor, network: Network, cores: Sequence[Tensor], metric: Sequence[Factor]) -> float:
    """``||W - W_hat|| / ||W||`` in a metric, of a weight of shape ``network.shape``; 0 where it does not see W."""
    names, dense = tuple(mode.name for mode in network.modes), dense.double()
    whole = _squared(dense, names, metric)
    difference = dense - contraction.to_dense(network, [core.double() for core in cores])
    return math.sqrt(_squared(difference, names, metric) / whole) if whole else 0.0


def fit(
    dense: Tensor,
    network: Network,
    fill: Fill,
    metric: Sequence[Factor],
    *,
    sweeps: int = SWEEPS,
    tolerance: float = TOLERANCE,
) -> list[Tensor]:
    """Fill the cores of a network so that a weight is kept in a metric.

    A factor whose modes sit on one core is a change of its basis: there the metric is gone, and for a low-rank matrix
    so is the problem, by one singular value decomposition. For the others the cores are filled in the basis of the
    Kronecker product that is nearest by partial traces, and then swept by least squares; or from the plain
    decomposition, if that is nearer. The result is never worse than either.

    Parameters
    ----------
    dense : Tensor
        Shape ``network.shape``, of Frobenius norm 1.
    network : Network
    fill : callable
        (dense, network) -> cores, as `Format.fill`.
    metric : sequence of Factor
        See `Metric.factors`.
    sweeps, tolerance
        See `least_squares`.

    Returns
    -------
    list of Tensor
        Shapes ``network.core_shapes``, in float64.

    References
    ----------
    Wang et al. 2024, SVD-LLM: truncation-aware data whitening, for the case of a matrix.
    """
    plain = [core.double() for core in fill(dense, network)]
    seen = Seen(dense, network, metric)
    if not seen.norm:
        return plain
    near = seen.back(network, seen.filled(fill))
    plain = _changed(network, plain, seen.taken, inverse=False)
    start = min(near, [plain[0] / seen.norm, *plain[1:]], key=lambda cores: seen.error(network, cores))
    cores, _ = seen.swept(network, start, sweeps, tolerance, torch.float64)
    cores = _changed(network, cores, seen.taken, inverse=True)
    return [cores[0] * seen.norm, *cores[1:]]


class Seen:
    """A weight as a metric sees it: in the bases of the cores that carry a factor alone, of norm 1 in the rest.

    `norm` is its own there, `rest` the factors that stay; `whitened` are the roots of the nearest Kronecker product of
    these, in whose basis cores are filled.
    """

    def __init__(self, dense: Tensor, network: Network, metric: Sequence[Factor]) -> None:
        self.network, self.names = network, tuple(mode.name for mode in network.modes)
        self.taken = [Root.of(factor) for factor in metric if _is_absorbed(factor, network)]
        self.rest = [factor for factor in metric if not _is_absorbed(factor, network)]
        parts = [part for factor in self.rest for part in _kronecker(factor)]
        self.whitened = [Root.of(part) for part in parts if _is_absorbed(part, network)]
        self.weight = dense.double()
        for root in self.taken:
            self.weight = times(self.weight, self.names, root.root)
        self.norm = math.sqrt(_squared(self.weight, self.names, self.rest))
        self.weight = self.weight / (self.norm or 1.0)

    def in_basis(self) -> tuple[Tensor, list[Factor]]:
        """The weight in the basis of the Kronecker product, and the forms that stay there, which are near identities.

        Of no norm in particular.
        """
        seen, forms = self.weight, []
        for root in self.whitened:
            seen = times(seen, self.names, root.root)
        for form in self.rest:
            values = form.values
            for root in self.whitened:
                if root.inverse.modes and set(root.inverse.modes) <= set(form.modes):
                    away = tuple(f"{name}*" for name in form.modes)
                    for places in ((form.modes, away), (away, form.modes)):
                        values = times(values, (*form.batch, *places[0], *places[1]), root.inverse)
            forms.append(Factor(values, form.modes, form.batch))
        return seen, forms

    def filled(self, fill: Fill) -> list[Tensor]:
        """Cores in the basis of the Kronecker product, see `back`."""
        seen, _ = self.in_basis()
        scale = torch.linalg.vector_norm(seen)
        cores = [core.double() for core in fill(seen / scale, self.network)]
        return [cores[0] * scale, *cores[1:]]

    def back(self, network: Network, cores: Sequence[Tensor]) -> list[Tensor]:
        """Cores of a network of these modes, in the bases of the weight again."""
        return _changed(network, cores, self.whitened, inverse=True)

    def error(self, network: Network, cores: Sequence[Tensor]) -> float:
        """The relative error of cores in the bases of the weight."""
        return relative_error(self.weight, network, cores, self.rest)

    def swept(
        self, network: Network, start: Sequence[Tensor], sweeps: int, tolerance: float, dtype: torch.dtype
    ) -> tuple[list[Tensor], float]:
        """Least squares from some cores on, in the bases of the weight; and the relative error."""
        return least_squares(
            network,
            self.weight.to(dtype),
            [core.to(dtype) for core in balance(network, start)],
            metric=[Factor(form.values.to(dtype), form.modes, form.batch) for form in self.rest],
            anchored=True,
            sweeps=sweeps,
            tolerance=tolerance,
        )


def curve(
    dense: Tensor,
    network: Network,
    fill: Fill,
    metric: Sequence[Factor],
    ranks: Sequence[Sequence[int]],
    swept: Collection[int] = (),
) -> list[float]:
    """How much of a weight, as a metric sees it, smaller and smaller networks lose: squared errors, not relative ones.

    The cores are filled once, for the largest network; each smaller one is rounded from the one before it.

    Parameters
    ----------
    dense : Tensor
        Shape ``network.shape``.
    network : Network
    fill : callable
    metric : sequence of Factor
    ranks : sequence of sequence of int
        Those of the smaller networks, none above those before.
    swept : collection of int
        The places of those that are swept by least squares as well, in float32, where that can gain something; what
        lies between two of them is then interpolated.
    """
    seen = Seen(dense, network, metric)
    if not seen.norm:
        return [0.0] * len(ranks)
    swept = sorted(swept) if seen.rest else []
    cores, errors = seen.filled(fill), dict[int, float]()
    for k, some in enumerate(ranks):
        if swept and swept[0] < k < swept[-1] and k not in swept:
            continue
        network, cores = round_network(network, cores, some)
        fitted = seen.back(network, cores)
        if k in swept:
            fitted, errors[k] = seen.swept(network, fitted, 1, 0.0, torch.float32)
            cores = _changed(network, [core.double() for core in fitted], seen.whitened, inverse=False)
        else:
            errors[k] = seen.error(network, fitted)
    for before, after in itertools.pairwise(sorted(errors)):
        for k in range(before + 1, after):
            errors[k] = errors[before] + (errors[after] - errors[before]) * (k - before) / (after - before)
    return [(errors[k] * seen.norm) ** 2 for k in range(len(ranks))]
