"""What becomes of each layer that was found, and why: the rules of economy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from .advice import Asked, advise
from .cost import SLOWER
from .entry import ROWS, TINY, Entry, Work
from .errors import ConversionError, RankError, TensorlayersError
from .formats import Format
from .keys import Choice, Group, Shares, choose, groups
from .scan import Found


def entry_for(layer: Found, work: Work) -> Entry:
    """The entry of a layer before anything is decided."""
    fold = layer.folded is not None
    return Entry(layer.name, layer.kind, layer.layer.kind, layer.settings, aliases=layer.aliases, fold=fold, work=work)


def decide(
    found: Sequence[Found],
    model: nn.Module,
    formats: Format | Choice | None,
    share: Shares,
    where: Callable[[str, nn.Module], bool] | None,
    force: bool,
    work: Work,
) -> list[Entry]:
    """The entries of the layers that were found; the arguments are those of `plan_conversion`."""
    if formats is None and not share:
        raise ConversionError("formats: a format such as LowRank(0.5), a mapping of names to those, or share; got none")
    chosen = {} if formats is None else choose(formats, found, model)
    entries = {}
    for layer in found:
        key, format = chosen.get(layer.name, (None, None))
        entries[layer.name] = _alone(layer, key, format, where, force, work)
    for group in groups(share, found):
        kept = tuple(layer for layer in group.members if where is None or where(layer.name, layer.module))
        if len(kept) > 1:
            entries.update({entry.name: entry for entry in _jointly(replace(group, members=kept), force, work)})
    return [entries[layer.name] for layer in found]


def _alone(
    layer: Found,
    key: str | None,
    format: Format | None,
    where: Callable[[str, nn.Module], bool] | None,
    force: bool,
    work: Work,
) -> Entry:
    entry = entry_for(layer, work)
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
    return converted if force else _economical([converted], _is_trained(layer))[0]


def _jointly(group: Group, force: bool, work: Work) -> list[Entry]:
    count = len(group.members)
    try:
        entries = [
            replace(entry_for(layer, work), stack=(count, position), share=group.label).with_format(group.format)
            for position, layer in enumerate(group.members)
        ]
    except TensorlayersError as error:
        raise type(error)(f"share[{group.label!r}]: {error}") from None
    return entries if force else _economical(entries, any(map(_is_trained, group.members)))


def _is_trained(layer: Found) -> bool:
    """Whether a layer is judged by a training step too: but for a frozen one in evaluation mode, it is."""
    return layer.module.training or any(parameter.requires_grad for parameter in layer.module.parameters())


def _economical(entries: Sequence[Entry], training: bool) -> list[Entry]:
    """These layers as they are where converting them, together, pays; else dense. Either with advice."""
    before, after = (sum(entry.parameters[side] for entry in entries) for side in (0, 1))
    if after >= before:
        return [entry.dense(f"nothing saved: {after / before:.2f} x the parameters") for entry in entries]
    dense, factorized = (sum(entry.macs[side] for entry in entries) for side in (0, 1))
    if not dense:
        return list(entries)  # lookups, which were named for their memory
    cost, what = _predicted(entries, training)
    weights, macs = entries[0].parameters[0], f"{factorized / dense:.2f} x the MACs"
    if what:
        by, reason = "time", f"{cost:.2f} x the time of a {what} ({macs})"
    elif entries[0].rows == ROWS and 0 < weights < TINY:
        by, cost = "launches", math.inf
        reason = f"{weights} weights are less work than to launch two operations ({macs})"
    else:  # no estimate
        by, cost, reason = "MACs", factorized / dense, macs
    is_slower, reason = cost > SLOWER, f"predicted slower: {reason}"
    if not is_slower and factorized <= dense:
        return list(entries)
    said = [advise(Asked.of(entry, training, by)) for entry in entries]
    entries = [entry.dense(reason) for entry in entries] if is_slower else entries
    return [replace(entry, advice=advice) for entry, advice in zip(entries, said, strict=True)]


def _predicted(entries: Sequence[Entry], training: bool) -> tuple[float, str]:
    """The time of these layers over that of the dense ones, by a forward or a training step, whichever is worse, and
    which it is; empty where there is no estimate."""
    worst = 0.0, ""
    for what in ("forward", "training step") if training else ("forward",):
        times = [entry.seconds(training=what != "forward") for entry in entries]
        known = [pair for pair in times if pair is not None]
        if len(known) < len(times):
            return 0.0, ""
        worst = max(worst, (sum(after for _, after in known) / sum(before for before, _ in known), what))
    return worst
