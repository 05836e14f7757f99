"""Convolving with a network: in which order its cores meet the input, each as one, possibly grouped, convolution.

A core's kernel modes are convolved. An index that it shares with the input groups the convolution where it is still
needed afterwards, and is summed where it is not. Cores are multiplied with each other first where that is cheaper.
This yields CP's 1x1, depthwise, 1x1, Tucker's 1x1, kxk, 1x1 and TT's pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import contraction, conv_cost
from .contraction import constant_when_compiled
from .conv_cost import Convolution
from .conv_maps import Window, convolve, is_last, mix, permuted, with_channels, with_layout
from .conv_search import Search
from .cost import Cost, volume
from .group import Group, product
from .machine import Machine
from .network import Network

POSITIONS_CLASSES = (16, 256, 4096, 65536)
"""Orders are chosen for these numbers of input positions (batch x spatial sizes); see `contraction.batch_class`."""


@dataclass(frozen=True)
class Step:
    """One convolution.

    Parameters
    ----------
    group : Group
        The cores of the network that it takes.
    order : tuple of str
        The indices of the input's channels as it comes.
    lead, groups, summed, new : tuple of str
        The input's indices that the cores do not carry (a batch), those that they carry and leave, those that they
        sum; and what they bring in.
    result : tuple of str
        The indices of the result's channels: lead, groups, new.
    kernel : tuple of str
        The kernel modes.
    dims : tuple of int
        The spatial dimensions that are strided and padded in this step.
    cost : Cost
        At the number of input positions that the order was chosen for, the merging included.
    sizes : tuple of int
        Of the input's channel indices, in `order`.
    reorder : tuple of int
        Where in `order` lead, groups and summed are; empty where they are in order already.
    counts : (int, int, int)
        The products of the sizes of lead, groups, and groups with summed.
    core_order, weight_shape : tuple of int
        How the (merged) core becomes the weight that torch's convolution takes.
    mixes : bool
        Whether it is a product of channels at every position, with one matrix.
    uneven : bool
        Whether its groups have such numbers of channels that oneDNN convolves them well channels-last only.
    work : Convolution
        What its time is predicted from.
    """

    group: Group
    order: tuple[str, ...]
    lead: tuple[str, ...]
    groups: tuple[str, ...]
    summed: tuple[str, ...]
    new: tuple[str, ...]
    result: tuple[str, ...]
    kernel: tuple[str, ...]
    dims: tuple[int, ...]
    cost: Cost
    sizes: tuple[int, ...]
    reorder: tuple[int, ...]
    counts: tuple[int, int, int]
    core_order: tuple[int, ...]
    weight_shape: tuple[int, ...]
    mixes: bool
    uneven: bool
    work: Convolution


@dataclass(frozen=True)
class ConvPlan:
    """The convolutions that a network is applied by, in order.

    Parameters
    ----------
    steps : tuple of Step
    sizes, reorder : tuple of int
        As of a `Step`: how the channels that the last one leaves come in the order of the group and out modes.
    groups, channels : int
        What the group modes hold, and the in modes: the channels of the input are filled up to these with zeros.
    dense : int
        Elements of the dense kernel.
    positions : int
        The number of input positions that the order was chosen for.
    """

    steps: tuple[Step, ...]
    sizes: tuple[int, ...]
    reorder: tuple[int, ...]
    groups: int
    channels: int
    dense: int
    positions: int

    @property
    def cost(self) -> Cost:
        """The cost of all steps, at `positions`."""
        return sum((step.cost for step in self.steps), Cost())

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.cost.macs

    def seconds(self, on: Machine, positions: int, training: bool = False, itemsize: int = 4) -> float:
        """The predicted time, without a margin.

        Parameters
        ----------
        on : Machine
        positions : int
            Of the input.
        training : bool
            Whether the gradients are formed too, for which what lies between the steps is computed again.
        itemsize : int
            Bytes an element.
        """
        total, scale = on.function, positions / self.positions
        for step in self.steps:
            work = replace(step.work, before=scale * step.work.before, after=scale * step.work.after)
            forward, back = conv_cost.seconds(work, on, itemsize)
            if step.reorder or step.lead:  # the channels are copied into another order
                forward += conv_cost.copying(work, on, itemsize)
            merge = step.group.merge
            merging = conv_cost.merging(merge.cost, len(merge.steps), on) if merge else 0.0
            around = conv_cost.around(math.prod(step.weight_shape), on, itemsize)
            again = 0.0 if step is self.steps[-1] else forward
            total += forward + merging + around + (again + back + 3 * (merging + around) if training else 0.0)
        return total


@lru_cache(maxsize=4096)
def conv_plan(
    network: Network,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    plain: tuple[int, ...],
    transposed: bool,
    positions: int,
) -> ConvPlan:
    """Find the fastest order by `Search.score`.

    Parameters
    ----------
    network : Network
        Its modes have the roles out, in, group and kernel: one kernel mode for each spatial dimension of a kernel
        size above 1, in order.
    kernel_size, stride : tuple of int
    plain : tuple of int
        See `Window.plain`.
    transposed : bool
    positions : int
        Positions of the input: batch x spatial sizes. Borders are not counted.

    Returns
    -------
    ConvPlan
    """
    search = Search(network, kernel_size, stride, plain, transposed, positions)
    order: tuple[str, ...] = (*network.names("group"), *network.names("in"))
    done: frozenset[int] = frozenset()
    last = False
    steps = []
    for cores in search.order():
        work = search.convolution(done, cores, last)
        steps.append(_step(search, order, done, cores, work))
        order, done, last = steps[-1].result, done | cores, last or work.mixes or work.uneven
    wanted = (*network.names("group"), *network.names("out"))
    sizes = tuple(network.size[index] for index in order)
    return ConvPlan(
        steps=tuple(steps),
        sizes=sizes,
        reorder=_permutation(order, wanted),
        groups=network.features("group"),
        channels=network.features("in"),
        dense=math.prod(network.shape),
        positions=positions,
    )


def _permutation(order: tuple[str, ...], wanted: tuple[str, ...]) -> tuple[int, ...]:
    return () if order == wanted else tuple(order.index(index) for index in wanted)


def _step(
    search: Search, order: tuple[str, ...], done: frozenset[int], cores: frozenset[int], work: Convolution
) -> Step:
    network, size = search.network, search.network.size
    core, after = search.merged(cores), search.channels(done | cores)
    wanted = (*network.names("group"), *network.names("out"))
    lead = tuple(index for index in order if index not in core)
    groups = tuple(index for index in order if index in core and index in after)
    summed = tuple(index for index in order if index in core and index not in after)
    brought = [index for index in core if index not in order and index not in search.kernel]
    new = tuple(sorted(brought, key=lambda index: wanted.index(index) if index in wanted else -1))
    kernel = tuple(index for index in network.names("kernel") if index in core)
    dims = search.strided(cores, done)
    transposed = search.transposed and bool(dims)
    merge = search.merge(cores)
    (first, second) = (summed, new) if transposed else (new, summed)
    names = merge.output if merge else network.cores[min(cores)]
    taps = [1] * len(search.stride)
    for name in kernel:
        taps[search.dimension[name]] = size[name]
    counts = (volume(lead, size), volume(groups, size), volume((*groups, *summed), size))
    ends = volume(first, size), volume(second, size)
    return Step(
        group=Group(tuple(sorted(cores)), tuple(size[index] for index in names), merge),
        order=order,
        lead=lead,
        groups=groups,
        summed=summed,
        new=new,
        result=(*lead, *groups, *new),
        kernel=kernel,
        dims=dims,
        cost=search.cost(done, cores),
        sizes=tuple(size[index] for index in order),
        reorder=_permutation(order, (*lead, *groups, *summed)),
        counts=counts,
        core_order=tuple(names.index(index) for index in (*groups, *first, *second, *kernel)),
        weight_shape=(counts[1] * ends[0], ends[1], *taps),
        mixes=work.mixes,
        uneven=work.uneven,
        work=work,
    )


def plan_for(network: Network, window: Window, positions: int) -> ConvPlan:
    """The plan for an input of this many positions, by their class."""
    classed = _positions_class(positions)
    return _planned(network, (window.kernel_size, window.stride, window.plain, window.transposed, classed))


def _positions_class(positions: int) -> int:
    if not torch.compiler.is_dynamo_compiling():
        return contraction.batch_class(positions, POSITIONS_CLASSES)
    # Sizes that a graph leaves open differ from layer to layer and from input to input: to branch on them would be
    # to compile anew for each. Imported here: it takes a while, and is loaded already where something is compiled.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    for size in POSITIONS_CLASSES:
        if statically_known_true(positions <= size):
            return size
    return POSITIONS_CLASSES[-1 if statically_known_true(positions > POSITIONS_CLASSES[-1]) else 2]


@constant_when_compiled
def _planned(network: Network, rest: tuple[Any, ...]) -> ConvPlan:
    return conv_plan(network, *rest)


def weight_of(step: Step, cores: Sequence[Tensor]) -> Tensor:
    """The (merged) core of a step as the weight that its convolution takes."""
    core = product(step.group, cores)
    # Contiguous: a 1x1 weight with transposed strides passes for channels-last, and the output would follow it.
    return core.permute(step.core_order).reshape(step.weight_shape).contiguous()


def copies(plan: ConvPlan) -> int:
    """Elements of the weights that take memory beside the cores."""
    copied = (step for step in plan.steps if step.group.merge or list(step.core_order) != sorted(step.core_order))
    return sum(math.prod(step.weight_shape) for step in copied)


def enter(step: Step, x: Tensor) -> Tensor:
    """The input of a step as its convolution takes it: the channels in order, the leading indices a batch."""
    if step.reorder:
        x = permuted(x, step.sizes, step.reorder)
    if step.lead and not torch.compiler.is_compiling():
        return x.reshape(x.shape[0] * step.counts[0], step.counts[2], *x.shape[2:])
    return with_layout(x, True) if step.uneven and x.device.type == "cpu" else x


def leave(step: Step, x: Tensor) -> Tensor:
    """The result of a step's convolution, the leading indices among the channels again."""
    if not step.lead or torch.compiler.is_compiling():
        return x
    return x.reshape(x.shape[0] // step.counts[0], step.counts[0] * x.shape[1], *x.shape[2:])


def apply(
    plan: ConvPlan, position: int, x: Tensor, weight: Tensor, window: Window, last: bool, bias: Tensor | None = None
) -> Tensor:
    """The convolution of a step on what `enter` gave; `last`: the layout wanted of the plan's result."""
    step = plan.steps[position]
    if step.lead and torch.compiler.is_compiling():
        # Groups with the same weight, and not a batch: see `conv_maps._Picked`.
        weight = weight.repeat(step.counts[0], *(1 for _ in weight.shape[1:]))
        return convolve(x, weight, window.along(step.dims), step.counts[0] * step.counts[1], bias)
    if not step.mixes:
        return convolve(x, weight, window.along(step.dims), step.counts[1], bias)
    if position + 1 < len(plan.steps):
        following = plan.steps[position + 1]
        # oneDNN convolves channels-last at full speed, and reorders what is contiguous before and after.
        last = is_last(x) if following.mixes else x.device.type == "cpu" and x.dim() > 3 and not following.lead
    return mix(x, weight.flatten(1), last, bias)


def execute(
    plan: ConvPlan,
    x: Tensor,  # (batch, channels, *spatial): in each group at most what the in modes hold
    cores: Sequence[Tensor],  # those of the network
    window: Window,
    bias: Tensor | None = None,  # (group and out modes joined,)
) -> Tensor:  # (batch, group and out modes joined, *spatial')
    """Carry out a plan in one pass, by differentiable operations of torch: one convolution a step.

    The bias is added with the last. The result is in the layout of `x`, contiguous or channels-last.
    """
    weights = [weight_of(step, cores) for step in plan.steps]
    return convolved(plan, x, weights, window, None if bias is None else bias.to(x.dtype))


def convolved(
    plan: ConvPlan, x: Tensor, weights: Sequence[Tensor], window: Window, bias: Tensor | None = None
) -> Tensor:
    """`execute` on the weights of the steps; the bias in the dtype of `x`."""
    last, ending = is_last(x), plan.steps[-1]
    early = None if ending.lead or plan.reorder else bias
    x = with_channels(x, plan.groups, plan.channels)
    for position, (step, weight) in enumerate(zip(plan.steps, weights, strict=True)):
        added = early if step is ending else None
        x = leave(step, apply(plan, position, enter(step, x), weight, window, last, added))
    if plan.reorder:
        x = permuted(x, plan.sizes, plan.reorder)
    if bias is not None and early is None:
        x = x + bias.view(-1, *(1 for _ in x.shape[2:]))
    return with_layout(x, last)
