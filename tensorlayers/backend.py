"""Triton, which is optional: whether its kernels can run a product here, and loading them.

Nothing imports the kernels by statement: a module is loaded when a product needs it first.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from . import launch_tables
from .errors import KernelError

SWITCHED_OFF = "use_kernels, or what the layer demands, switches it off"
INTERPRETED = "on the CPU, in Triton's interpreter, only where it is demanded"
"""Why a kernel does not run that could."""

_mode = "auto"
_entered: list[list[str]] = []  # the blocks that are open, each a list of its own, so that it is found again


def mode() -> str:
    """What `use_kernels` asks for."""
    return _mode


@contextmanager
def use_kernels(mode: str) -> Iterator[None]:
    """Choose between Triton kernels and torch, for the calls inside the ``with`` block, in all threads.

    A backward runs as its forward did, wherever it is called.

    Parameters
    ----------
    mode : {"auto", "torch", "triton"}
        ``"auto"``: Triton kernels on a GPU, where they are predicted to be faster. ``"torch"``: never, even where a
        layer demands one. ``"triton"``: for every product of a factorized linear layer and every lookup, and an error
        where none supports it (on the CPU, Triton needs its interpreter, ``TRITON_INTERPRET=1`` set before it is
        imported). What has no kernels runs by torch: convolutions, frozen layers, exported graphs, lookups under
        torch.func.

    Raises
    ------
    KernelError
        If there is no such mode.
    """
    global _mode
    if mode not in ("auto", "torch", "triton"):
        raise KernelError(f"use_kernels: 'auto', 'torch' or 'triton'; got {mode!r}")
    # One variable, on which torch.compile guards. Blocks of several threads may end in any order.
    own = [mode]
    _entered.append(own)
    _mode = mode
    try:
        yield
    finally:
        _entered[:] = [other for other in _entered if other is not own]
        _mode = _entered[-1][0] if _entered else "auto"


@lru_cache
def load(name: str) -> ModuleType:
    """A module of kernels."""
    return importlib.import_module(f"tensorlayers.kernels.{name}")


def readable(tensor: Tensor) -> Tensor:
    """A tensor as a kernel reads it, which is given its memory alone: torch negates some, and fills others, lazily."""
    if tensor._is_zerotensor():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return tensor.resolve_neg()


def refusal(device: str, dtype: str) -> str | None:
    """Why no Triton kernel can run products on a type of device, of GPUs the current one; None where they can.

    The dtype is one that `precision.multiplied_as` names.
    """
    if dtype not in ("float16", "bfloat16", "tf32", "float32"):
        return f"dtype {dtype}"
    if device not in ("cpu", "cuda"):
        return f"device {device}"
    if device == "cpu" and dtype == "bfloat16":
        return "Triton's interpreter computes bfloat16 wrongly"
    if not is_present():
        return "Triton is not installed"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "on the CPU Triton needs its interpreter"
    return launch_tables.refusal(launch_tables.architecture(device)) if device == "cuda" else None


@lru_cache(maxsize=1)
def is_present() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def elements(dtype: str) -> str:
    """What the launch tables call a dtype: "half", "tf32" or "float32"."""
    return "half" if dtype.endswith("16") else dtype
