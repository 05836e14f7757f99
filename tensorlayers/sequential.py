"""Fitting layer after layer: each to the dense model's outputs, on the inputs that the layers before it give now."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Mask, call, checked, evaluating, unmasked
from .calibrate import Calibration
from .errors import ConversionError
from .moments import Moments, Source
from .scan import Found
from .surgery import swap


class _Enough(Exception):
    """All that was wanted of a batch was seen."""


class Sequential:
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
        self.found, self.batches, self.mask = dict(found), batches, mask
        unpacked = {id(attention): (attention, parts) for one in found.values() for attention, parts in one.unpacks}
        self.dense = swap(model, {}, False, unpacked) if unpacked else model
        self.copy = swap(self.dense, {}, inplace=False)
        self._calls = self._first_calls()
        self._held: dict[str, Moments] = {}

    def order(self, names: Sequence[str]) -> list[str]:
        """Names in the order in which the layers run; those that never do come last."""
        return sorted(names, key=lambda name: self._calls.get(name, (len(self._calls), 0, 0))[0])

    def moments(self, name: str) -> Moments | None:
        """The inputs of a layer in the copy as it is now, beside those in the dense model; None if it never ran.

        They are gathered at once for the layers that follow with the same input.
        """
        if name not in self._calls:
            return None
        if name not in self._held:
            alike = [other for other, (_, key, _) in self._calls.items() if key == self._calls[name][1]]
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

    def _first_calls(self) -> dict[str, tuple[int, int, int]]:
        """Of each layer that runs: when it is called first, which input that is, and how often it is called."""
        found: dict[str, tuple[int, int, int]] = {}
        inputs: list[Tensor] = []  # kept alive, so that no other tensor is taken for one of them

        def seen(name: str, x: Tensor) -> None:
            if not inputs or inputs[-1] is not x:
                inputs.append(x)
            place, key, count = found.get(name, (len(found), len(inputs), 0))
            found[name] = place, key, count + 1

        with evaluating(self.dense), torch.no_grad(), _watching(self.dense, self.found, seen):
            for batch in self.batches:
                call(self.dense, batch)
                break
        return found

    def _gathered(self, names: Sequence[str]) -> dict[str, Moments]:
        made: dict[str, Moments] = {}
        with evaluating(self.dense, self.copy), torch.no_grad():
            for batch in self.batches:
                mask = self.mask(batch)
                before, now = (self._inputs(model, names, batch, mask) for model in (self.dense, self.copy))
                for name in now:
                    self._add(made, name, before.get(name), now[name])
        return made

    def _inputs(self, model: nn.Module, names: Sequence[str], batch: Any, mask: Tensor | None) -> dict[str, Tensor]:
        """What each layer's weight multiplies in a batch, masked positions left out."""
        wanted = {name: self._calls[name][2] for name in names}
        found: dict[str, list[Tensor]] = {name: [] for name in names}

        def seen(name: str, x: Tensor) -> None:
            one = self.found[name]
            columns = one.layer.columns(one.dense, x.detach())
            grouped = any(axis.role == "group" for axis in one.layer.axes_of(one.settings))
            found[name].append(unmasked(columns, mask, columns.is_floating_point() * (1 + grouped)))
            if all(len(found[other]) >= count for other, count in wanted.items()):
                raise _Enough

        chosen = {name: self.found[name] for name in names}
        with _watching(model, chosen, seen), suppress(_Enough):
            call(model, batch)
        return {name: torch.cat(rows) for name, rows in found.items() if rows}

    def _add(self, made: dict[str, Moments], name: str, before: Tensor | None, now: Tensor) -> None:
        one = self.found[name]
        rows = next(axis.size for axis in one.layer.axes_of(one.settings) if axis.role == "in")
        moments = Moments.of(now, rows)
        if before is not None and before.shape == now.shape and now.is_floating_point():
            moments.source = Source.of(before, now)
        if name in made:
            made[name].add(moments)
        else:
            made[name] = moments


@contextmanager
def _watching(model: nn.Module, names: Mapping[str, Found], seen: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call a function with a layer's name and input whenever it is about to run."""

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen(name, args[0] if args else next(iter(kwargs.values())))

        return hook

    handles = []
    try:
        for name in names:
            handles.append(model.get_submodule(name).register_forward_pre_hook(hook_of(name), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


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
        batches: Iterable[Any] | None,
        mask: Mask,
    ) -> None:
        if calibration is not None and not isinstance(calibration, Calibration):
            raise ConversionError(f"calibration: what `collect` returns; got {type(calibration).__name__}")
        self.calibration: Mapping[str, Moments] = {} if calibration is None else calibration
        self.sequential: Sequential | None = None
        if batches is not None and found:
            held = list(checked(batches, "convert_model"))
            if not held:
                raise ConversionError("convert_model: at least one batch; got none")
            self.sequential = Sequential(model, found, held, mask)

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
                now.outputs = known.outputs * (now.count / known.count)
            one = now or known
            if one is None:
                return None
            found.append(one)
        return found

    def replace(self, name: str, layer: nn.Module) -> None:
        """Let the layers after this one see what it gives."""
        if self.sequential is not None:
            self.sequential.replace(name, layer)
