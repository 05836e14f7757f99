"""Rows times the Khatri-Rao product of two matrices, which is formed nowhere: two Triton kernels, for CP layers.

    contract:   z[b, r] = sum_{i1, i2} x[b, i1, i2] u[i1, r] v[i2, r]
    expand:     y[b, o1, o2] = sum_r z[b, r] p[o1, r] q[o2, r]

The Khatri-Rao product, features x rank, appears in neither: a row is a matrix, and to scale what it is multiplied with
is cheaper. contract sums ``u * (x[b] v)`` over i1, elementwise after a product of matrices; expand is
``(p * z[b]) q^T``, elementwise before one. That takes a multiplication for every row, one mode and the rank, not for
both modes, and no row is padded to a tile of rows. With in and out swapped, the two are the gradients of z and of x.

What is contracted may be shared among programs, which leave float32 sums in memory. A third kernel adds those in a
fixed order, so that two runs agree bit by bit; there are no atomics. On the CPU all run in Triton's interpreter
(``TRITON_INTERPRET=1``, set before Triton is imported).
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from tensorlayers.activation import activation as activation_of
from tensorlayers.chain import packed
from tensorlayers.fused_khatri_rao import Launch, contract_launch, expand_launch
from tensorlayers.kernels.chain import finish
from tensorlayers.kernels.operands import elements, options, precision
from tensorlayers.launch_tables import device_table


@triton.jit
@no_type_check
def contract_kernel(
    x, u, v, out,
    batch, rows, share, i1, i2, rank,
    x_b, x_i1, x_i2,
    u_i1, u_r,
    v_i2, v_r,
    out_s, out_b, out_r,
    R: tl.constexpr, I1: tl.constexpr, I2: tl.constexpr, HELD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a tile R of the rank, `rows` rows one after another, `share` of the tiles of i1.

    HELD: it takes one tile of i1, and i2 fits in one, so that u and v are loaded once, before the loop over rows.
    """
    r_tiles, blocks = tl.cdiv(rank, R), tl.cdiv(batch, rows)
    # 64-bit from here on: every offset below derives from these.
    program = tl.program_id(0).to(tl.int64)
    ranks = program % r_tiles * R + tl.arange(0, R)
    place = program // r_tiles
    first = place % blocks * rows
    part = place // blocks
    steps = tl.minimum(share, tl.cdiv(i1, I1) - part * share)
    inner1 = tl.arange(0, I1).to(tl.int64)
    inner2 = tl.arange(0, I2).to(tl.int64)
    u += ranks[:, None] * u_r
    v += ranks[:, None] * v_r
    out += part * out_s + ranks * out_r
    if HELD:
        at1 = part * I1 + inner1
        scale = tl.load(u + at1[None, :] * u_i1, (ranks < rank)[:, None] & (at1 < i1)[None, :], 0.0)
        factor = tl.load(v + inner2[None, :] * v_i2, (ranks < rank)[:, None] & (inner2 < i2)[None, :], 0.0)

    for row in range(first, tl.minimum(first + rows, batch)):
        total = tl.zeros((R,), tl.float32)
        for step in range(0, 1 if HELD else steps):
            if not HELD:
                at1 = (part * share + step) * I1 + inner1
            inner = tl.zeros((R, I1), tl.float32)
            for k2 in range(0, I2 if HELD else i2, I2):
                at2 = k2 + inner2
                if not HELD:
                    factor = tl.load(v + at2[None, :] * v_i2, (ranks < rank)[:, None] & (at2 < i2)[None, :], 0.0)
                at = x + row * x_b + at2[:, None] * x_i2 + at1[None, :] * x_i1
                given = tl.load(at, (at2 < i2)[:, None] & (at1 < i1)[None, :], 0.0)
                inner = tl.dot(factor, given, inner, input_precision=PRECISION)
            if not HELD:
                scale = tl.load(u + at1[None, :] * u_i1, (ranks < rank)[:, None] & (at1 < i1)[None, :], 0.0)
            total += tl.sum(inner * scale.to(tl.float32), 1)
        tl.store(out + row * out_b, total.to(out.dtype.element_ty), ranks < rank)


@triton.jit
@no_type_check
def expand_kernel(
    z, p, q, out, bias,
    batch, steps, share, o1, o2, rank,
    z_b, z_r,
    p_o1, p_r,
    q_o2, q_r,
    out_s, out_b, out_o1, out_o2,
    bias_o1, bias_o2,
    ROWS: tl.constexpr, O1: tl.constexpr, O2: tl.constexpr, R: tl.constexpr,
    BIASED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a tile (O1, O2) of ROWS rows, of `share` of the tiles of the rank."""
    o1_tiles, o2_tiles, blocks = tl.cdiv(o1, O1), tl.cdiv(o2, O2), tl.cdiv(batch, ROWS)
    # 64-bit from here on: every offset below derives from these.
    program = tl.program_id(0).to(tl.int64)
    rows = (program // o2_tiles % o1_tiles * O1 + tl.arange(0, O1))[:, None]
    columns = (program % o2_tiles * O2 + tl.arange(0, O2))[None, :]
    place = program // (o1_tiles * o2_tiles)
    first = place % blocks * ROWS
    part = place // blocks
    inner = tl.arange(0, R).to(tl.int64)

    sums = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros((O1, O2), tl.float32),)
    for step in range(part * share, tl.minimum(part * share + share, steps)):
        at = step * R + inner
        left = tl.load(p + rows * p_o1 + at[None, :] * p_r, (rows < o1) & (at < rank)[None, :], 0.0)
        right = tl.load(q + at[:, None] * q_r + columns * q_o2, (at < rank)[:, None] & (columns < o2), 0.0)
        grown = ()
        for h in tl.static_range(ROWS):
            # The interpreter refuses a scalar in a mask: rows past the last have a rank of 0 instead.
            inside = at < tl.where(first + h < batch, rank, 0)
            given = tl.load(z + (first + h) * z_b + at * z_r, inside, 0.0).to(tl.float32)
            scaled = (left.to(tl.float32) * given[None, :]).to(right.dtype)
            grown = grown + (tl.dot(scaled, right, sums[h], input_precision=PRECISION),)
        sums = grown

    out += part * out_s + rows * out_o1 + columns * out_o2
    for h in tl.static_range(ROWS):
        inside = (rows < tl.where(first + h < batch, o1, 0)) & (columns < o2)
        value = sums[h]
        if BIASED:
            value += tl.load(bias + rows * bias_o1 + columns * bias_o2, inside, 0.0).to(tl.float32)
        tl.store(out + (first + h) * out_b, value.to(out.dtype.element_ty), inside)


def contract(
    x: Tensor,  # (batch, i1, i2)
    u: Tensor,  # (i1, r)
    v: Tensor,  # (i2, r)
    out: Tensor,  # (batch, r)
) -> None:
    """Write z into `out`, which may be float32 whatever the dtype of the others; all strides are free.

    Raises
    ------
    KernelError
        If the dtypes differ, or are neither float16, bfloat16 nor float32, or are bfloat16 on the CPU.
    """
    dtype = elements("contract", (x, u, v), out)
    if 0 in (out.numel(), x.numel()):  # an empty sum
        out.zero_()
        return
    u, v = packed(u), packed(v)
    batch, i1, i2 = x.shape
    table = device_table(out.device)
    found = contract_launch(batch, i1, i2, u.shape[1], dtype, table)
    sums = out if found.parts == 1 else _sums(found, out)
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        contract_kernel[(found.programs,)](
            x, u, v, sums,
            batch, found.rows, found.share, i1, i2, u.shape[1],
            *x.stride(), *u.stride(), *v.stride(), *_strides(sums, out),
            *found.tiles, found.held, precision(dtype),
            **options(found.warps, found.stages, many_registers=dtype == "float32"),
        )  # fmt: skip
        if sums is not out:
            finish(sums[:, :, None, None], out[:, None, None])


def expand(
    z: Tensor,  # (batch, r)
    p: Tensor,  # (o1, r)
    q: Tensor,  # (o2, r)
    out: Tensor,  # (batch, o1, o2)
    bias: Tensor | None = None,  # (o1, o2)
    activation: str = "none",
) -> None:
    """Write y into `out`; z and the bias may be float32 whatever the dtype of the others; all strides are free.

    What is added and stored is computed in float32.

    Raises
    ------
    KernelError
        As `contract`.
    """
    dtype = elements("expand", (p, q, out), z)
    if 0 in (out.numel(), z.numel()):  # an empty sum
        out.copy_(activation_of(activation)(out.new_zeros(()) if bias is None else bias))
        return
    p, q = packed(p), packed(q)
    batch, o1, o2 = out.shape
    table = device_table(out.device)
    found = expand_launch(batch, o1, o2, z.shape[1], dtype, table)
    given = out[0] if bias is None else bias  # not read without one
    # To address single elements, or to activate them, takes registers that hold sums there; `finish` has them.
    is_whole = found.parts == 1 and out.stride(2) == given.stride(1) == 1 and activation == "none"
    sums = out if is_whole else _sums(found, out)
    is_biased = bias is not None and is_whole
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        expand_kernel[(found.programs,)](
            z, p, q, sums, given,
            batch, found.steps, found.share, o1, o2, z.shape[1],
            *z.stride(), *p.stride(), *q.stride(), *_strides(sums, out), *given.stride(),
            found.rows, *found.tiles, is_biased, precision(dtype),
            **options(found.warps, found.stages),
        )  # fmt: skip
        if sums is not out:
            along = None if bias is None else bias[None, None].expand(out.shape[0], 1, -1, -1)
            finish(sums[:, :, None], out[:, None], along, activation)


def _sums(found: Launch, out: Tensor) -> Tensor:
    """Where programs write the sums of parts."""
    return out.new_empty((found.parts, *out.shape), dtype=torch.float32)


def _strides(sums: Tensor, out: Tensor) -> tuple[int, ...]:
    return (0, *out.stride()) if sums is out else sums.stride()
