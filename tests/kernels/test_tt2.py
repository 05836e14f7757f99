"""The tt2 kernel without a GPU: interpreted_tt2.py in a process of its own, and compiled ahead of time for sm_90."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tensorlayers.kernels import tt2

SHARED_MEMORY = 227 * 1024  # bytes a block may have on sm_90
MODES = (16, 32, 33, 64, 65, 128, 129, 2048)
SIZES = {"batch", "o1", "o2", "i1", "i2", "rank"}

# Which strides are 1 (A and G are packed by the launcher).
FORWARD = {"x_i2", "a_i1", "g_i2", "y_o2"}
LAYOUTS = {
    "forward": FORWARD,
    "input gradient": {"x_i2", "a_i1", "g_o2", "y_o2"},
    "i2 first": {"x_i1", "a_i1", "g_i2", "y_o1"},
    "input gradient, i2 first": {"x_i1", "a_o1", "g_i2", "y_o1"},
    "every size is 1": FORWARD | SIZES,
}


def choose(batch: int, o2: int, i1: int, i2: int, dtype: str, aligned: bool) -> tt2.Tiles:
    return tt2.choose_tiles(batch, (64, o2), (i1, i2), half=dtype == "bfloat16", tf32=dtype == "tf32", aligned=aligned)


def table() -> list[tuple[str, tt2.Tiles, bool]]:
    """Every (dtype, tiles) that a large batch can get, and whether x and y may be aligned there.

    Where both may be, the harder case: not aligned.
    """
    rows = {}
    for dtype, aligned, *modes in product(("bfloat16", "float32", "tf32"), (True, False), MODES, MODES, MODES):
        rows[dtype, choose(10**6, *modes, dtype, aligned)] = aligned
    return [(dtype, tiles, aligned) for (dtype, tiles), aligned in rows.items()]


ROWS = table()


def compiled(dtype: str, tiles: tt2.Tiles, aligned: bool, ones: set[str]) -> triton.compiler.CompiledKernel:
    """The kernel as a launch with these tiles compiles it: arguments of 1 are constants, multiples of 16 are marked."""
    kernel = tt2.tt2_kernel
    precision = "tf32" if dtype == "tf32" else "ieee"
    names = kernel.arg_names
    upper = [name for name in names if name.isupper()]
    constants = dict.fromkeys(ones, 1) | dict(zip(upper, (*tiles[:-1], precision), strict=True))
    pointer = "*bf16" if dtype == "bfloat16" else "*fp32"
    signature = {k: "constexpr" if k in constants else pointer if k in ("x", "a", "g", "y") else "i32" for k in names}
    rows = {name for name in names if name[0] in "xy"} | {
        {"x_i2": "i2", "x_i1": "i1"}[k] for k in ones & {"x_i1", "x_i2"}
    }
    rows |= {{"y_o2": "o2", "y_o1": "o1"}[k] for k in ones & {"y_o1", "y_o2"}}
    multiples = {name for name in names if name[0] in "ag"} | {"x", "y"} | (rows if aligned else set())
    attributes = {(names.index(k),): [["tt.divisibility", 16]] for k in multiples - set(constants)}
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": tt2.WARPS, "num_stages": tiles.stages, "enable_fp_fusion": True},
    )


def check(kernel: triton.compiler.CompiledKernel, dtype: str, tmp_path: Path) -> None:
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    assert set(counts) == {"REG", "STACK", "LOCAL"}
    assert counts["STACK"] == counts["LOCAL"] == "0", f"registers are spilled: {counts}"
    assert kernel.metadata.shared <= SHARED_MEMORY
    assert ("wgmma.mma_async" in kernel.asm["ptx"]) == (dtype != "float32")


@pytest.mark.parametrize(("dtype", "tiles", "aligned"), ROWS, ids=lambda value: str(value).replace("Tiles", ""))
def test_every_row_of_the_tile_table_compiles_within_the_chip(
    dtype: str, tiles: tt2.Tiles, aligned: bool, tmp_path: Path
) -> None:
    check(compiled(dtype, tiles, aligned, FORWARD), dtype, tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_compiles_within_the_chip(layout: str, tmp_path: Path) -> None:
    tiles = choose(10**6, 64, 64, 64, "bfloat16", True)
    check(compiled("bfloat16", tiles, True, LAYOUTS[layout]), "bfloat16", tmp_path)


def test_small_batches_only_reduce_the_tokens() -> None:
    for batch, dtype, aligned, *modes in product(
        (1, 16, 300), ("bfloat16", "tf32"), (True, False), MODES, MODES, MODES
    ):
        most, fewer = (choose(n, *modes, dtype, aligned) for n in (10**6, batch))
        assert 1 <= fewer.tokens <= most.tokens
        assert fewer == most._replace(tokens=fewer.tokens)


def test_interpreter_parity(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    paths = " ".join(str(path) for path in pytestconfig.getini("pythonpath"))
    file = Path(__file__).with_name("interpreted_tt2.py")
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", f"pythonpath={paths}", str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=tmp_path,  # so that the checkout is on the path of the child only where it is on this process's
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stdout
    assert re.search(r"^\d+ passed(, \d+ warnings?)? in ", child.stdout.splitlines()[-1]), child.stdout
