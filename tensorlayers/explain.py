"""explain(layer, x): what runs when a layer is applied to an input, and why not another way."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import decision, dispatch, small, table
from .cost import Cost
from .errors import NetworkError
from .layers import FactorizedLayer, FactorizedLinear
from .machine import Machine
from .network import Network
from .precision import cast_for_autocast
from .program import Task


@dataclass(frozen=True)
class Row:
    """One way to compute a layer.

    Parameters
    ----------
    name : str
        One of `dispatch.NAMES`, "dense (frozen)", or "torch's dense layer", which is there to compare with.
    seconds : float or None
        The predicted time at the number of rows given; None where there is no estimate.
    cost : Cost or None
        FLOPs and elements moved.
    chunk : int
        Rows at a time; 0: all.
    refusal : str
        Why it is not taken; empty for the one that is.
    """

    name: str
    seconds: float | None
    cost: Cost | None
    chunk: int
    refusal: str


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
        return row.name, seconds, flops, moved, str(row.chunk or "all"), row.refusal or "<- taken"


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    for factor, unit in ((1e6, "us"), (1e3, "ms")):
        if seconds * factor < 1000:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def explain(layer: FactorizedLayer, x: Tensor, *, training: bool | None = None) -> Explanation:
    """What runs when a layer is applied to an input, with the estimate of every alternative and why it was refused.

    Parameters
    ----------
    layer : FactorizedLinear
    x : Tensor
        ``(*batch, in_features)``; its shape, dtype and device are used, not its values.
    training : bool, optional
        Whether gradients are explained too. By default where a forward now would record them.

    Returns
    -------
    Explanation
        Printed, a table of times; `chosen` is the name of what runs.

    Raises
    ------
    NetworkError
        If the layer is no linear layer, or the input does not fit.
    """
    if not isinstance(layer, FactorizedLinear):
        raise NetworkError(f"explain: a FactorizedLinear; got {type(layer).__name__}")
    if x.dim() == 0 or x.shape[-1] != layer.in_features:
        raise NetworkError(f"input: the last dimension is in_features = {layer.in_features}; got {tuple(x.shape)}")
    (x,) = cast_for_autocast(x)
    rows = max(x.numel() // layer.in_features, 1)
    core_gradients = any(core.requires_grad for core in layer.cores)
    if training is None:
        training = torch.is_grad_enabled() and (core_gradients or x.requires_grad)
    task = Task(rows, dtype=str(x.dtype).removeprefix("torch."), itemsize=x.dtype.itemsize)
    back = replace(task, x=True, cores=core_gradients or not x.requires_grad)
    title = (
        f"{type(layer).__name__}({layer.in_features}, {layer.out_features}), {layer.format}, ranks "
        f"{','.join(map(str, layer.network.ranks)) or '-'}; {rows} rows, {task.dtype}, "
        f"{decision.machine_of(x).name} ({torch.get_num_threads()} threads)"
    )
    ahead = _rows(layer, x, task)
    return Explanation(title, ahead, _rows(layer, x, back) if training else (), task.itemsize)


def _rows(layer: FactorizedLinear, x: Tensor, task: Task) -> tuple[Row, ...]:
    network, on = layer.own_network, decision.machine_of(x)
    classed = replace(task, rows=decision.rows_class(task.rows))
    scale = task.rows / classed.rows
    taken = _overriding(layer, network, x, task)
    found = []
    for option in decision.options(network, classed, on, layer.implementation):
        candidate = option.candidate
        refusal = option.refusal or (f"{taken} runs" if taken else "")
        if candidate is None:
            found.append(Row(option.name, None, None, 0, option.refusal))
        else:
            cost = Cost(int(candidate.cost.flops * scale), int(candidate.cost.elements * scale))
            found.append(Row(option.name, candidate.seconds * scale, cost, candidate.chunk, refusal))
    for kernel in dispatch.KERNELS:
        reason = dispatch.kernel_refusal(kernel, network, x.device.type, x.dtype)
        found.append(Row(kernel.name, None, None, 0, "" if taken == kernel.name else reason or "not chosen"))
    dense, cost = _dense(layer, task, on)
    found.append(Row(_FROZEN, dense, cost, 0, "" if taken == _FROZEN else "the layer is not frozen: see freeze()"))
    if taken == small.NAME:
        found.append(Row(small.NAME, None, None, 0, ""))
    return tuple(found)


_FROZEN = "dense (frozen)"


def _overriding(layer: FactorizedLinear, network: Network, x: Tensor, task: Task) -> str:
    """What runs in place of the options of `decision`; empty where one of these does."""
    if layer.frozen:
        return _FROZEN
    kernel = dispatch.chosen_kernel(network, x, layer.implementation)
    if kernel is not None:
        return kernel
    return small.NAME if small.is_small(network, task.rows) and layer.implementation is None else ""


def _dense(layer: FactorizedLinear, task: Task, on: Machine) -> tuple[float, Cost]:
    """The estimate for torch's dense layer."""

    def seconds(training: bool) -> float:
        sizes = layer.out_features, layer.in_features, task.rows
        return decision.dense_seconds(*sizes, on, training=training, dtype=task.dtype, itemsize=task.itemsize)

    cost = layer.dense_cost(layer.settings_of(layer), task.rows)
    return (seconds(False), cost) if task.forward else (seconds(True) - seconds(False), cost + cost)
