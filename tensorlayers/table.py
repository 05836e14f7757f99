"""Printing rows of text as a table of at most 120 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

WIDTH = 120


def lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay out rows below a head.

    Parameters
    ----------
    head : sequence of str
    rows : sequence of sequence of str
        The first cell is a dotted name, shortened where it is too long, or put on a line of its own. A row may be
        shorter than the head: its last cell then takes the room of all that follow.

    Returns
    -------
    list of str
    """
    full = [row for row in rows if len(row) == len(head)]
    short = [row[:-1] for row in rows if len(row) < len(head)]
    widths = [max(len(row[c]) for row in (head, *full, *short) if c < len(row)) for c in range(len(head))]
    widths[0] = min(widths[0], max(len(head[0]), WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1)))
    names = [abbreviated(row[0], widths[0]) for row in rows]
    out = wrapped(_line(head, widths))
    for name, row in zip(names, rows, strict=True):
        if len(name) > widths[0] or names.count(name) > 1:
            out += wrapped(row[0])
            name = ""
        out += wrapped(_line((name, *row[1:]), widths))
    return out


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=False)).rstrip()


def abbreviated(name: str, width: int) -> str:
    """Shorten the leading parts of a dotted name to their first letter until it fits: e.l.0.attention.self.query."""
    parts = name.split(".")
    for k in range(len(parts) - 1):
        if len(".".join(parts)) <= width:
            break
        parts[k] = parts[k] if parts[k].isdigit() else parts[k][:1]
    return ".".join(parts)


def count(number: float) -> str:
    """A count to three digits: 147k, 2.36M."""
    units = ["", "k", "M", "G", "T"]
    while number >= 999.5 and len(units) > 1:
        number /= 1000
        del units[0]
    return f"{number:.3g}{units[0]}"


def counted(number: int, noun: str) -> str:
    """A number of things: 1 layer, 1,024 rows."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def duration(seconds: float) -> str:
    """A time to two digits: 12us, 3.4ms, 120ms, 1.2s, 40h."""
    return "".join(_scaled(seconds))


def durations(before: float, after: float) -> str:
    """Two times with one unit where they share it: 3.4->1.2ms, 1.2ms->120us."""
    (first, unit), (second, other) = _scaled(before), _scaled(after)
    return f"{first}->{second}{unit}" if unit == other else f"{first}{unit}->{second}{other}"


def _scaled(seconds: float) -> tuple[str, str]:
    units = [(seconds * 1e6, "us"), (seconds * 1e3, "ms"), (seconds, "s"), (seconds / 3600, "h")]
    number, unit = next(((number, unit) for number, unit in units if number < 995), units[-1])
    if number < 9.95:
        return f"{number:.1f}", unit
    return f"{round(number) if number < 99.5 else 10 * round(number / 10)}", unit


def wrapped(line: str) -> list[str]:
    """A line that is too long, broken, the rest indented."""
    if len(line) <= WIDTH:
        return [line]
    parts = textwrap.wrap(line, WIDTH, subsequent_indent=" " * 8, drop_whitespace=False)
    return [part.rstrip() for part in parts]
