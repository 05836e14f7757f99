"""What a convolution takes, in seconds, from its FLOPs and bytes, at rates that depend on what kind of one it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .cost import Cost
from .machine import Machine

VECTOR = 16
"""Channels that fill a vector register of float32. Groups of fewer are convolved at other rates."""

MARGIN, LARGE = 1.25, 2**16
"""What the prediction of a plan is raised by, for a dense weight of more elements: it errs by less in nine of ten
convolutions, and is to err to the slow side, since a layer that it finds fast is converted. With a smaller one there
is little time to lose, and only what is likely slower is to stay dense."""


@dataclass(frozen=True)
class Convolution:
    """The sizes of one convolution.

    Parameters
    ----------
    before, after : float
        Positions of the input and of the output, batch x spatial sizes.
    groups : int
    channels, new : int
        Of the input and of the output, in one group.
    sides : tuple of int
        Of the kernel, along the dimensions that it reaches along.
    mixes : bool
        Whether it is done by a matrix product.
    contiguous : (bool, bool)
        Whether input and output are in memory channel by channel, rather than channels-last.
    transposed : bool
    """

    before: float
    after: float
    groups: int
    channels: int
    new: int
    sides: tuple[int, ...]
    mixes: bool = False
    contiguous: tuple[bool, bool] = (False, False)
    transposed: bool = False

    @property
    def narrow(self) -> bool:
        """Whether its groups have fewer channels than fill a vector register."""
        return self.groups > 1 and min(self.channels, self.new) < VECTOR

    @property
    def uneven(self) -> bool:
        """Whether its groups do not fill vector registers: contiguous, it takes oneDNN many times as long."""
        return self.groups > 1 and bool(self.channels % VECTOR or self.new % VECTOR)


def rates(machine: Machine) -> Mapping[str, float]:
    """The constants ``machine.conv``; those that it lacks, from its matrix products.

    ``rate``: FLOP/s of a convolution. ``grouped``: the time in groups over that of as many FLOPs in one. ``narrow``:
    FLOP/s of groups of few channels, each counted as a vector register. ``moved``: bytes/s of those. ``copied``:
    bytes/s of contiguous input and output, which are reordered. ``back``: the time of each of the two gradients over
    that of the convolution; ``back_narrow``: of groups of few channels. ``depthwise_back``: FLOP/s of the gradient of
    a depthwise kernel longer than 3, or in three dimensions. ``launch``: seconds of a call.
    """
    rate = machine.flops["float32"]
    derived = {
        "rate": rate,
        "grouped": 1.0,
        "narrow": rate,
        "moved": machine.memory,
        "copied": machine.permuted,
        "back": 1.1,
        "back_narrow": 1.1,
        "depthwise_back": rate,
        "launch": 5 * machine.launch,
    }
    return {**derived, **machine.conv}


def seconds(convolution: Convolution, machine: Machine, itemsize: int = 4) -> tuple[float, float]:
    """The time of a convolution, and of its two gradients.

    Parameters
    ----------
    convolution : Convolution
    machine : Machine
    itemsize : int
        Bytes an element.

    Returns
    -------
    (float, float)
        Seconds; the launches included.
    """
    c, rate, slower = convolution, rates(machine), _slower(machine)
    ends = c.groups * c.before * c.channels, c.groups * c.after * c.new
    each = 2 * c.groups * math.prod(c.sides) * (c.before if c.transposed else c.after)  # FLOPs of a pair of channels
    if c.mixes:
        half = machine.half["n"]
        work = each * (c.channels + half) * (c.new + half) / machine.flops["float32"]
        forward = slower * (work + itemsize * sum(ends) / machine.cached) + machine.launch
        return forward, 2 * forward
    copies = itemsize * sum(size for size, contiguous in zip(ends, c.contiguous, strict=True) if contiguous)
    copies /= rate["copied"]
    if not c.narrow:
        each *= (rate["grouped"] if c.groups > 1 else 1) / rate["rate"]
        work = each * c.channels * _registers(c.new)
        back = rate["back"] * (work + each * _registers(c.channels) * c.new)
    else:
        work, back = itemsize * sum(ends) / rate["moved"], 0.0
        if c.channels > 1 or c.new > 1:
            work += each * _registers(c.channels) * _registers(c.new) / rate["narrow"]
        elif len(c.sides) > 2 or max(c.sides, default=1) > 3:
            back = each / rate["depthwise_back"]
        back += 2 * rate["back_narrow"] * work
    forward = slower * (work + copies) + rate["launch"]
    return forward, slower * (back + 2 * copies) + 2 * rate["launch"]


def margin(weights: int) -> float:
    """What the prediction of a convolution of so many dense weights is raised by."""
    return MARGIN if weights > LARGE else 1.0


def _registers(channels: int) -> int:
    """As many channels as fill vector registers."""
    return math.ceil(channels / VECTOR) * VECTOR


def around(weight: int, machine: Machine, itemsize: int = 4) -> float:
    """Seconds that a step of a plan needs beside its convolution: for a weight of so many elements, and for Python."""
    return 2 * itemsize * weight * _slower(machine) / machine.permuted + 10 * machine.launch


def copying(convolution: Convolution, machine: Machine, itemsize: int = 4) -> float:
    """Seconds that a copy of a convolution's input into another order takes."""
    elements = convolution.before * convolution.groups * convolution.channels
    return 2 * itemsize * elements * _slower(machine) / machine.permuted + machine.launch


def merging(cost: Cost, launches: int, machine: Machine) -> float:
    """Seconds that the multiplication of cores with each other takes; its gradients take about twice that."""
    return (
        2 * cost.flops / machine.rate() + cost.bytes() * _slower(machine) / machine.memory + launches * machine.launch
    )


def _slower(machine: Machine) -> float:
    """How many times slower it is with torch's threads than with those that the rates were measured with."""
    return machine.threads / torch.get_num_threads() if machine.threads else 1.0
