"""The dense weight as one product of two tensors: the form that a Triton kernel takes it in, and how that is launched.

The kernel, `kernels.rebuild`, writes out[h, m, n] = sum_k left[h, m, k] right[h, k, n], where each of h, m and n is up
to two axes with strides of their own. So the product comes in the order of the modes that the weight has them in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from . import backend
from .chain import Indices, viewed
from .cost import volume
from .launch import VECTOR, blocks, fitted
from .launch_tables import Table, itemsize

_SECTOR = 32  # bytes that memory is written in at least


class Problem(NamedTuple):
    """The sizes of a product, ``out[h, m, n] = sum_k left[h, m, k] right[h, k, n]``.

    `dtype`: "half" (16 bits), "tf32" or "float32". `aligned`: all are addressed in vectors. `run`: how many elements of
    the result are next to each other in memory.
    """

    heads: int
    m: int
    n: int
    k: int
    dtype: str = "half"
    aligned: bool = True
    run: int = 64


class Tiles(NamedTuple):
    """A launch configuration: the tile of each dimension, warps and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


class Launch(NamedTuple):
    """How a problem is launched.

    Parameters
    ----------
    tiles : Tiles
    programs : int
    flops : int
        FLOPs of the matrix units, those wasted at ragged tiles among them.
    loaded, stored : int
        Elements.
    seconds : float
        The predicted time.
    """

    tiles: Tiles
    programs: int
    flops: int
    loaded: int
    stored: int
    seconds: float


@lru_cache(maxsize=4096)
def launch(problem: Problem, table: Table) -> Launch:
    """The launch of a problem, none of whose sizes is 0."""
    heads, m, n, k, dtype, aligned, run = problem
    tiles = tiles_for(problem, table.kernels["rebuild" if aligned else "rebuild_ragged"][dtype])
    m_tiles, n_tiles, k_tiles = blocks(m, tiles.m), blocks(n, tiles.n), blocks(k, tiles.k)
    programs = heads * m_tiles * n_tiles
    flops = 2 * programs * k_tiles * tiles.m * tiles.n * tiles.k
    loaded, stored = heads * k * (m * n_tiles + n * m_tiles), heads * m * n
    whole = stored * max(itemsize(dtype), _SECTOR / run)  # bytes with what short runs waste
    latency = blocks(programs, 2 * table.processors) * (k_tiles + 2) * table.step
    memory = (heads * k * (m + n) + stored) * itemsize(dtype) / table.memory
    cached = (loaded * itemsize(dtype) + whole) / table.cache
    seconds = table.launch + max(flops / table.rates[dtype], latency, memory, cached)
    return Launch(tiles, programs, flops, loaded, stored, seconds)


def tiles_for(problem: Problem, largest: Mapping[str, int]) -> Tiles:
    """The tiles of a launch configuration, made smaller where less holds all: m and n alike, so that they are few."""
    m, n = (fitted(max(problem.m, problem.n), largest[name]) for name in "mn")
    warps = largest["warps"] if 2 * m * n > largest["m"] * largest["n"] else min(4, largest["warps"])
    return Tiles(m, n, fitted(problem.k, largest["k"]), warps, largest["stages"])


@dataclass(frozen=True)
class Form:
    """The product of two tensors as the kernel takes it.

    Parameters
    ----------
    left, right, result : Indices
        The indices of each tensor, in the order of its axes. The last of the result are of the right one alone.
    heads, m, n : pair of Indices
        Of each kind of index those that are next to each other in the result.
    k : Indices
        Those that are summed.
    """

    left: Indices
    right: Indices
    result: Indices
    heads: tuple[Indices, Indices]
    m: tuple[Indices, Indices]
    n: tuple[Indices, Indices]
    k: Indices

    @property
    def roles(self) -> tuple[tuple[Indices, ...], tuple[Indices, ...]]:
        """The axes that the kernel sees of the left and of the right operand."""
        return (*self.heads, *self.m, self.k), (*self.heads, self.k, *self.n)

    def run(self, left: Tensor, right: Tensor, sizes: Mapping[str, int]) -> Tensor:
        """The product, by the kernel. An operand is copied where indices that are one axis here are not so there."""
        out = left.new_empty([sizes[index] for index in self.result])
        of_left, of_right = self.roles
        backend.load("rebuild").run(
            viewed(left, self.left, of_left, sizes),
            viewed(right, self.right, of_right, sizes),
            viewed(out, self.result, (*self.heads, *self.m, *self.n), sizes),
        )
        return out

    def problem(self, sizes: Mapping[str, int], dtype: str) -> Problem:
        """What is launched for contiguous tensors."""
        heads, m, n = (volume((*pair[0], *pair[1]), sizes) for pair in (self.heads, self.m, self.n))
        k, run = volume(self.k, sizes), volume(self.n[1], sizes)
        return Problem(heads, m, n, k, dtype, k % VECTOR == run % VECTOR == 0, run)


def form(left: Indices, right: Indices, result: Indices) -> Form | None:
    """The form of a product; None where it has more pieces than the kernel can address."""
    heads = _axes([index for index in result if index in left and index in right], result, left, right)
    m = _axes([index for index in result if index not in right], result, left)
    n = _axes([index for index in result if index not in left], result, right)
    if heads is None or m is None or n is None:
        return None
    return Form(left, right, result, heads, m, n, tuple(i for i in left if i in right and i not in result))


def _axes(indices: Sequence[str], result: Indices, *operands: Indices) -> tuple[Indices, Indices] | None:
    """Indices as at most two axes of the result: of all tensors if they can be, else the operands are copied."""
    for layouts in ((result, *operands), (result,)):
        runs: list[Indices] = []
        for index in indices:
            is_next = runs and all(one.index(index) == one.index(runs[-1][-1]) + 1 for one in layouts)
            runs[-1:] = [(*runs[-1], index)] if is_next else [*runs[-1:], (index,)]
        if len(runs) <= 2:
            first, last = [()] * (2 - len(runs)) + runs
            return first, last
    return None
