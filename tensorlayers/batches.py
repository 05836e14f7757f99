"""Batches of data and the models that take them: how one is called, what is masked, what it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .errors import ConversionError

Mask = Callable[[Any], "Tensor | None"]


def checked(batches: Any, what: str) -> Iterable[Any]:
    """The batches, if they are an iterable of them.

    Raises
    ------
    ConversionError
        If they are a single tensor, a mapping, a string or no iterable.
    """
    if isinstance(batches, (Tensor, Mapping, str, bytes)) or not isinstance(batches, Iterable):
        raise ConversionError(f"{what}: batches are an iterable of what the model takes; got {type(batches).__name__}")
    return batches


def call(model: nn.Module, batch: Any) -> Any:
    """The output of a model for a batch, which is moved to the device of its first parameter.

    A mapping is given by keyword, a tuple or list by position, all else as the one argument.
    """
    device = next((parameter.device for parameter in model.parameters()), None)
    if device is not None:
        batch = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, _plain(batch))
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _plain(batch: Any) -> Any:
    """Mappings of other kinds (a tokenizer's) as dicts."""
    return dict(batch) if isinstance(batch, Mapping) else batch


def attention_mask(batch: Any) -> Tensor | None:
    """The attention mask of a batch that has one, (batch, positions): what it masks is padding."""
    found = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return found.bool() if isinstance(found, Tensor) and found.dim() == 2 else None


def check_finite(what: str, name: str, of: str, rows: Tensor) -> None:
    """Raise `ConversionError` where what was seen at a layer is not finite."""
    if rows.is_floating_point() and not bool(torch.isfinite(rows).all()):
        raise ConversionError(f"{what}: layer {name!r}: every {of} is finite; some are NaN or infinite")


def unmasked(rows: Tensor, mask: Tensor | None, trailing: int) -> Tensor:
    """Of (*positions, ...), where `trailing` dimensions follow the positions, those that count, (n, ...).

    A mask counts where its shape is that of the positions.
    """
    positions = rows.shape[: rows.dim() - trailing]
    if mask is not None and positions == mask.shape:
        return rows[mask.to(rows.device)]
    return rows.reshape(-1, *rows.shape[rows.dim() - trailing :])


def entry_of(result: Any, name: str) -> Tensor | None:
    """A tensor of a model's output by its name, of a mapping or an attribute; None where it has none."""
    found = result.get(name) if isinstance(result, Mapping) else getattr(result, name, None)
    return found if isinstance(found, Tensor) else None


def named_output(result: Any) -> tuple[str, Tensor] | None:
    """The output that a Hugging Face model is judged by, with its name: logits, or the last hidden state."""
    for name in ("logits", "last_hidden_state"):
        found = entry_of(result, name)
        if found is not None:
            return name, found
    return None


def output_of(result: Any) -> Tensor:
    """The tensor that a model's output is judged by: logits, the last hidden state, or the first of floating point.

    Raises
    ------
    ConversionError
        If there is none.
    """
    named = named_output(result)
    if named is not None:
        return named[1]
    leaves = tree_leaves(dict(result) if isinstance(result, Mapping) else result)
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf
    raise ConversionError(f"model: an output with a floating-point tensor; got {type(result).__name__}")


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """All modules in evaluation mode, no parameter with a gradient; both as they were afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for model in models for parameter in model.parameters()]
    try:
        for model in models:
            model.eval()
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, wants in wanted:
            parameter.requires_grad_(wants)


def probes(result: Any, mask: Tensor | None, output: Callable[[Any], Tensor] | None) -> Iterator[Tensor]:
    """Random scalars of a model's output, endlessly: the mean square of their gradients is what a change of it counts.

    Of logits the likelihood of labels that are drawn from them (the Fisher information); of any other output, or what
    `output` makes of it, the sum with random signs.
    """
    logits = entry_of(result, "logits") if output is None else None
    found = output(result) if output is not None else output_of(result)
    rows = unmasked(found, mask, 1) if found.dim() > 1 else found
    while True:
        if logits is not None and rows.dim() == 2 and rows.shape[1] > 1:
            labels = torch.multinomial(rows.detach().float().softmax(1), 1).squeeze(1)
            yield torch.nn.functional.cross_entropy(rows.float(), labels, reduction="sum")
        else:
            yield (rows.float() * torch.randint_like(rows, 2, dtype=torch.float32).mul(2).sub(1)).sum()
