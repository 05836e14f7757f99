"""FactorizedLinear: nn.Linear with a factorized weight."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import contraction, cost, dispatch, functional
from ..cost import Cost
from ..errors import ConversionError, NetworkError
from ..formats import Format, LowRank, from_dict
from ..network import Network
from ..precision import DTYPES
from .base import FactorizedLayer, linear_boxes

_DEFAULT = LowRank(0.25)


class FactorizedLinear(FactorizedLayer):
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
    ) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise NetworkError(f"{name}: an integer of at least 1; got {size!r}")
        if not isinstance(format, Format):
            raise NetworkError(f"format: a Format such as LowRank(0.25); got {format!r}")
        if (dtype or torch.get_default_dtype()) not in DTYPES:
            raise NetworkError(f"dtype: one of {', '.join(str(known) for known in DTYPES)}; got {dtype}")
        self.in_features = in_features
        self.out_features = out_features
        self.source = "Linear"
        network = format.network(out_features, in_features)
        self._register(format, network, out_features if bias else None, device, dtype)
        self.reset_parameters()

    @classmethod
    def matches(cls, module: nn.Module) -> str | None:
        if isinstance(module, nn.Linear):
            return "Linear"
        # Hugging Face's GPT-2 layer, by its class name: transformers is not imported for it.
        if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "weight"):
            return "Conv1D"
        return None

    @classmethod
    def from_dense(cls, module: nn.Module, format: Format) -> FactorizedLinear:
        """Factorize a dense layer.

        Parameters
        ----------
        module : nn.Linear, or the transposed Conv1D of Hugging Face's GPT-2
            Copied, never aliased; its device, dtype, training mode and requires_grad are kept.
        format : Format

        Returns
        -------
        FactorizedLinear
            Its `error` is the relative error of the weight.

        Raises
        ------
        ConversionError
            If the module is of neither kind.
        DecompositionError, RankError, ModeError, FormatError
            See `Format.decompose`.
        """
        source = cls.matches(module)
        if source is None:
            raise ConversionError(f"from_dense: an nn.Linear or a GPT-2 Conv1D; got {type(module).__name__}")
        if not isinstance(format, Format):
            raise ConversionError(f"from_dense: a Format such as LowRank(0.25); got {format!r}")
        if isinstance(module.weight, nn.parameter.UninitializedParameter):
            raise ConversionError("from_dense: a layer with a shape; this one is lazy")
        weight: Tensor = module.weight if source == "Linear" else module.weight.T  # type: ignore[assignment]
        decomposition = format.decompose(weight)
        layer = cls.empty(module, format)
        layer._adopt(decomposition)
        if layer.bias is not None:
            with torch.no_grad():
                layer.bias.copy_(module.bias)  # type: ignore[arg-type]
        return layer

    @classmethod
    def empty(cls, module: nn.Module, format: Format) -> FactorizedLinear:
        """A layer like a dense one (shape, device, dtype, mode, requires_grad), its cores without values."""
        source = cls.matches(module)
        weight, bias = module.weight, module.bias
        assert isinstance(weight, Tensor)
        rows, columns = cls.dense_shape(module)
        layer = cls(columns, rows, bias is not None, "meta", weight.dtype, format=format)
        layer.to_empty(device=weight.device)
        layer.source = str(source)
        layer.train(module.training)
        layer.cores.requires_grad_(weight.requires_grad)
        if layer.bias is not None:
            assert isinstance(bias, Tensor)
            layer.bias.data = layer.bias.data.to(bias.dtype)
            layer.bias.requires_grad_(bias.requires_grad)
        return layer

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.out_features, self.in_features

    @property
    def fan_in(self) -> int:
        return self.in_features

    def boxes(self) -> Iterator[dict[str, slice]]:
        return linear_boxes(self.network, self.out_features, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        if input.is_nested:  # nn.TransformerEncoder hands them on when it skips padding
            parts = input.unbind()
            rows = self(torch.cat(parts)).split([len(part) for part in parts])
            return torch.nested.as_nested_tensor(list(rows), layout=input.layout)
        if input.dim() == 0 or input.shape[-1] != self.in_features:
            raise NetworkError(
                f"input: the last dimension is in_features = {self.in_features}; got {tuple(input.shape)}"
            )
        return dispatch.linear(input, self.network, list(self.cores), self.bias, out_features=self.out_features)

    def to_dense(self) -> Tensor:
        """The dense weight, shape (out_features, in_features), differentiable in the cores; built at each call."""
        return functional.dense_linear(self.network, list(self.cores), self.out_features, self.in_features)

    def to_module(self) -> nn.Module:
        """The dense layer of the kind that this one replaced, with the same output up to rounding; nothing aliased."""
        weight = self.to_dense().detach()
        module: nn.Module
        if self.source == "Conv1D" and importlib.util.find_spec("transformers") is not None:
            module = importlib.import_module("transformers.pytorch_utils").Conv1D(self.out_features, self.in_features)
            weight = weight.T
        else:
            module = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        module.weight = nn.Parameter(weight.contiguous(), self.cores[0].requires_grad)
        if self.bias is not None:
            module.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return module.train(self.training)

    @classmethod
    def dense_shape(cls, module: nn.Module) -> tuple[int, ...]:
        shape = tuple(module.weight.shape)  # type: ignore[arg-type]
        return shape if cls.matches(module) == "Linear" else shape[::-1]

    @classmethod
    def resolve(cls, format: Format, shape: Sequence[int]) -> tuple[Network, tuple[str, ...]]:
        return format.resolve(*shape)

    @classmethod
    def costs(cls, network: Network, shape: Sequence[int], rows: int) -> tuple[Cost, Cost]:
        plan = contraction.linear_plan(network, contraction.batch_class(rows))
        return cost.dense_linear(shape[0], shape[1], rows), plan.resized(contraction.BATCH, rows).cost

    def config(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "source": self.source,
            "format": self.format.pin(self.network).to_dict(),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FactorizedLinear:
        format = from_dict(config["format"])
        layer = cls(config["in_features"], config["out_features"], bool(config["bias"]), "meta", format=format)
        layer.source = str(config["source"])
        return layer

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, {super().extra_repr()}"
