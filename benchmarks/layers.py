"""Linear layers against nn.Linear: the formats at a tenth and at two fifths of the FLOPs, and where they have more."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import cases
import torch
from cases import LOW, MIDDLE
from compare import Candidate, Row, compare
from torch import nn

from tensorlayers import (
    BTT,
    CP,
    TT,
    FactorizedLinear,
    Format,
    KernelError,
    LowRank,
    Tucker,
    dispatch,
    explain,
)

SHAPES = ((768, 3072), (3072, 768), (1024, 4096))
BATCHES = (1024, 4096, 1)
MORE: tuple[Format, ...] = (TT(16), TT(32), TT(48), CP(0.05))
"""Formats of extreme compression at ranks that they are not made for: as much arithmetic as dense, or more."""
TINY_FORMATS: tuple[Format, ...] = (LowRank(2), TT(2), CP(2), BTT(1), Tucker(2))


def run(seconds: float, quick: bool) -> Iterator[list[Row]]:
    """The rows of every shape and batch; `quick`: the first."""
    for shape in SHAPES[: 1 if quick else None]:
        for rows in (BATCHES[0], 1) if quick else BATCHES:
            yield measure(*shape, rows, seconds, MORE[:2] if quick else MORE)


def tiny(seconds: float, quick: bool) -> Iterator[list[Row]]:
    """The overhead: a layer so small that nothing else shows (16 -> 10 features, 4 rows; tensorly-torch's issue 35)."""
    torch.manual_seed(0)
    candidates = []
    for format in TINY_FORMATS:
        aims = cases.targets(*cases.OVERHEAD[type(format)])
        candidates.append(cases.linear(16, 10, format, 4, **aims))
        candidates[-1].bounded = False  # plain products save a little more, and that is faster
    rows = compare("16 -> 10, 4 rows", nn.Linear(16, 10), candidates, torch.randn(4, 16), seconds)
    expect_dense(rows[1:])
    yield rows


def measure(in_features: int, out_features: int, rows: int, seconds: float, more: Sequence[Format]) -> list[Row]:
    """The rows of one shape and batch."""
    torch.manual_seed(0)
    dense = nn.Linear(in_features, out_features)
    candidates = []
    for wanted in (LOW, MIDDLE):
        for format in cases.FORMATS:
            chosen = cases.at_share(in_features, out_features, wanted, format)
            aims = cases.targets(*cases.SHARES[wanted].get(format, ())) if rows > 1 else cases.targets(cases.ONE_ROW)
            candidates.append(cases.linear(in_features, out_features, chosen, rows, **aims))
    forced: dict[str, list[str]] = {}
    for extreme in more if rows > 1 else ():
        candidate = cases.linear(in_features, out_features, extreme, rows)
        candidates.append(candidate)
        assert isinstance(candidate.module, FactorizedLinear)
        if cases.rebuilding(candidate.module, rows) <= cases.REBUILD_SHARE:
            candidate.targets = cases.targets(*cases.REBUILT)
        else:
            others = alternatives(candidate, rows)
            forced[candidate.name] = [other.name for other in others]
            candidates += others
    title = f"{in_features} -> {out_features}, {rows} row{'s' * (rows > 1)}"
    for candidate in candidates:
        candidate.memory = rows > 1
    found = compare(title, dense, candidates, torch.randn(rows, in_features), seconds, training=rows > 1)
    aim_at_cheapest(found, forced)
    expect_dense([row for row in found if row.name in forced])
    return found


def expect_dense(rows: Sequence[Row]) -> None:
    """Note where `convert_model` would convert a layer that is slower than dense."""
    for row in rows:
        if not row.facts.get("convert_model"):
            row.broken = "convert_model does not leave it dense"


def alternatives(candidate: Candidate, rows: int) -> list[Candidate]:
    """The same layer by each implementation that `explain` lists, but for those predicted at 1.5 times the best or
    more: some would take minutes."""
    assert isinstance(candidate.module, FactorizedLinear)
    listed = explain(candidate.module, torch.empty(rows, candidate.module.in_features)).rows
    seconds = {row.name: row.seconds for row in listed if row.seconds is not None and row.name in dispatch.NAMES}
    found = []
    for name in (name for name, time in seconds.items() if time < 1.5 * min(seconds.values())):
        layer = copy.deepcopy(candidate.module)
        assert isinstance(layer, FactorizedLinear)
        try:
            layer.implementation = name
            layer(torch.zeros(2, layer.in_features))
        except KernelError:
            continue
        found.append(Candidate(f"  {candidate.name} by {name}", layer, cases.check, bounded=False))
    return found


def aim_at_cheapest(rows: list[Row], forced: dict[str, list[str]]) -> None:
    """Set the targets of those that must come within 10 % of the cheapest alternative, which is known now."""
    by_name = {row.name: row for row in rows}
    for name, others in forced.items():
        for kind in ("forward", "training"):
            measured = [by_name[o].figures[kind].value for o in others if kind in by_name[o].figures]
            figure = by_name[name].figures.get(kind)
            if figure and measured:
                figure.target = cases.CHEAPEST * min(measured)
