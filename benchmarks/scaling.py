"""Time and memory of 768 -> 3072 linear layers against the batch, and against the rank; what the plots show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from itertools import pairwise

import cases
import torch
from compare import KINDS, Figure, Row, compare
from torch import nn

IN, OUT = 768, 3072
BATCHES = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
ROWS = 1024
SHARES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
"""Of the dense FLOPs, at `ROWS` rows; each takes about twice the rank of the one before."""

Line = list[tuple[float, Row]]
"""The rows of one format, each with the work that its time is held against."""


def run(seconds: float, quick: bool) -> Iterator[list[Row]]:
    """The rows of all batches, of all ranks, and the slopes of both; `quick`: a few of two formats."""
    torch.manual_seed(0)
    formats = cases.FORMATS[:4:3] if quick else cases.FORMATS
    dense = nn.Linear(IN, OUT)
    by_batch: dict[str, Line] = {}
    chosen = [cases.at_share(IN, OUT, cases.MIDDLE, format) for format in formats]
    for batch in BATCHES[0:5:2] if quick else BATCHES:
        candidates = [cases.linear(IN, OUT, format, batch) for format in chosen]
        rows = compare(f"{IN} -> {OUT}, {batch} rows", dense, candidates, torch.randn(batch, IN), seconds)
        for row in rows[1:]:
            row.facts["batch"] = batch
            by_batch.setdefault(row.name, []).append((batch, row))
        yield rows
    yield slopes("the batch", by_batch)

    by_rank: dict[str, Line] = {}
    candidates = []
    for format in formats:
        shares = SHARES[0:5:2] if quick else SHARES
        for rank in dict.fromkeys(cases.at_share(IN, OUT, share, format) for share in shares):
            candidates.append(cases.linear(IN, OUT, rank, ROWS))
            candidates[-1].facts |= {"rank": rank.rank, "series": format.__name__}
    rows = compare(f"{IN} -> {OUT}, {ROWS} rows, by rank", dense, candidates, torch.randn(ROWS, IN), seconds)
    for row in rows[1:]:
        by_rank.setdefault(row.facts["series"], []).append((row.facts["flops"], row))
    yield rows
    yield slopes("the FLOPs", by_rank)


def slopes(against: str, lines: dict[str, Line]) -> list[Row]:
    """How time grows along each line: the slope, and how much faster than the work at most from one row to the next.

    Time is in multiples of the dense layer's for a row: that of fresh memory, which a large batch takes from the system
    at each call, and the machine's load show in both.
    """
    found = []
    for name, line in lines.items():
        row = Row(f"time against {against}", name)
        for kind in KINDS:
            timed = [(work, r.figures[kind].value * r.facts.get("batch", 1)) for work, r in line if kind in r.figures]
            if len(timed) > 1:
                steps = [b[1] / a[1] / (b[0] / a[0]) for a, b in pairwise(timed)]
                row.figures[f"{kind}_slope"] = Figure(slope(timed))
                row.figures[f"{kind}_growth"] = Figure(max(steps), cases.GROWTH)
        found.append(row)
    return found


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the least-squares line through log time against log work: 1 where time is proportional to work."""
    works, times = ([math.log(point[k]) for point in points] for k in (0, 1))
    return statistics.linear_regression(works, times).slope
