"""Timing on a machine that does other things too."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

Clock = Callable[[], float]
"""Gives seconds."""

Key = TypeVar("Key", bound=Hashable)

_UNTIMED = 2
_LIMIT = 20.0  # seconds after which what was timed at least once is not repeated: the machine is busy


def clock_of(device: torch.device) -> Clock:
    """The clock that has waited for what a device was told to do."""
    if device.type == "cpu":
        return time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def share_of_processors(seconds: float = 0.5) -> float:
    """The part of the time of torch's threads that the process has a processor for, while it multiplies matrices.

    Below 1 where something else runs, or there are more threads than processors: each product then waits for the
    thread that is late.
    """
    a = torch.ones(768, 768)
    wall, used = time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < seconds:
        torch.mm(a, a)
    return (time.process_time() - used) / ((time.perf_counter() - wall) * torch.get_num_threads())


def fastest(
    cases: Mapping[Key, Callable[[], object]],
    clock: Clock,
    repeats: int,
    calls: Mapping[Key, int] | None = None,
) -> dict[Key, float]:
    """Seconds that calls take.

    All cases are run in turn, so that what else the machine does meets all of them, and the fastest of a case's times
    is taken: what else runs can only add to it.

    Parameters
    ----------
    cases : mapping of callables
        Called outside of autograd, twice more than they are timed.
    clock : callable
        Gives seconds.
    repeats : int
        Fewer where they take more than 20 seconds.
    calls : mapping of int, optional
        How often each is called between two readings of the clock, after a call that brings what it reads into the
        cache. One that is not listed: once, and what it reads may be out of the cache.

    Returns
    -------
    dict of float
        Of one call, by the keys of `cases`.
    """
    times: dict[Key, float] = {}
    began = clock()
    with torch.no_grad():
        for repeat in range(_UNTIMED + repeats):
            if repeat > _UNTIMED and clock() - began > _LIMIT:
                break
            for key, call in cases.items():
                count = 1
                if calls and key in calls:
                    call()
                    count = calls[key]
                start = clock()
                for _ in range(count):
                    call()
                seconds = (clock() - start) / count
                if repeat >= _UNTIMED:
                    times[key] = min(seconds, times.get(key, seconds))
    return times
