"""Autocast: a layer's product follows it, everything that builds, fits or draws a weight does not."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that a factorized layer can have."""


def name_of(dtype: torch.dtype) -> str:
    """A dtype as the constants of a machine name it: "float32"."""
    return str(dtype).removeprefix("torch.")


def itemsize(name: str) -> int:
    """Bytes an element of a dtype that `name_of` or the constants of a machine name ("tf32": of float32)."""
    return torch.float32.itemsize if name == "tf32" else getattr(torch, name).itemsize


def multiplied_as(dtype: torch.dtype, device: str) -> str:
    """What products of a dtype are computed in: "tf32" where a GPU rounds float32 to it, else the dtype."""
    if dtype == torch.float32 and device == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return name_of(dtype)


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    """What sums over many are taken in: float32 for half precision, else the dtype itself."""
    return torch.promote_types(dtype, torch.float32)


def _enabled(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to autocast's dtype where it is on, as torch's own linear does; float64 is left alone, as there."""
    device = tensors[0].device.type
    if not _enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """A context in which autocast is off for the device of a tensor."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if _enabled(device) else nullcontext()
