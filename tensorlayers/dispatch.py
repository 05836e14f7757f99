"""What runs: each product as `decision` predicts it to be fastest, by torch's operations or by Triton kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import autograd, backend, codegen, conv_chunks, convolution, decision, functional
from .activation import activation as activation_of
from .backend import use_kernels as use_kernels
from .contraction import constant_when_compiled
from .conv_maps import Window
from .convolution import ConvPlan
from .errors import KernelError
from .network import Network
from .precision import cast_for_autocast, multiplied_as
from .products import row_product, window_product
from .program import Program
from .small import SMALL, is_small, small

NAMES = (*decision.NAMES, *decision.KERNELS)
"""What can be demanded of a layer, as its `implementation`."""

_ALLOWED = {"recompute": -1.0, "auto": 0.1, "store": 1.0}
"""What may be kept for backward beside the input, in sizes of the input."""

_STORING = ("contraction", "merged")
"""The ways that can keep their activations: all rows at once, and not the dense weight."""


def kernels_for(x: Tensor, implementation: str | None) -> tuple[str | None, bool]:
    """What is demanded of a product with `x`, a way or any that Triton kernels make, and whether these may run."""
    return _kernels_for(backend.mode(), x.device.type, multiplied_as(x.dtype, x.device.type), implementation)


FULL_PRECISION = "full float32 precision does not use the matrix units"
"""Why no kernel is taken for it on a GPU unless one is demanded."""


# A compiled graph keeps what is found: the search for Triton cannot be traced.
@constant_when_compiled
def _kernels_for(mode: str, device: str, dtype: str, implementation: str | None) -> tuple[str | None, bool]:
    if implementation is not None and implementation not in NAMES:
        raise KernelError(f"implementation: None or one of {', '.join(NAMES)}; got {implementation!r}")
    if mode == "torch":
        return (None if implementation in decision.KERNELS else implementation), False
    is_demanded = mode == "triton" or implementation in decision.KERNELS
    if not is_demanded and (implementation is not None or device != "cuda"):
        return implementation, False
    refusal = backend.refusal(device, dtype)
    if is_demanded and implementation in decision.NAMES:
        refusal = f"{implementation!r} is demanded of the layer"
    if is_demanded and refusal is not None:
        raise KernelError(f"no Triton kernel supports this call: {refusal}")
    if not is_demanded and dtype == "float32":
        refusal = FULL_PRECISION
    return implementation or (decision.TRITON if is_demanded else None), refusal is None


def is_plain(x: Tensor) -> bool:
    """Whether nothing changes what a product of `x` runs: on the CPU, not traced, no autocast, no `use_kernels`."""
    return (
        backend.mode() == "auto"
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
    """Rows times a network, by the implementation that is demanded or decided for."""
    forced, kernels = kernels_for(rows, implementation)
    bias = None if bias is None else bias.to(rows.dtype)
    if torch.compiler.is_compiling():
        if _is_known_small(rows, network) and forced is None:
            return functional.contract_rows(rows, network, cores, bias)
        return autograd.product(row_product(network, forced, kernels), rows, cores, bias)
    if forced is None and is_small(network, rows.shape[0]):
        return small(network).run(functional.padded(rows, network), cores, bias)
    stored = stored_program(network, rows, forced, backward) if torch.is_grad_enabled() else None
    if stored is not None:
        return codegen.compiled(stored)(functional.padded(rows, network), cores, bias)
    return autograd.product(row_product(network, forced, kernels), rows, cores, bias)


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
            assert isinstance(program, Program)
            if program.intermediate * len(rows) + program.copies + program.merged <= allowed:
                fitting.append((candidate.seconds, program))
    return min(fitting, key=lambda pair: pair[0])[1] if fitting else None


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

    def product(rows: Tensor, network: Network, cores: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        return _multiply(rows, network, cores, bias, implementation, backward)

    return functional.linear(x, network, cores, bias, out_features=out_features, product=product)


def activated(
    x: Tensor,  # (*batch, in_features)
    network: Network,
    cores: Sequence[Tensor],
    bias: Tensor | None = None,  # (out_features,)
    *,
    activation: str,
    out_features: int | None = None,
    implementation: str | None = None,
) -> Tensor:  # (*batch, out_features)
    """`linear` and an activation, without gradients; a Triton kernel applies both to what it stores.

    Parameters
    ----------
    x, network, cores, bias, out_features, implementation
        As of `linear`.
    activation : str
        One of `activation.ACTIVATIONS`.

    Raises
    ------
    NetworkError, KernelError
        As `linear`; or if there is no such activation.
    """
    apply = activation_of(activation)
    is_padded = (out_features or network.features("out")) != network.features("out")
    rows = cast_for_autocast(x)[0]
    forced, kernels = kernels_for(rows, implementation)
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not kernels or is_padded:
        return apply(linear(x, network, cores, bias, out_features=out_features, implementation=implementation))
    rows, *cores = cast_for_autocast(x, *cores)

    def product(rows: Tensor, network: Network, cores: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.to(rows.dtype)
        return autograd.built(row_product(network, forced, kernels)).activated(rows, cores, bias, activation)

    return functional.linear(rows, network, cores, bias, out_features=out_features, product=product)


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
