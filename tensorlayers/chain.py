"""Chain: a product of three tensors as sums of chains of three matrices, found from the names of their indices.

An index is one of the rows or columns of the three matrices, or counts the chains (heads) or the terms of a sum, by
which of the operands and of the result carry it. So one Triton kernel computes any such product: two cores that meet
the rows of a layer, and the gradients of the rows and of each core.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from .contraction import BATCH
from .launch import VECTOR, Launch, is_aligned, launch
from .launch_tables import Problem, Table

Indices = tuple[str, ...]

_ROLES = {  # which of left, middle, right and the result carry an index -> what it is
    "LO": "m",
    "RO": "n",
    "LM": "p",
    "MR": "q",
    "LR": "terms",
    "LMR": "terms",
    "MO": "heads1",
}


@dataclass(frozen=True)
class Chain:
    """A product of three tensors as a sum of chains, ``out[h, m, n] = sum_t left[h, t] middle[h, t] right[h, t]``.

    Parameters
    ----------
    operands : tuple of Indices
        The indices of each tensor, in the order of its axes.
    result : Indices
    order : tuple of int
        Which operand stands on the left, in the middle and on the right.
    roles : tuple of Indices
        The indices that are heads1, heads2, terms, m, n, p and q.
    """

    operands: tuple[Indices, Indices, Indices]
    result: Indices
    order: tuple[int, int, int]
    roles: tuple[Indices, ...]

    def views(self, tensors: Sequence[Tensor], sizes: Mapping[str, int]) -> list[Tensor]:
        """The operands as left, middle and right: (heads1, heads2, terms, rows, columns), expanded where they lack one.

        A copy only where indices that are one role here are not next to each other there, and of a core that is
        neither row by row nor column by column.
        """
        h1, h2, t, m, n, p, q = self.roles
        axes = (h1, h2, t, m, p), (h1, h2, t, p, q), (h1, h2, t, q, n)
        found = []
        for k, wanted in zip(self.order, axes, strict=True):
            view = viewed(tensors[k], self.operands[k], wanted, sizes)
            found.append(packed(view) if self.is_core(self.operands[k]) else view)
        return found

    def as_result(self, tensor: Tensor, indices: Indices, sizes: Mapping[str, int]) -> Tensor:
        """A tensor with (some) indices of the result as (heads1, heads2, m, n)."""
        h1, h2, _, m, n, *_ = self.roles
        return viewed(tensor, indices, (h1, h2, m, n), sizes)

    def is_alone(self, index: str) -> bool:
        """Whether an index is a role by itself."""
        return (index,) in self.roles

    def problem(self, sizes: Mapping[str, int], dtype: str) -> Problem:
        """What is launched for contiguous tensors."""
        h1, h2, t, m, n, p, q = (math.prod(sizes[index] for index in role) for role in self.roles)
        left, middle, right = (set(self.operands[k]) for k in self.order)
        shared = h1 == 1 or not (left | right) & set(self.roles[0])
        held = t == 1 or not middle & set(self.roles[2])
        return Problem((h1, h2), t, m, n, p, q, shared, held, dtype, self._is_aligned(sizes))

    def _is_aligned(self, sizes: Mapping[str, int]) -> bool:
        """Whether each tensor, if it is contiguous, is addressed in vectors, as the kernel finds from its views.

        A core that has neither rows nor columns contiguous is packed.
        """
        h1, h2, t, m, n, p, q = self.roles
        axes = (h1, h2, t, m, p), (h1, h2, t, p, q), (h1, h2, t, q, n)
        pairs = [(self.operands[k], of) for k, of in zip(self.order, axes, strict=True)]
        for indices, roles in (*pairs, (self.result, (h1, h2, m, n))):
            strides = _strides(indices, sizes)
            lengths = [math.prod(sizes[index] for index in role) for role in roles]
            steps = [
                strides[role[-1]] if length > 1 and role[-1] in strides else 0
                for role, length in zip(roles, lengths, strict=True)
            ]
            is_packed = 1 not in steps[-2:] and self.is_core(indices)
            if is_packed and not any(length % VECTOR == 0 for length in lengths[-2:]):
                return False
            if not is_packed and not is_aligned(lengths, steps, (-1, -2)):
                return False
        return True

    def is_core(self, indices: Indices) -> bool:
        """Whether these are those of a core: it has no rows, so that a copy of it is small."""
        return BATCH not in indices


def chains(operands: Sequence[Indices], result: Indices) -> list[Chain]:
    """All forms of a product of three operands; none where an index of one is neither shared nor in the result."""
    found = []
    for order in itertools.permutations(range(3)):
        roles: dict[str, list[str]] = {name: [] for name in ("heads1", "heads2", "terms", "m", "n", "p", "q")}
        carried: dict[str, set[str]] = {"heads2": set(), "terms": set(), "heads1": set()}
        for index in dict.fromkeys((*result, *(index for operand in operands for index in operand))):
            carriers = "".join(name for name, k in zip("LMR", order, strict=True) if index in operands[k])
            if len(carriers) + (index in result) < 2:
                break
            carriers += "O" * (index in result)
            role = _ROLES.get(carriers, "heads2")
            if role == "heads2" and carriers not in carried["heads2"] and carried["heads2"]:
                role = "heads1"  # which no index of the middle alone can join then
            roles[role].append(index)
            if role in carried:
                carried[role].add(carriers)
        else:
            if all(len(kinds) <= 1 for kinds in carried.values()) and _is_viewable(result, roles.values()):
                made = tuple(tuple(indices) for indices in roles.values())
                left, middle, right = order
                found.append(Chain(tuple(operands), result, (left, middle, right), made))  # type: ignore[arg-type]
    return found


def _is_viewable(result: Indices, roles: Iterable[Sequence[str]]) -> bool:
    """Whether the indices of each role are next to each other in the result, which is written in place."""
    for role in roles:
        places = [result.index(index) for index in role if index in result]
        if places != list(range(places[0], places[0] + len(places))) if places else False:
            return False
    return True


def best(
    operands: Sequence[Indices], result: Indices, sizes: Mapping[str, int], dtype: str, table: Table
) -> tuple[Chain, Launch] | None:
    """The form that is predicted to be fastest, with its launch; None where there is none."""
    priced = [(chain, launch(chain.problem(sizes, dtype), table)) for chain in chains(operands, result)]
    return min(priced, key=lambda pair: pair[1].seconds, default=None)


def viewed(tensor: Tensor, indices: Indices, roles: Sequence[Indices], sizes: Mapping[str, int]) -> Tensor:
    """A tensor with an axis for each role: the indices that are it, flattened; expanded where it carries none of them.

    Of the indices of a role it carries all, or none.
    """
    carried = [tuple(index for index in role if index in indices) for role in roles]
    tensor = tensor.permute([indices.index(index) for role in carried for index in role])
    tensor = tensor.reshape([math.prod(sizes[index] for index in role) for role in carried])
    return tensor.expand([math.prod(sizes[index] for index in role) for role in roles])


def packed(view: Tensor) -> Tensor:
    """A stack of matrices, which is read again and again, with its rows or its columns contiguous."""
    if 1 in view.stride()[-2:]:
        return view
    core = view[tuple(slice(None) if stride else slice(1) for stride in view.stride())]  # without expansions
    is_turned = view.shape[-1] % VECTOR and not view.shape[-2] % VECTOR
    return (core.mT.contiguous().mT if is_turned else core.contiguous()).expand(view.shape)


def _strides(indices: Indices, sizes: Mapping[str, int]) -> dict[str, int]:
    """The strides of a contiguous tensor."""
    found, stride = {}, 1
    for index in reversed(indices):
        found[index] = stride
        stride *= sizes[index]
    return found
