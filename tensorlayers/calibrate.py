"""collect(model, batches): the second moments of each layer's inputs, and of the gradients of its outputs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from .batches import Mask, attention_mask, call, checked, evaluating, probes, unmasked
from .errors import CheckpointError, ConversionError
from .moments import Moments
from .scan import Found, scan
from .surgery import swap

MAX_BYTES = 2**33
_VERSION = 1
_SUMS = ("total", "inputs", "outputs")


class Calibration(Mapping[str, Moments]):
    """What `collect` gathered: the moments of each layer that ran, by its name.

    Parameters
    ----------
    moments : mapping of str to Moments
    silent : tuple of str
        The layers that never ran; they are decomposed without data.
    """

    def __init__(self, moments: Mapping[str, Moments], silent: Iterable[str] = ()) -> None:
        self._moments, self.silent = dict(moments), tuple(silent)

    def __getitem__(self, name: str) -> Moments:
        return self._moments[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._moments)

    def __len__(self) -> int:
        return len(self._moments)

    def __repr__(self) -> str:
        size = sum(one.nbytes for one in self.values())
        return f"Calibration({len(self)} layers, {size / 1e6:.0f} MB, {len(self.silent)} that never ran)"

    def save(self, path: str | Path) -> None:
        """Write a safetensors file. What was there is replaced once all is written."""
        path = Path(path)
        tensors = {
            f"{name}/{what}": value.contiguous()
            for name, one in self.items()
            for what in _SUMS
            if (value := getattr(one, what)) is not None
        }
        about = {"version": _VERSION, "counts": {name: one.count for name, one in self.items()}, "silent": self.silent}
        partial = path.with_name(f"{path.name}.partial")
        try:
            save_file(tensors, partial, {"tensorlayers": json.dumps(about)})
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote.

        Raises
        ------
        CheckpointError
            If it is no such file.
        """
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {}).get("tensorlayers", "null"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if about["version"] != _VERSION:
                raise CheckpointError(f"{path}: version {_VERSION} of a calibration; got {about['version']}")
            made = {}
            for name, count in about["counts"].items():
                total, inputs = tensors[f"{name}/total"], tensors[f"{name}/inputs"]
                made[name] = Moments(count, total, inputs, tensors.get(f"{name}/outputs"))
            return cls(made, about["silent"])
        except (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path}: no calibration ({type(error).__name__}: {error})") from None


def collect(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    where: Callable[[str, nn.Module], bool] | None = None,
    gradients: int = 4,
    output: Callable[[Any], Tensor] | None = None,
    mask: Mask = attention_mask,
    max_bytes: int = MAX_BYTES,
    progress: bool | None = None,
) -> Calibration:
    """Run a model over data and gather the second moments that its layers are fitted by.

    The model is left as it was: it runs in evaluation mode, no parameter gets a gradient, and all hooks are removed,
    whatever happens. Sums are kept in float64, on the device of the layer.

    Parameters
    ----------
    model : nn.Module
    batches : iterable
        Of what the model takes: a mapping is given by keyword (a tokenizer's output as it is), a tuple or list by
        position, all else as the one argument. A few hundred sentences or images do; more is better.
    where : callable, optional
        (name, module) -> bool; only layers for which it is true.
    gradients : int
        How many random changes of the model's output are followed back through each batch, so that what matters to the
        *model's* output counts. 0: none; only inputs then count, and nothing is differentiated.
    output : callable, optional
        What of the model's output matters: (output) -> tensor. By default logits (by their likelihood), the last hidden
        state, or the first tensor of floating point.
    mask : callable, optional
        (batch) -> (batch, positions) or None: the positions that count. By default its ``attention_mask``.
    max_bytes : int
        What the moments may take at a time, 8 bytes an entry, (n_in^2 + n_out^2) entries a layer; of a convolution n_in
        is its channels a group times its kernel. Where they take more, the batches are gone over several times.
    progress : bool, optional
        A progress bar; by default where the output is a terminal.

    Returns
    -------
    Calibration
        Of the layers that can be converted.

    Raises
    ------
    ConversionError
        If there are no batches or no layers; if activations or gradients are NaN or infinite; if the batches cannot be
        gone over again where `max_bytes` demands it. What the model itself raises is passed on.
    """
    if not isinstance(model, nn.Module):
        raise ConversionError(f"collect: a model; got {type(model).__name__}")
    checked(batches, "collect")
    found = [one for one in scan(model) if not one.obstacle and (where is None or where(one.name, one.module))]
    if not found:
        raise ConversionError("collect: a model with layers that can be converted; got none")
    unpacked = {id(attention): (attention, parts) for one in found for attention, parts in one.unpacks}
    runs = swap(model, {}, False, unpacked) if unpacked else model
    watched = [_Watched(one, runs.get_submodule(one.name)) for one in found]
    parts = _parts(watched, max_bytes)
    if len(parts) > 1 and iter(batches) is batches:
        size = sum(one.nbytes for one in watched)
        raise ConversionError(
            f"collect: moments of {size:,} bytes, {max_bytes:,} at a time, take {len(parts)} passes: "
            "batches that can be gone over again, such as a list; got an iterator"
        )
    with evaluating(runs):
        for number, part in enumerate(parts, 1):
            what = f"calibrating {number}/{len(parts)}" if len(parts) > 1 else "calibrating"
            ran = False
            bar = tqdm(batches, desc=what, disable=None if progress is None else not progress, delay=1, unit="batch")
            for batch in bar:
                ran = True
                _run(runs, part, batch, mask(batch), gradients, output)
            if not ran:
                raise ConversionError("collect: at least one batch; got none")
    moments = {one.name: one.moments for one in watched if one.moments is not None}
    return Calibration(moments, [one.name for one in watched if one.moments is None])


@dataclass(eq=False)
class _Watched:
    """A layer whose moments are gathered; `outputs` are those of the present batch, with their masks."""

    found: Found
    module: nn.Module
    moments: Moments | None = None
    outputs: list[Tensor] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.found.name

    @property
    def axes(self) -> dict[str, int]:
        """The product of the axes of each side, and the groups."""
        sizes = {"in": 1, "out": 1, "group": 1}
        for axis in self.found.layer.axes_of(self.found.settings):
            sizes["in" if axis.role == "kernel" else axis.role] *= axis.size
        return sizes

    @property
    def nbytes(self) -> int:
        """What its moments take, roughly."""
        sizes = self.axes
        return 8 * sizes["group"] * (sizes["in"] ** 2 + sizes["out"] ** 2)


def _parts(watched: list[_Watched], max_bytes: int) -> list[list[_Watched]]:
    """Layers whose moments are gathered at a time."""
    parts: list[list[_Watched]] = []
    held = math.inf
    for one in watched:
        held += one.nbytes
        if held > max_bytes:
            parts.append([])
            held = one.nbytes
        parts[-1].append(one)
    return parts


def _run(
    model: nn.Module,
    part: list[_Watched],
    batch: Any,
    mask: Tensor | None,
    gradients: int,
    output: Callable[[Any], Tensor] | None,
) -> None:
    """Add the moments of a batch."""
    with _hooked(part, mask, gradients > 0), torch.set_grad_enabled(gradients > 0):
        result = call(model, batch)
    if not gradients:
        return
    try:
        outputs = [(one, kept) for one in part for kept in one.outputs]
        with torch.enable_grad():
            drawn = probes(result, mask, output)
            for _ in range(gradients if outputs else 0):
                scalar = next(drawn)
                if not scalar.requires_grad:
                    raise ConversionError("collect: an output that can be differentiated; gradients=0 does without it")
                wanted = [kept for _, kept in outputs]
                slopes = torch.autograd.grad(scalar, wanted, retain_graph=True, allow_unused=True)
                for (one, _), slope in zip(outputs, slopes, strict=True):
                    if slope is not None:
                        _add_slope(one, slope, mask, 1 / gradients)
    finally:
        for one in part:
            one.outputs.clear()


@contextmanager
def _hooked(part: list[_Watched], mask: Tensor | None, keep: bool) -> Iterator[None]:
    """Moments of what the layers take are added as they run; what they give is kept if its gradient is wanted."""

    def hook_of(one: _Watched) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Tensor | None:
            given = args[0] if args else next(iter(kwargs.values()))
            _add_input(one, given.detach(), mask)
            if not keep or not isinstance(result, Tensor) or not result.is_floating_point():
                return None
            kept = result if result.requires_grad else result.detach().requires_grad_()
            one.outputs.append(kept)
            return kept.clone()  # which the model may change in place

        return hook

    handles = []
    try:
        for one in part:
            handles.append(one.module.register_forward_hook(hook_of(one), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add_input(one: _Watched, x: Tensor, mask: Tensor | None) -> None:
    sizes, layer = one.axes, one.found.layer
    columns = layer.columns(one.module, x)
    trailing = 0 if not columns.is_floating_point() else 1 + (sizes["group"] > 1)
    rows = unmasked(columns, mask, trailing)
    if rows.is_floating_point() and not bool(torch.isfinite(rows).all()):
        raise ConversionError(f"collect: layer {one.name!r}: every activation is finite; some are NaN or infinite")
    if not len(rows):
        return
    found = Moments.of(rows, sizes["in"])
    if one.moments is None:
        one.moments = found
    else:
        one.moments.add(found)


def _add_slope(one: _Watched, slope: Tensor, mask: Tensor | None, weight: float) -> None:
    rows = unmasked(one.found.layer.gradients(one.module, slope), mask, 1 + (one.axes["group"] > 1))
    if not bool(torch.isfinite(rows).all()):
        raise ConversionError(f"collect: layer {one.name!r}: every gradient is finite; some are NaN or infinite")
    if one.moments is not None and len(rows):
        one.moments.add_outputs(rows, weight)
