"""DispatchedLayer: a layer whose product the dispatcher runs, and what a user may decide in its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .. import dispatch
from ..errors import NetworkError
from .base import FactorizedLayer

if TYPE_CHECKING:
    from typing import Self

BACKWARDS = ("recompute", "store", "auto")
"""What may be kept for the backward pass, as `DispatchedLayer.backward` names it."""


class DispatchedLayer(FactorizedLayer):
    """Base of the layers that multiply by `dispatch.linear` or `dispatch.conv`."""

    _implementation: str | None = None
    _backward: str = "recompute"

    @property
    def implementation(self) -> str | None:
        """What computes the product: one of `dispatch.NAMES`. None, the default, leaves it to the dispatcher."""
        return self._implementation

    @implementation.setter
    def implementation(self, name: str | None) -> None:
        if name is not None and name not in dispatch.NAMES:
            raise NetworkError(f"implementation: None or one of {', '.join(dispatch.NAMES)}; got {name!r}")
        self._implementation = name

    @property
    def backward(self) -> str:
        """What is kept for the backward pass.

        ``"recompute"``, the default: the input alone. ``"store"``: activations of the size of the ranks too, where
        the dispatcher finds them small. ``"auto"``: those, as long as all that is kept is at most 1.1 times
        the input.
        """
        return self._backward

    @backward.setter
    def backward(self, mode: str) -> None:
        if mode not in BACKWARDS:
            raise NetworkError(f"backward: one of {', '.join(BACKWARDS)}; got {mode!r}")
        self._backward = mode

    def config(self) -> dict[str, Any]:
        return {**super().config(), "implementation": self.implementation, "backward": self.backward}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        layer = super().from_config(config)
        layer.implementation = config.get("implementation")
        layer.backward = config.get("backward", "recompute")
        return layer
