"""ConversionPlan: what becomes of each layer of a model. Prints as a table, can be edited, goes to and from JSON."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from . import table
from .errors import ConversionError, TensorlayersError
from .formats import Format, from_dict
from .layers import FactorizedLayer, layer_type, layer_types
from .network import Network

VERSION = 1
ROWS = 1024
"""Rows (tokens) in the batch at which MACs are stated and compared, per row."""

_HEAD = ("layer", "kind", "shape", "format", "modes", "ranks", "params", "MACs", "error")


@dataclass(frozen=True)
class Entry:
    """What becomes of one layer.

    Parameters
    ----------
    name : str
        The module's name in the model; `aliases` are its other names where it is shared.
    kind : str
        The dense layer's kind, for instance ``Linear``.
    shape : tuple of int
        The shape of the dense weight, out before in.
    layer : str
        The kind of the factorized layer that would replace it, for instance ``linear``.
    format : Format or None
        What it is converted to; None where it stays dense.
    network : Network or None
    parameters, macs : tuple of int
        Before and after. Parameters of the weight; MACs a row, in a batch of 1024 rows.
    error : float or None
        Relative error of the weight, where it has been computed.
    reason : str
        Why the layer stays dense; empty where it is converted.
    blocked : bool
        The reason is one that no `force` overrides (tied, parametrized, ...).
    notes : tuple of str
        What was clamped or padded.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    layer: str
    format: Format | None = None
    network: Network | None = None
    parameters: tuple[int, int] = (0, 0)
    macs: tuple[int, int] = (0, 0)
    error: float | None = None
    reason: str = ""
    blocked: bool = False
    notes: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    @property
    def converted(self) -> bool:
        """Whether the layer is factorized."""
        return self.format is not None

    def dense(self, reason: str, blocked: bool = False) -> Entry:
        """This layer left dense."""
        return replace(
            self,
            format=None,
            network=None,
            parameters=(self.parameters[0],) * 2,
            macs=(self.macs[0],) * 2,
            error=None,
            notes=(),
            reason=reason,
            blocked=blocked,
        )

    def with_format(self, format: Format) -> Entry:
        """This layer converted to a format, whatever it costs.

        Raises
        ------
        RankError, ModeError, FormatError
            Where the format does not fit the shape.
        """
        layer = layer_type(self.layer)
        network, clamped = layer.resolve(format, self.shape)
        dense, factorized = layer.costs(network, self.shape, ROWS)
        return replace(
            self,
            format=format,
            network=network,
            parameters=(self.parameters[0], network.num_parameters),
            macs=(dense.macs // ROWS, factorized.macs // ROWS),
            error=None,
            reason="",
            notes=(*clamped, *_padding(network, self.shape)),
        )


def entry_of(name: str, layer: FactorizedLayer, aliases: tuple[str, ...] = ()) -> Entry:
    """The entry of a layer that is factorized already."""
    size = layer.dense_parameters
    entry = Entry(name, layer.source, layer.weight_shape, layer.kind, parameters=(size, size), aliases=aliases)
    return replace(entry.with_format(layer.format.pin(layer.network)), error=layer.error)


def _padding(network: Network, shape: tuple[int, ...]) -> Iterator[str]:
    for role, size in zip(("out", "in"), shape, strict=False):
        if network.features(role) > size:
            modes = " x ".join(str(n) for n in network.mode_sizes(role))
            yield f"{role} {size} padded to {network.features(role)} = {modes}"


class ConversionPlan:
    """The layers of a model and what becomes of each.

    Parameters
    ----------
    entries : iterable of Entry
    total : int
        Parameters of the whole dense model, each tensor counted once.
    title : str
        The table's heading.

    Examples
    --------
    >>> import torch, tensorlayers as tl
    >>> plan = tl.plan_conversion(torch.nn.Sequential(torch.nn.Linear(64, 64)), tl.LowRank(0.5))
    >>> plan["0"].network.ranks
    (16,)
    >>> plan["0"] = tl.LowRank(8)     # edit
    >>> plan["0"] = None              # leave dense
    """

    def __init__(self, entries: Any, total: int, title: str = "conversion plan") -> None:
        self._entries = {entry.name: entry for entry in entries}
        self.total = total
        self.title = title

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, name: str) -> Entry:
        entry: Entry = self._entries[self._name(name)]
        return entry

    def __setitem__(self, name: str, format: Format | Entry | None) -> None:
        """Choose another format for a layer (None: leave it dense). A blocked layer cannot be converted."""
        name = self._name(name)
        entry = self._entries[name]
        if format is None:
            self._entries[name] = entry if entry.blocked else entry.dense("asked to stay dense")
        elif isinstance(format, Entry):
            if format.name != name:
                raise ConversionError(f"plan[{name!r}]: an entry of this layer; got that of {format.name!r}")
            self._entries[name] = format
        elif not isinstance(format, Format):
            raise ConversionError(f"plan[{name!r}]: a format or None; got {format!r}")
        elif entry.blocked:
            raise ConversionError(f"plan[{name!r}]: this layer cannot be converted: {entry.reason}")
        else:
            self._entries[name] = entry.with_format(format)

    def _name(self, name: str) -> str:
        for entry in self:
            if name == entry.name or name in entry.aliases:
                return entry.name
        raise ConversionError(f"plan: no layer {name!r} in this plan")

    def __contains__(self, name: str) -> bool:
        return any(name == entry.name or name in entry.aliases for entry in self)

    @property
    def converted(self) -> tuple[str, ...]:
        """The names of the layers that are converted."""
        return tuple(entry.name for entry in self if entry.converted)

    @property
    def parameters(self) -> tuple[int, int]:
        """Parameters of the whole model, before and after."""
        saved = sum(before - after for before, after in (entry.parameters for entry in self))
        return self.total, self.total - saved

    @property
    def macs(self) -> tuple[int, int]:
        """MACs a row of the layers listed, before and after."""
        return sum(entry.macs[0] for entry in self), sum(entry.macs[1] for entry in self)

    @property
    def advice(self) -> str:
        """How many layers stay dense because converting them would not pay, and why; empty where there are none."""
        groups = []
        for reason, what in (("predicted slower", "would be slower"), ("nothing saved", "would save nothing")):
            group = [entry for entry in self if entry.reason.startswith(reason)]
            if group:
                groups.append(f"{len(group)} {what} (e.g. {group[0].name or 'the model'}: {group[0].reason})")
        count = sum(entry.reason.startswith(("predicted slower", "nothing saved")) for entry in self)
        return f"{count} of {len(self)} layers stay dense: {'; '.join(groups)}" if groups else ""

    def __str__(self) -> str:
        rows = [_row(entry) for entry in self]
        notes = Counter(note for entry in self for note in entry.notes)
        (before, after), macs = self.parameters, self.macs
        return "\n".join(
            [
                *table.wrapped(self.title),
                *table.lines(_HEAD, rows),
                *(line for n, k in notes.items() for line in table.wrapped(f"note: {n} ({k} layer{'s' * (k > 1)})")),
                f"{len(self.converted)} of {len(self)} layers converted; "
                f"parameters {before:,} -> {after:,} ({after / max(before, 1):.1%})",
                f"MACs a row of these layers {macs[0]:,} -> {macs[1]:,} ({macs[1] / max(macs[0], 1):.1%})",
            ]
        )

    def with_errors(self, model: nn.Module) -> ConversionPlan:
        """This plan with the errors of the model that it was carried out on."""
        entries = []
        for entry in self:
            layer = model.get_submodule(entry.name) if entry.converted else None
            entries.append(replace(entry, error=layer.error) if isinstance(layer, FactorizedLayer) else entry)
        return ConversionPlan(entries, self.total, "converted")

    def to_json(self) -> str:
        """The plan as JSON text: the layers with their formats, and for reading what they cost."""
        layers = []
        for entry in self:
            data = {k: v for k, v in asdict(entry).items() if k not in ("format", "network")}
            data["format"] = entry.format.to_dict() if entry.format else None
            # What the error belongs to: a format that is edited by hand must not keep it.
            data["error_of"] = data["format"] if entry.error is not None else None
            layers.append(data)
        return json.dumps({"version": VERSION, "total": self.total, "layers": layers}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> ConversionPlan:
        """Read a plan. Costs are computed anew from shapes and formats, so that a hand-edited format is safe.

        Raises
        ------
        ConversionError
            If the text is no plan of a known version, or an entry is malformed.
        RankError, ModeError, FormatError
            If a format is wrong or does not fit its layer, which is named.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConversionError(f"plan: not JSON: {error}") from None
        version = data.get("version") if isinstance(data, dict) else None
        if version != VERSION or isinstance(version, bool):
            raise ConversionError(f"plan: version {VERSION} is known; got {version!r}")
        total, layers = data.get("total"), data.get("layers")
        if not _is_count(total):
            raise ConversionError(f"plan: total is a number of parameters; got {total!r}")
        if not isinstance(layers, list) or not all(isinstance(item, dict) for item in layers):
            raise ConversionError("plan: layers is a list of objects")
        entries = [_read_entry(item) for item in layers]
        twice = [name for name, count in Counter(entry.name for entry in entries).items() if count > 1]
        if twice:
            raise ConversionError(f"plan: layer {twice[0]!r} is listed more than once")
        return cls(entries, total)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_counts(value: object, lengths: tuple[int, ...]) -> bool:
    return isinstance(value, list) and len(value) in lengths and all(_is_count(item) for item in value)


_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "name": ("a string", lambda v: isinstance(v, str)),
    "kind": ("a string", lambda v: isinstance(v, str)),
    "layer": ("a layer kind", lambda v: any(v == cls.kind for cls in layer_types())),
    # A layer whose shape is hidden (lazy, quantized) has none.
    "shape": ("two sizes of at least 1", lambda v: v == [] or (_is_counts(v, (2,)) and min(v) >= 1)),
    "parameters": ("two counts", lambda v: _is_counts(v, (2,))),
    "macs": ("two counts", lambda v: _is_counts(v, (2,))),
    "error": (
        "a number or null",
        lambda v: v is None or (isinstance(v, (int, float)) and not isinstance(v, bool) and 0 <= v < math.inf),
    ),
    "format": ("an object or null", lambda v: v is None or isinstance(v, dict)),
    "reason": ("a string", lambda v: isinstance(v, str)),
    "blocked": ("true or false", lambda v: isinstance(v, bool)),
    "aliases": ("a list of strings", lambda v: isinstance(v, list) and all(isinstance(item, str) for item in v)),
}
_OPTIONAL: dict[str, Any] = {"error": None, "format": None, "reason": "", "blocked": False, "aliases": []}


def _read_entry(item: Mapping[str, Any]) -> Entry:
    item = {**_OPTIONAL, **item}
    where = f"plan: layer {item.get('name')!r}"
    for field, (rule, holds) in _FIELDS.items():
        if field not in item:
            raise ConversionError(f"{where}: {field} is missing")
        if not holds(item[field]):
            raise ConversionError(f"{where}: {field} is {rule}; got {item[field]!r}")
    entry = Entry(
        name=item["name"],
        kind=item["kind"],
        shape=tuple(item["shape"]),
        layer=item["layer"],
        parameters=(math.prod(item["shape"]) if item["shape"] else 0,) * 2,
        macs=(math.prod(item["shape"]) if item["shape"] else 0,) * 2,
        aliases=tuple(item["aliases"]),
    )
    if item["format"] is None:
        return entry.dense(item["reason"], item["blocked"])
    if not entry.shape:
        raise ConversionError(f"{where}: format: a layer without a shape stays dense")
    try:
        converted = entry.with_format(from_dict(item["format"]))
    except TensorlayersError as error:
        raise type(error)(f"{where}: format: {error}") from None
    return replace(converted, error=item["error"] if item.get("error_of") == item["format"] else None)


def _row(entry: Entry) -> tuple[str, ...]:
    name, kind = entry.name or "(model)", entry.kind[:20]
    shape = "x".join(str(size) for size in entry.shape)
    if not entry.format or not entry.network:
        return name, kind, shape, f"dense: {entry.reason}"
    sides = ["x".join(str(n) for n in entry.network.mode_sizes(role)) for role in ("out", "in")]
    return (
        name,
        kind,
        shape,
        type(entry.format).__name__,
        "|".join(sides) if sides != shape.split("x") else "-",
        ",".join(str(rank) for rank in entry.network.ranks),
        "->".join(table.count(number) for number in entry.parameters),
        "->".join(table.count(number) for number in entry.macs),
        "-" if entry.error is None else f"{entry.error:.3f}",
    )
