"""Ranks that fall while a model trains, by a schedule or where a penalty made values vanish; the optimizer follows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Any

from torch import nn
from torch.optim import Optimizer

from . import optimizer as optimizers
from . import rank as ranks
from . import table
from .convert import convert_model, plan_conversion
from .errors import CheckpointError, ConversionError, RankError, TensorlayersError
from .formats import Format, from_dict
from .layers import FactorizedLayer
from .layers.resize import lowered, rounded, shrink
from .regularize import RankChanges, prune_ranks, truncate

SHAPES: dict[str, Callable[[float], float]] = {
    "cubic": lambda t: (1 - t) ** 3,
    "linear": lambda t: 1 - t,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
}
"""What is left of the way from start to end, by the share of the steps that are done."""

_LOWERINGS = 10


class RankSchedule:
    r"""Lower the ranks of a model step by step while it trains.

    At some steps, :math:`t` of the way through, no layer keeps more than

    .. math:: r(t) = r_{end} + (r_{start} - r_{end})\, (1 - t)^3,

    (or another shape), as `truncate` does it: near the best, in place, each parameter the same object, with the moments
    of the optimizer.

    Parameters
    ----------
    model : nn.Module
        A factorized layer, or a model with some; or a dense one, with `formats`.
    optimizer : torch.optim.Optimizer, optional
        What trains the model; its state follows.
    end : float or int, optional
        The share of each layer's dense parameters that is left, or the rank of every bond. By default ranks are pruned
        alone, see `tolerance`.
    steps : (int, int)
        The steps of the first and the last lowering, counted from 1.
    start : float or int, optional
        As `end`; by default the largest that a layer has at the first step.
    every : int, optional
        Steps between two lowerings; the last comes at the last step in any case. By default a tenth of them.
    shape : {"cubic", "linear", "cosine"}
        Cubic: most at first, while the network can still recover.
    formats : Format or mapping, optional
        Start dense: what layers are converted to at the first of the steps, in place, as by `convert_model`
        (``force=True``). Their rank is that of the start.
    tolerance : float, optional
        Also cut, at each of these steps, the values of bonds that are weaker than this share of the strongest: what
        `rank_penalty` in the loss brought to zero. See `prune_ranks`.

    Attributes
    ----------
    model : nn.Module
        The model as it is now.
    count : int
        Steps so far.
    history : list of (int, int)
        Step and parameters of the factorized weights after each lowering.

    Raises
    ------
    ConversionError
        If an option is out of its range, there is nothing to lower, or the optimizer is not the model's.
    RankError
        If a layer cannot be as small as `end`.

    Notes
    -----
    The first moments of Adam, SGD and RMSprop are mapped as gradients are, exactly where one bond is lowered; second
    moments by the squares of the map. What torch's other optimizers keep starts anew. Weights that are converted lose
    their moments. To resume, build model and optimizer as at the beginning, then load the schedule first, the model and
    the optimizer after it.

    References
    ----------
    Zhu and Gupta 2017, To prune, or not to prune: exploring the efficacy of pruning for model compression (the cubic
    schedule).

    Examples
    --------
    >>> import torch, tensorlayers as tl
    >>> model = torch.nn.Sequential(tl.FactorizedLinear(64, 64, format=tl.LowRank(32)))
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> schedule = RankSchedule(model, optimizer, end=8, steps=(1, 5), every=1, shape="linear")
    >>> for _ in range(5):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(4, 64)).square().mean().backward()
    ...     optimizer.step()
    ...     _ = schedule.step()
    >>> model[0].network.ranks
    (8,)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        end: float | None = None,
        steps: tuple[int, int],
        start: float | None = None,
        every: int | None = None,
        shape: str = "cubic",
        formats: Format | Mapping[str, Format | None] | None = None,
        tolerance: float | None = None,
    ) -> None:
        first, last = _check_steps(steps)
        if every is None:
            every = max((last - first) // _LOWERINGS, 1)
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConversionError(f"every: an integer of at least 1; got {every!r}")
        if shape not in SHAPES:
            raise ConversionError(f"shape: one of {', '.join(SHAPES)}; got {shape!r}")
        if tolerance is not None and not (type(tolerance) in (int, float) and 0 <= tolerance < 1):
            raise ConversionError(f"tolerance: at least 0 and below 1; got {tolerance!r}")
        if end is None and tolerance is None:
            raise ConversionError("end: a share or a rank to lower to, or a tolerance to prune by; got neither")
        for what, value in (("end", end), ("start", start)):
            if value is not None and type(ranks.validate(value)) not in (int, float):
                raise ConversionError(f"{what}: a share in (0, 1] or a rank; got {value!r}")
        if start is not None and (end is None or type(start) is not type(end) or start < end):
            raise ConversionError(f"start: as end, and at least as large; got {start!r} and {end!r}")
        if optimizer is not None:
            optimizers.check(optimizer, model)
        self.model, self.optimizer = model, optimizer
        self.end, self.start, self.steps, self.every, self.shape = end, start, (first, last), every, shape
        self.formats, self.tolerance = formats, tolerance
        self.count = 0
        self.history: list[tuple[int, int]] = []
        self._check_end()

    def _check_end(self) -> None:
        """Raise where a layer cannot become as small as the end, or nothing can become smaller."""
        layers = _factorized(self.model)
        if self.formats is None and not layers:
            raise ConversionError(
                f"{type(self.model).__name__}: a factorized layer, or formats to convert to; got none"
            )
        plan = plan_conversion(self.model, self.formats, force=True, errors=False) if self.formats else ()
        if self.end is None:
            return
        for entry in plan:
            if entry.network is not None:
                ranks.resolve(entry.network, self.end, math.prod(entry.shape), f"layer {entry.name!r}: {entry.format}")
        for name, layer in layers.items():
            try:
                lowered(layer, self.end)
            except RankError as error:
                raise RankError(f"layer {name!r}: {error}" if name else str(error)) from None

    # -- training -----------------------------------------------------------------------------------------------------

    @property
    def target(self) -> float | None:
        """The share or rank above which no layer is at the present step; None before the first of the steps."""
        return self._target(self.count)

    def _target(self, count: int) -> float | None:
        first, last = self.steps
        if self.end is None or self.start is None or count < first:
            return None
        done = min((count - first) / max(last - first, 1), 1.0) if last > first else 1.0
        value = self.end + (self.start - self.end) * SHAPES[self.shape](done)
        return round(value) if isinstance(self.end, int) else min(max(value, self.end), 1.0)

    def _is_due(self, count: int) -> bool:
        first, last = self.steps
        return count == last or (first <= count < last and (count - first) % self.every == 0)

    def step(self) -> RankChanges:
        """Count a step of training, and lower the ranks where it is time. To be called after each optimizer's step.

        Returns
        -------
        RankChanges
            Layer name -> (ranks before, ranks after) of the layers that became smaller; empty at most steps. Under
            DistributedDataParallel wrap the model again where it is not.

        Raises
        ------
        DecompositionError
            If an entry of a core is NaN or infinite. The step is then not counted.
        """
        count = self.count + 1
        changes = RankChanges()
        if self._is_due(count):
            self._convert()
            before = {name: layer.network.ranks for name, layer in _factorized(self.model).items()}
            if self.end is not None and self.start is None:
                self.start = self._largest()
            target = self._target(count)
            if target is not None:
                truncate(self.model, target, self.optimizer)
            if self.tolerance is not None:
                prune_ranks(self.model, self.tolerance, self.optimizer)
            after = {name: layer.network.ranks for name, layer in _factorized(self.model).items()}
            changes.update({name: (old, after[name]) for name, old in before.items() if old != after[name]})
            self.history.append((count, _parameters(self.model)))
        self.count = count
        return changes

    def _convert(self, formats: Mapping[str, Format | None] | None = None) -> None:
        """Convert a dense start, once."""
        chosen = formats or self.formats
        if chosen is not None and (formats or not self.history):
            options = {"inplace": True, "optimizer": self.optimizer, "force": True, "progress": False}
            self.model = convert_model(self.model, chosen, **options)  # type: ignore[arg-type]

    def _largest(self) -> float:
        """The largest share or rank that a layer has, at least the end."""
        assert self.end is not None
        layers = _factorized(self.model).values()
        if isinstance(self.end, int):
            return max((rank for layer in layers for rank in (*layer.network.ranks, self.end)), default=self.end)
        return min(max((_share(layer) for layer in layers), default=self.end), 1.0)

    # -- resuming -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule is, as plain data: steps, start, history, and the format of each layer."""
        return {
            "count": self.count,
            "start": self.start,
            "history": [list(item) for item in self.history],
            "formats": {
                name: layer.format.pin(layer.network).to_dict() for name, layer in _factorized(self.model).items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Return to where a schedule was, and bring the model to the ranks that it had, with the optimizer.

        The values of cores and moments are left to the ``load_state_dict`` of model and optimizer, to be called then.

        Raises
        ------
        CheckpointError
            If the state is malformed, or the model does not hold the layers that it names, in ranks at least as high.
            Nothing is changed.
        """
        try:
            count, start = int(state["count"]), state["start"]
            history = [(int(step), int(size)) for step, size in state["history"]]
            formats = {str(name): from_dict(data) for name, data in state["formats"].items()}
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"schedule: a state as state_dict gives it; {error}") from None
        have = _factorized(self.model)
        dense = {name: format for name, format in formats.items() if name not in have}
        modules = dict(self.model.named_modules())
        for name, format in formats.items():
            if name in dense and (name not in modules or self.formats is None):
                raise CheckpointError(f"schedule: layer {name!r} is no factorized layer of this model")
            if name in have:
                ours = have[name].network
                wanted = format.rank
                if not isinstance(wanted, tuple) or len(wanted) != len(ours.ranks) or not _within(wanted, ours.ranks):
                    raise CheckpointError(f"schedule: layer {name!r} has ranks {ours.ranks}; in the state {wanted}")
        if dense:
            try:
                self._convert(dense)
            except TensorlayersError as error:
                raise CheckpointError(f"schedule: {error}") from None
        for group in _sharing(self.model):
            name, layer = group[0]
            if name in have and name in formats:
                shrink([one for _, one in group], rounded(layer, formats[name].rank), self.optimizer)
        self.count, self.start, self.history = count, start, history

    # -- printing -----------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        options: dict[str, Any] = {
            "end": self.end,
            "steps": self.steps,
            "start": self.start,
            "every": self.every,
            "shape": self.shape,
        }
        more = {"formats": self.formats, "tolerance": self.tolerance}
        options |= {name: value for name, value in more.items() if value is not None}
        return f"RankSchedule({', '.join(f'{name}={value!r}' for name, value in options.items())})"

    def __str__(self) -> str:
        rows = [(str(step), _shown(self._target(step)), f"{size:,}") for step, size in self.history]
        lines = table.lines(("step", "at most", "parameters of factorized weights"), rows) if rows else []
        coming = next((step for step in range(self.count + 1, self.steps[1] + 1) if self._is_due(step)), None)
        ahead = "done" if coming is None else f"next at step {coming}"
        return "\n".join([repr(self), *lines, f"step {self.count}: {ahead}"])


def _check_steps(steps: object) -> tuple[int, int]:
    pair = tuple(steps) if isinstance(steps, (tuple, list)) else ()
    if len(pair) != 2 or not all(type(step) is int for step in pair) or not 1 <= pair[0] <= pair[1]:
        raise ConversionError(f"steps: the first and the last step, from 1, in order; got {steps!r}")
    return pair[0], pair[1]


def _factorized(model: nn.Module) -> dict[str, FactorizedLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FactorizedLayer)}


def _sharing(model: nn.Module) -> list[list[tuple[str, FactorizedLayer]]]:
    """The factorized layers, those that share cores together."""
    items = sorted(_factorized(model).items(), key=lambda item: id(item[1].cores[0]))
    return [list(group) for _, group in groupby(items, key=lambda item: id(item[1].cores[0]))]


def _share(layer: FactorizedLayer) -> float:
    return layer.network.num_parameters / (layer.dense_parameters * (layer.stack[0] if layer.stack else 1))


def _parameters(model: nn.Module) -> int:
    cores = {id(core): core.numel() for layer in _factorized(model).values() for core in layer.cores}
    return sum(cores.values())


def _within(ranks: tuple[int, ...], most: tuple[int, ...]) -> bool:
    return all(rank <= limit for rank, limit in zip(ranks, most, strict=True))


def _shown(target: float | None) -> str:
    return "-" if target is None else str(target) if isinstance(target, int) else f"{target:.3g}"
