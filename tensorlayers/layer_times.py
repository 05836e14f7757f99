"""How long the layers of a model take, dense and factorized, measured on what they take of a batch."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .batches import call, evaluating
from .formats import Format
from .scan import Found
from .timing import clock_of, fastest
from .watch import runnable

_REPEATS = 7


class LayerTimes:
    """Times of layers in a forward of one batch, each shape and format timed once.

    Parameters
    ----------
    model : nn.Module
        Run once in evaluation mode, and not changed.
    found : iterable of Found
    batch
        As of `collect`.
    """

    def __init__(self, model: nn.Module, found: Iterable[Found], batch: Any) -> None:
        found = list(found)
        runs = runnable(model, found)
        self._taken: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {one.name: [] for one in found}
        self._times: dict[tuple[object, ...], tuple[float, float]] = {}
        handles = []
        try:
            for name in self._taken:
                hook = partial(self._take, name)
                handles.append(runs.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
            with evaluating(runs), torch.no_grad():
                call(runs, batch)
        finally:
            for handle in handles:
                handle.remove()

    def _take(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._taken[name].append((args, kwargs))

    def seconds(self, found: Found, format: Format | None) -> tuple[float, float]:
        """Of all its calls in a forward, as the dense layer and in a format; nothing where it did not run."""
        calls = self._taken[found.name]
        if not calls:
            return 0.0, 0.0
        shapes = [
            (x.dtype, *x.shape) for args, kwargs in calls for x in (*args, *kwargs.values()) if isinstance(x, Tensor)
        ]
        key = (found.layer, *sorted(map(str, found.settings.items())), str(format), *shapes)
        if key not in self._times:
            modules: dict[bool, nn.Module] = {False: found.dense}
            if format is not None:
                modules[True] = layer = found.layer.empty(found.dense, format).eval()
                layer.reset_parameters()
            clock = clock_of(next(found.dense.parameters()).device)
            times = fastest({which: partial(_run, module, calls) for which, module in modules.items()}, clock, _REPEATS)
            self._times[key] = times[False], times.get(True, times[False])
        return self._times[key]


def _run(module: nn.Module, calls: Iterable[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
    for args, kwargs in calls:
        module(*args, **kwargs)
