"""3x3 convolutions against nn.Conv2d, at a quarter and a twentieth of the MACs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cases
import torch
from compare import Candidate, Row, compare
from torch import nn

from tensorlayers import BTT, CP, TT, FactorizedConv2d, Format, LowRank, Tucker


@dataclass(frozen=True)
class Case:
    """A 3x3 convolution that keeps its channels, and its input."""

    channels: int
    size: int
    batch: int
    groups: int = 1

    def __str__(self) -> str:
        grouped = f" in {self.groups} groups" if self.groups > 1 else ""
        return f"3x3, {self.channels} channels{grouped}, {self.batch} x {self.size}x{self.size}"


CASES = (Case(256, 28, 4), Case(256, 14, 16), Case(64, 56, 4), Case(512, 7, 16), Case(256, 14, 16, 32))
QUARTER, TWENTIETH = 0.25, 0.05
Choice = tuple[type[Format], dict[str, Any], float]
CHOICES: tuple[Choice, ...] = (
    (Tucker, {}, QUARTER),
    (LowRank, {}, QUARTER),
    (LowRank, {"split": "spatial"}, QUARTER),
    (CP, {}, QUARTER),
    (TT, {}, QUARTER),
    (BTT, {}, QUARTER),
    (Tucker, {}, TWENTIETH),
    (CP, {}, TWENTIETH),
)


def run(seconds: float, quick: bool) -> Iterator[list[Row]]:
    """The rows of every case; `quick`: the first."""
    for case in CASES[: 1 if quick else None]:
        yield measure(case, seconds)


def measure(case: Case, seconds: float) -> list[Row]:
    """The rows of one convolution."""
    torch.manual_seed(0)
    dense = nn.Conv2d(case.channels, case.channels, 3, padding=1, groups=case.groups)
    settings = FactorizedConv2d.settings_of(dense)
    positions = case.batch * case.size**2
    candidates = []
    for format, how, wanted in CHOICES:
        chosen = cases.nearest(FactorizedConv2d, settings, positions, wanted, format, **how)
        layer = FactorizedConv2d(**settings, format=chosen)
        said = cases.facts(layer, dense, positions)
        said["macs"] = said.pop("flops")
        if not math.isclose(said["macs"], wanted, rel_tol=0.3):
            continue  # a group of 8 channels has no rank that small
        aims = {} if said["convert_model"] else cases.targets(cases.CONVERTED, cases.CONVERTED)
        if format is Tucker and wanted == QUARTER and (case.channels, case.groups) == (256, 1):
            aims = cases.targets(cases.CONV_QUARTER, cases.CONV_QUARTER)
        said.pop("modes")
        candidates.append(Candidate(cases.label(chosen), layer, cases.check, said, aims))
    x = torch.randn(case.batch, case.channels, case.size, case.size)
    return compare(str(case), dense, candidates, x, seconds)
