"""Fitting layer after layer: each to the dense model's outputs, on the inputs that the layers before it give now."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Mask, attention_mask, call, check_finite, checked, evaluating
from .calibrate import Calibration
from .errors import ConversionError
from .moments import Moments, Source
from .scan import Found
from .surgery import swap
from .watch import rows_of_input, runnable, size, watching


class _Enough(Exception):
    """All that was wanted of a batch was seen."""


class LayerByLayer:
    """A model, and the copy of it whose layers are replaced one after another.

    Parameters
    ----------
    model : nn.Module
        It is run, and left as it is.
    found : mapping of str to Found
        The layers that will be replaced, by name.
    batches : sequence
        They are gone over, in the dense model and in the copy, for each layer or group of layers with the same input.
    mask : callable
        As of `collect`.
    """

    def __init__(self, model: nn.Module, found: Mapping[str, Found], batches: Sequence[Any], mask: Mask) -> None:
        self.found, self.batches, self.mask = found, batches, mask
        self.dense = runnable(model, found.values())
        self.copy = swap(self.dense, {}, inplace=False)
        self._calls, self._counts = self._ran()
        self._held: dict[str, Moments] = {}

    def order(self, names: Sequence[str]) -> list[str]:
        """Names in the order in which the layers run; those that never do come last."""
        return sorted(names, key=lambda name: self._calls.get(name, (len(self._calls), 0))[0])

    def moments(self, name: str) -> Moments | None:
        """The inputs of a layer in the copy as it is now, beside those in the dense model; None if it never ran.

        They are gathered at once for the layers that follow with the same input.
        """
        if name not in self._calls:
            return None
        if name not in self._held:
            alike = [other for other, (_, key) in self._calls.items() if key == self._calls[name][1]]
            self._held = self._gathered(alike)
        return self._held.pop(name, None)

    def replace(self, name: str, layer: nn.Module) -> None:
        """Put a layer into the copy."""
        old = self.copy.get_submodule(name)
        if old is self.copy:
            self.copy = layer
        for parent in list(self.copy.modules()):
            for key, child in parent._modules.items():
                if child is old:
                    parent._modules[key] = layer

    def _ran(self) -> tuple[dict[str, tuple[int, int]], list[Counter[str]]]:
        """Of each layer that runs: when it is called first, and which input that is; how often each is, by batch."""
        found: dict[str, tuple[int, int]] = {}
        counts: list[Counter[str]] = []
        inputs: list[Tensor] = []  # of a batch: kept alive, so that no other tensor is taken for one of them
        number = 0

        def seen(name: str, x: Tensor, result: Any) -> None:
            nonlocal number
            if not inputs or inputs[-1] is not x:
                inputs.append(x)
                number += 1
            found.setdefault(name, (len(found), number))
            counts[-1][name] += 1

        with evaluating(self.dense), torch.no_grad(), watching(self.dense, self.found, seen):
            for batch in self.batches:
                counts.append(Counter())
                call(self.dense, batch)
                inputs.clear()
        return found, counts

    def _gathered(self, names: Sequence[str]) -> dict[str, Moments]:
        made: dict[str, Moments] = {}
        with evaluating(self.dense, self.copy), torch.no_grad():
            for batch, counts in zip(self.batches, self._counts, strict=True):
                wanted = {name: counts[name] for name in names if counts[name]}
                if not wanted:
                    continue
                mask = self.mask(batch)
                before, now = (self._inputs(model, wanted, batch, mask) for model in (self.dense, self.copy))
                for name, rows in now.items():
                    moments = Moments.of(rows, size(self.found[name], "in"))
                    given = before.get(name)
                    if given is not None and given.shape == rows.shape and rows.is_floating_point():
                        moments.source = Source.of(given, rows)
                    moments.add_to(made, name)
        return made

    def _inputs(
        self, model: nn.Module, wanted: Mapping[str, int], batch: Any, mask: Tensor | None
    ) -> dict[str, Tensor]:
        """What the weights of layers that are called so often multiply in a batch, masked positions left out."""
        found: dict[str, list[Tensor]] = {name: [] for name in wanted}

        def seen(name: str, x: Tensor, result: Any) -> None:
            rows = rows_of_input(self.found[name], x, mask)
            check_finite("batches", name, "activation", rows)
            found[name].append(rows)
            if all(len(found[other]) >= count for other, count in wanted.items()):
                raise _Enough

        with watching(model, wanted, seen), suppress(_Enough):
            call(model, batch)
        return {name: torch.cat(rows) for name, rows in found.items() if rows}


class Data:
    """What the layers of a model are fitted to: nothing, moments of the dense model, or one layer after another.

    Parameters
    ----------
    model : nn.Module
    found : mapping of str to Found
        The layers that will be replaced, by name.
    calibration : Calibration or None
    batches : iterable or None
    mask : callable

    Raises
    ------
    ConversionError
        If there are no batches in what is given for them.
    """

    def __init__(
        self,
        model: nn.Module,
        found: Mapping[str, Found],
        calibration: Calibration | None,
        batches: Iterable[Any] | None = None,
        mask: Mask = attention_mask,
    ) -> None:
        if calibration is not None and not isinstance(calibration, Calibration):
            raise ConversionError(f"calibration: what `collect` returns; got {type(calibration).__name__}")
        self.calibration: Mapping[str, Moments] = {} if calibration is None else calibration
        self.sequential: LayerByLayer | None = None
        if batches is not None and found:
            held = list(checked(batches, "convert_model"))
            if not held:
                raise ConversionError("convert_model: at least one batch; got none")
            self.sequential = LayerByLayer(model, found, held, mask)

    def order(self, names: Sequence[str]) -> list[str]:
        """The order in which layers of these names are fitted."""
        return list(names) if self.sequential is None else self.sequential.order(names)

    def moments(self, names: Sequence[str]) -> list[Moments] | None:
        """Of layers that are factorized together; None where one of them has none: they keep their weights."""
        found = []
        for name in names:
            known = self.calibration.get(name)
            now = None if self.sequential is None else self.sequential.moments(name)
            if now is not None and known is not None and known.outputs is not None:
                now.outputs = known.outputs.to(now.inputs.device) * (now.count / known.count)
            one = now or known
            if one is None:
                return None
            found.append(one)
        return found

    def replace(self, name: str, layer: nn.Module) -> None:
        """Let the layers after this one see what it gives."""
        if self.sequential is not None:
            self.sequential.replace(name, layer)
