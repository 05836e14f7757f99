"""What runs: decides for each product between torch's operations, as `decision` predicts them, and Triton kernels.

A kernel's record names a module and loads it on first use, so that Triton stays optional.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from . import autograd, codegen, contraction, conv_chunks, convolution, decision, functional
from .conv_maps import Window
from .convolution import ConvPlan
from .errors import KernelError
from .network import Network
from .precision import cast_for_autocast
from .products import row_product, window_product
from .program import Program
from .small import SMALL, is_small, small

# Order-2 tensor train: o1 i1 r, r o2 i2.
_TT2 = (((0, 1, 2), (2, 3, 4)), ((0, "out"), (3, "out"), (1, "in"), (4, "in")))


@dataclass(frozen=True)
class Kernel:
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


KERNELS: tuple[Kernel, ...] = (Kernel("tt2", "tensorlayers.kernels.tt2", _tt2_refusal),)

NAMES = (*decision.NAMES, *(kernel.name for kernel in KERNELS))
"""What can be demanded of a layer, as its `implementation`."""

_LOADED: dict[str, Callable[[Tensor, Network, Sequence[Tensor]], Tensor]] = {}
"""The kernels loaded so far, by name."""

_ALLOWED = {"recompute": -1.0, "auto": 0.1, "store": 1.0}
"""What may be kept for backward beside the input, in sizes of the input."""

_STORING = ("contraction", "merged")
"""The ways that can keep their activations: all rows at once, and not the dense weight."""

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


# A compiled graph keeps the name; neither the search nor an import can be traced.
@contraction.constant_when_compiled
def kernel_for(network: Network, mode: str, device: str, dtype: torch.dtype, wanted: str | None) -> str | None:
    """The name of the kernel that runs a product, which is loaded then; None for torch's operations."""
    if wanted is not None and wanted not in NAMES:
        raise KernelError(f"implementation: None or one of {', '.join(NAMES)}; got {wanted!r}")
    if wanted in decision.NAMES and mode != "triton":
        return None
    if wanted is None and (mode == "torch" or (mode == "auto" and (device == "cpu" or not _triton_present()))):
        return None
    reasons = []
    for kernel in KERNELS:
        reason = kernel_refusal(kernel, network, device, dtype)
        if reason is None and wanted in (None, kernel.name):
            if kernel.name not in _LOADED:
                _LOADED[kernel.name] = importlib.import_module(kernel.module).linear
            return kernel.name
        reasons.append(f"{kernel.name}: {reason or f'{wanted!r} is demanded'}")
    if mode == "triton" or wanted is not None:
        raise KernelError(f"no Triton kernel supports this call: {'; '.join(reasons)}")
    return None


def chosen_kernel(network: Network, x: Tensor, implementation: str | None) -> str | None:
    """The name of the kernel that a product with `x` runs; None for torch's operations."""
    if _mode == "auto" and implementation is None and not x.is_cuda:
        return None
    return kernel_for(network, _mode, x.device.type, x.dtype, implementation)


def kernel_refusal(kernel: Kernel, network: Network, device: str, dtype: torch.dtype) -> str | None:
    """Why a kernel cannot run a product here, of the network before the device; None where it can."""
    reason = kernel.refusal(network, device, dtype)
    if reason is None and not _triton_present():
        reason = "Triton is not installed"
    if reason is None and device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        reason = "on the CPU Triton needs its interpreter"
    return reason


@lru_cache(maxsize=1)
def _triton_present() -> bool:
    return importlib.util.find_spec("triton") is not None


def is_plain(x: Tensor) -> bool:
    """Whether nothing changes what a product of `x` runs: on the CPU, not traced, no autocast, no `use_kernels`."""
    return (
        _mode == "auto"
        and x.is_cpu
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not autograd.is_jit_traced()
    )


def _multiply(
    rows: Tensor,  # (rows, features)
    network: Network,
    cores: Sequence[Tensor],
    bias: Tensor | None,
    implementation: str | None,
    backward: str,
) -> Tensor:
    """Rows times a network, by operations of torch."""
    bias = None if bias is None else bias.to(rows.dtype)
    if torch.compiler.is_compiling():
        if _is_known_small(rows, network) and implementation is None:
            return functional.contract_rows(rows, network, cores, bias)
        return autograd.product(row_product(network, implementation), rows, cores, bias)
    if implementation is None and is_small(network, rows.shape[0]):
        return small(network).run(functional.padded(rows, network), cores, bias)
    stored = stored_program(network, rows, implementation, backward) if torch.is_grad_enabled() else None
    if stored is not None:
        return codegen.compiled(stored)(functional.padded(rows, network), cores, bias)
    return autograd.product(row_product(network, implementation), rows, cores, bias)


def stored_program(network: Network, rows: Tensor, implementation: str | None, backward: str) -> Program | None:
    """What runs as a plain chain, so that its activations are kept for backward; None where they are too many."""
    if backward == "recompute" or implementation not in (None, *_STORING) or not len(rows):
        return None
    allowed = _ALLOWED[backward] * len(rows) * network.features("in")
    fitting = []
    for option in decision.options(network, decision.task_for(rows), decision.machine_of(rows)):
        candidate = option.candidate
        if candidate is not None and option.name in (_STORING if implementation is None else (implementation,)):
            program = candidate.program
            if program.intermediate * len(rows) + program.copies + program.merged <= allowed:
                fitting.append(candidate)
    return min(fitting, key=lambda candidate: candidate.seconds).program if fitting else None


def _is_known_small(rows: Tensor, network: Network) -> bool:
    """Whether a traced product is small, whatever the sizes that its graph leaves open."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    flops = 2 * rows.shape[0] * network.features("in") * network.features("out")
    return bool(statically_known_true(flops <= SMALL))


def linear(
    x: Tensor,  # (*batch, in_features)
    network: Network,
    cores: Sequence[Tensor],
    bias: Tensor | None = None,  # (out_features,)
    *,
    out_features: int | None = None,
    implementation: str | None = None,
    backward: str = "recompute",
) -> Tensor:  # (*batch, out_features)
    """`functional.linear` by the implementation that is predicted to be fastest; under autocast, in its dtype.

    Parameters
    ----------
    x, network, cores, bias, out_features
        As of `functional.linear`.
    implementation : str, optional
        One of `NAMES`, in place of the decision.
    backward : {"recompute", "store", "auto"}
        What is kept for backward: `x` alone; activations of the size of the ranks too, where those of a row are no more
        than its features; or these where all together is at most 1.1 times `x`.

    Raises
    ------
    NetworkError
        As `functional.linear`.
    KernelError
        If a kernel is demanded that does not support the call.
    """
    x, *cores = cast_for_autocast(x, *cores)
    if torch.compiler.is_exporting() or autograd.is_jit_traced():
        # Operators of torch alone: what is exported runs where this package is not installed.
        return functional.linear(x, network, cores, bias, out_features=out_features)
    kernel = chosen_kernel(network, x, implementation)

    def product(rows: Tensor, network: Network, cores: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        if kernel is None:
            return _multiply(rows, network, cores, bias, implementation, backward)
        y = _LOADED[kernel](functional.padded(rows, network), network, cores)
        return y if bias is None else y + bias.to(y.dtype)

    return functional.linear(x, network, cores, bias, out_features=out_features, product=product)


def conv(
    x: Tensor,  # (batch, in_channels, *spatial)
    network: Network,
    cores: Sequence[Tensor],
    window: Window,
    bias: Tensor | None = None,  # (out_channels,)
    *,
    out_channels: int | None = None,
    implementation: str | None = None,
    backward: str = "recompute",
) -> Tensor:  # (batch, out_channels, *spatial')
    """`functional.conv`, of which the input alone is kept for backward; under autocast, in its dtype.

    Parameters
    ----------
    x, network, cores, window, bias, out_channels
        As of `functional.conv`.
    implementation : str, optional
        ``"contraction"``, the only one that torch's operations have here, or None.
    backward : {"recompute", "store", "auto"}
        What is kept for backward: `x` alone; what lies between the convolutions too, where it is smaller than `x`; or
        where all together is at most 1.1 times `x`.

    Raises
    ------
    NetworkError
        As `functional.conv`.
    KernelError
        If another implementation is demanded.
    """
    if implementation not in (None, "contraction"):
        raise KernelError(f"implementation: a convolution has 'contraction' alone; got {implementation!r}")
    x, *cores = cast_for_autocast(x, *cores)

    def product(
        plan: ConvPlan, x: Tensor, cores: Sequence[Tensor], window: Window, bias: Tensor | None = None
    ) -> Tensor:
        # Plain convolutions where a graph is made: a compiler decides what is kept.
        is_chain = autograd.is_traced() or autograd.is_jit_traced()
        if not is_chain and torch.is_grad_enabled():
            flops = 2 * x.shape[0] * plan.dense * math.prod(window.lengths(x.shape[2:]))
            kept = conv_chunks.between(plan, x, window) + convolution.copies(plan)
            is_chain = flops <= SMALL or kept <= _ALLOWED[backward] * x.numel()
        if is_chain:
            return convolution.execute(plan, x, cores, window, bias)
        bias = None if bias is None else bias.to(x.dtype)
        return autograd.product(window_product(network, window), x, cores, bias)

    return functional.conv(x, network, cores, window, bias, out_channels=out_channels, product=product)
