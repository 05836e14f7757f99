"""What a layer kind says of the dense layer that it stands for; all that follows from it is in base.py."""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from ..cost import Cost
from ..errors import MALFORMED, NetworkError
from ..machine import Machine
from ..network import Axis, Network

Settings = dict[str, Any]
"""The arguments that torch's own layer is built with, as plain data: all but device and dtype."""


def plain(value: Any) -> Any:
    """NumPy's integers, which torch's own layers take too, as Python's, in tuples too; all else as it is."""
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else value


def check_sizes(**sizes: Any) -> None:
    """Raise `NetworkError` where a size is no integer of at least 1, naming it."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise NetworkError(f"{name}: an integer of at least 1; got {size!r}")


class LayerKind(ABC):
    """The axes, settings and costs of a kind of layer, and how torch stores its weight."""

    kind: ClassVar[str]
    """The layer kind in plans and files."""
    dense_types: ClassVar[tuple[type[nn.Module], ...]]
    """The layers of torch that this kind can replace."""
    positions: ClassVar[int] = 1
    """Rows that this kind's costs are stated for, to each row of a linear layer."""
    overhead: ClassVar[int] = 1
    """How many times as long as an operation of a linear layer it takes to launch one of this kind's, roughly."""

    @classmethod
    @abstractmethod
    def settings_of(cls, module: nn.Module) -> Settings:
        """The settings of a dense (or factorized) layer."""

    @classmethod
    @abstractmethod
    def axes_of(cls, settings: Mapping[str, Any]) -> tuple[Axis, ...]:
        """The axes of the dense weight of a layer with these settings."""

    @classmethod
    @abstractmethod
    def shape_of(cls, settings: Mapping[str, Any]) -> tuple[int, ...]:
        """The shape of the dense weight as torch stores it."""

    @classmethod
    @abstractmethod
    def dense_cost(cls, settings: Mapping[str, Any], rows: int) -> Cost:
        """The cost of the dense layer on `rows` rows (the bias not counted)."""

    @classmethod
    @abstractmethod
    def factorized_cost(cls, network: Network, settings: Mapping[str, Any], rows: int) -> Cost:
        """The cost of the factorized layer on `rows` rows (the bias not counted)."""

    @classmethod
    def dense_seconds(
        cls, settings: Mapping[str, Any], rows: int, machine: Machine, training: bool = False, dtype: str = "float32"
    ) -> float | None:
        """The predicted time of the dense layer on `rows` rows: of a forward, or with a backward of all gradients.

        None, for both, where this kind has no estimate. The dtype is named as torch names it, or "tf32".
        """
        return None

    @classmethod
    def factorized_seconds(
        cls,
        network: Network,
        settings: Mapping[str, Any],
        rows: int,
        machine: Machine,
        training: bool = False,
        dtype: str = "float32",
    ) -> float | None:
        """The predicted time of the factorized layer, as `dense_seconds`."""
        return None

    @classmethod
    def read_settings(cls, data: Mapping[str, Any]) -> Settings:
        """Settings from plain data, as torch's own layer understands them.

        Raises
        ------
        NetworkError
            Where torch's layer refuses them.
        """
        try:
            settings = cls.settings_of(cls.dense_types[0](**data, device="meta"))
        except MALFORMED as error:
            reason = (str(error).splitlines() or [""])[0]
            raise NetworkError(f"{cls.dense_types[0].__name__} cannot be built: {reason}") from None
        for axis in cls.axes_of(settings):
            check_sizes(**{f"the {axis.role} dimension": axis.size})
        return settings

    @classmethod
    def arranged(cls, network: Network) -> Network:
        """The network with the axes of its cores in the order that this kind reads fastest."""
        return network

    @classmethod
    def matches(cls, module: nn.Module) -> str | None:
        """The name of the dense kind that this layer can replace, or None."""
        for dense in cls.dense_types:
            if isinstance(module, dense):
                return dense.__name__
        return None

    @classmethod
    def refusal(cls, module: nn.Module) -> str:
        """Why this dense layer cannot be replaced, of all that depends on its settings; empty where it can."""
        return ""

    @classmethod
    def weight_of(cls, module: nn.Module) -> Tensor:
        """The weight of a dense layer, of shape `shape_of`."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight

    @classmethod
    def to_axes(cls, weight: Tensor, settings: Mapping[str, Any]) -> Tensor:
        """The dense weight as torch stores it, with one dimension an axis."""
        return weight

    @classmethod
    def from_axes(cls, weight: Tensor, settings: Mapping[str, Any]) -> Tensor:
        """The inverse of `to_axes`."""
        return weight

    @classmethod
    def columns(cls, module: nn.Module, x: Tensor) -> Tensor:
        """What the weight of a dense layer multiplies in an input: (*positions, n), or (*positions, groups, n), where n
        is the product of the axes of role in and kernel. Of a lookup the ids, (*positions)."""
        return x

    @classmethod
    def gradients(cls, module: nn.Module, dy: Tensor) -> Tensor:
        """A gradient of the output of a dense layer as (*positions, m), or (*positions, groups, m), where m is the
        product of the axes of role out."""
        return dy

    @classmethod
    def positions_a_row(cls, settings: Mapping[str, Any]) -> int:
        """How many positions, as `columns` counts them, go with a row of those that costs are of."""
        return 1

    @property
    def deviation(self) -> float:
        """The standard deviation that torch draws the dense weight with."""
        return 1 / math.sqrt(3 * self.fan_in)

    @property
    @abstractmethod
    def fan_in(self) -> int:
        """Inputs to one output; what torch takes the bound of the bias from, ``1 / sqrt(fan_in)``."""
