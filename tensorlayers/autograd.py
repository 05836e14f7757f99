"""The rematerializing backward: what is saved is the input and the cores; all between is computed again.

A `Multilinear` product, a layer's weight applied to an input, is linear in the input and in each core. Its gradients
are two functions here, `product` and `gradients`, and each one's derivatives are sums of the same two: so it can be
differentiated any number of times. Where torch traces (torch.compile) or transforms (torch.func), both are opaque
operators; their Python loops over chunks are then never seen.
"""

from __future__ import annotations

import inspect
import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .activation import activation as activation_of
from .precision import at_least_single


class Multilinear(ABC):
    """A product that is linear in x and in each core; rows, or samples, are the first dimension of x and of y.

    Subclasses are registered by name, and built from the `spec` that `describe` gives: text, so that it can stand in
    a traced graph.
    """

    @abstractmethod
    def shape(self, x: Sequence[int]) -> tuple[int, ...]:
        """The shape of y."""

    @abstractmethod
    def forward(self, x: Tensor, cores: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        """y, outside of autograd. The bias lies along dimension 1."""

    def activated(self, x: Tensor, cores: Sequence[Tensor], bias: Tensor | None, activation: str) -> Tensor:
        """The activation of y, outside of autograd."""
        return activation_of(activation)(self.forward(x, cores, bias))

    @abstractmethod
    def gradients(self, dy: Tensor, x: Tensor, cores: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
        """The gradients of x and of each core that are needed, outside of autograd."""

    @abstractmethod
    def plain(self, x: Tensor, cores: Sequence[Tensor]) -> Tensor:
        """y, by differentiable operations of torch."""


_KINDS: dict[str, Callable[..., Multilinear]] = {}


def register(kind: str, build: Callable[..., Multilinear]) -> None:
    """Name a kind of product; `build` takes the keywords of its `describe`."""
    _KINDS[kind] = build


def describe(kind: str, **settings: Any) -> str:
    """The spec of a product: JSON text."""
    return json.dumps({"kind": kind, **settings}, separators=(",", ":"))


@lru_cache(maxsize=4096)
def built(spec: str) -> Multilinear:
    """The product of a spec."""
    settings: Mapping[str, Any] = json.loads(spec)
    return _KINDS[settings["kind"]](**{name: value for name, value in settings.items() if name != "kind"})


# -- operators --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("tensorlayers::product", mutates_args=())
def _product(x: Tensor, cores: Sequence[Tensor], bias: Tensor | None, spec: str) -> Tensor:
    return built(spec).forward(x, cores, bias)


@_product.register_fake
def _(x: Tensor, cores: Sequence[Tensor], bias: Tensor | None, spec: str) -> Tensor:
    return x.new_empty(built(spec).shape(x.shape))


@_product.register_vmap
def _(info: Any, in_dims: Any, x: Tensor, cores: Any, bias: Any, spec: str) -> tuple[Tensor, int]:
    x_dim, core_dims, bias_dim, _ = in_dims
    if x_dim is not None and bias_dim is None and all(dim is None for dim in core_dims):
        x = x.movedim(x_dim, 0)
        y: Tensor = _product(x.flatten(0, 1), cores, bias, spec)
        return y.reshape(*x.shape[:2], *y.shape[1:]), 0

    def at(k: int) -> Tensor:
        picked = [_at(core, dim, k) for core, dim in zip(cores, core_dims, strict=True)]
        one: Tensor = _product(_at(x, x_dim, k), picked, None if bias is None else _at(bias, bias_dim, k), spec)
        return one

    return torch.stack([at(k) for k in range(info.batch_size)]), 0


def _at(tensor: Tensor, dim: int | None, k: int) -> Tensor:
    return tensor if dim is None else tensor.select(dim, k)


@torch.library.custom_op("tensorlayers::gradients", mutates_args=())
def _gradients(dy: Tensor, x: Tensor, cores: Sequence[Tensor], spec: str, needs: Sequence[bool]) -> list[Tensor]:
    found = built(spec).gradients(dy, x, cores, needs)
    return [gradient for gradient in found if gradient is not None]


@_gradients.register_fake
def _(dy: Tensor, x: Tensor, cores: Sequence[Tensor], spec: str, needs: Sequence[bool]) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, is_needed in zip((x, *cores), needs, strict=True) if is_needed]


@_gradients.register_vmap
def _(
    info: Any, in_dims: Any, dy: Tensor, x: Tensor, cores: Any, spec: str, needs: Sequence[bool]
) -> tuple[list[Tensor], list[int]]:
    dy_dim, x_dim, core_dims, _, _ = in_dims
    parts = []
    for k in range(info.batch_size):
        picked = [_at(core, dim, k) for core, dim in zip(cores, core_dims, strict=True)]
        parts.append(_gradients(_at(dy, dy_dim, k), _at(x, x_dim, k), picked, spec, needs))
    return [torch.stack(gradients) for gradients in zip(*parts, strict=True)], [0] * sum(needs)


def is_traced() -> bool:
    """Whether the loops of a product must not be seen: dynamo or make_fx traces, or torch.func transforms."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    )


def _is_faked() -> bool:
    """Whether tensors have no memory: their shapes alone are wanted."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def _is_functionalized() -> bool:
    """Whether torch.func.functionalize is among the transforms: it takes no autograd.Function."""
    if not torch._C._are_functorch_transforms_active():
        return False
    functorch = torch._C._functorch
    stack = functorch.get_interpreter_stack() or ()
    return any(level.key() == functorch.TransformType.Functionalize for level in stack)


def is_jit_traced() -> bool:
    """Whether torch.jit.trace records."""
    return not torch.compiler.is_compiling() and torch._C._is_tracing()


class _Dry(threading.local):
    """Whether products give no results; see `without_results`."""

    is_on = False


_dry = _Dry()


@contextmanager
def without_results() -> Iterator[None]:
    """In this context products save what their backward needs, and return memory that nothing was written to.

    For a recomputation, which drops what it returns. Where torch traces or transforms, they give their results.
    """
    before, _dry.is_on = _dry.is_on, True
    try:
        yield
    finally:
        _dry.is_on = before


def _run(x: Tensor, cores: Sequence[Tensor], bias: Tensor | None, spec: str) -> Tensor:
    if is_traced() or _is_faked():
        y: Tensor = _product(x, list(cores), bias, spec)
        return y
    if _dry.is_on:
        return x.new_empty(built(spec).shape(x.shape))
    return built(spec).forward(x, cores, bias)


def _run_gradients(
    dy: Tensor, x: Tensor, cores: Sequence[Tensor], spec: str, needs: tuple[bool, ...]
) -> tuple[Tensor, ...]:
    if is_traced() or _is_faked():
        return tuple(_gradients(dy, x, list(cores), spec, list(needs)))
    if torch._C._functorch.is_legacy_batchedtensor(dy):
        return _gradients_of_many(dy, x, cores, spec, needs)
    return tuple(t for t in built(spec).gradients(dy, x, cores, needs) if t is not None)


def _gradients_of_many(
    dy: Tensor, x: Tensor, cores: Sequence[Tensor], spec: str, needs: tuple[bool, ...]
) -> tuple[Tensor, ...]:
    """For ``torch.autograd.grad(is_grads_batched=True)``, whose tensors cannot be written to."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_(is_needed) for t, is_needed in zip((x, *cores), needs, strict=True)]
        y = built(spec).plain(leaves[0], leaves[1:])
    return torch.autograd.grad(y, [leaf for leaf in leaves if leaf.requires_grad], dy)


# -- differentiation --------------------------------------------------------------------------------------------------


class _Product(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(spec: str, x: Tensor, bias: Tensor | None, *cores: Tensor) -> Tensor:
        return _run(x, cores, bias, spec)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.spec, x, bias, *cores = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        # The gradients of the cores alone need the values of x: where they are frozen, a dense layer keeps none either.
        ctx.like = None if any(ctx.needs_input_grad[3:]) else (x.shape, x.stride())
        ctx.save_for_backward(x if ctx.like is None else None, *cores)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *cores = ctx.saved_tensors
        if x is None:
            x = torch.empty_strided(*ctx.like, dtype=dy.dtype, device=dy.device)
        _, needs_x, needs_bias, *needs_cores = ctx.needs_input_grad
        needs = (needs_x, *needs_cores)
        found = _gradients_of(ctx.spec, needs, dy, x, cores)
        bias = None
        if needs_bias:
            over = [axis for axis in range(dy.dim()) if axis != 1]
            bias = dy.sum(over, dtype=at_least_single(dy.dtype)).to(ctx.bias_dtype)
        return None, found[0], bias, *found[1:]


class _Gradients(torch.autograd.Function):
    """The gradients of a product are linear in dy, x and each core but their own: they are its partial products."""

    generate_vmap_rule = True

    @staticmethod
    def forward(spec: str, needs: str, dy: Tensor, x: Tensor, *cores: Tensor) -> tuple[Tensor, ...]:
        return _run_gradients(dy, x, cores, spec, _read(needs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.spec, needs, *tensors = inputs
        ctx.needs = _read(needs)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *directions: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, *operands = ctx.saved_tensors
        _, _, needs_dy, *needs = ctx.needs_input_grad
        total_dy: Tensor | None = None
        totals: list[Tensor | None] = [None] * len(operands)
        # <direction of operand k, its gradient> is the product with that operand replaced by the direction.
        given = iter(directions)
        for k, is_needed in enumerate(ctx.needs):
            direction = next(given) if is_needed else None
            if direction is None:
                continue
            x, *cores = [direction if j == k else operand for j, operand in enumerate(operands)]
            if needs_dy:
                total_dy = _sum(total_dy, product(ctx.spec, x, cores))
            others = tuple(wanted and j != k for j, wanted in enumerate(needs))
            found = _gradients_of(ctx.spec, others, dy, x, cores)
            totals = [total if new is None else _sum(total, new) for total, new in zip(totals, found, strict=True)]
        return None, None, total_dy, *totals

    @staticmethod
    def jvp(ctx: Any, *directions: Any) -> tuple[Tensor, ...]:
        dy, *operands = ctx.saved_tensors
        _, _, of_dy, *given = directions
        totals: list[Tensor | None] = [None] * len(operands)
        parts = [] if of_dy is None else [(of_dy, operands, ctx.needs)]
        for k, direction in enumerate(given):
            if direction is not None:
                others = tuple(is_needed and j != k for j, is_needed in enumerate(ctx.needs))
                parts.append((dy, [direction if j == k else t for j, t in enumerate(operands)], others))
        for dy_part, (x, *cores), needs in parts:
            found = _gradients_of(ctx.spec, needs, dy_part, x, cores)
            totals = [total if new is None else _sum(total, new) for total, new in zip(totals, found, strict=True)]
        pairs = zip(totals, operands, ctx.needs, strict=True)
        return tuple(torch.zeros_like(t) if total is None else total for total, t, is_needed in pairs if is_needed)


# Found once, and not by each `apply`: that takes as long as a small product.
_forward: Any
for _forward in (_Product.forward, _Gradients.forward):
    _forward.__signature__ = inspect.signature(_forward)


# torch.compile does not trace a Function that has a `jvp`; where it traces, nothing asks for one.
class _ForwardProduct(_Product):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _Product.setup_context(ctx, inputs, output)
        ctx.shape = output.shape
        ctx.save_for_forward(inputs[1], *inputs[3:])

    @staticmethod
    def jvp(ctx: Any, *directions: Any) -> Tensor:
        operands = ctx.saved_tensors
        _, x, bias, *cores = directions
        total: Tensor | None = None
        for replaced in _replaced(operands, (x, *cores)):
            total = _sum(total, product(ctx.spec, replaced[0], replaced[1:]))
        if bias is not None:
            along = bias.view(-1, *(1 for _ in ctx.shape[2:])).expand(ctx.shape)
            total = along.clone() if total is None else total + along
        return operands[0].new_zeros(ctx.shape) if total is None else total


def _replaced(operands: Sequence[Tensor], directions: Sequence[Tensor | None]) -> Iterator[list[Tensor]]:
    """The operands with one of them replaced by its direction, for each that has one."""
    for k, direction in enumerate(directions):
        if direction is not None:
            yield [direction if j == k else operand for j, operand in enumerate(operands)]


def _sum(total: Tensor | None, new: Tensor) -> Tensor:
    return new if total is None else total + new


def _read(needs: str) -> tuple[bool, ...]:
    return tuple(flag == "1" for flag in needs)


def _gradients_of(
    spec: str, needs: tuple[bool, ...], dy: Tensor, x: Tensor, cores: Sequence[Tensor]
) -> list[Tensor | None]:
    if not any(needs):
        return [None] * len(needs)
    # What is compiled is differentiated once.
    if torch.compiler.is_compiling() or not _is_differentiated(dy, x, *cores):
        found = iter(_run_gradients(dy, x, cores, spec, needs))
    else:
        # As text: torch.func takes a tuple among the arguments apart.
        written = "".join("01"[is_needed] for is_needed in needs)
        found = iter(_Gradients.apply(spec, written, dy, x, *cores))  # type: ignore[no-untyped-call]
    return [next(found) if is_needed else None for is_needed in needs]


def product(
    spec: str,
    x: Tensor,
    cores: Sequence[Tensor],
    bias: Tensor | None = None,
) -> Tensor:
    """A product, differentiable any number of times; saved for backward are `x` and the cores.

    Parameters
    ----------
    spec : str
        See `describe`.
    x : Tensor
        Its first dimension: rows, or samples.
    cores : sequence of Tensor
        The dtype and device of `x`.
    bias : Tensor, optional
        Along dimension 1 of the result.

    Returns
    -------
    Tensor
    """
    if torch.compiler.is_compiling():
        function: type[_Product] = _Product
    elif _is_functionalized():
        y = built(spec).plain(x, cores)
        return y if bias is None else y + bias.view(-1, *(1 for _ in y.shape[2:]))
    else:
        function = _ForwardProduct
    if _is_differentiated(x, bias, *cores):
        found: Tensor = function.apply(spec, x, bias, *cores)  # type: ignore[no-untyped-call]
        return found
    return _run(x, cores, bias, spec)


def _is_differentiated(*tensors: Tensor | None) -> bool:
    """Whether a derivative of any kind may be asked of what these give."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return True
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
