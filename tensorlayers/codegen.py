"""A program as straight-line Python: no loop or test is left for the call, which is what small layers take longest for.

For rows of features 16 and a low-rank network the text is ::

    def run(x, cores, bias):
        t = linear(x, cores[1])
        return linear(t, cores[0], bias)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import contraction
from .group import Group
from .program import Program, Step

Run = Callable[[Tensor, Sequence[Tensor], "Tensor | None"], Tensor]
"""(rows, cores, bias or None) -> result."""


@lru_cache(maxsize=4096)
def compiled(program: Program) -> Run:
    """The function that `source` is the text of: one pass over all rows, by differentiable operations of torch."""
    names: dict[str, Any] = {"linear": F.linear, "mm": torch.mm, "bmm": torch.bmm, "addmm": torch.addmm}
    names["linear_row"] = linear_row
    names |= {f"merged_{k}": _merging(step.group) for k, step in enumerate(program.steps) if step.group.merge}
    exec(compile(source(program), f"<program of {len(program.steps)} steps>", "exec"), names)
    run: Run = names["run"]
    return run


def _merging(group: Group) -> Callable[[Sequence[Tensor]], Tensor]:
    assert group.merge is not None
    merge = group.merge
    return lambda cores: contraction.execute(merge, [cores[k] for k in group.cores])


def source(program: Program) -> str:
    """The text of a function ``run(x, cores, bias)``."""
    lines = ["def run(x, cores, bias):"]
    rows: tuple[int, ...] = (-1, _width(program.steps[0]))  # the shape of `t` so far
    name = "x"
    for k, step in enumerate(program.steps):
        t = name
        if step.order:
            t += _reshaped(rows, step.sizes) + f".permute{step.order}"
            rows = ()
        t += _reshaped(rows, step.shape)
        core = _core(step, k)
        final = k == len(program.steps) - 1 and step.result == (-1, program.features) and not program.order
        flat, linear = len(step.shape) == 2, _is_linear(step)
        by_linear = "linear_row" if program.single and rows_of_one(step) else "linear"
        if final and linear:
            return "\n".join([*lines, f"    return {by_linear}({t}, {core}, bias)\n"])
        if final and flat and not step.left:
            lines += [f"    t, c = {t}, {core}", "    return mm(t, c) if bias is None else addmm(bias, t, c)\n"]
            return "\n".join(lines)
        if not flat and step.repeated:
            lines.append(f"    t = {t}")
            t, core = "t", _repeated(step, core)
        if program.single and not flat and core.endswith(".mT") and not step.left:
            # A row times a core that is stored transposed: the core as it is, times a column, reads memory in order.
            lines.append(f"    t = bmm({core.removesuffix('.mT')}, {t}.mT).mT")
            name, rows = "t", ()
            continue
        pair = f"{core}, {t}" if step.left else f"{t}, {core}"
        lines.append(f"    t = {by_linear if linear else 'mm' if flat else 'bmm'}({pair})")
        name, rows = "t", step.result
    if program.order:
        lines.append(f"    t = t{_reshaped(rows, program.sizes)}.permute{program.order}")
        rows = ()
    if rows != (-1, program.features):
        lines.append(f"    t = t.reshape(-1, {program.features})")
    return "\n".join([*lines, "    return t if bias is None else t + bias\n"])


_PIECES = 8
_LARGE = 1 << 16  # elements of a core from which a single row is multiplied by pieces of it


def rows_of_one(step: Step) -> bool:
    """Whether a step of a program for a single row has a single row, and a core worth taking in pieces."""
    height, width = step.core_shape[-2:]
    return _width(step) == width and height % _PIECES == 0 and height * width >= _LARGE


def linear_row(
    row: Tensor,  # (1, in features)
    core: Tensor,  # (out features, in features)
    bias: Tensor | None = None,
) -> Tensor:  # (1, out features)
    """`F.linear` of a single row. A CPU's BLAS reads a large matrix twice as fast where it is given in pieces."""
    pieces = core.reshape(_PIECES, -1, core.shape[1])
    y = torch.bmm(pieces, row.mT.expand(_PIECES, -1, -1)).reshape(1, -1)
    return y if bias is None else y + bias


def _width(step: Step) -> int:
    return math.prod(size for size in step.sizes if size >= 0)


def _reshaped(now: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    return "" if now == wanted else f".reshape{wanted}"


def _is_linear(step: Step) -> bool:
    """Whether a step is `F.linear`, the core not transposed."""
    return not step.left and len(step.shape) == 2 and step.core_transposed


def _core(step: Step, k: int) -> str:
    text = _merged(step.group, f"merged_{k}")
    sizes = step.group.sizes
    if step.core_order:
        text += f".permute{step.core_order}"
        sizes = tuple(sizes[axis] for axis in step.core_order)
    text += _reshaped(sizes, step.core_shape)
    return text + (".mT" if step.core_transposed and not _is_linear(step) else "")


def _merged(group: Group, name: str) -> str:
    """The product of a group's cores: elementwise where nothing is summed, else by a function of that name."""
    merge = group.merge
    if merge is None:
        return f"cores[{group.cores[0]}]"
    if not all(step.is_product for step in merge.steps):
        return f"{name}(cores)"
    size, live = dict(merge.sizes), [f"cores[{k}]" for k in group.cores]
    for step in merge.steps:
        texts = []
        for text, indices in ((live.pop(step.right), step.operands[1]), (live.pop(step.left), step.operands[0])):
            order = [indices.index(index) for index in step.result if index in indices]
            if order != sorted(order):
                text += f".permute({order})"
            shape = [size[index] if index in indices else 1 for index in step.result]
            lead = next(k for k, index in enumerate(step.result) if index in indices)  # broadcast without a view
            texts.append(text if 1 not in shape[lead:] else f"{text}.reshape({shape[lead:]})")
        live.append(f"({texts[1]} * {texts[0]})")
    return live[0]


def _repeated(step: Step, core: str) -> str:
    """The core for every matrix of `t`; of several matrices, each for its share of them."""
    if step.shared == 1:
        return f"{core}.expand(t.shape[0], -1, -1)"
    return f"{core}.repeat_interleave(t.shape[0] // {step.shared}, 0)"
