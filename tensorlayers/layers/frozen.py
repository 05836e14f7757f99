"""Freezing: a layer keeps its dense weight, and computes by torch's own layer, until something changes the cores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from .. import autograd
from ..errors import NetworkError
from .kind import LayerKind

if TYPE_CHECKING:
    from typing import Self

_M = TypeVar("_M", bound=nn.Module)


class _Held:
    """A parameter that frozen layers keep without a gradient, and whether it had one before."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.wanted = parameter.requires_grad
        self.layers: WeakSet[Freezable] = WeakSet()


class _Source:
    """A tensor that a dense weight was built from, and where and what it was then."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.state = self._state()
        # Keeps the memory: no other values can come to lie at this address.
        self.memory = tensor.detach()

    def _state(self) -> tuple[Any, ...]:
        tensor = self.tensor
        return tensor._version, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()

    def is_as_it_was(self, tensor: Tensor) -> bool:
        """Whether `tensor` is this very object, not written to since and not meant to be trained."""
        trained = isinstance(tensor, nn.Parameter) and tensor.requires_grad
        return tensor is self.tensor and not trained and self._state() == self.state


@dataclass(frozen=True, eq=False)
class _Frozen:
    """What a frozen layer has: torch's layer with the cached weight, and what that rests on."""

    dense: nn.Module
    sources: tuple[_Source, ...]
    held: tuple[_Held, ...]


# Beside the layers, not in them: so no state_dict, copy or pickle can hold a cached weight.
_frozen: WeakKeyDictionary[Freezable, _Frozen] = WeakKeyDictionary()
# By the parameter's id, which is its own as long as the entry lives: that is, as long as a layer holds it.
_held: WeakValueDictionary[int, _Held] = WeakValueDictionary()
_hooked = False


class Freezable(nn.Module, LayerKind):
    """What freezing adds to a factorized layer."""

    cores: nn.ParameterList
    bias: nn.Parameter | None

    def freeze(self) -> Self:
        """Build the dense weight once, and from now on compute by torch's own layer with it.

        In evaluation and in training mode: gradients reach the input, the cores get none (`requires_grad` of cores
        and bias is cleared, and remembered), and `rank_dropout` does not act. The weight takes as much memory as a
        dense layer's, `cached_bytes`, beside the cores. Of a layer that is frozen the weight is built anew.

        The layer is thawed, as by `unfreeze`, by whatever changes what the weight was built from, or is meant to:
        ``load_state_dict``, ``.to()`` and its kin, `truncate` and `reset_parameters`, an optimizer's step that reaches
        a core, any write to a core, another core in its place, ``requires_grad`` set on a core, and another setting
        of the layer (``layer.stride = 2``). The next forward, and `frozen`, see it.

        Returns
        -------
        FactorizedLayer
            This layer.

        Raises
        ------
        NetworkError
            Where the cores have no values of their own that can be watched: on the meta device, made in inference
            mode, computed by a parametrization, or of a subclass of Tensor.

        Notes
        -----
        The cached weight is no parameter and no buffer, and in no state_dict, pickle or copy; a copy is not frozen,
        and its `requires_grad` is what this layer's was. torch.compile, torch.export, torch.jit.trace, the transforms
        of torch.func, and ``functional_call`` with other cores compute with the cores.

        The bias is not part of what is cached: it can be trained, by its ``requires_grad``, while the layer is
        frozen. Cores that several layers share get no gradient as long as one of these layers is frozen.

        What cannot be seen: writes through ``core.data``, by a custom optimizer that is no ``torch.optim.Optimizer``
        and does not count versions, or by a CUDA graph that is replayed. Call `freeze` again after those. A CUDA
        graph that was captured while the layer was frozen must not be replayed once it is thawed.
        """
        global _hooked
        refusal = self._freeze_refusal()
        if refusal:
            raise NetworkError(f"freeze: {refusal}")
        if not _hooked:
            register_optimizer_step_post_hook(_after_step)
            _hooked = True
        _release(self)
        with torch.inference_mode(False), torch.no_grad():
            dense = self._torch_module().requires_grad_(False)
            sources = tuple(_Source(tensor) for tensor in _sources(self))
        held = tuple(_held.setdefault(id(parameter), _Held(parameter)) for parameter in self.parameters())
        for one in held:
            one.layers.add(self)
            one.wanted |= one.parameter.requires_grad  # set while another layer held it
            one.parameter.requires_grad_(False)
        _frozen[self] = _Frozen(dense, sources, held)
        return self

    def unfreeze(self) -> Self:
        """Drop the cached weight, and give cores and bias the ``requires_grad`` back that `freeze` cleared.

        One that was set since stays. Cores that another frozen layer shares get it back when that one is thawed.

        Returns
        -------
        FactorizedLayer
            This layer, frozen or not before.
        """
        _release(self)
        return self

    @property
    def frozen(self) -> bool:
        """Whether forward computes with a cached dense weight. See `freeze`."""
        return not torch.compiler.is_compiling() and _current(self) is not None

    @property
    def cached_bytes(self) -> int:
        """Bytes of the cached dense weight; 0 unless the layer is frozen."""
        state = _current(self)
        return 0 if state is None else state.dense.get_parameter("weight").nbytes

    def _frozen_forward(self) -> Callable[..., Tensor] | None:
        """The forward of torch's own layer with the cached weight; None where the cores are to be computed with."""
        if not is_any_frozen():
            return None
        state = _current(self)
        if state is None or autograd.is_traced() or autograd.is_jit_traced():
            return None
        slots = state.dense._parameters
        if "bias" in slots:
            weight, bias = slots["weight"], self.bias
            assert weight is not None
            # The layer's own, whatever it is at this call.
            slots["bias"] = bias if bias is None or bias.dtype == weight.dtype else bias.to(weight.dtype)  # type: ignore[assignment]
        return state.dense.forward

    def _torch_module(self) -> nn.Module:
        """A layer of torch with the dense weight, nothing aliased."""
        raise NotImplementedError

    def _freeze_refusal(self) -> str:
        """Why this layer cannot be frozen; empty where it can."""
        tensors = _sources(self)
        if len(self.cores._parameters) < len(self.cores):
            return "cores that are parameters; here a parametrization computes some"
        for tensor in tensors:
            if tensor.is_meta:
                return "cores with values; these are on the meta device"
            if tensor.is_inference():
                return "cores made outside of inference mode, in which torch does not count writes"
            if type(tensor.data) is not Tensor:
                return f"cores that are plain tensors; got a {type(tensor.data).__name__}"
        return ""

    def _thaw(self) -> None:
        """Unfreeze this layer and all that share its cores, which are about to change, or have."""
        if not _frozen:
            return
        _release(self)
        for parameter in self.parameters():
            held = _held.get(id(parameter))
            for layer in list(held.layers) if held is not None else ():
                _release(layer)

    # -- what thaws a layer -----------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._thaw()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._thaw()
        super()._load_from_state_dict(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # The bias is read at each call.
        if _frozen and self in _frozen and name != "bias" and name in self.settings_of(self):
            self._thaw()

    # -- copies -----------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        parameters = list(self.parameters())
        if not any(id(parameter) in _held for parameter in parameters):
            return self.__dict__
        return {**self.__dict__, _WANTED: [wants_grad(parameter) for parameter in parameters]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        wanted = state.pop(_WANTED, [])
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for parameter, flag in zip(self.parameters(), wanted, strict=False):
            # A shallow copy has the very parameters of the frozen layer.
            if id(parameter) not in _held:
                parameter.requires_grad_(flag)


_WANTED = "_wanted_grad"


def is_any_frozen() -> bool:
    """Whether there is a frozen layer at all that computes with its cached weight; quickly asked."""
    # A graph never does, and must not depend on which layers happen to be alive.
    return not torch.compiler.is_compiling() and bool(_frozen)


def wants_grad(parameter: Tensor) -> bool:
    """The ``requires_grad`` of a parameter, of one that a frozen layer holds the one that thawing gives it back."""
    held = _held.get(id(parameter))
    return parameter.requires_grad or (held is not None and held.wanted)


def freeze(model: _M) -> _M:
    """Freeze all factorized layers of a model. See `FactorizedLayer.freeze`.

    Parameters
    ----------
    model : nn.Module
        A factorized layer, or a model with some.

    Returns
    -------
    nn.Module
        The model itself. `summarize` counts the cached weights.

    Raises
    ------
    NetworkError
        If it is no module, has no factorized layer, or one cannot be frozen, which is named. No layer is then changed.

    Examples
    --------
    >>> import tensorlayers as tl
    >>> model = torch.nn.Sequential(tl.FactorizedLinear(64, 64, format=tl.TT(4)))
    >>> tl.freeze(model)[0].cached_bytes
    16384
    >>> tl.unfreeze(model)[0].cached_bytes
    0
    """
    layers = _layers(model)
    for name, layer in layers.items():
        refusal = layer._freeze_refusal()
        if refusal:
            raise NetworkError(f"layer {name!r}: freeze: {refusal}" if name else f"freeze: {refusal}")
    for layer in layers.values():
        layer.freeze()
    return model


def unfreeze(model: _M) -> _M:
    """Unfreeze all factorized layers of a model, those that are frozen. See `FactorizedLayer.unfreeze`.

    Parameters
    ----------
    model : nn.Module
        A factorized layer, or a model with some.

    Returns
    -------
    nn.Module
        The model itself.

    Raises
    ------
    NetworkError
        If it is no module, or has no factorized layer.
    """
    for layer in _layers(model).values():
        layer.unfreeze()
    return model


def _layers(model: nn.Module) -> dict[str, Freezable]:
    if not isinstance(model, nn.Module):
        raise NetworkError(f"model: an nn.Module; got {type(model).__name__}")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Freezable)}
    if not layers:
        raise NetworkError(f"{type(model).__name__}: a factorized layer, or a model with one; it has none")
    return layers


def _sources(layer: Freezable) -> list[Tensor]:
    """What the dense weight is computed from: the cores as they are now, and a table's row of padding."""
    cores = layer._modules["cores"]  # layer.cores takes long, for every forward
    assert cores is not None
    return [t for slots in (cores._parameters, layer._buffers) for t in slots.values() if t is not None]


def _current(layer: Freezable) -> _Frozen | None:
    """The state of a frozen layer. One whose cores have changed is thawed."""
    state = _frozen.get(layer)
    if state is None:
        return None
    now = _sources(layer)
    if len(now) == len(state.sources) and all(map(_Source.is_as_it_was, state.sources, now)):
        return state
    # Cores that are no parameters are lent by functional_call, for one call.
    if all(isinstance(core, nn.Parameter) for core in layer.cores._parameters.values()):
        layer._thaw()
    return None


def _release(layer: Freezable) -> None:
    """Drop the cached weight of one layer."""
    state = _frozen.pop(layer, None)
    for held in state.held if state is not None else ():
        held.layers.discard(layer)
        if held.wanted and not held.layers:
            held.parameter.requires_grad_(True)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Thaw the layers of which an optimizer has changed a core. Fused ones do not count versions."""
    if not _frozen:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            held = _held.get(id(parameter))
            if held is None or parameter.grad is None:  # then every optimizer leaves it alone
                continue
            for layer in list(held.layers):
                state = _frozen.get(layer)
                if state is not None and any(parameter is source.tensor for source in state.sources):
                    layer._thaw()
