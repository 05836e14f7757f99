"""How rows of a factorized table are contracted, and what that costs.

A core that carries row modes is gathered by the digits of the ids, its row modes then are the batch index; all else
is a pairwise contraction.
"""

from __future__ import annotations

from functools import lru_cache

from . import contraction
from .contraction import BATCH, Plan
from .cost import Cost, volume
from .network import Network


@contraction.constant_when_compiled
def row_modes(network: Network) -> tuple[tuple[str, ...], ...]:
    """The row modes (role in) that each core carries, most significant digit first."""
    return _row_modes(network)


@lru_cache(maxsize=4096)
def _row_modes(network: Network) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(name for name in network.names("in") if name in core) for core in network.cores)


def rows_first(network: Network) -> Network:
    """The network with the row modes of each core leading (after a stack's), so that a lookup gathers whole slices."""
    stack = network.names("stack")
    cores = []
    for core, rows in zip(network.cores, row_modes(network), strict=True):
        lead = (*(name for name in stack if name in core), *rows)
        cores.append((*lead, *(name for name in core if name not in lead)))
    return Network(tuple(cores), network.sizes, network.modes)


@contraction.constant_when_compiled
def lookup_plan(network: Network, batch: int, shared: int | None = None) -> Plan:
    """The plan of a lookup of `batch` ids: the gathered cores, which carry the batch index, with the others.

    Of the core at position `shared`, if any, all rows have the same slice.
    """
    return _lookup_plan(network, batch, shared)


@lru_cache(maxsize=4096)
def _lookup_plan(network: Network, batch: int, shared: int | None) -> Plan:
    terms = tuple(
        (*((BATCH,) if rows and k != shared else ()), *(name for name in core if name not in rows))
        for k, (core, rows) in enumerate(zip(network.cores, row_modes(network), strict=True))
    )
    sizes = tuple((name, size) for name, size in network.sizes if name not in network.names("in"))
    return contraction.plan(terms, (BATCH, *network.names("out")), (*sizes, (BATCH, batch)))


def lookup_cost(network: Network, batch: int) -> Cost:
    """The cost of a lookup of `batch` distinct ids: the slices gathered (read and written), and the contraction."""
    plan = lookup_plan(network, contraction.batch_class(batch)).resized(BATCH, batch)
    sizes = dict(plan.sizes)
    return plan.cost + Cost(0, 2 * sum(volume(term, sizes) for term in plan.terms if BATCH in term))


@contraction.constant_when_compiled
def row_flops(network: Network) -> int:
    """FLOPs of a lookup of one row."""
    return _row_flops(network)


@lru_cache(maxsize=4096)
def _row_flops(network: Network) -> int:
    return lookup_plan(network, 1).flops
