"""Printing rows as tables, each figure beside its target, and a mark where it is missed."""

from __future__ import annotations

from collections.abc import Sequence

from compare import DENSE, KINDS, Figure, Row

MISSED = "<<"
HIDDEN = ("convert_model", "remark", "batch", "rank", "series")
"""Facts without a column: said beside the row, in its name, or in the heading."""
HEADS = {
    "forward": "forward",
    "training": "fwd + bwd",
    "saved": "saved",
    "peak": "peak",
    "forward_slope": "forward: slope of logs",
    "forward_growth": "forward: steepest step / work",
    "training_slope": "fwd + bwd: slope of logs",
    "training_growth": "fwd + bwd: steepest step / work",
    "forward_of_ours": "forward/ours",
    "training_of_ours": "fwd+bwd/ours",
    "saved_of_ours": "saved/ours",
    "flops": "FLOPs",
    "macs": "MACs",
    "modes": "modes in | out",
}
LEGEND = f"""Times and bytes are multiples of dense's in the same run; "(<= 0.30)" is what a figure must
be, and {MISSED} behind it marks one that is not.
saved: bytes kept from forward to backward. peak: most bytes at once in a training step, with parameters and gradients.
"""


def figure(value: Figure | None) -> str:
    """A ratio, its target, and a mark."""
    if value is None:
        return ""
    sign = ">=" if value.at_least else "<="
    target = "" if value.target is None else f" ({sign} {value.target:.2f})"
    return f"{value.value:.2f}{target}{'' if value.met else f' {MISSED}'}"


def table(rows: Sequence[Row]) -> str:
    """The rows of one case, under what dense takes."""
    facts = list(dict.fromkeys(key for row in rows for key in row.facts if key not in HIDDEN))
    figures = list(dict.fromkeys(key for row in rows for key in row.figures))
    heads = ["", *(HEADS.get(key, key) for key in (*facts, *figures))]
    lines = [heads]
    for row in rows:
        values = [row.facts.get(key) for key in facts]
        texts = ["" if v is None else f"{v:.2f}" if isinstance(v, float) else str(v) for v in values]
        shown = [] if row.note and not row.figures else [figure(row.figures.get(key)) for key in figures]
        lines.append([row.name, *texts, *shown])
    widths = [max(len(line[k]) for line in lines if k < len(line)) for k in range(len(heads))]
    text = []
    for remarks, line in zip([[], *map(_remarks, rows)], lines, strict=True):
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=False)]
        text.append("  ".join([*cells, *remarks]).rstrip())
    return "\n".join([f"\n{rows[0].case}{_absolute(rows)}", *text])


def _remarks(row: Row) -> list[str]:
    decision = row.facts.get("convert_model")
    remarks = [
        f"convert_model: {decision}" if decision else "",
        row.facts.get("remark", ""),
        f"FAILED: {row.note}" if row.failed else row.note,
        f"{row.broken} {MISSED}" if row.broken else "",
    ]
    return [remark for remark in remarks if remark]


def _absolute(rows: Sequence[Row]) -> str:
    """What dense takes, in milliseconds and bytes."""
    dense = next((row for row in rows if row.name == DENSE), None)
    if dense is None:
        return ""
    said = []
    for key, value in dense.figures.items():
        amount = value.absolute or 0.0
        said.append(f"{HEADS[key]} " + (f"{amount:.3g} ms" if key in KINDS else f"{amount / 1e6:.3g} MB"))
    return f"; dense: {', '.join(said)}"


def summary(rows: Sequence[Row]) -> str:
    """How many targets were met, those that were not, and what failed."""
    aimed = [(row, key, f) for row in rows for key, f in row.figures.items() if f.target is not None]
    missed = [(row, key, f) for row, key, f in aimed if not f.met]
    lines = [f"\n{len(aimed) - len(missed)} of {len(aimed)} targets met"]
    lines += [f"  missed: {row.case}: {row.name.strip()}: {HEADS.get(key, key)} {figure(f)}" for row, key, f in missed]
    lines += [f"  broken: {row.case}: {row.name.strip()}: {row.broken}" for row in rows if row.broken]
    words = {True: "FAILED, not timed", False: "not timed"}
    lines += [f"  {words[row.failed]}: {row.case}: {row.name.strip()}: {row.note}" for row in rows if row.note]
    return "\n".join(lines)
