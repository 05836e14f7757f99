"""What ranks cost and keep, measured: errors of each layer against its size, and models of every format and size."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .batches import call, evaluating
from .convert import convert_model, summarize
from .errors import ConversionError, RankError
from .evaluate import latency
from .formats import Format
from .layers.data import problem, to_matrix
from .metric import Metric
from .moments import Moments
from .network import Axis, Network
from .rank import resolve
from .scan import Found, scan

SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7)
DENSE = "dense"


@dataclass(frozen=True)
class ErrorCurve:
    """What a layer loses in a format, by the share of its parameters that is left.

    Parameters
    ----------
    layer : str
    format : str
        The format's name.
    shares : tuple of float
        Those that the networks have, ascending.
    weight : tuple of float
        Relative errors of the weight, ``||W - W_hat|| / ||W||``.
    output : tuple of float or None
        Relative errors of the outputs on the calibration data, about their mean where a bias makes good for it; None
        where there are none.
    """

    layer: str
    format: str
    shares: tuple[float, ...]
    weight: tuple[float, ...]
    output: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Point:
    """A converted model: what it takes, and how good it is.

    Parameters
    ----------
    format : str
        The format's name, or "dense".
    share : float
        What was asked: the fraction of each layer's parameters.
    params : int
        Parameters of the whole model.
    macs : int
        Multiply-accumulates a row of the layers that can be converted.
    accuracy : float
        What was measured.
    latency : float or None
        Milliseconds a batch.
    """

    format: str
    share: float
    params: int
    macs: int
    accuracy: float
    latency: float | None = None


def error_curves(
    model: nn.Module,
    formats: Format | Sequence[Format],
    calibration: Mapping[str, Moments] | None = None,
    *,
    shares: Sequence[float] = SHARES,
    where: Callable[[str, nn.Module], bool] | None = None,
    exact: bool = False,
    progress: bool | None = None,
) -> list[ErrorCurve]:
    """The errors of each layer against its size, in some formats.

    Parameters
    ----------
    model : nn.Module
        A model, or a dense layer.
    formats : Format or sequence of Format
        Their ranks do not matter.
    calibration : Calibration, optional
        What `collect` gathered: errors of the outputs are then stated too, each of a fit to these data.
    shares : sequence of float
        Fractions of a layer's parameters. A layer that cannot be so small in a format has no such point.
    where : callable, optional
        (name, module) -> bool; only layers for which it is true. By default all that can be converted, but lookups.
    exact : bool
        Fit the outputs at each size as a conversion does. That takes as long.
    progress : bool, optional
        A progress bar; by default where the output is a terminal.

    Returns
    -------
    list of ErrorCurve
        In the order of the layers.

    Raises
    ------
    ConversionError
        If there is no such layer, or no format or share.
    RankError
        If a share is outside (0, 1].

    Notes
    -----
    A weight is decomposed once, for the largest share, and then rounded: what is stated is a little more than a
    decomposition of that size has. On data, formats whose modes split the inputs gain much by the sweeps of least
    squares that a conversion makes: without them (`exact`) they look worse than they are.
    """
    several = _several(formats)
    _check_shares(shares)
    found = [one for one in scan(model) if not one.obstacle and one.settings]
    found = [one for one in found if (where or _is_no_lookup)(one.name, one.module)]
    if not found:
        raise ConversionError(f"{type(model).__name__}: a layer that can be converted; got none")
    jobs = [(layer, format) for layer in found for format in several]
    bar = tqdm(jobs, disable=None if progress is None else not progress, delay=1, unit="curve")
    made = [_curve(layer, format, shares, (calibration or {}).get(layer.name), exact) for layer, format in bar]
    return [one for one in made if one.shares]


def _is_no_lookup(name: str, module: nn.Module) -> bool:
    return not isinstance(module, (nn.Embedding, nn.EmbeddingBag))


def _curve(layer: Found, format: Format, shares: Sequence[float], moments: Moments | None, exact: bool) -> ErrorCurve:
    weight, axes, metric = problem(layer.layer, [layer.dense], None if moments is None else [moments])
    networks = _networks(format, axes, shares)
    if not networks:
        return ErrorCurve(layer.name, format.name, (), ())
    entries = math.prod(axis.size for axis in axes)
    sizes = tuple(network.num_parameters / entries for network in networks)
    n, groups = (math.prod(a.size for a in axes if a.role in roles) for roles in (("in", "kernel"), ("group",)))
    identity = torch.eye(n, dtype=torch.float64, device=weight.device)
    grouped = any(axis.role == "group" for axis in axes)
    plain = Metric(identity.expand(groups, n, n) if grouped else identity)
    of_weight = _errors(weight, axes, plain, format, networks)
    if metric is None:
        return ErrorCurve(layer.name, format.name, sizes, of_weight)
    return ErrorCurve(
        layer.name, format.name, sizes, of_weight, _errors(weight, axes, Metric(metric.inputs), format, networks, exact)
    )


def _networks(format: Format, axes: Sequence[Axis], shares: Sequence[float]) -> list[Network]:
    """The networks of the shares that a format can reach, from small to large, each within the next."""
    entries = math.prod(axis.size for axis in axes)
    found: list[Network] = []
    for share in sorted(map(float, shares), reverse=True):
        try:
            if found:
                network = resolve(found[-1], share, entries, format.name, found[-1].ranks)[0]
            else:
                network = replace(format, rank=share).resolve(axes)[0]
        except RankError:
            break
        if not found or network != found[-1]:
            found.append(network)
    return found[::-1]


def _errors(
    weight: Tensor,
    axes: Sequence[Axis],
    metric: Metric,
    format: Format,
    networks: Sequence[Network],
    exact: bool = False,
) -> tuple[float, ...]:
    """What is lost of the norm in a metric, relative to it."""
    norm = _squared_norm(to_matrix(weight, axes).double(), metric.inputs.double())
    ranks = [network.ranks for network in reversed(networks)]
    swept = range(len(ranks)) if exact else ()
    losses = format.pin(networks[-1]).losses(weight, axes, metric, ranks, swept=swept)
    return tuple(math.sqrt(loss / norm) if norm else 0.0 for loss in reversed(losses))


def _squared_norm(matrix: Tensor, form: Tensor) -> float:
    applied = matrix * form if form.dim() == 1 else matrix @ form.to(matrix.device)
    return float((applied * matrix).sum())


def frontier(
    model: nn.Module,
    formats: Format | Sequence[Format],
    shares: Sequence[float],
    measure: Callable[[nn.Module], float],
    calibration: Mapping[str, Moments] | None = None,
    batches: Iterable[Any] | None = None,
    *,
    timed: Any = None,
    repeats: int = 15,
    progress: bool | None = None,
    **options: Any,
) -> list[Point]:
    """Convert a model to each format at each size, and measure what comes out.

    Parameters
    ----------
    model : nn.Module
        Not changed.
    formats : Format or sequence of Format
        Their ranks are replaced by the shares.
    shares : sequence of float
        Fractions of each layer's parameters. Where a layer cannot be so small in a format, a warning says so, and
        there is no such point.
    measure : callable
        (model in evaluation mode) -> how good it is, more being better.
    calibration, batches : optional
        See `convert_model`.
    timed : optional
        A batch, as of `collect`: then each model is timed on it, in turn with the dense one, and its latency stated
        as so many times the dense model's.
    repeats : int
        Timed calls of each.
    progress : bool, optional
        A progress bar; by default where the output is a terminal.
    **options
        Of `convert_model`; by default ``force=True``.

    Returns
    -------
    list of Point
        The dense model first.

    Raises
    ------
    ConversionError
        If there is no format or share, or the measure gives no number; and what `convert_model` raises.
    """
    several = _several(formats)
    _check_shares(shares)
    batches = None if batches is None else list(batches)
    given = {"force": True, "progress": False, "calibration": calibration, "batches": batches, **options}
    plan = summarize(model)
    points = [Point(DENSE, 1.0, _size(model), plan.macs[1], _measured(measure, model))]
    ratios, times = [], []
    jobs = [(format, share) for format in several for share in shares]
    for format, share in tqdm(jobs, disable=None if progress is None else not progress, delay=1, unit="model"):
        try:
            converted = convert_model(model, replace(format, rank=share), **given)
        except RankError as error:
            warnings.warn(f"{format.name} at {share:g}: {error}", stacklevel=2)
            continue
        accuracy = _measured(measure, converted)
        points.append(Point(format.name, share, _size(converted), summarize(converted).macs[1], accuracy))
        if timed is not None:
            with evaluating(model, converted), torch.inference_mode():
                found = latency(
                    {"dense": partial(call, model, timed), "this": partial(call, converted, timed)}, repeats
                )
            times.append(found["dense"])
            ratios.append(found["this"] / found["dense"])
    if not times:
        return points
    dense = statistics.median(times)
    return [replace(one, latency=dense * ratio) for one, ratio in zip(points, (1.0, *ratios), strict=True)]


def _several(formats: Format | Sequence[Format]) -> list[Format]:
    several = [formats] if isinstance(formats, Format) else list(formats)
    if not several or not all(isinstance(format, Format) for format in several):
        raise ConversionError(f"formats: formats such as LowRank(0.5); got {formats!r}")
    return several


def _check_shares(shares: Sequence[float]) -> None:
    if not shares:
        raise ConversionError("shares: at least one; got none")
    for share in shares:
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise RankError(f"shares: fractions above 0 and at most 1; got {share!r}")


def _measured(measure: Callable[[nn.Module], float], model: nn.Module) -> float:
    with evaluating(model), torch.no_grad():
        value = measure(model)
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ConversionError(f"measure: a number; got {type(value).__name__}") from None


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
