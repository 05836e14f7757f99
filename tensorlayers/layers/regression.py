"""TensorRegression and TensorContraction: linear maps from tensors to tensors, no dimension flattened away."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import cost, decision, dispatch
from ..cost import Cost
from ..errors import ConversionError, FormatError, NetworkError
from ..formats import Format, ModeProducts, Tucker
from ..machine import Machine
from ..network import Axis, Network
from ..tensorize import MOST_MODES
from . import leaf
from .dispatched import DispatchedLayer
from .kind import Settings, check_sizes, plain
from .linear import FactorizedLinear

if TYPE_CHECKING:
    from typing import Self

_DEFAULT = Tucker(0.25)
_MODE_PRODUCTS = ModeProducts()

Shape = int | Sequence[int]


def _shape(value: Any, what: str) -> tuple[int, ...]:
    """A shape of 1 to 10 dimensions, each of at least 1; an int is that of one dimension."""
    several = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    sizes: tuple[int, ...] = plain(tuple(value) if several else (value,))
    if not 1 <= len(sizes) <= MOST_MODES:
        raise NetworkError(f"{what}: an integer, or a tuple of 1 to {MOST_MODES}; got {value!r}")
    for number, size in enumerate(sizes, 1):
        check_sizes(**{f"{what}, dimension {number}": size})
    return sizes


def _flat(x: Tensor, in_shape: tuple[int, ...]) -> Tensor:
    """(*batch, *in_shape) -> (*batch, product of in_shape)."""
    if tuple(x.shape[-len(in_shape) :]) != in_shape:
        raise NetworkError(f"input: the last dimensions are in_shape = {in_shape}; got {tuple(x.shape)}")
    return x.flatten(-len(in_shape))


class TensorLinear(nn.Module):
    r"""The dense map between tensors, :math:`y = \langle x, W \rangle + b`: nn.Linear with shapes for features.

    What `TensorRegression` and `TensorContraction` are factorizations of.

    Parameters
    ----------
    in_shape, out_shape : int or tuple of int
    bias : bool
    device, dtype : optional

    Attributes
    ----------
    weight : nn.Parameter
        (*out_shape, *in_shape); drawn as nn.Linear draws it.
    bias : nn.Parameter or None
        out_shape

    Raises
    ------
    NetworkError
        Where a shape is no tuple of 1 to 10 positive integers, or an input has another.

    Examples
    --------
    >>> TensorLinear((3, 4), (5, 6))(torch.zeros(2, 3, 4)).shape
    torch.Size([2, 5, 6])
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_shape, self.out_shape = _shape(in_shape, "in_shape"), _shape(out_shape, "out_shape")
        self.weight = nn.Parameter(torch.empty((*self.out_shape, *self.in_shape), device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(self.out_shape, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias uniformly in ``+- 1 / sqrt(product of in_shape)``."""
        bound = 1 / math.sqrt(math.prod(self.in_shape))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    @classmethod
    def from_linear(cls, linear: nn.Linear, in_shape: Shape, out_shape: Shape | None = None) -> Self:
        """An nn.Linear that acts on flattened tensors, seen as a map between tensors; it shares the parameters' memory.

        Parameters
        ----------
        linear : nn.Linear
        in_shape : int or tuple of int
            Its product is ``linear.in_features``.
        out_shape : int or tuple of int, optional
            Its product is ``linear.out_features``, which is the default.

        Raises
        ------
        ConversionError
            If `linear` is none, or the shapes do not fit its features.
        """
        if not isinstance(linear, nn.Linear):
            raise ConversionError(f"from_linear: an nn.Linear; got {type(linear).__name__}")
        layer = cls(in_shape, linear.out_features if out_shape is None else out_shape, linear.bias is not None, "meta")
        for what, shape, size in (
            ("in", layer.in_shape, linear.in_features),
            ("out", layer.out_shape, linear.out_features),
        ):
            if math.prod(shape) != size:
                raise ConversionError(
                    f"{what}_shape {shape}: its product is {what}_features = {size}; got {math.prod(shape)}"
                )
        weight, bias = linear.weight, linear.bias
        layer.weight = nn.Parameter(weight.detach().reshape(layer.weight.shape), weight.requires_grad)
        if layer.bias is not None:
            layer.bias = nn.Parameter(bias.detach().reshape(layer.out_shape), bias.requires_grad)
        return layer.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        if leaf.is_recorded(input):
            recorded: Tensor = leaf.call(self, input)
            return recorded
        flat = _flat(input, self.in_shape)
        weight = self.weight.reshape(math.prod(self.out_shape), -1)
        y = F.linear(flat, weight, None if self.bias is None else self.bias.flatten())
        return y.reshape(*flat.shape[:-1], *self.out_shape)

    def extra_repr(self) -> str:
        return f"in_shape={self.in_shape}, out_shape={self.out_shape}, bias={self.bias is not None}"


class _TensorMap(DispatchedLayer):
    """What both kinds share: a weight of (*out_shape, *in_shape), applied to the in dimensions together."""

    dense_types: ClassVar[tuple[type[nn.Module], ...]] = (TensorLinear,)

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]

    def _build(
        self,
        in_shape: Shape,
        out_shape: Shape,
        bias: bool,
        device: Any,
        dtype: torch.dtype | None,
        format: Format,
        dropout: float,
        stack: tuple[int, int] | None,
    ) -> None:
        self.in_shape, self.out_shape = _shape(in_shape, "in_shape"), _shape(out_shape, "out_shape")
        self._register(format, self.out_shape if bias else None, device, dtype, stack)
        self.rank_dropout = dropout

    @classmethod
    def settings_of(cls, module: nn.Module) -> Settings:
        return {"in_shape": module.in_shape, "out_shape": module.out_shape, "bias": module.bias is not None}

    @classmethod
    def axes_of(cls, settings: Mapping[str, Any]) -> tuple[Axis, ...]:
        sides = ("out", settings["out_shape"]), ("in", settings["in_shape"])
        return tuple(Axis(role, size) for role, shape in sides for size in shape)

    @classmethod
    def shape_of(cls, settings: Mapping[str, Any]) -> tuple[int, ...]:
        return *settings["out_shape"], *settings["in_shape"]

    @classmethod
    def columns(cls, module: nn.Module, x: Tensor) -> Tensor:
        return _flat(x, module.in_shape)  # type: ignore[arg-type]

    @classmethod
    def gradients(cls, module: nn.Module, dy: Tensor) -> Tensor:
        return _flat(dy, module.out_shape)  # type: ignore[arg-type]

    @classmethod
    def dense_cost(cls, settings: Mapping[str, Any], rows: int) -> Cost:
        return cost.dense_linear(math.prod(settings["out_shape"]), math.prod(settings["in_shape"]), rows)

    @classmethod
    def factorized_cost(cls, network: Network, settings: Mapping[str, Any], rows: int) -> Cost:
        return FactorizedLinear.factorized_cost(network, settings, rows)

    @classmethod
    def dense_seconds(
        cls, settings: Mapping[str, Any], rows: int, machine: Machine, training: bool = False, dtype: str = "float32"
    ) -> float:
        sizes = math.prod(settings["out_shape"]), math.prod(settings["in_shape"])
        return decision.dense_seconds(*sizes, rows, machine, x=training, weight=training, dtype=dtype)

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
        return FactorizedLinear.factorized_seconds(network, settings, rows, machine, training, dtype)

    @property
    def fan_in(self) -> int:
        return math.prod(self.in_shape)

    def forward(self, input: Tensor) -> Tensor:
        if leaf.is_recorded(input):
            recorded: Tensor = leaf.call(self, input)
            return recorded
        flat = _flat(input, self.in_shape)
        frozen = self._frozen_forward()
        if frozen is not None:
            return frozen(input)
        y = dispatch.linear(
            flat,
            self.own_network,
            self.active_cores(),
            None if self.bias is None else self.bias.flatten(),
            out_features=math.prod(self.out_shape),
            implementation=self.implementation,
            backward=self.backward,
        )
        return y.reshape(*flat.shape[:-1], *self.out_shape)


class TensorRegression(_TensorMap):
    r"""A tensor regression layer: a linear map between tensors whose weight is a small tensor network.

    :math:`y = \langle x, W \rangle + b`, contracted over the dimensions of `in_shape`. Where a convolutional network
    flattens its last activation for a linear layer, this keeps its dimensions, and `W` is factorized along them. `W` is
    never formed where the contraction plan finds the cores cheaper.

    Parameters
    ----------
    in_shape, out_shape : int or tuple of int
        The input is (*batch, *in_shape), the output (*batch, *out_shape); 1 to 10 dimensions each.
    bias : bool
        Of shape `out_shape`.
    device, dtype : optional
        As in nn.Linear.
    format : Format
        Keyword only; each dimension is one mode, but a single one can be split, as the features of a linear layer. By
        default Tucker at a quarter of the parameters.
    dropout : float
        The layer's `rank_dropout`: in training each value of each bond is dropped with this probability, and the others
        are scaled so that the expected weight is unchanged.
    stack : (int, int), optional
        Of a jointly factorized layer: how many layers share the cores, and the position of this one.

    Raises
    ------
    NetworkError
        Where a shape is no tuple of 1 to 10 positive integers, `dropout` no probability below 1, or an input has
        another shape.
    RankError, ModeError, FormatError
        Where the format does not fit the shapes.

    References
    ----------
    Kossaifi et al. 2020, Tensor regression networks; Kolbeinsson et al. 2021, Tensor dropout for robust
    learning.

    Examples
    --------
    >>> from tensorlayers import CP, TensorRegression
    >>> layer = TensorRegression((64, 7, 7), 10, format=CP(8))
    >>> layer(torch.zeros(2, 64, 7, 7)).shape
    torch.Size([2, 10])
    >>> sum(core.numel() for core in layer.cores), layer.dense_parameters
    (704, 31360)
    """

    kind: ClassVar[str] = "regression"

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        format: Format = _DEFAULT,
        dropout: float = 0.0,
        stack: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self._build(in_shape, out_shape, bias, device, dtype, format, dropout, stack)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, in_shape: Shape, format: Format, out_shape: Shape | None = None
    ) -> TensorRegression:
        """Factorize an nn.Linear that acts on flattened tensors. See `TensorLinear.from_linear` and `from_dense`.

        Parameters
        ----------
        linear : nn.Linear
            In front of it, the model flattens; the new layer takes what is flattened there.
        in_shape : int or tuple of int
        format : Format
        out_shape : int or tuple of int, optional
            By default ``linear.out_features``.

        Raises
        ------
        ConversionError
            If `linear` is none, or the shapes do not fit its features.
        """
        return cls.from_dense(TensorLinear.from_linear(linear, in_shape, out_shape), format)


class TensorContraction(_TensorMap):
    r"""A tensor contraction layer: each dimension of the input is multiplied by a matrix of its own.

    :math:`y = x \times_1 A_1 \times_2 A_2 \cdots + b`, with :math:`A_k` of shape (o_k, i_k): the weight is their
    Kronecker product. The contraction plan orders the products, for instance what shrinks the tensor most first.

    Parameters
    ----------
    in_shape, out_shape : int or tuple of int
        The input is (*batch, *in_shape), the output (*batch, *out_shape); equally many dimensions, 1 to 10.
    bias : bool
        Of shape `out_shape`; as in the paper there is none by default.
    device, dtype : optional
        As in nn.Linear.
    format : ModeProducts
        Keyword only, and fixed.
    dropout : float
        Tensor dropout, the layer's `rank_dropout`: `out_shape` is the rank of this layer, so that in training each
        slice of the output along each of its dimensions is dropped with this probability, in the whole batch alike (a
        row of A_k is), and the others are scaled by ``1 / (1 - dropout)`` a dimension: the expected weight stays.
    stack : (int, int), optional
        Of a jointly held layer: how many layers there are, and the position of this one.

    Raises
    ------
    NetworkError
        Where a shape is no tuple of 1 to 10 positive integers, `dropout` no probability below 1, or an input has
        another shape.
    FormatError
        Where the shapes have unequal numbers of dimensions.

    References
    ----------
    Kossaifi et al. 2017, Tensor contraction layers for parsimonious deep nets; Kolbeinsson et al. 2021, Tensor dropout
    for robust learning.

    Examples
    --------
    >>> from tensorlayers import TensorContraction
    >>> layer = TensorContraction((64, 7, 7), (16, 3, 3))
    >>> layer(torch.zeros(2, 64, 7, 7)).shape
    torch.Size([2, 16, 3, 3])
    >>> layer.network.core_shapes
    ((16, 64), (3, 7), (3, 7))
    """

    kind: ClassVar[str] = "contraction"

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        format: Format = _MODE_PRODUCTS,
        dropout: float = 0.0,
        stack: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self._build(in_shape, out_shape, bias, device, dtype, format, dropout, stack)

    @classmethod
    def from_linear(cls, linear: nn.Linear, in_shape: Shape, out_shape: Shape) -> TensorContraction:
        """The nearest layer to an nn.Linear that acts on flattened tensors. See `TensorLinear.from_linear`."""
        return cls.from_dense(TensorLinear.from_linear(linear, in_shape, out_shape), _MODE_PRODUCTS)

    @classmethod
    def resolve(
        cls, format: Format, settings: Mapping[str, Any], stack: int | None = None
    ) -> tuple[Network, tuple[str, ...]]:
        network, notes = super().resolve(format, settings, stack)
        if network.bonds:
            raise FormatError(f"format {format}: a tensor contraction has no bond; got {', '.join(network.bonds)}")
        return network, notes

    @property
    def droppable(self) -> tuple[str, ...]:
        return self.own_network.names("out")
