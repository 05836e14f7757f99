"""One comparison: a dense module and others in its place; memory first, then what is right, then the times.

What is out of memory is neither checked nor timed, what fails its check is not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import memory
from timing import Times, forward, interleaved, training
from torch import Tensor, nn

DENSE = "dense"
KINDS = {"forward": forward, "training": training}


@dataclass
class Figure:
    """A measured ratio, and what it must be.

    Parameters
    ----------
    value : float
        Of the dense module's, unless the column says otherwise.
    target : float, optional
        At most this; with `at_least`, at least this.
    absolute : float, optional
        Milliseconds, or bytes.
    least : float, optional
        Of a time: the milliseconds of the fastest round.
    quartiles : (float, float), optional
        Of a time: of the ratios of all rounds.
    """

    value: float
    target: float | None = None
    absolute: float | None = None
    least: float | None = None
    quartiles: tuple[float, float] | None = None
    at_least: bool = False

    @property
    def met(self) -> bool:
        if self.target is None:
            return True
        return self.value >= self.target if self.at_least else self.value <= self.target


@dataclass
class Candidate:
    """A module that may take the dense one's place.

    Parameters
    ----------
    name : str
    module : nn.Module
    check : callable, optional
        (module, x) -> None; raises AssertionError where the module computes the wrong thing.
    facts : dict
        What the row says of it besides: its modes, its share of the FLOPs, what `convert_model` would do.
    targets : dict
        Of the columns forward and training.
    memory : bool
        Whether to measure it (what is compiled cannot be sent to another process).
    bounded : bool
        Whether memory has targets: the dense module's saved bytes, and its peak and once more its weight.
    """

    name: str
    module: nn.Module
    check: Callable[[nn.Module, Tensor], None] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    targets: dict[str, float] = field(default_factory=dict)
    memory: bool = True
    bounded: bool = True


@dataclass
class Row:
    """A line of a table: what was measured of one candidate.

    Parameters
    ----------
    case, name : str
        The table's heading, and the candidate.
    facts, figures : dict
        The columns.
    note : str
        Why it was not timed.
    failed : bool
        Whether that is because it computes the wrong thing.
    broken : str
        A rule that it breaks and that is no figure.
    """

    case: str
    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    note: str = ""
    failed: bool = False
    broken: str = ""

    def as_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {"case": self.case, "layer": self.name, **self.facts}
        for name, figure in self.figures.items():
            data[name] = {
                key: value for key, value in asdict(figure).items() if value is not None and value is not False
            }
            if figure.target is not None:
                data[name]["met"] = figure.met
        return data | {key: value for key, value in vars(self).items() if key in ("note", "failed", "broken") and value}


def compare(
    case: str,
    dense: nn.Module,
    candidates: Sequence[Candidate],
    x: Tensor,
    seconds: float,
    *,
    training: bool = True,
) -> list[Row]:
    """Measure a dense module and its candidates on one input.

    Parameters
    ----------
    case : str
        The table's heading.
    dense : nn.Module
        The baseline; its row is the first.
    candidates : sequence of Candidate
    x : Tensor
    seconds : float
        To time each direction for.
    training : bool
        Whether forward and backward are timed too.

    Returns
    -------
    list of Row
        The figures are ``forward`` and ``training`` (times), ``saved`` (bytes for the backward) and ``peak``
        (bytes of a training step).
    """
    everyone = [Candidate(DENSE, dense, bounded=False), *candidates]
    rows = {c.name: Row(case, c.name, dict(c.facts)) for c in everyone}
    assert len(rows) == len(everyone), "candidates have different names"
    measured = [c for c in everyone if c.memory] if any(c.memory for c in candidates) else []
    needed = memory.measure({c.name: c.module for c in measured}, x)
    for c in everyone:
        row = rows[c.name]
        if c.name in needed:
            row.note, row.failed = needed[c.name].refused, needed[c.name].failed
        if c.check is not None and not row.note:
            try:
                c.check(c.module, x)
            except Exception as error:  # whatever it is, the other rows are measured
                row.note, row.failed = f"{type(error).__name__}: {error}", True
        if c.name in needed and not row.note:
            row.figures.update(_bytes(needed[c.name], needed[DENSE], dense, c.bounded))
    running = [c for c in everyone if not rows[c.name].note]
    for kind in KINDS if training else ("forward",):
        times = interleaved({c.name: KINDS[kind](c.module, x) for c in running}, seconds)
        for c in running:
            rows[c.name].figures[kind] = _time(times, c.name, c.targets.get(kind))
    order = [*KINDS, "saved", "peak"]
    for row in rows.values():
        row.figures = {name: row.figures[name] for name in order if name in row.figures}
    return list(rows.values())


def _time(times: Times, name: str, target: float | None) -> Figure:
    least = 1000 * min(times.seconds[name])
    return Figure(times.ratio(name, DENSE), target, times.ms(name), least, times.quartiles(name, DENSE))


def _bytes(own: memory.Memory, dense: memory.Memory, module: nn.Module, bounded: bool) -> dict[str, Figure]:
    weight = sum(parameter.nbytes for parameter in module.parameters())
    bound = (dense.peak + weight) / dense.peak
    return {
        "saved": Figure(own.saved / dense.saved, 1.0 if bounded else None, own.saved),
        "peak": Figure(own.peak / dense.peak, bound if bounded else None, own.peak),
    }
