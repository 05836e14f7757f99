"""FactorizedLayer: what every factorized layer shares: cores that are drawn, and a dense weight."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import contraction, tensorize
from ..cost import Cost
from ..decompose import Decomposition
from ..errors import NetworkError, ReadOnlyWeightError
from ..formats import Format
from ..network import Network
from ..precision import without_autocast
from .weight import _WRITE, DenseWeight


class FactorizedLayer(nn.Module, ABC):
    """Base of the factorized layers.

    Attributes
    ----------
    format : Format
        The choices that the layer was built with.
    network : Network
        Which index sits on which core.
    cores : nn.ParameterList
        Shapes ``network.core_shapes``.
    error : float or None
        Relative error of the weight when it was decomposed, ``||W - W_hat|| / ||W||``; None where it was drawn.
    """

    kind: ClassVar[str]
    """The layer kind in plans and files."""

    format: Format
    network: Network
    cores: nn.ParameterList
    bias: nn.Parameter | None
    error: float | None
    source: str
    """The dense kind that this layer stands for."""

    def _register(
        self, format: Format, network: Network, bias: int | None, device: Any, dtype: torch.dtype | None
    ) -> None:
        """Register the cores and the bias, without values."""
        self.format, self.network, self.error = format, network, None
        self.cores = nn.ParameterList(
            nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) for shape in network.core_shapes
        )
        self.register_parameter(
            "bias", None if bias is None else nn.Parameter(torch.empty(bias, device=device, dtype=dtype))
        )

    @property
    @abstractmethod
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the dense weight, padding cut off."""

    @property
    @abstractmethod
    def fan_in(self) -> int:
        """Inputs to one output: the dense weight is drawn with standard deviation ``1 / sqrt(3 fan_in)``."""

    @abstractmethod
    def boxes(self) -> Iterator[dict[str, slice]]:
        """Slices of the modes that together cover the dense weight without its padding, each entry once."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """The dense weight, differentiable in the cores; built anew at each call."""

    @abstractmethod
    def to_module(self) -> nn.Module:
        """The dense layer with the same output: a copy of torch's kind that this one replaced."""

    @classmethod
    @abstractmethod
    def matches(cls, module: nn.Module) -> str | None:
        """The name of the dense kind that this layer can replace, or None."""

    @classmethod
    @abstractmethod
    def dense_shape(cls, module: nn.Module) -> tuple[int, ...]:
        """The shape of a dense layer's weight, out before in, whatever way it is stored."""

    @classmethod
    @abstractmethod
    def from_dense(cls, module: nn.Module, format: Format) -> FactorizedLayer:
        """Factorize a dense layer; nothing is aliased."""

    @classmethod
    @abstractmethod
    def resolve(cls, format: Format, shape: Sequence[int]) -> tuple[Network, tuple[str, ...]]:
        """The network of a format for a dense weight of this shape, and notes on clamped ranks."""

    @classmethod
    @abstractmethod
    def costs(cls, network: Network, shape: Sequence[int], rows: int) -> tuple[Cost, Cost]:
        """The cost of the dense and of the factorized product on `rows` rows."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """All that `from_config` needs to build this layer without values, as plain data for JSON."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any]) -> FactorizedLayer:
        """A layer on the meta device, as `config` described it."""

    @property
    def weight(self) -> Tensor:
        """The dense weight. Reading its shape, dtype or device builds nothing; using its values does, each time."""
        if torch.compiler.is_compiling():
            return self.to_dense()  # what is not used of it, the compiler drops
        differentiable = torch.is_grad_enabled() and any(core.requires_grad for core in self.cores)
        # Looked up when used, so that a replaced to_dense (a test's counter, say) is seen.
        return DenseWeight(lambda: self.to_dense(), self.weight_shape, self.cores[0], differentiable)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise ReadOnlyWeightError(_WRITE.format(what="assignment"))
        super().__setattr__(name, value)

    def reset_parameters(self) -> None:
        """Draw the cores, then scale them together so that *this* draw's dense weight has torch's own deviation.

        The dense weight's standard deviation is ``1 / sqrt(3 fan_in)``, what nn.Linear draws; the bias is uniform in
        ``+- 1 / sqrt(fan_in)``. Nothing is done on the meta device.
        """
        if self.cores[0].is_meta:
            return
        wanted = 1 / math.sqrt(3 * self.fan_in)
        std = self.network.core_std(wanted)
        # Drawn in float32 at least: the deviation is measured on the draw before it is rounded.
        wide = torch.float64 if self.cores[0].dtype == torch.float64 else torch.float32
        with torch.no_grad(), without_autocast(self.cores[0]):
            bound = math.sqrt(3) * std
            drawn = [
                torch.empty(core.shape, dtype=wide, device=core.device).uniform_(-bound, bound) for core in self.cores
            ]
            factor = (wanted / self._deviation(drawn)) ** (1 / len(drawn))
            for core, values in zip(self.cores, drawn, strict=True):
                core.copy_(values * factor)
            if self.bias is not None:
                bound = 1 / math.sqrt(self.fan_in)
                self.bias.uniform_(-bound, bound)
        self.error = None

    def _deviation(self, cores: Sequence[Tensor]) -> Tensor:
        """The standard deviation of the dense weight of these cores, without building it (0-d; nothing is read)."""
        squares = entries = cores[0].new_zeros(())
        for box in self.boxes():
            cut = [
                core[tuple(box.get(index, slice(None)) for index in names)]
                for names, core in zip(self.network.cores, cores, strict=True)
            ]
            squares = squares + contraction.squared_norm(self.network, cut)
            entries = entries + contraction.total(self.network, cut)
        count = math.prod(self.weight_shape)
        variance = (squares - entries**2 / count) / max(count - 1, 1)
        # A draw that is constant has no deviation to scale; its size is what there is.
        return torch.where(variance > 1e-6 * squares / count, variance, squares / count).sqrt()

    def _adopt(self, decomposition: Decomposition) -> None:
        with torch.no_grad():
            for core, values in zip(self.cores, decomposition.cores, strict=True):
                core.copy_(values)
        self.error = decomposition.error

    @property
    def dense_parameters(self) -> int:
        """Parameters of the dense weight (no bias)."""
        return math.prod(self.weight_shape)

    def extra_repr(self) -> str:
        share = self.network.num_parameters / self.dense_parameters
        return f"{self.format}, ranks={self.network.ranks}, weight parameters={share:.3g} of dense"


def linear_boxes(network: Network, out_features: int, in_features: int) -> Iterator[dict[str, slice]]:
    """Boxes that cover a linear weight of padded modes."""
    outs, ins = network.names("out"), network.names("in")
    for rows in tensorize.boxes(out_features, network.mode_sizes("out")):
        for columns in tensorize.boxes(in_features, network.mode_sizes("in")):
            yield dict(zip((*outs, *ins), (*rows, *columns), strict=True))


def layer_types() -> tuple[type[FactorizedLayer], ...]:
    """The factorized layer kinds there are, in order of definition."""
    return tuple(FactorizedLayer.__subclasses__())


def layer_type(kind: str) -> type[FactorizedLayer]:
    """The factorized layer of a kind, as plans and files name it."""
    for cls in layer_types():
        if cls.kind == kind:
            return cls
    raise NetworkError(f"layer kind {kind!r}: one of {', '.join(cls.kind for cls in layer_types())}")
