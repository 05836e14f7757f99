"""ConversionPlan: what becomes of each layer of a model. Prints as a table, can be edited, goes to and from JSON."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from .errors import ConversionError, TensorlayersError
from .formats import Format, from_dict
from .layers import FactorizedLayer, layer_type
from .network import Network

VERSION = 1
ROWS = 1024
"""Rows (tokens) in the batch at which MACs are stated and compared, per row."""

_WIDTH = 100
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
        # The columns of layers that stay dense run together: one reason takes the room of all the figures.
        full = [row for row in rows if len(row) == len(_HEAD)]
        widths = [max(len(row[c]) for row in (_HEAD, *(rows if c < 3 else full))) for c in range(len(_HEAD))]
        widths[0] = min(widths[0], max(len(_HEAD[0]), _WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1)))
        lines = [self.title, _line(_HEAD, widths)]
        names = [_abbreviated(row[0], widths[0]) for row in rows]
        for name, row in zip(names, rows, strict=True):
            if len(name) > widths[0] or names.count(name) > 1:
                lines.append(row[0])
                name = ""
            lines += _wrapped(_line((name, *row[1:]), widths))
        notes = Counter(note for entry in self for note in entry.notes)
        lines += [f"note: {note} ({count} layer{'s' * (count > 1)})" for note, count in notes.items()]
        before, after = self.parameters
        macs = self.macs
        lines.append(
            f"{len(self.converted)} of {len(self)} layers converted; parameters {before:,} -> {after:,} "
            f"({after / max(before, 1):.1%})"
        )
        lines.append(f"MACs a row of these layers {macs[0]:,} -> {macs[1]:,} ({macs[1] / max(macs[0], 1):.1%})")
        return "\n".join(lines)

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
            layers.append(data)
        return json.dumps({"version": VERSION, "total": self.total, "layers": layers}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> ConversionPlan:
        """Read a plan. Costs are computed anew from shapes and formats, so that a hand-edited format is safe.

        Raises
        ------
        ConversionError
            If the text is no plan of a known version, or an entry is malformed.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConversionError(f"plan: not JSON: {error}") from None
        if not isinstance(data, Mapping) or data.get("version") != VERSION:
            version = data.get("version") if isinstance(data, Mapping) else None
            raise ConversionError(f"plan: version {VERSION} is known; got {version!r}")
        try:
            return cls([_entry(item) for item in data["layers"]], int(data["total"]))
        except TensorlayersError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConversionError(f"plan: malformed: {type(error).__name__}: {error}") from None


def _entry(item: Mapping[str, Any]) -> Entry:
    entry = Entry(
        name=item["name"],
        kind=item["kind"],
        shape=tuple(int(size) for size in item["shape"]),
        layer=item["layer"],
        parameters=tuple(item["parameters"]),
        macs=tuple(item["macs"]),
        aliases=tuple(item.get("aliases", ())),
    )
    if item.get("format") is None:
        return entry.dense(str(item.get("reason", "")), bool(item.get("blocked", False)))
    converted = entry.with_format(from_dict(item["format"]))
    return replace(converted, error=item.get("error"))


def _row(entry: Entry) -> tuple[str, ...]:
    name = entry.name or "(model)"
    shape = "x".join(str(size) for size in entry.shape)
    if not entry.format or not entry.network:
        return name, entry.kind, shape, f"dense: {entry.reason}"
    sides = ["x".join(str(n) for n in entry.network.mode_sizes(role)) for role in ("out", "in")]
    return (
        name,
        entry.kind,
        shape,
        type(entry.format).__name__,
        "|".join(sides) if sides != shape.split("x") else "-",
        ",".join(str(rank) for rank in entry.network.ranks),
        "->".join(_count(number) for number in entry.parameters),
        "->".join(_count(number) for number in entry.macs),
        "-" if entry.error is None else f"{entry.error:.3f}",
    )


def _count(number: float) -> str:
    """A count to three digits: 147k, 2.36M."""
    units = ["", "k", "M", "G"]
    while number >= 999.5 and len(units) > 1:
        number /= 1000
        del units[0]
    return f"{number:.3g}{units[0]}"


def _abbreviated(name: str, width: int) -> str:
    """Shorten the leading parts of a dotted name to their first letter until it fits: e.l.0.attention.self.query."""
    parts = name.split(".")
    for k in range(len(parts) - 1):
        if len(".".join(parts)) <= width:
            break
        parts[k] = parts[k] if parts[k].isdigit() else parts[k][:1]
    return ".".join(parts)


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=False)).rstrip()


def _wrapped(line: str) -> list[str]:
    """A line that is too long (a long reason) broken at words, the rest indented."""
    if len(line) <= _WIDTH:
        return [line]
    return textwrap.wrap(line, _WIDTH, subsequent_indent=" " * 8, drop_whitespace=False)
