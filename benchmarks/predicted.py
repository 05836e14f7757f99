"""What is predicted for a GPU: dense's time over that of a tensor train, by the shipped constants. No GPU is needed.

    python benchmarks/predicted.py

Beside it stands what benchmarks/gpu.py measured, once it has: forward (training). Below, few rows at a tenth of the
parameters, forward.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common import ROOT

from tensorlayers import CP, TT, LowRank, decision, machine
from tensorlayers.network import linear_axes

ROWS, DTYPE = 4096, "bfloat16"
MEASURED = ROOT / "benchmarks" / "gpu.json"


def measured(name: str, rank: int, path: Path = MEASURED) -> str:
    """The ratios of a layer in the report of a GPU."""
    if not path.exists():
        return "not yet"
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for record in report["trains"]:
        found = record["None"]
        if (record["layer"], record["rank"], record["rows"]) == (name, rank, ROWS) and "refused" not in found:
            ratios = (record["dense"][what]["device_us"] / found[what]["device_us"] for what in ("forward", "training"))
            return "{:.2f} ({:.2f})".format(*ratios)
    return "not yet"


def main() -> None:
    """Print the rows of README's table, and the figures below it."""
    on = machine.shipped("cuda")
    for columns, features, ranks in ((4096, 4096, (4, 8, 12, 16)), (768, 3072, (8,)), (1024, 4096, (8,))):
        for rank in ranks:
            network, _ = TT(rank).resolve(linear_axes(features, columns))
            dense = decision.dense_seconds(features, columns, ROWS, on, dtype=DTYPE)
            both = decision.dense_seconds(features, columns, ROWS, on, x=True, weight=True, dtype=DTYPE)
            forward = dense / decision.predicted(network, decision.planned_task(ROWS, on, DTYPE), on)
            training = both / decision.training_seconds(network, ROWS, on, DTYPE)
            found = measured(f"{columns}->{features}", rank)
            print(f"| {columns} -> {features}, `TT({rank})` | {forward:.2f} | {training:.2f} | {found} |")
    for format in (LowRank(0.1), TT(0.1), CP(0.1)):
        network, _ = format.resolve(linear_axes(4096, 4096))
        ratios = []
        for rows in (1, 4, 16):
            dense = decision.dense_seconds(4096, 4096, rows, on, dtype=DTYPE)
            ratios.append(dense / decision.predicted(network, decision.planned_task(rows, on, DTYPE), on))
        print(f"4096 -> 4096, {format}, 1, 4, 16 rows: " + ", ".join(f"{ratio:.2f}" for ratio in ratios))


if __name__ == "__main__":
    main()
