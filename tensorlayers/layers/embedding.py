"""FactorizedEmbedding and FactorizedEmbeddingBag: torch's lookup tables with a factorized weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from .. import lookup, lookup_plan
from ..cost import Cost
from ..errors import ConversionError, NetworkError
from ..formats import Format, LowRank
from ..network import Axis, Network
from . import leaf
from .base import FactorizedLayer
from .kind import Settings, check_sizes, plain

if TYPE_CHECKING:
    from typing import Self

_DEFAULT = LowRank(0.25)

_SPARSE = "sparse: every row shares the cores, so that their gradients are dense (and small)"
_MAX = "scale_grad_by_freq: it must be False where the mode is 'max', as torch demands at the first forward"


def _jagged(input: Any) -> tuple[Tensor, Tensor]:
    """The values and offsets of a nested tensor, without the holes that a view of one may have."""
    if input.layout != torch.jagged:
        raise NetworkError(f"input: a nested tensor of ids has the layout torch.jagged; got {input.layout}")
    input = input.contiguous()
    return input.values(), input.offsets()


class _Table(FactorizedLayer):
    """What both lookups share: a table (num_embeddings, embedding_dim), and a row of padding that is not trained."""

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    max_norm: float | None
    norm_type: float
    scale_grad_by_freq: bool
    sparse: bool
    padding_row: Tensor | None

    _SETTINGS: ClassVar[tuple[str, ...]]

    def _build(
        self,
        settings: Settings,
        device: Any,
        dtype: torch.dtype | None,
        format: Format,
        stack: tuple[int, int] | None,
    ) -> None:
        """Check and set the attributes, then draw the cores."""
        settings = {name: plain(value) for name, value in settings.items()}
        rows, columns, padding = (settings[name] for name in ("num_embeddings", "embedding_dim", "padding_idx"))
        check_sizes(num_embeddings=rows, embedding_dim=columns)
        if padding is not None and not (isinstance(padding, int) and -rows <= padding < rows):
            raise NetworkError(f"padding_idx {padding}: an integer from {-rows} to {rows - 1}, a row of the table")
        if settings["sparse"]:
            raise NetworkError(_SPARSE)
        for name in self._SETTINGS:
            setattr(self, name, settings[name])
        if padding is not None:
            self.padding_idx = padding % rows
        row = None if padding is None else torch.empty(columns, device=device, dtype=dtype)
        self.register_buffer("padding_row", row)
        self._register(format, None, device, dtype, stack)

    @classmethod
    def from_pretrained(
        cls, embeddings: Tensor, freeze: bool = True, *args: Any, format: Format = _DEFAULT, **settings: Any
    ) -> Self:
        """Factorize a table.

        Parameters
        ----------
        embeddings : Tensor
            Shape (rows, columns).
        freeze : bool
            Whether the cores are left without gradients.
        format : Format
            Keyword only.
        *args, **settings
            As in the ``from_pretrained`` of torch's own layer, in its order.

        Raises
        ------
        ConversionError
            Where torch's own refuses them.
        NetworkError, DecompositionError, RankError, ModeError, FormatError
            As the constructor and `from_dense`.
        """
        dense: Any = cls.dense_types[0]
        try:
            module = dense.from_pretrained(embeddings, freeze, *args, **settings)
        except (AssertionError, TypeError, AttributeError) as error:
            raise ConversionError(f"from_pretrained: {error}") from None
        return cls.from_dense(module, format)

    @classmethod
    def settings_of(cls, module: nn.Module) -> Settings:
        return {name: plain(getattr(module, name)) for name in cls._SETTINGS}

    @classmethod
    def axes_of(cls, settings: Mapping[str, Any]) -> tuple[Axis, ...]:
        return Axis("in", settings["num_embeddings"], split=True), Axis("out", settings["embedding_dim"], split=True)

    @classmethod
    def shape_of(cls, settings: Mapping[str, Any]) -> tuple[int, ...]:
        return settings["num_embeddings"], settings["embedding_dim"]

    @classmethod
    def arranged(cls, network: Network) -> Network:
        return lookup_plan.rows_first(network)

    @classmethod
    def refusal(cls, module: nn.Module) -> str:
        return _SPARSE if module.sparse else ""

    @classmethod
    def dense_cost(cls, settings: Mapping[str, Any], rows: int) -> Cost:
        # Each row is read and written; nothing is computed.
        return Cost(0, 2 * rows * int(settings["embedding_dim"]))

    @classmethod
    def factorized_cost(cls, network: Network, settings: Mapping[str, Any], rows: int) -> Cost:
        return lookup_plan.lookup_cost(network, rows)

    @property
    def deviation(self) -> float:
        return 1.0  # torch draws a table from N(0, 1)

    @property
    def fan_in(self) -> int:
        return self.num_embeddings

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.padding_row is not None:
            with torch.no_grad():
                self.padding_row.zero_()

    def _adopt(self, module: nn.Module) -> None:
        super()._adopt(module)
        if self.padding_row is not None:
            self.padding_row.copy_(self.weight_of(module)[self.padding_idx])

    def to_dense(self) -> Tensor:
        weight = super().to_dense()
        if self.padding_row is None:
            return weight
        where = torch.tensor([self.padding_idx], device=weight.device)
        return weight.index_copy(0, where, self.padding_row[None])

    def _options(self) -> dict[str, Any]:
        return {
            "padding_idx": self.padding_idx,
            "padding_row": self.padding_row,
            "max_norm": self.max_norm,
            "norm_type": self.norm_type,
            "scale_grad_by_freq": self.scale_grad_by_freq,
        }


class FactorizedEmbedding(_Table):
    r"""A lookup table whose weight is a small tensor network; drop-in for ``nn.Embedding``.

    Only the rows that are looked up are computed: each core is gathered by the digits of the ids, and the slices are
    contracted. Where that pays, equal ids are computed once. Saved for the backward are the ids alone.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
    padding_idx : int, optional
        As in nn.Embedding: this row gets no gradient. It is kept beside the cores, as the buffer `padding_row`; zeros
        in a new layer, the dense layer's row after `from_dense`.
    max_norm : float, optional
    norm_type : float
        Rows that are looked up and have a larger norm are scaled down to `max_norm`. The output is nn.Embedding's, but
        the scaling is done to the rows alone, at each lookup: nn.Embedding writes the scaled rows into its weight,
        here the cores, and `weight`, stay as they are.
    scale_grad_by_freq : bool
        As in nn.Embedding.
    sparse : bool
        Must be False.
    device, dtype : optional
        As in nn.Embedding.
    format : Format
        Keyword only; by default low rank at a quarter of the parameters. The row modes are ``in_modes``, the columns'
        ``out_modes``.
    stack : (int, int), optional
        Of a jointly factorized layer: how many layers share the cores, and the position of this one.

    Raises
    ------
    NetworkError
        If a size is below 1, `padding_idx` is no row, or `sparse` is asked for: every row shares the cores, whose
        gradients are dense, and small.
    RankError, ModeError, FormatError
        Where the format does not fit the table.

    References
    ----------
    Hrinchuk et al. 2020, Tensorized embedding layers; Yin et al. 2021, TT-Rec.

    Examples
    --------
    >>> from tensorlayers import FactorizedEmbedding, TT
    >>> layer = FactorizedEmbedding(50257, 768, format=TT(rank=16))
    >>> layer(torch.tensor([[0, 50256, 17]])).shape
    torch.Size([1, 3, 768])
    >>> sum(core.numel() for core in layer.cores)
    204032
    """

    kind: ClassVar[str] = "embedding"
    dense_types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding,)

    _SETTINGS = (
        "num_embeddings",
        "embedding_dim",
        "padding_idx",
        "max_norm",
        "norm_type",
        "scale_grad_by_freq",
        "sparse",
    )

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        format: Format = _DEFAULT,
        stack: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        settings = {
            "num_embeddings": num_embeddings,
            "embedding_dim": embedding_dim,
            "padding_idx": padding_idx,
            "max_norm": max_norm,
            "norm_type": norm_type,
            "scale_grad_by_freq": scale_grad_by_freq,
            "sparse": sparse,
        }
        self._build(settings, device, dtype, format, stack)

    def forward(self, input: Tensor) -> Tensor:
        if leaf.is_recorded(input):
            recorded: Tensor = leaf.call(self, input)
            return recorded
        if input.is_nested:
            values, offsets = _jagged(input)
            return torch.nested.nested_tensor_from_jagged(self.forward(values), offsets)
        frozen = self._frozen_forward()
        if frozen is not None:
            return frozen(input)
        return lookup.embedding(
            input, self.own_network, self.active_cores(), (self.num_embeddings, self.embedding_dim), **self._options()
        )


class FactorizedEmbeddingBag(_Table):
    r"""Sums, means or maxima over bags of rows of a factorized table; drop-in for ``nn.EmbeddingBag``.

    Each distinct row is computed once for all bags, where that pays; see `FactorizedEmbedding`.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
    max_norm, norm_type, scale_grad_by_freq, sparse, padding_idx
        See `FactorizedEmbedding`. Ids equal to `padding_idx` are left out of their bag.
    mode : {"sum", "mean", "max"}
    include_last_offset : bool
        As in nn.EmbeddingBag.
    device, dtype : optional
    format : Format
        Keyword only; by default low rank at a quarter of the parameters.
    stack : (int, int), optional
        See `FactorizedEmbedding`.

    Raises
    ------
    NetworkError
        As `FactorizedEmbedding`; and if the mode is none of the three, or 'max' with `scale_grad_by_freq`.
    RankError, ModeError, FormatError
        Where the format does not fit the table.

    Examples
    --------
    >>> from tensorlayers import FactorizedEmbeddingBag, TT
    >>> layer = FactorizedEmbeddingBag(50257, 768, mode="sum", format=TT(rank=16))
    >>> layer(torch.tensor([0, 50256, 17]), offsets=torch.tensor([0, 2])).shape
    torch.Size([2, 768])
    """

    kind: ClassVar[str] = "embedding_bag"
    dense_types: ClassVar[tuple[type[nn.Module], ...]] = (nn.EmbeddingBag,)

    mode: str
    include_last_offset: bool

    _SETTINGS = (
        "num_embeddings",
        "embedding_dim",
        "max_norm",
        "norm_type",
        "scale_grad_by_freq",
        "mode",
        "sparse",
        "include_last_offset",
        "padding_idx",
    )

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        format: Format = _DEFAULT,
        stack: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if mode not in ("sum", "mean", "max"):
            raise NetworkError(f"mode: 'sum', 'mean' or 'max'; got {mode!r}")
        if mode == "max" and scale_grad_by_freq:
            raise NetworkError(_MAX)
        settings = {
            "num_embeddings": num_embeddings,
            "embedding_dim": embedding_dim,
            "max_norm": max_norm,
            "norm_type": norm_type,
            "scale_grad_by_freq": scale_grad_by_freq,
            "mode": mode,
            "sparse": sparse,
            "include_last_offset": include_last_offset,
            "padding_idx": padding_idx,
        }
        self._build(settings, device, dtype, format, stack)

    @classmethod
    def refusal(cls, module: nn.Module) -> str:
        return super().refusal(module) or (_MAX if module.mode == "max" and module.scale_grad_by_freq else "")

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        if leaf.is_recorded(input):
            recorded: Tensor = leaf.call(self, input, offsets, per_sample_weights)
            return recorded
        if input.is_nested:  # jagged: one bag a row
            input, offsets = _jagged(input)
            offsets = offsets if self.include_last_offset else offsets[:-1]
            per_sample_weights = None if per_sample_weights is None else _jagged(per_sample_weights)[0]
        frozen = self._frozen_forward()
        if frozen is not None:
            return frozen(input, offsets, per_sample_weights)
        return lookup.embedding_bag(
            input,
            self.own_network,
            self.active_cores(),
            (self.num_embeddings, self.embedding_dim),
            offsets,
            per_sample_weights,
            mode=self.mode,
            include_last_offset=self.include_last_offset,
            **self._options(),
        )
