"""The normal equations of one core of a network, the others fixed, in any metric: found by index names, and solved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from . import contraction
from .contraction import plan
from .network import Network

_ITERATIONS = 20
"""Steps of conjugate gradients at most: they begin where the last sweep ended, so that few do."""
_RESIDUAL = 1e-3
_LARGEST = 2**27
"""Elements of a normal matrix at most."""
_JOINT = 768
"""Values of bonds whose mean form is decomposed as one matrix, at most."""

Indices = tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Factor:
    r"""A quadratic form of some modes: the squared norm of a tensor is the sum over all factors' indices of

    :math:`\sum W[b, i, \cdot]\, F[b, i, i']\, W[b, i', \cdot]`; modes that no factor has count as they are.

    Parameters
    ----------
    values : Tensor
        Shape ``(*batch, *modes, *modes)``; symmetric and positive semidefinite for each value of the batch.
    modes : tuple of str
        The modes that it couples; none: `values` are weights.
    batch : tuple of str
        Modes that choose the form.
    """

    values: Tensor
    modes: Indices
    batch: Indices = ()

    @property
    def names(self) -> Indices:
        """The indices of `values`: those of the second place are primed."""
        return (*self.batch, *self.modes, *map(primed, self.modes))


def primed(index: str) -> str:
    return f"{index}'"


class Fit:
    """What all cores share: the weight with the metric applied to one side of it."""

    def __init__(
        self, network: Network, dense: Tensor | tuple[Network, Sequence[Tensor]], metric: tuple[Factor, ...]
    ) -> None:
        self.network, self.metric = network, metric
        self.free = tuple(mode.name for mode in network.modes)
        self.coupled = {name for factor in metric for name in factor.modes}
        self.weighted = {name for factor in metric for name in factor.batch}
        self.sizes = dict(network.size)
        for index in (*network.bonds, *self.coupled):
            self.sizes[primed(index)] = network.size[index]
        # The weight has the primed modes, which the factors turn into plain ones.
        turned = {name: primed(name) for name in self.coupled}
        if isinstance(dense, Tensor):
            self.given: tuple[Indices, ...] = (_renamed(self.free, turned),)
            self.parts: tuple[Tensor, ...] = (dense,)
        else:
            other, parts = dense
            theirs = {bond: f"{bond}*" for bond in other.bonds}
            self.sizes |= {theirs[bond]: other.size[bond] for bond in theirs}
            self.given = tuple(_renamed(core, {**theirs, **turned}) for core in other.cores)
            self.parts = tuple(parts)
        self.given += tuple(factor.names for factor in metric)
        self.parts += tuple(factor.values for factor in metric)
        if metric and isinstance(dense, Tensor):  # once, not at every core
            self.given, self.parts = (self.free,), (self.contract(self.given, self.free, self.parts),)
        self._marginals: dict[Indices, tuple[Tensor, Tensor]] = {}

    def contract(self, names: Sequence[Indices], result: Sequence[str], tensors: Sequence[Tensor]) -> Tensor:
        return contraction.contract(names, result, tensors, self.sizes)

    def flops(self, names: Sequence[Indices], result: Sequence[str]) -> int:
        used = dict.fromkeys(index for term in names for index in term)
        return plan(tuple(names), tuple(result), tuple((index, self.sizes[index]) for index in used)).flops

    def volume(self, indices: Iterable[str]) -> int:
        return math.prod(self.sizes[index] for index in indices)

    def marginals(self, modes: Indices) -> dict[Indices, tuple[Tensor, Tensor]]:
        """By those modes of some that one factor couples: the eigenvalues and eigenvectors of its mean form.

        The factor's other modes are traced; of trace 1.
        """
        found = {}
        for factor in self.metric:
            held = tuple(name for name in modes if name in factor.modes)
            if held and held not in self._marginals:
                traced = {primed(name): name for name in factor.modes if name not in held}
                names, values = _traced(factor.names, factor.values, traced)
                form = self.contract((names,), (*held, *map(primed, held)), (values,))
                form = form.reshape(self.volume(held), -1).double()
                self._marginals[held] = _eigen(form / _trace(form))
            if held:
                found[held] = self._marginals[held]
        return found


def _renamed(names: Sequence[str], new: Mapping[str, str]) -> Indices:
    return tuple(new.get(index, index) for index in names)


def _traced(names: Indices, tensor: Tensor, new: Mapping[str, str]) -> tuple[Indices, Tensor]:
    """A tensor whose indices are renamed; of two that become one, the diagonal."""
    names = _renamed(names, new)
    for index in dict.fromkeys(index for index in names if names.count(index) > 1):
        first, second = (place for place, other in enumerate(names) if other == index)
        tensor = tensor.diagonal(dim1=first, dim2=second)
        names = (*(other for other in names if other != index), index)
    return names, tensor


def _trace(form: Tensor) -> Tensor:
    """Of each matrix, above zero; as a matrix of one entry."""
    return form.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp_min(torch.finfo(form.dtype).tiny)


def _eigen(form: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(form)
    return values.clamp_min(0), vectors


@dataclass
class _Block:
    """Indices of the unknown that are connected by the other cores or the metric, and these."""

    names: list[Indices]
    tensors: list[Tensor]
    unknown: Indices


class Core:
    """The least squares problem of one core, the others fixed.

    The core is seen as (batch, unknown, own). A problem of its own for each value of the batch: modes that other cores
    carry too, or that weights depend on. The same matrix for all values of its own modes, that neither other cores nor
    the metric know. Unknown together are the bonds, and the modes that the metric couples.
    """

    def __init__(self, fit: Fit, cores: Sequence[Tensor], k: int) -> None:
        self.fit, self.start, self.target = fit, cores[k], fit.network.cores[k]
        bonds = {bond: primed(bond) for bond in fit.network.bonds}
        self.turned = {**bonds, **{name: primed(name) for name in fit.coupled}}
        self.others = [(names, core) for j, (names, core) in enumerate(zip(fit.network.cores, cores)) if j != k]
        elsewhere = {index for names, _ in self.others for index in names}
        shared = (elsewhere | fit.weighted) - fit.coupled
        single = [index for index in self.target if index in fit.free and index not in fit.coupled]
        self.batch = tuple(index for index in single if index in shared)
        self.own = tuple(index for index in single if index not in shared)
        self.unknown = tuple(index for index in self.target if index not in single)
        self.order = (*self.batch, *self.unknown, *self.own)

    @cached_property
    def right(self) -> Tensor:
        """(batch, unknown, own), each joined to one dimension."""
        names, tensors = zip(*self.others, strict=True)
        found = self.fit.contract((*self.fit.given, *names), self.order, (*self.fit.parts, *tensors))
        return self._joined(found)

    @cached_property
    def blocks(self) -> list[_Block]:
        """The normal matrix is the Kronecker product of theirs."""
        nodes = [*self.others, *((_renamed(names, self.turned), core) for names, core in self.others)]
        nodes += [(factor.names, factor.values) for factor in self.fit.metric]
        found: list[tuple[set[str], list[tuple[Indices, Tensor]]]] = []
        for node in nodes:
            indices, members = set(node[0]) - set(self.batch), [node]
            for other in [other for other in found if other[0] & indices]:
                found.remove(other)
                indices, members = indices | other[0], [*other[1], *members]
            found.append((indices, members))
        return [
            _Block(
                [names for names, _ in members],
                [tensor for _, tensor in members],
                tuple(index for index in self.unknown if index in indices),
            )
            for indices, members in found
        ]

    def solved(self, ridge: float, anchored: bool) -> tuple[Tensor, float]:
        """The core, and the relative error with it."""
        start = self._joined(self.start.permute([self.target.index(index) for index in self.order]))
        applied = self.applied(start)
        mean = self.mean.clamp_min(torch.finfo(self.start.dtype).tiny)
        shift = (ridge * mean)[:, None, None]
        residual = self.right - applied
        if not anchored:
            residual = residual - shift * start
        change = self._by_gradients(residual, shift) if self.is_large else self._direct(residual, shift)
        solution = start + change
        applied = applied + self.applied(change)
        squared = 1 - 2 * (solution * self.right).sum() + (solution * applied).sum()
        shape = [self.fit.sizes[index] for index in self.order]
        core = solution.to(self.start.dtype).reshape(shape)
        return core.permute([self.order.index(index) for index in self.target]), float(squared.clamp_min(0).sqrt())

    # -- the normal matrix ----------------------------------------------------------------------------------------

    @cached_property
    def is_large(self) -> bool:
        """Whether conjugate gradients take less arithmetic, or the matrix too much memory."""
        count, own = self.fit.volume(self.batch), self.fit.volume(self.own)
        direct = 0.0
        for block in self.blocks:
            size = self.fit.volume(block.unknown)
            if count * size**2 > _LARGEST:
                return True
            direct += self.fit.flops(block.names, self._sides(block)) + count * size**3 * (
                1 / 3 if len(self.blocks) == 1 else 9.0
            )
        direct += 2 * count * self.fit.volume(self.unknown) ** 2 * own if len(self.blocks) == 1 else 0
        return direct > _ITERATIONS * self.fit.flops(*self._operator)

    @cached_property
    def _operator(self) -> tuple[list[Indices], Indices]:
        """The product of the normal matrix with a core, by names."""
        names = [self.target, *(names for block in self.blocks for names in block.names)]
        return names, _renamed(self.order, self.turned)

    def applied(self, x: Tensor) -> Tensor:
        """The normal matrix times (batch, unknown, own)."""
        if not self.is_large:
            return self._through(x, self._groups, lambda parts: _product(parts, self._matrices))
        names, result = self._operator
        core = x.reshape([self.fit.sizes[index] for index in self.order])
        core = core.permute([self.order.index(index) for index in self.target])
        tensors = [tensor for block in self.blocks for tensor in block.tensors]
        return self._joined(self.fit.contract(names, result, [core.to(self.start.dtype), *tensors]))

    @cached_property
    def _matrices(self) -> list[Tensor]:
        """Of the blocks, (batch, n, n) each."""
        return [self._matrix(block) for block in self.blocks]

    @cached_property
    def _groups(self) -> list[Indices]:
        return [block.unknown for block in self.blocks]

    def _through(self, x: Tensor, groups: Sequence[Indices], function: Callable[[Tensor], Tensor]) -> Tensor:
        """A function of (batch, a dimension for each group of the unknown, own), of (batch, unknown, own)."""
        order = [index for group in groups for index in group]
        parts = x.reshape(x.shape[0], *(self.fit.sizes[index] for index in self.unknown), x.shape[2])
        to = [0, *(1 + self.unknown.index(index) for index in order), parts.dim() - 1]
        parts = parts.permute(to).reshape(x.shape[0], *map(self.fit.volume, groups), x.shape[2])
        parts = function(parts).reshape(x.shape[0], *(self.fit.sizes[index] for index in order), x.shape[2])
        back = [0, *(1 + order.index(index) for index in self.unknown), parts.dim() - 1]
        return parts.permute(back).reshape(x.shape)

    def _sides(self, block: _Block) -> Indices:
        batch = [index for index in self.batch if any(index in names for names in block.names)]
        return (*batch, *block.unknown, *map(primed, block.unknown))

    def _matrix(self, block: _Block, unknown: Indices | None = None, traced: Mapping[str, str] | None = None) -> Tensor:
        """Of a block, (batch, n, n); the batch is of size 1 along what it does not carry."""
        unknown = block.unknown if unknown is None else unknown
        nodes = [_traced(*node, traced or {}) for node in zip(block.names, block.tensors, strict=True)]
        names, tensors = zip(*nodes, strict=True)
        batch = [index for index in self.batch if any(index in term for term in names)]
        found = self.fit.contract(names, (*batch, *unknown, *map(primed, unknown)), tensors)
        n = self.fit.volume(unknown)
        found = found.reshape([self.fit.sizes[i] if i in batch else 1 for i in self.batch] + [n, n])
        sizes = [self.fit.sizes[index] for index in self.batch]
        return found.expand(*sizes, n, n).reshape(-1, n, n).double()

    @cached_property
    def mean(self) -> Tensor:
        """The mean diagonal of the normal matrix, (batch)."""
        found = torch.ones(self.fit.volume(self.batch), dtype=torch.float64, device=self.start.device)
        for block in self.blocks:
            traced = {primed(index): index for index in block.unknown}
            found = found * self._matrix(block, (), traced)[:, 0, 0] / self.fit.volume(block.unknown)
        return found

    # -- solving --------------------------------------------------------------------------------------------------

    def _direct(self, residual: Tensor, shift: Tensor) -> Tensor:
        if len(self._matrices) == 1:
            (matrix,) = self._matrices
            eye = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
            lower, failed = torch.linalg.cholesky_ex(matrix + shift * eye)
            if not failed.any():
                return torch.cholesky_solve(residual, lower)
        pairs = [_eigen(matrix) for matrix in self._matrices]
        return self._through(residual, self._groups, lambda parts: _quotient(parts, pairs, shift))

    @cached_property
    def _preconditioner(self) -> tuple[list[tuple[Tensor, Tensor]], list[Indices]]:
        """Each block as the Kronecker product of the mean over its modes and the mean over its bonds.

        Of many bonds' values likewise of the mean over all bonds but one, for each of them.
        """
        pairs, groups = [], []
        for block in self.blocks:
            modes = tuple(index for index in block.unknown if index in self.fit.coupled)
            bonds = tuple(index for index in block.unknown if index not in modes)
            for k, part in enumerate([bonds] if self.fit.volume(bonds) <= _JOINT else [(bond,) for bond in bonds]):
                traced = {primed(index): index for index in block.unknown if index not in part}
                form = self._matrix(block, part, traced)
                pairs.append(_eigen(form / _trace(form) if k else form))
                groups.append(part)
            for held, pair in self.fit.marginals(modes).items():
                pairs.append(pair)
                groups.append(held)
        return pairs, groups

    def _by_gradients(self, residual: Tensor, shift: Tensor) -> Tensor:
        """Preconditioned conjugate gradients from zero: every step lowers the error."""
        pairs, groups = self._preconditioner

        def scaled(r: Tensor) -> Tensor:
            return self._through(r, groups, lambda parts: _quotient(parts, pairs, shift))

        x = torch.zeros_like(residual)
        r, z = residual, scaled(residual)
        p, rz = z, (residual * z).sum()
        first = rz
        for _ in range(_ITERATIONS):
            if not rz > _RESIDUAL**2 * first:
                break
            ap = self.applied(p) + shift * p
            step = rz / (p * ap).sum()
            x, r = x + step * p, r - step * ap
            z = scaled(r)
            before, rz = rz, (r * z).sum()
            p = z + rz / before * p
        return x

    def _joined(self, tensor: Tensor) -> Tensor:
        """(batch, unknown, own) in float64, from all indices in that order."""
        volumes = [self.fit.volume(indices) for indices in (self.batch, self.unknown, self.own)]
        return tensor.reshape(volumes).double()


def _product(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """A Kronecker product of matrices times (batch, a dimension for each of them, own)."""
    for place, matrix in enumerate(matrices, 1):
        x = _along(x, matrix, place)
    return x


def _quotient(x: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], shift: Tensor) -> Tensor:
    """The inverse of a shifted Kronecker product, by eigenvalues and eigenvectors, times what `_product` takes."""
    x = _product(x, [vectors.mT for _, vectors in pairs])
    scale = shift.reshape(-1, *(1 for _ in pairs), 1)
    product = torch.ones_like(scale)
    for place, (values, _) in enumerate(pairs, 1):
        sizes = [1] * x.dim()
        sizes[place] = values.shape[-1]
        sizes[0] = values.shape[0] if values.dim() > 1 else 1
        product = product * values.reshape(sizes)
    return _product(x / (product + scale), [vectors for _, vectors in pairs])


def _along(x: Tensor, matrix: Tensor, place: int) -> Tensor:
    """A matrix, (n, n) or (batch, n, n), times one dimension of (batch, ..., n, ...)."""
    to = 0 if matrix.dim() == 2 else 1  # one matrix for all: one product, not one for each of the batch
    moved = x.movedim(place, to)
    return (matrix @ moved.flatten(to + 1)).reshape(moved.shape).movedim(to, place)
