"""What decomposing a large convolution takes: seconds, and memory above that of the layer itself.

    python benchmarks/decompose.py --out benchmarks/decompose.json

The kernel of Conv3d(1024, 512, 3) has 14 million entries; a peer's CP of it asked for terabytes. Weights are random, so
the errors are those of noise. Each runs in a process of its own, whose peak memory is read.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import write
from torch import nn

from tensorlayers import CP, TT, FactorizedConv3d, Format, LowRank, Tucker

FORMATS: dict[str, Format] = {"CP(64)": CP(64), "Tucker(64)": Tucker(64), "TT(64)": TT(64), "LowRank(64)": LowRank(64)}


def measure(name: str) -> dict[str, float | str]:
    """One row; to be called once in a process."""
    torch.manual_seed(0)
    dense = nn.Conv3d(1024, 512, 3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    layer = FactorizedConv3d.from_dense(dense, FORMATS[name])
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert layer.error is not None
    return {"format": name, "seconds": seconds, "megabytes": (after - before) / 1024, "error": layer.error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--only", choices=FORMATS, help="measure one format in this process, and print JSON")
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(arguments.only)))
        return
    rows = []
    for name in FORMATS:
        result = subprocess.run([sys.executable, __file__, "--only", name], capture_output=True, text=True, check=True)
        rows.append(json.loads(result.stdout.splitlines()[-1]))
        row = rows[-1]
        print(f"{name:12} {row['seconds']:6.1f} s  {row['megabytes']:6.0f} MB  error {row['error']:.3f}", flush=True)
    if arguments.out:
        write(arguments.out, rows=rows)


if __name__ == "__main__":
    main()
