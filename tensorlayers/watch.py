"""Watching the layers of a model while it runs: what they take and give, as rows of what their weights multiply."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .batches import unmasked
from .layers import ProjectedAttention
from .scan import Found
from .surgery import swap

Seen = Callable[[str, Tensor, Any], "Tensor | None"]
"""The name of a layer, its input and its result -> what takes the place of the result, or None."""


def runnable(model: nn.Module, found: Iterable[Found]) -> nn.Module:
    """A model in which each layer that was found is a module: itself, or where projections are packed a copy."""
    attentions = {id(attention): attention for one in found for attention, _ in one.unpacks}
    # Unpacked anew: what was found is still to be put into the model itself.
    unpacked = {key: (one, ProjectedAttention.unpack(one, copy_weights=False)) for key, one in attentions.items()}
    return swap(model, {}, False, unpacked) if unpacked else model


@contextmanager
def watching(model: nn.Module, names: Iterable[str], seen: Seen) -> Iterator[None]:
    """Call a function whenever one of these layers has run."""

    def hook_of(name: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Tensor | None:
            return seen(name, args[0] if args else next(iter(kwargs.values())), result)

        return hook

    handles = []
    try:
        for name in names:
            handles.append(model.get_submodule(name).register_forward_hook(hook_of(name), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def size(found: Found, *roles: str) -> int:
    """The product of the axes of some roles."""
    return math.prod(axis.size for axis in found.layer.axes_of(found.settings) if axis.role in roles)


def in_parts(found: Found, x: Tensor, mask: Tensor | None, most: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The input of a layer, of a convolution a few images at a time, so that their windows take so many bytes at most.

    A window is as many times a position as the kernel has entries; of padding and strides nothing is known here.
    """
    dimensions = sum(axis.role == "kernel" for axis in found.layer.axes_of(found.settings))
    whole = x.nbytes * size(found, "kernel")
    if not dimensions or x.dim() != dimensions + 2 or whole <= most or len(x) < 2:
        yield x, mask
        return
    count = max(1, len(x) * most // whole)
    masks = [mask] * len(x) if mask is None or len(mask) != len(x) else torch.split(mask, count)
    yield from zip(torch.split(x, count), masks, strict=False)


def rows_of_input(found: Found, x: Tensor, mask: Tensor | None) -> Tensor:
    """What a layer's weight multiplies: (n, inputs), (n, groups, inputs), or ids (n); masked positions left out."""
    columns = found.layer.columns(found.dense, x.detach())
    return unmasked(columns, mask, _trailing(found) if columns.is_floating_point() else 0)


def rows_of_gradient(found: Found, dy: Tensor, mask: Tensor | None) -> Tensor:
    """A gradient of its output: (n, outputs) or (n, groups, outputs)."""
    return unmasked(found.layer.gradients(found.dense, dy), mask, _trailing(found))


def _trailing(found: Found) -> int:
    return 1 + (size(found, "group") > 1)
