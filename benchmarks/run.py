"""Time factorized layers and models against dense ones and against others' libraries, and measure their memory.

    python benchmarks/run.py                           every part; tables
    python benchmarks/run.py layers convs --quick      some parts, one case of each
    python benchmarks/run.py --out benchmarks          writes a JSON a part, and the plots

The parts:
    layers     linear layers of every format, at a tenth and two fifths of the FLOPs, and where they have more
    overhead   a layer of 16 -> 10 features: what is left when there is no work
    peers      tensorly-torch with the same cores, with and without opt_einsum; torch.compile
    convs      3x3 convolutions
    models     an encoder block of BERT-base's size, and a ResNet-18
    scaling    time and memory against the batch and against the rank; what the plots show
    plots      draws them again from DIR/scaling.json
Embeddings have a command of their own: python benchmarks/embedding.py.

Each candidate is compared with its own dense weight first, output and every gradient; what is wrong is not timed, and
the exit code is 1. Candidates are timed in turn in one process, in another order each round; a figure is the median
over rounds of the ratio to dense in the same round. Memory is measured before, in a process of its own that may take
8 GB: what needs more is "out of memory". The plots need matplotlib, the peers tensorly-torch, the block transformers.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

PARTS = {
    "layers": ("layers", "run"),
    "overhead": ("layers", "tiny"),
    "peers": ("peers", "run"),
    "convs": ("convs", "run"),
    "models": ("models", "run"),
    "scaling": ("scaling", "run"),
}
PLOTTED = "scaling"
"""The part that the plots are drawn from."""


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, or other words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="default: all")
    parser.add_argument("--quick", action="store_true", help="one case of each part, and little time for it")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="to time each case and direction for; default 10, with --quick 2"
    )
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of the CPU, for torch and BLAS; default 2")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the JSONs and plots go")
    arguments = parser.parse_args(words)
    unknown = sorted({*arguments.parts} - {*PARTS, "plots"})
    if unknown:
        parser.error(f"a part is one of {', '.join(PARTS)}, plots; got {', '.join(unknown)}")
    if arguments.seconds is not None and not 0 < arguments.seconds < math.inf:
        parser.error(f"--seconds is a number above 0; got {arguments.seconds:g}")
    if arguments.threads < 1:
        parser.error(f"--threads is 1 or more; got {arguments.threads}")
    if "plots" in arguments.parts:
        if not arguments.out:
            parser.error(f"plots are drawn from DIR/{PLOTTED}.json: --out DIR is needed")
        if PLOTTED not in arguments.parts and not (arguments.out / f"{PLOTTED}.json").is_file():
            parser.error(f"plots are drawn from what the part {PLOTTED} writes: no {PLOTTED}.json in {arguments.out}")
    return arguments


def main() -> int:
    arguments = parse()
    # OpenMP reads this once, when torch is imported: nothing above imports it.
    os.environ["KINETO_LOG_LEVEL"] = "99"  # the memory profiler's
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(arguments.threads)
    import torch

    torch.set_num_threads(arguments.threads)
    from common import write
    from report import LEGEND, summary, table

    warnings.filterwarnings("ignore", module="tltorch|tensorly")
    seconds = arguments.seconds or (2 if arguments.quick else 10)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
    failed = False
    chosen = arguments.parts or list(PARTS)
    timed = [part for part in chosen if part != "plots"]
    if timed:
        print(LEGEND)
    for part in timed:
        module, function = PARTS[part]
        rows = []
        for case in getattr(importlib.import_module(module), function)(seconds, arguments.quick):
            print(table(case), flush=True)
            rows += case
        print(summary(rows), flush=True)
        failed |= any(row.failed for row in rows)
        if arguments.out:
            write(arguments.out / f"{part}.json", quick=arguments.quick, rows=[row.as_json() for row in rows])
    if arguments.out and {PLOTTED, "plots"} & {*chosen}:
        importlib.import_module("plots").draw(arguments.out / f"{PLOTTED}.json", arguments.out / "plots")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
