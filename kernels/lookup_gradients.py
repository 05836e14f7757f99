"""The gradients of the cores of a lookup (see `lookup`), from that of its rows, without atomics.

The gradient of a core's slice is a sum over the ids that pick it. With the gradient G of the rows, each term is a chain
of the gradient and of the slices that the id picks of the other cores:

    dA[v1] (c1, r1) = sum_{id, c2} G[id, :, c2, :] (c1, c3)  C[v3]^T (c3, r2)       B[v2, :, c2, :]^T (r2, r1)
    dB[v2, c2] (r1, r2) = sum_{id} A[v1]^T (r1, c1)          G[id, :, c2, :] (c1, c3)  C[v3]^T (c3, r2)

dC is dA of the chain read backwards; of two cores it is ``dA[v1] = sum_{id} G[id] (c1, c2) C[v2]^T (c2, r)``.

The ids are sorted by the digit that picks the slice. Where the sorted ids are cut at every multiple of a share, and
where the digit changes, they fall into pieces of one digit `v` and one block `b` each. From piece to piece one of the
two grows, or both: so ``v + b`` numbers the pieces, with gaps, and there are at most as many as values and blocks
together. A program adds one piece in float32, however many ids have its digit. A second kernel adds the pieces of a
digit in a fixed order, so that two runs agree bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from tensorlayers.kernels.chain import added
from tensorlayers.kernels.lookup import (
    PROGRAMS,
    Counts,
    Shape,
    Tiles,
    are_aligned,
    configuration,
    shape,
    sites,
    tiles,
)
from tensorlayers.kernels.operands import elements, options, precision
from tensorlayers.launch import blocks
from tensorlayers.launch_tables import device_table

PARTS, SIZE = 16, 64  # pieces that a program of `finish_kernel` adds at a time, and elements that it takes


@triton.jit
@no_type_check
def _tile(base, at, inside, step, width, GIVEN: tl.constexpr, CUT: tl.constexpr):
    """A tile of a core's slice, or of a row of the gradient: offsets are then columns, the last ones may be cut off."""
    if GIVEN:
        if CUT:
            inside = inside & (at < width)
        at = at * step
    return tl.load(base + at, inside, 0.0)


@triton.jit(do_not_specialize=["share"])  # see `lookup.rows_kernel`
@no_type_check
def sums_kernel(
    left, middle, right, ids, order, starts, sums,
    searches, values, share, heads, terms, m, n, p, q, width, step,
    left_divisor, left_values, left_v, left_t, left_m, left_p,
    middle_divisor, middle_values, middle_v, middle_h, middle_p, middle_q,
    right_divisor, right_values, right_v, right_t, right_q, right_n,
    M: tl.constexpr, N: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    GIVEN: tl.constexpr, CHAINED: tl.constexpr, CUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a tile (M, N) of one head, of one piece; sums is (pieces, heads, m, n).

    GIVEN: which operand is the gradient of the rows, "left" or "middle"; `step` lies between its columns.
    """
    m_tiles, n_tiles = tl.cdiv(m, M), tl.cdiv(n, N)
    # 64-bit from here on: every offset below derives from these.
    program = tl.program_id(0).to(tl.int64)
    rows = (program // n_tiles % m_tiles * M + tl.arange(0, M))[:, None]
    columns = (program % n_tiles * N + tl.arange(0, N))[None, :]
    place = program // (m_tiles * n_tiles)  # (piece, head)
    head, piece = place % heads, place // heads
    inner1 = tl.arange(0, P).to(tl.int64)
    inner2 = tl.arange(0, Q).to(tl.int64)

    # The last digit whose first piece is not after this one.
    digit, most = piece * 0, piece * 0 + values - 1
    for _ in range(searches):
        tried = (digit + most + 1) // 2
        is_before = tl.load(starts + tried) // share + tried <= piece
        digit, most = tl.where(is_before, tried, digit), tl.where(is_before, most, tried - 1)
    block = piece - digit
    start = tl.maximum(tl.load(starts + digit), block * share)
    end = tl.minimum(tl.load(starts + digit + 1), block * share + share)

    q_tiles = tl.cdiv(q, Q)
    total = tl.zeros((M, N), tl.float32)
    for position in range(start, end):
        token = tl.load(order + position)
        id = tl.load(ids + token).to(tl.int64)
        at_left = left + (token if GIVEN == "left" else id // left_divisor % left_values) * left_v
        at_middle = middle + (token if GIVEN == "middle" else id // middle_divisor % middle_values) * middle_v
        at_right = right + id // right_divisor % right_values * right_v + columns * right_n
        for turn in range(0, terms * q_tiles):
            term = turn // q_tiles
            at2 = turn % q_tiles * Q + inner2
            last = tl.load(at_right + term * right_t + at2[:, None] * right_q, (at2 < q)[:, None] & (columns < n), 0.0)
            at = term * left_t + rows * left_m
            if CHAINED:
                inner = tl.zeros((M, Q), tl.float32)
                for k1 in range(0, p, P):
                    at1 = k1 + inner1
                    given = _tile(at_left, at + at1[None, :] * left_p, (rows < m) & (at1 < p)[None, :],
                                  step, width, GIVEN == "left", CUT)  # fmt: skip
                    between = _tile(at_middle, head * middle_h + at1[:, None] * middle_p + at2[None, :] * middle_q,
                                    (at1 < p)[:, None] & (at2 < q)[None, :],
                                    step, width, GIVEN == "middle", CUT)  # fmt: skip
                    inner = tl.dot(given, between, inner, input_precision=PRECISION)
                grown = inner.to(last.dtype)
            else:
                grown = _tile(at_left, at + at2[None, :] * left_p, (rows < m) & (at2 < q)[None, :],
                              step, width, GIVEN == "left", CUT)  # fmt: skip
            total = tl.dot(grown, last, total, input_precision=PRECISION)
    # A number without a piece is not read, nor written: the tile has a height of 0 then.
    inside = (rows < tl.where(start < end, m, 0)) & (columns < n)
    tl.store(sums + (place * m + rows) * n + columns, total, inside)


@triton.jit(do_not_specialize=["share"])
@no_type_check
def finish_kernel(
    sums, starts, out, share, heads, m, n,
    out_v, out_h, out_m, out_n,
    PARTS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Add the pieces of `sums_kernel` of each digit; of a digit without any the sum is 0."""
    size = heads * m * n
    tiles = tl.cdiv(size, SIZE)
    program = tl.program_id(0).to(tl.int64)
    digit = program // tiles
    place = program % tiles * SIZE + tl.arange(0, SIZE)
    start, end = tl.load(starts + digit), tl.load(starts + digit + 1)
    first = start // share
    pieces = tl.where(start < end, (end - 1) // share - first + 1, 0)
    inside = place < size
    total = added(sums + (digit + first) * size, pieces, size, place, inside, PARTS, SIZE)
    column, rest = place % n, place // n
    row, head = rest % m, rest // m
    at = digit * out_v + head * out_h + row * out_m + column * out_n
    tl.store(out + at, total.to(out.dtype.element_ty), inside)


# -- launching --------------------------------------------------------------------------------------------------------


class Pieces(NamedTuple):
    """Ids sorted by a digit, in pieces of at most `share`.

    Parameters
    ----------
    order : Tensor
        The positions of the ids as they are sorted.
    starts : Tensor
        (values + 1,): where each digit begins there, and the end.
    values, share : int
    numbers : int
        Above the number of each piece.
    """

    order: Tensor
    starts: Tensor
    values: int
    share: int
    numbers: int


def pieces(ids: Tensor, divisor: int, values: int, share: int) -> Pieces:
    """Sort ids by a digit; nothing waits for the values."""
    # Few bits are fewer passes of a radix sort.
    kind = torch.int16 if values < 2**15 else torch.int32
    digits, order = (ids // divisor % values).to(kind).sort(stable=True)
    starts = torch.searchsorted(digits, torch.arange(values + 1, dtype=kind, device=ids.device))
    return Pieces(order, starts, values, share, values + blocks(len(ids), share) - 1)


def _partial(out: Tensor, numbers: int) -> Tensor:
    """Where the sums of the pieces of a gradient are left."""
    return out.new_empty((numbers, *out.shape[1:]), dtype=torch.float32)


class _Operand(NamedTuple):
    """The slices of a core, or the rows of the gradient: how one is picked, and the strides of the chain from there."""

    tensor: Tensor
    divisor: int
    values: int
    strides: tuple[int, int, int, int]

    @property
    def numbers(self) -> tuple[int, ...]:
        """As the kernel takes them."""
        return (self.divisor, self.values, *self.strides)


class _Core(NamedTuple):
    """A core, as `lookup.Site.view` gives it, and its place values."""

    tensor: Tensor
    divisor: int
    spacing: int

    @property
    def backwards(self) -> _Core:
        """As the chain read backwards has it."""
        return self._replace(tensor=self.tensor.transpose(1, 3))

    def operand(self, third: str, *axes: str) -> _Operand:
        """Its slices, with these axes in the chain: "l" and "r" for the bonds, "c" for the columns, "" for none."""
        strides = dict(zip("vlcr", self.tensor.stride(), strict=True)) | {"": 0}
        picked = strides["v"], strides[third], strides[axes[0]], strides[axes[1]]
        return _Operand(self.tensor, self.divisor, self.tensor.shape[0], picked)


class _Given(NamedTuple):
    """The gradient of the rows, their ids, and whether all operands are addressed in vectors."""

    grad: Tensor
    ids: Tensor
    aligned: bool

    def operand(self, cores: Sequence[_Core]) -> _Operand:
        """The rows: first the axis of the core between, if there is one, then those of the first and of the last."""
        between = cores[1].spacing if len(cores) == 3 else 0
        return _Operand(self.grad, 1, 1, (self.grad.stride(0), between, cores[0].spacing, cores[-1].spacing))


def end_shape(of: Shape) -> Shape:
    """The chain of a term of the gradient of the first core, (m, n) (n, q) (q, p): terms of the sum are its heads."""
    m, heads, n, p, q, chained = of
    return Shape(m, heads, p, n, q, True) if chained else Shape(m, 1, q, 1, n, False)


def middle_shape(of: Shape) -> Shape:
    """The chain of a term of the gradient of the core between, (p, m) (m, n) (n, q) for each head."""
    return Shape(of.p, of.heads, of.q, of.m, of.n, True)


def share_of(count: int, heads: int, of: Shape, to: Tiles, processors: int) -> int:
    """How many ids a piece has at most, so that there are programs enough whatever the digits."""
    share: int = blocks(count * heads * blocks(of.m, to.m) * blocks(of.n, to.n), PROGRAMS * processors)
    return share


def counts(count: int, width: int, values: int, made: int, of: Shape, to: Tiles, position: int) -> Counts:
    """What the gradient of a core does, for `made` pieces of ids; their order and digits are not counted.

    `of`: `end_shape`, or of position 1 `middle_shape`.
    """
    m_tiles, n_tiles = blocks(of.m, to.m), blocks(of.n, to.n)
    p_tiles, q_tiles = blocks(of.p, to.p), blocks(of.q, to.q)
    flops = 2 * to.m * to.q * (to.n + (p_tiles * to.p if of.chained else 0)) * q_tiles
    if position == 1:
        left, middle, right = of.m * of.p * of.heads * q_tiles, width, of.q * of.n * of.heads
        middle *= m_tiles
        size = of.heads * of.m * of.n
    else:
        left, right = width * (q_tiles if of.chained else 1), of.q * of.n * of.heads
        middle = of.p * of.q * of.heads * m_tiles if of.chained else 0
        size = of.m * of.n
    loaded = left * n_tiles + middle * n_tiles + right * m_tiles
    sums = made * size
    return Counts(count * of.heads * m_tiles * n_tiles * flops, count * loaded + sums, sums + values * size)


def _launch(
    given: _Given, left: _Operand, middle: _Operand, right: _Operand, divisor: int, out: Tensor, of: Shape
) -> None:
    """Write the gradient of a core, (values, heads, m, n). Its heads are those of `of`, or these are terms of a sum."""
    grad, ids, aligned = given
    values, heads, m, n = out.shape
    dtype = elements("lookup_gradients", (grad, out))
    table = device_table(out.device)
    to = tiles(of, configuration("lookup_gradients", dtype, table), aligned)
    cut = pieces(ids, divisor, values, share_of(len(ids), heads, of, to, table.processors))
    sums = _partial(out, cut.numbers)
    is_left = left.tensor is grad
    features = of.heads * ((of.m * (of.p if of.chained else of.q)) if is_left else of.p * of.q)
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        sums_kernel[(cut.numbers * heads * blocks(m, to.m) * blocks(n, to.n),)](
            left.tensor, middle.tensor, right.tensor, ids, cut.order, cut.starts, sums,
            values.bit_length(), values, cut.share, heads, of.heads // heads, m, n, of.p, of.q, *grad.shape[1:],
            grad.stride(1), *left.numbers, *middle.numbers, *right.numbers,
            to.m, to.n, to.p, to.q, "left" if is_left else "middle", of.chained, grad.shape[1] < features,
            precision(dtype), **options(to.warps, to.stages, many_registers=True),
        )  # fmt: skip
        finish_kernel[(values * blocks(heads * m * n, SIZE),)](
            sums, cut.starts, out, cut.share, heads, m, n, *out.stride(), PARTS, SIZE
        )


def _of_end(given: _Given, cores: Sequence[_Core], out: Tensor) -> None:
    """Write the gradient of the first core."""
    last = cores[-1].operand("", "c", "l")
    right = cores[1].operand("c", "r", "l") if len(cores) == 3 else last
    of = end_shape(shape([core.tensor.shape for core in cores]))
    # Of two cores, the one in the middle is not read.
    _launch(given, given.operand(cores), last, right, cores[0].divisor, out, of)


def _of_middle(given: _Given, cores: Sequence[_Core], out: Tensor) -> None:
    """Write the gradient of the core between."""
    left, right = cores[0].operand("", "r", "c"), cores[2].operand("", "c", "l")
    of = middle_shape(shape([core.tensor.shape for core in cores]))
    _launch(given, left, given.operand(cores), right, cores[1].divisor, out.transpose(1, 2), of)


def run(
    grad: Tensor, ids: Tensor, cores: Sequence[Tensor], chain: Sequence[int], needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients of the cores that need one, from that of the rows, (n, width).

    Other parameters, and errors: see `lookup.run`.
    """
    elements("lookup_gradients", (grad, *cores))
    found = [torch.empty_like(core) if is_needed else None for core, is_needed in zip(cores, needs, strict=True)]
    write(grad, ids, cores, chain, found)
    return [out for out in found if out is not None]


def write(
    grad: Tensor, ids: Tensor, cores: Sequence[Tensor], chain: Sequence[int], found: Sequence[Tensor | None]
) -> None:
    """`run` into tensors of any strides."""
    along = sites(chain)
    forwards = [_Core(site.view(cores[site.core]), site.divisor, site.spacing) for site in along]
    backwards = [core.backwards for core in reversed(forwards)]
    given = _Given(grad, ids.contiguous(), are_aligned([core.tensor for core in forwards], along, grad))
    for position, site in enumerate(along):
        out = found[site.core]
        if out is None:
            continue
        if not grad.numel():
            out.zero_()
        elif position == 0:
            _of_end(given, forwards, site.view(out))
        elif position == len(along) - 1:
            _of_end(given, backwards, site.view(out).transpose(1, 3))
        else:
            _of_middle(given, forwards, site.view(out))


@torch.library.custom_op("tensorlayers::lookup_gradients", mutates_args=())
def lookup_gradients(
    grad: Tensor, ids: Tensor, cores: Sequence[Tensor], chain: Sequence[int], needs: Sequence[bool]
) -> list[Tensor]:
    """`run`, not differentiable by itself."""
    return run(grad, ids, cores, chain, needs)


@lookup_gradients.register_fake
def _(grad: Tensor, ids: Tensor, cores: Sequence[Tensor], chain: Sequence[int], needs: Sequence[bool]) -> list[Tensor]:
    return [torch.empty_like(core) for core, is_needed in zip(cores, needs, strict=True) if is_needed]
