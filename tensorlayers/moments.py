"""Second moments of what a layer takes and of the gradients of what it gives, gathered batch by batch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .metric import Metric

INPUT_RIDGE, OUTPUT_RIDGE, SHIFT_RIDGE = 1e-2, 1e-1, 1e-1
"""What is added to the diagonal of second moments, relative to its mean: what few data do not show still counts."""
_NOTHING = 1e-10
"""Inputs whose variance is less than this share of their squares do not vary."""


@dataclass(eq=False)
class Source:
    """What the dense model's layer took, beside another model's.

    Parameters
    ----------
    cross : Tensor
        The sum of the outer products of its inputs and the other's, (n, n) or (groups, n, n).
    total : Tensor
        The sum of its inputs.
    """

    cross: Tensor
    total: Tensor

    @classmethod
    def of(cls, before: Tensor, now: Tensor) -> Source:
        """Of inputs at the same positions, (positions, n) or (positions, groups, n)."""
        return cls(_outer(before, now), before.sum(0, dtype=torch.float64))


@dataclass(eq=False)
class Moments:
    """Sums over positions, in float64.

    Parameters
    ----------
    count : float
        How many positions were seen.
    total : Tensor
        The sum of the inputs, (n) or (groups, n); empty for lookups.
    inputs : Tensor
        The sum of their outer products, (n, n) or (groups, n, n); of lookups how often each row was, (n).
    outputs : Tensor or None
        The sum of the outer products of gradients of the model's output, (m, m) or (groups, m, m).
    source : Source, optional
        What the dense model's layer took at the same positions, where the inputs above are those of another model.
    curves : dict
        What was computed from these sums before, by what it was computed for: see budget.py.
    """

    count: float
    total: Tensor
    inputs: Tensor
    outputs: Tensor | None = None
    source: Source | None = None
    curves: dict[Hashable, list[float]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, columns: Tensor, rows: int) -> Moments:
        """Of (positions, n), (positions, groups, n), or ids (positions) of so many rows."""
        if not columns.is_floating_point():
            return cls(len(columns), torch.empty(0), torch.bincount(columns, minlength=rows).double())
        return cls(len(columns), columns.sum(0, dtype=torch.float64), _outer(columns))

    @property
    def is_lookup(self) -> bool:
        """Whether rows of a table are counted."""
        return self.inputs.dim() == 1

    @property
    def mean(self) -> Tensor:
        """The mean input, (n) or (groups, n); empty for lookups."""
        return self.total / self.count

    @property
    def reaches_output(self) -> bool:
        """Whether the model's output depends on the layer's; as far as gradients were gathered."""
        return self.outputs is None or bool(self.outputs.any())

    def to(self, device: torch.device | str) -> Moments:
        """These sums on a device; themselves where they are there."""
        if self.inputs.device == torch.device(device):
            return self
        outputs = None if self.outputs is None else self.outputs.to(device)
        source = None
        if self.source is not None:
            source = Source(self.source.cross.to(device), self.source.total.to(device))
        return Moments(self.count, self.total.to(device), self.inputs.to(device), outputs, source, self.curves)

    @property
    def nbytes(self) -> int:
        """Bytes of all sums."""
        return sum(one.nbytes for one in (self.total, self.inputs, self.outputs) if one is not None)

    @classmethod
    def pooled(cls, several: Sequence[Moments]) -> Moments:
        """Those of several layers of one shape together."""
        if len(several) == 1:
            return several[0]
        outputs = [one.outputs for one in several if one.outputs is not None]
        return cls(
            sum(one.count for one in several),
            torch.stack([one.total for one in several]).sum(0),
            torch.stack([one.inputs for one in several]).sum(0),
            torch.stack(outputs).sum(0) if len(outputs) == len(several) else None,
        )

    def add_to(self, held: dict[str, Moments], name: str) -> None:
        """Add these to what is held by a name."""
        if name in held:
            held[name].add(self)
        else:
            held[name] = self

    def add(self, other: Moments) -> None:
        """Add what was seen elsewhere."""
        self.curves.clear()
        self.count += other.count
        self.total += other.total
        self.inputs += other.inputs
        if self.source is not None and other.source is not None:
            self.source.cross += other.source.cross
            self.source.total += other.source.total
        else:
            self.source = None

    def add_outputs(self, gradients: Tensor, weight: float) -> None:
        """Add gradients of the output, (positions, m) or (positions, groups, m)."""
        self.curves.clear()
        found = _outer(gradients) * weight
        self.outputs = found if self.outputs is None else self.outputs + found

    def target(self, weight: Tensor, *, centered: bool = False, ridge: float = SHIFT_RIDGE) -> Tensor:
        """The weight that makes of these inputs what a dense one, (m, n) or (groups, m, n), makes of the dense model's.

        That of least squares, drawn towards the dense weight where data are few. The dense one itself where these
        inputs are the dense model's. `centered`: about the mean inputs, as a bias makes good for them.
        """
        if self.source is None:
            return weight
        inputs, cross = self.inputs / self.count, self.source.cross / self.count
        if centered:
            inputs = inputs - self.mean[..., :, None] * self.mean[..., None, :]
            cross = cross - (self.source.total / self.count)[..., :, None] * self.mean[..., None, :]
        # Of inputs that do not vary, or are zero, nothing can be told.
        least = _NOTHING * (self.inputs / self.count).diagonal(dim1=-2, dim2=-1).mean(-1)
        share = torch.maximum(ridge * inputs.diagonal(dim1=-2, dim2=-1).mean(-1), least)
        share = torch.where(share > 0, share, 1.0)[..., None, None]
        dense = weight.double()
        right = dense @ cross + share * dense
        found: Tensor = torch.linalg.solve(inputs + share * torch.eye(inputs.shape[-1]).to(inputs), right.mT)
        return found.mT.to(weight.dtype)

    def bias(self, weight: Tensor, found: Tensor) -> Tensor:
        """What a bias has to make good, of weights (m, n) or (groups, m, n): the difference of the mean outputs."""
        given = self.mean if self.source is None else self.source.total / self.count
        before, after = weight.double() @ given[..., None], found.double() @ self.mean[..., None]
        return (before - after).squeeze(-1)

    def metric(
        self, *, centered: bool = False, input_ridge: float = INPUT_RIDGE, output_ridge: float = OUTPUT_RIDGE
    ) -> Metric:
        """The metric of these data.

        Parameters
        ----------
        centered : bool
            About the mean input: what a bias can make good does not count.
        input_ridge, output_ridge : float
            What is added to the diagonals, relative to their mean.
        """
        inputs = self.inputs / self.count
        if centered and not self.is_lookup:
            inputs = inputs - self.mean[..., :, None] * self.mean[..., None, :]
        outputs = None
        if self.outputs is not None and self.reaches_output:
            outputs = _ridged(self.outputs / self.count, output_ridge)
        return Metric(_ridged(inputs, input_ridge), outputs)


def _outer(rows: Tensor, others: Tensor | None = None) -> Tensor:
    """The sum of the outer products of (positions, n) or (positions, groups, n), with themselves or with others.

    Of one batch, in at least float32, about the mean, which is added in float64: where inputs vary little about a
    large mean, what they vary by is not lost.
    """
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    pair = (rows, rows if others is None else others)
    left, right = ((one if one.dim() == 2 else one.movedim(1, 0)).detach().to(wide) for one in pair)
    count = left.shape[-2]
    first, second = (one.sum(-2, keepdim=True) / max(count, 1) for one in (left, right))
    left, right = left - first, right - second
    found = (left.mT @ right).double()
    first, second = first.double(), second.double()
    # Rounded means leave remainders.
    rest, other = (one.sum(-2, keepdim=True, dtype=torch.float64) for one in (left, right))
    return found + rest.mT @ second + first.mT @ (other + count * second)


def _ridged(form: Tensor, ridge: float) -> Tensor:
    """A form or weights, with a share of the mean of the diagonal added to it."""
    if form.dim() == 1:
        return form + ridge * form.mean()
    mean = form.diagonal(dim1=-2, dim2=-1).mean(-1)
    return form + ridge * mean[..., None, None] * torch.eye(form.shape[-1], dtype=form.dtype, device=form.device)
