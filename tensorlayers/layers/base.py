"""FactorizedLayer: what every factorized layer shares: cores that are drawn, and a dense weight."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from .. import contraction, tensorize
from ..cost import Cost
from ..errors import ConversionError, NetworkError, ReadOnlyWeightError
from ..formats import Format, from_dict
from ..network import Axis, Network, modes_by_axis
from ..precision import DTYPES, without_autocast
from .weight import _WRITE, DenseWeight

if TYPE_CHECKING:
    from typing import Self

Settings = dict[str, Any]
"""The arguments that torch's own layer is built with, as plain data: all but device and dtype."""


def check_sizes(**sizes: Any) -> None:
    """Raise `NetworkError` where a size is no integer of at least 1, naming it."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise NetworkError(f"{name}: an integer of at least 1; got {size!r}")


class Cores(nn.ParameterList):
    """The cores of a layer. They stay contiguous where a model is cast to a memory format (channels_last)."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # A memory format is for activations; nn.Module.to would demand of every core of 4 or 5 axes that it fits.
        def flat(core: Tensor) -> Tensor:
            return fn(core.flatten()).view(core.shape)

        super()._apply(flat, recurse)  # type: ignore[no-untyped-call]
        return self


class FactorizedLayer(nn.Module, ABC):
    """Base of the factorized layers.

    A layer kind says which axes its dense weight has, how torch stores it, and how it acts on an input.

    Attributes
    ----------
    format : Format
        The choices that the layer was built with.
    network : Network
        Which index sits on which core.
    cores : nn.ParameterList
        Shapes ``network.core_shapes``.
    axes : tuple of Axis
        The dimensions of the dense weight.
    error : float or None
        Relative error of the weight when it was decomposed, ``||W - W_hat|| / ||W||``; None where it was drawn.
    stack : (int, int) or None
        Of a jointly factorized layer, the number of layers that share the cores, and the position of this one.
    """

    kind: ClassVar[str]
    """The layer kind in plans and files."""
    dense_types: ClassVar[tuple[type[nn.Module], ...]]
    """The layers of torch that this kind can replace."""

    format: Format
    network: Network
    cores: nn.ParameterList
    bias: nn.Parameter | None
    axes: tuple[Axis, ...]
    error: float | None
    source: str
    """The dense kind that this layer stands for."""
    stack: tuple[int, int] | None

    # -- what a layer kind says -------------------------------------------------------------------------------------

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
    def read_settings(cls, data: Mapping[str, Any]) -> Settings:
        """Settings from plain data, as torch's own layer understands them.

        Raises
        ------
        NetworkError
            Where torch's layer refuses them.
        """
        try:
            return cls.settings_of(cls.dense_types[0](**data, device="meta"))
        except (TypeError, ValueError, RuntimeError, AssertionError, AttributeError, OverflowError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise NetworkError(f"{cls.dense_types[0].__name__} cannot be built: {reason}") from None

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

    @property
    def deviation(self) -> float:
        """The standard deviation that torch draws the dense weight with."""
        return 1 / math.sqrt(3 * self.fan_in)

    @property
    @abstractmethod
    def fan_in(self) -> int:
        """Inputs to one output; what torch takes the bound of the bias from, ``1 / sqrt(fan_in)``."""

    # -- construction -----------------------------------------------------------------------------------------------

    @classmethod
    def resolve(
        cls, format: Format, settings: Mapping[str, Any], stack: int | None = None
    ) -> tuple[Network, tuple[str, ...]]:
        """The network of a format for a layer with these settings, and notes on clamped ranks.

        Parameters
        ----------
        format : Format
        settings : mapping
        stack : int, optional
            The number of layers that are factorized jointly.
        """
        network, notes = format.resolve(cls._stacked(settings, stack))
        return cls.arranged(network), notes

    @classmethod
    def _stacked(cls, settings: Mapping[str, Any], stack: int | None) -> tuple[Axis, ...]:
        axes = cls.axes_of(settings)
        return axes if stack is None else (Axis("stack", stack), *axes)

    def _register(
        self,
        format: Format,
        bias: int | None,
        device: Any,
        dtype: torch.dtype | None,
        stack: tuple[int, int] | None,
    ) -> None:
        """Register the cores and the bias, and draw them; the settings are set already."""
        if not isinstance(format, Format):
            raise NetworkError(f"format: a Format such as LowRank(0.25); got {format!r}")
        if (dtype or torch.get_default_dtype()) not in DTYPES:
            raise NetworkError(f"dtype: one of {', '.join(str(known) for known in DTYPES)}; got {dtype}")
        if stack is not None and not 0 <= stack[1] < stack[0]:
            raise NetworkError(f"stack {stack}: (layers, position), the position below the number of layers")
        self.register_parameter(
            "bias", None if bias is None else nn.Parameter(torch.empty(bias, device=device, dtype=dtype))
        )
        settings = self.settings_of(self)
        self.format, self.error, self.stack = format, None, stack
        self.axes = self.axes_of(settings)
        self.source = self.dense_types[0].__name__
        self._set_network(self.resolve(format, settings, stack and stack[0])[0])
        self.cores = Cores(
            nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) for shape in self.network.core_shapes
        )
        self.reset_parameters()

    def _set_network(self, network: Network) -> None:
        self.network = network
        # What this layer computes with: a slice, where the cores are shared.
        self.own_network = network.without(network.names("stack"))

    @classmethod
    def from_dense(cls, module: nn.Module, format: Format) -> Self:
        """Factorize a dense layer.

        Parameters
        ----------
        module : nn.Module
            Of a kind that `matches`. Copied, never aliased; its device, dtype, training mode and requires_grad are
            kept.
        format : Format

        Returns
        -------
        FactorizedLayer
            Its `error` is the relative error of the weight.

        Raises
        ------
        ConversionError
            If the module is of another kind.
        DecompositionError, RankError, ModeError, FormatError
            See `Format.decompose`.
        """
        return cls.from_dense_jointly([module], format)[0]

    @classmethod
    def from_dense_jointly(cls, modules: Sequence[nn.Module], format: Format) -> list[Self]:
        """Factorize several dense layers of one shape as one tensor; they share the cores. See `from_dense`."""
        for module in modules:
            if cls.matches(module) is None:
                known = " or ".join(f"nn.{dense.__name__}" for dense in cls.dense_types)
                raise ConversionError(f"from_dense: an {known}; got {type(module).__name__}")
            if isinstance(getattr(module, "weight", None), nn.parameter.UninitializedParameter):
                raise ConversionError("from_dense: a layer with a shape; this one is lazy")
        if not isinstance(format, Format):
            raise ConversionError(f"from_dense: a Format such as LowRank(0.5); got {format!r}")
        settings = [cls.settings_of(module) for module in modules]
        weights = [cls.to_axes(cls.weight_of(m).detach(), s) for m, s in zip(modules, settings, strict=True)]
        count = len(modules) if len(modules) > 1 else None
        axes = cls._stacked(settings[0], count)
        decomposition = format.decompose(weights[0] if count is None else torch.stack(weights), axes)
        network = cls.arranged(decomposition.network)
        layers: list[Self] = []
        for position, module in enumerate(modules):
            layer = cls.empty(module, format, None if count is None else (count, position))
            layer.cores = layers[0].cores if layers else layer.cores
            layer.error = decomposition.error
            layers.append(layer)
        with torch.no_grad():
            for core, values, names, wanted in zip(
                layers[0].cores, decomposition.cores, decomposition.network.cores, network.cores, strict=True
            ):
                core.copy_(values.permute([names.index(index) for index in wanted]))
            for layer, module in zip(layers, modules, strict=True):
                layer._adopt(module)
        return layers

    @classmethod
    def empty(cls, module: nn.Module, format: Format, stack: tuple[int, int] | None = None) -> Self:
        """A layer like a dense one (settings, device, dtype, mode, requires_grad), without values."""
        weight, bias = module.weight, getattr(module, "bias", None)
        assert isinstance(weight, Tensor)
        layer = cls(**cls.settings_of(module), device="meta", dtype=weight.dtype, format=format, stack=stack)
        layer.to_empty(device=weight.device)
        layer.source = str(cls.matches(module))
        layer.train(module.training)
        layer.cores.requires_grad_(weight.requires_grad)
        if layer.bias is not None:
            assert isinstance(bias, Tensor)
            layer.bias.data = layer.bias.data.to(bias.dtype)
            layer.bias.requires_grad_(bias.requires_grad)
        return layer

    def _adopt(self, module: nn.Module) -> None:
        """Copy what a dense layer has beside its weight."""
        if self.bias is not None:
            self.bias.copy_(module.bias)  # type: ignore[arg-type]

    # -- the dense layer --------------------------------------------------------------------------------------------

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the dense weight as torch stores it, padding cut off."""
        return self.shape_of(self.settings_of(self))

    def to_dense(self) -> Tensor:
        """The dense weight as torch stores it, differentiable in the cores; built anew at each call."""
        with without_autocast(self.cores[0]):
            weight = contraction.dense_weight(self.own_network, self.own_cores(), self.axes)
        return self.from_axes(weight, self.settings_of(self))

    def to_module(self) -> nn.Module:
        """The dense layer of the kind that this one replaced, with the same output up to rounding; nothing aliased."""
        dense = next((cls for cls in self.dense_types if cls.__name__ == self.source), self.dense_types[0])
        module = dense(**self.settings_of(self), device="meta")
        module.weight = nn.Parameter(self.to_dense().detach(), self.cores[0].requires_grad)
        if self.bias is not None:
            module.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return module.train(self.training)

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

    def own_cores(self) -> list[Tensor]:
        """The cores of this layer alone, shapes ``own_network.core_shapes``: sliced where they are shared."""
        if self.stack is None:
            return list(self.cores)
        (name,) = self.network.names("stack")
        return [
            core.select(names.index(name), self.stack[1]) if name in names else core
            for names, core in zip(self.network.cores, self.cores, strict=True)
        ]

    def active_cores(self) -> list[Tensor]:
        """The cores that a forward multiplies with."""
        return self.own_cores()

    # -- values -----------------------------------------------------------------------------------------------------

    def reset_parameters(self) -> None:
        """Draw the cores, then scale them together so that *this* draw's dense weight has torch's own deviation.

        The bias is uniform in ``+- 1 / sqrt(fan_in)``. Nothing is done on the meta device.
        """
        if self.cores[0].is_meta:
            return
        std = self.network.core_std(self.deviation)
        # Drawn in float32 at least: the deviation is measured on the draw before it is rounded.
        wide = torch.float64 if self.cores[0].dtype == torch.float64 else torch.float32
        with torch.no_grad(), without_autocast(self.cores[0]):
            bound = math.sqrt(3) * std
            drawn = [
                torch.empty(core.shape, dtype=wide, device=core.device).uniform_(-bound, bound) for core in self.cores
            ]
            factor = (self.deviation / self._deviation(drawn)) ** (1 / len(drawn))
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
        count = self.dense_parameters * (self.stack[0] if self.stack else 1)
        variance = (squares - entries**2 / count) / max(count - 1, 1)
        # A draw that is constant has no deviation to scale; its size is what there is.
        return torch.where(variance > 1e-6 * squares / count, variance, squares / count).sqrt()

    def boxes(self) -> Iterator[dict[str, slice]]:
        """Slices of the modes that together cover the dense weight without its padding, each entry once."""
        covers = []
        for axis, modes in zip(self.axes, modes_by_axis(self.axes, self.network), strict=True):
            names = [mode.name for mode in modes]
            sizes = [mode.size for mode in modes]
            covers.append([dict(zip(names, box, strict=True)) for box in tensorize.boxes(axis.size, sizes)])
        for parts in itertools.product(*covers):
            yield {name: box for part in parts for name, box in part.items()}

    # -- plain data -------------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """All that `from_config` needs to build this layer without values, as plain data for JSON."""
        return {
            "settings": self.settings_of(self),
            "source": self.source,
            "stack": self.stack,
            "format": self.format.pin(self.network).to_dict(),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """A layer on the meta device, as `config` described it."""
        stack = config.get("stack")
        layer = cls(
            **config["settings"],
            device="meta",
            format=from_dict(config["format"]),
            stack=None if stack is None else (int(stack[0]), int(stack[1])),
        )
        layer.source = str(config["source"])
        return layer

    @property
    def dense_parameters(self) -> int:
        """Parameters of the dense weight (no bias)."""
        return math.prod(self.weight_shape)

    def extra_repr(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings_of(self).items())
        share = self.network.num_parameters / (self.dense_parameters * (self.stack[0] if self.stack else 1))
        return f"{settings}, {self.format}, ranks={self.network.ranks}, weight parameters={share:.3g} of dense"


def layer_types() -> tuple[type[FactorizedLayer], ...]:
    """The factorized layer kinds there are, in order of definition."""

    def below(cls: type[FactorizedLayer]) -> Iterator[type[FactorizedLayer]]:
        if "kind" in cls.__dict__:
            yield cls
        for child in cls.__subclasses__():
            yield from below(child)

    return tuple(below(FactorizedLayer))  # type: ignore[type-abstract]


def layer_type(kind: str) -> type[FactorizedLayer]:
    """The factorized layer of a kind, as plans and files name it."""
    for cls in layer_types():
        if cls.kind == kind:
            return cls
    raise NetworkError(f"layer kind {kind!r}: one of {', '.join(cls.kind for cls in layer_types())}")
