"""The lookup kernels without a GPU: what they are found for, and when they pay.

They are interpreted in a process of their own.
"""

from __future__ import annotations

import pytest
import torch

from tensorlayers import FactorizedEmbedding, launch_tables
from tensorlayers.errors import KernelError
from tensorlayers.formats import BTT, CP, TT, Format, LowRank, Tucker
from tensorlayers.fused_lookup import estimates
from tensorlayers.kernels import lookup, lookup_gradients
from tensorlayers.kernels.lookup import Shape, Site, sites, tiles, train
from tensorlayers.lookup_plan import lookup_cost
from tensorlayers.network import Mode, Network


def network_of(rows: int, columns: int, format: Format) -> Network:
    return FactorizedEmbedding(rows, columns, format=format).own_network


# -- what is a train --------------------------------------------------------------------------------------------------


def test_trains_are_found_by_names() -> None:
    modes = (*(Mode(f"i{k}", 2 + k, "in") for k in range(3)), *(Mode(f"o{k}", 5 + k, "out") for k in range(3)))
    # The first row mode is in the middle of the chain, which begins with the last core.
    cores = (("s", "o1", "i0", "t"), ("t", "i2", "o0"), ("i1", "o2", "s"))
    found = train(Network(cores, {"s": 3, "t": 3}, modes))
    assert found is not None
    assert sites(found) == [
        Site(1, row=1, left=-1, column=2, right=0, divisor=1, spacing=42),
        Site(0, row=2, left=3, column=1, right=0, divisor=12, spacing=7),
        Site(2, row=0, left=2, column=1, right=-1, divisor=4, spacing=1),
    ]
    view = sites(found)[1].view(torch.empty(3, 6, 2, 5))
    assert view.shape == (2, 5, 6, 3)
    assert sites(found)[0].view(torch.empty(3, 4, 5)).shape == (4, 1, 5, 3)


@pytest.mark.parametrize("kind", [TT(3), TT(3, order=3), TT(3, in_modes=(3, 4, 5), out_modes=(12,))])
def test_formats_that_are_trains(kind: Format) -> None:
    assert train(network_of(53, 12, kind)) is not None


@pytest.mark.parametrize(
    "kind",
    [
        TT(3, order=1),
        TT(3, order=4),
        TT(3, in_modes=(53,), out_modes=(4, 3)),
        BTT(3),
        CP(3, order=3),
        Tucker(3),
        LowRank(3),
    ],
    ids=str,
)
def test_formats_that_are_none(kind: Format) -> None:
    assert train(network_of(53, 12, kind)) is None


def test_networks_that_are_none() -> None:
    modes = Mode("i0", 2, "in"), Mode("i1", 3, "in"), Mode("o0", 4, "out")
    two_bonds = ("i0", "o0", "r", "s"), ("i1", "r", "s")
    shared = ("i0", "o0", "r"), ("i1", "o0", "r")
    for cores in (two_bonds, shared):
        bonds = {index: 3 for core in cores for index in core if index in "rs"}
        assert train(Network(cores, bonds, modes)) is None
    stacked = Network((("i0", "o0", "r"), ("i1", "r", "k")), {"r": 3}, (*modes, Mode("k", 2, "stack")))
    assert train(stacked) is None
    layers = [torch.nn.Embedding(17, 10) for _ in range(2)]
    joint = FactorizedEmbedding.from_dense_jointly(layers, TT(2))[0]
    assert train(joint.own_network) is None


# -- when and how -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["half", "tf32", "float32"])
def test_it_pays_unless_modes_and_ranks_fill_no_tile(dtype: str) -> None:
    table = launch_tables.shipped("sm_90")

    def pays(network: Network) -> bool:
        by_torch, by_kernel = estimates(network, dtype, table)
        assert by_kernel is not None
        return by_kernel.seconds < by_torch.seconds

    for format in (TT(16), TT(64), TT(32, order=3), TT(64, order=3)):
        network = network_of(50257, 768, format)
        assert pays(network)
        # Many times the bytes of the rows themselves are moved otherwise.
        assert lookup_cost(network, 4096).elements > 4 * 4096 * 768
    assert not pays(network_of(10**6, 64, TT(2, order=3)))


def test_a_program_takes_several_ids_where_there_are_programs_enough() -> None:
    of = Shape(12, 8, 12, 16, 16, True)
    to = tiles(of, launch_tables.shipped("sm_90").kernels["lookup"]["half"])
    assert lookup.shares(1, of, to, 132) == (1, 1)
    assert lookup.shares(4 * 132, of, to, 132) == (1, 4)
    assert lookup.shares(32 * 132, of, to, 132) == (4, 8)
    assert lookup.shares(10**6, of, to, 132) == (8, 8)


def test_pieces_are_shares_of_what_keeps_every_processor_busy() -> None:
    of = Shape(12, 8, 16, 12, 16, True)
    to = tiles(of, launch_tables.shipped("sm_90").kernels["lookup"]["half"])
    assert lookup_gradients.share_of(1, 1, of, to, 132) == 1
    assert lookup_gradients.share_of(65536, 1, of, to, 132) == 63
    assert lookup_gradients.share_of(65536, 8, of, to, 132) == 497  # of a core between, a head is a program


def test_every_piece_of_sorted_ids_has_a_number() -> None:
    """For any digits: what `sums_kernel` searches for, in Python."""
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        values, count, share = (int(torch.randint(1, high, (), generator=generator)) for high in (9, 40, 12))
        ids = torch.randint(values, (count,), generator=generator)
        cut = lookup_gradients.pieces(ids, 1, values, share)
        starts, met = cut.starts.tolist(), []
        for number in range(cut.numbers):
            digit = max(v for v in range(values) if starts[v] // share + v <= number)
            block = number - digit
            met += range(max(starts[digit], block * share), min(starts[digit + 1], block * share + share))
        assert met == list(range(count))
        assert torch.equal(ids[cut.order], ids.sort().values)


def test_more_values_than_16_bits_hold() -> None:
    ids = torch.tensor([0, 40000, 39999, 40000])
    cut = lookup_gradients.pieces(ids * 7, 7, 40001, 2)
    assert cut.order.tolist() == [0, 2, 1, 3]
    assert cut.starts[[0, 1, 39999, 40000, 40001]].tolist() == [0, 1, 1, 2, 4]


def test_alignment() -> None:
    network = Network(
        (("i0", "o0", "r"), ("i1", "r", "o1")),
        {"r": 16},
        (Mode("i0", 3, "in"), Mode("i1", 3, "in"), Mode("o0", 4, "out"), Mode("o1", 32, "out")),
    )
    chain = sites(train(network) or ())
    views = [site.view(torch.empty(shape)) for site, shape in zip(chain, network.core_shapes, strict=True)]
    assert lookup.are_aligned(views, chain, torch.empty(2, 128))
    assert not lookup.are_aligned(views, chain, torch.empty(128, 2).mT)
    assert not lookup.are_aligned([views[0], torch.empty(3, 16, 33, 1)[:, :, :32]], chain, torch.empty(2, 128))


def test_dtypes_are_refused() -> None:
    network = network_of(6, 6, TT(2))
    ids, chain, grad = torch.arange(3), train(network) or (), torch.randn(3, 6)
    a, b = (torch.randn(shape) for shape in network.core_shapes)
    for cores, message in (([a, b.half()], "one dtype"), ([a.double(), b.double()], "float64")):
        with pytest.raises(KernelError, match=message):
            lookup.run(ids, cores, chain, 6)
        with pytest.raises(KernelError, match=message):
            lookup_gradients.run(grad.to(cores[0].dtype), ids, cores, chain, [True, True])
    with pytest.raises(KernelError, match="bfloat16"):
        lookup.run(ids, [a.bfloat16(), b.bfloat16()], chain, 6)
    with pytest.raises(KernelError, match="one dtype"):
        lookup_gradients.run(grad.half(), ids, [a, b], chain, [True, True])
