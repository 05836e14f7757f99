"""The tt2_dcore kernel without a GPU: interpreted in a process of its own, and compiled ahead of time for sm_90."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from tensorlayers.kernels import tt2_dcores
from tests.kernels.aot import check, compiled
from tests.kernels.process import passes

MODES = (16, 32, 33, 64, 65, 128, 129, 2048)

# Which strides are 1: of the gradient of A, of G, and of each where a row is not contiguous.
LAYOUTS = {
    "A": {"dy_o2", "x_i2", "g_i2"},
    "G": {"dy_o1", "x_i1", "g_o2"},
    "every stride": set(),
}


def table() -> list[tuple[str, tt2_dcores.Tiles]]:
    """Every (dtype, tiles) that there is."""
    found = {}
    for dtype, o2, i2 in product(("bfloat16", "float16", "float32", "tf32"), MODES, MODES):
        half = dtype.endswith("16")
        found[dtype, tt2_dcores.choose_tiles((64, o2), (64, i2), half=half, tf32=dtype == "tf32")] = None
    return list(found)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "tiles"), table(), ids=lambda value: str(value).replace("Tiles", ""))
def test_every_row_of_the_tile_table_compiles_within_the_chip(
    dtype: str, tiles: tt2_dcores.Tiles, layout: str, tmp_path: Path
) -> None:
    kernel, precision = tt2_dcores.tt2_dcore_kernel, "tf32" if dtype == "tf32" else "ieee"
    upper = [name for name in kernel.arg_names if name.isupper()]
    constants = dict.fromkeys(LAYOUTS[layout], 1) | dict(zip(upper, (*tiles[:-1], precision), strict=True))
    pointers = {"dy": "", "x": "", "g": "", "out": "*fp32"}
    options = {"num_warps": tt2_dcores.WARPS, "num_stages": tiles.stages}
    check(compiled(kernel, dtype, pointers, constants, pointers, **options), dtype, tmp_path)


def test_interpreter_parity(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    passes("interpreted_tt2_dcores.py", pytestconfig, tmp_path)
