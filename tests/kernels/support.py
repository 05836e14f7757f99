"""What the tests of kernels in Triton's interpreter share: shapes, float64 references, a watch on memory.

The interpreter has no bfloat16 (it computes on bit patterns): inputs are rounded to bfloat16 and multiplied in float32
instead, and the bfloat16 kernels are compiled ahead of time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Relative RMS error. The inner product is rounded to float16 between the two factors, as torch rounds it.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3}
HALF, SINGLE = torch.float16, torch.float32


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative RMS error; NaN anywhere in `actual` gives NaN, which no tolerance admits."""
    assert actual.shape == expected.shape
    return float((actual.double() - expected).norm() / expected.norm())


def agree(found: Sequence[Tensor], truths: Sequence[Tensor], dtype: torch.dtype = SINGLE) -> bool:
    """Whether tensors are what they are to be, within the tolerance of the dtype."""
    pairs = zip(found, truths, strict=True)
    return all(error(mine.detach(), truth.detach()) < TOLERANCE[dtype] for mine, truth in pairs)


def within_nan(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of a tensor as a view into a larger NaN-filled block, and that block; what is expanded stays so."""
    # The margin keeps strides that are multiples of 16 what they are. A single index has none: blocks stay small.
    real = [stride != 0 and size != 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    pairs = list(zip(tensor.shape, real, strict=True))
    block = torch.full([size + 16 if is_real else 1 for size, is_real in pairs], math.nan, dtype=tensor.dtype)
    view = block[tuple(slice(2, 2 + size) if is_real else slice(1) for size, is_real in pairs)]
    given = tensor[tuple(slice(None) if is_real else slice(1) for is_real in real)]
    return view.copy_(given).expand(tensor.shape), block


class Watch:
    """The interpreter: every address that it touches within a block is checked to lie in that block's view.

    It counts the elements that are loaded from and stored to blocks, their bytes, and the FLOPs of matrix products.
    """

    def __init__(self, memory: Any) -> None:
        self._memory = memory
        self._blocks: list[tuple[Tensor, np.ndarray]] = []
        self.loaded = self.stored = self.flops = self.bytes = 0

    def counts(self) -> tuple[int, int, int]:
        return self.loaded, self.stored, self.flops

    def add(self, view: Tensor, block: Tensor) -> None:
        offsets = torch.zeros((), dtype=torch.int64)
        for size, stride in zip(view.shape, view.stride(), strict=True):
            offsets = offsets[..., None] + torch.arange(size) * stride
        first = (view.data_ptr() - block.data_ptr()) // view.element_size()
        inside = np.zeros(block.numel(), dtype=bool)
        inside[first + offsets.flatten().numpy()] = True
        self._blocks.append((block, inside))

    def sums(self, shape: Sequence[int]) -> Tensor:
        """Where programs write partial sums: float32 and contiguous, within a larger NaN-filled block; added."""
        count, margin = math.prod(shape), 64
        block = torch.full((count + 2 * margin,), math.nan)
        sums = block[margin : margin + count].view(*shape)
        self.add(sums, block)
        return sums

    def _check(self, pointers: np.ndarray, mask: np.ndarray) -> int:
        pointers = pointers[mask].astype(np.int64)
        touched = 0
        for block, inside in self._blocks:
            start = block.data_ptr()
            within = pointers[(start <= pointers) & (pointers < start + block.nbytes)] - start
            if not inside[within // block.element_size()].all():
                raise IndexError("memory beside a tensor is touched")
            touched += within.size
            self.bytes += within.size * block.element_size()
        return touched

    def load(self, pointers: np.ndarray, mask: np.ndarray, *rest: Any) -> Any:
        self.loaded += self._check(pointers, mask)
        return self._memory.load(pointers, mask, *rest)

    def store(self, pointers: np.ndarray, values: Any, mask: np.ndarray) -> Any:
        self.stored += self._check(pointers, mask)
        return self._memory.store(pointers, values, mask)

    def dot(self, create: Any, a: Any, b: Any, *rest: Any) -> Any:
        self.flops += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return create(a, b, *rest)
