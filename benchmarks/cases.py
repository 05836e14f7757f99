"""Which formats are compared, at which share of the dense FLOPs, and what each must show (the targets)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from compare import Candidate
from torch import Tensor, nn

from tensorlayers import (
    BTT,
    CP,
    TT,
    FactorizedLinear,
    Format,
    LowRank,
    RankError,
    Tucker,
    contraction,
    plan_conversion,
)
from tensorlayers.cost import SLOWER
from tensorlayers.layers import FactorizedLayer
from tensorlayers.network import Network
from tensorlayers.testing import assert_close

FORMATS: tuple[type[Format], ...] = (LowRank, Tucker, BTT, TT, CP)
LOW, MIDDLE = 0.1, 0.4
"""Shares of the dense FLOPs that the targets are stated for."""

SHARES: dict[float, dict[type[Format], tuple[float, float]]] = {
    LOW: {LowRank: (0.22, 0.25), Tucker: (0.30, 0.35), BTT: (0.30, 0.35), TT: (0.30, 0.35), CP: (0.30, 0.35)},
    MIDDLE: {LowRank: (0.50, 0.58), Tucker: (0.50, 0.60), BTT: (0.60, 0.65), TT: (0.65, 0.85)},
}
"""Forward, and forward + backward, by the share of FLOPs and the format, at 1024 rows and more."""
REBUILT = (1.15, 1.25)
"""The same where there is more arithmetic than dense's and building the weight adds at most `REBUILD_SHARE` to it."""
REBUILD_SHARE = 0.05
ONE_ROW = 0.40
"""Forward, one row, at `MIDDLE` or less."""
OVERHEAD: dict[type[Format], tuple[float, float]] = {
    LowRank: (1.5, 3),
    Tucker: (6, 3),
    BTT: (4, 3),
    TT: (4, 3),
    CP: (4, 3),
}
"""16 -> 10 features, 4 rows: forward, and forward + backward."""
CHEAPEST = 1.10
"""Of the cheapest implementation that is measured, where nothing can be as fast as dense."""
CONVERTED = SLOWER
"""What `convert_model` converts of its own accord."""
CONV_QUARTER = 0.5
"""A Tucker-2 convolution of 256 -> 256 channels at a quarter of the MACs."""
BLOCK = (0.75, 0.80)
"""An encoder block: inference, and training."""
RESNET = 0.85
"""A ResNet-18, training."""
GROWTH = 1.2
"""Time against work: how much faster time may grow than the FLOPs or the batch."""


def targets(forward: float | None = None, training: float | None = None) -> dict[str, float]:
    """The targets of a `Candidate`."""
    return {key: value for key, value in (("forward", forward), ("training", training)) if value is not None}


def share(kind: type[FactorizedLayer], settings: Mapping[str, Any], network: Network, rows: int) -> float:
    """Factorized over dense FLOPs, as the layer kind counts them."""
    return kind.factorized_cost(network, settings, rows).flops / kind.dense_cost(settings, rows).flops


def rebuilding(layer: FactorizedLayer, rows: int) -> float:
    """FLOPs of building the dense weight, of those of the dense product."""
    dense = layer.dense_cost(layer.settings_of(layer), rows)
    return contraction.dense_plan(layer.own_network).flops / dense.flops


def least_work(layer: FactorizedLayer, rows: int) -> float:
    """FLOPs of the cheaper way, factorized or by the dense weight rebuilt, of those of the dense product."""
    return min(share(type(layer), layer.settings_of(layer), layer.own_network, rows), 1 + rebuilding(layer, rows))


def nearest(
    kind: type[FactorizedLayer], settings: Mapping[str, Any], rows: int, wanted: float, format: type[Format], **how: Any
) -> Format:
    """The rank with which a format's FLOPs come nearest to a share of dense's.

    Parameters
    ----------
    kind : type
        The factorized layer.
    settings : mapping
        As of ``kind.settings_of``.
    rows : int
        The batch that FLOPs are counted for; of a convolution the output positions.
    wanted : float
        The share.
    format : type
        A class of formats; the search is over its fraction of parameters.
    how
        The format's other options.

    Returns
    -------
    Format
        With an explicit rank.
    """
    found: dict[tuple[int, ...], float] = {}
    low, high = math.log(1e-6), 0.0
    for _ in range(24):
        middle = (low + high) / 2
        try:
            network = kind.resolve(format(math.exp(middle), **how), settings)[0]
        except RankError:  # below the smallest network
            low = middle
            continue
        found[network.ranks] = share(kind, settings, network, rows)
        low, high = (middle, high) if found[network.ranks] < wanted else (low, middle)
    ranks = min(found, key=lambda ranks: abs(found[ranks] - wanted))
    return aligned(kind, settings, rows, wanted, format(ranks if len(ranks) > 1 else ranks[0], **how))


def aligned(
    kind: type[FactorizedLayer], settings: Mapping[str, Any], rows: int, wanted: float, format: Format
) -> Format:
    """The format with ranks in multiples of `unit`, its FLOPs nearest to a share.

    A user who chooses ranks for speed does so; a fraction of the parameters would not. No such rank is that of a whole
    mode: nothing would be compressed there.
    """
    network = kind.resolve(format, settings)[0]
    choices = []
    for rank, bond in zip(network.ranks, network.bonds, strict=True):
        most, step = network.rank_limit(bond) - 1, unit(rank)
        below = rank - rank % step
        near = [value for value in range(below, min(below + 2 * step, most) + 1, step) if value % unit(value) == 0]
        choices.append([rank] if step == 1 else near or [most - most % unit(most)])

    def distance(ranks: tuple[int, ...]) -> float:
        return abs(share(kind, settings, network.with_ranks(ranks), rows) - wanted)

    best = min(itertools.product(*choices), key=distance)
    return replace(format, rank=best if len(best) > 1 else best[0])


def unit(rank: int) -> int:
    """What a rank of about this size is a multiple of where speed counts: 4 up to 32, 8 up to 64, 16 above; 1 below 12.

    BLAS is measurably faster there; below 12 such a step would be too large a part of the rank.
    """
    return 1 if rank < 12 else 4 if rank < 32 else 8 if rank < 64 else 16


def label(format: Format) -> str:
    """A format as a row's name: without what the row has a column for."""
    return str(replace(format, in_modes=None, out_modes=None)).replace("rank=", "")


def facts(layer: FactorizedLayer, dense: nn.Module, rows: int, decision: bool = True) -> dict[str, Any]:
    """What a row says of a layer: its modes, its share of the FLOPs, and what `convert_model` would do."""
    network = layer.own_network
    settings = layer.settings_of(layer)
    sides = ["x".join(str(size) for size in network.mode_sizes(role)) for role in ("in", "out")]
    said: dict[str, Any] = {"modes": " | ".join(sides), "flops": share(type(layer), settings, network, rows)}
    if decision:
        entry = plan_conversion(nn.Sequential(dense), layer.format, errors=False)["0"]
        said["convert_model"] = "" if entry.converted else f"stays dense, {entry.reason}"
    return said


def check(layer: nn.Module, x: Tensor) -> None:
    """Output and every gradient against torch's own layer with the layer's dense weight, and inference against both.

    On the whole input: which implementation runs depends on its size.
    """
    assert isinstance(layer, FactorizedLayer)
    x = x.detach().requires_grad_()
    y = layer(x)
    probe = torch.randn_like(y)
    weights = {"weight": layer.to_dense()} | ({} if layer.bias is None else {"bias": layer.bias})
    dense = torch.func.functional_call(layer.to_module(), weights, (x,))
    names = ["input", *(name for name, _ in layer.named_parameters())]
    ours, truth = (torch.autograd.grad(output, [x, *layer.parameters()], probe) for output in (y, dense))
    assert_close(y, dense, x.dtype, "output")
    for name, actual, expected in zip(names, ours, truth, strict=True):
        assert_close(actual, expected, x.dtype, f"gradient of {name}")
    with torch.inference_mode():
        assert_close(layer(x), dense, x.dtype, "output of inference")


def linear(in_features: int, out_features: int, format: Format, rows: int, **aims: float) -> Candidate:
    """A factorized linear layer as a candidate, held to the rules for comparisons of formats."""
    layer = FactorizedLinear(in_features, out_features, format=format)
    dense = nn.Linear(in_features, out_features, device="meta")
    fair(layer)
    return Candidate(label(format), layer, check, facts(layer, dense, rows), aims)


def fair(layer: FactorizedLinear) -> None:
    """No mode below 4, blocks at least 128 wide, and no other format in the shapes of a low-rank matrix."""
    network, format = layer.network, layer.format
    if min(layer.in_features, layer.out_features) < 128:
        return
    sizes = [network.mode_sizes("in"), network.mode_sizes("out")]
    assert min(map(min, sizes)) >= 4, f"{format}: modes {sizes}"
    if isinstance(format, BTT):
        assert min(map(max, sizes)) >= 128, f"{format}: blocks {sizes}"
    if not isinstance(format, LowRank):
        matrices = all(len(shape) == 2 for shape in network.core_shapes)
        assert len(network.cores) > 2 or not matrices, f"{format}: the shapes of a low-rank matrix"


@cache
def at_share(in_features: int, out_features: int, wanted: float, format: type[Format]) -> Format:
    """`nearest` of a linear layer, at 1024 rows."""
    settings = {"in_features": in_features, "out_features": out_features, "bias": True}
    return nearest(FactorizedLinear, settings, 1024, wanted, format)
