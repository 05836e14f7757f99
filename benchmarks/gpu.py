"""Measure the Triton kernels on a GPU: parity, reruns, times beside dense, unfused and others' layers; one JSON file.

    python benchmarks/gpu.py --out FILE.json     measure
    python benchmarks/gpu.py --adopt FILE.json   write the constants that were found to the tables of the package
    python benchmarks/gpu.py --dry --out FILE    small sizes in Triton's interpreter: tries this script, not the kernels

Needs torch, triton and a CUDA device; no network. Every way is compared with float64 before it is timed, and is not
timed where that fails; the exit code is then 1, and 2 where a file cannot be read, adopted or written. Every figure's
key ends in its unit. `device_us` is the median over replays of a CUDA graph, without launch gaps; `eager_us` the median
over ordinary calls; both with a cold L2 cache. Which of the project's targets hold is printed at the end, and in the
file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import gpu_cases as cases
import torch
import triton
from gpu_cases import ROOT, Record
from gpu_sections import SECTIONS
from gpu_timing import prepare
from gpu_verdict import adopt, constants, failures, show, targets


def output_of(*command: str) -> str:
    """What a command prints, or "unknown"."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() or "unknown"
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def about() -> Record:
    """What was measured, with what, when."""
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "triton": triton.__version__}
    if not cases.is_dry:
        versions |= {"cuda": torch.version.cuda, "gpu": torch.cuda.get_device_name()}
        versions["driver"] = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    commit = output_of("git", "rev-parse", "HEAD")
    return {"dry": cases.is_dry, "commit": commit, "date": date, "versions": versions}


def adopted(file: Path) -> list[Path]:
    """Adopt a file; a ValueError or an OSError says why not."""
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from None
    return adopt(report)


def check_writable(file: Path) -> None:
    """An OSError where a file cannot be written; one that is there is left as it is."""
    is_new = not file.exists()
    file.open("a").close()
    if is_new:
        file.unlink()


def main() -> int:
    """Measure, write the JSON and print the tables; or adopt what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--adopt", type=Path, help="the JSON file whose constants the package is to use")
    parser.add_argument("--seconds", type=int, default=420, help="no section is begun after these (default: 420)")
    parser.add_argument("--dry", action="store_true", help="in the interpreter, of small sizes")
    given = parser.parse_args()
    if given.adopt and (given.out or given.dry):
        parser.error("--adopt measures nothing: it goes without --out and --dry")
    if given.adopt:
        try:
            print(*adopted(given.adopt), sep="\n")
        except (ValueError, OSError) as error:
            parser.error(f"--adopt {given.adopt}: {error}")
        return 0
    if given.out is None:
        parser.error("--out or --adopt")
    try:
        check_writable(given.out)  # before the work, since it may fail
    except OSError as error:
        parser.error(f"--out {given.out}: {error}")
    if not cases.is_dry and not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA device, and torch finds none.", file=sys.stderr)
        return 1
    prepare()
    report = about() | {"failed": {}} | {name: [] for name in SECTIONS}
    begun = time.perf_counter()
    for name, measure in SECTIONS.items():
        start = time.perf_counter()
        if start - begun > given.seconds:
            report["failed"][name] = f"not begun: {given.seconds} s had passed"
            continue
        try:
            report[name] = measure()
        except Exception as error:
            report["failed"][name] = f"{type(error).__name__}: {error}"
        report[f"{name}_section_s"] = round(time.perf_counter() - start, 1)
        given.out.write_text(json.dumps(report, indent=1) + "\n")  # kept if a later section takes the process down
        print(f"{name}: {report[f'{name}_section_s']} s", flush=True)
    is_whole = not {"roofline", "trains"} & report["failed"].keys()
    report["targets"] = targets(report) if is_whole else []
    report |= {"constants": constants(report)} if is_whole else {}
    given.out.write_text(json.dumps(report, indent=1) + "\n")
    show(report)
    wrong = failures(report)
    print(*(f"FAILED {text}" for text in wrong), f"written to {given.out}", sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
