"""Mode and Network: which index sits on which core. Names, shapes, counts; no torch.

A format is nothing but a `Network`: every other property of a layer (parameter count, contraction order,
initialisation, useful ranks, what a Triton kernel can run) follows from the index names alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from .errors import NetworkError

ROLES = ("out", "in", "kernel", "group", "stack")


@dataclass(frozen=True)
class Mode:
    """One dimension of the (tensorized) dense weight.

    Parameters
    ----------
    name : str
        The index name; unique in its network.
    size : int
        Number of values of the index, at least 1.
    role : str
        ``"out"``, ``"in"``, ``"kernel"``, ``"group"`` (in the input and in the output, not summed) or ``"stack"``
        (fixed to this layer's position; the cores are shared between layers).

    Raises
    ------
    NetworkError
        If the role is unknown or the size is below 1.
    """

    name: str
    size: int
    role: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise NetworkError(f"mode {self.name!r}: a role is one of {', '.join(ROLES)}; got {self.role!r}")
        if self.size < 1:
            raise NetworkError(f"mode {self.name!r}: a size is at least 1; got {self.size}")


@dataclass(frozen=True)
class Network:
    """A tensor network: the cores, as tuples of index names, and the size of every index.

    An index that is a mode is free in the dense weight; every other index is a bond and is summed. An index that
    is a mode *and* sits on several cores is a batch-like hyperindex (block tensor train); a bond on more than two
    cores is a summed hyperindex (CP).

    Parameters
    ----------
    cores : tuple of tuple of str
        The index names of each core, in the order of its axes.
    sizes : mapping, or tuple of (str, int)
        The size of every bond. Sizes of modes may be included and must then agree with `modes`. Stored as a tuple
        of pairs over all indices in order of appearance, so that a network is hashable and plans are cached on it.
    modes : tuple of Mode
        The free indices, in the order of the dense weight's axes.

    Raises
    ------
    NetworkError
        If an index has no size or two sizes, a mode sits on no core, a core names an index twice, or a bond sits
        on one core only.

    Examples
    --------
    >>> tt = Network(
    ...     cores=(("o1", "i1", "r1"), ("r1", "o2", "i2")),
    ...     sizes={"r1": 8},
    ...     modes=(Mode("o1", 48, "out"), Mode("o2", 64, "out"), Mode("i1", 24, "in"), Mode("i2", 32, "in")),
    ... )
    >>> tt.core_shapes
    ((48, 24, 8), (8, 64, 32))
    >>> tt.num_parameters
    25600
    >>> tt.rank_limit("r1")
    1152
    """

    cores: tuple[tuple[str, ...], ...]
    sizes: tuple[tuple[str, int], ...]
    modes: tuple[Mode, ...]

    def __post_init__(self) -> None:
        cores = tuple(tuple(core) for core in self.cores)
        modes = tuple(self.modes)
        given = list(self.sizes.items() if isinstance(self.sizes, Mapping) else self.sizes)
        given += [(mode.name, mode.size) for mode in modes]
        known: dict[str, int] = {}
        for name, size in given:
            if known.setdefault(name, int(size)) != size:
                raise NetworkError(f"index {name!r}: one size each; got {known[name]} and {size}")
        if len({mode.name for mode in modes}) != len(modes):
            raise NetworkError(f"modes: names are unique; got {[mode.name for mode in modes]}")
        order = list(dict.fromkeys(index for core in cores for index in core))
        for core in cores:
            if len(set(core)) != len(core):
                raise NetworkError(f"core {core}: an index sits on a core once")
        for index in order:
            if index == "batch" or not index.isidentifier():
                raise NetworkError(f"index {index!r}: an identifier other than 'batch', the rows of the input")
            if index not in known:
                raise NetworkError(f"index {index!r}: every index has a size; got none")
            if known[index] < 1:
                raise NetworkError(f"index {index!r}: a size is at least 1; got {known[index]}")
        free = {mode.name for mode in modes}
        for name in known:
            if name not in order:
                raise NetworkError(f"index {name!r}: every index sits on a core; it is on none of {cores}")
        for index in order:
            if index not in free and sum(index in core for core in cores) < 2:
                raise NetworkError(f"bond {index!r}: a bond joins at least two cores; it sits on one")
        object.__setattr__(self, "cores", cores)
        object.__setattr__(self, "modes", modes)
        object.__setattr__(self, "sizes", tuple((index, known[index]) for index in order))
        object.__setattr__(self, "_hash", hash((cores, self.sizes, modes)))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined, no-any-return]  # asked for at every call of a layer

    @cached_property
    def size(self) -> dict[str, int]:
        """The size of every index, by name."""
        return dict(self.sizes)

    @cached_property
    def core_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of each core."""
        return tuple(tuple(self.size[index] for index in core) for core in self.cores)

    @cached_property
    def num_parameters(self) -> int:
        """Number of parameters of all cores together."""
        return sum(math.prod(shape) for shape in self.core_shapes)

    @cached_property
    def bonds(self) -> tuple[str, ...]:
        """The summed indices, in order of appearance."""
        free = {mode.name for mode in self.modes}
        return tuple(index for index, _ in self.sizes if index not in free)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The size of each bond, in the order of `bonds`."""
        return tuple(self.size[bond] for bond in self.bonds)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensorized dense weight, one entry a mode."""
        return tuple(mode.size for mode in self.modes)

    def names(self, role: str) -> tuple[str, ...]:
        """The names of the modes that have a role, in the order of `modes`."""
        return tuple(mode.name for mode in self.modes if mode.role == role)

    def mode_sizes(self, role: str) -> tuple[int, ...]:
        """The sizes of the modes that have a role, in the order of `modes`."""
        return tuple(mode.size for mode in self.modes if mode.role == role)

    def features(self, role: str) -> int:
        """The product of the sizes of the modes that have a role (padding included)."""
        return math.prod(self.mode_sizes(role))

    def with_ranks(self, ranks: Sequence[int]) -> Network:
        """The same network with other bond sizes, given in the order of `bonds`."""
        if len(ranks) != len(self.bonds):
            raise NetworkError(f"ranks {tuple(ranks)}: one for each bond {self.bonds}")
        bonds = dict(zip(self.bonds, ranks, strict=True))
        return replace(self, sizes=tuple((index, bonds.get(index, size)) for index, size in self.sizes))

    def without(self, indices: Iterable[str]) -> Network:
        """The network of a slice of the dense weight: these modes fixed, and gone from the cores."""
        gone = set(indices)
        return Network(
            tuple(tuple(index for index in core if index not in gone) for core in self.cores),
            tuple((index, size) for index, size in self.sizes if index not in gone),
            tuple(mode for mode in self.modes if mode.name not in gone),
        )

    def rank_limit(self, bond: str) -> int:
        """The largest useful size of a bond, the other bonds as they are: a larger one adds nothing.

        A bond joins the cores that carry it. Seen from one of them, it need not exceed the number of values of all
        that the others carry and it does not: indices that they share act like a batch.
        For TT this is min(r_left o i, o i r_right); for Tucker min(n_k, product of the other ranks); for CP the
        smallest product of all modes but one.
        """
        carriers = [core for core in self.cores if bond in core]
        limits = []
        for core in carriers:
            others = {index for other in carriers if other is not core for index in other}
            limits.append(math.prod(self.size[index] for index in others.difference(core)))
        return min(limits)

    def core_std(self, dense_std: float) -> float:
        """The standard deviation to draw all cores with, so that a dense weight of `dense_std` is expected.

        A dense entry is a sum of prod(ranks) products of independent core entries.
        """
        terms = math.prod(self.ranks)
        return float((dense_std**2 / terms) ** (0.5 / len(self.cores)))

    def adjoint(self) -> Network:
        """The network of the transposed weight: the roles in and out swapped, the cores the same."""
        swap = {"in": "out", "out": "in"}
        modes = [replace(mode, role=swap.get(mode.role, mode.role)) for mode in self.modes]
        return replace(self, modes=tuple(sorted(modes, key=lambda mode: ROLES.index(mode.role))))

    @cached_property
    def pattern(self) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, str], ...]]:
        """The cores with indices numbered in order of appearance, and the role of each number that is a mode.

        Two networks with the same pattern differ in names and sizes only: a Triton kernel recognises what it can
        run by this, never by a format's name.
        """
        number = {index: k for k, (index, _) in enumerate(self.sizes)}
        cores = tuple(tuple(number[index] for index in core) for core in self.cores)
        return cores, tuple((number[mode.name], mode.role) for mode in self.modes)


@dataclass(frozen=True)
class Axis:
    """One dimension of a layer's dense weight, before a format splits it into modes.

    Parameters
    ----------
    role : str
        As of a `Mode`. Several axes of the roles out or in are natural dimensions of a tensor and are never split.
    size : int
        At least 1.
    split : bool
        Whether formats tensorize it by default, as the features of a linear layer; channels of a convolution they
        take as they are.
    """

    role: str
    size: int
    split: bool = False


def linear_axes(out_features: int, in_features: int) -> tuple[Axis, Axis]:
    """The axes of a linear layer's weight."""
    return Axis("out", out_features, split=True), Axis("in", in_features, split=True)


def modes_of(axes: Sequence[Axis], splits: Sequence[Sequence[int]]) -> tuple[Mode, ...]:
    """The modes of a dense weight, named by role and number: ``o1, o2, ..., i1, i2, ..., k1, ...``.

    Parameters
    ----------
    axes : sequence of Axis
    splits : sequence of sequence of int
        The sizes of the modes of each axis.
    """
    modes: list[Mode] = []
    for axis, sizes in zip(axes, splits, strict=True):
        for size in sizes:
            number = sum(mode.role == axis.role for mode in modes) + 1
            modes.append(Mode(f"{axis.role[0]}{number}", size, axis.role))
    return tuple(modes)


def modes_by_axis(axes: Sequence[Axis], network: Network) -> tuple[tuple[Mode, ...], ...]:
    """The modes of a network that each axis was split into."""
    groups: list[tuple[Mode, ...]] = []
    for axis in axes:
        modes = tuple(mode for mode in network.modes if mode.role == axis.role)
        alike = [other for other in axes if other.role == axis.role]
        if len(alike) > 1:
            seen = sum(other.role == axis.role for other in axes[: len(groups)])
            modes = modes[seen : seen + 1]
        groups.append(modes)
    return tuple(groups)


def linear_modes(out_sizes: Iterable[int], in_sizes: Iterable[int]) -> tuple[Mode, ...]:
    """The modes ``o1, o2, ..., i1, i2, ...`` of a linear layer's weight, in the order of its dense axes."""
    return modes_of(linear_axes(1, 1), (tuple(out_sizes), tuple(in_sizes)))
