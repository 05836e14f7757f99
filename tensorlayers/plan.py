"""ConversionPlan: what becomes of each layer of a model. Prints as a table, can be edited, goes to and from JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from . import table
from .cost import SLOWER
from .entry import Entry, Work, is_count, read_entry
from .errors import ConversionError
from .formats import Format
from .layers import FactorizedLayer
from .machine import SHIPPED, Machine, read
from .network import modes_by_axis

VERSION = 3
_HEAD = ("layer", "kind", "shape", "format", "modes", "ranks", "params", "MACs", "forward", "training", "error")
_STEPS = {"forward": False, "training step": True}
_NAMED = 3  # pieces of advice that a warning gives, for layers that stay dense and for those converted


class ConversionPlan:
    """The layers of a model and what becomes of each.

    Parameters
    ----------
    entries : iterable of Entry
    total : int
        Parameters of the whole dense model, each tensor counted once.
    title : str
        The table's heading.
    work : Work
        What the costs are stated for.

    Examples
    --------
    >>> import torch, tensorlayers as tl
    >>> model = torch.nn.Sequential(torch.nn.Linear(512, 512))
    >>> plan = tl.plan_conversion(model, tl.LowRank(0.25), errors=False)
    >>> plan["0"].network.ranks
    (64,)
    >>> plan["0"] = tl.LowRank(8)     # edit
    >>> plan["0"] = None              # leave dense
    """

    def __init__(
        self, entries: Iterable[Entry], total: int, title: str = "conversion plan", work: Work | None = None
    ) -> None:
        self._entries = {entry.name: entry for entry in entries}
        self.total = total
        self.title = title
        self.work = work or Work()

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, name: str) -> Entry:
        return self._entries[self._name(name)]

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

    def seconds(self, *, training: bool) -> tuple[float, float]:
        """Predicted seconds of the layers listed, before and after, of those that have an estimate.

        Parameters
        ----------
        training : bool
            Of a forward and a backward of all gradients; else of a forward alone.
        """
        found = [seconds for entry in self if (seconds := entry.seconds(training=training))]
        return sum(before for before, _ in found), sum(after for _, after in found)

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

    @property
    def alternatives(self) -> str:
        """What would pay where a format has more MACs than dense or is predicted slower; empty where none does.

        First for layers that stay dense; then how many are converted all the same, since the time is hardly more than
        dense's, and for those.
        """
        dense = [entry for entry in self if entry.advice and not entry.converted]
        kept = [e for e in self if e.advice and e.converted and e.macs[1] > SLOWER * e.macs[0]]
        said, rest = [], 0
        for group in (dense, kept):
            advice = list(dict.fromkeys(entry.advice for entry in group))
            if advice and group is kept:
                count = f"{len(kept)} of {len(self)} layers are converted though they have more MACs than dense"
                said.append(f"{count} (e.g. {kept[0].name or 'the model'})")
            said += advice[:_NAMED]
            rest += len(advice[_NAMED:])
        return ". ".join([*said, *([f"The plan has {table.counted(rest, 'more such note')}"] if rest else [])])

    def __str__(self) -> str:
        fitted = any(entry.output_error is not None for entry in self)
        rows = [_row(entry) + ((_error(entry.output_error),) if fitted and entry.format else ()) for entry in self]
        notes = Counter(note for entry in self for note in (*entry.notes, *filter(None, [entry.advice])))
        (before, after), macs = self.parameters, self.macs
        return "\n".join(
            [
                *table.wrapped(self.title),
                *table.lines((*_HEAD, "of output") if fitted else _HEAD, rows),
                *(line for n, k in notes.items() for line in table.wrapped(f"note: {n} ({table.counted(k, 'layer')})")),
                f"{len(self.converted)} of {len(self)} layers converted; "
                f"parameters {before:,} -> {after:,} ({after / max(before, 1):.1%})",
                f"MACs a row of these layers {macs[0]:,} -> {macs[1]:,} ({macs[1] / max(macs[0], 1):.1%})",
                *self._time(),
            ]
        )

    def _time(self) -> Iterator[str]:
        """The lines on the time that the layers listed are predicted to take, and what the prediction rests on."""
        times = {what: self.seconds(training=training) for what, training in _STEPS.items()}
        if not any(map(any, times.values())):
            return
        totals = [
            f"{what} {table.duration(before)} -> {table.duration(after)} ({after / before:.1%})"
            for what, (before, after) in times.items()
        ]
        yield f"predicted time of {table.counted(self.work.rows, 'row')}: {'; '.join(totals)}"
        machine = self.work.machine
        threads = f"{table.counted(torch.get_num_threads(), 'thread')}, " if machine.threads else ""
        origin = "as shipped" if _is_shipped(machine) else "measured"
        unknown = sum(bool(entry.settings) and entry.seconds(training=False) is None for entry in self)
        left = f"; {table.counted(unknown, 'layer')} without an estimate not counted" if unknown else ""
        yield f"by the constants of {machine.name!r} ({threads}float32, {origin}){left}"

    def with_errors(self, model: nn.Module) -> ConversionPlan:
        """This plan with the errors of the model that it was carried out on."""
        entries = []
        for entry in self:
            layer = model.get_submodule(entry.name) if entry.converted else None
            if isinstance(layer, FactorizedLayer):
                entry = replace(entry, error=layer.error, output_error=layer.output_error)
            entries.append(entry)
        return ConversionPlan(entries, self.total, "converted", self.work)

    def to_json(self) -> str:
        """The plan as JSON text: the layers with their formats, and for reading what they cost.

        Times are left out: they are predicted anew, from the constants of the machine that reads the plan.
        """
        layers = []
        for entry in self:
            data = {k: v for k, v in asdict(entry).items() if k not in ("format", "network", "work", "frozen")}
            data["shape"] = entry.shape  # for reading
            data["format"] = entry.format.to_dict() if entry.format else None
            # What error and advice belong to: a format that is edited by hand must not keep them.
            data["stated_for"] = data["format"]
            layers.append(data)
        head = {"version": VERSION, "total": self.total, **asdict(self.work)}
        return json.dumps({**head, "layers": layers}, indent=1)

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
        if not is_count(total):
            raise ConversionError(f"plan: total is a number of parameters; got {total!r}")
        if not isinstance(layers, list) or not all(isinstance(item, dict) for item in layers):
            raise ConversionError("plan: layers is a list of objects")
        work = _read_work(data)
        entries = [read_entry(item, work) for item in layers]
        twice = [name for name, count in Counter(entry.name for entry in entries).items() if count > 1]
        if twice:
            raise ConversionError(f"plan: layer {twice[0]!r} is listed more than once")
        return cls(entries, total, work=work)


def _read_work(data: dict[str, Any]) -> Work:
    for key in ("rows", "device"):
        if key not in data:
            raise ConversionError(f"plan: {key} is missing")
    try:
        return Work(data["rows"], data["device"], data.get("dtype", "float32"))
    except ConversionError as error:
        raise ConversionError(f"plan: {error}") from None


def _is_shipped(machine: Machine) -> bool:
    return machine.to_json() in {read(path).to_json() for path in SHIPPED.glob("*.json")}


def _row(entry: Entry) -> tuple[str, ...]:
    name, kind = entry.name or "(model)", entry.kind[:20]
    shape = "x".join(str(size) for size in entry.shape)
    if not entry.format or not entry.network:
        return name, kind, shape, f"dense: {entry.reason}"
    times = [entry.seconds(training=training) for training in _STEPS.values()]
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
        *(table.durations(*pair) if pair else "-" for pair in times),
        _error(entry.error),
    )


def _error(error: float | None) -> str:
    return "-" if error is None else f"{error:.3f}"
