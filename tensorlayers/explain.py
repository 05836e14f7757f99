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
from .precision import cast_for_autocast
from .program import Task

FROZEN, STORED = "dense (frozen)", "contraction (stored)"


@dataclass(frozen=True)
class Row:
    """One way to compute a layer.

    Parameters
    ----------
    name : str
        One of `dispatch.NAMES`; `FROZEN`, torch's own layer, which is there to compare with too; `STORED`, a plain
        chain whose activations are kept for backward; or `small.NAME`, a plain chain because the product is small.
    seconds : float or None
        The predicted time at the number of rows given, in seconds; None where there is no estimate.
    cost : Cost or None
        FLOPs and elements moved at that number of rows; None where there is no estimate.
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
        rows = str(row.chunk or "all") if row.cost else "-"
        return row.name, seconds, flops, moved, rows, row.refusal or "<- taken"


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
    layer : FactorizedLinear
    x : Tensor
        ``(*batch, in_features)``; its shape, dtype, device and requires_grad are used, not its values.
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
    KernelError
        If a kernel is demanded that does not support the call.

    Examples
    --------
    >>> import torch
    >>> from tensorlayers import FactorizedLinear, LowRank
    >>> layer = FactorizedLinear(768, 3072, format=LowRank(64))
    >>> explain(layer, torch.zeros(256, 768)).chosen
    'contraction'
    """
    if not isinstance(layer, FactorizedLinear):
        raise NetworkError(f"explain: a FactorizedLinear; got {type(layer).__name__}")
    if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[-1] != layer.in_features:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise NetworkError(f"input: a tensor whose last dimension is in_features = {layer.in_features}; got {got}")
    given, core = cast_for_autocast(x, layer.cores[0])
    if given.dtype != core.dtype:
        raise NetworkError(f"input: the dtype of the cores, {core.dtype}; got {given.dtype}")
    network, count = layer.own_network, max(x.numel() // layer.in_features, 1)
    rows = given.new_empty(1, 1).expand(count, network.features("in"))
    needs = x.requires_grad, any(core.requires_grad for core in layer.cores)
    if training is None:
        training = torch.is_grad_enabled() and any(needs)
    task = Task(count, dtype=str(given.dtype).removeprefix("torch."), itemsize=given.dtype.itemsize)
    of_x, of_cores = needs if any(needs) else (True, True)
    taken = _overriding(layer, rows, training)
    title = (
        f"{type(layer).__name__}({layer.in_features}, {layer.out_features}), {layer.format}, ranks "
        f"{','.join(map(str, layer.network.ranks)) or '-'}; {count} rows, {task.dtype}, "
        f"{decision.machine_of(x).name} ({torch.get_num_threads()} threads)"
    )
    ahead = _rows(layer, rows, task, taken)
    back = _rows(layer, rows, replace(task, x=of_x, cores=of_cores), taken) if training else ()
    return Explanation(title, ahead, back, task.itemsize)


def _rows(layer: FactorizedLinear, rows: Tensor, task: Task, taken: str) -> tuple[Row, ...]:
    """The ways to carry out a task; `taken` is what runs in place of the options of `decision`."""
    network, on = layer.own_network, decision.machine_of(rows)
    found = []
    for option in decision.options_for(network, task, on, layer.implementation):
        refusal = option.refusal or (f"{taken} runs" if taken else "")
        chunk = option.candidate.chunk if option.candidate else 0
        cost = option.candidate.cost if option.candidate else None
        found.append(Row(option.name, option.seconds, cost, chunk, refusal))
    for kernel in dispatch.KERNELS:
        reason = dispatch.kernel_refusal(kernel, network, rows.device.type, rows.dtype)
        found.append(Row(kernel.name, None, None, 0, "" if taken == kernel.name else reason or "not chosen"))
    dense, cost = _dense(layer, task, on)
    found.append(Row(FROZEN, dense, cost, 0, "" if taken == FROZEN else "the layer is not frozen: see freeze()"))
    if taken in (small.NAME, STORED):
        found.append(Row(taken, None, None, 0, ""))
    return tuple(found)


def _overriding(layer: FactorizedLinear, rows: Tensor, training: bool) -> str:
    """What runs in place of the options of `decision`; empty where one of these does."""
    network, demanded = layer.own_network, layer.implementation
    if layer.frozen:
        return FROZEN
    kernel = dispatch.chosen_kernel(network, rows, demanded)
    if kernel is not None:
        return kernel
    if small.is_small(network, len(rows)) and demanded is None:
        return small.NAME
    stored = dispatch.stored_program(network, rows, demanded, layer.backward) if training else None
    return STORED if stored is not None else ""


def _dense(layer: FactorizedLinear, task: Task, on: Machine) -> tuple[float, Cost]:
    """The estimate for torch's dense layer."""

    def seconds(training: bool) -> float:
        sizes = layer.out_features, layer.in_features, task.rows
        return decision.dense_seconds(*sizes, on, training=training, dtype=task.dtype, itemsize=task.itemsize)

    cost = layer.dense_cost(layer.settings_of(layer), task.rows)
    return (seconds(False), cost) if task.forward else (seconds(True) - seconds(False), cost + cost)
