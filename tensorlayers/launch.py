"""How the kernel of chains is launched, and what that is predicted to take; arithmetic of tiles, for all kernels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from .cost import Cost
from .launch_tables import LEAST, Problem, Table, Tiles

VECTOR = 16
"""Sizes and strides that are multiples of this are known to be such when a kernel is compiled."""

_MOST_PARTS = 512


class Launch(NamedTuple):
    """How a problem is launched.

    Parameters
    ----------
    tiles : Tiles
    steps, share, parts : int
        Steps of the loop over terms and tiles of q; how many a program takes; among how many programs they are shared.
    programs : int
    flops : int
        FLOPs of the matrix units, those wasted at ragged tiles among them.
    loaded, stored : int
        Elements that programs load, those of a bias not counted; that they store. Where there are parts these are
        float32, and the kernel that adds them loads them all.
    seconds : float
        The predicted time, with that of adding the parts.
    itemsize : int
        Bytes an element of the operands and of the result.
    """

    tiles: Tiles
    steps: int
    share: int
    parts: int
    programs: int
    flops: int
    loaded: int
    stored: int
    seconds: float
    itemsize: int

    @property
    def cost(self) -> Cost:
        """FLOPs and elements of `itemsize` bytes, the adding of parts among them; those of a bias not counted."""
        moved = self.loaded * self.itemsize + stored_bytes(self.stored, self.parts, self.itemsize)
        return Cost(self.flops, (moved + finish_bytes(self.stored, self.parts, self.itemsize)) // self.itemsize)


@lru_cache(maxsize=4096)
def launch(problem: Problem, table: Table) -> Launch:
    """The launch of a problem, none of whose sizes is 0.

    With the tiles of its row, smaller where the problem is, heads are spread over more programs, and steps too, as the
    predicted time says.
    """
    tiles = table.row(problem).tiles
    # Rows are not cut: the matrix units take them by 64.
    tiles = tiles._replace(n=fitted(problem.n, tiles.n), p=fitted(problem.p, tiles.p), q=fitted(problem.q, tiles.q))
    found = []
    heads = max(1, tiles.heads // 2) if problem.activated else tiles.heads
    while heads:
        steps = problem.terms * (1 if tiles.held else blocks(problem.q, tiles.q))
        parts = 1
        while parts <= min(steps, _MOST_PARTS):
            found.append(_launch(problem, table, tiles._replace(heads=heads), steps, parts))
            parts *= 2
        heads //= 2
    return min(found, key=lambda one: one.seconds)


def _launch(problem: Problem, table: Table, tiles: Tiles, steps: int, parts: int) -> Launch:
    (h1, h2), _, m, n, p, q, *_ = problem
    share = blocks(steps, parts)
    parts = blocks(steps, share)
    heads = blocks(h1, tiles.heads) * h2
    m_tiles, n_tiles, p_tiles = blocks(m, tiles.m), blocks(n, tiles.n), blocks(p, tiles.p)
    programs = parts * heads * m_tiles * n_tiles
    once = tiles.heads * 2 * tiles.m * tiles.q * (p_tiles * tiles.p + tiles.n)  # a program's step
    flops = heads * m_tiles * n_tiles * steps * once
    left = heads * (1 if p_tiles == 1 else tiles.heads) * n_tiles * steps * m * p
    middle = h1 * h2 * m_tiles * n_tiles * (parts if tiles.held else problem.terms) * p * q
    right = heads * m_tiles * problem.terms * q * n
    loaded, stored = left + middle + right, parts * h1 * h2 * m * n
    # Each of `waves` programs of a processor takes its steps one after another.
    waves = blocks(programs, table.processors)
    arithmetic = waves * share * once / (table.rates[problem.dtype] / table.processors)
    latency = blocks(programs, 2 * table.processors) * (share + 2) * table.step
    cached = (loaded * problem.itemsize + stored_bytes(stored, parts, problem.itemsize)) / table.cache
    unique = problem.itemsize * (_unique(problem) + h1 * h2 * m * n) / table.memory
    seconds = table.launch + max(arithmetic, latency, cached, unique)
    if parts > 1:
        seconds += table.launch + finish_bytes(stored, parts, problem.itemsize) / table.cache
    return Launch(tiles, steps, share, parts, programs, flops, loaded, stored, seconds, problem.itemsize)


def stored_bytes(stored: int, parts: int, itemsize: int) -> int:
    """Bytes that a kernel stores: partial sums are float32."""
    return stored * (itemsize if parts == 1 else 4)


def finish_bytes(stored: int, parts: int, itemsize: int) -> int:
    """Bytes that the kernel moves which adds so many partial sums; `itemsize`: of an element of the result."""
    return 0 if parts == 1 else stored * 4 + stored // parts * itemsize


def fitted(size: int, tile: int) -> int:
    """A tile no larger than it must be: the least power of two that holds a size, or the tile."""
    return min(tile, max(LEAST, 1 << (size - 1).bit_length()))


def _unique(problem: Problem) -> int:
    """Elements of the operands, at least: those of left and right once for heads that share them."""
    (h1, h2), terms, m, n, p, q, shared, held, *_ = problem
    outer = (1 if shared else h1) * h2 * terms
    return outer * (m * p + q * n) + h1 * h2 * (1 if held else terms) * p * q


def blocks(size: int, tile: int) -> int:
    """How many tiles hold a size."""
    return -(-size // tile)


def is_aligned(sizes: Sequence[int], strides: Sequence[int], axes: Sequence[int] = ()) -> bool:
    """Whether vectors address a tensor along one of some axes (by default any): that one is contiguous, and all else
    a multiple of `VECTOR`. Along an axis of size 1 nothing is stepped, whatever its stride."""
    inner = [axis for axis in axes or range(len(sizes)) if strides[axis] == 1 and sizes[axis] % VECTOR == 0]
    steps = [stride for size, stride in zip(sizes, strides, strict=True) if size > 1]
    return bool(inner) and all(step == 1 or step % VECTOR == 0 for step in steps)
