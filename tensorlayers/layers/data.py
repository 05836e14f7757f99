"""What data change in how a layer is fitted: the weight that is aimed at, the metric, and the bias."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..metric import Metric
from ..moments import Moments
from ..network import Axis
from .kind import LayerKind

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


def problem(
    kind: type[LayerKind], modules: Sequence[nn.Module], moments: Sequence[Moments] | None = None
) -> tuple[Tensor, tuple[Axis, ...], Metric | None]:
    """What dense layers of one shape are factorized by: a weight, its axes, and the metric of their data.

    Parameters
    ----------
    kind : type
        The factorized layer kind.
    modules : sequence of nn.Module
        Several are one weight with an axis more.
    moments : sequence of Moments, optional
        One a module. Where those are of another model than the dense one, the weight is what makes good for that.
    """
    settings = kind.settings_of(modules[0])
    own = kind.axes_of(settings)
    weights = [kind.to_axes(kind.weight_of(module).detach(), settings) for module in modules]
    metric = None
    if moments is not None:
        moments = [one.to(weights[0].device) for one in moments]
        biased = all(getattr(module, "bias", None) is not None for module in modules)
        metric = Moments.pooled(moments).metric(centered=biased)
        weights = [
            weight if one.source is None else from_matrix(one.target(to_matrix(weight, own), centered=biased), own)
            for weight, one in zip(weights, moments, strict=True)
        ]
    if len(modules) == 1:
        return weights[0], own, metric
    return torch.stack(weights), (Axis("stack", len(modules)), *own), metric


def mended(bias: Tensor, weight: Tensor, found: Tensor, moments: Moments, axes: Sequence[Axis]) -> Tensor:
    """A bias that makes good for the mean of what a weight and that found in its place, as stored, give."""
    change = moments.to(weight.device).bias(to_matrix(weight, axes), to_matrix(found, axes))
    return (bias.double() + change.reshape(bias.shape)).to(bias.dtype)
