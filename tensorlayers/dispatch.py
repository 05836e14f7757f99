"""Which implementation runs: records in order of preference, the first that supports the call wins.

A record names a module and loads it on first use, so that Triton stays optional.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from . import functional
from .errors import KernelError
from .network import Network

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
        (x, network) -> None where the kernel can run, else why it cannot.
    """

    name: str
    module: str
    refusal: Callable[[Tensor, Network], str | None]

    def load(self) -> functional.Product:
        """Import the kernel's module."""
        product: functional.Product = importlib.import_module(self.module).linear
        return product


def _tt2_refusal(x: Tensor, network: Network) -> str | None:
    if network.pattern != _TT2:
        return "not a tensor train of two cores"
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {x.dtype}"
    return None


IMPLEMENTATIONS: tuple[Implementation, ...] = (Implementation("tt2", "tensorlayers.kernels.tt2", _tt2_refusal),)

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
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if _mode == "torch" or (_mode == "auto" and not (x.is_cuda and _triton_present())):
        return functional.contract_rows
    reasons = []
    if _mode == "triton" and not (x.is_cuda or interpreted):
        reasons.append(f"device {x.device}")
    else:
        for implementation in IMPLEMENTATIONS:
            reason = implementation.refusal(x, network)
            if reason is None:
                return implementation.load()
            reasons.append(f"{implementation.name}: {reason}")
    if _mode == "triton":
        raise KernelError(f"no Triton kernel supports this call: {'; '.join(reasons)}")
    return functional.contract_rows


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
    """`functional.linear` by the implementation that `choose` picks."""
    product = choose(x, network)
    return functional.linear(x, network, cores, bias, out_features=out_features, product=product)
