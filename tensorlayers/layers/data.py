"""What data change in how a layer is fitted: the weight that is aimed at, the metric, and the bias."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ..metric import Metric
from ..moments import Moments
from ..network import Axis

_ORDER = ("group", "out", "in", "kernel")


def to_matrix(weight: Tensor, axes: Sequence[Axis]) -> Tensor:
    """A weight of one dimension an axis as (m, n), or (groups, m, n): outputs and what they see."""
    places = sorted(range(len(axes)), key=lambda k: _ORDER.index(axes[k].role))
    groups, outs = (math.prod(axis.size for axis in axes if axis.role == role) for role in ("group", "out"))
    matrix = weight.permute(places).reshape(groups, outs, -1)
    return matrix if any(axis.role == "group" for axis in axes) else matrix[0]


def from_matrix(matrix: Tensor, axes: Sequence[Axis]) -> Tensor:
    """The inverse of `to_matrix`."""
    places = sorted(range(len(axes)), key=lambda k: _ORDER.index(axes[k].role))
    ordered = matrix.reshape([axes[k].size for k in places])
    return ordered.permute([places.index(k) for k in range(len(axes))])


def aims(
    weights: Sequence[Tensor], moments: Sequence[Moments], axes: Sequence[Axis], biased: bool
) -> tuple[list[Tensor], Metric]:
    """The weights to fit in place of some, of one dimension an axis each, and the metric of their data together."""
    pooled = Moments.pooled(moments)
    aimed = [
        weight if one.source is None else from_matrix(one.target(to_matrix(weight, axes), centered=biased), axes)
        for weight, one in zip(weights, moments, strict=True)
    ]
    return aimed, pooled.metric(centered=biased)


def mended(bias: Tensor, weight: Tensor, found: Tensor, moments: Moments, axes: Sequence[Axis]) -> Tensor:
    """A bias that makes good for the mean of what a weight and that found in its place, as stored, give."""
    change = moments.bias(to_matrix(weight, axes), to_matrix(found, axes))
    return (bias.double() + change.reshape(bias.shape)).to(bias.dtype)
