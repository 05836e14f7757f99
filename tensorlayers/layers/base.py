"""FactorizedLayer: what every factorized layer shares: cores that are drawn, and a dense weight."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import contraction, tensorize
from ..errors import ConversionError, NetworkError, ReadOnlyWeightError
from ..formats import Format, from_dict
from ..moments import Moments
from ..network import Axis, Network, modes_by_axis
from ..precision import DTYPES, without_autocast
from ..rank import Rank
from . import data, draw, resize
from .dropout import RankDropout
from .frozen import Freezable, wants_grad
from .weight import _WRITE, DenseWeight

if TYPE_CHECKING:
    from typing import Self


class Cores(nn.ParameterList):
    """The cores of a layer. They stay contiguous where a model is cast to a memory format (channels_last)."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # A memory format is for activations; nn.Module.to would demand of every core of 4 or 5 axes that it fits.
        def flat(core: Tensor) -> Tensor:
            return fn(core.flatten()).view(core.shape)

        super()._apply(flat, recurse)  # type: ignore[no-untyped-call]
        return self


class FactorizedLayer(Freezable, RankDropout):
    """Base of the factorized layers.

    A layer kind says which axes its dense weight has, how torch stores it, and how it acts on an input. Freezing and
    rank dropout are in modules of their own, as is what makes ranks smaller.

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
    output_error : float or None
        Likewise of its outputs on the data that it was fitted to; None where it was fitted to none.
    stack : (int, int) or None
        Of a jointly factorized layer, the number of layers that share the cores, and the position of this one.
    """

    format: Format
    network: Network
    cores: nn.ParameterList
    bias: nn.Parameter | None
    axes: tuple[Axis, ...]
    error: float | None
    output_error: float | None
    source: str
    """The dense kind that this layer stands for."""
    stack: tuple[int, int] | None

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
        bias: int | tuple[int, ...] | None,
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
        if bias is None:
            self.register_parameter("bias", None)
        else:
            shape = bias if isinstance(bias, tuple) else (bias,)
            self.bias = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        settings = self.settings_of(self)
        self.format, self.error, self.output_error, self.stack = format, None, None, stack
        self.axes = self.axes_of(settings)
        self.source = self.dense_types[0].__name__
        self._set_network(self.resolve(format, settings, stack and stack[0])[0])
        self.cores = Cores(
            nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) for shape in self.network.core_shapes
        )
        self.reset_parameters()

    def _set_network(self, network: Network) -> None:
        self._thaw()
        self.network = network
        # What this layer computes with: a slice, where the cores are shared.
        self.own_network = network.without(network.names("stack"))
        self._set_masks()

    @classmethod
    def from_dense(cls, module: nn.Module, format: Format, moments: Moments | None = None) -> Self:
        """Factorize a dense layer.

        Parameters
        ----------
        module : nn.Module
            Of a kind that `matches`. Copied, never aliased; its device, dtype, training mode and requires_grad are
            kept.
        format : Format
        moments : Moments, optional
            What `collect` found of this layer: then its outputs on these data are kept, not its weight, and its bias
            makes good for their mean.

        Returns
        -------
        FactorizedLayer
            Its `error` is the relative error of the weight, its `output_error` that of the outputs on these data.

        Raises
        ------
        ConversionError
            If the module is of another kind.
        DecompositionError, RankError, ModeError, FormatError
            See `Format.decompose`.
        """
        return cls.from_dense_jointly([module], format, None if moments is None else [moments])[0]

    @classmethod
    def from_dense_jointly(
        cls, modules: Sequence[nn.Module], format: Format, moments: Sequence[Moments] | None = None
    ) -> list[Self]:
        """Factorize several dense layers of one shape as one tensor; they share the cores. See `from_dense`."""
        for module in modules:
            if cls.matches(module) is None:
                known = " or ".join(f"nn.{dense.__name__}" for dense in cls.dense_types)
                raise ConversionError(f"from_dense: an {known}; got {type(module).__name__}")
            if isinstance(getattr(module, "weight", None), nn.parameter.UninitializedParameter):
                raise ConversionError("from_dense: a layer with a shape; this one is lazy")
        if not isinstance(format, Format):
            raise ConversionError(f"from_dense: a Format such as LowRank(0.5); got {format!r}")
        count = len(modules) if len(modules) > 1 else None
        weight, axes, metric = data.problem(cls, modules, moments)
        format = format.chosen(weight, axes, metric)
        decomposition = format.decompose(weight, axes, metric)
        network = cls.arranged(decomposition.network)
        layers: list[Self] = []
        for position, module in enumerate(modules):
            layer = cls.empty(module, format, None if count is None else (count, position))
            layer.cores = layers[0].cores if layers else layer.cores
            layer.error, layer.output_error = decomposition.error, decomposition.output_error
            layers.append(layer)
        with torch.no_grad():
            for core, values, names, wanted in zip(
                layers[0].cores, decomposition.cores, decomposition.network.cores, network.cores, strict=True
            ):
                core.copy_(values.permute([names.index(index) for index in wanted]))
            for k, (layer, module) in enumerate(zip(layers, modules, strict=True)):
                layer._adopt(module)
                if layer.bias is not None and moments is not None:
                    before = cls.to_axes(cls.weight_of(module), cls.settings_of(module))
                    after = contraction.dense_weight(layer.own_network, layer.own_cores(), layer.axes)
                    layer.bias.copy_(data.mended(layer.bias, before, after, moments[k], layer.axes))
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
        return self._torch_module()

    def _torch_module(self) -> nn.Module:
        dense = next((cls for cls in self.dense_types if cls.__name__ == self.source), self.dense_types[0])
        module = dense(**self.settings_of(self), device="meta")
        weight = self.to_dense().detach()
        if len(self.cores) == 1:  # which can be the weight itself
            weight = weight.clone()
        module.weight = nn.Parameter(weight, wants_grad(self.cores[0]))
        if self.bias is not None:
            module.bias = nn.Parameter(self.bias.detach().clone(), wants_grad(self.bias))
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
            # Every forward asks for them: to iterate over a ParameterList takes longer than a small product.
            held = self._modules["cores"]
            values = [core for core in held._parameters.values() if core is not None]  # type: ignore[union-attr]
            return list(values) if len(values) == len(self.network.cores) else list(self.cores)
        (name,) = self.network.names("stack")
        return [
            core.select(names.index(name), self.stack[1]) if name in names else core
            for names, core in zip(self.network.cores, self.cores, strict=True)
        ]

    # -- smaller ranks ----------------------------------------------------------------------------------------------

    def truncate(self, rank: Rank, optimizer: Optimizer | None = None) -> Self:
        """Lower the ranks in place, near the best that cores of this size can do; the dense weight is never formed.

        Parameters
        ----------
        rank : int, float or tuple of int
            As of a `Format`: one rank for all bonds, a fraction of the dense weight's parameters, or one rank a bond.
            Ranks above the present ones leave those as they are.
        optimizer : torch.optim.Optimizer, optional
            What trains the layer. Its moments follow as gradients do; state of another kind starts anew.

        Returns
        -------
        FactorizedLayer
            This layer. Its parameters are the same objects; those that shrink lose their ``grad``, a core none of
            whose ranks changed is left untouched. `format` states the new ranks; `error` is None.

        Raises
        ------
        RankError
            If a rank is below 1, of a wrong length, or a fraction that cannot be reached.
        NetworkError
            If other layers share the cores: see `tensorlayers.truncate`.
        DecompositionError
            If an entry of a core is NaN or infinite.

        Notes
        -----
        See `rounding.round_network` for the algorithm. A bond on more than two cores (CP) or on a loop has no
        optimal cut: there the cores that carry it are fitted to the larger network by alternating least squares.
        Padding counts as weight. Under DistributedDataParallel wrap the model again: its buckets have the old sizes.
        """
        resize.refuse_shared(self, "truncate")
        resize.shrink([self], resize.rounded(self, rank), optimizer)
        return self

    def select(self, positions: Mapping[str, Sequence[int]], optimizer: Optimizer | None = None) -> Self:
        """Keep some values of the bonds, in place: the slices of the cores that remain are the same bit for bit.

        Where a bond is then larger than is useful beside the others, it is rounded to that, which changes the weight
        by rounding errors only.

        Parameters
        ----------
        positions : mapping
            Bond -> the positions to keep, ascending, at least one. A bond that is not named keeps all.
        optimizer : torch.optim.Optimizer, optional
            Its state is cut in the same way.

        Returns
        -------
        FactorizedLayer
            This layer, as by `truncate`.

        Raises
        ------
        RankError, NetworkError
            If a position is out of range, a bond is unknown, or other layers share the cores.
        """
        resize.refuse_shared(self, "prune_ranks")
        resize.shrink([self], resize.selected(self, positions), optimizer)
        return self

    # -- values -----------------------------------------------------------------------------------------------------

    def reset_parameters(self) -> None:
        """Draw the cores, then scale them together so that *this* draw's dense weight has torch's own deviation.

        The bias is uniform in ``+- 1 / sqrt(fan_in)``. Nothing is done on the meta device.
        """
        self._thaw()
        if self.cores[0].is_meta:
            return
        with torch.no_grad(), without_autocast(self.cores[0]):
            count = self.dense_parameters * (self.stack[0] if self.stack else 1)
            drawn = draw.cores(self.network, list(self.cores), self.deviation, list(self.boxes()), count)
            for core, values in zip(self.cores, drawn, strict=True):
                core.copy_(values)
            if self.bias is not None:
                bound = 1 / math.sqrt(self.fan_in)
                self.bias.uniform_(-bound, bound)
        self.error = self.output_error = None

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
            "rank_dropout": self.rank_dropout,
            "format": self.format.pin(self.network).to_dict(),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """A layer on the meta device, as `config` described it."""
        stack = config.get("stack")
        if stack is not None and not (isinstance(stack, (list, tuple)) and [type(n) for n in stack] == [int, int]):
            raise NetworkError(f"stack: two integers (layers, position) or null; got {stack!r}")
        layer = cls(
            **config["settings"],
            device="meta",
            format=from_dict(config["format"]),
            stack=stack and (stack[0], stack[1]),
        )
        layer.source = str(config["source"])
        layer.rank_dropout = config.get("rank_dropout", 0.0)
        return layer

    @property
    def dense_parameters(self) -> int:
        """Parameters of the dense weight (no bias)."""
        return math.prod(self.weight_shape)

    def extra_repr(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings_of(self).items())
        share = self.network.num_parameters / (self.dense_parameters * (self.stack[0] if self.stack else 1))
        shown = f"{settings}, {self.format}, ranks={self.network.ranks}, weight parameters={share:.3g} of dense"
        return f"{shown}, frozen" if self.frozen else shown
