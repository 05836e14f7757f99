"""Time factorized convolutions against nn.Conv2d, interleaved in one process; prints a table, writes JSON.

    python benchmarks/conv.py --out benchmarks/conv.json

Each layer is checked against its own dense weight before it is timed. Times are medians; ratios are to nn.Conv2d in
the same run.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from common import forward, training, write
from torch import nn

from tensorlayers import BTT, CP, TT, FactorizedConv2d, Format, LowRank, Tucker
from tensorlayers.evaluate import latency
from tensorlayers.testing import assert_close

CASES = [(64, 56, 4, 1), (256, 28, 4, 1), (512, 7, 16, 1), (256, 14, 16, 32)]
FORMATS: list[Format] = [
    LowRank(0.25),
    LowRank(0.25, split="spatial"),
    Tucker(0.25),
    CP(0.25),
    TT(0.25),
    BTT(0.25),
    Tucker(0.05),
    CP(0.05),
]


def measure(channels: int, size: int, batch: int, groups: int, repeats: int) -> list[dict[str, Any]]:
    """The rows of the table for a 3x3 convolution that keeps its channels."""
    torch.manual_seed(0)
    x = torch.randn(batch, channels, size, size)
    dense = nn.Conv2d(channels, channels, 3, padding=1, groups=groups)
    candidates: dict[str, nn.Module] = {"nn.Conv2d": dense}
    for format in FORMATS if groups == 1 else FORMATS[:5]:  # the others have no rank that small in 8 channels
        layer = FactorizedConv2d(channels, channels, 3, padding=1, groups=groups, format=format)
        assert_close(layer(x[:1]), layer.to_module()(x[:1]), torch.float32, str(format))
        candidates[str(format)] = layer
    ahead = latency({name: forward(layer, x) for name, layer in candidates.items()}, repeats)
    both = latency({name: training(layer, x) for name, layer in candidates.items()}, repeats)
    rows = []
    for name, layer in candidates.items():
        macs = None
        if isinstance(layer, FactorizedConv2d):
            settings, positions = layer.settings_of(layer), batch * size * size
            macs = layer.factorized_cost(layer.network, settings, positions).macs
            macs /= layer.dense_cost(settings, positions).macs
        rows.append(
            {
                "shape": f"{channels}x{channels // groups}x3x3, {batch} x {size}x{size}",
                "layer": name,
                "macs_of_dense": macs,
                "forward_of_dense": ahead[name] / ahead["nn.Conv2d"],
                "training_of_dense": both[name] / both["nn.Conv2d"],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    table = []
    for case in CASES:
        table += (rows := measure(*case, arguments.repeats))
        print(f"\n{rows[0]['shape']:36}{'MACs':>8}{'forward':>10}{'training':>10}")
        for row in rows:
            macs = "" if row["macs_of_dense"] is None else f"{row['macs_of_dense']:.2f}"
            print(f"{row['layer']:36}{macs:>8}{row['forward_of_dense']:9.2f}x{row['training_of_dense']:9.2f}x")
    if arguments.out:
        write(arguments.out, rows=table)


if __name__ == "__main__":
    main()
