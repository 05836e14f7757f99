"""The activations that a kernel can apply to what it stores, and torch's own of the same names."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from .errors import NetworkError


def _none(x: Tensor) -> Tensor:
    return x


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": _none,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Torch's function of a name.

    Raises
    ------
    NetworkError
        If there is none.
    """
    if name not in ACTIVATIONS:
        raise NetworkError(f"activation: one of {', '.join(ACTIVATIONS)}; got {name!r}")
    return ACTIVATIONS[name]
