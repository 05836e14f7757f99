"""Which implementation runs: records in order of preference, the first that supports the call wins.

A record names a module and loads it on first use, so that Triton stays optional.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from . import contraction, functional
from .convolution import Window
from .errors import KernelError
from .network import Network
from .precision import cast_for_autocast

# Order-2 tensor train: o1 i1 r, r o2 i2.
_TT2 = (((0, 1, 2), (2, 3, 4)), ((0, "out"), (3, "out"), (1, "in"), (4, "in")))


@dataclass(frozen=True)
class Implementation:
    """A Triton kernel that can multiply rows with a network.

    Parameters
    ----------
    name : str
    module : str
        Dotted path; it has ``linear(x, network, cores)`` with the meaning of `functional.contract_rows`.
    refusal : callable
        (network, device type, dtype) -> None where the kernel can run, else why it cannot.
    """

    name: str
    module: str
    refusal: Callable[[Network, str, torch.dtype], str | None]


def _tt2_refusal(network: Network, device: str, dtype: torch.dtype) -> str | None:
    if network.pattern != _TT2:
        return "not a tensor train of two cores"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {dtype}"
    if device == "cpu" and dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly"
    if device != "cpu" and dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "full float32 precision does not use the matrix units"
    return None


IMPLEMENTATIONS: tuple[Implementation, ...] = (Implementation("tt2", "tensorlayers.kernels.tt2", _tt2_refusal),)

_PRODUCTS: dict[str, functional.Product] = {"torch": functional.contract_rows}
"""The implementations loaded so far, by name."""

_mode = "auto"


@contextmanager
def use_kernels(mode: str) -> Iterator[None]:
    """Choose between Triton kernels and torch, for the calls inside the ``with`` block.

    Parameters
    ----------
    mode : {"auto", "torch", "triton"}
        ``"auto"``: a Triton kernel on a CUDA device where one supports the call. ``"torch"``: never.
        ``"triton"``: always, and an error where none supports the call (on the CPU, Triton needs its interpreter,
        ``TRITON_INTERPRET=1`` set before it is imported).
    """
    global _mode
    if mode not in ("auto", "torch", "triton"):
        raise KernelError(f"use_kernels: 'auto', 'torch' or 'triton'; got {mode!r}")
    before, _mode = _mode, mode
    try:
        yield
    finally:
        _mode = before


def choose(x: Tensor, network: Network) -> functional.Product:
    """The implementation for a call: a kernel, or the reference contraction."""
    if _mode != "triton" and not x.is_cuda:
        return functional.contract_rows
    return _PRODUCTS[_chosen(network, _mode, x.device.type, x.dtype)]


# A compiled graph keeps the name; neither the search nor an import can be traced.
@contraction.constant_when_compiled
def _chosen(network: Network, mode: str, device: str, dtype: torch.dtype) -> str:
    """The name of the implementation, which is loaded then."""
    if mode == "torch" or (mode == "auto" and not _triton_present()):
        return "torch"
    reasons = []
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        reasons.append("on the CPU Triton needs its interpreter")
    else:
        for implementation in IMPLEMENTATIONS:
            reason = implementation.refusal(network, device, dtype)
            if reason is None:
                if implementation.name not in _PRODUCTS:
                    _PRODUCTS[implementation.name] = importlib.import_module(implementation.module).linear
                return implementation.name
            reasons.append(f"{implementation.name}: {reason}")
    if mode == "triton":
        raise KernelError(f"no Triton kernel supports this call: {'; '.join(reasons)}")
    return "torch"


@lru_cache(maxsize=1)
def _triton_present() -> bool:
    return importlib.util.find_spec("triton") is not None


def linear(
    x: Tensor,  # (*batch, in_features)
    network: Network,
    cores: Sequence[Tensor],
    bias: Tensor | None = None,  # (out_features,)
    *,
    out_features: int | None = None,
) -> Tensor:  # (*batch, out_features)
    """`functional.linear` by the implementation that `choose` picks; under autocast, in its dtype."""
    x, *cores = cast_for_autocast(x, *cores)
    product = choose(x, network)
    return functional.linear(x, network, cores, bias, out_features=out_features, product=product)


def conv(
    x: Tensor,  # (batch, in_channels, *spatial)
    network: Network,
    cores: Sequence[Tensor],
    window: Window,
    bias: Tensor | None = None,  # (out_channels,)
    *,
    out_channels: int | None = None,
) -> Tensor:  # (batch, out_channels, *spatial')
    """`functional.conv`; under autocast, in its dtype."""
    x, *cores = cast_for_autocast(x, *cores)
    return functional.conv(x, network, cores, window, bias, out_channels=out_channels)
