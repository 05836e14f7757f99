"""What becomes of each layer that was found, and why: the rules of economy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from .cost import SLOWER
from .entry import Entry
from .errors import ConversionError, RankError, TensorlayersError
from .formats import Format
from .keys import Choice, Group, Shares, choose, groups
from .scan import Found


def entry_for(layer: Found) -> Entry:
    """The entry of a layer before anything is decided."""
    fold = layer.folded is not None
    return Entry(layer.name, layer.kind, layer.layer.kind, layer.settings, aliases=layer.aliases, fold=fold)


def decide(
    found: Sequence[Found],
    model: nn.Module,
    formats: Format | Choice | None,
    share: Shares,
    where: Callable[[str, nn.Module], bool] | None,
    force: bool,
) -> list[Entry]:
    """The entries of the layers that were found; the arguments are those of `plan_conversion`."""
    if formats is None and not share:
        raise ConversionError("formats: a format such as LowRank(0.5), a mapping of names to those, or share; got none")
    chosen = {} if formats is None else choose(formats, found, model)
    entries = {}
    for layer in found:
        key, format = chosen.get(layer.name, (None, None))
        entries[layer.name] = _alone(layer, key, format, where, force)
    for group in groups(share, found):
        kept = tuple(layer for layer in group.members if where is None or where(layer.name, layer.module))
        if len(kept) > 1:
            entries.update({entry.name: entry for entry in _jointly(replace(group, members=kept), force)})
    return [entries[layer.name] for layer in found]


def _alone(
    layer: Found,
    key: str | None,
    format: Format | None,
    where: Callable[[str, nn.Module], bool] | None,
    force: bool,
) -> Entry:
    entry = entry_for(layer)
    if layer.obstacle:
        return entry.dense(layer.obstacle, blocked=True)
    if format is None:
        return entry.dense("no key matches" if key is None else "asked to stay dense")
    if where is not None and not where(layer.name, layer.module):
        return entry.dense("asked to stay dense")
    if not entry.macs[0] and key == "*" and not force:
        # It cannot win in time, so that only who wants its memory converts it.
        return entry.dense("a lookup: dense has no MACs to save; a key that names the layer converts it")
    try:
        converted = entry.with_format(format)
    except RankError as error:
        # A fraction that one small layer cannot reach must not stop the whole model, unless that layer was named.
        if not isinstance(format.rank, float) or key in (layer.name, *layer.aliases) or force:
            raise type(error)(f"layer {layer.name!r}: {error}") from None
        return entry.dense(f"nothing saved: {error}")
    except TensorlayersError as error:
        raise type(error)(f"layer {layer.name!r}: {error}") from None
    reason = "" if force else _uneconomical([converted])
    return entry.dense(reason) if reason else converted


def _jointly(group: Group, force: bool) -> list[Entry]:
    count = len(group.members)
    try:
        entries = [
            replace(entry_for(layer), stack=(count, position), share=group.label).with_format(group.format)
            for position, layer in enumerate(group.members)
        ]
    except TensorlayersError as error:
        raise type(error)(f"share[{group.label!r}]: {error}") from None
    reason = "" if force else _uneconomical(entries)
    return [entry.dense(reason) for entry in entries] if reason else entries


def _uneconomical(entries: Sequence[Entry]) -> str:
    """Why converting these layers would not pay; empty where it would."""
    before, after = (sum(entry.parameters[side] for entry in entries) for side in (0, 1))
    if after >= before:
        return f"nothing saved: {after / before:.2f} x the parameters"
    dense, factorized = (sum(entry.macs[side] for entry in entries) for side in (0, 1))
    slower = dense and factorized > SLOWER * dense
    return f"predicted slower: {factorized / dense:.2f} x the MACs" if slower else ""
