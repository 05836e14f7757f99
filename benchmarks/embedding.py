"""Time and memory of factorized embeddings against nn.Embedding, in one process; prints a table, writes JSON.

    python benchmarks/embedding.py --out benchmarks/embedding.json

A table of 1,000,000 x 128 at 1/100 of the parameters, 4096 ids. Each layer is checked against its own dense rows before
it is timed. Times are the least of many, the layers in turn, each on ids that it has not just seen; ratios are to
nn.Embedding in the same run. Peak memory is what torch allocates: the parameters, and the most that is alive at once
beside them in one step, gradients included.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import write
from memory import peak_bytes
from torch import Tensor, nn

from tensorlayers import CP, TT, FactorizedEmbedding, LowRank, Tucker, gather, lookup_plan
from tensorlayers.testing import assert_close

ROWS, COLUMNS, IDS = 1_000_000, 128, 4096
FORMATS = (LowRank(0.01), TT(0.01), TT(0.01, order=3), CP(0.01), Tucker(0.01))
SLOW = 2e5
"""FLOPs of a row from which a layer is timed less often."""


def make(format: Any) -> FactorizedEmbedding:
    """A layer, checked against rows of its dense weight."""
    layer = FactorizedEmbedding(ROWS, COLUMNS, format=format)
    ids = torch.randint(0, ROWS, (64,))
    rows = gather.rows(ids, layer.own_network, [core.double() for core in layer.own_cores()], COLUMNS)
    assert_close(layer(ids), rows, torch.float32, str(format))
    return layer


def batches(zipf: bool, count: int = 16) -> list[Tensor]:
    """Batches of ids: uniform over the table, or by Zipf's law, of which few are distinct."""
    if not zipf:
        return [torch.randint(0, ROWS, (IDS,)) for _ in range(count)]
    return [(ROWS ** torch.rand(IDS, dtype=torch.float64)).long().clamp(max=ROWS) - 1 for _ in range(count)]


def forward(layer: nn.Module, ids: Tensor) -> object:
    with torch.inference_mode():
        return layer(ids)


def training(layer: nn.Module, ids: Tensor) -> object:
    layer.zero_grad()
    return layer(ids).sum().backward()


def least(layers: dict[str, nn.Module], step: Callable[[nn.Module, Tensor], object], zipf: bool, repeats: int) -> Any:
    """The least milliseconds of each layer, taken in turn."""
    data = batches(zipf)
    best: dict[str, float] = {}
    for repeat in range(repeats):
        for name, layer in layers.items():
            slow = isinstance(layer, FactorizedEmbedding) and lookup_plan.row_flops(layer.own_network) > SLOW
            if slow and repeat >= 3:
                continue
            start = time.perf_counter()
            step(layer, data[repeat % len(data)])
            best[name] = min(best.get(name, float("inf")), 1000 * (time.perf_counter() - start))
    return best


def peak(layer: nn.Module, step: Callable[[nn.Module, Tensor], object], ids: Tensor) -> int:
    """Bytes of the parameters, and the most that one step allocates beside them."""
    layer.zero_grad()
    most = peak_bytes(lambda: step(layer, ids))
    layer.zero_grad()
    return most + sum(parameter.nbytes for parameter in layer.parameters())


def measure(repeats: int) -> list[dict[str, Any]]:
    """The rows of the table."""
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {"nn.Embedding": nn.Embedding(ROWS, COLUMNS)}
    layers.update((str(format), make(format)) for format in FORMATS)
    ids = batches(False, 1)[0]
    peaks = {name: (peak(m, forward, ids), peak(m, training, ids)) for name, m in layers.items()}
    times = {
        "forward": least(layers, forward, False, repeats),
        "zipf": least(layers, forward, True, repeats),
        "training": least(layers, training, False, max(repeats // 5, 1)),
    }
    rows = []
    for name, layer in layers.items():
        row: dict[str, Any] = {"layer": name, "parameters": sum(p.numel() for p in layer.parameters())}
        row["parameters_of_dense"] = row["parameters"] / (ROWS * COLUMNS)
        for k, kind in enumerate(("forward", "training")):
            row[f"{kind}_peak_bytes"] = peaks[name][k]
            row[f"{kind}_peak_times_less"] = peaks["nn.Embedding"][k] / peaks[name][k]
        for kind, values in times.items():
            row[f"{kind}_ms"] = values[name]
            row[f"{kind}_of_dense"] = values[name] / values["nn.Embedding"]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--repeats", type=int, default=50)
    arguments = parser.parse_args()
    table = measure(arguments.repeats)
    distinct = [len(set(ids.tolist())) for ids in batches(True)]
    print(f"{ROWS:,} x {COLUMNS}, {IDS} ids; of a Zipf batch about {sum(distinct) // len(distinct)} are distinct")
    print(f"{'':24}{'':>10}{'peak memory, x less':>24}{'time of dense':>30}")
    heads = ("parameters", "forward", "training", "forward", "Zipf", "training")
    print(f"{'':24}{heads[0]:>10}{heads[1]:>12}{heads[2]:>12}{heads[3]:>10}{heads[4]:>10}{heads[5]:>10}")
    for row in table:
        print(
            f"{row['layer']:24}{row['parameters_of_dense']:10.4f}"
            f"{row['forward_peak_times_less']:11.1f}x{row['training_peak_times_less']:11.1f}x"
            f"{row['forward_of_dense']:9.2f}x{row['zipf_of_dense']:9.2f}x{row['training_of_dense']:9.2f}x"
        )
    if arguments.out:
        write(arguments.out, rows=table)


if __name__ == "__main__":
    main()
