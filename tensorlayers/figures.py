"""What all pictures share: one color a format, the style, and files that are written whole."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConversionError
from .files import replaced
from .formats import available

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's, which the colour-blind can tell apart.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#7A5CC0")
_MARKERS = "osD^vP*"
GRAY, PALE, INK = "#777777", "#DDDDDD", "#222222"
_STYLE = {
    "font.size": 9,
    **dict.fromkeys(("axes.titlesize", "axes.labelsize"), 9),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 8),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    "axes.edgecolor": GRAY,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "savefig.dpi": 150,
    "svg.fonttype": "none",
}


def pyplot() -> Any:
    """matplotlib.pyplot, imported when the first picture is drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConversionError("pictures need matplotlib: pip install 'tensorlayers[plots]'")
    return importlib.import_module("matplotlib.pyplot")


def color_of(label: str) -> str:
    """The color of a format in all pictures, by the first word of a label: "tt", "TT(0.5)", "tt healed"."""
    return _of_format(label, _COLORS, GRAY)


def marker_of(label: str) -> str:
    """The marker of a format, likewise."""
    return _of_format(label, _MARKERS, "o")


def _of_format(label: str, choices: Sequence[str], otherwise: str) -> str:
    name = format_in(label)
    return otherwise if name is None else choices[list(available()).index(name) % len(choices)]


def format_in(label: str) -> str | None:
    """The name of the format that a label begins with."""
    word = label.replace("(", " ").lower().split(" ")[0]
    return word if word in available() else None


def styled(draw: Callable[[Any], Figure]) -> Figure:
    """A figure in our style, that no window or notebook shows unasked."""
    plots = pyplot()
    with plots.rc_context(_STYLE):
        figure = draw(plots)
    plots.close(figure)
    return figure


def suffix_of(path: Path) -> str:
    """What kind of file a picture is written as, by its name: "png".

    Raises
    ------
    ConversionError
        If matplotlib is missing, or writes no such files.
    """
    known = pyplot().matplotlib.figure.Figure().canvas.get_supported_filetypes()
    suffix = path.suffix.removeprefix(".").lower()
    if suffix not in known:
        raise ConversionError(f"{path}: a name that ends in .{', .'.join(sorted(known))}")
    return suffix


def save(figure: Figure, path: str | Path) -> None:
    """Write a picture. What was there is replaced once all is written.

    Raises
    ------
    ConversionError
        If the name ends in nothing that matplotlib writes.
    """
    path = Path(path)
    suffix = suffix_of(path)
    with replaced(path) as temporary, pyplot().rc_context(_STYLE):
        figure.savefig(temporary, format=suffix)
