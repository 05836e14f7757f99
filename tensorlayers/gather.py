"""Rows of a factorized table by their ids: slices of the cores are gathered and contracted, as `lookup_plan` says.

Nothing of the size of the table is ever formed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import contraction
from .contraction import BATCH, Plan
from .cost import volume
from .fused_lookup import found_chain, kernel, readable
from .lookup_plan import lookup_plan, row_modes
from .network import Network
from .precision import at_least_single, without_autocast

_CHUNK_BYTES = {"cpu": 2**22, "cuda": 2**28}
"""What a chunk of rows may hold at once, gathered slices and intermediates: on the CPU it fits a shared cache, and is
far above what a chunk costs to start (some 50 us)."""

_SHARED_SLICE = 4096
_SHARED_ROWS = 16
"""On the CPU, rows with the same slice of a core are a chunk where a slice has so many elements, and so many rows are
expected to share one: the slice is then not gathered for each row. Tensor train of order 3, 4096 ids on 100 slices of
55 x 4 x 55: forward 26 -> 19 ms, with backward 264 -> 94 ms."""


def _address(ids: Tensor, names: Sequence[str], network: Network) -> Tensor:
    """Where a core has the rows: the digits of the ids in its row modes, joined to one index."""
    order, sizes = network.names("in"), network.mode_sizes("in")
    positions = [order.index(name) for name in names]
    address: Tensor | None = None
    while positions:
        # Neighbouring digits are one number already.
        run = 1
        while run < len(positions) and positions[run] == positions[run - 1] + 1:
            run += 1
        first, last = positions[0], positions[run - 1]
        stride, count = math.prod(sizes[last + 1 :]), math.prod(sizes[first : last + 1])
        digit = ids if stride == 1 else ids // stride
        digit = digit if first == 0 else digit % count
        address = digit if address is None else address * count + digit
        positions = positions[run:]
    assert address is not None
    return address


def _flat(core: Tensor, names: Sequence[str], rows: Sequence[str]) -> Tensor:
    """A core with its row modes joined to the first axis: a view where they lead, as `rows_first` arranges them."""
    order = [*rows, *(name for name in names if name not in rows)]
    return core.permute([names.index(name) for name in order]).flatten(0, len(rows) - 1)


def _unflat(flat: Tensor, names: Sequence[str], rows: Sequence[str], network: Network) -> Tensor:
    """The inverse of `_flat`."""
    order = [*rows, *(name for name in names if name not in rows)]
    shaped = flat.reshape([network.size[name] for name in order])
    return shaped.permute([order.index(name) for name in names])


def rows(
    ids: Tensor,  # (n,), integers from 0 to network.features("in") - 1
    network: Network,
    cores: Sequence[Tensor],  # shapes network.core_shapes
    width: int | None = None,
) -> Tensor:  # (n, width)
    """Rows of a factorized table, by operations that torch can differentiate, trace, export and batch.

    Where torch.compile traces, or a CUDA graph is captured, by the Triton kernel if `fused_lookup` chooses it.

    Parameters
    ----------
    ids : Tensor
        On the device of the cores. They are not checked.
    network : Network
        Its row modes have the role in, its columns' the role out.
    cores : sequence of Tensor
    width : int, optional
        The columns that are wanted; what the out modes hold beyond is padding. By default all.

    Returns
    -------
    Tensor
        The dtype of the cores.
    """
    if _is_recorded(ids) and found_chain(network, cores) is not None:
        recompute: Any = RecomputedRows.apply
        found: Tensor = recompute(ids, network, network.features("out") if width is None else width, *cores)
        return found
    plan = lookup_plan(network, contraction.batch_class(ids.shape[0]))
    table = contraction.execute(plan, _Lookup(ids, network, cores).gathered())
    return table.reshape(ids.shape[0], network.features("out"))[:, :width]


def _is_recorded(ids: Tensor) -> bool:
    """Whether torch.compile, or a CUDA graph, takes down what is to be repeated here."""
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting()
    is_transformed = torch._C._are_functorch_transforms_active()
    return ids.is_cuda and not is_transformed and torch.cuda.is_current_stream_capturing()


class _Lookup:
    """The operands of a lookup, whole or in chunks: gathered slices of the cores with row modes, and the others."""

    def __init__(self, ids: Tensor, network: Network, cores: Sequence[Tensor]) -> None:
        self.network, self.carried = network, row_modes(network)
        self.addresses = [_address(ids, names, network) if names else None for names in self.carried]
        self.flats = [
            _flat(core, names, own) if own else core
            for core, names, own in zip(cores, network.cores, self.carried, strict=True)
        ]

    def gathered(self, part: slice | Tensor = slice(None), shared: tuple[int, int] | None = None) -> list[Tensor]:
        """The operands for a part of the rows; of the core ``shared[0]`` they all have the slice ``shared[1]``."""
        operands = []
        for k, (flat, address) in enumerate(zip(self.flats, self.addresses, strict=True)):
            if shared is not None and shared[0] == k:
                flat = flat[shared[1]]
            elif address is not None:
                flat = flat.index_select(0, address[part])
            operands.append(flat)
        return operands

    def chunks(self, count: int) -> Iterator[tuple[Plan, slice | Tensor, tuple[int, int] | None]]:
        """Plan, rows and shared slice of each chunk of `count` rows."""
        batch, itemsize, device = contraction.batch_class(count), self.flats[0].itemsize, self.flats[0].device.type
        shared = self._shared(count) if device == "cpu" else None
        plan, chunk = _chunk(self.network, batch, _CHUNK_BYTES.get(device, 2**28) // itemsize, shared)
        address = None if shared is None else self.addresses[shared]
        if shared is None or address is None:
            for start in range(0, count, chunk):
                yield plan, slice(start, start + chunk), None
            return
        sizes = torch.bincount(address, minlength=len(self.flats[shared])).tolist()
        for digit, members in enumerate(torch.split(address.argsort(), sizes)):
            for part in torch.split(members, chunk) if len(members) else ():
                yield plan, part, (shared, digit)

    def _shared(self, count: int) -> int | None:
        """The core with the largest slices, where they are large and shared by many rows."""
        slices = [
            0 if address is None else flat[0].numel() for flat, address in zip(self.flats, self.addresses, strict=True)
        ]
        largest = max(range(len(slices)), key=slices.__getitem__)
        pays = slices[largest] >= _SHARED_SLICE and count >= _SHARED_ROWS * len(self.flats[largest])
        return largest if pays and sum(address is not None for address in self.addresses) > 1 else None


@lru_cache(maxsize=4096)
def _chunk(network: Network, batch: int, elements: int, shared: int | None) -> tuple[Plan, int]:
    """The plan of one chunk of a batch class, and how many rows that is."""
    plan = lookup_plan(network, batch, shared).resized(BATCH, 1)
    sizes = dict(plan.sizes)
    held = sum(volume(term, sizes) for term in plan.terms if BATCH in term)
    held += max((volume(step.result, sizes) for step in plan.steps[:-1] if BATCH in step.result), default=0)
    chunk = max(elements // max(held, 1), 16)
    return lookup_plan(network, contraction.batch_class(min(chunk, batch)), shared), chunk


class RecomputedRows(torch.autograd.Function):
    """`rows` in chunks, or by the Triton kernel. Saves the ids and the cores alone; the backward gathers anew."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, network: Network, width: int, *cores: Tensor) -> Tensor:
        ctx.save_for_backward(ids, *cores)
        ctx.network, ctx.width, ctx.chain = network, width, found_chain(network, cores)
        if ctx.chain is not None:
            found: Tensor = kernel("lookup")(ids, readable(cores), ctx.chain, width)
            return found
        lookup, count = _Lookup(ids, network, cores), len(ids)
        table = None
        for plan, part, shared in lookup.chunks(count):
            values = contraction.execute(plan, lookup.gathered(part, shared)).flatten(1)
            if values.shape == (count, width) and shared is None:
                # Not a view, of which autograd would forbid the user to change it in place.
                whole: Tensor = torch.ops.aten._unsafe_view(values, values.shape)
                return whole
            table = cores[0].new_empty(count, width) if table is None else table
            if isinstance(part, slice):
                table[part] = values[:, :width]
            else:
                table.index_copy_(0, part, values[:, :width])
        return cores[0].new_empty(0, width) if table is None else table

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ids, *cores = ctx.saved_tensors
        network, width, needed = ctx.network, ctx.width, ctx.needs_input_grad[3:]
        # A gradient of this gradient is wanted, or several at once; what is compiled is differentiated once.
        plain = not torch.compiler.is_compiling() and (
            torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grads[0])
        )
        if ctx.chain is not None and not plain:
            grad, *cores = readable((grads[0], *cores))
            found = iter(kernel("lookup_gradients")(grad, ids, cores, ctx.chain, list(needed)))
            return None, None, None, *(next(found) if need else None for need in needed)
        with without_autocast(cores[0]):
            if plain:
                wanted = [core for core, need in zip(cores, needed, strict=True) if need]
                with torch.enable_grad():
                    table = rows(ids, network, cores, width)
                found = iter(torch.autograd.grad(table, wanted, grads, create_graph=torch.is_grad_enabled()))
                return None, None, None, *(next(found) if need else None for need in needed)
            return None, None, None, *_core_gradients(ids, network, cores, grads[0], needed)


def _core_gradients(
    ids: Tensor, network: Network, cores: Sequence[Tensor], grad: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of the cores that need one, from that of the rows, (n, width)."""
    lookup = _Lookup(ids, network, cores)
    wide = at_least_single(cores[0].dtype)
    totals = [
        torch.zeros_like(flat, dtype=wide) if need else None for flat, need in zip(lookup.flats, needed, strict=True)
    ]
    shape = [-1, *network.mode_sizes("out")]
    for plan, part, shared in lookup.chunks(len(ids)):
        slope = F.pad(grad[part], (0, network.features("out") - grad.shape[1])).reshape(shape)
        leaves = [
            operand.detach().requires_grad_(need)
            for operand, need in zip(lookup.gathered(part, shared), needed, strict=True)
        ]
        with torch.enable_grad():
            table = contraction.execute(plan, leaves)
        found = iter(torch.autograd.grad(table, [leaf for leaf in leaves if leaf.requires_grad], slope))
        for k, (total, address) in enumerate(zip(totals, lookup.addresses, strict=True)):
            if total is None:
                continue
            if address is None:
                total += next(found)
            elif shared is not None and shared[0] == k:
                total[shared[1]] += next(found)
            else:
                total.index_add_(0, address[part], next(found).to(wide))
    return [
        None if total is None else (_unflat(total, names, own, network) if own else total).to(core.dtype)
        for total, names, own, core in zip(totals, network.cores, lookup.carried, cores, strict=True)
    ]
