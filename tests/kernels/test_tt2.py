"""The tt2 kernel without a GPU: interpreted_tt2.py in a process of its own, and compiled ahead of time for sm_90."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import triton

from tensorlayers.kernels import tt2
from tests.kernels.aot import check, compiled
from tests.kernels.process import passes

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


def build(dtype: str, tiles: tt2.Tiles, aligned: bool, ones: set[str]) -> triton.compiler.CompiledKernel:
    """The kernel as a launch with these tiles compiles it, with arguments of 1."""
    names = tt2.tt2_kernel.arg_names
    upper = [name for name in names if name.isupper()]
    precision = "tf32" if dtype == "tf32" else "ieee"
    constants = dict.fromkeys(ones, 1) | dict(zip(upper, (*tiles[:-1], precision), strict=True))
    rows = {name for name in names if name[0] in "xy"} | {
        {"x_i2": "i2", "x_i1": "i1"}[k] for k in ones & {"x_i1", "x_i2"}
    }
    rows |= {{"y_o2": "o2", "y_o1": "o1"}[k] for k in ones & {"y_o1", "y_o2"}}
    multiples = {name for name in names if name[0] in "ag"} | {"x", "y"} | (rows if aligned else set())
    pointers = dict.fromkeys("xagy", "")
    options = {"num_warps": tt2.WARPS, "num_stages": tiles.stages}
    return compiled(tt2.tt2_kernel, dtype, pointers, constants, multiples, **options)


@pytest.mark.parametrize(("dtype", "tiles", "aligned"), ROWS, ids=lambda value: str(value).replace("Tiles", ""))
def test_every_row_of_the_tile_table_compiles_within_the_chip(
    dtype: str, tiles: tt2.Tiles, aligned: bool, tmp_path: Path
) -> None:
    check(build(dtype, tiles, aligned, FORWARD), dtype, tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_compiles_within_the_chip(layout: str, tmp_path: Path) -> None:
    tiles = choose(10**6, 64, 64, 64, "bfloat16", True)
    check(build("bfloat16", tiles, True, LAYOUTS[layout]), "bfloat16", tmp_path)


def test_small_batches_only_reduce_the_tokens() -> None:
    for batch, dtype, aligned, *modes in product(
        (1, 16, 300), ("bfloat16", "tf32"), (True, False), MODES, MODES, MODES
    ):
        most, fewer = (choose(n, *modes, dtype, aligned) for n in (10**6, batch))
        assert 1 <= fewer.tokens <= most.tokens
        assert fewer == most._replace(tokens=fewer.tokens)


def test_interpreter_parity(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    passes("interpreted_tt2.py", pytestconfig, tmp_path)
