"""Layer products on (network, cores): the reference that every kernel is tested against, and the fallback."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from . import contraction
from .errors import NetworkError
from .network import Network

Product = Callable[[Tensor, Network, Sequence[Tensor]], Tensor]


def contract_rows(
    x: Tensor,  # (batch, network.features("in"))
    network: Network,
    cores: Sequence[Tensor],  # shapes network.core_shapes
) -> Tensor:  # (batch, network.features("out"))
    """Contract rows with the cores, pairwise, in the planned order of their batch class."""
    plan = contraction.linear_plan(network, contraction.batch_class(x.shape[0]))
    tensor = x.reshape(x.shape[0], *network.mode_sizes("in"))
    return contraction.execute(plan, (tensor, *cores)).reshape(x.shape[0], network.features("out"))


def linear(
    x: Tensor,  # (*batch, in_features)
    network: Network,
    cores: Sequence[Tensor],  # shapes network.core_shapes
    bias: Tensor | None = None,  # (out_features,)
    *,
    out_features: int | None = None,
    product: Product = contract_rows,
) -> Tensor:  # (*batch, out_features)
    r"""Apply a factorized weight without forming it, y = x W^T + b.

    Where the modes are larger than the features (padding), x is padded with zeros and y is cut.

    Parameters
    ----------
    x : Tensor
        Any number of leading dimensions, none and empty ones included. `in_features` is at most
        ``network.features("in")``.
    network : Network
        Its modes have the roles out and in.
    cores : sequence of Tensor
        The dtype and device of `x`.
    bias : Tensor, optional
    out_features : int, optional
        Defaults to the length of the bias, or to ``network.features("out")``.
    product : callable
        What multiplies the rows: the contraction, or a Triton kernel with the same signature as `contract_rows`.

    Returns
    -------
    Tensor
        The dtype of `x`. (Autocast is `dispatch.linear`'s business.)

    Raises
    ------
    NetworkError
        If the last dimension of `x` is larger than the in modes hold, or `out_features` than the out modes.
    """
    columns, rows = network.features("in"), network.features("out")
    if out_features is None:
        out_features = rows if bias is None else bias.shape[0]
    if x.dim() == 0 or x.shape[-1] > columns:
        raise NetworkError(f"input {tuple(x.shape)}: the last dimension is at most {columns}, what the in modes hold")
    if out_features > rows:
        raise NetworkError(f"out_features {out_features}: at most {rows}, what the out modes hold")
    lead = x.shape[:-1]
    flat = x.reshape(-1, x.shape[-1])
    if flat.shape[1] < columns:
        flat = F.pad(flat, (0, columns - flat.shape[1]))
    y = product(flat, network, cores)[:, :out_features]
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.reshape(*lead, out_features)
