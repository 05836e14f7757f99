"""Layer products on (network, cores): the reference that every kernel is tested against, and the fallback."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from . import contraction, convolution
from .conv_maps import Window, is_last, with_channels, with_layout
from .convolution import ConvPlan
from .errors import NetworkError
from .network import Network

Product = Callable[[Tensor, Network, Sequence[Tensor], Tensor | None], Tensor]
Convolve = Callable[[ConvPlan, Tensor, Sequence[Tensor], Window, "Tensor | None"], Tensor]


def padded(rows: Tensor, network: Network) -> Tensor:
    """Rows with zeros after their features, as many as the in modes hold more; themselves where that is none."""
    missing = network.features("in") - rows.shape[1]
    return F.pad(rows, (0, missing)) if missing else rows


def contract_rows(
    x: Tensor,  # (batch, at most network.features("in"))
    network: Network,
    cores: Sequence[Tensor],  # shapes network.core_shapes
    bias: Tensor | None = None,  # (network.features("out"),)
) -> Tensor:  # (batch, network.features("out"))
    """Contract rows with the cores, pairwise, in the planned order of their batch class."""
    plan = contraction.linear_plan(network, contraction.batch_class(x.shape[0]))
    tensor = padded(x, network).reshape(x.shape[0], *network.mode_sizes("in"))
    y = contraction.execute(plan, (tensor, *cores)).reshape(x.shape[0], network.features("out"))
    return y if bias is None else y + bias.to(y.dtype)


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
        What pads and multiplies the rows and adds the bias, in place of `contract_rows`.

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
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if out_features == rows:
        y = product(flat, network, cores, bias)
        return y if x.dim() == 2 else y.reshape(*lead, out_features)
    y = product(flat, network, cores, None)[:, :out_features]
    return (y if bias is None else y + bias.to(y.dtype)).reshape(*lead, out_features)


def conv(
    x: Tensor,  # (batch, in_channels, *spatial)
    network: Network,
    cores: Sequence[Tensor],  # shapes network.core_shapes
    window: Window,
    bias: Tensor | None = None,  # (out_channels,)
    *,
    out_channels: int | None = None,
    product: Convolve = convolution.execute,
) -> Tensor:  # (batch, out_channels, *spatial')
    """Convolve with a factorized kernel without forming it.

    Where the modes are larger than the channels (padding), the product fills x up with zeros, and its result is cut,
    group by group.

    Parameters
    ----------
    x : Tensor
        The batch may be empty.
    network : Network
        Its modes have the roles out, in, group and kernel.
    cores : sequence of Tensor
        The dtype and device of `x`.
    window : Window
    bias : Tensor, optional
    out_channels : int, optional
        Defaults to the length of the bias, or to what the out modes hold.
    product : callable
        What fills up the channels and carries out the plan, in place of `convolution.execute`.

    Returns
    -------
    Tensor
        The dtype of `x`; in the memory format of `x`.

    Raises
    ------
    NetworkError
        If the modes do not hold the channels, or the groups do not divide them.
    RuntimeError
        As torch's, if the output of a sample would be empty.
    """
    groups, columns, rows = (network.features(role) for role in ("group", "in", "out"))
    if out_channels is None:
        out_channels = groups * rows if bias is None else bias.shape[0]
    for what, count, held in (("in", x.shape[1], columns), ("out", out_channels, rows)):
        if count % groups or count // groups > held:
            raise NetworkError(f"{what}_channels {count}: at most {held} a group of {groups}, what the modes hold")
    lengths = window.lengths(x.shape[2:])
    # Torch takes no empty positions of a sample, but samples without any, of which there are none.
    if any(length < 1 for length in lengths) and (x.shape[0] or any(length < 0 for length in lengths)):
        raise RuntimeError(f"input {tuple(x.shape)}: an output of at least 1 in each dimension; got {lengths}")
    plan = convolution.plan_for(network, window, x.shape[0] * math.prod(x.shape[2:]))
    if out_channels == groups * rows:
        return product(plan, x, cores, window, bias)
    y = with_channels(product(plan, x, cores, window, None), groups, out_channels // groups)
    if bias is not None:
        y = y + bias.to(y.dtype).view(-1, *(1 for _ in lengths))
    return with_layout(y, is_last(x))
