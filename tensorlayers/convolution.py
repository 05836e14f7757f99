"""Convolving with a network: in which order its cores meet the input, each as one, possibly grouped, convolution.

A core's kernel modes are convolved. An index that it shares with the input groups the convolution where it is still
needed afterwards, and is summed where it is not. Cores are multiplied with each other first where that is cheaper.
This yields CP's 1x1, depthwise, 1x1, Tucker's 1x1, kxk, 1x1 and TT's pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import contraction
from .contraction import Plan, constant_when_compiled
from .conv_search import Search
from .cost import Cost, volume
from .network import Network

POSITIONS_CLASSES = (16, 256, 4096, 65536)
"""Orders are chosen for these numbers of input positions (batch x spatial sizes); see `contraction.batch_class`."""


@dataclass(frozen=True)
class Window:
    """How a convolution moves over its input; one entry a spatial dimension.

    Parameters
    ----------
    kernel_size, stride, dilation : tuple of int
    padding : tuple of (int, int)
        Before and after.
    padding_mode : {"zeros", "reflect", "replicate", "circular"}
    transposed : bool
        The padding is then symmetric, and of zeros.
    output_padding : tuple of int
        Of a transposed convolution.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    padding_mode: str = "zeros"
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @property
    def plain(self) -> tuple[int, ...]:
        """The dimensions of kernel size 1, which have no kernel mode, that are padded or strided all the same."""
        extra = self.output_padding or (0,) * len(self.stride)
        moves = zip(self.kernel_size, self.stride, self.padding, extra, strict=True)
        return tuple(d for d, (k, s, p, e) in enumerate(moves) if k == 1 and (s > 1 or any(p) or e))


@dataclass(frozen=True)
class Step:
    """One convolution.

    Parameters
    ----------
    cores : tuple of int
        The cores of the network that it takes.
    merge : Plan or None
        How they are multiplied first, where they are several.
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
    transposed : bool
        Whether torch's transposed convolution does it.
    core_order, weight_shape : tuple of int
        How the (merged) core becomes the weight that torch's convolution takes.
    """

    cores: tuple[int, ...]
    merge: Plan | None
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
    transposed: bool
    core_order: tuple[int, ...]
    weight_shape: tuple[int, ...]


@dataclass(frozen=True)
class ConvPlan:
    """The convolutions that a network is applied by, in order.

    Parameters
    ----------
    steps : tuple of Step
    sizes, reorder : tuple of int
        As of a `Step`: how the channels that the last one leaves come in the order of the group and out modes.
    """

    steps: tuple[Step, ...]
    sizes: tuple[int, ...]
    reorder: tuple[int, ...]

    @property
    def cost(self) -> Cost:
        """The cost of all steps, at the number of input positions that the order was chosen for."""
        return sum((step.cost for step in self.steps), Cost())

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.cost.macs


@lru_cache(maxsize=4096)
def conv_plan(
    network: Network,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    plain: tuple[int, ...],
    transposed: bool,
    positions: int,
) -> ConvPlan:
    """Find the cheapest order by `Search.score`.

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
    steps = []
    for cores in search.order():
        steps.append(_step(search, order, done, cores))
        order, done = steps[-1].result, done | cores
    wanted = (*network.names("group"), *network.names("out"))
    return ConvPlan(tuple(steps), tuple(network.size[index] for index in order), _permutation(order, wanted))


def _permutation(order: tuple[str, ...], wanted: tuple[str, ...]) -> tuple[int, ...]:
    return () if order == wanted else tuple(order.index(index) for index in wanted)


def _step(search: Search, order: tuple[str, ...], done: frozenset[int], cores: frozenset[int]) -> Step:
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
    return Step(
        cores=tuple(sorted(cores)),
        merge=merge,
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
        counts=(volume(lead, size), volume(groups, size), volume((*groups, *summed), size)),
        transposed=transposed,
        core_order=tuple(names.index(index) for index in (*groups, *first, *second, *kernel)),
        weight_shape=(volume((*groups, *first), size), volume(second, size), *taps),
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


def execute(
    plan: ConvPlan,
    x: Tensor,  # (batch, group and in modes joined, *spatial)
    cores: Sequence[Tensor],  # those of the network
    window: Window,
    bias: Tensor | None = None,  # (group and out modes joined,)
) -> Tensor:  # (batch, group and out modes joined, *spatial')
    """Carry out a plan: one convolution a step, the bias with the last."""
    batch = x.shape[0]
    added = bias is None
    for position, step in enumerate(plan.steps, 1):
        lead, _, channels = step.counts
        if step.reorder:
            x = _reordered(x, step.sizes, step.reorder)
        if step.lead:
            x = x.reshape(batch * lead, channels, *x.shape[2:])
        with_bias = position == len(plan.steps) and not step.lead and not plan.reorder
        x = _convolve(x, _weight(step, cores), window, step, bias if with_bias else None)
        added = added or with_bias
        if step.lead:
            x = x.reshape(batch, lead * x.shape[1], *x.shape[2:])
    if plan.reorder:
        x = _reordered(x, plan.sizes, plan.reorder)
    if bias is not None and not added:
        x = x + bias.to(x.dtype).view(-1, *(1 for _ in x.shape[2:]))
    return x


def _reordered(x: Tensor, sizes: tuple[int, ...], reorder: tuple[int, ...]) -> Tensor:
    """The same channels, their indices in another order."""
    count = len(sizes)
    parts = x.reshape(x.shape[0], *sizes, *x.shape[2:])
    axes = [1 + position for position in reorder]
    return parts.permute(0, *axes, *range(1 + count, parts.dim())).flatten(1, count)


def _weight(step: Step, cores: Sequence[Tensor]) -> Tensor:
    """The weight of a step as torch's convolution takes it."""
    parts = [cores[k] for k in step.cores]
    core = parts[0] if step.merge is None else contraction.execute(step.merge, parts)
    # Contiguous: a 1x1 weight with transposed strides passes for channels-last, and the output would follow it.
    return core.permute(step.core_order).reshape(step.weight_shape).contiguous()


def _convolve(x: Tensor, weight: Tensor, window: Window, step: Step, bias: Tensor | None) -> Tensor:
    """One convolution that strides, dilates and pads the dimensions of its step only."""
    count = len(window.stride)
    groups = step.counts[1]
    stride = [window.stride[d] if d in step.dims else 1 for d in range(count)]
    dilation = [window.dilation[d] if d in step.dims else 1 for d in range(count)]
    padding = [window.padding[d] if d in step.dims else (0, 0) for d in range(count)]
    bias = None if bias is None else bias.to(x.dtype)
    if step.transposed:
        extra = [window.output_padding[d] if d in step.dims else 0 for d in range(count)]
        transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[count - 1]
        amount = [before for before, _ in padding]
        return transposed(x, weight, bias, stride, amount, extra, groups, dilation)
    if window.padding_mode != "zeros" or any(before != after for before, after in padding):
        amounts = [amount for pair in reversed(padding) for amount in pair]
        if any(amounts):
            x = F.pad(x, amounts, mode="constant" if window.padding_mode == "zeros" else window.padding_mode)
        padding = [(0, 0)] * count
    convolve = (F.conv1d, F.conv2d, F.conv3d)[count - 1]
    return convolve(x, weight, bias, stride, [before for before, _ in padding], dilation, groups)
