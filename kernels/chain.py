"""A sum of chains of three matrices, as one Triton kernel: out = sum_t left_t middle_t right_t, for every head.

    out[h, m, n] = sum_{t, p, q} left[h, t, m, p] middle[h, t, p, q] right[h, t, q, n]

A head is a pair of indices, and every operand is passed with its strides, which are 0 where it does not depend on an
index. So the kernel is any product of three operands that `tensorlayers.chain` finds such a form for: two cores that
meet the rows of a layer, and the gradients of all three. What lies between the two products never leaves the chip.

Terms may be shared among programs, which leave float32 sums in memory. A second kernel adds those in a fixed order, so
that two runs agree bit by bit; there are no atomics. On the CPU both run in Triton's interpreter
(``TRITON_INTERPRET=1``, set before Triton is imported).
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from tensorlayers.activation import activation as activation_of
from tensorlayers.kernels.operands import elements, is_aligned, options, precision, strides
from tensorlayers.launch import launch
from tensorlayers.launch_tables import Problem, Table, device_table

PARTS, SIZE = 32, 128  # parts that a program of `finish_kernel` adds at a time, and elements


@triton.jit
@no_type_check
def activated(value, ACTIVATION: tl.constexpr):
    """An activation of float32 values; the names are those of `tensorlayers.activation`."""
    if ACTIVATION == "relu":
        value = tl.maximum(value, 0.0)
    elif ACTIVATION == "silu":
        value = value * tl.sigmoid(value)
    elif ACTIVATION == "gelu":
        value = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # tanh(u) = 2 sigmoid(2 u) - 1
        value = value * tl.sigmoid(1.5957691216057308 * (value + 0.044715 * value * value * value))
    return value


@triton.jit
@no_type_check
def chain_kernel(
    left, middle, right, out, bias,
    heads1, heads2, steps, share, m, n, p, q,
    left_h1, left_h2, left_t, left_m, left_p,
    middle_h1, middle_h2, middle_t, middle_p, middle_q,
    right_h1, right_h2, right_t, right_q, right_n,
    out_s, out_h1, out_h2, out_m, out_n,
    bias_h1, bias_h2, bias_m, bias_n,
    HEADS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    HELD: tl.constexpr, ONE_P: tl.constexpr, BIASED: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a tile (M, N) of HEADS heads, of `share` of the steps; a step is a term and a tile of q.

    HELD: p and q fit in one tile each and the middle is the same for all terms, so it is loaded once. ONE_P: p fits.
    """
    m_tiles, n_tiles = tl.cdiv(m, M), tl.cdiv(n, N)
    # 64-bit from here on: every offset below derives from these.
    program = tl.program_id(0).to(tl.int64)
    rows = (program // n_tiles % m_tiles * M + tl.arange(0, M))[:, None]
    columns = (program % n_tiles * N + tl.arange(0, N))[None, :]
    place = program // (m_tiles * n_tiles)
    second = place % heads2
    place = place // heads2
    blocks = tl.cdiv(heads1, HEADS)
    first = place % blocks * HEADS
    part = place // blocks
    inner1 = tl.arange(0, P).to(tl.int64)
    inner2 = tl.arange(0, Q).to(tl.int64)
    left += first * left_h1 + second * left_h2 + rows * left_m
    middle += first * middle_h1 + second * middle_h2
    right += first * right_h1 + second * right_h2 + columns * right_n

    # The interpreter refuses a scalar in a mask: heads past the last have a height of 0 instead.
    held = ()
    if HELD:
        for h in tl.static_range(HEADS):
            inside = (inner1 < tl.where(first + h < heads1, p, 0))[:, None] & (inner2 < q)[None, :]
            at_held = middle + h * middle_h1 + inner1[:, None] * middle_p + inner2[None, :] * middle_q
            held = held + (tl.load(at_held, inside, 0.0),)
    sums = ()
    for _ in tl.static_range(HEADS):
        sums = sums + (tl.zeros((M, N), tl.float32),)
    q_tiles = tl.cdiv(q, Q)
    for step in range(part * share, tl.minimum(part * share + share, steps)):
        if HELD:
            term, at2 = step, inner2
        else:
            term, at2 = step // q_tiles, step % q_tiles * Q + inner2
        at_right = right + term * right_t + at2[:, None] * right_q
        last = tl.load(at_right, (at2 < q)[:, None] & (columns < n), 0.0)
        if ONE_P:
            given = tl.load(left + term * left_t + inner1[None, :] * left_p, (rows < m) & (inner1 < p)[None, :], 0.0)
        grown = ()
        for h in tl.static_range(HEADS):
            inner = tl.zeros((M, Q), tl.float32)
            for k1 in range(0, P if ONE_P else p, P):
                at1 = k1 + inner1
                if not ONE_P:
                    at_left = left + term * left_t + at1[None, :] * left_p
                    given = tl.load(at_left, (rows < m) & (at1 < p)[None, :], 0.0)
                if HELD:
                    between = held[h]
                else:
                    inside = (at1 < tl.where(first + h < heads1, p, 0))[:, None] & (at2 < q)[None, :]
                    at = middle + h * middle_h1 + term * middle_t
                    between = tl.load(at + at1[:, None] * middle_p + at2[None, :] * middle_q, inside, 0.0)
                inner = tl.dot(given, between, inner, input_precision=PRECISION)
            grown = grown + (tl.dot(inner.to(last.dtype), last, sums[h], input_precision=PRECISION),)
        sums = grown

    out += part * out_s + second * out_h2 + rows * out_m + columns * out_n
    # Of a bias 32 bits address all, and take fewer registers.
    bias += second * bias_h2
    at_bias = rows.to(tl.int32) * bias_m + columns.to(tl.int32) * bias_n
    for h in tl.static_range(HEADS):
        inside = (rows < tl.where(first + h < heads1, m, 0)) & (columns < n)
        value = sums[h]
        if BIASED:
            value += tl.load(bias + (first + h) * bias_h1 + at_bias, inside, 0.0).to(tl.float32)
        value = activated(value, ACTIVATION)
        tl.store(out + (first + h) * out_h1, value.to(out.dtype.element_ty), inside)


@triton.jit
@no_type_check
def added(sums, parts, elements, place, inside, PARTS: tl.constexpr, SIZE: tl.constexpr):
    """Of so many parts the sum at each of SIZE places, PARTS at a time: each load is waited for."""
    inner = tl.arange(0, PARTS).to(tl.int64)
    total = tl.zeros((PARTS, SIZE), tl.float32)
    for first in range(0, parts, PARTS):
        part = first + inner
        at = part[:, None] * elements + place[None, :]
        total += tl.load(sums + at, (part < parts)[:, None] & inside[None, :], 0.0)
    return tl.sum(total, 0)


@triton.jit
@no_type_check
def finish_kernel(
    sums, out, bias, elements, parts, heads2, m, n,
    out_h1, out_h2, out_m, out_n,
    bias_h1, bias_h2, bias_m, bias_n,
    PARTS: tl.constexpr, SIZE: tl.constexpr, BIASED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Add the parts of (parts, heads1, heads2, m, n)."""
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < elements
    total = added(sums, parts, elements, place, inside, PARTS, SIZE)
    column, rest = place % n, place // n
    row, rest = rest % m, rest // m
    second, first_head = rest % heads2, rest // heads2
    if BIASED:
        at_bias = first_head * bias_h1 + second * bias_h2 + row * bias_m + column * bias_n
        total += tl.load(bias + at_bias, inside, 0.0).to(tl.float32)
    total = activated(total, ACTIVATION)
    at_out = first_head * out_h1 + second * out_h2 + row * out_m + column * out_n
    tl.store(out + at_out, total.to(out.dtype.element_ty), inside)


def finish(sums: Tensor, out: Tensor, bias: Tensor | None = None, activation: str = "none") -> None:
    """Write the sum of parts, (parts, heads1, heads2, m, n) in float32, to (heads1, heads2, m, n); see `run`."""
    given = out if bias is None else bias  # not read without one
    finish_kernel[(triton.cdiv(out.numel(), SIZE),)](
        sums, out, given, out.numel(), sums.shape[0], *out.shape[1:],
        *out.stride(), *given.stride(), PARTS, SIZE, bias is not None, activation,
    )  # fmt: skip


def problem(left: Tensor, middle: Tensor, right: Tensor, out: Tensor, activation: str = "none") -> Problem:
    """What is to be launched for these operands; see `run`."""
    h1, h2, terms, m, p = left.shape
    q, n = right.shape[3:]
    dtype = elements("chain", (left, middle, right, out))
    shared = h1 == 1 or left.stride(0) == right.stride(0) == 0
    held = terms == 1 or middle.stride(2) == 0
    aligned = all(is_aligned(operand, -1, -2) for operand in (left, middle, right, out))
    return Problem((h1, h2), terms, m, n, p, q, shared, held, dtype, aligned, activation != "none")


def run(
    left: Tensor,  # (heads1, heads2, terms, m, p)
    middle: Tensor,  # (heads1, heads2, terms, p, q)
    right: Tensor,  # (heads1, heads2, terms, q, n)
    out: Tensor,  # (heads1, heads2, m, n)
    bias: Tensor | None = None,  # the shape of out
    activation: str = "none",
    table: Table | None = None,
) -> None:
    """Write the sum of chains into `out`; all strides are free (0 where an operand is expanded), all dtypes the same.

    What is added and stored is computed in float32: the bias may be of any of the dtypes. Launches are those of a
    table, by default of the device's architecture.

    Raises
    ------
    KernelError
        If the dtypes differ, or are neither float16, bfloat16 nor float32, or are bfloat16 on the CPU.
    """
    dtype = elements("chain", (left, middle, right, out))
    if out.numel() == 0:
        return
    if left.numel() == 0 or right.numel() == 0:  # an empty sum
        out.copy_(activation_of(activation)(out.new_zeros(()) if bias is None else bias))
        return
    sizes = problem(left, middle, right, out, activation)
    table = table or device_table(out.device)
    found = launch(sizes, table)
    (h1, h2), tiles = sizes.heads, found.tiles
    biased = bias is not None
    given = out if bias is None else bias  # not read without one
    sums = out
    if found.parts > 1:
        sums = out.new_empty((found.parts, h1, h2, sizes.m, sizes.n), dtype=torch.float32)
    whole = found.parts == 1
    of_sums = (0, *strides(out)) if whole else sums.stride()
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        chain_kernel[(found.programs,)](
            left, middle, right, sums, given,
            h1, h2, found.steps, found.share, sizes.m, sizes.n, sizes.p, sizes.q,
            *strides(left), *strides(middle), *strides(right), *of_sums, *strides(given),
            tiles.heads, tiles.m, tiles.n, tiles.p, tiles.q, tiles.held, sizes.p <= tiles.p,
            biased and whole, activation if whole else "none", precision(dtype),
            **options(tiles.warps, tiles.stages),
        )  # fmt: skip
        if not whole:
            finish(sums, out, bias, activation)
