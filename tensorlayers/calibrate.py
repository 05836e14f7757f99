"""collect(model, batches): the second moments of each layer's inputs, and of the gradients of its outputs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from .batches import Mask, attention_mask, call, check_finite, checked, evaluating, probes
from .errors import CheckpointError, ConversionError
from .files import replaced
from .moments import Moments
from .randomness import seeded
from .scan import Found, scan
from .watch import in_parts, rows_of_gradient, rows_of_input, runnable, size, watching

MAX_BYTES = 2**33
PART_BYTES = 2**28
"""Of the windows of a convolution's input."""
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
        with replaced(path) as temporary:
            save_file(tensors, temporary, {"tensorlayers": json.dumps(about)})

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
    fold: bool = False,
    seed: int = 0,
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
        is its channels a group times its kernel. Where they take more, the batches are gone over several times. Beside
        them a batch takes what a training step takes; of a convolution at most `PART_BYTES` of its windows at a time.
    fold : bool
        As of `plan_conversion`: also of layers whose weight is computed from other tensors.
    seed : int
        Of the random changes; torch's own generators are left as they were.
    progress : bool, optional
        A progress bar; by default where the output is a terminal.

    Returns
    -------
    Calibration
        Of the layers that can be converted.

    Raises
    ------
    ConversionError
        If there are no batches or no layers; if activations, gradients or their squares are NaN or infinite; if the
        batches cannot be gone over again where `max_bytes` demands it; if an argument is out of its range. What the
        model itself raises is passed on.
    """
    if not isinstance(model, nn.Module):
        raise ConversionError(f"collect: a model; got {type(model).__name__}")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ConversionError("collect: a model with values; this one is on the meta device")
    for name, value, least in (("gradients", gradients, 0), ("max_bytes", max_bytes, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConversionError(f"collect: {name}: an integer of at least {least}; got {value!r}")
    checked(batches, "collect")
    found = [one for one in scan(model, fold) if not one.obstacle and (where is None or where(one.name, one.module))]
    if not found:
        raise ConversionError("collect: a model with layers that can be converted; got none")
    layers = {one.name: one for one in found}
    runs, parts = runnable(model, found), _parts(layers, max_bytes)
    if len(parts) > 1 and iter(batches) is batches:
        whole = sum(map(_nbytes, found))
        raise ConversionError(
            f"collect: moments of {whole:,} bytes, {max_bytes:,} at a time, take {len(parts)} passes: "
            "batches that can be gone over again, such as a list; got an iterator"
        )
    held: dict[str, Moments] = {}
    with evaluating(runs), seeded(seed, {parameter.device for parameter in model.parameters()}):
        for number, part in enumerate(parts, 1):
            what = f"calibrating {number}/{len(parts)}" if len(parts) > 1 else "calibrating"
            ran = False
            bar = tqdm(batches, desc=what, disable=None if progress is None else not progress, delay=1, unit="batch")
            for batch in bar:
                ran = True
                _run(runs, part, held, batch, mask(batch), gradients, output)
            if not ran:
                raise ConversionError("collect: at least one batch; got none")
    for name, moments in held.items():
        check_finite("collect", name, "second moment", moments.inputs)
        if gradients and moments.outputs is None:  # the model's output does not depend on it
            outs = size(layers[name], "out")
            moments.outputs = moments.inputs.new_zeros(*moments.inputs.shape[:-2], outs, outs)
        if moments.outputs is not None:
            check_finite("collect", name, "second moment of gradients", moments.outputs)
    return Calibration({name: held[name] for name in layers if name in held}, [n for n in layers if n not in held])


def _nbytes(found: Found) -> int:
    """What the moments of a layer take, roughly."""
    return 8 * size(found, "group") * (size(found, "in", "kernel") ** 2 + size(found, "out") ** 2)


def _parts(layers: Mapping[str, Found], max_bytes: int) -> list[dict[str, Found]]:
    """Layers whose moments are gathered at a time."""
    parts: list[dict[str, Found]] = []
    held = math.inf
    for name, found in layers.items():
        held += _nbytes(found)
        if held > max_bytes:
            parts.append({})
            held = _nbytes(found)
        parts[-1][name] = found
    return parts


def _run(
    model: nn.Module,
    part: Mapping[str, Found],
    held: dict[str, Moments],
    batch: Any,
    mask: Tensor | None,
    gradients: int,
    output: Callable[[Any], Tensor] | None,
) -> None:
    """Add the moments of a batch."""
    outputs: list[tuple[str, Tensor]] = []

    def seen(name: str, x: Tensor, result: Any) -> Tensor | None:
        for some, its_mask in in_parts(part[name], x, mask, PART_BYTES):
            rows = rows_of_input(part[name], some, its_mask)
            check_finite("collect", name, "activation", rows)
            if len(rows):
                Moments.of(rows, size(part[name], "in")).add_to(held, name)
        if not gradients or not isinstance(result, Tensor) or not result.is_floating_point():
            return None
        kept = result if result.requires_grad else result.detach().requires_grad_()
        outputs.append((name, kept))
        return kept.clone()  # which the model may change in place

    with watching(model, part, seen), torch.set_grad_enabled(gradients > 0):
        result = call(model, batch)
    drawn = probes(result, mask, output)
    for _ in range(gradients if outputs else 0):
        with torch.enable_grad():
            scalar = next(drawn)
        if not scalar.requires_grad:
            raise ConversionError("collect: an output that can be differentiated; gradients=0 does without it")
        slopes = torch.autograd.grad(scalar, [kept for _, kept in outputs], retain_graph=True, allow_unused=True)
        for (name, _), slope in zip(outputs, slopes, strict=True):
            if slope is None or name not in held:
                continue
            rows = rows_of_gradient(part[name], slope, mask)
            check_finite("collect", name, "gradient", rows)
            held[name].add_outputs(rows, 1 / gradients)
