"""How long a training run is, and how large its steps are."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The length of a run, its stages and its learning rate.

    Parameters
    ----------
    steps : int or None
    seconds : float or None
        The run ends with whichever comes first.
    shares : tuple of float
        Of the run, that each stage takes; they add up to 1.
    warmup : float
        The share of each stage in which the learning rate grows from 0.
    clip : float
        The largest norm of all gradients together.
    decay : float
        AdamW's weight decay.
    patience : int or None
        After so many checks of the held-out loss without a better one the run ends.
    check : int
        Steps between checks.
    seed : int
    """

    steps: int | None
    seconds: float | None
    shares: tuple[float, ...]
    warmup: float
    clip: float
    decay: float
    patience: int | None
    check: int
    seed: int

    def place(self, step: int, elapsed: float) -> tuple[int, float]:
        """The stage that a step belongs to, and how far that is, in [0, 1); the number of stages at the end."""
        over = [step / self.steps] if self.steps is not None else []
        over += [elapsed / self.seconds] if self.seconds is not None else []
        done, start = max(over), 0.0
        if done < 1:
            for stage, share in enumerate(self.shares):
                if share and (done < start + share or stage == len(self.shares) - 1):
                    return stage, (done - start) / share
                start += share
        return len(self.shares), 0.0

    def scale(self, done: float) -> float:
        """Of the learning rate, in a stage that is so far done: linear warm-up, then half a cosine to 0."""
        if done < self.warmup:
            return done / self.warmup
        return 0.5 * (1 + math.cos(math.pi * (done - self.warmup) / (1 - self.warmup)))
