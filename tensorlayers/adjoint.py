"""The gradients of a contraction, by walking the steps of its plan backwards: each pair's from that of its result."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor

from . import contraction
from .contraction import Plan
from .cost import Cost


@lru_cache(maxsize=4096)
def steps_back(plan: Plan) -> tuple[tuple[Plan, Plan], ...]:
    """For each step, the plans of the gradients of its operands: of the result's gradient, in the order of
    `Step.natural`, and the other operand."""
    found = []
    for step in plan.steps:
        pairs = (step.operands, step.operands[::-1])
        # In an order that is a product of the matrix that the gradient then is.
        orders = [tuple(sorted(mine, key=(*step.natural, *mine).index)) for mine, _ in pairs]
        left, right = (
            contraction.plan((step.natural, other), order, plan.sizes)
            for (_, other), order in zip(pairs, orders, strict=True)
        )
        found.append((left, right))
    return tuple(found)


def cost(plan: Plan) -> Cost:
    """What `gradients` of all operands takes."""
    again = plan.step_costs()[:-1]
    return sum((*again, *(back.cost for pair in steps_back(plan) for back in pair)), Cost())


def gradients(
    plan: Plan,
    operands: Sequence[Tensor],
    dy: Tensor,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of the operands of `contraction.execute`; its intermediates are computed again.

    Parameters
    ----------
    plan : Plan
        Of two operands at least. Every index of an operand is one of the result, or of another operand.
    operands : sequence of Tensor
    dy : Tensor
        The gradient of the result.
    needs : sequence of bool
        Which are wanted; the others are None.

    Returns
    -------
    list of Tensor or None
        Of the shapes of the operands; views of `dy` where nothing is summed.
    """
    if not any(needs):
        return [None] * len(operands)
    values: list[Tensor | None] = list(operands)
    wanted = list(needs)
    live = list(range(len(operands)))
    pairs = []
    for step in plan.steps:
        right, left = live.pop(step.right), live.pop(step.left)
        pairs.append((left, right))
        wanted.append(wanted[left] or wanted[right])
        live.append(len(values))
        a, b = values[left], values[right]
        assert a is not None
        assert b is not None
        # Without its last step: the result itself is not needed.
        values.append(contraction.pair(step, a, b) if step is not plan.steps[-1] else None)
    found: list[Tensor | None] = [None] * len(values)
    found[-1] = dy
    for k in range(len(pairs) - 1, -1, -1):
        result = len(operands) + k
        gradient, found[result] = found[result], None
        if gradient is None:
            continue
        step = plan.steps[k]
        if step.natural != step.result:  # once for both operands
            gradient = gradient.permute([step.result.index(index) for index in step.natural]).contiguous()
        both = pairs[k], pairs[k][::-1]
        for (side, other), mine, back in zip(both, step.operands, steps_back(plan)[k], strict=True):
            if wanted[side]:
                value = values[other]
                assert value is not None
                of_side = contraction.execute(back, (gradient, value))
                found[side] = of_side.permute([back.output.index(index) for index in mine])
            if other >= len(operands):
                values[other] = None  # that was its last use
    return found[: len(operands)]
