"""Carrying out a `Program` outside of autograd: forward, and the gradients of rows and cores.

Rows are taken in chunks, so that what lies between two steps stays in cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import codegen
from .group import apart, product
from .precision import at_least_single
from .program import Program, Step

_CHUNK = 256
"""Rows at a time, of a program for all, whose results are to be added to others."""


def _prepared(program: Program, cores: Sequence[Tensor]) -> list[Tensor]:
    """The core of each step as a stack of matrices."""
    return [_as_matrices(step, product(step.group, cores)) for step in program.steps]


def _as_matrices(step: Step, core: Tensor) -> Tensor:
    if step.core_order:
        core = core.permute(step.core_order)
    core = core.reshape(step.core_shape)
    return core.mT if step.core_transposed else core


def _matrices(step: Step, rows: Tensor) -> Tensor:
    """The rows as the matrices of a step; a copy only where the step needs one."""
    if step.order:
        rows = rows.reshape(step.sizes).permute(step.order)
    return rows.reshape(step.shape)


def _repeated(step: Step, core: Tensor, batch: int) -> Tensor:
    """The core of a step, for every matrix of the rows."""
    if not step.repeated:
        return core
    if step.shared == 1:
        return core.expand(batch, -1, -1)
    m, n = core.shape[-2:]
    return core.unsqueeze(1).expand(step.shared, batch // step.shared, m, n).reshape(batch, m, n)


def _times(step: Step, rows: Tensor, core: Tensor, out: Tensor | None = None) -> Tensor:
    if rows.dim() == 2:
        return torch.mm(core, rows, out=out) if step.left else torch.mm(rows, core, out=out)
    core = _repeated(step, core, rows.shape[0])
    return torch.bmm(core, rows, out=out) if step.left else torch.bmm(rows, core, out=out)


def _result(program: Program, rows: Tensor) -> Tensor:
    if program.order:
        rows = rows.view(program.sizes).permute(program.order)
    return rows.reshape(-1, program.features)


def forward(
    program: Program,
    x: Tensor,  # (rows, features)
    cores: Sequence[Tensor],
    bias: Tensor | None = None,  # (out features,)
    chunk: int = 0,
    added: Tensor | None = None,  # (rows, out features)
) -> Tensor:  # (rows, out features)
    """Apply a program to `chunk` rows at a time (0: to all), outside of autograd; `added`: to that, in place."""
    if added is None and (not chunk or x.shape[0] <= chunk):
        return codegen.compiled(program)(x, cores, bias)
    chunk = chunk or _CHUNK
    matrices = _prepared(program, cores)
    y = x.new_empty(x.shape[0], program.features) if added is None else added
    space = _Space(x)
    last = len(program.steps) - 1
    for start in range(0, x.shape[0], chunk):
        rows, into = x[start : start + chunk], y[start : start + chunk]
        for k, (step, core) in enumerate(zip(program.steps, matrices, strict=True)):
            rows = _matrices(step, rows)
            shape = _shape(step, rows, core)
            direct = k == last and not program.order and added is None
            out = into.view(shape) if direct else space.take(k, shape)
            with_bias = bias if direct and not step.left and shape == into.shape else None
            rows = _times(step, rows, core, out) if with_bias is None else torch.addmm(with_bias, rows, core, out=out)
        if added is not None:
            into += _result(program, rows)
        elif program.order:
            into.copy_(_result(program, rows))
        if bias is not None and with_bias is None:
            into += bias
    return y


def _shape(step: Step, rows: Tensor, core: Tensor) -> tuple[int, ...]:
    """The shape of a step's result."""
    if step.left:
        return (*rows.shape[:-2], core.shape[-2], rows.shape[-1])
    return (*rows.shape[:-1], core.shape[-1])


class _Space:
    """Memory that is used again for every chunk: fresh pages cost as much as the products that fill them."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._held: dict[object, Tensor] = {}

    def take(self, key: object, shape: Sequence[int]) -> Tensor:
        size = math.prod(shape)
        held = self._held.get(key)
        if held is None or held.numel() < size:
            held = self._held[key] = self._like.new_empty(size)
        return held[:size].view(shape)


def gradients(
    program: Program,
    dy: Tensor,  # (rows, out features)
    x: Tensor,  # (rows, features)
    cores: Sequence[Tensor],
    needs: Sequence[bool],  # of x, then of each core
    chunk: int = 0,
    added: Tensor | None = None,  # (rows, features)
) -> list[Tensor | None]:
    """The gradients of x and of each core; what lies between the steps is computed again, a chunk at a time.

    Parameters
    ----------
    program : Program
    dy, x : Tensor
    cores : sequence of Tensor
    needs : sequence of bool
        Which gradients are wanted, of x and of each core; the others are None.
    chunk : int
        Rows at a time; 0: all.
    added : Tensor, optional
        What the gradient of x is added to, in place.

    Returns
    -------
    list of Tensor or None
        Of the shapes of x and of the cores. The sum over chunks is in the order of the rows: deterministic.
    """
    matrices = _prepared(program, cores)
    wanted = [any(needs[1 + k] for k in step.group.cores) for step in program.steps]
    dx = None
    if needs[0]:
        dx = x.new_empty(x.shape) if added is None else added
    sums: list[Tensor | None] = [None] * len(matrices)
    space = _Space(x)
    rows = chunk or (max(x.shape[0], 1) if added is None else _CHUNK)
    for start in range(0, x.shape[0], rows):
        part = slice(start, start + rows)
        inputs = _inputs(program, x[part], matrices, wanted, space)
        target = None if dx is None else dx[part] if added is None else space.take("dx", x[part].shape)
        _backward(program, dy[part], inputs, matrices, wanted, sums, target, space)
        if added is not None and target is not None:
            added[part] += target
    found: list[Tensor | None] = [dx] + [None] * len(cores)
    del matrices, space  # a rebuilt weight among them
    for position, step in enumerate(program.steps):
        total, sums[position] = sums[position], None
        if total is not None:
            for k, gradient in _core_gradients(step, total.to(x.dtype), cores, needs):
                found[1 + k] = gradient
    return found


def _inputs(
    program: Program, x: Tensor, matrices: Sequence[Tensor], wanted: Sequence[bool], space: _Space
) -> list[Tensor]:
    """What each step multiplies its core with, as far as the gradient of a core needs it."""
    rows, inputs = x, []
    last = max((k for k, is_wanted in enumerate(wanted) if is_wanted), default=-1)
    for k, step in enumerate(program.steps[: last + 1]):
        rows = _matrices(step, rows)
        inputs.append(rows)
        if k < last:
            rows = _times(step, rows, matrices[k], space.take(k, _shape(step, rows, matrices[k])))
    return inputs


def _backward(
    program: Program,
    dy: Tensor,
    inputs: Sequence[Tensor],
    matrices: Sequence[Tensor],
    wanted: Sequence[bool],
    sums: list[Tensor | None],
    dx: Tensor | None,
    space: _Space,
) -> None:
    """Walk the steps backwards for one chunk: adds to `sums`, writes `dx`."""
    gradient = dy
    if program.order:
        gradient = _unordered(gradient, program.sizes, program.order)
    for k in range(len(program.steps) - 1, -1, -1):
        step, core = program.steps[k], matrices[k]
        gradient = gradient.reshape(step.result)
        if wanted[k]:
            sums[k] = _add(step, sums[k], inputs[k], gradient)
        if dx is None and not any(wanted[:k]):
            return
        turned = core.mT if gradient.dim() == 2 else _repeated(step, core.mT, gradient.shape[0])
        left, right = (turned, gradient) if step.left else (gradient, turned)
        shape = (*gradient.shape[:-2], left.shape[-2], right.shape[-1])
        direct = dx is not None and k == 0 and not step.order
        out = dx.view(shape) if direct and dx is not None else space.take(("gradient", k), shape)
        gradient = torch.mm(left, right, out=out) if out.dim() == 2 else torch.bmm(left, right, out=out)
        if step.order:
            gradient = _unordered(gradient, step.sizes, step.order)
        if dx is not None and k == 0 and not direct:
            dx.copy_(gradient.reshape(dx.shape))


def _unordered(rows: Tensor, sizes: Sequence[int], order: Sequence[int]) -> Tensor:
    """The inverse of ``rows.view(sizes).permute(order)``, as a view."""
    return rows.reshape([sizes[axis] for axis in order]).permute(_inverse(order))


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _add(step: Step, total: Tensor | None, rows: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of a step's core from one chunk, added to those before in single precision at least.

    Of the core as it is stored, before it is transposed: so no copy is needed, and a tall result is the faster one.
    """
    left, right = (gradient, rows.mT) if step.left else (rows.mT, gradient)
    if step.core_transposed:
        left, right = right.mT, left.mT
    wide = at_least_single(rows.dtype)
    if not step.repeated:
        multiply, accumulate = (torch.mm, torch.addmm) if rows.dim() == 2 else (torch.bmm, torch.baddbmm)
        if total is not None and rows.dtype == wide:
            return accumulate(total, left, right, out=total)
        found = multiply(left, right)
        return found.to(wide) if total is None else total.add_(found)
    if step.summed_apart:
        found = torch.bmm(left, right)
        found = found.view(step.shared, -1, *found.shape[1:]).sum(1, dtype=wide)
    else:  # the batch joins the contracted dimension
        left, right = (_joined(step, matrix) for matrix in (left, right.mT))
        found = torch.bmm(left, right.mT)
    found = found.squeeze(0) if step.shared == 1 else found
    return found.to(wide) if total is None else total.add_(found)


def _joined(step: Step, matrices: Tensor) -> Tensor:
    """(shared x repeats, m, k) -> (shared, m, repeats x k)."""
    _, m, k = matrices.shape
    return matrices.view(step.shared, -1, m, k).transpose(1, 2).reshape(step.shared, m, -1)


def _core_gradients(
    step: Step, total: Tensor, cores: Sequence[Tensor], needs: Sequence[bool]
) -> Iterator[tuple[int, Tensor]]:
    """The gradients of the cores of a group, from that of their product as `_add` leaves it."""
    if step.core_order:
        total = _unordered(total, step.group.sizes, step.core_order)
    yield from apart(step.group, total.reshape(step.group.sizes), cores, needs[1:])
