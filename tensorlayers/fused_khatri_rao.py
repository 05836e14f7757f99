"""Rows times a CP network whose Khatri-Rao products are formed nowhere, by the kernels of `kernels.khatri_rao`.

The rows meet both cores of the in modes at once, ``z[b, r] = sum x[b, i1, i2] u[i1, r] v[i2, r]``, and z both cores of
the out modes. At small batch that takes a launch or two a side; to form the factor of a side, features x rank, would
write and read more than the dense weight.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import backend
from .cost import Cost
from .launch import blocks, finish_bytes, fitted, stored_bytes
from .launch_tables import Table, itemsize
from .launch_tables import table as table_of
from .machine import Machine
from .network import Network
from .program import Candidate, KernelProgram, Task

_MOST_PARTS = 256


@dataclass(frozen=True)
class Side:
    """Two modes of the rows, and the cores that carry them.

    Parameters
    ----------
    sizes : tuple of int
    cores : tuple of int
    transposed : tuple of bool
        Whether a core is (rank, mode) and not (mode, rank).
    """

    sizes: tuple[int, int]
    cores: tuple[int, int]
    transposed: tuple[bool, bool]

    def factors(self, cores: Sequence[Tensor]) -> list[Tensor]:
        """The two cores as (mode, rank)."""
        return [
            cores[k].mT if is_turned else cores[k] for k, is_turned in zip(self.cores, self.transposed, strict=True)
        ]


def sides(network: Network) -> dict[str, Side] | None:
    """The sides "in" and "out" of a network where every core has one mode and all have the same bond, two modes a side.

    None of any other network.
    """
    if len(network.bonds) != 1 or len(network.cores) != 4 or len(network.modes) != 4:
        return None
    bond, found = network.bonds[0], {}
    for role in ("in", "out"):
        names = network.names(role)
        places = [k for name in names for k, core in enumerate(network.cores) if set(core) == {name, bond}]
        if len(names) != 2 or len(places) != 2:
            return None
        first, second = places
        turned = network.cores[first][0] == bond, network.cores[second][0] == bond
        found[role] = Side((network.size[names[0]], network.size[names[1]]), (first, second), turned)
    return found


class FusedKhatriRao(KernelProgram):
    """A program of two kernels, and of operations of torch for the gradients of cores.

    Parameters
    ----------
    network : Network
        One that `sides` finds the sides of.
    """

    def __init__(self, network: Network) -> None:
        found = sides(network)
        assert found is not None
        self.network, self.ins, self.outs = network, found["in"], found["out"]
        self.rank = network.ranks[0]
        self.intermediate = 2 * self.rank  # z in float32

    def forward(self, x: Tensor, cores: Sequence[Tensor], bias: Tensor | None, activation: str = "none") -> Tensor:
        along = None if bias is None else bias.reshape(self.outs.sizes)
        return self._expanded(self._contracted(x, self.ins, cores), x, self.outs, cores, along, activation)

    def gradients(self, dy: Tensor, x: Tensor, cores: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
        found: list[Tensor | None] = [None] * len(cores)
        dx = None
        if needs[0] or any(needs[1 + k] for k in self.ins.cores):
            dz = self._contracted(dy, self.outs, cores)
            dx = self._expanded(dz, x, self.ins, cores) if needs[0] else None
            self._add_core_gradients(found, x, dz, self.ins, cores, needs)
        if any(needs[1 + k] for k in self.outs.cores):
            z = self._contracted(x, self.ins, cores)
            self._add_core_gradients(found, dy, z, self.outs, cores, needs)
        return [dx, *found]

    def _contracted(self, rows: Tensor, side: Side, cores: Sequence[Tensor]) -> Tensor:
        """(rows, rank), in float32."""
        out = rows.new_empty(rows.shape[0], self.rank, dtype=torch.float32)
        backend.load("khatri_rao").contract(_matrices(rows, side), *side.factors(cores), out)
        return out

    @staticmethod
    def _expanded(
        z: Tensor,
        like: Tensor,
        side: Side,
        cores: Sequence[Tensor],
        bias: Tensor | None = None,
        activation: str = "none",
    ) -> Tensor:
        """(rows, features)."""
        out = like.new_empty(z.shape[0], *side.sizes)
        backend.load("khatri_rao").expand(z, *side.factors(cores), out, bias, activation)
        return out.flatten(1)

    def _add_core_gradients(
        self,
        found: list[Tensor | None],
        rows: Tensor,
        z: Tensor,
        side: Side,
        cores: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> None:
        matrices, factors = _matrices(rows, side), side.factors(cores)
        most = self.network.features("in") * self.network.features("out")
        for which, other, given in ((0, 1, matrices), (1, 0, matrices.mT)):
            core = side.cores[which]
            if needs[1 + core]:
                gradient = _factor_gradient(given, z, factors[other], most)
                found[core] = gradient.mT if side.transposed[which] else gradient


def _matrices(rows: Tensor, side: Side) -> Tensor:
    """The rows as (batch, mode, mode)."""
    return rows.reshape(rows.shape[0], *side.sizes)


def _factor_gradient(
    rows: Tensor,  # (batch, m, n)
    z: Tensor,  # (batch, rank), float32
    other: Tensor,  # (n, rank)
    most: int,
) -> Tensor:  # (m, rank)
    """``sum_{b, n} rows[b, m, n] z[b, r] other[n, r]``: no more than `most` elements at a time."""
    batch, m, n = rows.shape
    flat = rows.transpose(0, 1).reshape(m, batch * n)
    found = rows.new_empty(m, z.shape[1])
    width = _width(batch, n, z.shape[1], most)
    for start in range(0, z.shape[1], width):
        ranks = slice(start, start + width)
        scaled = rows.new_empty(batch, n, found[:, ranks].shape[1])
        torch.mul(z[:, None, ranks], other[:, ranks], out=scaled)
        torch.mm(flat, scaled.flatten(0, 1), out=found[:, ranks])
    return found


def _width(batch: int, n: int, rank: int, most: int) -> int:
    return max(1, min(rank, most // max(1, batch * n)))


# -- launches ---------------------------------------------------------------------------------------------------------


class Launch(NamedTuple):
    """How one of the kernels is launched.

    Parameters
    ----------
    tiles : tuple of int
        Contraction: of the rank, i1, i2. Expansion: of o1, o2, the rank.
    held : bool
        Contraction: a program takes one tile of i1, and i2 fits in one, so that it loads the cores once.
    rows : int
        Of a program; one after another (contraction) or at a time (expansion).
    steps, share, parts : int
        Tiles of i1, or of the rank; how many a program takes; among how many programs they are shared.
    programs : int
    flops, scaled : int
        FLOPs of the matrix units, and multiplications of the ordinary ones, with those wasted at ragged tiles.
    loaded, stored : int
        Elements that programs load, those of a bias not counted; that they store. Where there are parts these are
        float32, and the kernel that adds them loads them all.
    bytes : int
        That programs load and store, and that are loaded and stored where parts are added. z is float32.
    seconds : float
        The predicted time, with that of adding the parts.
    warps, stages, itemsize : int
        The last: bytes an element of the rows and of the cores.
    """

    tiles: tuple[int, int, int]
    held: bool
    rows: int
    steps: int
    share: int
    parts: int
    programs: int
    flops: int
    scaled: int
    loaded: int
    stored: int
    bytes: int
    seconds: float
    warps: int
    stages: int
    itemsize: int

    @property
    def cost(self) -> Cost:
        """FLOPs and elements of `itemsize` bytes, the adding of parts among them."""
        return Cost(self.flops + self.scaled, self.bytes // self.itemsize)


@lru_cache(maxsize=4096)
def contract_launch(batch: int, i1: int, i2: int, rank: int, dtype: str, table: Table) -> Launch:
    """The launch of `contract`: how many rows a program takes, and how many tiles of i1, as the predicted time says."""
    config = table.kernels["cp_in"][dtype]
    tile, tile1 = config["rank"], fitted(i1, config["i1"])
    ranks, steps = blocks(rank, tile), blocks(i1, tile1)
    unique = batch * i1 * i2 + (i1 + i2) * rank
    found = []
    for rows, parts in itertools.product(_shares(batch), _shares(min(steps, _MOST_PARTS))):
        share = blocks(steps, parts)
        parts, groups = blocks(steps, share), blocks(batch, rows)
        held = share == 1 and i2 <= config["i2"]
        tile2 = fitted(i2, config["i2"]) if held else config["step"]
        inner = blocks(i2, tile2)
        factors = (groups if held else batch) * (i1 + steps * i2)
        made = Launch(
            (tile, tile1, tile2), held, rows, steps, share, parts,
            programs=ranks * groups * parts,
            flops=2 * batch * ranks * steps * inner * tile * tile1 * tile2,
            scaled=batch * ranks * steps * tile * tile1,
            loaded=batch * ranks * i1 * i2 + factors * rank,
            stored=parts * batch * rank,
            bytes=0, seconds=0.0, warps=config["warps"], stages=config["stages"], itemsize=itemsize(dtype),
        )  # fmt: skip
        found.append(_priced(made, rows * share * inner, unique, 0, 4, dtype, table))
    return min(found, key=lambda one: one.seconds)


@lru_cache(maxsize=4096)
def expand_launch(batch: int, o1: int, o2: int, rank: int, dtype: str, table: Table) -> Launch:
    """The launch of `expand`: how many rows a program takes, and how many tiles of the rank, as the time says."""
    config = table.kernels["cp_out"][dtype]
    tiles = fitted(o1, config["o1"]), fitted(o2, config["o2"]), config["rank"]
    tiles1, tiles2, steps = (blocks(size, tile) for size, tile in zip((o1, o2, rank), tiles, strict=True))
    unique = batch * o1 * o2 + (o1 + o2 + batch) * rank
    found = []
    at_a_time = [rows for rows in _shares(config["rows"]) if rows < 2 * batch]
    for rows, parts in itertools.product(at_a_time, _shares(min(steps, _MOST_PARTS))):
        share = blocks(steps, parts)
        parts, groups = blocks(steps, share), blocks(batch, rows)
        of_z = batch * tiles1 * tiles2 * rank
        made = Launch(
            tiles, False, rows, steps, share, parts,
            programs=tiles1 * tiles2 * groups * parts,
            flops=2 * groups * rows * tiles1 * tiles2 * steps * math.prod(tiles),
            scaled=groups * rows * tiles1 * tiles2 * steps * tiles[0] * tiles[2],
            loaded=groups * (tiles2 * o1 + tiles1 * o2) * rank + of_z,
            stored=parts * batch * o1 * o2,
            bytes=0, seconds=0.0, warps=config["warps"], stages=config["stages"], itemsize=itemsize(dtype),
        )  # fmt: skip
        found.append(_priced(made, share, unique, of_z, made.itemsize, dtype, table))
    return min(found, key=lambda one: one.seconds)


def _priced(made: Launch, steps: int, unique: int, of_z: int, stored_as: int, dtype: str, table: Table) -> Launch:
    """A launch whose programs take so many steps, with what it moves and its predicted time.

    `unique`: elements of all tensors; `of_z`: of those loaded; `stored_as`: bytes an element of the result.
    """
    moved = made.itemsize * (made.loaded - of_z) + 4 * of_z + stored_bytes(made.stored, made.parts, stored_as)
    adding = finish_bytes(made.stored, made.parts, stored_as)
    unfilled = blocks(made.programs, table.processors) * table.processors / made.programs
    arithmetic = unfilled * (made.flops / table.rates[dtype] + made.scaled / (table.rates["float32"] / 2))
    latency = blocks(made.programs, 2 * table.processors) * (steps + 2) * table.step
    seconds = table.launch + max(arithmetic, latency, moved / table.cache, made.itemsize * unique / table.memory)
    if made.parts > 1:
        seconds += table.launch + adding / table.cache
    return made._replace(bytes=moved + adding, seconds=seconds)


def _shares(most: int) -> list[int]:
    """The powers of two below a number, and it."""
    return [*(1 << k for k in range((most - 1).bit_length())), most]


# -- planning ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def candidate(network: Network, task: Task, machine: Machine) -> Candidate | None:
    """The program, with its predicted time; None where a network is no CP of two modes a side."""
    found = sides(network)
    if found is None:
        return None
    table, rank, rows = table_of(task.arch), network.ranks[0], task.rows
    dtype = backend.elements(task.dtype)
    into = contract_launch(rows, *found["in"].sizes, rank, dtype, table)
    if task.forward:
        launches = [into, expand_launch(rows, *found["out"].sizes, rank, dtype, table)]
    else:
        launches = [contract_launch(rows, *found["out"].sizes, rank, dtype, table)]
        launches += [expand_launch(rows, *found["in"].sizes, rank, dtype, table)] * task.x + [into] * task.cores
    seconds, cost = sum(one.seconds for one in launches), sum((one.cost for one in launches), Cost())
    count = sum(1 + (one.parts > 1) for one in launches)
    largest = max(rows * rank, *(one.stored for one in launches))
    most = network.features("in") * network.features("out")
    for side in found.values() if task.cores else ():
        for k, (m, n) in enumerate((side.sizes, side.sizes[::-1])):
            width, copies = _width(rows, n, rank, most), int(k == 0 and rows > 1)  # of the rows, for the first core
            times = blocks(rank, width)
            elements = 2 * rows * n * rank + (m + n) * rank + (2 * copies + times) * rows * m * n
            moved = Cost(2 * rows * m * n * rank, elements)
            seconds += times * machine.product(1, m, rows * n, width, task.dtype)
            seconds += moved.bytes(task.itemsize) / machine.memory + (copies + 2 * times) * machine.launch
            cost, count, largest = cost + moved, count + copies + 2 * times, max(largest, rows * n * width)
    return Candidate(FusedKhatriRao(network), 0, cost, Cost(), seconds, count, largest)
