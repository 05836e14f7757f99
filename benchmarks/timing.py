"""Times of several callables, taken in turn in one process, so that their ratios hold on a noisy machine."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Run = Callable[[], object]

SLOW = 5.0
"""What takes this many times as long as the baseline takes part in the first `LEAST` rounds only."""
LEAST, MOST = 7, 300
"""Rounds: at least this many, and at most."""
_SAMPLE = 2e-3
"""Seconds: what is faster is called several times for one sample, so that the clock does not show."""


def forward(layer: nn.Module, x: Tensor) -> Run:
    """A forward without a graph."""

    def run() -> object:
        with torch.inference_mode():
            return layer(x)

    return run


def training(layer: nn.Module, x: Tensor) -> Run:
    """A forward, and a backward to the input and to every parameter, from a gradient that is no constant."""
    x = x.detach().clone().requires_grad_()
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    with torch.no_grad():
        gradient = torch.randn_like(layer(x))

    def run() -> object:
        return torch.autograd.grad(layer(x), [x, *parameters], gradient)

    return run


@dataclass(frozen=True)
class Times:
    """Seconds of each callable, one entry a round; those that left early have the first rounds only."""

    seconds: Mapping[str, list[float]]

    def ms(self, name: str) -> float:
        """The median, in milliseconds."""
        return 1000 * statistics.median(self.seconds[name])

    def ratios(self, name: str, to: str) -> list[float]:
        """Time over that of another, round by round."""
        return [a / b for a, b in zip(self.seconds[name], self.seconds[to], strict=False)]

    def ratio(self, name: str, to: str) -> float:
        """The median of `ratios`: what disturbs a whole round falls out of it."""
        return statistics.median(self.ratios(name, to))

    def quartiles(self, name: str, to: str) -> tuple[float, float]:
        """The first and third quartile of `ratios`: how noisy the machine was."""
        low, _, high = statistics.quantiles(self.ratios(name, to), n=4)
        return low, high


def interleaved(runs: Mapping[str, Run], seconds: float) -> Times:
    """Call each in turn, round after round, in another order each round.

    Parameters
    ----------
    runs : mapping of name to callable
        The first is the baseline.
    seconds : float
        The time to spend, warm-up not counted; exceeded where `LEAST` rounds need more.
    """
    first: dict[str, float] = {name: _warm(run) for name, run in runs.items()}
    calls = {name: max(1, math.ceil(_SAMPLE / took)) for name, took in first.items()}
    slow = {name for name, took in first.items() if took > SLOW * first[next(iter(runs))]}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    start = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for number in range(MOST):
            if number >= LEAST and time.perf_counter() - start > seconds:
                break
            shuffle(order)
            for name in order:
                if number < LEAST or name not in slow:
                    samples[name].append(_sample(runs[name], calls[name]))
    finally:
        gc.enable()
    return Times(samples)


def _warm(run: Run) -> float:
    """Seconds of a call after the first; of the first, where it takes seconds itself."""
    took = _sample(run, 1)
    return took if took > 3 else min(_sample(run, 1) for _ in range(2))


def _sample(run: Run, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls
