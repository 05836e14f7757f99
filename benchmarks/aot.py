"""Compile the Triton kernels ahead of time, with every row of every launch table, and check what that takes; no GPU.

    python -m benchmarks.aot [--arch sm_90 ...] [--out benchmarks/aot.json]

The file keeps, for each version of Triton that it was run with, the registers and shared memory of each row, and the
hash of the sources that were compiled. The exit code is 1 if any row spills registers, takes a stack or more shared
memory than the chip has, or does not use its matrix units.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.aot_cases import Case, cases
from tensorlayers import launch_tables
from tensorlayers.launch_tables import Table

ROOT = Path(__file__).resolve().parents[1]
POINTERS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "tf32": "*fp32"}


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes: registers a thread, bytes of stack, what spills there, shared memory.

    `scalars`: scalar registers that an AMD kernel keeps in lanes of vector registers, which takes no memory.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    wgmma: bool = False
    scalars: int = 0


def compiled(case: Case, arch: str) -> Usage:
    """Compile a case for an architecture."""
    names = case.kernel.arg_names
    signature = {
        k: "constexpr" if k in case.constants
        else (case.pointers[k] or POINTERS[case.dtype]) if k in case.pointers else "i32"
        for k in names
    }  # fmt: skip
    attributes = {(names.index(k),): [["tt.divisibility", 16]] for k in set(case.multiples) - set(case.constants)}
    is_amd = arch.startswith("gfx")
    kernel = triton.compile(
        ASTSource(case.kernel, signature, dict(case.constants), attributes),
        target=GPUTarget("hip", arch, 64) if is_amd else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32),
        options=dict(case.options),
    )
    return _amd_usage(kernel) if is_amd else _nvidia_usage(kernel)


def _amd_usage(kernel: Any) -> Usage:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", kernel.asm["amdgcn"])
        assert found, name
        return int(found[1])

    counts = map(number, ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count"))
    return Usage(*counts, kernel.metadata.shared, scalars=number("sgpr_spill_count"))


def _nvidia_usage(kernel: Any) -> Usage:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(kernel.asm["cubin"])
        binary.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", binary.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    wgmma = "wgmma.mma_async" in kernel.asm["ptx"]
    return Usage(counts["REG"], counts["STACK"], counts["LOCAL"], kernel.metadata.shared, wgmma)


def faults(case: Case, usage: Usage, table: Table) -> list[str]:
    """What is wrong with a compiled case."""
    found = []
    if usage.spills or usage.stack:
        found.append(f"{usage.spills} registers spilled, {usage.stack} bytes of stack")
    if usage.shared > table.shared_memory:
        found.append(f"{usage.shared} bytes of shared memory; the chip has {table.shared_memory}")
    if table.arch == "sm_90" and case.large != usage.wgmma:
        found.append("no wgmma" if case.large else "wgmma in full precision")
    return found


def sources() -> str:
    """The hash of all that is compiled: the kernels and the launch tables."""
    digest = hashlib.sha256()
    files = [*(ROOT / "kernels").glob("*.py"), *launch_tables.SHIPPED.glob("*.json")]
    for path in sorted(files, key=lambda path: path.name):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _usage(number: int, arch: str) -> Usage:
    """Of a case by its number: kernels do not travel between processes."""
    return compiled(cases(arch)[number], arch)


def measured(arch: str) -> tuple[dict[str, dict[str, int]], list[str]]:
    """For each row and dtype the most that any layout takes; and what is wrong."""
    table, rows, wrong = launch_tables.shipped(arch), {}, []
    every = cases(arch)
    with ProcessPoolExecutor() as pool:
        usages = list(pool.map(_usage, range(len(every)), itertools.repeat(arch)))
    for case, usage in zip(every, usages, strict=True):
        wrong += [f"{arch} {case.name} {case.dtype} {case.layout}: {fault}" for fault in faults(case, usage, table)]
        names = ("registers", "shared", "scalars") if arch.startswith("gfx") else ("registers", "shared")
        row = rows.setdefault(f"{case.name} {case.dtype}", dict.fromkeys(names, 0))
        for name in row:
            row[name] = max(row[name], getattr(usage, name))
    return rows, wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = launch_tables.architectures()
    parser.add_argument("--arch", nargs="+", choices=known, default=known)
    parser.add_argument("--out", type=Path, help="the JSON file, in which other versions of Triton are kept")
    given = parser.parse_args(arguments)
    wrong: list[str] = []
    found = {}
    for arch in given.arch:
        found[arch], more = measured(arch)
        print(f"triton {triton.__version__}, {arch}: {len(found[arch])} rows, {len(more)} faults", flush=True)
        wrong += more
    print(*wrong, sep="\n")
    if given.out:
        before = json.loads(given.out.read_text()) if given.out.exists() else {}
        versions = before.get("triton", {}) if before.get("sources") == sources() else {}
        versions[triton.__version__] = {"faults": wrong, **found}
        text = json.dumps({"sources": sources(), "triton": dict(sorted(versions.items()))}, indent=1)
        rows = re.compile(r"\{\s+(\"registers\"[^}]*?)\s+\}")  # one a line
        given.out.write_text(rows.sub(lambda row: "{" + re.sub(r"\s+", " ", row[1]) + "}", text) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
