"""Products so small that what surrounds them takes longer: a plain chain of torch's operations, decided beforehand."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any

from . import codegen, decision
from .machine import machine
from .network import Network
from .program import Task

SMALL = 100_000
"""FLOPs of the dense product up to which a layer is a plain chain of torch's operations: to save the input alone would
cost more time there than the operations themselves, and what they save is a few kilobytes."""

NAME = "small"
"""The name of the plain chain in an explanation."""


class Small:
    """What a small product runs: a program as torch's plain operations, for up to `rows` rows.

    Parameters
    ----------
    network : Network
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.columns, self.features = network.features("in"), network.features("out")
        self.rows = SMALL // (2 * self.columns * self.features)

    @cached_property
    def run(self) -> codegen.Run:
        """(rows, cores, bias or None) -> result."""
        # So few rows take the same program everywhere, by the constants of the CPU.
        task = Task(decision.rows_class(min(self.rows, 16)))
        return codegen.compiled(decision.decide(self.network, task, machine("cpu")).program)

    def __reduce__(self) -> tuple[Any, ...]:
        return small, (self.network,)

    def __deepcopy__(self, memo: Any) -> Small:
        return self


@lru_cache(maxsize=4096)
def small(network: Network) -> Small:
    """What a product with this network runs where it is small."""
    return Small(network)


def is_small(network: Network, rows: int) -> bool:
    """Whether a product of so many rows is a plain chain."""
    return 0 < rows <= small(network).rows
