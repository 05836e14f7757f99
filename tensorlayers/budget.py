"""One budget for a whole model: ranks, and formats, where they matter most to the model's output."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .entry import Entry
from .errors import ConversionError, RankError
from .formats import Format
from .layers import layer_type
from .layers.data import problem
from .metric import Metric
from .moments import Moments
from .network import Axis, Network
from .rank import clamp, resolve
from .scan import Found
from .spectra import spend

_SHARES = (
    0.002,
    0.005,
    0.01,
    0.02,
    0.03,
    0.05,
    0.08,
    0.12,
    0.16,
    0.2,
    0.25,
    0.3,
    0.36,
    0.42,
    0.48,
    0.54,
    0.6,
    0.68,
    0.76,
    0.84,
    0.92,
)
"""The fractions of a layer's parameters that ranks are tried for."""

_SWEPT = 0.4, 2.0
"""Those of them that are swept, as multiples of the budget's: few layers get less or more."""

_LEAST = 0.1
"""Of the budget's share: a layer gets no less, unless it must; what so large a change does, no curvature tells."""

_EVERY = 2
"""Each of so many of these; between them their errors are interpolated."""

KINDS = ("params", "macs", "latency", "memory")


@dataclass(frozen=True)
class Budget:
    """What a converted model may take, as a fraction of the dense one; exactly one of these.

    Parameters
    ----------
    params, macs : float, optional
        Of the weights that may be converted, or of their multiply-accumulates: a layer's count as often as the
        calibration ran it, by positions, a convolution of a large image more than one of a small.
    latency : float, optional
        Of the time of a forward of these layers: predicted, and weighed likewise; or with `timed` measured.
    memory : float, optional
        Of the weights, and of those that are trained the gradients and two optimizer states; activations that are
        saved for backward are the dense layers'.
    round_to : int
        Ranks are multiples of this, where they are not below it: 8 or 16 suit GPUs.
    timed : optional
        A batch, as of `collect`: the latency is then that of the layers on what they take of it, on their device, each
        shape and rank timed dense and factorized in turn.
    """

    params: float | None = None
    macs: float | None = None
    latency: float | None = None
    memory: float | None = None
    round_to: int = 1
    timed: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ConversionError(f"Budget: exactly one of {', '.join(KINDS)}; got {', '.join(given) or 'none'}")
        share = getattr(self, given[0])
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ConversionError(f"Budget: {given[0]} is a fraction above 0 and at most 1; got {share!r}")
        if isinstance(self.round_to, bool) or not isinstance(self.round_to, int) or self.round_to < 1:
            raise ConversionError(f"Budget: round_to is an integer of at least 1; got {self.round_to!r}")
        if self.timed is not None and self.latency is None:
            raise ConversionError(f"Budget: timed is for latency; got {given[0]}")

    @property
    def share(self) -> float:
        """The fraction."""
        return float(next(found for kind in KINDS if (found := getattr(self, kind)) is not None))

    def costs(self, entry: Entry, positions: float, trained: bool = True) -> tuple[float, float]:
        """What a layer takes, dense and as the entry has it, at so many positions of its output."""
        pair: tuple[float, float] = entry.parameters
        scale = 1.0
        if self.macs is not None or self.latency is not None:
            scale = positions / layer_type(entry.layer).positions_a_row(entry.settings)
        if self.macs is not None:
            pair = entry.macs
        elif self.latency is not None:
            pair, scale = entry.seconds(training=False) or (0.0, 0.0), scale / entry.rows
        elif self.memory is not None and trained:
            scale = 4.0  # gradients and two moments
        return scale * pair[0], scale * pair[1]


@dataclass(frozen=True)
class Level:
    """One way to have a layer: dense (format None), or a format with its ranks.

    Parameters
    ----------
    cost : float
    effect : float
        What it changes of the model's output, squared.
    format : Format or None
    """

    cost: float
    effect: float
    format: Format | None


def levels(
    entry: Entry,
    found: Found,
    formats: Sequence[Format],
    moments: Moments,
    budget: Budget,
    costs: Callable[[Entry], tuple[float, float]],
    allowed: Callable[[Entry], bool] = lambda entry: True,
) -> list[Level]:
    """The ways to have a layer, the dense one first; each takes less than that.

    What is computed of a weight, a format and its ranks is kept with the moments.

    Parameters
    ----------
    entry : Entry
        Of the layer as it is.
    found : Found
    formats : sequence of Format
        A rank bounds those that are tried; a fraction of 1 bounds none.
    moments : Moments
    budget : Budget
    costs : callable
        What a layer takes of the budget, dense and as an entry has it.
    allowed : callable
        Whether the layer may be so converted.

    Raises
    ------
    ConversionError
        If gradients of the model's output were not gathered.
    """
    if moments.outputs is None:
        raise ConversionError(f"budget: layer {entry.name!r}: gradients of the output; collect them (gradients=4)")
    weight, axes, metric = problem(layer_type(entry.layer), [found.dense], [moments])
    assert metric is not None
    content = (*weight.shape, float(weight.double().sum()), float(weight.double().norm()))
    weighs = moments.count if moments.reaches_output else 0.0
    made = [Level(costs(entry)[0], 0.0, None)]
    for format in formats:
        candidates: dict[tuple[int, ...], tuple[Format, float, float]] = {}
        for network in _networks(format, weight, axes, metric, budget.round_to):
            pinned = format.pin(network)
            converted = entry.with_format(pinned)
            cost, share = costs(converted)[1], converted.parameters[1] / converted.parameters[0]
            if cost < made[0].cost and share < 1 and allowed(converted):
                candidates[network.ranks] = (pinned, cost, share)
        near = {ranks: found for ranks, found in candidates.items() if found[2] >= _LEAST * budget.share}
        candidates = near or candidates
        if not candidates:
            continue
        ranks = list(candidates)
        most = format.pin(format.largest(axes).with_ranks([max(column) for column in zip(*ranks, strict=True)]))
        shares = [share for _, _, share in candidates.values()]
        swept = [k for k, share in enumerate(shares) if _SWEPT[0] < share / budget.share < _SWEPT[1]][::_EVERY]
        key = (str(most), *ranks, *swept, content)
        if key not in moments.curves:
            moments.curves[key] = most.losses(weight, axes, metric, ranks, swept)
        for (pinned, cost, _), error in zip(candidates.values(), moments.curves[key], strict=True):
            made.append(Level(cost, weighs * error, pinned))
    return made


def _networks(format: Format, weight: Tensor, axes: Sequence[Axis], metric: Metric, round_to: int) -> Iterator[Network]:
    """Networks of a format from the largest to the smallest, within its own rank."""
    entries = math.prod(axis.size for axis in axes)
    bounded = isinstance(format.rank, float)
    largest = format.largest(axes) if bounded else format.chosen(weight, axes, metric).resolve(axes)[0]
    measured = format.spectra(weight, axes, metric) if len(largest.bonds) > 1 else {}
    for share in reversed(_SHARES):
        if bounded and share > format.rank:  # type: ignore[operator]
            continue
        found = spend(largest, measured, math.floor(share * entries))
        if found is None:
            try:
                found = resolve(largest, share, entries, format.name, largest.ranks)[0]
            except RankError:  # too little for one of all ranks
                return
        ranks = [max(rank - rank % round_to, min(rank, round_to)) for rank in found.ranks]
        largest = clamp(found.with_ranks([min(pair) for pair in zip(ranks, largest.ranks, strict=True)]))
        yield largest


def allocate(layers: Sequence[Sequence[Level]], budget: float) -> list[Level]:
    """Choose a level of each layer so that the sum of costs is within a budget and that of effects is least.

    By marginal gains along the lower convex hull of each layer's levels, the best first: what Lagrange multipliers
    give, and then what still fits.

    Raises
    ------
    ConversionError
        If the cheapest levels together take more.
    """
    hulls = [hull(some) for some in layers]
    at = [0] * len(hulls)
    spent = sum(some[0].cost for some in hulls)
    if spent > budget * (1 + 1e-9):
        least = spent / sum(max(level.cost for level in some) for some in layers)
        raise ConversionError(f"budget: the least that these layers can take is {least:.3g} of the dense ones")
    steps = []
    for k, some in enumerate(hulls):
        for j, (low, high) in enumerate(itertools.pairwise(some)):
            steps.append(((low.effect - high.effect) / (high.cost - low.cost), k, j + 1))
    for _, k, j in sorted(steps, key=lambda step: (-step[0], step[1:])):
        more = hulls[k][j].cost - hulls[k][j - 1].cost
        if at[k] == j - 1 and spent + more <= budget * (1 + 1e-9):
            at[k], spent = j, spent + more
    return [some[j] for some, j in zip(hulls, at, strict=True)]


def hull(some: Sequence[Level]) -> list[Level]:
    """The levels on the lower convex hull of effect over cost, the cheapest first."""
    found: list[Level] = []
    for level in sorted(some, key=lambda level: (level.cost, level.effect)):
        if found and (level.cost == found[-1].cost or level.effect >= found[-1].effect):
            continue
        while len(found) > 1 and _slope(found[-2], level) <= _slope(found[-2], found[-1]):
            found.pop()
        found.append(level)
    return found


def _slope(low: Level, high: Level) -> float:
    """The effect that a unit of cost changes: the more it falls, the smaller."""
    return (high.effect - low.effect) / (high.cost - low.cost)
