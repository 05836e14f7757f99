"""Time factorized linear layers against nn.Linear, interleaved in one process; prints a table, writes JSON.

    python benchmarks/linear.py --out benchmarks/linear.json

Each layer is checked against its own dense weight before it is timed. Times are medians; ratios are to nn.Linear in
the same run, so that they hold on a noisy machine. tensorly-torch, where it is installed, has its row too.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import forward, training, write
from torch import nn

from tensorlayers import BTT, CP, TT, FactorizedLinear, LowRank, Tucker
from tensorlayers.evaluate import latency
from tensorlayers.testing import assert_close

CASES = [(768, 3072, 1024), (768, 3072, 1), (1024, 4096, 1024), (16, 10, 4)]


def layers(in_features: int, out_features: int) -> Iterator[tuple[str, nn.Module]]:
    """The layers that are timed: each format at about 10 % and 40 % of the dense FLOPs, and tensorly-torch's."""
    if in_features < 64:
        yield from ((str(f), make(in_features, out_features, f)) for f in (LowRank(2), TT(2), CP(2), BTT(1), Tucker(2)))
        return
    for format in (LowRank(0.1), LowRank(0.4), BTT(0.1), BTT(0.4), Tucker(0.05), Tucker(0.25), CP(0.005), TT(2), TT(8)):
        yield str(format), make(in_features, out_features, format)
    yield from peers(in_features, out_features)


def make(in_features: int, out_features: int, format: Any) -> FactorizedLinear:
    """A layer, checked against its dense weight."""
    layer = FactorizedLinear(in_features, out_features, format=format)
    x = torch.randn(8, in_features)
    assert_close(layer(x), nn.functional.linear(x, layer.to_dense(), layer.bias), torch.float32, str(format))
    return layer


def peers(in_features: int, out_features: int) -> Iterator[tuple[str, nn.Module]]:
    """tensorly-torch's layer with the cores of our TT of rank 8."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import tltorch
    except ImportError:
        return
    ours = TT(8).network(out_features, in_features)
    modes = (ours.mode_sizes("out"), ours.mode_sizes("in"))
    peer = tltorch.FactorizedLinear(
        modes[1], modes[0], bias=True, factorization="blocktt", rank=8, implementation="factorized"
    )
    peer.weight.normal_(0, 0.02)
    yield "tensorly-torch TT(rank=8)", peer


def dense_flops(in_features: int, out_features: int, rows: int, layer: nn.Module) -> float | None:
    """Factorized FLOPs / dense FLOPs of one of our layers."""
    if not isinstance(layer, FactorizedLinear):
        return None
    settings = layer.settings_of(layer)
    return layer.factorized_cost(layer.network, settings, rows).flops / layer.dense_cost(settings, rows).flops


def measure(in_features: int, out_features: int, rows: int, repeats: int) -> list[dict[str, Any]]:
    """The rows of the table for one shape."""
    torch.manual_seed(0)
    x = torch.randn(rows, in_features)
    candidates: dict[str, nn.Module] = {"nn.Linear": nn.Linear(in_features, out_features)}
    candidates.update(layers(in_features, out_features))
    ahead = latency({name: forward(layer, x) for name, layer in candidates.items()}, repeats)
    both = latency({name: training(layer, x) for name, layer in candidates.items()}, repeats)
    return [
        {
            "shape": f"{in_features}->{out_features}",
            "rows": rows,
            "layer": name,
            "parameters_of_dense": sum(p.numel() for p in layer.parameters())
            / sum(p.numel() for p in candidates["nn.Linear"].parameters()),
            "flops_of_dense": dense_flops(in_features, out_features, rows, layer),
            "forward_ms": ahead[name],
            "forward_of_dense": ahead[name] / ahead["nn.Linear"],
            "training_ms": both[name],
            "training_of_dense": both[name] / both["nn.Linear"],
        }
        for name, layer in candidates.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    table = []
    for case in CASES:
        table += (rows := measure(*case, arguments.repeats))
        print(
            f"\n{rows[0]['shape']}, {rows[0]['rows']} rows{'parameters':>20}{'FLOPs':>8}{'forward':>10}{'training':>10}"
        )
        for row in rows:
            flops = "" if row["flops_of_dense"] is None else f"{row['flops_of_dense']:.2f}"
            print(
                f"{row['layer']:28}{row['parameters_of_dense']:10.3f}{flops:>8}"
                f"{row['forward_of_dense']:9.2f}x{row['training_of_dense']:9.2f}x"
            )
    if arguments.out:
        write(arguments.out, rows=table)


if __name__ == "__main__":
    main()
