"""Random numbers of our own, that leave torch's generators as they were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, devices: Iterable[torch.device]) -> Iterator[None]:
    """The generators of the CPU and of those of these devices that are GPUs start from a seed, and go back after."""
    gpus = sorted({device for device in devices if device.type == "cuda"}, key=str)
    with torch.random.fork_rng(gpus):
        # Not torch.manual_seed, which seeds every GPU there is.
        torch.default_generator.manual_seed(seed)
        for device in gpus:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
