"""The dense weight by one kernel, without a GPU: what it is for, what it is predicted to take, and the kernel itself.

The kernel is interpreted in a process of its own; test_aot.py compiles it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tensorlayers import decision, fused_rebuild, launch_tables, machine
from tensorlayers.formats import BTT, CP, TT, Format, LowRank, ModeProducts, Tucker
from tensorlayers.fused_rebuild import FusedRebuild, candidate, candidates
from tensorlayers.network import Mode, Network, linear_modes
from tensorlayers.program import Task
from tensorlayers.rebuild import Problem, form, tiles_for
from tensorlayers.rebuild import launch as planned

ON = machine.shipped("cuda")
KRONECKER = ModeProducts(in_modes=(8, 8), out_modes=(8, 8))


def task(rows: int, *, gradients: bool = False) -> Task:
    return Task(rows, gradients, gradients, "bfloat16", 2, "sm_90")


def test_a_form_is_found_by_names() -> None:
    train = form(("o1", "i1", "r"), ("r", "o2", "i2"), ("o1", "o2", "i1", "i2"))
    assert train is not None
    assert (train.heads, train.m, train.n, train.k) == (((), ()), (("o1",), ("i1",)), (("o2",), ("i2",)), ("r",))
    blocks = form(("i1", "o1", "o2", "r"), ("i1", "i2", "o2", "r"), ("o1", "o2", "i1", "i2"))
    assert blocks is not None
    assert (blocks.heads, blocks.m, blocks.n) == ((("o2",), ("i1",)), ((), ("o1",)), ((), ("i2",)))
    # Axes that are next to each other in all tensors are one; else only where there would be more than two.
    assert form(("o", "r"), ("r", "i1", "i2"), ("o", "i1", "i2")).n == ((), ("i1", "i2"))  # type: ignore[union-attr]
    assert form(("o", "r"), ("i2", "i1", "r"), ("o", "i1", "i2")).n == (("i1",), ("i2",))  # type: ignore[union-attr]
    result = ("o1", "o2", "o3", "i1", "i2", "i3")
    merged = form(("o1", "i1", "o2", "i2", "r"), ("r", "o3", "i3"), result)
    assert merged is not None
    assert merged.m == (("o1", "o2"), ("i1", "i2"))
    assert form(("o1", "o3", "i2", "r"), ("r", "o2", "i1", "i3"), result) is None


@pytest.mark.parametrize("kind", [LowRank(8), KRONECKER, CP(8), Tucker(4)], ids=str)
def test_there_is_none_where_torch_writes_the_weight_in_place(kind: Format) -> None:
    network = kind.network(64, 64)
    assert fused_rebuild.is_written_in_place(network)
    assert candidate(network, task(256), ON) is None


def test_there_is_none_of_a_single_core_nor_of_other_modes_nor_without_a_kernel() -> None:
    assert candidate(Network((("o1", "i1"),), {}, linear_modes((6,), (8,))), task(256), ON) is None
    grouped = (*linear_modes((2, 3), (5, 4)), Mode("g1", 2, "group"))
    cores = (("g1", "o1", "i1", "r"), ("r", "g1", "o2", "i2"))
    assert candidate(Network(cores, {"r": 3}, grouped), task(256), ON) is None
    assert candidates(TT(8).network(64, 64), Task(256, dtype="float64", itemsize=8, arch="sm_90"), ON) == []
    # The in mode that is contiguous in the weight is on both cores: nothing could be written in runs.
    shared = (("o1", "i2", "r"), ("r", "o2", "i1", "i2"))
    assert candidates(Network(shared, {"r": 3}, linear_modes((20, 3), (4, 5))), task(256), ON) == []


@pytest.mark.parametrize("kind", [TT(64), TT(16, order=3), BTT(8)], ids=str)
def test_the_weight_is_built_faster_than_by_torch(kind: Format) -> None:
    network = kind.network(4096, 4096)
    for rows in (1, 256, 16384):
        found = candidate(network, task(rows), ON)
        assert found is not None
        assert isinstance(found.program, FusedRebuild)
        assert found.program.intermediate == found.largest == 0
        options = decision.options(network, replace(task(rows), arch=""), ON)
        (torchs,) = (one.seconds for one in options if one.name == "rebuild")
        assert torchs is not None
        dense = decision.dense_seconds(4096, 4096, rows, ON, dtype="bfloat16")
        assert dense < found.seconds < torchs
    assert found.cost.flops > 2 * 16384 * 4096**2


def test_the_cheapest_of_all_groupings_is_taken() -> None:
    network = TT(16, order=3).network(4096, 4096)
    for gradients in (False, True):
        found = candidates(network, task(64, gradients=gradients), ON)
        assert len(found) == 2  # the third, of the outer cores, is of too many pieces
        taken = candidate(network, task(64, gradients=gradients), ON)
        assert taken is not None
        assert taken.seconds == min(one.seconds for one in found)
    assert len(candidates(TT(2, order=8).network(256, 256), task(64), ON)) == 7


def test_the_gradient_of_the_weight_is_copied_for_many_rows_alone() -> None:
    network = TT(64).network(4096, 4096)
    for rows, is_copied in ((16, False), (16384, True)):
        found = candidate(network, task(rows, gradients=True), ON)
        assert found is not None
        assert isinstance(found.program, FusedRebuild)
        back = found.program.back
        assert back is not None
        assert (back.layout != back.formed) is is_copied
        assert (back.lead > 1) is not is_copied


def test_predicted_times_grow_with_each_size_and_with_short_runs() -> None:
    table = launch_tables.shipped("sm_90")
    least = Problem(8, 512, 512, 64)
    first = planned(least, table)
    for name in ("heads", "m", "n", "k"):
        assert planned(least._replace(**{name: 16 * getattr(least, name)}), table).seconds > first.seconds
    assert planned(least._replace(run=2, heads=64), table).seconds > planned(least._replace(heads=64), table).seconds
    assert first.seconds > table.launch
    many = planned(Problem(10**5, 16, 16, 16), table)  # a program takes its time, however little it stores
    assert many.seconds > 4 * 2 * (many.stored + many.loaded) / table.memory


def test_tiles_are_no_larger_than_the_problem() -> None:
    largest = {"m": 128, "n": 64, "k": 32, "warps": 8, "stages": 3}
    assert tiles_for(Problem(1, 1000, 1000, 1000), largest) == (128, 64, 32, 8, 3)
    assert tiles_for(Problem(1, 3, 70, 5), largest) == (128, 64, 16, 8, 3)
    assert tiles_for(Problem(1, 33, 33, 17), largest) == (64, 64, 32, 4, 3)
    assert tiles_for(Problem(1, 1, 1, 1), largest) == (16, 16, 16, 4, 3)
