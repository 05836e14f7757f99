"""Format: the user's choices (rank, order, modes) and the two methods that make a format; and the registry."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import tensorize
from ..decompose import Decomposition, check, decompose, tensorized
from ..errors import DecompositionError, FormatError, ModeError, RankError
from ..metric import Metric, curve, fit, relative_error
from ..network import Axis, Mode, Network, linear_axes, modes_of
from ..rank import Rank, clamp, resolve, validate
from ..rules import SpectralRule
from ..spectra import Spectrum, spectra, spend

_REGISTRY: dict[str, type[Format]] = {}


@dataclass(frozen=True)
class Format(ABC):
    """A way to factorize a dense weight.

    A new format is a frozen dataclass with a `name` and two methods, `layout` and `fill`; defining it registers it.

    Parameters
    ----------
    rank : int, float, tuple of int or RankRule
        One rank for all bonds; a fraction of the layer's weight parameters, in (0, 1]; one rank a bond, in the order
        of ``network.bonds``; or a rule that reads them off the weight, see `chosen`. Ranks above the largest useful
        one are clamped.
    in_modes, out_modes : tuple of int, optional
        How the in / out features are tensorized. Their product is at least the number of features; the excess is
        padding. By default the format chooses.

    Raises
    ------
    RankError, ModeError, FormatError
        Where a choice is out of its range.
    """

    rank: Rank
    in_modes: tuple[int, ...] | None = field(default=None, kw_only=True)
    out_modes: tuple[int, ...] | None = field(default=None, kw_only=True)

    name: ClassVar[str]
    """The format's name in files and on the command line."""
    order: ClassVar[int] = 1
    """Modes a side where the user gives none; a field in the formats where it can be chosen."""
    listed: ClassVar[bool] = True
    """Whether any layer may choose it. One that is a layer kind's own can still be read by its name."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            _REGISTRY[cls.name] = cls

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", validate(self.rank, type(self).__name__))
        for side in ("in_modes", "out_modes"):
            modes = getattr(self, side)
            if modes is not None:
                object.__setattr__(self, side, tensorize.validate_modes(modes, side))
        most, order = tensorize.MOST_MODES, self.order
        if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= most:
            raise FormatError(f"{type(self).__name__}: an order is an integer from 1 to {most}; got {order!r}")

    def __str__(self) -> str:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in values.items())})"

    @abstractmethod
    def layout(self, modes: Sequence[Mode]) -> tuple[tuple[str, ...], ...]:
        """Say which index sits on which core.

        Parameters
        ----------
        modes : sequence of Mode
            The modes of the dense weight. Those of the role group are left out: each group of a layer is factorized
            by itself, so that they sit on every core.

        Returns
        -------
        tuple of tuple of str
            The index names of each core. A name that is no mode is a bond.
        """

    @abstractmethod
    def fill(self, dense: Tensor, network: Network) -> list[Tensor]:
        """Compute the cores from a dense tensor.

        Parameters
        ----------
        dense : Tensor
            Shape ``network.shape``; float32 or float64, finite, of Frobenius norm 1.
        network : Network

        Returns
        -------
        list of Tensor
            Shapes ``network.core_shapes``. They need not be balanced: the caller does that.
        """

    def default_modes(self, axis: Axis) -> tuple[int, ...]:
        """The modes that an axis is split into where the user gives none: balanced ones, or the axis itself."""
        return tensorize.balanced_modes(axis.size, self.order) if axis.split else (axis.size,)

    def network(self, out_features: int, in_features: int) -> Network:
        """The network of a linear layer of this shape. See `resolve` for the notes on clamped ranks."""
        return self.resolve(linear_axes(out_features, in_features))[0]

    def resolve(self, axes: Sequence[Axis]) -> tuple[Network, tuple[str, ...]]:
        """The network of a dense weight with these axes, and the notes on what was clamped.

        Raises
        ------
        RankError, ModeError, FormatError
            Where the rank or the modes do not fit the shape.
        """
        modes = modes_of(axes, self._splits(axes))
        groups = tuple(mode.name for mode in modes if mode.role == "group")
        layout = self.layout([mode for mode in modes if mode.role != "group"])
        cores = tuple((*groups, *core) for core in layout)
        free = {mode.name for mode in modes}
        bonds = tuple((index, 1) for index in dict.fromkeys(chain(*cores)) if index not in free)
        if not bonds:
            sizes = " x ".join(str(mode.size) for mode in modes)
            raise FormatError(f"{self}: modes {sizes} give a network without a bond, the dense weight")
        dense_parameters = math.prod(axis.size for axis in axes)
        return resolve(Network(cores, bonds, modes), self.rank, dense_parameters, type(self).__name__)

    def _splits(self, axes: Sequence[Axis]) -> list[tuple[int, ...]]:
        splits = [self.default_modes(axis) if axis.role in ("out", "in") else (axis.size,) for axis in axes]
        for role, given in (("out", self.out_modes), ("in", self.in_modes)):
            positions = [k for k, axis in enumerate(axes) if axis.role == role]
            sizes = tuple(axes[k].size for k in positions)
            if len(positions) != 1:
                if given not in (None, sizes):
                    raise ModeError(f"{role}_modes {given}: the dimensions {sizes} of this layer are not split further")
                for k in positions:
                    splits[k] = (axes[k].size,)
            elif given is not None:
                splits[positions[0]] = tensorize.check_modes(given, sizes[0], f"{role}_modes")
        return splits

    def decompose(
        self, weight: Tensor, axes: Sequence[Axis] | None = None, metric: Metric | None = None
    ) -> Decomposition:
        """Factorize a dense weight.

        Parameters
        ----------
        weight : Tensor
            One dimension an axis.
        axes : sequence of Axis, optional
            By default those of a matrix (out_features, in_features).
        metric : Metric, optional
            What an error counts for. By default that of the weight's Frobenius norm.

        Returns
        -------
        Decomposition
            The network, balanced cores in the dtype of `weight`, and their relative error; in a metric that too.

        Raises
        ------
        DecompositionError
            If the weight is no finite floating-point tensor with these axes, or the metric does not fit them.
        RankError, ModeError, FormatError
            Where rank or modes do not fit the shape.
        """
        if axes is None:
            if weight.dim() != 2 or not weight.numel():
                raise DecompositionError(
                    f"weight {tuple(weight.shape)}: a non-empty matrix (out_features, in_features); "
                    "of other weights the axes are stated"
                )
            axes = linear_axes(*weight.shape)
        network = self.chosen(weight, axes, metric).resolve(axes)[0]
        if metric is None:
            return decompose(weight, axes, network, self._fill_groups)
        factors = metric.factors(axes, network)
        found = decompose(weight, axes, network, lambda dense, network: fit(dense, network, self._fill_groups, factors))
        error = relative_error(tensorized(weight.detach(), axes, network), network, found.cores, factors)
        return dataclasses.replace(found, output_error=error)

    def chosen(self, weight: Tensor, axes: Sequence[Axis], metric: Metric | None = None) -> Format:
        """This format with the ranks that a weight decides, every choice written out; else itself.

        A rule (`Energy`, `RelativeError`, `EVBMF`) always reads them off the weight. A fraction does in a metric: as
        many parameters, but spent on those bonds that would cut off most of what the data see.

        Raises
        ------
        RankError
            If a rule is given and a bond is not the only link between two halves of the network (CP's, a ring's).
        """
        rule = self.rank if isinstance(self.rank, SpectralRule) else None
        if rule is None and (metric is None or not isinstance(self.rank, float) or weight.is_meta):
            return self
        check(weight, axes)
        largest = self.largest(axes)
        if rule is None and len(largest.bonds) < 2:
            return self
        measured = self.spectra(weight, axes, metric if rule is None or rule.in_metric else None)
        if rule is not None:
            rest = [bond for bond in largest.bonds if bond not in measured]
            if rest:
                raise RankError(f"{self}: bonds that alone join two halves of the network; {rest[0]} does not")
            return self.pin(clamp(largest.with_ranks(rule.ranks(measured))))
        assert isinstance(self.rank, float)
        self.resolve(axes)  # which says so where the fraction is too small
        found = spend(largest, measured, math.floor(self.rank * math.prod(axis.size for axis in axes)))
        return self if found is None else self.pin(found)

    def largest(self, axes: Sequence[Axis]) -> Network:
        """The network of these modes with the largest useful ranks: it gives any weight exactly."""
        return dataclasses.replace(self, rank=math.prod(axis.size for axis in axes)).resolve(axes)[0]

    def spectra(self, weight: Tensor, axes: Sequence[Axis], metric: Metric | None = None) -> dict[str, Spectrum]:
        """The spectra of a weight at the bonds of this format's network that have one; see `spectra.spectra`."""
        network = self.largest(axes)
        factors = () if metric is None else metric.factors(axes, network)
        return spectra(tensorized(weight.detach(), axes, network), network, factors)

    def losses(
        self,
        weight: Tensor,
        axes: Sequence[Axis],
        metric: Metric,
        ranks: Sequence[Sequence[int]],
        swept: Collection[int] = (),
    ) -> list[float]:
        """What a weight loses in a metric at lower ranks than this format's: squared errors, roughly; see `curve`."""
        network = self.resolve(axes)[0]
        dense = tensorized(weight.detach(), axes, network)
        return curve(dense, network, self._fill_groups, metric.factors(axes, network), ranks, swept)

    def _fill_groups(self, dense: Tensor, network: Network) -> list[Tensor]:
        """`fill`, for each group by itself where there are groups."""
        groups = network.names("group")
        if not groups:
            return self.fill(dense, network)
        inner = network.without(groups)
        order = [mode.name for mode in network.modes]
        dense = dense.permute([order.index(name) for name in (*groups, *(n for n in order if n not in groups))])
        filled = [self.fill(part, inner) for part in dense.reshape(-1, *inner.shape)]
        return [
            torch.stack(cores).reshape(shape) for cores, shape in zip(zip(*filled), network.core_shapes, strict=True)
        ]

    def pin(self, network: Network) -> Format:
        """This format with every choice written out, so that it gives `network` whatever the defaults become."""
        return dataclasses.replace(
            self, rank=network.ranks, in_modes=network.mode_sizes("in"), out_modes=network.mode_sizes("out")
        )

    def to_dict(self) -> dict[str, Any]:
        """The format as plain data for JSON; `from_dict` undoes it."""
        options = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return {"name": self.name, **options}


def available() -> dict[str, type[Format]]:
    """The registered formats that any layer may choose, by name."""
    return {name: cls for name, cls in _REGISTRY.items() if cls.listed}


def get(name: str) -> type[Format]:
    """The format of a name.

    Raises
    ------
    FormatError
        If there is none.
    """
    if name not in _REGISTRY:
        raise FormatError(f"format {name!r}: one of {', '.join(sorted(available()))}")
    return _REGISTRY[name]


def from_dict(data: Mapping[str, Any]) -> Format:
    """Read a format from plain data, as `Format.to_dict` wrote it.

    Raises
    ------
    FormatError
        If the name is unknown or an option is unknown or missing.
    """
    if not isinstance(data, Mapping) or not isinstance(data.get("name"), str):
        raise FormatError(f"format {data!r}: an object with a name")
    cls = get(data["name"])
    fields = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(data) - fields - {"name"})
    if unknown:
        raise FormatError(f"format {data['name']!r}: options are {', '.join(sorted(fields))}; got {', '.join(unknown)}")
    if "rank" not in data:
        raise FormatError(f"format {data['name']!r}: a rank is needed")
    return cls(**{name: value for name, value in data.items() if name != "name"})


def names_by_role(modes: Sequence[Mode], role: str) -> list[str]:
    """The names of the modes of one role, in order."""
    return [mode.name for mode in modes if mode.role == role]
