"""Whether rows of a factorized table are looked up by the Triton kernel, and what that is predicted to take."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backend, contraction
from .cost import Cost
from .errors import KernelError
from .launch_tables import Table, architecture, itemsize
from .launch_tables import table as launch_table
from .lookup_plan import lookup_cost
from .network import Network
from .precision import multiplied_as

_NO_TRAIN = "the table is no tensor train of two or three cores with a row mode each"
_MANY = contraction.BATCH_CLASSES[-1]


class Estimate(NamedTuple):
    """FLOPs and elements moved, and the predicted time in seconds, None where there is none."""

    cost: Cost
    seconds: float | None

    def times(self, count: int) -> Estimate:
        """That of so many rows."""
        return Estimate(self.cost * count, None if self.seconds is None else self.seconds * count)


def kernels() -> str:
    """Whether rows are looked up by the Triton kernel.

    "none": never; "auto": on a GPU, where that is predicted to be faster; "only": always, and a KernelError where it
    cannot. What is exported, and what torch.func transforms, runs by torch's operations.
    """
    return {"auto": "auto", "torch": "none", "triton": "only"}[backend.mode()]


def kernel(name: str) -> Any:
    """A kernel, as an operator where torch.compile traces."""
    if torch.compiler.is_compiling():
        return getattr(torch.ops.tensorlayers, name)
    return backend.load(name).run


def readable(tensors: Sequence[Tensor]) -> list[Tensor]:
    """As a kernel reads them; of an operator torch sees to that itself."""
    return list(tensors) if torch.compiler.is_compiling() else list(map(backend.readable, tensors))


def found_chain(network: Network, cores: Sequence[Tensor]) -> tuple[int, ...] | None:
    """The chain that the Triton kernel looks up, as it describes one; None for torch's operations.

    Raises
    ------
    KernelError
        If the kernel is demanded by `use_kernels`, and cannot.
    """
    mode = kernels()
    if mode == "none" or (mode == "auto" and not cores[0].is_cuda):
        return None
    chain, reason = _found(network, mode, *_kind(cores))
    if mode == "only" and reason:
        raise KernelError(f"no Triton kernel supports this lookup: {reason}")
    return chain


def refusal(network: Network, cores: Sequence[Tensor]) -> str:
    """Why rows are not looked up by the Triton kernel; empty where they are. It raises what `found_chain` does."""
    mode, reason = kernels(), ""
    if found_chain(network, cores) is None:
        reason = _found(network, mode, *_kind(cores))[1]
        if mode == "none":
            reason = reason or backend.SWITCHED_OFF
        elif not cores[0].is_cuda:
            reason = reason or backend.INTERPRETED
    return reason


def _kind(cores: Sequence[Tensor]) -> tuple[str, int | None, tuple[torch.dtype, ...]]:
    """What the choice depends on beside the network: the type and number of the device, and the dtypes."""
    device = cores[0].device
    return device.type, device.index, tuple(dict.fromkeys(core.dtype for core in cores))


# A compiled graph keeps what is found: neither the search nor an import can be traced.
@contraction.constant_when_compiled
def _found(
    network: Network, mode: str, device: str, index: int | None, dtypes: tuple[torch.dtype, ...]
) -> tuple[tuple[int, ...] | None, str]:
    """The chain, or None and why."""
    dtype = multiplied_as(dtypes[0], device)
    reason = backend.refusal(device, dtype) if len(dtypes) == 1 else "cores of several dtypes"
    if reason is not None:
        return None, reason
    backend.load("lookup_gradients")
    chain = backend.load("lookup").train(network)
    if chain is None:
        return None, _NO_TRAIN
    if mode == "auto" and device == "cuda":
        table = launch_table(architecture(device if index is None else f"{device}:{index}"))
        by_torch, by_kernel = estimates(network, backend.elements(dtype), table)
        assert by_kernel is not None
        assert by_kernel.seconds is not None
        assert by_torch.seconds is not None
        if by_kernel.seconds > by_torch.seconds:
            return None, f"predicted {by_kernel.seconds / by_torch.seconds:.3g} x the time of torch's operations"
    return chain, ""


@lru_cache(maxsize=4096)
def estimates(network: Network, dtype: str, table: Table) -> tuple[Estimate, Estimate | None]:
    """Torch's operations, and the Triton kernel, None where there is none; by the time of a row among many.

    Torch's read and write the slice of each core, then read them again for products that lie in memory between each
    other; the kernel reads slices from the cache, and writes nothing but the row. It is one launch where those are
    eight at least, so that it is the faster one for few rows too. What it can lose is arithmetic, at modes and ranks
    that fill no tile: its own time is compared with that of torch's arithmetic and of all that is moved beside it.
    Gradients are chains of the same matrices, and move as much in proportion: what holds for rows holds for them.
    """
    cost = lookup_cost(network, _MANY)
    seconds = cost.flops / table.rates[dtype] + cost.bytes(itemsize(dtype)) / table.memory
    by_torch = Estimate(Cost(cost.flops // _MANY, cost.elements // _MANY), seconds / _MANY)
    module = backend.load("lookup")
    return by_torch, None if module.train(network) is None else Estimate(*module.predicted(network, dtype, table))
