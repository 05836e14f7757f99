"""A convolution plan on plain tensors, below autograd: a few samples at a time, and its gradients from the input alone.

What lies between the steps is computed again for the gradients, so that nothing is kept but the input.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from .conv_maps import Window, convolve_back, is_last, mix_back, permuted_back, with_channels, with_layout
from .convolution import ConvPlan, Step, apply, convolved, enter, leave, weight_of
from .group import apart
from .precision import at_least_single

_BYTES = 2**21
"""Less than this is not worth taking in parts."""


def forward(
    plan: ConvPlan,
    x: Tensor,  # (batch, channels, *spatial)
    cores: Sequence[Tensor],
    window: Window,
    bias: Tensor | None = None,  # (group and out modes joined,)
    chunk: int = 0,
) -> Tensor:  # (batch, group and out modes joined, *spatial')
    """`convolution.execute`, `chunk` samples at a time (0: as `samples` says), outside of autograd."""
    weights = [weight_of(step, cores) for step in plan.steps]
    bias = None if bias is None else bias.to(x.dtype)
    chunk = chunk or samples(plan, x, window)
    if x.shape[0] <= chunk:
        return convolved(plan, x, weights, window, bias)
    y: Tensor | None = None
    for part in _parts(x, chunk):
        found = convolved(plan, x[part], weights, window, bias)
        if y is None:
            y = _empty(x, (x.shape[0], *found.shape[1:]), is_last(x))
        y[part] = found
    assert y is not None
    return y


def gradients(
    plan: ConvPlan,
    dy: Tensor,  # (batch, group and out modes joined, *spatial')
    x: Tensor,  # (batch, channels, *spatial)
    cores: Sequence[Tensor],
    window: Window,
    needs: Sequence[bool],  # of x, then of each core
    chunk: int = 0,
) -> list[Tensor | None]:
    """The gradients of x and of each core, without the bias.

    Parameters
    ----------
    plan : ConvPlan
    dy, x : Tensor
    cores : sequence of Tensor
    window : Window
    needs : sequence of bool
        Which gradients are wanted, of x and of each core; the others are None.
    chunk : int
        Samples at a time; 0: as `samples` says.

    Returns
    -------
    list of Tensor or None
        Of the shapes of x, in its layout, and of the cores. The sum over chunks is in the order of the samples:
        deterministic.
    """
    found: list[Tensor | None] = [None] * (1 + len(cores))
    if not any(needs):
        return found
    weights = [weight_of(step, cores) for step in plan.steps]
    wanted = [any(needs[1 + k] for k in step.group.cores) for step in plan.steps]
    chunk = chunk or samples(plan, x, window, training=True)
    dx = _empty(x, x.shape, is_last(x)) if needs[0] and chunk < x.shape[0] else None
    sums: list[Tensor | None] = [None] * len(weights)
    for part in _parts(x, chunk):
        gradient, given = (value if is_last(value) else value.contiguous() for value in (dy[part], x[part]))
        inputs = _inputs(plan, given, weights, window, wanted)
        gradient = _backward(plan, gradient, inputs, weights, window, (needs[0], wanted), sums)
        if needs[0]:
            gradient = with_channels(gradient, plan.groups, x.shape[1] // plan.groups)
        if dx is not None:
            dx[part] = gradient
        elif needs[0]:
            dx = with_layout(gradient, is_last(x))
    found[0] = dx
    for step, weight, total in zip(plan.steps, weights, sums, strict=True):
        if total is not None:
            for k, gradient in _core_gradients(step, total.to(weight.dtype), cores, needs):
                found[1 + k] = gradient
    return found


def samples(plan: ConvPlan, x: Tensor, window: Window, training: bool = False) -> int:
    """How many samples are taken at a time.

    As many as need no more memory beside x, y and their gradients than the dense convolution: that has its weight, the
    gradient of it, and (oneDNN, where the input is contiguous) copies of its input and output in another layout. More
    at a time are faster: a convolution reorders its weight each time.

    Parameters
    ----------
    plan : ConvPlan
    x : Tensor
    window : Window
    training : bool
        Whether for the gradients: what lies between the steps and its gradients are held together then.
    """
    sizes = [math.prod(shape) for shape in _shapes(plan, x, window)]
    batch, given = x.shape[0], math.prod(x.shape[1:])
    ends, filled = given + sizes[-1], sizes[0] if given < sizes[0] else 0
    has_copies = not is_last(x) or x.device.type != "cpu"
    least = _BYTES // x.element_size()
    if not training:
        reordered = sum(sizes[k] for k, step in enumerate(plan.steps) if step.reorder)
        needed = filled + sum(sizes[1:-1]) + reordered + max(sizes)
        return max(1, max(plan.dense + (batch * ends if has_copies else 0), least) // needed)
    needed = filled + _for_gradients(plan, sizes, has_copies)
    allowed = 2 * plan.dense + (batch * ends if has_copies else 0)
    if batch * needed <= max(allowed, least) + batch * given:  # the gradient of x is then that of the only part
        return max(batch, 1)
    return max(1, max(allowed, least) // needed)


def _for_gradients(plan: ConvPlan, sizes: Sequence[int], has_copies: bool) -> int:
    """The most elements of a sample that are held at once while the steps are walked backwards."""
    most, held, last = 0, 0, len(plan.steps) - 1
    for k, step in enumerate(plan.steps):
        held += sizes[k] if k or step.reorder else 0
        ahead = sizes[k + 1] if k < last or plan.reorder else 0
        copies = sizes[k] + sizes[k + 1] if has_copies and not step.mixes else 0
        most = max(most, held + ahead + sizes[k] + copies)
    return most


def between(plan: ConvPlan, x: Tensor, window: Window) -> int:
    """Elements that lie between the steps, and those of the zeros that the channels are filled up with."""
    first, *inner, _ = (math.prod(shape) for shape in _shapes(plan, x, window))
    return x.shape[0] * (first - math.prod(x.shape[1:]) + sum(inner))


def _parts(x: Tensor, chunk: int) -> Iterator[slice]:
    return (slice(start, start + chunk) for start in range(0, max(x.shape[0], 1), chunk))


def _empty(like: Tensor, shape: Sequence[int], last: bool) -> Tensor:
    if not last or len(shape) < 4:
        return like.new_empty(shape)
    return like.new_empty((shape[0], *shape[2:], shape[1])).movedim(-1, 1)


def _shapes(plan: ConvPlan, x: Tensor, window: Window) -> list[tuple[int, ...]]:
    """Of one sample, the shape that each step takes, the leading indices first; and that of the result."""
    lengths: tuple[int, ...] = tuple(x.shape[2:])
    shapes = []
    for step in plan.steps:
        shapes.append((step.counts[0], step.counts[2], *lengths))
        lengths = window.along(step.dims).lengths(lengths)
    return [*shapes, (1, math.prod(plan.sizes), *lengths)]


def _inputs(
    plan: ConvPlan, x: Tensor, weights: Sequence[Tensor], window: Window, wanted: Sequence[bool]
) -> list[Tensor]:
    """What each step convolves; where no gradient needs its values, anything of that shape."""
    inputs = []
    last = max((k for k, is_wanted in enumerate(wanted) if is_wanted), default=-1)
    batch, layout = x.shape[0], is_last(x)
    if last >= 0:
        x = with_channels(x, plan.groups, plan.channels)
    for k, (step, shape) in enumerate(zip(plan.steps, _shapes(plan, x, window), strict=False)):
        if k > last:
            inputs.append(_empty(x, (batch * shape[0], *shape[1:]), layout or step.uneven))
            continue
        inputs.append(enter(step, x))
        if k < last:
            x = leave(step, apply(plan, k, inputs[k], weights[k], window, layout))
    return inputs


def _backward(
    plan: ConvPlan,
    gradient: Tensor,
    inputs: list[Tensor],  # is emptied
    weights: Sequence[Tensor],
    window: Window,
    needs: tuple[bool, Sequence[bool]],  # of x, and of the weight of each step
    sums: list[Tensor | None],
) -> Tensor:
    """Walk the steps backwards for one chunk: adds to `sums`, returns the gradient of x where it is needed."""
    if plan.reorder:
        gradient = permuted_back(gradient, plan.sizes, plan.reorder)
    for k in range(len(plan.steps) - 1, -1, -1):
        step, x, weight = plan.steps[k], inputs.pop(), weights[k]
        if step.lead:
            gradient = gradient.reshape(x.shape[0], gradient.shape[1] // step.counts[0], *gradient.shape[2:])
        both = (needs[0] or any(needs[1][:k]), needs[1][k])
        if step.mixes:
            dx, dw = mix_back(gradient, x, weight.flatten(1), both)
        else:
            dx, dw = convolve_back(gradient, x, weight, window.along(step.dims), step.counts[1], both)
        if dw is not None:
            dw, total = dw.reshape(weight.shape), sums[k]
            sums[k] = dw.to(at_least_single(dw.dtype)) if total is None else total.add_(dw)
        if dx is None:
            break
        gradient = leave(step, dx)
        if step.reorder:
            gradient = permuted_back(gradient, step.sizes, step.reorder)
    return gradient


def _core_gradients(
    step: Step, total: Tensor, cores: Sequence[Tensor], needs: Sequence[bool]
) -> Iterator[tuple[int, Tensor]]:
    """The gradients of the cores of a step, from that of its weight."""
    sizes = step.group.sizes
    inverse = sorted(range(len(sizes)), key=step.core_order.__getitem__)
    total = total.reshape([sizes[axis] for axis in step.core_order]).permute(inverse)
    yield from apart(step.group, total, cores, needs[1:])
