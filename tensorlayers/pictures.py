"""Pictures of plans, of errors against ranks, and of what models of every format and size keep: matplotlib figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import nn

from . import figures, table
from .errors import ConversionError
from .figures import GRAY, INK, PALE, color_of, format_in, marker_of, styled
from .formats import Format
from .moments import Moments
from .plan import ConversionPlan
from .tradeoffs import DENSE, SHARES, ErrorCurve, Point, error_curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NAME = 30  # characters of a layer's name
_COLUMNS = 6  # panels in a row
_CUT = 5  # times the largest converted layer, above which a bar is cut
_REASON = 52  # characters of a reason
_AXES = {
    "params": "parameters of the model",
    "macs": "multiply-accumulates a row",
    "latency": "milliseconds a batch",
    "share": "share of each layer's parameters",
}


# -- the plan ---------------------------------------------------------------------------------------------------------


def plot_plan(plan: ConversionPlan, *, title: str | None = None) -> Figure:
    """Draw what a plan makes of each layer: parameters before and after, ranks, and why layers stay dense.

    Parameters
    ----------
    plan : ConversionPlan
        As `plan_conversion` or `summarize` gives it.
    title : str, optional
        By default what becomes of the whole model.

    Returns
    -------
    matplotlib.figure.Figure
        Bars that are much longer than those of the converted layers are cut, their length written on them.

    Raises
    ------
    ConversionError
        If the plan is empty, or matplotlib is missing.

    Examples
    --------
    >>> import torch, tensorlayers as tl
    >>> model = torch.nn.Sequential(torch.nn.Linear(512, 512))
    >>> figure = plot_plan(tl.plan_conversion(model, tl.LowRank(0.25), errors=False))
    """
    entries = list(plan)
    if not entries:
        raise ConversionError("plot_plan: a plan with layers; got none")

    def draw(pyplot: Any) -> Figure:
        figure, axes = pyplot.subplots(figsize=(9, 1.1 + 0.22 * len(entries)), layout="constrained")
        sizes = [entry.parameters for entry in entries]
        most = max((entry.parameters[0] for entry in entries if entry.converted), default=math.inf)
        limit = max(before for before, _ in sizes if before <= _CUT * most)
        for row, (entry, (before, after)) in enumerate(zip(entries, sizes, strict=True)):
            color = color_of(entry.format.name) if entry.format else GRAY
            axes.barh(row, min(before, limit), color=PALE, height=0.8)
            if entry.format:
                axes.barh(row, min(after, limit), color=color, height=0.8)
            if entry.network is not None:
                text = f"{table.count(before)} \N{RIGHTWARDS ARROW} {table.count(after)}   rank "
                text += " ".join(map(str, entry.network.ranks))
            else:
                text = f"{table.count(before)}   dense: {_brief(entry.reason)}"
            place = {"textcoords": "offset points", "va": "center", "annotation_clip": False}
            ink = INK if entry.format else GRAY
            axes.annotate(text, (min(before, limit), row), (4, 0), fontsize=7, color=ink, **place)
            if before > limit:  # a gap that says so
                axes.plot([0.955 * limit, 0.975 * limit], [row + 0.55, row - 0.55], color="white", linewidth=3)
        _name_rows(axes, [entry.name or "(the model)" for entry in entries])
        for label, entry in zip(axes.get_yticklabels(), entries, strict=True):
            label.set_color(INK if entry.format else GRAY)
        axes.set_xlim(0, 1.95 * limit)
        axes.set_xticks([tick for tick in axes.get_xticks() if tick <= limit])
        axes.xaxis.set_major_formatter(lambda value, _: table.count(value))
        axes.set_xlabel("parameters of the weight, before (pale) and after", loc="left")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.spines["bottom"].set_bounds(0, limit)
        formats = dict.fromkeys(entry.format.name for entry in entries if entry.format)
        handles = [pyplot.Rectangle((0, 0), 1, 1, color=color_of(name)) for name in formats]
        if handles:
            axes.legend(
                handles, list(formats), loc="lower right", bbox_to_anchor=(1, 1), ncols=len(handles), frameon=False
            )
        before, after = plan.parameters
        whole = (
            f"{table.count(before)} \N{RIGHTWARDS ARROW} {table.count(after)} parameters ({after / max(before, 1):.0%})"
        )
        axes.set_title(title or f"{len(plan.converted)} of {len(plan)} layers, {whole}", loc="left")
        return figure  # type: ignore[no-any-return]

    return styled(draw)


def _brief(reason: str) -> str:
    """A reason without what is in brackets, cut where it is long."""
    short = reason.split(" (")[0]
    return short if len(short) <= _REASON else f"{short[: _REASON - 1].rstrip()}\N{HORIZONTAL ELLIPSIS}"


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [table.abbreviated(name, _NAME) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)


# -- errors -----------------------------------------------------------------------------------------------------------


def plot_errors(
    model: nn.Module | Iterable[ErrorCurve],
    formats: Format | Sequence[Format] | None = None,
    calibration: Mapping[str, Moments] | None = None,
    *,
    shares: Sequence[float] = SHARES,
    where: Callable[[str, nn.Module], bool] | None = None,
    exact: bool = False,
) -> Figure:
    """Draw the errors of each layer against its size, a panel a layer.

    Parameters
    ----------
    model : nn.Module
        A model or a dense layer; or what `error_curves` gave, and then nothing else.
    formats, calibration, shares, where, exact : optional
        See `error_curves`.

    Returns
    -------
    matplotlib.figure.Figure
        Errors of the outputs on the calibration data are drawn through, those of the weights then dashed.

    Raises
    ------
    ConversionError, RankError
        See `error_curves`; also if matplotlib is missing.
    """
    figures.pyplot()
    if isinstance(model, nn.Module):
        given = () if formats is None else formats
        curves = error_curves(model, given, calibration, shares=shares, where=where, exact=exact)
    else:
        curves = list(model)
    if not curves:
        raise ConversionError("plot_errors: at least one curve; got none")

    def draw(pyplot: Any) -> Figure:
        layers = list(dict.fromkeys(curve.layer for curve in curves))
        columns = min(len(layers), _COLUMNS if len(layers) > 4 else 4)
        rows = math.ceil(len(layers) / columns)
        single = len(layers) == 1
        size = (5, 3.4) if single else (1.2 + 1.7 * columns, 0.9 + 1.5 * rows)
        figure, panels = pyplot.subplots(
            rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
        )
        for panel, layer in zip(panels.flat, layers, strict=False):
            for curve in (one for one in curves if one.layer == layer):
                _draw_curve(panel, curve)
            panel.set_title(
                table.abbreviated(layer or "(the layer)", _NAME if single else 26), fontsize=9 if single else 7
            )
            panel.grid(axis="y", color=PALE, linewidth=0.6)
        panels.flat[0].set_ylim(0, 1.02)
        panels.flat[0].set_xlim(left=0)
        for panel in panels.flat[len(layers) :]:
            panel.set_visible(False)
        for column in range(columns):  # the lowest panel that is drawn
            lowest = max(row for row in range(rows) if row * columns + column < len(layers))
            panels[lowest, column].tick_params(labelbottom=True)
        figure.supxlabel("share of the layer's parameters", fontsize=9)
        figure.supylabel("relative error", fontsize=9)
        names = list(dict.fromkeys(curve.format for curve in curves))
        handles = [pyplot.Line2D([], [], color=color_of(name), marker=marker_of(name), label=name) for name in names]
        if any(curve.output is not None for curve in curves):
            handles.append(pyplot.Line2D([], [], color=GRAY, label="of the outputs"))
            handles.append(pyplot.Line2D([], [], color=GRAY, linestyle=":", label="of the weight"))
        figure.legend(
            handles=handles, loc="outside upper center", ncols=min(len(handles), 3 if single else 7), frameon=False
        )
        return figure  # type: ignore[no-any-return]

    return styled(draw)


def _draw_curve(panel: Axes, curve: ErrorCurve) -> None:
    color = color_of(curve.format)
    if curve.output is None:
        panel.plot(curve.shares, curve.weight, color=color, marker=marker_of(curve.format), markersize=3)
    else:
        panel.plot(curve.shares, curve.weight, color=color, linestyle=":", linewidth=1.1)
        panel.plot(curve.shares, curve.output, color=color, marker=marker_of(curve.format), markersize=3)


def _look(label: str) -> dict[str, str]:
    """Color, marker and dashes of a label; dashed where it says more than a format's name."""
    plain = format_in(label) in (None, label)
    return {"color": color_of(label), "marker": marker_of(label), "linestyle": "-" if plain else "--"}


# -- the frontier -----------------------------------------------------------------------------------------------------


def plot_frontier(
    points: Iterable[Point | Mapping[str, Any]],
    *,
    against: Sequence[str] | None = None,
    measure: str = "accuracy",
    title: str | None = None,
) -> Figure:
    """Draw how good models are against what they take, a panel each for parameters, MACs and latency.

    Parameters
    ----------
    points : iterable of Point or mapping
        As `frontier` gives them, or rows of such data. Points of one ``format`` are joined; the label may say more than
        the format's name ("tt healed"). A point "dense" is drawn as a line across.
    against : sequence of str, optional
        Of "params", "macs", "latency" and "share"; by default the first three, as far as every point has them.
    measure : str
        What accuracy is, for the axis.
    title : str, optional

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ConversionError
        If there are no points, one lacks what is asked for, or matplotlib is missing.
    """
    rows = [asdict(point) if isinstance(point, Point) else dict(point) for point in points]
    chosen = _panels(rows, against)

    def draw(pyplot: Any) -> Figure:
        figure, panels = pyplot.subplots(
            1, len(chosen), figsize=(1 + 3.1 * len(chosen), 3.3), sharey=True, squeeze=False, layout="constrained"
        )
        labels = list(dict.fromkeys(row["format"] for row in rows if row["format"] != DENSE))
        for panel, key in zip(panels[0], chosen, strict=True):
            for row in (row for row in rows if row["format"] == DENSE):
                panel.axhline(row["accuracy"], color=GRAY, linewidth=1, zorder=1)
                if key != "share":
                    panel.plot(row[key], row["accuracy"], color=GRAY, marker="s", zorder=3)
            for label in labels:
                line = sorted((row[key], row["accuracy"]) for row in rows if row["format"] == label)
                panel.plot(*zip(*line, strict=True), **_look(label))
            panel.set_xlim(left=0)
            panel.set_xlabel(_AXES[key])
            panel.xaxis.set_major_formatter(lambda value, _: table.count(value) if value else "0")
            panel.grid(color=PALE, linewidth=0.6)
            panel.set_axisbelow(True)
        panels[0, 0].set_ylabel(measure)
        handles = [pyplot.Line2D([], [], label=label, **_look(label)) for label in labels]
        if any(row["format"] == DENSE for row in rows):
            handles.append(pyplot.Line2D([], [], color=GRAY, marker="s", linewidth=1, label=DENSE))
        figure.legend(handles=handles, loc="outside right center", frameon=False)
        if title:
            figure.suptitle(title, fontsize=10, x=0.01, ha="left")
        return figure  # type: ignore[no-any-return]

    return styled(draw)


def _panels(rows: Sequence[Mapping[str, Any]], against: Sequence[str] | None) -> list[str]:
    """What points are drawn against, all of which have it."""
    if not rows:
        raise ConversionError("plot_frontier: at least one point; got none")
    for row in rows:
        missing = [key for key in ("format", "accuracy", *(against or ())) if row.get(key) is None]
        if missing:
            raise ConversionError(f"plot_frontier: every point has {', '.join(missing)}; got {dict(row)}")
    unknown = sorted(set(against or ()) - set(_AXES))
    if unknown:
        raise ConversionError(f"against: of {', '.join(_AXES)}; got {', '.join(unknown)}")
    chosen = list(against or [key for key in list(_AXES)[:3] if all(row.get(key) is not None for row in rows)])
    if not chosen:
        raise ConversionError("plot_frontier: points with params, macs or latency; got none")
    return chosen
