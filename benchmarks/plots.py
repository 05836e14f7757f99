"""Draws what the README shows: time and memory against the batch and against the rank, as multiples of dense's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update(
    {
        "svg.fonttype": "none",  # text stays text: a third of the size
        "svg.hashsalt": "tensorlayers",  # the same figures give the same file
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
)

from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator  # noqa: E402

PANELS = {"forward": "forward, time", "training": "forward + backward, time", "peak": "training step, peak memory"}
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc3377", "#7a5cc0", "#56b4e9")
MARKERS = "osD^vP"
GRAY = "#777777"


def draw(source: Path, folder: Path) -> None:
    """Draw ``batch.svg`` and ``rank.svg`` from the JSON of the part scaling."""
    rows = json.loads(source.read_text(encoding="utf-8"))["rows"]
    folder.mkdir(parents=True, exist_ok=True)
    axes = {"batch": ("batch", "rows"), "rank": ("flops", "rank, as FLOPs / dense FLOPs")}
    for name, (key, title) in axes.items():
        points = [row for row in rows if name in row and "forward" in row]
        if points:
            _figure(points, key, title, folder / f"{name}.svg")


def _figure(rows: list[dict[str, Any]], key: str, title: str, path: Path) -> None:
    figure, panels = pyplot.subplots(1, len(PANELS), figsize=(9, 2.9), layout="constrained", sharey=True)
    series = list(dict.fromkeys(_series(row) for row in rows))
    for axes, (kind, heading) in zip(panels, PANELS.items(), strict=True):
        axes.axhline(1, color=GRAY, linewidth=1)
        for k, name in enumerate(series):
            line = [(row[key], row[kind]["value"]) for row in rows if _series(row) == name]
            axes.plot(*zip(*line, strict=True), color=COLORS[k], marker=MARKERS[k], markersize=3.5, label=name)
        _scale(axes, sorted({row[key] for row in rows}), key == "batch")
        axes.set_title(heading, fontsize=9)
        axes.set_xlabel(title)
    panels[0].annotate("dense", (0, 1), (3, 2), ("axes fraction", "data"), "offset points", color=GRAY)
    panels[0].set_ylabel("multiple of dense's")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _series(row: dict[str, Any]) -> str:
    series: str = row.get("series", row["layer"])
    return series


def _scale(axes: Axes, values: list[float], linear: bool) -> None:
    """Powers of two from left to right, with values as ticks; upwards from 0, or logarithmic where work differs."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(values[::2] if linear else [0.05, 0.1, 0.2, 0.4, 0.8, 1.6]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if linear:
        axes.set_ylim(bottom=0)
    else:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(FixedLocator([0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
