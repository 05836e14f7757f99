"""The gradient of a core of a two-core tensor train, as one Triton kernel.

With the modes and ranks of `tt2`, the gradient of A is

    dA[o1, i1, r] = sum_{b, i2} P[b, o1, i2] x[b, i1, i2],    P[b, o1, i2] = sum_{o2} dy[b, o1, o2] G[r, o2, i2]

and that of G is the same on transposed rows, with A in the place of G. A program takes one rank, a tile of the gradient
and a share of the rows, and adds in float32 on the chip: P never leaves it. The shares are added in a fixed order
afterwards, so that two runs agree bit by bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from tensorlayers.errors import KernelError

PROGRAMS = 512
"""The rows are shared among programs until there are this many: a large GPU's 132 processors run two to four at a
time."""

WARPS = 4


class Tiles(NamedTuple):
    """A launch configuration: the tile of each mode, pipeline stages.

    `resident`: o2 and i2 fit in one tile each, so that a program loads its rank of G once, before the loop over rows.
    """

    o1: int
    i1: int
    o2: int
    i2: int
    resident: bool
    stages: int


def choose_tiles(out_modes: tuple[int, int], in_modes: tuple[int, int], *, half: bool, tf32: bool) -> Tiles:
    """The launch configuration for these sizes: static rules, from what compiles for sm_90 without spilling.

    `half`: the elements are of 16 bits; else they are float32, and `tf32` says whether to round products to tf32.
    """
    (_, o2), (_, i2) = out_modes, in_modes
    if half and max(o2, i2) <= 64:
        side = 32 if max(o2, i2) <= 32 else 64
        return Tiles(64, 64, side, side, True, 3)
    if half:
        return Tiles(64, 64, 32, 64, False, 3)
    if tf32:
        return Tiles(64, 32, 32, 32, max(o2, i2) <= 32, 2)
    return Tiles(32, 32, 16, 16, False, 1)


@triton.jit
@no_type_check
def tt2_dcore_kernel(
    dy, x, g, out,
    batch, share, o1, o2, i1, i2, rank,
    dy_b, dy_o1, dy_o2,
    x_b, x_i1, x_i2,
    g_r, g_o2, g_i2,
    O1: tl.constexpr, I1: tl.constexpr, O2: tl.constexpr, I2: tl.constexpr,
    RESIDENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a tile (O1, I1) of the gradient for one rank, of `share` rows; out is (shares, rank, o1, i1)."""
    o1_tiles, i1_tiles = tl.cdiv(o1, O1), tl.cdiv(i1, I1)
    # 64-bit from here on: every offset below derives from these.
    program = tl.program_id(0).to(tl.int64)
    rows = (program % o1_tiles * O1 + tl.arange(0, O1))[:, None]
    columns = (program // o1_tiles % i1_tiles * I1 + tl.arange(0, I1))[None, :]
    place = program // (o1_tiles * i1_tiles)  # (share, rank)
    first = place // rank * share
    outer2 = tl.arange(0, O2).to(tl.int64)
    inner2 = tl.arange(0, I2).to(tl.int64)
    g += place % rank * g_r
    held = tl.zeros((O2, I2), g.dtype.element_ty)
    if RESIDENT:
        inside = (outer2 < o2)[:, None] & (inner2 < i2)[None, :]
        held = tl.load(g + outer2[:, None] * g_o2 + inner2[None, :] * g_i2, inside, 0.0)

    total = tl.zeros((O1, I1), tl.float32)
    for token in range(first, tl.minimum(first + share, batch)):
        for k2 in range(0, I2 if RESIDENT else i2, I2):
            at2 = k2 + inner2
            inner = tl.zeros((O1, I2), tl.float32)
            for k1 in range(0, O2 if RESIDENT else o2, O2):
                at1 = k1 + outer2
                left = tl.load(dy + token * dy_b + rows * dy_o1 + at1[None, :] * dy_o2,
                               (rows < o1) & (at1 < o2)[None, :], 0.0)  # fmt: skip
                if RESIDENT:
                    right = held
                else:
                    inside = (at1 < o2)[:, None] & (at2 < i2)[None, :]
                    right = tl.load(g + at1[:, None] * g_o2 + at2[None, :] * g_i2, inside, 0.0)
                inner = tl.dot(left, right, inner, input_precision=PRECISION)
            other = tl.load(x + token * x_b + at2[:, None] * x_i2 + columns * x_i1,
                            (at2 < i2)[:, None] & (columns < i1), 0.0)  # fmt: skip
            total = tl.dot(inner.to(other.dtype), other, total, input_precision=PRECISION)
    tl.store(out + (place * o1 + rows) * i1 + columns, total, (rows < o1) & (columns < i1))


def launch(
    dy: Tensor,  # (batch, o1, o2)
    x: Tensor,  # (batch, i1, i2)
    g: Tensor,  # (r, o2, i2)
) -> Tensor:  # (shares, r, o1, i1), float32
    """Run the kernel; all strides are free, all dtypes the same. The gradient is the sum over the shares."""
    dtypes = {tensor.dtype for tensor in (dy, x, g)}
    if len(dtypes) > 1 or not dtypes <= {torch.float16, torch.bfloat16, torch.float32}:
        raise KernelError(f"tt2_dcore: one dtype, float16, bfloat16 or float32; got {sorted(map(str, dtypes))}")
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        raise KernelError("tt2_dcore: Triton's interpreter computes bfloat16 wrongly; use float16 or float32 there")
    (batch, o1, o2), (_, i1, i2), rank = dy.shape, x.shape, g.shape[0]
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    tiles = choose_tiles((o1, o2), (i1, i2), half=x.dtype.itemsize == 2, tf32=tf32)
    blocks = -(-o1 // tiles.o1) * -(-i1 // tiles.i1) * rank
    share = max(1, -(-batch * blocks // PROGRAMS))
    shares = -(-batch // share)
    out = x.new_empty(shares, rank, o1, i1, dtype=torch.float32)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        tt2_dcore_kernel[(blocks * shares,)](
            dy, x, g, out,
            batch, share, o1, o2, i1, i2, rank,
            *dy.stride(), *x.stride(), *g.stride(),
            *tiles[:-1], "tf32" if tf32 else "ieee",
            num_warps=WARPS, num_stages=tiles.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out


@torch.library.custom_op("tensorlayers::tt2_dcore", mutates_args=())
def tt2_dcore(dy: Tensor, x: Tensor, g: Tensor) -> Tensor:
    """(batch, o1, o2), (batch, i1, i2), (r, o2, i2) -> (o1, i1, r); not differentiable by itself."""
    return launch(dy, x, g).sum(0).to(x.dtype).permute(1, 2, 0).contiguous()


@tt2_dcore.register_fake
def _(dy: Tensor, x: Tensor, g: Tensor) -> Tensor:
    return x.new_empty(dy.shape[1], x.shape[1], g.shape[0])


@tt2_dcore.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *operands: Tensor) -> tuple[Tensor, int]:
    pairs = list(zip(operands, in_dims, strict=True))
    found = [tt2_dcore(*(t if d is None else t.select(d, k) for t, d in pairs)) for k in range(info.batch_size)]
    return torch.stack(found), 0
