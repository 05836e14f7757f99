"""The two-core tensor train times rows, as one Triton kernel: y_b = sum_r A_r x_b G_r.

With modes and ranks named as in `tensorlayers.formats`, A is (o1, i1, r), G is (r, o2, i2), a row of x is a matrix
(i1, i2) and a row of y a matrix (o1, o2):

    y[b, o1, o2] = sum_{r, i1, i2} A[o1, i1, r] x[b, i1, i2] G[r, o2, i2]

Every tensor is passed with its strides. So the gradient of x is the same kernel on A and G with o and i swapped, and
the order that contracts i2 first is the same kernel on transposed x and y with A and G in each other's place.
On the CPU it runs in Triton's interpreter (``TRITON_INTERPRET=1``, set before Triton is imported).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, no_type_check

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tensorlayers.errors import KernelError
from tensorlayers.kernels.tt2_dcores import tt2_dcore
from tensorlayers.network import Network

PROGRAMS = 256
"""With fewer programs than this, each takes fewer tokens: a large GPU's 132 processors run two at a time."""

WARPS = 4


class Tiles(NamedTuple):
    """A launch configuration: tokens a program, the tile of each mode, pipeline stages.

    `resident`: i1 and i2 fit in one tile each, so that a program loads its tokens once, before the loop over ranks.
    """

    tokens: int
    o1: int
    o2: int
    i1: int
    i2: int
    resident: bool
    stages: int


def choose_tiles(
    batch: int, out_modes: tuple[int, int], in_modes: tuple[int, int], *, half: bool, tf32: bool, aligned: bool
) -> Tiles:
    """The launch configuration for these sizes: static rules, from what compiles for sm_90 without spilling.

    `half`: the elements are of 16 bits; else they are float32, and `tf32` says whether to round products to tf32.
    `aligned`: x and y are addressed in vectors; one element at a time takes registers that tokens then go without.
    """
    (o1, o2), (i1, i2) = out_modes, in_modes
    if half and max(i1, i2) > 128:
        tiles = Tiles(2 if aligned else 1, 64, 64, 64, 64, False, 2)
    elif half:
        inner2 = _tile(max(i1, i2))
        large = inner2 == 128
        tile2 = max(_tile(o2), 64 if large else 32)
        columns = 256 >> (int(large) + int(not aligned))  # of accumulators: tokens x o2 tile
        tokens = min(4, max(1, columns // tile2))
        tiles = Tiles(tokens, 64, tile2, max(_tile(i1), inner2 // 2), inner2, True, 2 if large else 3)
    elif max(i1, i2) <= 32:
        tiles = Tiles(1, 64, 32, 32, 32, True, 2)
    else:
        tiles = Tiles(1, 64, 64, 32, 32, False, 2) if tf32 else Tiles(1, 32, 32, 16, 32, False, 2)
    blocks, tokens = _blocks(o1, tiles.o1) * _blocks(o2, tiles.o2), tiles.tokens
    while tokens > 1 and _blocks(batch, tokens) * blocks < PROGRAMS:
        tokens //= 2
    return tiles._replace(tokens=tokens)


def _tile(size: int) -> int:
    return 32 if size <= 32 else 64 if size <= 64 else 128


def _blocks(size: int, tile: int) -> int:
    return -(-size // tile)


@triton.jit
@no_type_check
def tt2_kernel(
    x, a, g, y,
    batch, o1, o2, i1, i2, rank,
    x_b, x_i1, x_i2,
    a_r, a_o1, a_i1,
    g_r, g_o2, g_i2,
    y_b, y_o1, y_o2,
    TOKENS: tl.constexpr, O1: tl.constexpr, O2: tl.constexpr, I1: tl.constexpr, I2: tl.constexpr,
    RESIDENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: TOKENS rows of y, a tile (O1, O2) of each.

    A and G must be zero-padded to multiples of their tiles: the loop over ranks then has no masks.
    """
    o1_tiles, o2_tiles = tl.cdiv(o1, O1), tl.cdiv(o2, O2)
    # 64-bit from here on: every offset below derives from these four.
    program = tl.program_id(0).to(tl.int64)
    rows = (program // o2_tiles % o1_tiles * O1 + tl.arange(0, O1))[:, None]
    columns = (program % o2_tiles * O2 + tl.arange(0, O2))[None, :]
    inner1 = tl.arange(0, I1).to(tl.int64)
    inner2 = tl.arange(0, I2).to(tl.int64)
    first = program // (o1_tiles * o2_tiles) * TOKENS

    # The interpreter refuses a scalar in a mask: tokens past the batch have a height of 0 instead.
    held = ()
    if RESIDENT:
        for t in tl.static_range(TOKENS):
            height = tl.where(first + t < batch, i1, 0)
            inside = (inner1 < height)[:, None] & (inner2 < i2)[None, :]
            place = x + (first + t) * x_b + inner1[:, None] * x_i1 + inner2[None, :] * x_i2
            held = held + (tl.load(place, inside, 0.0),)

    sums = ()
    for _ in tl.static_range(TOKENS):
        sums = sums + (tl.zeros((O1, O2), tl.float32),)
    a += rows * a_o1
    g += columns * g_o2
    for _ in range(rank):
        # With constant bounds, the compiler removes the loops of a resident launch, and pipelines the one over ranks.
        for k2 in range(0, I2 if RESIDENT else i2, I2):
            at2 = k2 + inner2
            right = tl.load(g + at2[:, None] * g_i2)
            grown = ()
            for t in tl.static_range(TOKENS):
                inner = tl.zeros((O1, I2), tl.float32)
                for k1 in range(0, I1 if RESIDENT else i1, I1):
                    at1 = k1 + inner1
                    left = tl.load(a + at1[None, :] * a_i1)
                    if RESIDENT:
                        token = held[t]
                    else:
                        height = tl.where(first + t < batch, i1, 0)
                        inside = (at1 < height)[:, None] & (at2 < i2)[None, :]
                        place = x + (first + t) * x_b + at1[:, None] * x_i1 + at2[None, :] * x_i2
                        token = tl.load(place, inside, 0.0)
                    inner = tl.dot(left, token, inner, input_precision=PRECISION)
                product = tl.dot(inner.to(right.dtype), right, sums[t], input_precision=PRECISION)
                grown = grown + (product,)
            sums = grown
        a += a_r
        g += g_r

    for t in tl.static_range(TOKENS):
        inside = (rows < tl.where(first + t < batch, o1, 0)) & (columns < o2)
        tl.store(y + (first + t) * y_b + rows * y_o1 + columns * y_o2, sums[t].to(y.dtype.element_ty), inside)


def launch(
    x: Tensor,  # (batch, i1, i2)
    a: Tensor,  # (o1, i1, r)
    g: Tensor,  # (r, o2, i2)
    out: Tensor,  # (batch, o1, o2)
) -> None:
    """Run the kernel into `out`, which is overwritten; all strides are free, all dtypes the same."""
    dtypes = {tensor.dtype for tensor in (x, a, g, out)}
    if len(dtypes) > 1 or not dtypes <= {torch.float16, torch.bfloat16, torch.float32}:
        raise KernelError(f"tt2: one dtype, float16, bfloat16 or float32; got {sorted(map(str, dtypes))}")
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        raise KernelError("tt2: Triton's interpreter computes bfloat16 wrongly; use float16 or float32 on the CPU")
    if out.numel() == 0:
        return
    if _cost(out, x) > _cost(out.mT, x.mT):  # then i2 is contracted first
        x, out, a, g = x.mT, out.mT, g.permute(1, 2, 0), a.permute(2, 0, 1)
    (batch, i1, i2), (_, o1, o2) = x.shape, out.shape
    half, aligned = x.dtype.itemsize == 2, _is_aligned(x) and _is_aligned(out)
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    tiles = choose_tiles(batch, (o1, o2), (i1, i2), half=half, tf32=tf32, aligned=aligned)
    a = _packed(a.permute(2, 0, 1), tiles.o1, tiles.i1)
    g = _packed(g, tiles.o2, tiles.i2)
    programs = _blocks(batch, tiles.tokens) * _blocks(o1, tiles.o1) * _blocks(o2, tiles.o2)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        tt2_kernel[(programs,)](
            x, a, g, out,
            batch, o1, o2, i1, i2, a.shape[0],
            *x.stride(), *a.stride(), *g.stride(), *out.stride(),
            *tiles[:-1], "tf32" if tf32 else "ieee",
            num_warps=WARPS, num_stages=tiles.stages, enable_fp_fusion=True,
        )  # fmt: skip


def _cost(out: Tensor, x: Tensor) -> int:
    """Multiply-accumulates of a token and rank where i1 is contracted first, o1 in tiles of 64."""
    (_, o1, o2), (_, i1, i2) = out.shape, x.shape
    return _blocks(o1, 64) * 64 * i2 * (i1 + o2)


def _is_aligned(matrices: Tensor) -> bool:
    """Whether Triton can see that a stack of matrices (batch, m, n) is addressable in vectors: multiples of 16."""
    axis = 2 if matrices.stride(2) == 1 else 1
    others = [stride for k, stride in enumerate(matrices.stride()) if k != axis]
    return matrices.stride(axis) == 1 and all(n % 16 == 0 for n in (matrices.shape[axis], *others))


def _packed(core: Tensor, rows: int, columns: int) -> Tensor:
    """A core (r, m, n), zero-padded to multiples of (rows, columns), one of its last two axes contiguous."""
    below, right = -core.shape[1] % rows, -core.shape[2] % columns
    if below or right:
        core = F.pad(core, (0, right, 0, below))
    return core if 1 in core.stride()[1:] else core.contiguous()


@torch.library.custom_op("tensorlayers::tt2", mutates_args=())
def tt2(x: Tensor, a: Tensor, g: Tensor) -> Tensor:
    """(batch, i1, i2), (o1, i1, r), (r, o2, i2) -> (batch, o1, o2); not differentiable by itself."""
    out = x.new_empty(x.shape[0], a.shape[0], g.shape[1])
    launch(x, a, g, out)
    return out


@tt2.register_fake
def _(x: Tensor, a: Tensor, g: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], a.shape[0], g.shape[1])


@tt2.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *operands: Tensor) -> tuple[Tensor, int]:
    x, a, g = operands
    if in_dims[0] is not None and in_dims[1:] == (None, None):
        x = x.movedim(in_dims[0], 0)
        return tt2(x.flatten(0, 1), a, g).unflatten(0, x.shape[:2]), 0
    pairs = list(zip(operands, in_dims, strict=True))
    ys = [tt2(*(t if dim is None else t.select(dim, k) for t, dim in pairs)) for k in range(info.batch_size)]
    return torch.stack(ys), 0


class _Product(torch.autograd.Function):
    """`tt2`, differentiable any number of times, and under `torch.func`; its gradients are `tt2` and `tt2_dcore`.

    In the gradient of x, o and i have changed places.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, a: Tensor, g: Tensor) -> Tensor:
        y: Tensor = tt2(x, a, g)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, a, g = ctx.saved_tensors
        of_x, of_a, of_g = ctx.needs_input_grad
        return (
            _product(dy, a.transpose(0, 1), g.transpose(1, 2)) if of_x else None,
            _of_a(dy, x, g) if of_a else None,
            _of_g(dy, x, a) if of_g else None,
        )


class _CoreGradient(torch.autograd.Function):
    """`tt2_dcore`, which is linear in each of its operands as `tt2` is; their gradients are the same two again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dy: Tensor, x: Tensor, g: Tensor) -> Tensor:
        da: Tensor = tt2_dcore(dy, x, g)
        return da

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, a: Tensor) -> tuple[Tensor | None, ...]:
        dy, x, g = ctx.saved_tensors
        of_dy, of_x, of_g = ctx.needs_input_grad
        return (
            _product(x, a, g) if of_dy else None,
            _product(dy, a.transpose(0, 1), g.transpose(1, 2)) if of_x else None,
            _of_g(dy, x, a) if of_g else None,
        )


def _product(x: Tensor, a: Tensor, g: Tensor) -> Tensor:
    y: Tensor = _Product.apply(x, a, g)  # type: ignore[no-untyped-call]
    return y


def _of_a(dy: Tensor, x: Tensor, g: Tensor) -> Tensor:
    """The gradient of A: (batch, o1, o2), (batch, i1, i2), (r, o2, i2) -> (o1, i1, r)."""
    da: Tensor = _CoreGradient.apply(dy, x, g)  # type: ignore[no-untyped-call]
    return da


def _of_g(dy: Tensor, x: Tensor, a: Tensor) -> Tensor:
    """The gradient of G, that of A with the two modes of all in each other's place: -> (r, o2, i2)."""
    return _of_a(dy.mT, x.mT, a.permute(2, 0, 1)).permute(2, 0, 1)


def linear(
    x: Tensor,  # (batch, network.features("in"))
    network: Network,
    cores: Sequence[Tensor],  # shapes network.core_shapes
) -> Tensor:  # (batch, network.features("out"))
    """Multiply rows with a tensor train of two cores: `functional.contract_rows`, as one kernel.

    Parameters
    ----------
    x : Tensor
        float16, bfloat16 or float32. Any strides.
    network : Network
        Of cores (o1, i1, r) and (r, o2, i2).
    cores : sequence of Tensor
        The dtype and device of `x`.

    Returns
    -------
    Tensor
        The dtype of `x`; accumulated in float32. What is kept for the backward is `x` and the cores.

    Raises
    ------
    KernelError
        If the dtypes differ, or are neither float16, bfloat16 nor float32, or are bfloat16 on the CPU.

    Notes
    -----
    For modes of up to 128, x is read once and y written once. float32 is multiplied in full precision unless
    ``torch.backends.cuda.matmul`` allows tf32.
    """
    matrices = x.reshape(x.shape[0], *network.mode_sizes("in"))
    a, g = cores
    return _product(matrices, a, g).reshape(x.shape[0], network.features("out"))
