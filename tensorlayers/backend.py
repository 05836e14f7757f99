"""Triton, which is optional: whether its kernels can run a product here, and loading them.

Nothing imports the kernels by statement: a module is loaded when a product needs it first.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import lru_cache
from types import ModuleType


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
