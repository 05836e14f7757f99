"""What each output position of a convolution sees of the input (im2col), for convolutions of any dimension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def windows(module: nn.Module, x: Tensor, settings: Mapping[str, Any], transposed: bool) -> Tensor:
    """The windows of a dense convolution's input.

    Parameters
    ----------
    module : nn.Module
        Of torch's convolutions.
    x : Tensor
        Shape (batch, in_channels, *spatial), or without a batch.
    settings : mapping
        Those of the layer kind.
    transposed : bool

    Returns
    -------
    Tensor
        Shape (batch, *positions, n), where n is in_channels / groups times the kernel's sizes in this order, or
        (batch, *positions, groups, n). The output is these times the weight.
    """
    kernel, stride, dilation, groups = (settings[name] for name in ("kernel_size", "stride", "dilation", "groups"))
    d = len(kernel)
    x = x if x.dim() == d + 2 else x[None]
    if transposed:
        x = _stuffed(x, settings)
        found = _slid(x, kernel, (1,) * d, dilation).flip([*range(-d, 0)])
    else:
        mode = settings["padding_mode"]
        padding: list[int] = module._reversed_padding_repeated_twice  # type: ignore[assignment]
        found = _slid(F.pad(x, padding, "constant" if mode == "zeros" else mode), kernel, stride, dilation)
    found = found.reshape(found.shape[0], groups, -1, *found.shape[2:])
    found = found.permute([0, *range(3, 3 + d), 1, 2, *range(3 + d, 3 + 2 * d)]).flatten(-1 - d)
    return found if groups > 1 else found.squeeze(-2)


def _slid(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """A view: (batch, channels, *spatial) -> (batch, channels, *positions, *kernel)."""
    for axis, (size, step, apart) in enumerate(zip(kernel, stride, dilation, strict=True), 2):
        x = x.unfold(axis, (size - 1) * apart + 1, step)[..., ::apart]
    return x


def _stuffed(x: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """The input of which a transposed convolution is an ordinary one of stride 1: zeros between and around."""
    spatial = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], settings["stride"], strict=True)]
    wide = x.new_zeros(*x.shape[:2], *spatial)
    every: tuple[Any, ...] = (..., *(slice(None, None, step) for step in settings["stride"]))
    wide[every] = x
    around = [
        (apart * (size - 1) - pad, apart * (size - 1) - pad + more)
        for size, pad, apart, more in zip(
            *(settings[name] for name in ("kernel_size", "padding", "dilation", "output_padding")), strict=True
        )
    ]
    return F.pad(wide, [n for pair in reversed(around) for n in pair])
