"""Entry: what becomes of one layer of a model, and what that costs; as plain data too."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .errors import ConversionError, TensorlayersError
from .formats import Format, from_dict
from .layers import FactorizedLayer, Settings, layer_type, layer_types
from .machine import Machine, machine
from .network import Axis, Network, modes_by_axis
from .precision import DTYPES, name_of

ROWS = 1024
"""Rows in the batch that costs are stated for, where nothing else is said."""

SMALL = 2**16
"""Weights of a linear layer up to which it has no estimate of its time at `ROWS`: that would be one of what launches of
operations cost, and depends on what surrounds the layer more than on the layer. MACs decide there. For other kinds it
goes with the time of their launches and with their rows; of a grouped convolution it counts what it would have without
groups."""

TINY = 2**8
"""Weights below which a factorized layer is slower at `ROWS` whatever its MACs: it is launches alone."""


def is_count(value: object) -> bool:
    """Whether a value is a number of something: an integer of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@dataclass(frozen=True)
class Work:
    """What costs are stated for.

    Parameters
    ----------
    rows : int
        Rows in a batch: tokens, lookups. A convolution is taken at 16 output positions a row (of a transposed one input
        positions): a batch of images has many more positions than one of text has tokens.
    device : str
        The device type: "cpu", "cuda", ...
    dtype : str
        What products are computed in, as `precision.multiplied_as` names it.

    Raises
    ------
    ConversionError
        If the rows are no integer of at least 1, or the device or the dtype is none that torch knows.
    """

    rows: int = ROWS
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not is_count(self.rows) or not self.rows:
            raise ConversionError(f"rows: an integer of at least 1; got {self.rows!r}")
        try:
            kind = torch.device(self.device).type
        except (RuntimeError, TypeError):
            raise ConversionError(f"device: a device type such as 'cpu' or 'cuda'; got {self.device!r}") from None
        if self.dtype not in ("tf32", *map(name_of, DTYPES)):
            raise ConversionError(f"dtype: one of {', '.join(map(name_of, DTYPES))} or tf32; got {self.dtype!r}")
        # What is on the meta device will run elsewhere.
        object.__setattr__(self, "device", "cpu" if kind == "meta" else kind)

    @property
    def machine(self) -> Machine:
        """The constants that predictions for it rest on."""
        return machine(self.device)


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
        Before and after. Parameters of the weight, of shared cores an equal part; MACs a row, in a batch of
        ``work.rows`` rows.
    stack : (int, int) or None
        Where the layer is factorized jointly with others: how many they are, and its position among them.
    share : str
        The name of that group of layers; empty where there is none.
    fold : bool
        Whether the layer's weight is computed (weight norm, ...) and folded to a plain one first.
    work : Work
        What costs are stated for.
    frozen : bool
        Whether the layer computes with a dense weight that it keeps beside its cores.
    error, output_error : float or None
        Relative error of the weight, and of the layer's outputs on the data it is fitted to, where computed.
    reason : str
        Why the layer stays dense; empty where it is converted.
    blocked : bool
        The reason is one that no `force` overrides (tied, parametrized, ...).
    notes : tuple of str
        What was clamped or padded.
    advice : str
        Where the format has more MACs than the dense layer or is predicted slower, what would pay; else empty.
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
    output_error: float | None = None
    reason: str = ""
    blocked: bool = False
    notes: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    stack: tuple[int, int] | None = None
    share: str = ""
    fold: bool = False
    work: Work = Work()
    frozen: bool = False
    advice: str = ""

    def __post_init__(self) -> None:
        if self.parameters == (0, 0) and self.settings:
            size, rows = math.prod(self.shape), self.rows
            object.__setattr__(self, "parameters", (size, size))
            macs = layer_type(self.layer).dense_cost(self.settings, rows).macs // rows
            object.__setattr__(self, "macs", (macs, macs))

    @property
    def rows(self) -> int:
        """The rows (or positions) that this layer's costs are stated for."""
        return self.work.rows * layer_type(self.layer).positions

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

    @property
    def is_timed(self) -> bool:
        """Whether its time can be predicted: the shape is known, and it is not `SMALL`."""
        if not self.settings or self.work.rows != ROWS:
            return bool(self.settings)
        kind = layer_type(self.layer)
        return self._ungrouped * kind.positions > SMALL * kind.overhead

    def seconds(self, *, training: bool) -> tuple[float, float] | None:
        """The predicted time on `rows` rows, before and after, of a forward or of a whole training step.

        In seconds; computed when asked for, from the constants of this machine. A training step is a forward and a
        backward of all gradients. None: there is no estimate for this layer, for instance where it is `SMALL`.
        """
        if not self.is_timed:
            return None
        layer, rows, machine = layer_type(self.layer), self.rows, self.work.machine
        dtype = self.work.dtype
        before = layer.dense_seconds(self.settings, rows, machine, training, dtype)
        after = before
        if self.network is not None and not self.frozen:
            own = self.network.without(self.network.names("stack"))
            after = layer.factorized_seconds(own, self.settings, rows, machine, training, dtype)
        return None if before is None or after is None else (before, after)

    @property
    def _ungrouped(self) -> int:
        return self.parameters[0] * math.prod(axis.size for axis in self.axes if axis.role == "group")

    def dense(self, reason: str, blocked: bool = False) -> Entry:
        """This layer left dense."""
        return replace(
            self,
            format=None,
            network=None,
            parameters=(self.parameters[0],) * 2,
            macs=(self.macs[0],) * 2,
            error=None,
            output_error=None,
            notes=(),
            advice="",
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
        rows = self.rows
        factorized = layer.factorized_cost(own, self.settings, rows)
        part, rest = divmod(network.num_parameters, count)
        return replace(
            self,
            format=format,
            network=network,
            parameters=(self.parameters[0], part + (position < rest)),
            macs=(self.macs[0], factorized.macs // rows),
            error=None,
            output_error=None,
            reason="",
            advice="",
            notes=(*clamped, *_padding(network, self.axes)),
        )


def entry_of(
    name: str, layer: FactorizedLayer, aliases: tuple[str, ...] = (), share: str = "", work: Work | None = None
) -> Entry:
    """The entry of a layer that is factorized already. Of a frozen one the dense weight counts, beside the cores."""
    settings, work = layer.settings_of(layer), work or Work()
    entry = Entry(name, layer.source, layer.kind, settings, aliases=aliases, stack=layer.stack, share=share, work=work)
    entry = entry.with_format(layer.format.pin(layer.network))
    entry = replace(entry, error=layer.error, output_error=layer.output_error)
    if not layer.frozen:
        return entry
    (size, cores), (macs, _) = entry.parameters, entry.macs
    notes = (*entry.notes, "frozen: it computes with its dense weight, which is counted beside the cores")
    return replace(entry, parameters=(size, cores + size), macs=(macs, macs), notes=notes, frozen=True)


def _padding(network: Network, axes: Sequence[Axis]) -> Iterator[str]:
    for axis, modes in zip(axes, modes_by_axis(axes, network), strict=True):
        padded = math.prod(mode.size for mode in modes)
        if padded > axis.size:
            sizes = " x ".join(str(mode.size) for mode in modes)
            yield f"{axis.role} {axis.size} padded to {padded} = {sizes}"


def _is_counts(value: object, lengths: tuple[int, ...]) -> bool:
    return isinstance(value, list) and len(value) in lengths and all(is_count(item) for item in value)


def _is_error(value: object) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf)


_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "name": ("a string", lambda v: isinstance(v, str)),
    "kind": ("a string", lambda v: isinstance(v, str)),
    "layer": ("a layer kind", lambda v: any(v == cls.kind for cls in layer_types())),
    # A layer whose shape is hidden (lazy, quantized) has none.
    "settings": ("an object", lambda v: isinstance(v, dict)),
    "parameters": ("two counts", lambda v: _is_counts(v, (2,))),
    "macs": ("two counts", lambda v: _is_counts(v, (2,))),
    "error": ("a number or null", _is_error),
    "output_error": ("a number or null", _is_error),
    "format": ("an object or null", lambda v: v is None or isinstance(v, dict)),
    "reason": ("a string", lambda v: isinstance(v, str)),
    "blocked": ("true or false", lambda v: isinstance(v, bool)),
    "aliases": ("a list of strings", lambda v: isinstance(v, list) and all(isinstance(item, str) for item in v)),
    "stack": ("(layers, position) or null", lambda v: v is None or (_is_counts(v, (2,)) and v[1] < v[0] > 1)),
    "share": ("a string", lambda v: isinstance(v, str)),
    "fold": ("true or false", lambda v: isinstance(v, bool)),
    "advice": ("a string", lambda v: isinstance(v, str)),
}
_OPTIONAL: dict[str, Any] = {
    "error": None,
    "output_error": None,
    "format": None,
    "reason": "",
    "blocked": False,
    "aliases": [],
    "stack": None,
    "share": "",
    "fold": False,
    "advice": "",
}


def read_entry(item: Mapping[str, Any], work: Work) -> Entry:
    """An entry from plain data; its costs are computed anew, and what was said of another format is dropped.

    Raises
    ------
    ConversionError
        If a field is missing or malformed; the layer is named.
    RankError, ModeError, FormatError
        If the format is wrong or does not fit.
    """
    item = {**_OPTIONAL, **item}
    where = f"plan: layer {item.get('name')!r}"
    for key, (rule, holds) in _FIELDS.items():
        if key not in item:
            raise ConversionError(f"{where}: {key} is missing")
        if not holds(item[key]):
            raise ConversionError(f"{where}: {key} is {rule}; got {item[key]!r}")
    if (item["stack"] is None) != (item["share"] == ""):
        raise ConversionError(f"{where}: stack and share go together; got {item['stack']} and {item['share']!r}")
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
            work=work,
        )
    except TensorlayersError as error:
        raise ConversionError(f"{where}: settings: {error}") from None
    advice = item["advice"] if item.get("stated_for") == item["format"] else ""
    if item["format"] is None:
        return replace(entry.dense(item["reason"], item["blocked"]), advice=advice)
    if not entry.settings:
        raise ConversionError(f"{where}: format: a layer without a shape stays dense")
    try:
        converted = entry.with_format(from_dict(item["format"]))
    except TensorlayersError as error:
        raise type(error)(f"{where}: format: {error}") from None
    if item.get("stated_for") != item["format"]:
        return replace(converted, advice=advice)
    return replace(converted, error=item["error"], output_error=item["output_error"], advice=advice)
