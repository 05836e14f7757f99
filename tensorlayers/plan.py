"""ConversionPlan: what becomes of each layer of a model. Prints as a table, can be edited, goes to and from JSON."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from . import table
from .errors import ConversionError, TensorlayersError
from .formats import Format, from_dict
from .layers import FactorizedLayer, Settings, layer_type, layer_types
from .network import Axis, Network, modes_by_axis

VERSION = 2
ROWS = 1024
"""Rows in the batch at which MACs are stated and compared, per row: a token; of a convolution a position."""

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
    layer : str
        The kind of the factorized layer that would replace it, for instance ``linear``.
    settings : dict
        What the layer is built with, as plain data; empty where it has no shape yet (lazy) or hides it (quantized).
    format : Format or None
        What it is converted to; None where it stays dense.
    network : Network or None
    parameters, macs : tuple of int
        Before and after. Parameters of the weight, of shared cores an equal part; MACs a row, in a batch of 1024
        rows.
    stack : (int, int) or None
        Where the layer is factorized jointly with others: how many they are, and its position among them.
    share : str
        The name of that group of layers; empty where there is none.
    fold : bool
        Whether the layer's weight is computed (weight norm, ...) and folded to a plain one first.
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
    layer: str
    settings: Settings = field(default_factory=dict)
    format: Format | None = None
    network: Network | None = None
    parameters: tuple[int, int] = (0, 0)
    macs: tuple[int, int] = (0, 0)
    error: float | None = None
    reason: str = ""
    blocked: bool = False
    notes: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    stack: tuple[int, int] | None = None
    share: str = ""
    fold: bool = False

    def __post_init__(self) -> None:
        if self.parameters == (0, 0) and self.settings:
            size = math.prod(self.shape)
            object.__setattr__(self, "parameters", (size, size))
            macs = layer_type(self.layer).dense_cost(self.settings, ROWS).macs // ROWS
            object.__setattr__(self, "macs", (macs, macs))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense weight as torch stores it; empty where it has none yet or hides it."""
        return layer_type(self.layer).shape_of(self.settings) if self.settings else ()

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The axes of the dense weight."""
        return layer_type(self.layer).axes_of(self.settings)

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
            stack=None,
            share="",
        )

    def with_format(self, format: Format) -> Entry:
        """This layer converted to a format, whatever it costs.

        Raises
        ------
        RankError, ModeError, FormatError
            Where the format does not fit the shape.
        """
        layer = layer_type(self.layer)
        count, position = self.stack or (1, 0)
        network, clamped = layer.resolve(format, self.settings, self.stack and count)
        own = network.without(network.names("stack"))
        factorized = layer.factorized_cost(own, self.settings, ROWS)
        part, rest = divmod(network.num_parameters, count)
        return replace(
            self,
            format=format,
            network=network,
            parameters=(self.parameters[0], part + (position < rest)),
            macs=(self.macs[0], factorized.macs // ROWS),
            error=None,
            reason="",
            notes=(*clamped, *_padding(network, self.axes)),
        )


def entry_of(name: str, layer: FactorizedLayer, aliases: tuple[str, ...] = (), share: str = "") -> Entry:
    """The entry of a layer that is factorized already."""
    settings = layer.settings_of(layer)
    entry = Entry(name, layer.source, layer.kind, settings, aliases=aliases, stack=layer.stack, share=share)
    return replace(entry.with_format(layer.format.pin(layer.network)), error=layer.error)


def _padding(network: Network, axes: Sequence[Axis]) -> Iterator[str]:
    for axis, modes in zip(axes, modes_by_axis(axes, network), strict=True):
        padded = math.prod(mode.size for mode in modes)
        if padded > axis.size:
            sizes = " x ".join(str(mode.size) for mode in modes)
            yield f"{axis.role} {axis.size} padded to {padded} = {sizes}"


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
        """Choose another format for a layer (None: leave it dense). A blocked layer cannot be converted.

        Layers that are factorized jointly get it together.
        """
        name = self._name(name)
        entry = self._entries[name]
        if isinstance(format, Entry):
            if format.name != name:
                raise ConversionError(f"plan[{name!r}]: an entry of this layer; got that of {format.name!r}")
            self._entries[name] = format
            return
        if not (format is None or isinstance(format, Format)):
            raise ConversionError(f"plan[{name!r}]: a format or None; got {format!r}")
        if format is not None and entry.blocked:
            raise ConversionError(f"plan[{name!r}]: this layer cannot be converted: {entry.reason}")
        together = [other for other in self if other is entry or (entry.share and other.share == entry.share)]
        changed = [
            other.with_format(format) if format else other if other.blocked else other.dense("asked to stay dense")
            for other in together
        ]
        self._entries.update({other.name: other for other in changed})

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
            data["shape"] = entry.shape  # for reading
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
    "settings": ("an object", lambda v: isinstance(v, dict)),
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
    "stack": ("two counts or null", lambda v: v is None or (_is_counts(v, (2,)) and v[1] < v[0])),
    "share": ("a string", lambda v: isinstance(v, str)),
    "fold": ("true or false", lambda v: isinstance(v, bool)),
}
_OPTIONAL: dict[str, Any] = {
    "error": None,
    "format": None,
    "reason": "",
    "blocked": False,
    "aliases": [],
    "stack": None,
    "share": "",
    "fold": False,
}


def _read_entry(item: Mapping[str, Any]) -> Entry:
    item = {**_OPTIONAL, **item}
    where = f"plan: layer {item.get('name')!r}"
    for key, (rule, holds) in _FIELDS.items():
        if key not in item:
            raise ConversionError(f"{where}: {key} is missing")
        if not holds(item[key]):
            raise ConversionError(f"{where}: {key} is {rule}; got {item[key]!r}")
    try:
        entry = Entry(
            name=item["name"],
            kind=item["kind"],
            layer=item["layer"],
            settings=layer_type(item["layer"]).read_settings(item["settings"]) if item["settings"] else {},
            aliases=tuple(item["aliases"]),
            stack=None if item["stack"] is None else tuple(item["stack"]),
            share=item["share"],
            fold=item["fold"],
        )
    except TensorlayersError as error:
        raise ConversionError(f"{where}: settings: {error}") from None
    if item["format"] is None:
        return entry.dense(item["reason"], item["blocked"])
    if not entry.settings:
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
    sides = ["x".join(str(mode.size) for mode in modes) for modes in modes_by_axis(entry.axes, entry.network)]
    return (
        name,
        kind,
        shape,
        type(entry.format).__name__ + (f", 1 of {entry.stack[0]}" if entry.stack else ""),
        "|".join(sides) if any("x" in side for side in sides) else "-",
        ",".join(str(rank) for rank in entry.network.ranks),
        "->".join(table.count(number) for number in entry.parameters),
        "->".join(table.count(number) for number in entry.macs),
        "-" if entry.error is None else f"{entry.error:.3f}",
    )
