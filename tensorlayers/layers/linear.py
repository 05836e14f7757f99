"""FactorizedLinear: nn.Linear with a factorized weight."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import contraction, cost, decision, dispatch
from ..activation import activation as activation_of
from ..cost import Cost
from ..errors import NetworkError
from ..formats import Format, LowRank
from ..machine import Machine
from ..network import Axis, Network, linear_axes
from ..small import small as small_product
from . import leaf
from .dispatched import DispatchedLayer
from .frozen import is_any_frozen
from .kind import Settings, check_sizes, plain

_DEFAULT = LowRank(0.25)


class FactorizedLinear(DispatchedLayer):
    r"""A linear layer whose weight is a small tensor network; drop-in for ``nn.Linear``.

    :math:`y = x W^T + b` with :math:`W` given by the cores and never formed.

    Parameters
    ----------
    in_features, out_features : int
    bias : bool
    device, dtype : optional
        As in nn.Linear.
    format : Format
        Keyword only; by default low rank at a quarter of the parameters.
    stack : (int, int), optional
        Of a jointly factorized layer: how many layers share the cores, and the position of this one.
    implementation, backward : str, optional
        Keyword only; see the attributes of these names.

    Raises
    ------
    RankError, ModeError, FormatError
        Where the format does not fit the features.

    Examples
    --------
    >>> from tensorlayers import FactorizedLinear, TT
    >>> layer = FactorizedLinear(768, 3072, format=TT(rank=8))
    >>> layer(torch.zeros(2, 5, 768)).shape
    torch.Size([2, 5, 3072])
    >>> sum(core.numel() for core in layer.cores)
    25600
    """

    kind: ClassVar[str] = "linear"
    dense_types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)

    in_features: int
    out_features: int

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        format: Format = _DEFAULT,
        stack: tuple[int, int] | None = None,
        implementation: str | None = None,
        backward: str = "recompute",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = plain((in_features, out_features))
        check_sizes(in_features=self.in_features, out_features=self.out_features)
        self._register(format, self.out_features if bias else None, device, dtype, stack)
        self.implementation, self.backward = implementation, backward

    @classmethod
    def matches(cls, module: nn.Module) -> str | None:
        # Hugging Face's GPT-2 layer, by its class name: transformers is not imported for it.
        if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "weight"):
            return "Conv1D"
        return super().matches(module)

    @classmethod
    def settings_of(cls, module: nn.Module) -> Settings:
        if cls.matches(module) == "Conv1D":  # which stores its weight transposed
            rows, columns = cls.weight_of(module).shape
        else:
            rows, columns = module.out_features, module.in_features  # type: ignore[assignment]
        return {"in_features": plain(columns), "out_features": plain(rows), "bias": module.bias is not None}

    @classmethod
    def axes_of(cls, settings: Mapping[str, Any]) -> tuple[Axis, ...]:
        return linear_axes(settings["out_features"], settings["in_features"])

    @classmethod
    def shape_of(cls, settings: Mapping[str, Any]) -> tuple[int, ...]:
        return settings["out_features"], settings["in_features"]

    @classmethod
    def weight_of(cls, module: nn.Module) -> Tensor:
        weight = super().weight_of(module)
        return weight.T if cls.matches(module) == "Conv1D" else weight

    @classmethod
    def dense_cost(cls, settings: Mapping[str, Any], rows: int) -> Cost:
        return cost.dense_linear(settings["out_features"], settings["in_features"], rows)

    @classmethod
    def factorized_cost(cls, network: Network, settings: Mapping[str, Any], rows: int) -> Cost:
        plan = contraction.linear_plan(network, contraction.batch_class(rows))
        return plan.resized(contraction.BATCH, rows).cost

    @classmethod
    def dense_seconds(
        cls, settings: Mapping[str, Any], rows: int, machine: Machine, training: bool = False, dtype: str = "float32"
    ) -> float:
        sizes = settings["out_features"], settings["in_features"]
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
        return decision.cautious_seconds(network, rows, machine, training=training, dtype=dtype)

    @property
    def fan_in(self) -> int:
        return self.in_features

    def _set_network(self, network: Network) -> None:
        super()._set_network(network)
        small = small_product(self.own_network)
        is_padded = (small.columns, small.features) != (self.in_features, self.out_features)
        self._small = None if is_padded or not small.rows or self.stack is not None else small

    def _small_forward(self, input: Tensor) -> Tensor | None:
        """A product so small that every microsecond before it counts; None where it is not, or anything is special."""
        small, shape = self._small, input.shape
        if small is None or len(shape) != 2 or shape[1] != small.columns:
            return None
        if self._implementation is not None or self._rank_dropout or is_any_frozen() or not dispatch.is_plain(input):
            return None
        if not 0 < shape[0] <= small.rows:  # asked last: a graph that is traced would not serve other rows
            return None
        cores, parameters = self._modules["cores"]._parameters, self._parameters  # type: ignore[union-attr]
        if len(cores) != len(small.network.cores) or "bias" not in parameters:
            return None  # some are computed
        bias = parameters["bias"]
        if bias is not None and bias.dtype != input.dtype:
            return None
        y: Tensor = small.run(input, tuple(cores.values()), bias)  # type: ignore[arg-type]
        return y

    def forward(self, input: Tensor) -> Tensor:
        if leaf.is_recorded(input):
            recorded: Tensor = leaf.call(self, input)
            return recorded
        if self._small is not None and not input.is_nested:
            small = self._small_forward(input)
            if small is not None:
                return small
        if input.is_nested:  # nn.TransformerEncoder hands them on when it skips padding
            parts = input.unbind()
            rows = torch.split(self.forward(torch.cat(parts)), [len(part) for part in parts])
            return torch.nested.as_nested_tensor(list(rows), layout=input.layout)
        if input.dim() == 0 or input.shape[-1] != self.in_features:
            raise NetworkError(
                f"input: the last dimension is in_features = {self.in_features}; got {tuple(input.shape)}"
            )
        frozen = self._frozen_forward()
        if frozen is not None:
            return frozen(input)
        return dispatch.linear(
            input,
            self.own_network,
            self.active_cores(),
            self.bias,
            out_features=self.out_features,
            implementation=self.implementation,
            backward=self.backward,
        )

    def activated(self, input: Tensor, activation: str) -> Tensor:
        """The activation of what the layer gives, without gradients, in one kernel where there is one.

        Parameters
        ----------
        input : Tensor
            ``(*batch, in_features)``.
        activation : str
            "relu", "silu", "gelu", "gelu_tanh" or "none".

        Returns
        -------
        Tensor
            ``(*batch, out_features)``.
        """
        if torch.is_grad_enabled() or input.is_nested or self.frozen or input.shape[-1:] != (self.in_features,):
            return activation_of(activation)(self(input))
        return dispatch.activated(
            input,
            self.own_network,
            self.active_cores(),
            self.bias,
            activation=activation,
            out_features=self.out_features,
            implementation=self.implementation,
        )

    def to_module(self) -> nn.Module:
        module = super().to_module()
        if self.source == "Conv1D" and importlib.util.find_spec("transformers") is not None:
            weight, bias = module.weight, module.bias
            assert isinstance(weight, Tensor)
            module = importlib.import_module("transformers.pytorch_utils").Conv1D(self.out_features, self.in_features)
            module.weight = nn.Parameter(weight.detach().T.contiguous(), weight.requires_grad)
            if bias is not None:
                module.bias = bias
        return module.train(self.training)
