"""explain(layer, x): what runs when a layer is applied to an input, and why not another way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from . import backend, decision, dispatch, fused_lookup, lookup_plan, small, table
from .cost import Cost, dense_linear
from .errors import NetworkError
from .fused_lookup import Estimate
from .launch_tables import device_table
from .layers import (
    FactorizedEmbedding,
    FactorizedEmbeddingBag,
    FactorizedLayer,
    FactorizedLinear,
    TensorContraction,
    TensorRegression,
)
from .machine import Machine
from .network import Network
from .precision import cast_for_autocast, multiplied_as
from .program import Candidate, Task
from .slices import slices

FROZEN, STORED = "dense (frozen)", " (stored)"

Linear = FactorizedLinear | TensorRegression | TensorContraction
"""The layers that are a linear product, which can be explained ..."""

Lookup = FactorizedEmbedding | FactorizedEmbeddingBag
"""... and those that are a lookup."""


@dataclass(frozen=True)
class Row:
    """One way to compute a layer.

    Parameters
    ----------
    name : str
        Of a product one of `dispatch.NAMES`; `FROZEN`, torch's own layer, which is there to compare with too; one of
        these names and `STORED`, a plain chain whose activations are kept for backward; or `small.NAME`, a plain chain
        because the product is small. The estimate of a plain chain is that of the option it carries out, the most that
        its gradients take. Of a lookup "contraction", of slices that are gathered, or a Triton kernel, "lookup" and
        for the gradients "lookup_gradients", of which there is no estimate; or `FROZEN`.
    seconds : float or None
        The predicted time at the number of rows given, in seconds; None where there is no estimate.
    cost : Cost or None
        FLOPs and elements moved at that number of rows; None where there is no estimate.
    chunk : int
        Rows at a time; 0: all.
    refusal : str
        Why it is not taken; empty for the one that is.
    note : str
        How it is carried out, of the one that is taken: in slices of a bond, where merged cores would take more memory
        than the dense weight.
    """

    name: str
    seconds: float | None
    cost: Cost | None
    chunk: int
    refusal: str
    note: str = ""


@dataclass(frozen=True)
class Explanation:
    """The ways to compute a product; prints as a table.

    Parameters
    ----------
    title : str
    rows : tuple of Row
        Of the forward.
    backward : tuple of Row
        Of the gradients; empty where none are wanted.
    itemsize : int
        Bytes an element.
    """

    title: str
    rows: tuple[Row, ...]
    backward: tuple[Row, ...]
    itemsize: int

    @property
    def chosen(self) -> str:
        """The name of the way that the forward takes."""
        return next(row.name for row in self.rows if not row.refusal)

    def __str__(self) -> str:
        lines = [self.title]
        for what, rows in (("forward", self.rows), ("gradients", self.backward)):
            if rows:
                head = (what, "estimate", "FLOPs", "bytes", "rows at a time", "")
                lines += table.lines(head, [self._line(row) for row in rows])
        return "\n".join(lines)

    def _line(self, row: Row) -> tuple[str, ...]:
        seconds = "-" if row.seconds is None else duration(row.seconds)
        flops = table.count(row.cost.flops) if row.cost else "-"
        moved = table.count(row.cost.bytes(self.itemsize)) if row.cost else "-"
        rows = str(row.chunk or "all") if row.cost else "-"
        taken = f"<- taken, {row.note}" if row.note else "<- taken"
        return row.name, seconds, flops, moved, rows, row.refusal or taken


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    for factor, unit in ((1e6, "us"), (1e3, "ms")):
        if seconds * factor < 999.5:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def explain(layer: FactorizedLayer, x: Tensor, *, training: bool | None = None) -> Explanation:
    """What runs when a layer is applied to an input, with the estimate of every alternative and why it was refused.

    Parameters
    ----------
    layer : FactorizedLinear, TensorRegression, TensorContraction, FactorizedEmbedding or FactorizedEmbeddingBag
    x : Tensor
        ``(*batch, in_features)`` or ``(*batch, *in_shape)``, or ids of any shape; its shape, dtype, device and
        requires_grad are used, not its values.
    training : bool, optional
        Whether gradients are explained too. By default where a forward now would record them.

    Returns
    -------
    Explanation
        Printed, a table of times; `chosen` is the name of what runs.

    Raises
    ------
    NetworkError
        If the layer is no linear product and no lookup, or the input does not fit.
    KernelError
        If an implementation is demanded that there is not for this network, or a kernel that does not support the call.

    Examples
    --------
    >>> import torch
    >>> from tensorlayers import FactorizedLinear, LowRank
    >>> layer = FactorizedLinear(768, 3072, format=LowRank(64))
    >>> explain(layer, torch.zeros(256, 768)).chosen
    'contraction'
    """
    if isinstance(layer, Lookup):
        return _explain_lookup(layer, x, training)
    if not isinstance(layer, Linear):
        known = ", ".join(kind.__name__ for kind in (*get_args(Linear), *get_args(Lookup)))
        raise NetworkError(f"explain: linear products and lookups, those of {known}; got {type(layer).__name__}")
    shape = _shape(layer, "in")
    if not isinstance(x, Tensor) or x.shape[-len(shape) :] != shape:
        expected = f"dimension is in_features = {shape[0]}" if len(shape) == 1 else f"dimensions are in_shape = {shape}"
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise NetworkError(f"input: a tensor whose last {expected}; got {got}")
    given, core = cast_for_autocast(x, layer.cores[0])
    if given.dtype != core.dtype:
        raise NetworkError(f"input: the dtype of the cores, {core.dtype}; got {given.dtype}")
    network, count = layer.own_network, max(x.numel() // math.prod(shape), 1)
    rows = given.new_empty(1, 1).expand(count, network.features("in"))
    needs = x.requires_grad, any(core.requires_grad for core in layer.cores)
    if training is None:
        training = torch.is_grad_enabled() and any(needs)
    kernels = dispatch.kernels_for(rows, layer.implementation)[1]
    task = replace(decision.task_for(rows, kernels=kernels), rows=count)
    of_x, of_cores = needs if any(needs) else (True, not layer.frozen)
    taken = _overriding(layer, rows, training)
    title = _title(layer, count, task.dtype, decision.machine_of(x))
    ahead = _rows(layer, rows, task, taken)
    back = _rows(layer, rows, replace(task, x=of_x, cores=of_cores), taken) if training else ()
    return Explanation(title, ahead, back, task.itemsize)


def _title(layer: FactorizedLayer, count: int, dtype: str, on: Machine) -> str:
    shapes = _shape(layer, "in"), _shape(layer, "out")
    sides = ", ".join(str(side if len(side) > 1 else side[0]) for side in shapes)
    return (
        f"{type(layer).__name__}({sides}), {layer.format}, ranks "
        f"{','.join(map(str, layer.network.ranks)) or '-'}; {_counted(count, 'row')}, {dtype}, "
        f"{on.name} ({_counted(torch.get_num_threads(), 'thread')})"
    )


def _shape(layer: FactorizedLayer, role: str) -> tuple[int, ...]:
    return tuple(axis.size for axis in layer.axes if axis.role == role)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _rows(layer: Linear, rows: Tensor, task: Task, taken: str) -> tuple[Row, ...]:
    """The ways to carry out a task; `taken` is what runs in place of the options of `decision`."""
    network, on = layer.own_network, decision.machine_of(rows)
    found, chain = [], None
    forced = dispatch.kernels_for(rows, layer.implementation)[0]
    for option in decision.options_for(network, task, on, forced):
        refusal = option.refusal or (f"{taken} runs" if taken else "")
        found.append(_row(option.name, option.candidate, refusal, "" if refusal else _note(network, option.candidate)))
        is_chain = not option.refusal if taken == small.NAME else taken == option.name + STORED
        chain = option.candidate if is_chain else chain
    if not task.arch:
        found += [Row(name, None, None, 0, _without_kernels(rows)) for name in decision.KERNELS]
    dense, cost = _dense(math.prod(_shape(layer, "out")), math.prod(_shape(layer, "in")), task, on)
    found.append(Row(FROZEN, dense, cost, 0, "" if taken == FROZEN else "the layer is not frozen: see freeze()"))
    if taken == small.NAME or taken.endswith(STORED):
        found.append(replace(_row(taken, chain, ""), chunk=0))
    return tuple(found)


def _row(name: str, candidate: Candidate | None, refusal: str, note: str = "") -> Row:
    if candidate is None:
        return Row(name, None, None, 0, refusal)
    return Row(name, candidate.seconds, candidate.cost, candidate.chunk, refusal, note)


def _without_kernels(rows: Tensor) -> str:
    """Why Triton kernels may not run."""
    dtype = multiplied_as(rows.dtype, rows.device.type)
    reason = backend.refusal(rows.device.type, dtype)
    if reason is None and dtype == "float32" and rows.is_cuda:
        reason = dispatch.FULL_PRECISION
    if reason is None and rows.is_cpu and backend.mode() == "auto":
        reason = backend.INTERPRETED
    return reason or backend.SWITCHED_OFF


def _note(network: Network, candidate: Candidate | None) -> str:
    pieces = slices(network, candidate.program) if candidate is not None else ()
    return f"in {len(pieces)} slices of bond {pieces[0].bond}" if pieces else ""


def _overriding(layer: Linear, rows: Tensor, training: bool) -> str:
    """What runs in place of the options of `decision`; empty where one of these does."""
    network, demanded = layer.own_network, layer.implementation
    if layer.frozen:
        return FROZEN
    if dispatch.kernels_for(rows, demanded)[0] in (decision.TRITON, *decision.KERNELS):
        return ""
    if small.is_small(network, len(rows)) and demanded is None:
        return small.NAME
    stored = dispatch.stored_program(network, rows, demanded, layer.backward) if training else None
    if stored is None:
        return ""
    options = decision.options(network, decision.task_for(rows), decision.machine_of(rows))
    return next(option.name for option in options if option.candidate and option.candidate.program is stored) + STORED


def _dense(out_features: int, in_features: int, task: Task, on: Machine) -> tuple[float, Cost]:
    """The estimate for torch's dense layer: of the forward, or of the gradients that are wanted."""

    def seconds(x: bool, weight: bool) -> float:
        sizes = out_features, in_features, task.rows
        return decision.dense_seconds(*sizes, on, x=x, weight=weight, dtype=task.dtype)

    cost, forward = dense_linear(out_features, in_features, task.rows), seconds(False, False)
    if task.forward:
        return forward, cost
    # The three products are of the same sizes, each with another of them contracted.
    return seconds(task.x, task.cores) - forward, sum([cost] * (task.x + task.cores), Cost())


# -- lookups ----------------------------------------------------------------------------------------------------------

_LOOKUPS, _GRADIENTS = ("contraction", "lookup"), ("contraction", "lookup_gradients")


def _explain_lookup(layer: Lookup, ids: Tensor, training: bool | None) -> Explanation:
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise NetworkError(f"input: a tensor of ids, int32 or int64; got {got}")
    cores, count = layer.own_cores(), ids.numel()
    if training is None:
        training = torch.is_grad_enabled() and any(core.requires_grad for core in cores)
    refusal = "a frozen layer reads the dense table" if layer.frozen else fused_lookup.refusal(layer.own_network, cores)
    rows = _lookup_rows(layer, count, refusal)
    back: list[Row] = []
    if training and not layer.frozen:
        # Gradients run as the lookup did. Of what they take there is no estimate.
        back = [Row(name, None, None, 0, row.refusal) for name, row in zip(_GRADIENTS, rows[:2], strict=True)]
    title = _title(layer, count, multiplied_as(cores[0].dtype, cores[0].device.type), decision.machine_of(cores[0]))
    return Explanation(title, tuple(rows), tuple(back), cores[0].itemsize)


def _lookup_rows(layer: Lookup, count: int, refusal: str) -> list[Row]:
    """Torch's operations, the kernel (`refusal`: why it does not run) and the dense table."""
    core, network = layer.cores[0], layer.own_network
    estimates: Sequence[Estimate | None] = (Estimate(lookup_plan.lookup_cost(network, count), None), None)
    dtype = multiplied_as(core.dtype, core.device.type)
    if core.is_cuda and backend.refusal("cuda", dtype) is None:
        row = fused_lookup.estimates(network, backend.elements(dtype), device_table(core.device))
        estimates = [None if one is None else one.times(count) for one in row]
    instead = refusal if layer.frozen else "" if refusal else "the kernel runs"
    rows = []
    for name, why, one in zip(_LOOKUPS, (instead, refusal), estimates, strict=True):
        rows.append(Row(name, None, None, 0, why) if one is None else Row(name, one.seconds, one.cost, 0, why))
    dense = type(layer).dense_cost({"embedding_dim": layer.embedding_dim}, count)
    thawed = "" if layer.frozen else "the layer is not frozen: see freeze()"
    return [*rows, Row(FROZEN, None, dense, 0, thawed)]
