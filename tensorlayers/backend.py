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

from .errors import KernelError

_mode = "auto"


def mode() -> str:
    """What `use_kernels` asks for."""
    return _mode


@contextmanager
def use_kernels(mode: str) -> Iterator[None]:
    """Choose between Triton kernels and torch, for the calls inside the ``with`` block.

    Parameters
    ----------
    mode : {"auto", "torch", "triton"}
        ``"auto"``: Triton kernels on a GPU, where they are predicted to be faster. ``"torch"``: never, even where a
        layer demands one. ``"triton"``: always, and an error where none supports the call (on the CPU, Triton needs
        its interpreter, ``TRITON_INTERPRET=1`` set before it is imported).
    """
    global _mode
    if mode not in ("auto", "torch", "triton"):
        raise KernelError(f"use_kernels: 'auto', 'torch' or 'triton'; got {mode!r}")
    before, _mode = _mode, mode
    try:
        yield
    finally:
        _mode = before


@lru_cache
def load(name: str) -> ModuleType:
    """A module of kernels."""
    return importlib.import_module(f"tensorlayers.kernels.{name}")


def refusal(device: str, dtype: str) -> str | None:
    """Why no Triton kernel can run products on a type of device; None where they can.

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
    return None


@lru_cache(maxsize=1)
def is_present() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def elements(dtype: str) -> str:
    """What the launch tables call a dtype: "half", "tf32" or "float32"."""
    return "half" if dtype.endswith("16") else dtype
