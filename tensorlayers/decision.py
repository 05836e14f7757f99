"""Which way to multiply rows with a network is predicted to be fastest: the alternatives, and the choice among them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from . import backend, fused, fused_khatri_rao, fused_rebuild
from .errors import KernelError
from .launch_tables import architecture, refusal
from .lowering import candidates, chunked
from .machine import Machine, machine
from .network import Network
from .precision import itemsize, multiplied_as
from .program import Candidate, Task

ROWS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
"""Decisions are taken for these numbers of rows: others take that of the nearest, as a factor; one row has its own."""

NAMES = ("contraction", "chunks", "merged", "rebuild")
"""The ways that torch's operations make: the cores one by one; that, some rows at a time; after some cores are
multiplied with each other (the factors of CP to a Khatri-Rao product, those of Tucker to a Kronecker product); or after
all of them are, to the dense weight."""

KERNELS: dict[str, Callable[[Network, Task, Machine], Candidate | None]] = {
    "fused": fused.candidate,
    "fused_rebuild": fused_rebuild.candidate,
    "fused_khatri_rao": fused_khatri_rao.candidate,
}
"""The ways that Triton kernels make: two (groups of) cores meet the rows in one kernel; a kernel forms the dense weight
where it belongs; the Khatri-Rao products of CP are formed in registers alone."""

_MISSING = {
    "contraction": "",
    "chunks": "all rows fit into one chunk",
    "merged": "no cores that are worth multiplying with each other",
    "rebuild": "a single core is the dense weight itself",
    "fused": "no two cores that can meet the rows in one kernel",
    "fused_rebuild": "torch forms the dense weight without a copy, or no kernel does",
    "fused_khatri_rao": "no CP of two modes a side",
}

TRITON = "triton"
"""What is demanded where any of the ways that Triton kernels make will do."""

MARGIN = 1.12
"""What a prediction is raised by before it is held against dense's: it is to err to the slow side, since a layer that
it finds fast is converted."""


@dataclass(frozen=True)
class Option:
    """One way, with what it is predicted to take.

    Parameters
    ----------
    name : str
    candidate : Candidate or None
        None where the way does not exist for this network.
    refusal : str
        Why it is not taken; empty for the one that is.
    """

    name: str
    candidate: Candidate | None
    refusal: str

    @property
    def seconds(self) -> float | None:
        """The predicted time; None where the way does not exist."""
        return self.candidate.seconds if self.candidate else None


def rows_class(rows: int) -> int:
    """The number of rows that a decision for `rows` is taken for."""
    if rows <= 1:
        return 1
    for small, large in itertools.pairwise(ROWS[1:]):
        if rows * rows <= small * large:
            return small
    return ROWS[-1]


def task_for(x: Tensor, *, x_gradient: bool = False, core_gradients: bool = False, kernels: bool = False) -> Task:
    """The task of rows like these (the first dimension), by their class; `kernels`: Triton's may carry it out."""
    arch = architecture(x.device) if kernels else ""
    dtype = multiplied_as(x.dtype, x.device.type)
    return Task(rows_class(x.shape[0]), x_gradient, core_gradients, dtype, x.dtype.itemsize, arch)


def options(network: Network, task: Task, on: Machine, forced: str | None = None) -> tuple[Option, ...]:
    """All ways that torch's operations make, and Triton's kernels where the task allows it, the chosen one without a
    refusal."""
    return _options(network, task, on, forced, torch.get_num_threads() if on.threads else 0)


@lru_cache(maxsize=1024)
def _options(network: Network, task: Task, on: Machine, forced: str | None, threads: int) -> tuple[Option, ...]:
    whole = candidates(network, task, on, threads)
    pieces = [chunked(network, task, on, variant, threads) for variant in ("contraction", "merged")]
    inside = min((piece for piece in pieces if piece), key=lambda piece: piece.seconds, default=None)
    found: dict[str, Candidate | None] = {name: whole.get(name) for name in NAMES}
    found["chunks"] = inside
    if task.arch:
        found.update({name: candidate(network, task, on) for name, candidate in KERNELS.items()})
    existing = {name: candidate for name, candidate in found.items() if candidate}
    # Little memory is no matter; else a step of training is to take no more than dense's and once more its weight.
    most = max(network.features("in") * network.features("out"), on.cache // task.itemsize)
    held = {name: c.program.intermediate * task.rows for name, c in existing.items() if not c.chunk}
    large = {name for name, elements in held.items() if elements > most}
    allowed = [name for name in existing if name not in large] or list(existing)
    best = min(allowed, key=lambda name: existing[name].seconds)
    if forced == TRITON or forced in KERNELS:
        able = existing.keys() & (KERNELS.keys() if forced == TRITON else {forced})
        if not able:
            reasons = "; ".join(f"{name}: {_MISSING[name]}" for name in KERNELS if forced in (TRITON, name))
            raise KernelError(f"no Triton kernel supports this call: {reasons}")
        forced = min(able, key=lambda name: existing[name].seconds)
    chosen = forced if forced in existing else best
    listed = []
    for name, candidate in found.items():
        if candidate is None:
            refusal = _MISSING[name] + (f"; {forced!r} is demanded in vain" if name == forced else "")
        elif name == chosen:
            refusal = ""
        elif forced in existing:
            refusal = f"{forced!r} is demanded"
        elif name in large:
            refusal = f"{held[name] * task.itemsize / 1e6:.0f} MB between its steps"
        else:
            times = candidate.seconds / existing[best].seconds
            refusal = f"predicted {times:.2f} x the time of {best}"
        listed.append(Option(name, candidate, refusal))
    return tuple(listed)


def options_for(network: Network, task: Task, on: Machine, forced: str | None = None) -> tuple[Option, ...]:
    """`options` of a task of any number of rows: those of its class, with the times and costs of so many rows."""
    classed = replace(task, rows=rows_class(task.rows))
    found = []
    for option in options(network, classed, on, forced):
        candidate = option.candidate
        if candidate is not None:
            share = task.rows / classed.rows
            in_proportion = candidate.seconds / classed.rows

            def seconds(rows: int, name: str = option.name, in_proportion: float = in_proportion) -> float:
                (there,) = (o for o in options(network, replace(task, rows=rows), on, forced) if o.name == name)
                return in_proportion * rows if there.seconds is None else there.seconds

            candidate = replace(candidate, cost=candidate.cost_at(share), seconds=interpolated(task.rows, seconds))
        found.append(replace(option, candidate=candidate))
    return tuple(found)


def decide(network: Network, task: Task, on: Machine, forced: str | None = None) -> Candidate:
    """The candidate that is taken."""
    for option in options(network, task, on, forced):
        if option.candidate and not option.refusal:
            return option.candidate
    raise AssertionError("one option is taken")


def predicted(network: Network, task: Task, on: Machine, forced: str | None = None) -> float:
    """Seconds of a task of any number of rows."""
    return interpolated(task.rows, lambda rows: decide(network, replace(task, rows=rows), on, forced).seconds)


def interpolated(rows: int, seconds: Callable[[int], float]) -> float:
    """The time that any number of rows takes, from the times of the classes around it; beyond them, in proportion."""
    if rows >= ROWS[-1]:
        return seconds(ROWS[-1]) * rows / ROWS[-1]
    for small, large in itertools.pairwise(ROWS):
        if small <= rows < large:
            share = (rows - small) / (large - small)
            return seconds(small) if not share else (1 - share) * seconds(small) + share * seconds(large)
    return seconds(ROWS[0])


def planned_task(rows: int, on: Machine, dtype: str = "float32", *, gradients: bool = False) -> Task:
    """A task that is not carried out now; on a GPU, Triton kernels are taken to be there for it."""
    is_fast = not on.threads and dtype in ("float16", "bfloat16", "tf32") and backend.is_present()
    arch = architecture(on.name) if is_fast else ""
    return Task(rows, gradients, gradients, dtype, itemsize(dtype), "" if arch and refusal(arch) else arch)


def training_seconds(network: Network, rows: int, on: Machine, dtype: str = "float32") -> float:
    """Predicted seconds of a forward and a backward of all gradients."""
    ahead, back = (planned_task(rows, on, dtype, gradients=gradients) for gradients in (False, True))
    return sum(predicted(network, task, on) for task in (ahead, back)) + on.function


def cautious_seconds(network: Network, rows: int, on: Machine, *, training: bool, dtype: str = "float32") -> float:
    """What plans go by: the predicted seconds of a forward, or of `training_seconds`, raised by `MARGIN`."""
    if training:
        return MARGIN * training_seconds(network, rows, on, dtype)
    return MARGIN * predicted(network, planned_task(rows, on, dtype), on)


def dense_seconds(
    out_features: int,
    in_features: int,
    rows: int,
    on: Machine,
    *,
    x: bool = False,
    weight: bool = False,
    dtype: str = "float32",
) -> float:
    """Predicted seconds of a dense linear layer: a forward, and a backward of the gradients that are wanted."""
    products = [(rows, in_features, out_features)]
    products += [(rows, out_features, in_features)] * x
    products += [(out_features, rows, in_features)] * weight
    return sum(on.alone(1, *sizes, dtype, itemsize(dtype)) for sizes in products)


def machine_of(x: Tensor) -> Machine:
    """The constants of the device of a tensor."""
    return machine(x.device.type)
