"""FactorizedMLP: two factorized layers with an activation between them, of which the input alone is saved."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.checkpoint import checkpoint

from .. import autograd, backend
from ..activation import ACTIVATIONS
from ..activation import activation as activation_of
from ..errors import ConversionError, NetworkError
from ..formats import Format, LowRank
from .linear import FactorizedLinear

if TYPE_CHECKING:
    from typing import Self

GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}
"""Activations with a gate, ``act(gate(x)) * up(x)``, and that of the gate."""

_DEFAULT = LowRank(0.25)


class FactorizedMLP(nn.Module):
    r"""Two factorized layers and an activation, :math:`y = W_2\, a(W_1 x + b_1) + b_2`; saved for backward is x alone.

    What lies between the layers, of the size of the hidden features, is computed again in the backward pass, which
    takes one more product of the first layer. Without gradients, a Triton kernel applies bias and activation to what
    it stores.

    Parameters
    ----------
    in_features, hidden_features : int
    out_features : int, optional
        By default `in_features`.
    activation : str
        "gelu", "gelu_tanh", "silu" or "relu"; or, with a gate (a third layer like the first), "swiglu", "geglu",
        "geglu_tanh" or "reglu": :math:`y = W_2 (a(W_g x) \odot W_1 x)`.
    bias : bool
    device, dtype : optional
        As in nn.Linear.
    format : Format
        Keyword only; of all layers.

    Raises
    ------
    NetworkError
        If there is no such activation.
    RankError, ModeError, FormatError
        Where the format does not fit the features.

    References
    ----------
    Shazeer 2020, GLU variants improve transformer; Chen et al. 2016, Training deep nets with sublinear memory cost.

    Examples
    --------
    >>> mlp = FactorizedMLP(64, 256, activation="swiglu")
    >>> mlp(torch.zeros(2, 5, 64)).shape
    torch.Size([2, 5, 64])
    """

    up: nn.Module
    gate: nn.Module | None
    down: nn.Module

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        *,
        activation: str = "gelu",
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        format: Format = _DEFAULT,
    ) -> None:
        super().__init__()
        self._set_activation(activation)
        if hidden_features < 1:
            raise NetworkError(f"hidden_features: at least 1; got {hidden_features}")
        out_features = in_features if out_features is None else out_features
        widen = (in_features, hidden_features, bias, device, dtype)
        self.up = FactorizedLinear(*widen, format=format)
        self.gate = FactorizedLinear(*widen, format=format) if self.is_gated else None
        self.down = FactorizedLinear(hidden_features, out_features, bias, device, dtype, format=format)

    @classmethod
    def from_layers(
        cls, up: nn.Module, down: nn.Module, gate: nn.Module | None = None, *, activation: str = "gelu"
    ) -> Self:
        """Join layers that there are, factorized or dense; they are not copied.

        Raises
        ------
        NetworkError
            If there is no such activation.
        ConversionError
            If it has a gate and none is given, or the reverse; if one is no layer, or their features do not follow
            each other, where layers say how many they have.
        """
        mlp = cls.__new__(cls)
        nn.Module.__init__(mlp)
        mlp._set_activation(activation)
        if mlp.is_gated != (gate is not None):
            raise ConversionError(f"gate: a layer where the activation has one; got {gate} for {activation!r}")
        layers = {"up": up, "down": down} | ({} if gate is None else {"gate": gate})
        for name, layer in layers.items():
            if not isinstance(layer, nn.Module):
                raise ConversionError(f"{name}: a layer; got {layer!r}")
            given, taken = getattr(layer, "out_features", None), getattr(down, "in_features", None)
            if layer is not down and None not in (given, taken) and given != taken:
                raise ConversionError(f"{name}: as many out_features as down has in_features, {taken}; got {given}")
        mlp.up, mlp.gate, mlp.down = up, gate, down
        return mlp

    def _set_activation(self, activation: str) -> None:
        known = [name for name in ACTIVATIONS if name != "none"] + list(GATED)
        if activation not in known:
            raise NetworkError(f"activation: one of {', '.join(known)}; got {activation!r}")
        self.activation = activation

    @property
    def is_gated(self) -> bool:
        """Whether there is a third layer, whose activated result is multiplied with that of the first."""
        return self.activation in GATED

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"

    # -- forward ------------------------------------------------------------------------------------------------------

    def forward(self, input: Tensor) -> Tensor:
        if autograd.is_jit_traced():  # the same graph, whether gradients are wanted or not
            return self._plain(input)
        if not torch.is_grad_enabled():
            return self._down(self._activated(input))
        if autograd.is_traced() and not torch.compiler.is_compiling():
            return self._plain(input)  # torch.func has no checkpoints
        if torch.compiler.is_compiling():
            y: Tensor = checkpoint(self._plain, input, use_reentrant=False)
        else:
            # The state of the generators cannot be read while a CUDA graph is captured, and takes time otherwise.
            y = checkpoint(self._again(), input, use_reentrant=False, preserve_rng_state=self._may_draw())
        return y

    def _may_draw(self) -> bool:
        """Whether a forward may draw random numbers, so that a recomputation has to draw them again."""
        layers = [layer for layer in (self.up, self.gate, self.down) if layer is not None]
        return not all(
            _is_just(layer, nn.Linear, FactorizedLinear)
            and not any(is_parametrized(part) for part in layer.modules())
            and not (layer.training and bool(getattr(layer, "rank_dropout", 0)))
            for layer in layers
        )

    def _plain(self, input: Tensor) -> Tensor:
        return self._down(self._between(*self._before(input)))

    def _again(self) -> Callable[[Tensor], Tensor]:
        """The forward, which may be called again: by the same kernels, and without a result, which is dropped."""
        mode, is_again = backend.mode(), False
        is_last = _is_just(self.down, FactorizedLinear)  # what follows a product would save what it did not compute

        def run(input: Tensor) -> Tensor:
            nonlocal is_again
            with backend.use_kernels(mode) if backend.mode() != mode else nullcontext():
                hidden = self._between(*self._before(input))
                with autograd.without_results() if is_again and is_last else nullcontext():
                    is_again = True
                    return self._down(hidden)

        return run

    def _down(self, hidden: Tensor) -> Tensor:
        y: Tensor = self.down(hidden)
        return y

    def _before(self, input: Tensor) -> tuple[Tensor, ...]:
        """What the layers before the activation give."""
        return (self.up(input),) if self.gate is None else (self.gate(input), self.up(input))

    def _between(self, first: Tensor, *up: Tensor) -> Tensor:
        activated = activation_of(GATED.get(self.activation, self.activation))(first)
        return activated * up[0] if up else activated

    def _activated(self, input: Tensor) -> Tensor:
        """What the last layer is applied to; bias and activation in the kernel where there is one."""
        layer, name = self.up if self.gate is None else self.gate, GATED.get(self.activation, self.activation)
        if isinstance(layer, FactorizedLinear) and _is_just(layer, FactorizedLinear):
            first = layer.activated(input, name)
        else:
            first = activation_of(name)(layer(input))
        return first if self.gate is None else first * self.up(input)


def _is_just(layer: nn.Module, *types: type[nn.Module]) -> bool:
    """Whether calling the layer is the forward of one of these types, and nothing else."""
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    is_hooked = any(hooks) or torch.nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
    return type(layer) in types and not is_hooked and "forward" not in vars(layer)
