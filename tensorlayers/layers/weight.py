"""The `.weight` of a factorized layer: dense and differentiable, built only when its values are used."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..errors import ReadOnlyWeightError

_WRITE = (
    "the weight of a factorized layer is computed from its cores and cannot be written to ({what}): "
    "use reset_parameters() to draw new cores, from_dense() to fit them to a dense weight, requires_grad_() of the "
    "layer to keep them as they are"
)

# normal_, add_; weight[0] = ..., weight.data = ..., del weight[0]; weight += ...
_IN_PLACE = re.compile(r".*[^_]_|__(set|setitem|delitem)__|__i(?!nvert|ndex|nt)\w+__")


def _function(name: str) -> Any:
    """The object that ``__torch_function__`` receives for a method or an attribute read of Tensor."""
    member = getattr(Tensor, name)
    return member if callable(member) else member.__get__


def _detached(weight: DenseWeight) -> DenseWeight:
    return DenseWeight(weight._build, weight._shape, weight._core, False)


# Answered here: what depends on the cores, but not on their values.
_ANSWERS: dict[Any, Callable[[DenseWeight], Any]] = {
    _function("requires_grad"): lambda weight: weight._differentiable,
    _function("is_leaf"): lambda weight: not weight._differentiable,
    _function("grad"): lambda weight: None,
    _function("data"): _detached,
    _function("detach"): _detached,
    _function("__repr__"): lambda weight: f"DenseWeight(shape={weight._shape}, dtype={weight._core.dtype})",
}
# Answered by the tensor object itself, without values.
_ATTRIBUTES = """
shape dtype device ndim layout is_cuda is_cpu is_meta is_sparse is_quantized is_nested is_mps is_xpu itemsize nbytes dim
size numel nelement element_size is_floating_point is_complex is_contiguous stride storage_offset get_device
is_inference is_signed is_conj is_neg is_mkldnn __len__ __hash__
"""
_METADATA = {_function(name) for name in _ATTRIBUTES.split()}
_METADATA |= {torch.numel, torch.is_floating_point, torch.is_complex, torch.is_signed, torch.is_conj, torch.is_neg}


class DenseWeight(Tensor):
    """A tensor that knows its shape, dtype and device, and builds its values from the cores on first real use.

    Libraries read ``layer.weight`` for its dtype, device or shape, or test whether it is a tensor, many times a
    forward; that builds nothing. Any operation builds the dense weight (differentiable in the cores) and acts on
    it. Writing in place raises `ReadOnlyWeightError`: the write would be lost. What an operation returns, a slice or
    a view too, is a tensor of its own: a write into that changes the layer as little.
    """

    _build: Callable[[], Tensor]
    _shape: tuple[int, ...]
    _core: Tensor
    _differentiable: bool

    @staticmethod
    def __new__(
        cls: type[DenseWeight], build: Callable[[], Tensor], shape: Sequence[int], core: Tensor, differentiable: bool
    ) -> DenseWeight:
        weight: DenseWeight = Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=core.dtype, device=core.device, layout=torch.strided
        )
        weight._build, weight._shape, weight._core, weight._differentiable = build, tuple(shape), core, differentiable
        return weight

    def _dense(self) -> Tensor:
        dense = self._build()
        return dense if self._differentiable else dense.detach()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _ANSWERS:
            return _ANSWERS[func](args[0])
        if func in _METADATA or (func is Tensor.type and len(args) == 1 and not kwargs):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        target = args[0] if args else kwargs.get("tensor", kwargs.get("input"))
        targets = target if isinstance(target, (list, tuple)) else (target,)  # a list: torch._foreach_*
        if _IN_PLACE.fullmatch(name) and any(isinstance(item, DenseWeight) for item in targets):
            raise ReadOnlyWeightError(_WRITE.format(what=name))
        if isinstance(kwargs.get("out"), DenseWeight):
            raise ReadOnlyWeightError(_WRITE.format(what=f"{name}, out="))
        built: dict[int, Tensor] = {}

        def dense(value: Any) -> Any:
            if not isinstance(value, DenseWeight):
                return value
            if id(value) not in built:
                built[id(value)] = value._dense()
            return built[id(value)]

        return func(*tree_map(dense, tuple(args)), **tree_map(dense, kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # Reached only from C++ that holds the wrapper itself (a fused operator).
        return func(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs or {}))

    def set_(self, *args: Any, **kwargs: Any) -> Any:
        raise ReadOnlyWeightError(_WRITE.format(what="set_"))

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self._dense().detach().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._dense().detach().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def _unwrap(value: Any) -> Any:
    return value._dense() if isinstance(value, DenseWeight) else value
