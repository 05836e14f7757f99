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

from tensorlayers import contraction
from tensorlayers.network import Network, linear_modes

# Relative RMS error. The inner product is rounded to float16 between the two factors, as torch rounds it.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3}
HALF, SINGLE = torch.float16, torch.float32

# (o1, o2), (i1, i2), rank, batch
SHAPES = {
    "ones": ((1, 1), (1, 1), 1, 1),
    "tiny": ((2, 3), (3, 2), 2, 3),
    "primes": ((7, 13), (11, 5), 3, 7),
    "size-1 modes": ((1, 37), (41, 1), 3, 2),
    "a row": ((1, 1), (5, 7), 2, 3),
    "a column": ((7, 5), (1, 1), 2, 3),
    "whole tiles": ((64, 64), (64, 64), 2, 7),
    "beyond one output tile": ((67, 131), (33, 5), 2, 3),
    "128 inner": ((3, 65), (66, 127), 2, 3),
    "beyond one inner tile": ((3, 5), (131, 133), 1, 3),
    "beyond one inner tile, aligned": ((16, 16), (144, 16), 1, 3),
    "i2 first": ((66, 3), (3, 40), 2, 3),
}
# float32 has tiles of its own, the smallest 16, and costs more programs.
SINGLE_SHAPES = {name: SHAPES[name] for name in ("ones", "tiny", "primes", "size-1 modes", "i2 first")} | {
    "beyond one output tile": ((65, 33), (7, 5), 2, 3),
    "beyond one inner tile": ((3, 5), (35, 37), 2, 3),
}
CASES = [(SINGLE, *shape) for shape in SINGLE_SHAPES.values()] + [(HALF, *shape) for shape in SHAPES.values()]
NAMES = [f"float32-{name}" for name in SINGLE_SHAPES] + [f"float16-{name}" for name in SHAPES]


def tt(out_modes: tuple[int, int], in_modes: tuple[int, int], rank: int) -> Network:
    return Network((("o1", "i1", "r1"), ("r1", "o2", "i2")), {"r1": rank}, linear_modes(out_modes, in_modes))


def draw(network: Network, batch: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x (batch, in features) and the cores."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, network.features("in")), *network.core_shapes)
    x, a, g = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return x, a, g


def dense(network: Network, cores: Sequence[Tensor]) -> Tensor:
    """W in float64, (out features, in features)."""
    weight = contraction.to_dense(network, [core.double() for core in cores])
    return weight.reshape(network.features("out"), network.features("in"))


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative RMS error; NaN anywhere in `actual` gives NaN, which no tolerance admits."""
    assert actual.shape == expected.shape
    return float((actual.double() - expected).norm() / expected.norm())


def within_nan(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of a 3-d tensor as a view into a larger NaN-filled block, and that block."""
    # The margin keeps strides that are multiples of 16 (see tt2._is_aligned) what they are.
    block = torch.full([size + 16 for size in tensor.shape], math.nan, dtype=tensor.dtype)
    view = block[tuple(slice(2, 2 + size) for size in tensor.shape)]
    return view.copy_(tensor), block


class Watch:
    """The interpreter's memory, with every address it touches within a block checked to lie in that block's view."""

    def __init__(self, memory: Any) -> None:
        self._memory = memory
        self._blocks: list[tuple[Tensor, np.ndarray]] = []
        self.touched = 0

    def add(self, view: Tensor, block: Tensor) -> None:
        offsets = torch.zeros((), dtype=torch.int64)
        for size, stride in zip(view.shape, view.stride(), strict=True):
            offsets = offsets[..., None] + torch.arange(size) * stride
        self._blocks.append((block, view.data_ptr() + view.element_size() * offsets.flatten().numpy()))

    def _check(self, pointers: np.ndarray, mask: np.ndarray) -> None:
        pointers = pointers[mask].astype(np.int64)
        for block, addresses in self._blocks:
            start = block.data_ptr()
            within = pointers[(start <= pointers) & (pointers < start + block.nbytes)]
            if not np.isin(within, addresses).all():
                raise IndexError("memory beside a tensor is touched")
            self.touched += within.size

    def load(self, pointers: np.ndarray, mask: np.ndarray, *rest: Any) -> Any:
        self._check(pointers, mask)
        return self._memory.load(pointers, mask, *rest)

    def store(self, pointers: np.ndarray, values: Any, mask: np.ndarray) -> Any:
        self._check(pointers, mask)
        return self._memory.store(pointers, values, mask)
