"""torch's own lookups on a factorized table: on a compact table of the rows that are looked up alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .gather import RecomputedRows, rows
from .lookup_plan import row_flops
from .network import Network
from .precision import at_least_single, without_autocast

_WORTH_SORTING = 8000
"""FLOPs of a row from which ids are sorted, and each distinct row is computed once.

On one EPYC core sorting and the copy out of the compact table take 110 ns an id; a row of 8000 FLOPs takes 180 ns as
low rank 32 of 128 columns, 500 ns as a tensor train of rank 32. Below, a batch without repeated ids would lose more
than one with many can gain.
"""

_FEW_IDS = 32
"""Fewer ids are not sorted: the calls alone cost more than the rows."""


def _is_eager(ids: Tensor, cores: Sequence[Tensor]) -> bool:
    """Whether operations run as they are called, on values: shapes may then depend on values, and chunks pay."""
    tensors = (ids, *cores)
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        # Fake tensors, meta tensors, distributed tensors have no values of their own.
        or any(tensor.is_meta or type(tensor.data) is not Tensor for tensor in tensors)
        or (ids.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _checked(input: Tensor, num_embeddings: int) -> Tensor:
    """The ids as int64, checked by torch's own lookup: in a table of zeros that takes the memory of one."""
    zeros = torch.zeros(1, 1, dtype=torch.int64, device=input.device).expand(num_embeddings, 1)
    # The sum keeps the check alive in a compiled graph.
    return input + F.embedding(input, zeros).squeeze(-1)


def _distinct(ids: Tensor, narrow: bool) -> tuple[Tensor, Tensor]:
    """The distinct ids in ascending order, and the position of each id among them.

    Shapes do not depend on values, unless `narrow`: as many slots as ids, the last ones unused.
    """
    values, order = ids.sort()
    position = (values != values.roll(1)).cumsum(0)
    position = position - position[:1]
    inverse = torch.empty_like(ids).scatter(0, order, position)
    slots = torch.zeros_like(ids).scatter(0, position, values)
    if narrow and ids.shape[0]:
        slots = slots[: int(position[-1]) + 1]
    return slots, inverse


def _scaled_gradient(table: Tensor, factor: Tensor) -> Tensor:
    """The same values, of which the gradient is multiplied by a factor."""
    scaled = table * factor
    return table.detach() + (scaled - scaled.detach())


def _renormed(table: Tensor, max_norm: float, norm_type: float) -> Tensor:
    """Rows longer than `max_norm` scaled down to it, as torch's embedding_renorm_ does, without writing."""
    norms = torch.linalg.vector_norm(table.detach(), norm_type, dim=1, keepdim=True)
    return table * torch.where(norms > max_norm, max_norm / (norms + 1e-7), torch.ones_like(norms))


def compact_table(
    input: Tensor,
    network: Network,
    cores: Sequence[Tensor],
    shape: tuple[int, int],
    *,
    padding_idx: int | None = None,
    padding_row: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """A table of the rows that are looked up alone, and the input as positions in it.

    Parameters
    ----------
    input : Tensor
        int32 or int64 ids, of any shape.
    network : Network
    cores : sequence of Tensor
        Shapes ``network.core_shapes``.
    shape : (int, int)
        Rows and columns of the whole table, padding of the modes not counted.
    padding_idx : int, optional
        An id whose row is `padding_row`, (columns,), which gets no gradient; it is then row 0 of the compact table.
    max_norm, norm_type
        Rows with a larger norm are scaled down to it; the factor has no gradient.
    scale_grad_by_freq : bool
        The gradient of a row is divided by how often it is looked up.

    Returns
    -------
    Tensor, Tensor or None
        The rows, (k, columns), in the dtype of the cores; and positions of the shape of `input`. None where the rows
        are those of the input, one by one.

    Raises
    ------
    IndexError
        If an id is below 0 or not below the number of rows. (On CUDA: a device assertion, as torch's own.)
    RuntimeError
        If the input's dtype is none that torch's own lookup takes.
    """
    count, width = shape
    ids = _checked(input, count).flatten()
    eager = _is_eager(ids, cores)
    position: Tensor | None = None
    slots = ids
    # Where shapes cannot depend on values, sorting saves no row.
    if scale_grad_by_freq or (eager and ids.shape[0] >= _FEW_IDS and row_flops(network) >= _WORTH_SORTING):
        slots, position = _distinct(ids, eager)
    with without_autocast(cores[0]):
        recompute: Any = RecomputedRows.apply
        table: Tensor = recompute(slots, network, width, *cores) if eager else rows(slots, network, cores, width)
        if scale_grad_by_freq and position is not None:
            # Here, not in torch's lookup: its embedding_bag counts wrongly on the CPU (pytorch#190063).
            counts = torch.zeros_like(slots).scatter_add(0, position, torch.ones_like(ids)).clamp(min=1)
            shares = counts.to(at_least_single(table.dtype)).reciprocal()  # float16 ends at 65504
            table = _scaled_gradient(table, shares.to(table.dtype)[:, None])
        if padding_idx is not None:
            assert padding_row is not None
            table = torch.cat([padding_row[None], table])
            position = torch.arange(ids.shape[0], device=ids.device) if position is None else position
            position = torch.where(ids == padding_idx, 0, position + 1)
        if max_norm is not None:
            table = _renormed(table, max_norm, norm_type)
    return table, None if position is None else position.reshape(input.shape)


def embedding(
    input: Tensor,  # (*), ids
    network: Network,
    cores: Sequence[Tensor],
    shape: tuple[int, int],
    *,
    padding_idx: int | None = None,
    **options: Any,
) -> Tensor:  # (*, columns)
    """``F.embedding`` on a factorized table. Parameters and errors: see `compact_table`."""
    table, position = compact_table(input, network, cores, shape, padding_idx=padding_idx, **options)
    if position is None:
        return table.reshape(*input.shape, shape[1])
    return F.embedding(position, table, None if padding_idx is None else 0)


def embedding_bag(
    input: Tensor,  # (bags, length), or (n,) with offsets
    network: Network,
    cores: Sequence[Tensor],
    shape: tuple[int, int],
    offsets: Tensor | None = None,  # (bags,), or (bags + 1,)
    per_sample_weights: Tensor | None = None,  # the shape of the input
    *,
    mode: str = "mean",
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    **options: Any,
) -> Tensor:  # (bags, columns)
    """``F.embedding_bag`` on a factorized table. Other parameters and errors: see `compact_table`."""
    table, position = compact_table(input, network, cores, shape, padding_idx=padding_idx, **options)
    if position is None:
        position = torch.arange(input.numel(), device=input.device).reshape(input.shape)
    # torch's own function, and its own errors.
    fits = input.dim() == 2 if offsets is None else input.dim() == 1
    if padding_idx is None or not fits or _is_eager(input, cores):
        return F.embedding_bag(
            position,
            table,
            offsets,
            mode=mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=include_last_offset,
            padding_idx=None if padding_idx is None else 0,
        )
    # What that calls in the end; with a padding_idx it would fix the number of rows in an exported graph.
    if offsets is None:
        offsets = torch.arange(0, input.numel(), input.shape[1], device=input.device)
        include_last_offset = False
    weights = None if per_sample_weights is None else per_sample_weights.flatten()
    code = ("sum", "mean", "max").index(mode)
    bags: Tensor = torch._embedding_bag(
        table, position.flatten(), offsets, False, code, False, weights, include_last_offset, 0
    )[0]
    return bags
