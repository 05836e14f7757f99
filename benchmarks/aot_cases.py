"""What is compiled ahead of time: each kernel as the launches of a table compile it, in layouts that differ."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tensorlayers import launch_tables, rebuild
from tensorlayers.kernels import chain, khatri_rao, lookup, lookup_gradients
from tensorlayers.kernels import rebuild as rebuild_module
from tensorlayers.kernels.operands import options
from tensorlayers.launch_tables import Table

HALF = ("bfloat16", "float16")


@dataclass(frozen=True)
class Case:
    """A kernel as a launch compiles it: arguments of 1 are constants, multiples of 16 are marked.

    Parameters
    ----------
    name : str
        The kernel, and the row of the table.
    layout : str
        What else differs: which strides are 1, what follows the product.
    kernel
    dtype : str
        A key of `POINTERS`: the elements, and how products of float32 are rounded.
    pointers : mapping
        The tensors among the arguments, with their element type where it is not the dtype's.
    constants : mapping
        The values of the arguments that are constants.
    multiples : collection of str
        Arguments that are multiples of 16.
    options : mapping
        num_warps and the like.
    large : bool
        Whether a tile of a product has 64 rows or more, so that sm_90 multiplies it by wgmma.
    """

    name: str
    layout: str
    kernel: Any
    dtype: str
    pointers: Mapping[str, str]
    constants: Mapping[str, Any]
    multiples: Collection[str]
    options: Mapping[str, int | bool]
    large: bool


def precision(dtype: str) -> str:
    """How a kernel is told to multiply."""
    return "tf32" if dtype == "tf32" else "ieee"


def dtypes(table_dtype: str) -> tuple[str, ...]:
    """The dtypes that a row of a table is for."""
    return HALF if table_dtype == "half" else (table_dtype,)


def chain_cases(table: Table) -> Iterator[Case]:
    """Every row: without a bias, and p in one tile; with an activation; with the smallest tiles; with a bias, and where
    it is for that with no stride of 1."""
    names = chain.chain_kernel.arg_names
    tensors = {"left", "middle", "right", "out", "bias"}
    ones = dict.fromkeys(("left_p", "middle_q", "right_q", "out_n"), 1)
    counts = {"heads1", "heads2", "steps", "share"}
    for number, row in enumerate(table.rows):
        tiles = row.tiles
        for layout in ("narrow, sums", "bare", "activated", "plain" if row.aligned else "free strides"):
            is_activated, is_free = layout == "activated", layout == "free strides"
            if layout == "narrow, sums":
                tiles = tiles._replace(n=launch_tables.LEAST, p=launch_tables.LEAST, q=launch_tables.LEAST)
            else:
                tiles = row.tiles
            heads = max(1, tiles.heads // 2) if is_activated else tiles.heads
            sizes = {"HEADS": heads, "M": tiles.m, "N": tiles.n, "P": tiles.p, "Q": tiles.q}
            constants = sizes | {
                "HELD": tiles.held,
                "ONE_P": tiles.held or layout == "bare",
                "BIASED": layout in ("plain", "activated"),
                "ACTIVATION": "gelu" if is_activated else "none",
            }
            fixed = {} if is_free else ones
            multiples = tensors if is_free else set(names) - set(constants) - set(fixed) - counts
            for dtype in dtypes(row.dtype):
                yield Case(
                    f"chain {number}", layout, chain.chain_kernel, dtype,
                    dict.fromkeys(tensors, "") | ({"out": "*fp32"} if layout == "narrow, sums" else {}),
                    constants | fixed | {"PRECISION": precision(dtype)}, multiples,
                    options(tiles.warps, tiles.stages), tiles.m >= 64 and row.dtype != "float32",
                )  # fmt: skip


def rebuild_cases(table: Table) -> Iterator[Case]:
    """Every layout with the largest tiles, where k takes several, and with smaller ones of those that hold all."""
    kernel = rebuild_module.rebuild_kernel
    names, tensors = kernel.arg_names, ("left", "right", "out")
    # Which strides are 1, and which arguments are no multiples of 16.
    aligned = {
        "train": ({"left_k", "right_n2", "out_n2"}, ()),
        "transposed cores": ({"left_m2", "right_k", "out_n2"}, ()),
        "blocks": ({"left_k", "right_k", "out_n2"}, ()),
    }
    ragged = {
        "rank": ({"left_k", "right_n2", "out_n2"}, ("k", "left")),
        "blocks": ({"left_k", "right_k", "out_n2"}, ("k", "m", "n", "left", "right", "out")),
        "free strides": (set[str](), ("k", "m", "n", "left", "right", "out")),
    }
    for row, layouts in (("rebuild", aligned), ("rebuild_ragged", ragged)):
        for table_dtype, largest in table.kernels[row].items():
            most = max(largest["m"], largest["n"])
            for layout, (ones, others) in layouts.items():
                multiples = {name for name in names if name in tensors or not name.startswith(others)} - {"heads2"}
                for side in (side for side in (16, 32, 64, 128) if side <= most):
                    k = 16 if side < most else 1000
                    tiles = rebuild.tiles_for(rebuild.Problem(1, side, side, k, table_dtype), largest)
                    sizes = {"M": tiles.m, "N": tiles.n, "K": tiles.k, "ONE_K": k <= tiles.k}
                    for dtype in dtypes(table_dtype):
                        yield Case(
                            row, f"{layout}, {side}", kernel, dtype, dict.fromkeys(tensors, ""),
                            sizes | dict.fromkeys(ones, 1) | {"PRECISION": precision(dtype)}, multiples,
                            options(tiles.warps, tiles.stages), tiles.m >= 64 and table_dtype != "float32",
                        )  # fmt: skip


def khatri_rao_cases(table: Table) -> Iterator[Case]:
    """Both kernels, the first with cores held and not, aligned and ragged, straight and transposed."""
    rows = {"x_i2", "z_r", "out_r", "out_o2", "bias_o2"}
    straight, turned = {"u_r", "v_r", "p_r", "q_r"}, {"u_i1", "v_i2", "p_o1", "q_o2"}
    layouts = {  # which strides are 1, and whether sizes and the other strides are multiples of 16
        "aligned": (straight | rows, True),
        "transposed cores": (turned | rows, True),
        "ragged": (straight | rows, False),
        "rows of any strides": (straight | {"out_o2", "bias_o2"}, False),
    }
    pointers = {"x": "", "u": "", "v": "", "out": "", "z": "*fp32", "p": "", "q": "", "bias": ""}
    for name, kernel, entry, tiles, flag in (
        ("cp_in", khatri_rao.contract_kernel, "cp_in", ("rank", "i1", "step"), False),
        ("cp_in, held", khatri_rao.contract_kernel, "cp_in", ("rank", "i1", "i2"), True),
        ("cp_out", khatri_rao.expand_kernel, "cp_out", ("rows", "o1", "o2", "rank"), True),
    ):
        names = kernel.arg_names
        upper = [argument for argument in names if argument.isupper()]
        given = {argument: kind for argument, kind in pointers.items() if argument in names}
        given |= {"out": "*fp32"} if entry == "cp_in" else {}
        for table_dtype, config in table.kernels[entry].items():
            is_exact = table_dtype == "float32"
            large = min(config["rank" if entry == "cp_in" else "o1"], 64) == 64 and not is_exact
            for layout, (ones, is_aligned) in layouts.items():
                multiples = set(names) - {"batch", "rows", "share", "steps"} if is_aligned else set(given)
                for dtype in dtypes(table_dtype):
                    values = (*(config[tile] for tile in tiles), flag, precision(dtype))
                    constants = dict(zip(upper, values, strict=True)) | dict.fromkeys(ones.intersection(names), 1)
                    yield Case(
                        name, layout, kernel, dtype, given, constants, multiples,
                        options(config["warps"], config["stages"], is_exact and entry == "cp_in"), large,
                    )  # fmt: skip


def lookup_cases(table: Table) -> Iterator[Case]:
    """The rows of trains, and the gradients of an end and of a core between, at small and at the largest tiles."""
    kernels: tuple[tuple[str, Any, Mapping[str, Any], set[str]], ...] = (  # with the strides that are 1
        ("lookup", lookup.rows_kernel, {}, {"left_p", "middle_q", "right_n", "columns_n", "out_column"}),
        ("lookup_gradients", lookup_gradients.sums_kernel, {"GIVEN": "left"},
         {"left_p", "middle_p", "right_q", "step"}),
        ("lookup_gradients", lookup_gradients.sums_kernel, {"GIVEN": "middle"},
         {"left_m", "middle_q", "right_q", "step"}),
    )  # fmt: skip
    shapes = {
        "small": lookup.Shape(8, 8, 12, 12, 16, True),
        "pairs": lookup.Shape(200, 1, 200, 1, 200, False),
        "large": lookup.Shape(200, 8, 200, 200, 200, True),
    }
    pointers = {"left": "", "middle": "", "right": "", "out": "", "sums": "*fp32"}
    pointers |= dict.fromkeys(("ids", "order", "starts"), "*i64")
    uneven = ("_divisor", "_values", "_share")
    for entry, kernel, which, ones in kernels:
        names = kernel.arg_names
        given = {name: kind for name, kind in pointers.items() if name in names}
        even = {name for name in names if "_" in name or name in {*"mnpq", "width"}}
        even = {name for name in even if not name.endswith(uneven)} | set(given)
        for layout in ("aligned", "ragged", "any strides"):
            for size, of in shapes.items():
                if which.get("GIVEN") == "middle" and not of.chained:
                    continue
                for table_dtype, most in table.kernels[entry].items():
                    to = lookup.tiles(of, most, layout == "aligned")
                    values = which | dict(zip("MNPQ", to, strict=False)) | {"WHOLE": to.whole, "CHAINED": of.chained}
                    values |= {"CUT": layout != "aligned"} | dict.fromkeys(() if layout == "any strides" else ones, 1)
                    for dtype in dtypes(table_dtype):
                        constants = values | {"PRECISION": precision(dtype)}
                        yield Case(
                            " ".join((entry, *which.values())), f"{layout}, {size}", kernel, dtype, given,
                            {name: value for name, value in constants.items() if name in names},
                            even if layout == "aligned" else set(given),
                            options(to.warps, to.stages, many_registers=True), to.m >= 64 and table_dtype != "float32",
                        )  # fmt: skip


def finish_cases(table: Table) -> Iterator[Case]:
    """What adds the sums of parts, with all that may follow, and of the pieces of a lookup's gradients."""
    kernels: tuple[tuple[str, Any, Mapping[str, str], Mapping[str, Any]], ...] = (
        ("finish", chain.finish_kernel, {"sums": "*fp32", "out": "", "bias": ""},
         {"PARTS": chain.PARTS, "SIZE": chain.SIZE, "BIASED": True, "ACTIVATION": "gelu"}),
        ("lookup_gradients, finish", lookup_gradients.finish_kernel, {"sums": "*fp32", "starts": "*i64", "out": ""},
         {"PARTS": lookup_gradients.PARTS, "SIZE": lookup_gradients.SIZE}),
    )  # fmt: skip
    for name, kernel, pointers, constants in kernels:
        for layout, ones in (("contiguous", {"out_n": 1}), ("any strides", {})):
            for dtype in dtypes("half") + dtypes("float32"):
                yield Case(
                    name, layout, kernel, dtype, pointers, {**constants, **ones}, set(pointers), options(4, 3), False
                )


CASES = (chain_cases, rebuild_cases, khatri_rao_cases, lookup_cases, finish_cases)


def cases(arch: str) -> list[Case]:
    """All of an architecture."""
    return [case for kind in CASES for case in kind(launch_tables.shipped(arch))]
