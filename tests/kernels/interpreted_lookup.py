"""The lookup kernels in Triton's interpreter, against float64.

Not collected by itself: test_lookup_kernel.py runs this file in a process of its own, with ``TRITON_INTERPRET=1``.
bfloat16, which the interpreter lacks, is rounded to and multiplied in float32.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tensorlayers import TT, FactorizedEmbedding, FactorizedEmbeddingBag, LowRank, gather, use_kernels
from tensorlayers.errors import KernelError
from tensorlayers.kernels import lookup, lookup_gradients
from tensorlayers.network import Mode, Network
from tests.kernels.support import HALF, SINGLE, TOLERANCE, Watch, error, within_nan

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


@pytest.fixture(autouse=True)
def _interpreter() -> Iterator[None]:
    """What kernels write to is NaN before."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_lookup_kernel.py, with TRITON_INTERPRET=1"
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (lookup, lookup_gradients):
        monkeypatch.setattr(module, "configuration", lambda *_: SIDE)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are looked up by the kernel, in few programs."""
    monkeypatch.setattr(gather, "kernels", lambda: "only")
    few_programs(monkeypatch, ids=50, share=20)


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


def agree(found: Sequence[Tensor], truths: Sequence[Tensor], dtype: torch.dtype = SINGLE) -> bool:
    pairs = zip(found, truths, strict=True)
    return all(error(mine.detach(), truth.detach()) < TOLERANCE[dtype] for mine, truth in pairs)


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


def test_an_expanded_gradient_is_read_in_place(kernels: None) -> None:
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
def test_opcheck(shape: Any, count: int, kernels: None) -> None:
    network = table(*shape)
    ids = torch.randint(network.features("in"), (count,))
    cores = [torch.randn(shape) for shape in network.core_shapes]
    chain = list(chain_of(network))
    torch.library.opcheck(lookup.lookup, (ids, cores, chain, 5))
    needs = [k != 1 for k in range(len(cores))]
    torch.library.opcheck(lookup_gradients.lookup_gradients, (torch.randn(count, 5), ids, cores, chain, needs))


# -- layers -----------------------------------------------------------------------------------------------------------

LAYERS = {
    "two": (53, 12, TT(3)),
    "three": (53, 12, TT(3, order=3)),
    "two, padded": (50, 19, TT(4, in_modes=(6, 9), out_modes=(4, 5))),
    "three, padded": (50, 19, TT((2, 3), in_modes=(3, 4, 5), out_modes=(2, 3, 4))),
}


def dense_gradients(layer: FactorizedEmbedding, ids: Tensor, probe: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What the dense table gives in float64."""
    wide = copy.deepcopy(layer).double().requires_grad_()
    truth = F.embedding(ids, wide.to_dense(), wide.padding_idx)
    return truth, list(torch.autograd.grad(truth, list(wide.cores), probe.double()))


@pytest.mark.parametrize(
    ("name", "which"), [*((name, "repeated") for name in LAYERS), ("two", "Zipf"), ("three, padded", "Zipf")]
)
def test_a_layer_gives_what_the_dense_table_does(name: str, which: str, kernels: None) -> None:
    rows, columns, format = LAYERS[name]
    layer = FactorizedEmbedding(rows, columns, padding_idx=3, format=format)
    ids = {
        "repeated": torch.tensor([[0, 7, 7, rows - 1], [7, 3, 0, rows - 1]]),
        "Zipf": torch.rand(24).pow(-1.0).clamp(max=rows).long() - 1,
    }[which]
    y = layer(ids)
    probe = torch.randn_like(y)
    truth, gradients = dense_gradients(layer, ids, probe)
    found = torch.autograd.grad(y, list(layer.cores), probe)
    assert agree([y, *found], [truth, *gradients])
    for mine, theirs in zip(found, gradients, strict=True):
        assert not mine[(theirs == 0).all(tuple(range(1, mine.dim())))].any()


def test_half_precision_and_frozen_cores(kernels: None) -> None:
    layer = FactorizedEmbedding(53, 12, format=TT(3, order=3), dtype=HALF)
    layer.cores[1].requires_grad_(False)
    ids = torch.randint(53, (9,))
    y = layer(ids)
    assert y.dtype == HALF
    y.backward(torch.ones_like(y))
    assert layer.cores[1].grad is None
    truth, gradients = dense_gradients(layer, ids, torch.ones_like(y))
    found = [layer.cores[k].grad for k in (0, 2)]
    assert {gradient.dtype for gradient in found} == {HALF}
    assert agree([y, *found], [truth, *gradients[::2]], HALF)


@pytest.mark.parametrize("name", ["two", "three"])
def test_empty_ids_and_bags(name: str, kernels: None) -> None:
    rows, columns, format = LAYERS[name]
    layer = FactorizedEmbedding(rows, columns, format=format)
    y = layer(torch.empty(2, 0, dtype=torch.int64))
    assert y.shape == (2, 0, columns)
    for gradient in torch.autograd.grad(y.sum(), list(layer.cores)):
        assert not gradient.any()
    bags = FactorizedEmbeddingBag(rows, columns, mode="sum", format=format)
    ids = torch.tensor([[1, 5], [1, 1]])
    assert error(bags(ids).detach(), bags.to_dense()[ids].sum(1).detach().double()) < TOLERANCE[SINGLE]


def test_the_kernel_runs_where_it_is_to(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for module in (lookup, lookup_gradients):
        original = module.run
        monkeypatch.setattr(module, "run", lambda *given, run=original: called.append(run) or run(*given))
    layer = FactorizedEmbedding(53, 12, format=TT(3))
    for mode, times in (("none", 0), ("auto", 0), ("only", 2)):  # on the CPU
        monkeypatch.setattr(gather, "kernels", lambda mode=mode: mode)
        layer(torch.tensor([3])).sum().backward()
        assert len(called) == times
    for refused, reason in (
        (FactorizedEmbedding(53, 12, format=TT(3), dtype=torch.float64), "float64"),
        (FactorizedEmbedding(53, 12, format=LowRank(3)), "tensor train"),
    ):
        with pytest.raises(KernelError, match=f"no Triton kernel supports this lookup.*{reason}"):
            refused(torch.tensor([3]))


@pytest.mark.parametrize("name", ["two", "three, padded"])
def test_compiled_as_one_graph(name: str, kernels: None) -> None:
    rows, columns, format = LAYERS[name]
    layer = FactorizedEmbedding(rows, columns, padding_idx=1, format=format)
    torch._dynamo.reset()
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def kept(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            graphs.append(graph.code)
            return make_boxed_func(graph.forward)

        return aot_autograd(fw_compiler=kept, bw_compiler=kept)(graph, inputs)

    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    for count in (3, 8):
        ids = torch.randint(rows, (count,))
        y = compiled(ids)
        probe = torch.randn_like(y)
        truth, gradients = dense_gradients(layer, ids, probe)
        assert agree([y, *torch.autograd.grad(y, list(layer.cores), probe)], [truth, *gradients])
    assert ["ops.tensorlayers.lookup.default" in code for code in graphs] == [True, False]
    assert ["ops.tensorlayers.lookup_gradients.default" in code for code in graphs] == [False, True]


def test_what_it_cannot_do_torchs_operations_do(kernels: None) -> None:
    """Second derivatives, gradients of many, torch.func and exported graphs."""
    layer = FactorizedEmbedding(53, 12, format=TT(3))
    ids, cores = torch.tensor([3, 17, 3]), list(layer.cores)

    def second(y: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(y.square().sum(), cores, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), cores)

    truth = layer.to_dense()[ids]
    assert agree(second(layer(ids)), second(truth))
    probes = torch.randn(2, 3, 12)
    many = torch.autograd.grad(layer(ids), cores, probes, is_grads_batched=True)
    for k, probe in enumerate(probes):
        assert agree([mine[k] for mine in many], torch.autograd.grad(layer.to_dense()[ids], cores, probe))
    values = dict(layer.named_parameters())
    jacobian = torch.func.jacrev(lambda given: torch.func.functional_call(layer, given, (ids,)))(values)
    assert jacobian["cores.0"].shape == (3, 12, *cores[0].shape)
    exported = torch.export.export(layer, (ids,)).module()
    assert "tensorlayers" not in str(exported.graph)
    assert agree([exported(ids)], [truth])


def test_the_mode_is_that_of_use_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    table, ids = FactorizedEmbedding(50, 12, format=TT(3)), torch.tensor([3, 4, 4, 49])
    network = table.own_network
    assert gather.fused(network, list(table.cores)) is None  # on the CPU only where it is demanded
    with use_kernels("triton"):
        assert gather.fused(network, list(table.cores)) == lookup.train(network)
        assert error(table(ids), table.to_dense().double()[ids]) < TOLERANCE[SINGLE]
        with pytest.raises(KernelError, match="no Triton kernel supports this lookup"):
            FactorizedEmbedding(50, 12, format=LowRank(3))(ids)
    with use_kernels("torch"):
        assert gather.fused(network, list(table.cores)) is None
