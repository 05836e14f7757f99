"""The dense weight of two (groups of) cores, as one Triton kernel: a product that is written where it belongs.

    out[h, m, n] = sum_k left[h, m, k] right[h, k, n]

Each of h, m and n is a pair of indices with strides of their own, in an operand and in the result: of a tensor train
m = (o1, i1) and n = (o2, i2), and the result is the matrix [(o1 o2), (i1 i2)]. Operations of torch would write
[(o1 i1), (o2 i2)] and then copy all of it. `tensorlayers.rebuild` finds such a form.

On the CPU it runs in Triton's interpreter (``TRITON_INTERPRET=1``, set before Triton is imported).
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from tensorlayers.kernels.operands import elements, is_aligned, options, precision, strides
from tensorlayers.launch_tables import device_table
from tensorlayers.rebuild import Problem, launch


@triton.jit
@no_type_check
def rebuild_kernel(
    left, right, out,
    heads2, m, n, k, m2, n2,
    left_h1, left_h2, left_m1, left_m2, left_k,
    right_h1, right_h2, right_k, right_n1, right_n2,
    out_h1, out_h2, out_m1, out_m2, out_n1, out_n2,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, ONE_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a tile (M, N) of a head, of rows m = m1 m2 and columns n = n1 n2. ONE_K: k fits in one tile."""
    m_tiles, n_tiles = tl.cdiv(m, M), tl.cdiv(n, N)
    # Indices are divided in 32 bits, which is several times faster. Triton sees that as many of them in a row as divide
    # n2 are next to each other in memory.
    program = tl.program_id(0)
    rows = (program // n_tiles % m_tiles * M + tl.arange(0, M))[:, None]
    columns = (program % n_tiles * N + tl.arange(0, N))[None, :]
    head = program // n_tiles // m_tiles
    # 64-bit from here on: every offset below derives from these.
    first, second = (head // heads2).to(tl.int64), (head % heads2).to(tl.int64)
    row1, row2 = (rows // m2).to(tl.int64), (rows % m2).to(tl.int64)
    column1, column2 = (columns // n2).to(tl.int64), (columns % n2).to(tl.int64)
    inner = tl.arange(0, K).to(tl.int64)
    left += first * left_h1 + second * left_h2 + row1 * left_m1 + row2 * left_m2
    right += first * right_h1 + second * right_h2 + column1 * right_n1 + column2 * right_n2

    total = tl.zeros((M, N), tl.float32)
    for start in range(0, K if ONE_K else k, K):
        at = start + inner
        one = tl.load(left + at[None, :] * left_k, (rows < m) & (at < k)[None, :], 0.0)
        other = tl.load(right + at[:, None] * right_k, (at < k)[:, None] & (columns < n), 0.0)
        total = tl.dot(one, other, total, input_precision=PRECISION)

    out += first * out_h1 + second * out_h2 + row1 * out_m1 + row2 * out_m2 + column1 * out_n1 + column2 * out_n2
    tl.store(out, total.to(out.dtype.element_ty), (rows < m) & (columns < n))


def problem(left: Tensor, right: Tensor, out: Tensor) -> Problem:
    """What is to be launched for these operands; see `run`."""
    h1, h2, m1, m2, n1, n2 = out.shape
    dtype = elements("rebuild", (left, right, out))
    aligned = all(map(is_aligned, (left, right, out)))
    return Problem(h1 * h2, m1 * m2, n1 * n2, left.shape[-1], dtype, aligned)


def run(
    left: Tensor,  # (h1, h2, m1, m2, k)
    right: Tensor,  # (h1, h2, k, n1, n2)
    out: Tensor,  # (h1, h2, m1, m2, n1, n2)
) -> None:
    """Write the product into `out`; all strides are free (0 where an operand is expanded), all dtypes the same.

    It is fast where the last axis of `out` is contiguous. Sums are in float32.

    Raises
    ------
    KernelError
        If the dtypes differ, or are neither float16, bfloat16 nor float32, or are bfloat16 on the CPU.
    """
    dtype = elements("rebuild", (left, right, out))
    if out.numel() == 0:
        return
    sizes = problem(left, right, out)
    found = launch(sizes, device_table(out.device))
    tiles = found.tiles
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        rebuild_kernel[(found.programs,)](
            left, right, out,
            out.shape[1], sizes.m, sizes.n, sizes.k, out.shape[3], out.shape[5],
            *strides(left), *strides(right), *strides(out),
            tiles.m, tiles.n, tiles.k, sizes.k <= tiles.k, precision(dtype),
            **options(tiles.warps, tiles.stages),
        )  # fmt: skip
