"""ProjectedAttention: nn.MultiheadAttention with its four projections as layers of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..errors import ConversionError, NetworkError
from . import leaf
from .base import FactorizedLayer
from .weight import DenseWeight

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
"""The projections that nn.MultiheadAttention holds as rows of packed tensors, in their order there."""


class ProjectedAttention(nn.Module):
    """Multi-head attention with the signature, the outputs and the attributes of ``nn.MultiheadAttention``.

    Built by `unpack`. Its projections `q_proj`, `k_proj`, `v_proj` and `out_proj` are modules, dense or factorized.

    Parameters
    ----------
    source : nn.MultiheadAttention
        What the attributes are taken from: embed_dim, kdim, vdim, num_heads, head_dim, dropout, batch_first,
        add_zero_attn, bias_k and bias_v (the parameters themselves), and the training mode.
    q_proj, k_proj, v_proj, out_proj : nn.Module
        From embed_dim, kdim, vdim and embed_dim features to embed_dim.
    """

    # The weights are separate: torch's encoder and its fused attention then leave the computation to `forward`.
    _qkv_same_embed_dim = False

    embed_dim: int
    kdim: int
    vdim: int
    num_heads: int
    head_dim: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None

    def __init__(
        self,
        source: nn.MultiheadAttention,
        q_proj: nn.Module,
        k_proj: nn.Module,
        v_proj: nn.Module,
        out_proj: nn.Module,
    ) -> None:
        super().__init__()
        self.embed_dim, self.kdim, self.vdim = source.embed_dim, source.kdim, source.vdim
        self.num_heads, self.head_dim, self.dropout = source.num_heads, source.head_dim, source.dropout
        self.batch_first, self.add_zero_attn = source.batch_first, source.add_zero_attn
        self.register_parameter("bias_k", source.bias_k)  # type: ignore[arg-type]
        self.register_parameter("bias_v", source.bias_v)  # type: ignore[arg-type]
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = q_proj, k_proj, v_proj, out_proj
        self.training = source.training

    @classmethod
    def unpack(cls, module: nn.MultiheadAttention, *, copy_weights: bool = True) -> ProjectedAttention:
        """Take the projections of an attention module apart.

        Parameters
        ----------
        module : nn.MultiheadAttention
            Not changed.
        copy_weights : bool
            False: `q_proj`, `k_proj` and `v_proj` hold views of the packed weights, and the other parts are the
            module's own.

        Returns
        -------
        ProjectedAttention
            With dense projections.

        Raises
        ------
        ConversionError
            If the module is another, a subclass included.
        """
        if type(module) is not nn.MultiheadAttention:
            raise ConversionError(f"unpack: an nn.MultiheadAttention; got {type(module).__name__}")
        if module._qkv_same_embed_dim:
            weights = [_rows(module.in_proj_weight, k) for k in range(3)]
        else:
            weights = [getattr(module, f"{name}_weight") for name in PROJECTIONS]
        biases = [None if module.in_proj_bias is None else _rows(module.in_proj_bias, k) for k in range(3)]
        q, k, v = (_linear(nn.Linear, *pair, module.training) for pair in zip(weights, biases, strict=True))
        result = cls(module, q, k, v, module.out_proj)
        return copy.deepcopy(result) if copy_weights else result

    def pack(self) -> nn.MultiheadAttention:
        """Put the projections together again: the inverse of `unpack`.

        Returns
        -------
        nn.MultiheadAttention
            With dense weights; factorized ones are contracted. An `out_proj` that is dense, `bias_k` and `bias_v` are
            handed over, not copied.

        Raises
        ------
        ConversionError
            If a projection is neither linear nor factorized, or some have a bias and others none.
        """
        q, k, v = (_as_linear(name, getattr(self, name)) for name in PROJECTIONS)
        out = self.out_proj if isinstance(self.out_proj, nn.Linear) else _as_linear("out_proj", self.out_proj)
        if isinstance(self.out_proj, FactorizedLayer):
            out = _linear(NonDynamicallyQuantizableLinear, out.weight, out.bias, out.training)
        biases = [part.bias for part in (q, k, v) if part.bias is not None]
        if len(biases) not in (0, 3):
            raise ConversionError("pack: q_proj, k_proj and v_proj have a bias, or none of them; some have one")
        options = {"add_zero_attn": self.add_zero_attn, "kdim": self.kdim, "vdim": self.vdim, "device": "meta"}
        packed = nn.MultiheadAttention(
            self.embed_dim, self.num_heads, self.dropout, bool(biases), batch_first=self.batch_first, **options
        )
        if packed._qkv_same_embed_dim:
            packed.in_proj_weight = _joined([q.weight, k.weight, v.weight])
        else:
            for name, part in zip(PROJECTIONS, (q, k, v), strict=True):
                setattr(packed, f"{name}_weight", _joined([part.weight]))
        if biases:
            packed.in_proj_bias = _joined(biases)
        packed.bias_k, packed.bias_v, packed.out_proj = self.bias_k, self.bias_v, out  # type: ignore[assignment]
        packed.training = self.training
        return packed

    # -- what readers of nn.MultiheadAttention look for -------------------------------------------------------------

    @property
    def in_proj_weight(self) -> Tensor | None:
        """The packed weight (3 embed_dim, embed_dim), built on use of its values; None where kdim or vdim differ."""
        return self._packed("weight") if self.kdim == self.vdim == self.embed_dim else None

    @property
    def in_proj_bias(self) -> Tensor | None:
        """The packed bias (3 embed_dim,), built on use of its values; None where there is none."""
        return self._packed("bias")

    def _packed(self, name: str) -> Tensor | None:
        parts = [getattr(getattr(self, projection), name) for projection in PROJECTIONS]
        if any(part is None for part in parts):
            return None
        if torch.compiler.is_compiling():
            return torch.cat(parts)  # what is not used of it, the compiler drops
        shape = (3 * self.embed_dim, *parts[0].shape[1:])
        differentiable = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
        return DenseWeight(lambda: torch.cat(parts), shape, parts[0], differentiable)

    # -- forward ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        query: Tensor,  # (L, N, embed_dim), (N, L, embed_dim) if batch_first, or (L, embed_dim)
        key: Tensor,  # the same with S for L and kdim
        value: Tensor,  # the same with S for L and vdim
        key_padding_mask: Tensor | None = None,  # (N, S), or (S,)
        need_weights: bool = True,
        attn_mask: Tensor | None = None,  # (L, S), or (N * num_heads, L, S)
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend. See ``nn.MultiheadAttention.forward``; nested tensors are taken too, without masks.

        Returns
        -------
        output : Tensor
            The shape of `query`.
        weights : Tensor or None
            (N, L, S), or (N, num_heads, L, S) where they are not averaged; without N where the input has no batch.
            None unless asked for.

        Raises
        ------
        NetworkError
            If a shape or a mask's dtype does not fit, or `is_causal` comes without an `attn_mask`.
        """
        if leaf.is_recorded(query):
            options = key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            recorded: tuple[Tensor, Tensor | None] = leaf.call(self, query, key, value, *options)
            return recorded
        if query.is_nested or key.is_nested or value.is_nested:
            if key_padding_mask is not None or attn_mask is not None:
                raise NetworkError("attention on nested tensors: without masks; got one")
            output, weights = self._nested(query, key, value, need_weights)
        else:
            if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
                shapes = [tuple(x.shape) for x in (query, key, value)]
                raise NetworkError(f"attention: query, key and value of 3 dimensions, or of 2; got {shapes}")
            if key.shape[:-1] != value.shape[:-1]:
                shapes = [tuple(x.shape) for x in (key, value)]
                raise NetworkError(f"attention: key and value alike but for their features; got {shapes}")
            batch = 0 if self.batch_first else 1
            if query.dim() == 3 and query.shape[batch] != key.shape[batch]:
                sizes = f"{query.shape[batch]} and {key.shape[batch]}"
                raise NetworkError(f"attention: query and key of one batch size; got {sizes}")
            if is_causal and attn_mask is None:
                raise NetworkError("attention: is_causal says that attn_mask is causal; got no attn_mask")
            output, weights = self._plain(
                query, key, value, key_padding_mask, attn_mask, need_weights, is_causal=is_causal
            )
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=-3)
        return output, weights

    def _plain(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        need_weights: bool,
        *,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        batched = query.dim() == 3
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if not batched:
            q, k, v = (x.unsqueeze(0) for x in (q, k, v))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        # As in torch: the hint stands for the mask only where the mask is not needed for something else.
        is_causal = is_causal and key_padding_mask is None and not need_weights
        rows, columns = (*q.shape[:2],), (*k.shape[:2],)
        mask = self._mask(key_padding_mask, None if is_causal else attn_mask, rows, columns, q.dtype)
        output, weights = self._attend(q, k, v, mask, need_weights, is_causal=is_causal)
        if not batched:
            output, weights = output.squeeze(0), None if weights is None else weights.squeeze(0)
        elif not self.batch_first:
            output = output.transpose(0, 1)
        projected: Tensor = self.out_proj(output)
        return projected, weights

    def _nested(self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool) -> tuple[Tensor, Tensor | None]:
        """The projections without the padding; in between with it."""
        if not (query.is_nested and key.is_nested and value.is_nested):
            raise NetworkError("attention on nested tensors: query, key and value are nested; some are not")
        parts = [
            projection(x).unbind() for projection, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        ]
        q, k, v = (nn.utils.rnn.pad_sequence(list(part), batch_first=True) for part in parts)
        lengths = torch.tensor([len(part) for part in parts[1]], device=k.device)
        padding = torch.arange(k.shape[1], device=k.device) >= lengths[:, None]
        mask = self._mask(padding, None, (*q.shape[:2],), (*k.shape[:2],), q.dtype)
        output, weights = self._attend(q, k, v, mask, need_weights, is_causal=False)
        rows = [row[: len(part)] for row, part in zip(output, parts[0], strict=True)]
        return self.out_proj(torch.nested.as_nested_tensor(rows, layout=query.layout)), weights

    def _mask(
        self,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        rows: tuple[int, ...],  # (N, L)
        columns: tuple[int, ...],  # (N, S)
        dtype: torch.dtype,
    ) -> Tensor | None:
        """What is added to the scores (N, num_heads, L, S); it broadcasts."""
        masks = []
        if attn_mask is not None:
            shared, own = (rows[1], columns[1]), (rows[0] * self.num_heads, rows[1], columns[1])
            if tuple(attn_mask.shape) not in (shared, own):
                raise NetworkError(f"attn_mask: of shape {shared} or {own}; got {tuple(attn_mask.shape)}")
            attn_mask = attn_mask if attn_mask.dim() == 2 else attn_mask.reshape(rows[0], self.num_heads, *shared)
            masks.append(_additive(attn_mask, dtype, "attn_mask"))
        if key_padding_mask is not None:
            if tuple(key_padding_mask.shape) != columns:
                raise NetworkError(f"key_padding_mask: of shape {columns}; got {tuple(key_padding_mask.shape)}")
            masks.append(_additive(key_padding_mask, dtype, "key_padding_mask")[:, None, None])
        if not masks:
            return None
        mask = masks[0] if len(masks) == 1 else masks[0] + masks[1]
        return F.pad(mask, (0, (self.bias_k is not None) + bool(self.add_zero_attn)))

    def _attend(
        self,
        q: Tensor,  # (N, L, embed_dim)
        k: Tensor,  # (N, S, embed_dim)
        v: Tensor,  # (N, S, embed_dim)
        mask: Tensor | None,
        need_weights: bool,
        *,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:  # (N, L, embed_dim), (N, num_heads, L, S + the positions added)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), -1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.expand(len(v), -1, -1)], dim=1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        q, k, v = (x.reshape(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, dim=-1), dropout)
            heads = weights @ v
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        return heads.transpose(1, 2).flatten(2), weights

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"


def _rows(packed: nn.Parameter, position: int) -> nn.Parameter:
    """One of the three parts of a packed parameter, as a parameter that shares its memory."""
    return nn.Parameter(packed.detach().chunk(3)[position], packed.requires_grad)


def _linear(kind: Callable[..., nn.Linear], weight: Tensor, bias: Tensor | None, training: bool) -> nn.Linear:
    linear = kind(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight, linear.bias = weight, bias  # type: ignore[assignment]
    return linear.train(training)


def _joined(parts: Sequence[Tensor]) -> nn.Parameter:
    packed = torch.cat([part.detach() for part in parts])
    return nn.Parameter(packed, any(part.requires_grad for part in parts))


def _as_linear(name: str, module: nn.Module) -> nn.Linear:
    dense = module.to_module() if isinstance(module, FactorizedLayer) else module
    if not isinstance(dense, nn.Linear):
        raise ConversionError(f"pack: {name} is linear or factorized; it is a {type(module).__name__}")
    return dense


def _additive(mask: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A mask as what is added to scores: of a boolean one, minus infinity where it is true."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)
    if not mask.is_floating_point():
        raise NetworkError(f"{name}: boolean or floating point; got {mask.dtype}")
    return mask.to(dtype)
