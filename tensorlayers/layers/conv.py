"""FactorizedConv1d, 2d, 3d and their transposed kin: torch's convolutions with a factorized kernel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import contraction, conv_cost, convolution, dispatch
from ..conv_cost import Convolution
from ..conv_maps import Window
from ..cost import Cost
from ..errors import NetworkError
from ..formats import Format, LowRank
from ..machine import Machine
from ..network import Axis, Network
from ..precision import itemsize
from . import leaf
from .dispatched import DispatchedLayer
from .kind import Settings, check_sizes, plain
from .windows import windows

_DEFAULT = LowRank(0.25)

Size = int | tuple[int, ...]


class _FactorizedConv(DispatchedLayer):
    """What all convolutions share. `_settings` are torch's own attributes, in the order of its constructor."""

    positions: ClassVar[int] = 16
    overhead: ClassVar[int] = 8

    _settings: ClassVar[tuple[str, ...]]
    transposed: ClassVar[bool] = False
    dimensions: ClassVar[int]

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    groups: int
    padding_mode: str

    def _build(
        self, settings: Settings, device: Any, dtype: torch.dtype | None, format: Format, stack: tuple[int, int] | None
    ) -> None:
        settings = {name: plain(value) for name, value in settings.items()}
        check_sizes(**{name: settings[name] for name in ("in_channels", "out_channels", "groups")})
        # Torch's own layer checks the arguments and brings them to their final form.
        like = self.dense_types[0](**settings, device="meta")
        for name, value in {"output_padding": like.output_padding, **self.settings_of(like)}.items():
            if name != "bias":
                setattr(self, name, value)
        self._check_steps(self.settings_of(like))
        self._register(format, self.out_channels if settings["bias"] else None, device, dtype, stack)

    @classmethod
    def settings_of(cls, module: nn.Module) -> Settings:
        settings = {name: plain(getattr(module, name)) for name in cls._settings}
        settings["bias"] = module.bias is not None
        for name in ("kernel_size", "stride", "padding", "dilation", "output_padding"):
            if isinstance(settings.get(name), tuple):
                settings[name] = cls._each(name, settings[name])
        return settings

    @classmethod
    def _each(cls, name: str, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """One entry a dimension. Of a tuple of one, torch takes that for all, but of a kernel."""
        if len(sizes) == 1 and name != "kernel_size":
            sizes *= cls.dimensions
        if len(sizes) != cls.dimensions:
            raise NetworkError(f"{name} {sizes}: one entry for each of {cls.dimensions} dimensions; got {len(sizes)}")
        return sizes

    @classmethod
    def read_settings(cls, data: Mapping[str, Any]) -> Settings:
        settings = super().read_settings(data)
        cls._check_steps(settings)
        return settings

    @staticmethod
    def _check_steps(settings: Mapping[str, Any]) -> None:
        """What torch's own layer lets through and only its forward refuses."""
        for name in ("kernel_size", "stride", "dilation"):
            for size in settings[name]:
                check_sizes(**{name: size})

    @classmethod
    def axes_of(cls, settings: Mapping[str, Any]) -> tuple[Axis, ...]:
        groups = settings["groups"]
        group = [Axis("group", groups)] if groups > 1 else []
        channels = [Axis("out", settings["out_channels"] // groups), Axis("in", settings["in_channels"] // groups)]
        # A kernel of size 1 is no dimension worth a core.
        return (*group, *channels, *(Axis("kernel", size) for size in settings["kernel_size"] if size > 1))

    @classmethod
    def shape_of(cls, settings: Mapping[str, Any]) -> tuple[int, ...]:
        ends = settings["out_channels"], settings["in_channels"]
        first, second = ends[::-1] if cls.transposed else ends
        return first, second // settings["groups"], *settings["kernel_size"]

    @classmethod
    def to_axes(cls, weight: Tensor, settings: Mapping[str, Any]) -> Tensor:
        if cls.transposed:
            weight = weight.reshape(settings["groups"], -1, *weight.shape[1:]).transpose(1, 2)
        return weight.reshape([axis.size for axis in cls.axes_of(settings)])

    @classmethod
    def from_axes(cls, weight: Tensor, settings: Mapping[str, Any]) -> Tensor:
        shape = cls.shape_of(settings)
        if cls.transposed:
            groups = settings["groups"]
            weight = weight.reshape(groups, shape[1], shape[0] // groups, *shape[2:]).transpose(1, 2)
        return weight.reshape(shape)

    @classmethod
    def refusal(cls, module: nn.Module) -> str:
        name = "_conv_forward"
        dense = next(dense for dense in cls.dense_types if isinstance(module, dense))
        if getattr(type(module), name, None) is not getattr(dense, name, None):
            return f"parametrized: {type(module).__name__} replaces the convolution"
        return ""

    @classmethod
    def columns(cls, module: nn.Module, x: Tensor) -> Tensor:
        return windows(module, x, cls.settings_of(module), cls.transposed)

    @classmethod
    def gradients(cls, module: nn.Module, dy: Tensor) -> Tensor:
        groups = cls.settings_of(module)["groups"]
        dy = (dy if dy.dim() == cls.dimensions + 2 else dy[None]).movedim(1, -1)
        return dy if groups == 1 else dy.reshape(*dy.shape[:-1], groups, -1)

    @classmethod
    def positions_a_row(cls, settings: Mapping[str, Any]) -> int:
        return math.prod(settings["stride"]) if cls.transposed else 1

    @classmethod
    def dense_cost(cls, settings: Mapping[str, Any], rows: int) -> Cost:
        """Of `rows` output positions, of a transposed convolution input positions."""
        weight = math.prod(cls.shape_of(settings))
        return Cost(2 * rows * weight, weight + rows * (settings["in_channels"] + settings["out_channels"]))

    @classmethod
    def factorized_cost(cls, network: Network, settings: Mapping[str, Any], rows: int) -> Cost:
        """As `dense_cost`; borders are not counted."""
        return cls._plan(network, settings, cls._positions(settings, rows)).cost

    @classmethod
    def dense_seconds(
        cls, settings: Mapping[str, Any], rows: int, machine: Machine, training: bool = False, dtype: str = "float32"
    ) -> float:
        """The predicted time of the dense layer, of `rows` as in `dense_cost`."""
        groups, scale = settings["groups"], math.prod(settings["stride"])
        dense = Convolution(
            before=rows if cls.transposed else rows * scale,
            after=rows * scale if cls.transposed else rows,
            groups=groups,
            channels=settings["in_channels"] // groups,
            new=settings["out_channels"] // groups,
            sides=tuple(size for size in settings["kernel_size"] if size > 1),
            transposed=cls.transposed,
        )
        # In groups it is predicted as fast as it can be: channels-last, and where they are narrow twice that.
        forward, back = conv_cost.seconds(replace(dense, contiguous=(groups == 1,) * 2), machine, itemsize(dtype))
        return (forward + (back if training else 0.0)) / (2 if dense.narrow else 1)

    @classmethod
    def factorized_seconds(
        cls,
        network: Network,
        settings: Mapping[str, Any],
        rows: int,
        machine: Machine,
        training: bool = False,
        dtype: str = "float32",
    ) -> float:
        """The predicted time of the factorized layer, of `rows` as in `dense_cost`; borders are not counted."""
        positions = cls._positions(settings, rows)
        classed = contraction.batch_class(positions, convolution.POSITIONS_CLASSES)
        margin = conv_cost.margin(math.prod(cls.shape_of(settings)))
        return margin * cls._plan(network, settings, classed).seconds(machine, positions, training, itemsize(dtype))

    @classmethod
    def _positions(cls, settings: Mapping[str, Any], rows: int) -> int:
        """Of the input."""
        return rows if cls.transposed else rows * math.prod(settings["stride"])

    @classmethod
    def _plan(cls, network: Network, settings: Mapping[str, Any], positions: int) -> convolution.ConvPlan:
        kernel, stride = tuple(settings["kernel_size"]), tuple(settings["stride"])
        count = cls.dimensions
        plain = Window(kernel, stride, ((0, 0),) * count, (1,) * count).plain
        return convolution.conv_plan(network, kernel, stride, plain, cls.transposed, positions)

    @property
    def fan_in(self) -> int:
        return math.prod(self.weight_shape[1:])

    def _window(self) -> Window:
        if self.padding == "same":
            totals = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            padding = tuple((total // 2, total - total // 2) for total in totals)
        elif isinstance(self.padding, str):  # "valid"
            padding = ((0, 0),) * self.dimensions
        else:
            padding = tuple((amount, amount) for amount in self.padding)
        extra = self.output_padding if self.transposed else ()
        return Window(self.kernel_size, self.stride, padding, self.dilation, self.padding_mode, self.transposed, extra)

    def _apply_window(self, input: Tensor, window: Window) -> Tensor:
        batched = input.dim() == self.dimensions + 2
        x = input if batched else input.unsqueeze(0)
        y = dispatch.conv(
            x,
            self.own_network,
            self.active_cores(),
            window,
            self.bias,
            out_channels=self.out_channels,
            implementation=self.implementation,
            backward=self.backward,
        )
        return y if batched else y.squeeze(0)

    def _check(self, input: Tensor) -> None:
        count = self.dimensions
        if input.dim() not in (count + 1, count + 2) or input.shape[-count - 1] != self.in_channels:
            spatial = ", ".join("DHW"[3 - count :])
            raise NetworkError(
                f"input: ([batch,] in_channels = {self.in_channels}, {spatial}); got {tuple(input.shape)}"
            )


class _Conv(_FactorizedConv):
    _settings: ClassVar[tuple[str, ...]] = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "bias",
        "padding_mode",
    )

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: str | Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        format: Format = _DEFAULT,
        stack: tuple[int, int] | None = None,
        implementation: str | None = None,
        backward: str = "recompute",
    ) -> None:
        super().__init__()
        given = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        self._build(dict(zip(self._settings, given, strict=True)), device, dtype, format, stack)
        self.implementation, self.backward = implementation, backward

    def forward(self, input: Tensor) -> Tensor:
        if leaf.is_recorded(input):
            recorded: Tensor = leaf.call(self, input)
            return recorded
        self._check(input)
        frozen = self._frozen_forward()
        return self._apply_window(input, self._window()) if frozen is None else frozen(input)


class _ConvTranspose(_FactorizedConv):
    transposed: ClassVar[bool] = True
    _settings: ClassVar[tuple[str, ...]] = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "output_padding",
        "groups",
        "bias",
        "dilation",
        "padding_mode",
    )

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        format: Format = _DEFAULT,
        stack: tuple[int, int] | None = None,
        implementation: str | None = None,
        backward: str = "recompute",
    ) -> None:
        super().__init__()
        given = (
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
        )
        self._build(dict(zip(self._settings, given, strict=True)), device, dtype, format, stack)
        self.implementation, self.backward = implementation, backward

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """As torch's: `output_size` chooses among the sizes that the stride leaves open."""
        if leaf.is_recorded(input):
            recorded: Tensor = leaf.call(self, input, output_size)
            return recorded
        self._check(input)
        frozen = self._frozen_forward()
        if frozen is not None:
            return frozen(input, output_size)
        window = self._window()
        if output_size is not None:
            count = self.dimensions
            wanted = output_size[-count:] if len(output_size) == input.dim() else output_size
            window = window.reaching(input.shape[-count:], wanted)
        return self._apply_window(input, window)


_DOCUMENTATION = """A {what} whose kernel is a small tensor network; drop-in for ``nn.{dense}``.

    Each core is one, possibly grouped, convolution: CP becomes 1x1, depthwise, 1x1; Tucker 1x1, kxk, 1x1; TT a
    pipeline; LowRank kxk, 1x1, or with ``split="spatial"`` kx1, 1xk. The dense kernel is formed only where that is
    predicted to be cheaper.

    Parameters
    ----------
    All of ``nn.{dense}``'s, with the same meaning. With groups, each group is factorized by itself.
    format : Format
        Keyword only; by default low rank at a quarter of the parameters.
    stack : (int, int), optional
        Of a jointly factorized layer: how many layers share the cores, and the position of this one.
    implementation, backward : str, optional
        Keyword only; see the attributes of these names.

    Raises
    ------
    ValueError
        What torch's own layer refuses.
    RankError, ModeError, FormatError
        Where the format does not fit the kernel.

    References
    ----------
    Lebedev et al. 2015 (CP); Kim et al. 2016 (Tucker); Jaderberg et al. 2014 (spatial low rank).
    """


class FactorizedConv1d(_Conv):
    __doc__ = _DOCUMENTATION.format(what="1-D convolution", dense="Conv1d")
    kind: ClassVar[str] = "conv1d"
    dense_types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv1d,)
    dimensions: ClassVar[int] = 1


class FactorizedConv2d(_Conv):
    __doc__ = _DOCUMENTATION.format(what="2-D convolution", dense="Conv2d")
    kind: ClassVar[str] = "conv2d"
    dense_types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv2d,)
    dimensions: ClassVar[int] = 2


class FactorizedConv3d(_Conv):
    __doc__ = _DOCUMENTATION.format(what="3-D convolution", dense="Conv3d")
    kind: ClassVar[str] = "conv3d"
    dense_types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv3d,)
    dimensions: ClassVar[int] = 3


class FactorizedConvTranspose1d(_ConvTranspose):
    __doc__ = _DOCUMENTATION.format(what="transposed 1-D convolution", dense="ConvTranspose1d")
    kind: ClassVar[str] = "conv_transpose1d"
    dense_types: ClassVar[tuple[type[nn.Module], ...]] = (nn.ConvTranspose1d,)
    dimensions: ClassVar[int] = 1


class FactorizedConvTranspose2d(_ConvTranspose):
    __doc__ = _DOCUMENTATION.format(what="transposed 2-D convolution", dense="ConvTranspose2d")
    kind: ClassVar[str] = "conv_transpose2d"
    dense_types: ClassVar[tuple[type[nn.Module], ...]] = (nn.ConvTranspose2d,)
    dimensions: ClassVar[int] = 2


class FactorizedConvTranspose3d(_ConvTranspose):
    __doc__ = _DOCUMENTATION.format(what="transposed 3-D convolution", dense="ConvTranspose3d")
    kind: ClassVar[str] = "conv_transpose3d"
    dense_types: ClassVar[tuple[type[nn.Module], ...]] = (nn.ConvTranspose3d,)
    dimensions: ClassVar[int] = 3
