"""What becomes of each layer that was found, and why: the rules of economy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import nn

from .advice import Asked, advise
from .budget import Budget, Level, allocate, levels
from .cost import SLOWER
from .entry import ROWS, TINY, Entry, Work
from .errors import ConversionError, RankError, TensorlayersError
from .formats import Format
from .keys import Choice, Formats, Group, Shares, choose, groups
from .layer_times import LayerTimes
from .layers import layer_type
from .layers.data import problem
from .moments import Moments
from .rank import RankRule
from .scan import Found

_FREE = "it takes nothing of the budget, as far as is known"


def entry_for(layer: Found, work: Work) -> Entry:
    """The entry of a layer before anything is decided."""
    fold = layer.folded is not None
    return Entry(layer.name, layer.kind, layer.layer.kind, layer.settings, aliases=layer.aliases, fold=fold, work=work)


def decide(
    found: Sequence[Found],
    model: nn.Module,
    formats: Format | Sequence[Format] | Choice | None,
    share: Shares,
    where: Callable[[str, nn.Module], bool] | None,
    force: bool,
    work: Work,
    moments: Mapping[str, Moments] | None = None,
    budget: Budget | None = None,
) -> list[Entry]:
    """The entries of the layers that were found; the arguments are those of `plan_conversion`."""
    if formats is None and not share:
        raise ConversionError("formats: a format such as LowRank(0.5), a mapping of names to those, or share; got none")
    chosen = {} if formats is None else choose(formats, found, model, several=budget is not None)
    shared = {}
    for group in groups(share, found):
        kept = tuple(layer for layer in group.members if where is None or where(layer.name, layer.module))
        if len(kept) > 1:
            shared.update({entry.name: entry for entry in _jointly(replace(group, members=kept), force, work, moments)})
    entries, open_ = dict(shared), dict[str, tuple[Found, str | None, Formats]]()
    for layer in found:
        if layer.name not in shared:
            key, some = chosen.get(layer.name, (None, None))
            reason, blocked = _stays_dense(layer, key, some, where, force)
            if reason or some is None:
                entries[layer.name] = entry_for(layer, work).dense(reason, blocked)
            else:
                open_[layer.name] = layer, key, some
    if budget is None:
        for name, (layer, key, some) in open_.items():
            entries[name] = _alone(layer, key, some[0], force, work, moments)
    else:
        entries.update(_allocated(open_, model, budget, force, work, moments))
    return [entries[layer.name] for layer in found]


def _stays_dense(
    layer: Found,
    key: str | None,
    formats: Formats | None,
    where: Callable[[str, nn.Module], bool] | None,
    force: bool,
) -> tuple[str, bool]:
    """Why a layer stays dense whatever it costs, and whether no `force` overrides that; empty where it need not."""
    if layer.obstacle:
        return layer.obstacle, True
    if formats is None:
        return "no key matches" if key is None else "asked to stay dense", False
    if where is not None and not where(layer.name, layer.module):
        return "asked to stay dense", False
    if not entry_for(layer, Work()).macs[0] and key == "*" and not force:
        # It cannot win in time, so that only who wants its memory converts it.
        return "a lookup: dense has no MACs to save; a key that names the layer converts it", False
    return "", False


def _alone(
    layer: Found,
    key: str | None,
    format: Format,
    force: bool,
    work: Work,
    moments: Mapping[str, Moments] | None,
) -> Entry:
    entry = entry_for(layer, work)
    try:
        converted = _with_data(entry, [layer], format, moments)
    except RankError as error:
        # A fraction that one small layer cannot reach must not stop the whole model, unless that layer was named.
        if not isinstance(format.rank, float) or key in (layer.name, *layer.aliases) or force:
            raise type(error)(f"layer {layer.name!r}: {error}") from None
        return entry.dense(f"nothing saved: {error}")
    except TensorlayersError as error:
        raise type(error)(f"layer {layer.name!r}: {error}") from None
    return converted if force else _economical([converted], _is_trained(layer))[0]


def _with_data(entry: Entry, layers: Sequence[Found], format: Format, moments: Mapping[str, Moments] | None) -> Entry:
    """An entry converted to a format, with the ranks that its weight and data decide; a note says what data it has."""
    seen = [one for layer in layers if (one := (moments or {}).get(layer.name)) is not None]
    known = seen if len(seen) == len(layers) else None
    if moments is not None or isinstance(format.rank, RankRule):
        format = format.chosen(*problem(layer_type(entry.layer), [layer.dense for layer in layers], known))
    converted = entry.with_format(format)
    if moments is None:
        return converted
    return replace(converted, notes=(*converted.notes, *_data_notes(known)))


def _data_notes(known: Sequence[Moments] | None) -> Iterator[str]:
    if known is None:
        yield "no data: it never ran while they were gathered, or was left out, and is fitted to its weight"
    elif not all(one.reaches_output for one in known):
        yield "the model's output, as it was judged, does not depend on it"
    elif (count := sum(one.count for one in known)) < (wanted := known[0].inputs.shape[-1]) and not known[0].is_lookup:
        yield f"few data: {count:,.0f} positions for {wanted:,} inputs; other directions count for a hundredth"


def _allocated(
    layers: Mapping[str, tuple[Found, str | None, Formats]],
    model: nn.Module,
    budget: Budget,
    force: bool,
    work: Work,
    moments: Mapping[str, Moments] | None,
) -> dict[str, Entry]:
    """The entries of layers among which one budget is spent."""
    if moments is None:
        raise ConversionError("budget: calibration=collect(model, batches), by which it is spent; got none")
    entries = {name: entry_for(layer, work) for name, (layer, _, _) in layers.items()}
    times = None
    if budget.timed is not None:
        times = LayerTimes(model, [layer for layer, _, _ in layers.values()], budget.timed)

    def costs(entry: Entry) -> tuple[float, float]:
        if times is not None:
            return times.seconds(layers[entry.name][0], entry.format)
        count = moments[entry.name].count if entry.name in moments else 0
        return budget.costs(entry, count, _is_trained(layers[entry.name][0]))

    choices: dict[str, list[Level]] = {}
    for name, (layer, key, formats) in layers.items():
        trained = _is_trained(layer)

        def allowed(entry: Entry, trained: bool = trained) -> bool:
            return force or not _slower([entry], trained)[0]

        if name in moments:
            choices[name] = levels(entries[name], layer, formats, moments[name], budget, costs, allowed)
            continue
        # What never ran cannot be compared: it gets its share.
        even = _alone(layer, key, replace(formats[0], rank=budget.share), force, work, moments)
        choices[name] = [Level(costs(even)[1], 0.0, even.format)]
    total = sum(costs(entry)[0] for entry in entries.values())
    if budget.latency is not None and entries and not total:
        raise ConversionError(
            "budget: latency of layers whose time can be predicted, or timed=batch; got none of these"
        )
    for (name, entry), level in zip(entries.items(), allocate(list(choices.values()), budget.share * total)):
        if level.format is None:
            free = name in moments and not costs(entry)[0]
            entries[name] = entry.dense(_FREE if free else "the budget is better spent here than on other layers")
        else:
            entries[name] = _with_data(entry, [layers[name][0]], level.format, moments)
    return entries


def _jointly(group: Group, force: bool, work: Work, moments: Mapping[str, Moments] | None) -> list[Entry]:
    count, format, entries = len(group.members), group.format, list[Entry]()
    try:
        for position, layer in enumerate(group.members):
            entry = replace(entry_for(layer, work), stack=(count, position), share=group.label)
            entries.append(_with_data(entry, group.members, format, moments))
            format = entries[0].format or format  # whose ranks are chosen once
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
    is_slower, by, reason = _slower(entries, training)
    if not is_slower and not _has_more_macs(entries):
        return list(entries)
    said = [advise(Asked.of(entry, training, by)) for entry in entries]
    entries = [entry.dense(f"predicted slower: {reason}") for entry in entries] if is_slower else entries
    return [replace(entry, advice=advice) for entry, advice in zip(entries, said, strict=True)]


def _has_more_macs(entries: Sequence[Entry]) -> bool:
    """Lookups, of which dense has none, were named for their memory."""
    dense, factorized = (sum(entry.macs[side] for entry in entries) for side in (0, 1))
    return 0 < dense < factorized


def _slower(entries: Sequence[Entry], training: bool) -> tuple[bool, str, str]:
    """Whether converting these layers makes them slower, by what that is judged, and by how much."""
    dense, factorized = (sum(entry.macs[side] for entry in entries) for side in (0, 1))
    if not dense:
        return False, "MACs", ""
    cost, what = _predicted(entries, training)
    weights, macs = entries[0].parameters[0], f"{factorized / dense:.2f} x the MACs"
    if what:
        return cost > SLOWER, "time", f"{cost:.2f} x the time of a {what} ({macs})"
    if entries[0].rows == ROWS and 0 < weights < TINY:
        return True, "launches", f"{weights} weights are less work than to launch two operations ({macs})"
    return factorized / dense > SLOWER, "MACs", macs  # no estimate


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
