"""Program: a contraction of rows with cores as a chain of matrix products, for a task. `matmul` carries it out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .cost import Cost
from .group import Group


@dataclass(frozen=True)
class Task:
    """What is to be computed: the result, or the gradients.

    Parameters
    ----------
    rows : int
    x, cores : bool
        Which gradients are wanted; neither: the result itself.
    dtype : str
        "float32", ...
    itemsize : int
        Bytes an element.
    arch : str
        The architecture that Triton kernels may run on, as `launch` names it; empty where they may not.
    """

    rows: int
    x: bool = False
    cores: bool = False
    dtype: str = "float32"
    itemsize: int = 4
    arch: str = ""

    @property
    def forward(self) -> bool:
        """Whether the result itself is wanted."""
        return not (self.x or self.cores)


@dataclass(frozen=True)
class Step:
    """One matrix product of the rows, or of what became of them, with the core of a group.

    Both are seen as stacks of matrices. The batch is made of indices that both carry, then of some that only the rows
    carry; the core is repeated over the latter.

    Parameters
    ----------
    group : Group
    left : bool
        Whether the core stands on the left, ``core @ rows``; else ``rows @ core``.
    sizes : tuple of int
        Of the rows' indices as they come; -1 for the rows themselves.
    order : tuple of int
        The permutation that makes them batch, matrix rows, matrix columns; empty where they are in order already.
    shape, result : tuple of int
        Of the rows as matrices before and after, 2-D where there is no batch; -1 where the rows themselves are.
    core_order, core_shape : tuple of int
        The same for the core.
    core_transposed : bool
        Whether the matrices are transposed last, so that none of the core is copied.
    shared : int
        Values of the batch that the core carries itself; 1 where it is a single matrix.
    repeated : bool
        Whether the core is repeated over the rest of the batch.
    summed_apart : bool
        Whether the gradients of the repeated core are formed one by one and summed; else the batch joins the
        contracted dimension first.
    """

    group: Group
    left: bool
    sizes: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]
    result: tuple[int, ...]
    core_order: tuple[int, ...]
    core_shape: tuple[int, ...]
    core_transposed: bool
    shared: int
    repeated: bool
    summed_apart: bool


@dataclass(frozen=True, eq=False)
class Program:
    """The steps that a network is applied to rows by.

    They say in which order (groups of) cores meet the rows, and how the axes of rows and cores become matrices. Every
    step is one (batched) matrix product; the order of the indices between steps is chosen so that few need a copy.

    Parameters
    ----------
    steps : tuple of Step
    sizes, order : tuple of int
        As of a `Step`: how the indices that the last step leaves come in the order of the out modes.
    features : int
        Of a row of the result.
    intermediate : int
        Elements of a row that lie between the steps, that their gradients take if any are asked for, copies into
        another order and repetitions of cores among them.
    copies : int
        Elements of the cores that are copied to become matrices.
    single : bool
        Whether it is for a single row.
    """

    steps: tuple[Step, ...]
    sizes: tuple[int, ...]
    order: tuple[int, ...]
    features: int
    intermediate: int
    copies: int
    single: bool = False

    @property
    def merged(self) -> int:
        """Elements of the products of cores."""
        return sum(math.prod(step.group.sizes) for step in self.steps if step.group.merge is not None)


class KernelProgram(ABC):
    """How a Triton kernel applies a network to rows; outside of autograd, as `matmul` carries out a `Program`.

    Attributes
    ----------
    intermediate : int
        As of a `Program`.
    """

    intermediate: int = 0

    @abstractmethod
    def forward(self, x: Tensor, cores: Sequence[Tensor], bias: Tensor | None, activation: str = "none") -> Tensor:
        """(rows, in features), the cores, (out features,) -> (rows, out features), activated."""

    @abstractmethod
    def gradients(self, dy: Tensor, x: Tensor, cores: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
        """The gradients of x and of each core that are needed."""


@dataclass(frozen=True)
class Candidate:
    """A program and what it is predicted to take.

    Parameters
    ----------
    program : Program or KernelProgram
    chunk : int
        Rows at a time; 0: all.
    cost : Cost
        FLOPs and elements moved.
    fixed : Cost
        What of these it takes to read the cores, and to multiply some with each other, whatever the number of rows.
    seconds : float
    launches : int
    largest : int
        Elements of the largest intermediate that is held at a time.
    """

    program: Program | KernelProgram
    chunk: int
    cost: Cost
    fixed: Cost
    seconds: float
    launches: int
    largest: int

    def cost_at(self, share: float) -> Cost:
        """The cost of so many times the rows."""
        flops, elements = self.cost.flops - self.fixed.flops, self.cost.elements - self.fixed.elements
        return Cost(round(flops * share), round(elements * share)) + self.fixed
