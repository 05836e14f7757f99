"""Rows of a tensor train of two or three cores by their ids, as one Triton kernel: gather and chain together.

The digits of an id, ``v = id // divisor % values``, pick a slice of each core. A row is the chain of the slices,

    row[c1, c2, c3] = sum_{r1, r2} A[v1, c1, r1] B[v2, r1, c2, r2] C[v3, r2, c3]

or, of two cores, ``row[c1, c2] = sum_r A[v1, c1, r] C[v2, r, c2]``. Slices are read where they lie in the cores, and
nothing but the rows is written. Every core is seen as (values, left bond, columns, right bond); the first has no left
bond and the last no right one, so that these have the size 1. What lies beyond the width of a row is padding.

`lookup_gradients` has the gradients of the cores. On the CPU all run in Triton's interpreter.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from tensorlayers.cost import Cost
from tensorlayers.kernels.operands import elements, options, precision
from tensorlayers.launch import blocks, fitted, is_aligned
from tensorlayers.launch_tables import Table, device_table, itemsize
from tensorlayers.network import Network

PROGRAMS = 8  # that a processor shall have at least, before one takes several ids


class Shape(NamedTuple):
    """The sizes of a chain: (m, p) (p, q) (q, n) for each of the heads, or (m, q) (q, n) if it is not `chained`."""

    m: int
    heads: int
    n: int
    p: int
    q: int
    chained: bool


class Tiles(NamedTuple):
    """A launch configuration: tiles of m, n, p and q, warps, pipeline stages, the most ids a program.

    `whole`: p and q fit in a tile each, so that the slices on the left and on the right are loaded once for all heads.
    """

    m: int
    n: int
    p: int
    q: int
    whole: bool
    warps: int
    stages: int
    ids: int


class Counts(NamedTuple):
    """What programs do: FLOPs of the matrix units, those wasted at ragged tiles among them; elements of cores and rows
    (or their gradients) loaded, and stored."""

    flops: int
    loaded: int
    stored: int


# What varies with the ids does not make another kernel: none could be compiled while a CUDA graph is captured.
@triton.jit(do_not_specialize=["count", "share", "heads_share"])
@no_type_check
def rows_kernel(
    left, middle, right, ids, out,
    count, width, share, heads_share, heads, m, n, p, q,
    left_divisor, left_values, left_v, left_m, left_p,
    middle_divisor, middle_values, middle_v, middle_h, middle_p, middle_q,
    right_divisor, right_values, right_v, right_q, right_n,
    columns_m, columns_h, columns_n, out_row, out_column,
    M: tl.constexpr, N: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    WHOLE: tl.constexpr, CHAINED: tl.constexpr, CUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a tile (M, N) of `heads_share` heads, of `share` ids. CUT: rows end before their padded modes do."""
    m_tiles, n_tiles = tl.cdiv(m, M), tl.cdiv(n, N)
    # 64-bit from here on: every offset below derives from these.
    program = tl.program_id(0).to(tl.int64)
    rows = (program // n_tiles % m_tiles * M + tl.arange(0, M))[:, None]
    columns = (program % n_tiles * N + tl.arange(0, N))[None, :]
    place = program // (m_tiles * n_tiles)
    blocks = tl.cdiv(heads, heads_share)
    head = place % blocks * heads_share
    first = place // blocks * share
    inner1 = tl.arange(0, P).to(tl.int64)
    inner2 = tl.arange(0, Q).to(tl.int64)
    left += rows * left_m
    right += columns * right_n

    for position in range(first, tl.minimum(first + share, count)):
        id = tl.load(ids + position).to(tl.int64)
        at_left = left + id // left_divisor % left_values * left_v
        at_middle = middle + id // middle_divisor % middle_values * middle_v
        at_right = right + id // right_divisor % right_values * right_v
        if WHOLE and CHAINED:
            given = tl.load(at_left + inner1[None, :] * left_p, (rows < m) & (inner1 < p)[None, :], 0.0)
        if WHOLE:
            last = tl.load(at_right + inner2[:, None] * right_q, (inner2 < q)[:, None] & (columns < n), 0.0)
        for h in range(head, tl.minimum(head + heads_share, heads)):
            total = tl.zeros((M, N), tl.float32)
            for k2 in range(0, Q if WHOLE else q, Q):
                at2 = k2 + inner2
                if not WHOLE:
                    last = tl.load(at_right + at2[:, None] * right_q, (at2 < q)[:, None] & (columns < n), 0.0)
                if CHAINED:
                    inner = tl.zeros((M, Q), tl.float32)
                    for k1 in range(0, P if WHOLE else p, P):
                        at1 = k1 + inner1
                        if not WHOLE:
                            given = tl.load(at_left + at1[None, :] * left_p, (rows < m) & (at1 < p)[None, :], 0.0)
                        at = at_middle + h * middle_h + at1[:, None] * middle_p + at2[None, :] * middle_q
                        between = tl.load(at, (at1 < p)[:, None] & (at2 < q)[None, :], 0.0)
                        inner = tl.dot(given, between, inner, input_precision=PRECISION)
                    grown = inner.to(last.dtype)
                else:
                    grown = tl.load(at_left + at2[None, :] * left_p, (rows < m) & (at2 < q)[None, :], 0.0)
                total = tl.dot(grown, last, total, input_precision=PRECISION)
            # Of a row 32 bits address all, and take fewer registers.
            column = rows.to(tl.int32) * columns_m + (h * columns_h).to(tl.int32) + columns.to(tl.int32) * columns_n
            inside = (rows < m) & (columns < n)
            if CUT:
                inside = inside & (column < width)
            tl.store(out + position * out_row + column * out_column, total.to(out.dtype.element_ty), inside)


# -- finding ----------------------------------------------------------------------------------------------------------


class Site(NamedTuple):
    """A core of the chain: which, where it has its row mode, the bond to the core before, its column mode and the bond
    to the one after (-1 for what it has not), and the place values of its row mode in an id, of its column mode in a
    row."""

    core: int
    row: int
    left: int
    column: int
    right: int
    divisor: int
    spacing: int

    def view(self, core: Tensor) -> Tensor:
        """The core as (values, left bond, columns, right bond)."""
        axes = self[1:5]
        view = core.permute([axis for axis in axes if axis >= 0])
        for place, axis in enumerate(axes):
            view = view.unsqueeze(place) if axis < 0 else view
        return view


def sites(chain: Sequence[int]) -> list[Site]:
    """What `train` found."""
    count = len(Site._fields)
    return [Site(*chain[k : k + count]) for k in range(0, len(chain), count)]


@lru_cache(maxsize=4096)
def train(network: Network) -> tuple[int, ...] | None:
    """The chain that a table is, from the names of its indices: the numbers of its sites; None where it is none.

    Each core has a row mode, a column mode or none, and a bond to each of its neighbours.
    """
    ins, outs, count = network.names("in"), network.names("out"), len(network.cores)
    for order in itertools.permutations(range(count)) if count in (2, 3) else ():
        cores = [network.cores[k] for k in order]
        links = [_common(network.bonds, *pair) for pair in itertools.pairwise(cores)]
        roles = [
            (_common(ins, core), left, _common(outs, core), right)
            for core, left, right in zip(cores, [(), *links], [*links, ()], strict=True)
        ]
        if (
            all(len(link) == 1 for link in links)
            and all(len(rows) == 1 and len(columns) <= 1 for rows, _, columns, _ in roles)
            and all(sorted(itertools.chain(*of)) == sorted(core) for core, of in zip(cores, roles, strict=True))
            and sum(map(len, cores)) == len(network.sizes) + len(links)  # a mode sits on one core, a bond on two
        ):
            found: list[int] = []
            for k, core, of in zip(order, cores, roles, strict=True):
                found += [k, *(core.index(names[0]) if names else -1 for names in of)]
                found += _place_value(ins, of[0], network), _place_value(outs, of[2], network)
            return tuple(found)
    return None


def _common(names: Sequence[str], *cores: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in names if all(name in core for core in cores))


def _place_value(names: Sequence[str], own: Sequence[str], network: Network) -> int:
    """The place value of a mode among those of its role; 0 for none."""
    return math.prod(network.size[name] for name in names[names.index(own[0]) + 1 :]) if own else 0


# -- launching --------------------------------------------------------------------------------------------------------


def shape(cores: Sequence[Sequence[int]]) -> Shape:
    """The chain of a row, from the shapes of the cores: (values, left bond, columns, right bond)."""
    (_, _, m, q), (_, _, n, _) = cores[0], cores[-1]
    if len(cores) == 2:
        return Shape(m, 1, n, 1, q, False)
    _, p, heads, q = cores[1]
    return Shape(m, heads, n, p, q, True)


def configuration(kernel: str, dtype: str, table: Table) -> dict[str, int]:
    """The entry of a launch table.

    It has the largest tile of a column mode and of a bond, the elements of the largest tile that a warp takes
    (`ragged`: where not all is addressed in vectors), pipeline stages, and the most ids a program.
    """
    return table.kernels[kernel][dtype]


def tiles(of: Shape, most: dict[str, int], aligned: bool = False) -> Tiles:
    """The launch configuration of a chain: the smallest tiles that hold its sizes, up to the largest of the table."""
    rank, warp = (most["rank"], most["warp"]) if aligned else (most["ragged_rank"], most["ragged_warp"])
    m, n, p, q = *(fitted(size, most["side"]) for size in (of.m, of.n)), *(fitted(size, rank) for size in (of.p, of.q))
    warps = max(m * n, m * q, q * n, *((m * p, p * q) if of.chained else ())) // warp
    warps = max(4 if m >= 64 else 1, min(warps, 8))  # a warpgroup has 64 rows
    return Tiles(m, n, p, q, of.p <= p and of.q <= q, warps, most["stages"], most["ids"])


def are_aligned(views: Sequence[Tensor], chain: Sequence[Site], rows: Tensor) -> bool:
    """Whether Triton can see that the cores, as `Site.view` gives them, and the rows are addressable in vectors."""
    spacings = [site.spacing * rows.stride(1) for site in chain]
    layouts: list[tuple[Sequence[int], Sequence[int]]] = [(view.shape, view.stride()) for view in views]
    layouts.append(([view.shape[2] for view in views], spacings))
    return all(is_aligned(sizes, strides) for sizes, strides in layouts)


def shares(count: int, of: Shape, to: Tiles, processors: int) -> tuple[int, int]:
    """How many ids and how many heads a program takes: several only where every processor has programs enough."""
    units = count * of.heads * blocks(of.m, to.m) * blocks(of.n, to.n) // (PROGRAMS * processors)
    if units < of.heads:
        return 1, max(1, units)
    return min(units // of.heads, to.ids), of.heads


def counts(count: int, width: int, of: Shape, to: Tiles, heads_share: int) -> Counts:
    """What a lookup of `count` ids does; the ids themselves, one a program and id, are not counted."""
    m_tiles, n_tiles = blocks(of.m, to.m), blocks(of.n, to.n)
    p_tiles, q_tiles = blocks(of.p, to.p), blocks(of.q, to.q)
    flops = 2 * to.m * to.q * (to.n + (p_tiles * to.p if of.chained else 0)) * q_tiles
    loads = blocks(of.heads, heads_share) if to.whole else of.heads  # of the right
    left = of.m * of.p * loads * (1 if to.whole else q_tiles) if of.chained else of.m * of.q
    middle = of.p * of.q * of.heads * m_tiles * n_tiles if of.chained else 0
    right = of.q * of.n * loads
    loaded = left * n_tiles + middle + right * m_tiles
    return Counts(count * of.heads * m_tiles * n_tiles * flops, count * loaded, count * width)


def predicted(network: Network, dtype: str, table: Table) -> tuple[Cost, float]:
    """Of one row among many: FLOPs and elements moved, and seconds, which are those of the arithmetic, of the slices
    from the cache, or of the row to memory."""
    chain = sites(train(network) or ())
    sizes = [(*network.core_shapes[site.core], 1) for site in chain]  # -1: the last of them
    of = shape([[sizes[k][axis] for axis in site[1:5]] for k, site in enumerate(chain)])
    made = counts(1, network.features("out"), of, tiles(of, configuration("lookup", dtype, table)), of.heads)
    seconds = max(
        # The rates of the table are those of large tiles; small ones wait for their operands.
        made.flops / (table.rates[dtype] * (1.0 if dtype == "float32" else 0.25)),
        (made.loaded + made.stored) * itemsize(dtype) / table.cache,
        made.stored * itemsize(dtype) / table.memory,
    )
    return Cost(made.flops, made.loaded + made.stored), seconds


def run(ids: Tensor, cores: Sequence[Tensor], chain: Sequence[int], width: int) -> Tensor:
    """The rows.

    Parameters
    ----------
    ids : Tensor
        (n,), integers from 0. They are not checked.
    cores : sequence of Tensor
        All strides are free, all dtypes the same.
    chain : sequence of int
        As `train` finds it.
    width : int
        The columns that are wanted.

    Returns
    -------
    Tensor
        (n, width).

    Raises
    ------
    KernelError
        If the dtypes differ, or are neither float16, bfloat16 nor float32, or are bfloat16 on the CPU.
    """
    out = cores[0].new_empty(ids.shape[0], width)
    write(ids, cores, chain, out)
    return out


def write(ids: Tensor, cores: Sequence[Tensor], chain: Sequence[int], out: Tensor) -> None:
    """`run` into a tensor of any strides."""
    dtype = elements("lookup", (*cores, out))
    if out.numel() == 0:
        return
    along = sites(chain)
    views = [site.view(cores[site.core]) for site in along]
    count, width = out.shape
    of = shape([view.shape for view in views])
    table = device_table(out.device)
    to = tiles(of, configuration("lookup", dtype, table), are_aligned(views, along, out))
    share, heads_share = shares(count, of, to, table.processors)
    programs = blocks(count, share) * blocks(of.heads, heads_share) * blocks(of.m, to.m) * blocks(of.n, to.n)
    between = 1 if of.chained else 0  # without a core between, another stands for it that is not read
    left, middle, right = views[0], views[between], views[-1]
    (left_v, _, left_m, left_p), (right_v, right_q, right_n, _) = left.stride(), right.stride()
    middle_v, middle_p, middle_h, middle_q = middle.stride()
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        rows_kernel[(programs,)](
            left, middle, right, ids.contiguous(), out,
            count, width, share, heads_share, of.heads, of.m, of.n, of.p, of.q,
            along[0].divisor, left.shape[0], left_v, left_m, left_p,
            along[between].divisor, middle.shape[0], middle_v, middle_h, middle_p, middle_q,
            along[-1].divisor, right.shape[0], right_v, right_q, right_n,
            along[0].spacing, along[between].spacing, along[-1].spacing, *out.stride(),
            to.m, to.n, to.p, to.q, to.whole, of.chained, width < of.m * of.heads * of.n,
            precision(dtype),
            **options(to.warps, to.stages, many_registers=True),
        )  # fmt: skip


@torch.library.custom_op("tensorlayers::lookup", mutates_args=())
def lookup(ids: Tensor, cores: Sequence[Tensor], chain: Sequence[int], width: int) -> Tensor:
    """`run`, not differentiable by itself."""
    return run(ids, cores, chain, width)


@lookup.register_fake
def _(ids: Tensor, cores: Sequence[Tensor], chain: Sequence[int], width: int) -> Tensor:
    return cores[0].new_empty(ids.shape[0], width)
