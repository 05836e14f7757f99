"""What is predicted for a GPU: dense's time over that of a tensor train, by the shipped constants. No GPU is needed.

python benchmarks/predicted.py
"""

from __future__ import annotations

from common import ROOT as _ROOT  # noqa: F401  (finds the package)

from tensorlayers import TT, decision, machine
from tensorlayers.network import linear_axes

ROWS, DTYPE = 4096, "bfloat16"


def main() -> None:
    """Print the rows of README's table."""
    on = machine.shipped("cuda")
    for columns, features, ranks in ((4096, 4096, (4, 8, 12, 16)), (768, 3072, (8,)), (1024, 4096, (8,))):
        for rank in ranks:
            network, _ = TT(rank).resolve(linear_axes(features, columns))
            dense = decision.dense_seconds(features, columns, ROWS, on, dtype=DTYPE)
            both = decision.dense_seconds(features, columns, ROWS, on, x=True, weight=True, dtype=DTYPE)
            forward = decision.predicted(network, decision.planned_task(ROWS, on, DTYPE), on)
            training = decision.training_seconds(network, ROWS, on, DTYPE)
            print(
                f"| {columns} -> {features}, `TT({rank})` | {dense / forward:.2f} | {both / training:.2f} | not yet |"
            )


if __name__ == "__main__":
    main()
