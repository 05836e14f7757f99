"""The lookup kernels in Triton's interpreter, against float64.

Not collected by itself: test_interpreted.py runs this file in a process of its own, with ``TRITON_INTERPRET=1``.
bfloat16, which the interpreter lacks, is rounded to and multiplied in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tensorlayers.kernels import lookup, lookup_gradients
from tensorlayers.network import Mode, Network
from tests.kernels.support import HALF, SINGLE, TOLERANCE, Watch, agree, error, within_nan

SIDE = {"side": 16, "rank": 16, "warp": 512, "ragged_rank": 16, "ragged_warp": 256, "stages": 1, "ids": 2}
"""The smallest tiles, so that small sizes are beyond one."""

# Row modes, column modes (0: none on that core), ranks, columns that are wanted, number of ids.
SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int, int]] = {
    "two: ones": ((1, 1), (1, 1), (1,), 1, 1),
    "two: primes, padded": ((5, 7), (3, 5), (3,), 13, 4),
    "two: beyond one tile": ((2, 3), (17, 19), (18,), 320, 3),
    "two: multiples of 16": ((2, 2), (16, 16), (16,), 256, 2),
    "two: no columns at the end": ((3, 4), (11, 0), (5,), 11, 3),
    "three: ones": ((1, 1, 1), (1, 1, 1), (1, 1), 1, 2),
    "three: primes, padded": ((2, 3, 2), (3, 2, 5), (2, 3), 23, 5),
    "three: beyond one tile": ((1, 2, 1), (17, 2, 18), (19, 17), 600, 2),
    "three: no columns between": ((3, 2, 2), (5, 0, 3), (2, 4), 15, 3),
}
CASES = [(name, SINGLE) for name in SHAPES]
CASES += [("two: beyond one tile", HALF), ("two: multiples of 16", HALF), ("three: primes, padded", HALF)]


@pytest.fixture
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (lookup, lookup_gradients):
        monkeypatch.setattr(module, "configuration", lambda *_: SIDE)


def few_programs(monkeypatch: pytest.MonkeyPatch, ids: int, share: int, heads: int | None = None) -> None:
    monkeypatch.setattr(lookup, "shares", lambda count, of, *_: (ids, heads or of.heads))
    monkeypatch.setattr(lookup_gradients, "share_of", lambda *_: share)


def table(ins: Sequence[int], outs: Sequence[int], ranks: Sequence[int], reverse: bool = False) -> Network:
    """A tensor train, its row modes leading; or with the axes of each core in the reverse order."""
    bonds = [f"r{k}" for k in range(1, len(ins))]
    cores = []
    for k, columns in enumerate(outs):
        core = (f"i{k}", *bonds[max(k - 1, 0) : k], *([f"o{k}"] if columns else []), *bonds[k : k + 1])
        cores.append(core[::-1] if reverse else core)
    modes = [Mode(f"i{k}", size, "in") for k, size in enumerate(ins)]
    modes += [Mode(f"o{k}", size, "out") for k, size in enumerate(outs) if size]
    return Network(tuple(cores), dict(zip(bonds, ranks, strict=True)), tuple(modes))


def drawn(network: Network, count: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Ids, the last one of the table among them, and cores."""
    ids = torch.randint(network.features("in"), (count,))
    ids[-1] = network.features("in") - 1
    return ids, [torch.randn(shape).to(dtype) for shape in network.core_shapes]


def exact(network: Network, ids: Tensor, cores: Sequence[Tensor], width: int) -> tuple[Tensor, list[Tensor]]:
    """The rows of the dense table in float64, and what they are differentiated by."""
    leaves = [core.double().requires_grad_() for core in cores]
    names = {index: chr(ord("a") + k) for k, (index, _) in enumerate(network.sizes)}
    terms = ",".join("".join(names[index] for index in core) for core in network.cores)
    wanted = "".join(names[index] for index in (*network.names("in"), *network.names("out")))
    dense = torch.einsum(f"{terms}->{wanted}", *leaves).reshape(network.features("in"), -1)
    return dense[ids.long(), :width], leaves


def chain_of(network: Network) -> tuple[int, ...]:
    found = lookup.train(network)
    assert found is not None
    return found


# -- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_rows_touch_only_their_own_memory_and_as_much_as_counted(
    name: str, dtype: torch.dtype, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    ins, outs, ranks, width, count = SHAPES[name]
    of = lookup.shape([(0, *core) for core in zip((1, *ranks), [max(n, 1) for n in outs], (*ranks, 1), strict=True)])
    # Few programs, then as many as there can be, with other strides.
    for reverse, (ids_a_program, heads) in list(enumerate(((2, of.heads), (1, 1))))["beyond" in name :]:
        few_programs(monkeypatch, ids_a_program, 1, heads)
        network = table(ins, outs, ranks, bool(reverse))
        ids, cores = drawn(network, count, dtype)
        views, blocks = zip(*map(within_nan, cores), strict=True)
        out, block = within_nan(torch.full((count, width), math.nan, dtype=dtype))
        for view, around in zip((*views, out), (*blocks, block), strict=True):
            watch.add(view, around)
        before = watch.counts()
        lookup.write(ids, views, chain_of(network), out)
        assert error(out, exact(network, ids, cores, width)[0].detach()) < TOLERANCE[dtype]
        counted = lookup.counts(count, width, of, lookup.tiles(of, SIDE), heads)
        loaded, stored, flops = (now - then for now, then in zip(watch.counts(), before, strict=True))
        assert (flops, loaded, stored) == counted


def test_rows_with_the_tiles_of_the_table() -> None:
    """Without a loop over tiles, and with slices that are loaded once for all heads; ids of 32 bits, and strided."""
    for ins, outs, ranks in (((3, 4), (12, 20), (18,)), ((3, 2, 2), (3, 20, 18), (17, 20))):
        network = table(ins, outs, ranks)
        ids, cores = drawn(network, 6, SINGLE)
        ids, cores = ids.int()[::2], [core.bfloat16().float() for core in cores]
        found = lookup.run(ids, cores, chain_of(network), network.features("out"))
        assert error(found, exact(network, ids, cores, network.features("out"))[0].detach()) < TOLERANCE[SINGLE]


def test_a_chain_whose_cores_and_digits_are_in_another_order() -> None:
    """The core between comes first, and the first digit picks the slice of the last one."""
    modes = *(Mode(f"i{k}", 2 + k, "in") for k in range(3)), *(Mode(f"o{k}", 3 + k, "out") for k in range(3))
    cores = (("s", "o1", "i2", "t"), ("t", "i0", "o0"), ("i1", "o2", "s"))
    network = Network(cores, {"s": 2, "t": 3}, modes)
    ids, values = drawn(network, 5, SINGLE)
    rows, leaves = exact(network, ids, values, 50)
    chain, grad = chain_of(network), torch.randn(5, 50)
    assert error(lookup.run(ids, values, chain, 50), rows.detach()) < TOLERANCE[SINGLE]
    found = lookup_gradients.run(grad, ids, values, chain, [True] * 3)
    assert agree(found, torch.autograd.grad(rows, leaves, grad.double()))


# -- gradients --------------------------------------------------------------------------------------------------------


def made_pieces(network: Network, ids: Tensor, share: int) -> list[int]:
    """How many pieces there are of each core: of each digit, the blocks that its sorted ids lie in."""
    found, sizes = [], network.mode_sizes("in")
    for k, size in enumerate(sizes):
        digits = sorted(int(id) // math.prod(sizes[k + 1 :]) % size for id in ids)
        found.append(len({(digit, position // share) for position, digit in enumerate(digits)}))
    return found


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_gradients_touch_only_their_own_memory_and_as_much_as_counted(
    name: str, dtype: torch.dtype, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    ins, outs, ranks, width, count = SHAPES[name]
    for reverse, share in list(enumerate((10, 2)))["beyond" in name :]:
        few_programs(monkeypatch, 1, share)
        network = table(ins, outs, ranks, bool(reverse))
        ids, cores = drawn(network, count, dtype)
        grad = torch.randn(width, count).to(dtype).mT if reverse else torch.randn(count, width).to(dtype)
        views, blocks = zip(*map(within_nan, (grad, *cores)), strict=True)
        found, around = zip(*(within_nan(torch.full_like(core, math.nan)) for core in cores), strict=True)
        for view, block in zip((*views, *found), (*blocks, *around), strict=True):
            watch.add(view, block)

        def partial(out: Tensor, numbers: int) -> Tensor:
            sums, block = within_nan(torch.full((numbers, *out.shape[1:]), math.nan))
            sums = block.flatten()[: sums.numel()].view(sums.shape)  # the kernel takes it to be contiguous
            watch.add(sums, block)
            return sums

        monkeypatch.setattr(lookup_gradients, "_partial", partial)
        before = watch.counts()
        lookup_gradients.write(views[0], ids, views[1:], chain_of(network), found)
        rows, leaves = exact(network, ids, cores, width)
        assert agree(found, torch.autograd.grad(rows, leaves, grad.double()), dtype)

        sizes = [(0, *core) for core in zip((1, *ranks), [max(n, 1) for n in outs], (*ranks, 1), strict=True)]
        mirrored = [(0, right, columns, left) for _, left, columns, right in reversed(sizes)]
        ends = [lookup_gradients.end_shape(lookup.shape(one)) for one in (sizes, mirrored)]
        middle = [lookup_gradients.middle_shape(lookup.shape(sizes))] * (len(ins) - 2)
        total = [0, 0, 0]
        for k, (of, made) in enumerate(zip((ends[0], *middle, ends[1]), made_pieces(network, ids, share), strict=True)):
            position = 1 if k == 1 and middle else 0
            counted = lookup_gradients.counts(count, width, ins[k], made, of, lookup.tiles(of, SIDE), position)
            total = [a + b for a, b in zip(total, counted, strict=True)]
        loaded, stored, flops = (now - then for now, then in zip(watch.counts(), before, strict=True))
        assert [flops, loaded, stored] == total


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("share", [3, 100])
def test_heavy_digits_are_shared_and_others_get_zeros(share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    few_programs(monkeypatch, 1, share)
    network = table((4, 3, 5), (2, 2, 3), (2, 2))
    _, cores = drawn(network, 1, SINGLE)
    ids = torch.tensor([17, *[42] * 8, 16, 43])  # the digits 1 and 2 of the first core, the last two of the second
    grad = torch.randn(len(ids), 12)
    chain = chain_of(network)
    found = lookup_gradients.run(grad, ids, cores, chain, [True, False, True])
    rows, leaves = exact(network, ids, cores, 12)
    assert agree(found, torch.autograd.grad(rows, leaves[::2], grad.double()))
    assert not found[0][[0, 3]].any()
    assert not found[1][[0, 4]].any()
    assert found[1][3].any()
    again = lookup_gradients.run(grad, ids, cores, chain, [True, False, True])
    assert all(torch.equal(mine, other) for mine, other in zip(found, again, strict=True))


def test_many_pieces_are_added_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    few_programs(monkeypatch, 1, 1)
    network = table((2, 1), (1, 2), (1,))
    ids, cores = drawn(network, 37, SINGLE)  # _PARTS and more
    ids[:-1] = 0
    grad = torch.randn(37, 2)
    (found,) = lookup_gradients.run(grad, ids, cores, chain_of(network), [True, False])
    rows, leaves = exact(network, ids, cores, 2)
    assert error(found, torch.autograd.grad(rows, leaves[0], grad.double())[0]) < TOLERANCE[SINGLE]


def test_an_expanded_gradient_is_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    few_programs(monkeypatch, ids=50, share=20)
    network = table((3, 4), (3, 5), (2,))
    ids, cores = drawn(network, 7, SINGLE)
    grad = torch.randn(7, 1).expand(7, 13)  # the width is cut, and the columns are no steps apart
    found = lookup_gradients.run(grad, ids, cores, chain_of(network), [True, True])
    rows, leaves = exact(network, ids, cores, 13)
    assert agree(found, torch.autograd.grad(rows, leaves, grad.double()))


# -- operators --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "count"), [(((2, 2), (3, 2), (2,)), 0), (((2, 1, 2), (2, 1, 3), (2, 2)), 3)], ids=["empty", "three"]
)
def test_opcheck(shape: Any, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    few_programs(monkeypatch, ids=50, share=20)
    network = table(*shape)
    ids = torch.randint(network.features("in"), (count,))
    cores = [torch.randn(shape) for shape in network.core_shapes]
    chain = list(chain_of(network))
    torch.library.opcheck(lookup.lookup, (ids, cores, chain, 5))
    needs = [k != 1 for k in range(len(cores))]
    torch.library.opcheck(lookup_gradients.lookup_gradients, (torch.randn(count, 5), ids, cores, chain, needs))
