"""Khatri-Rao products on the fly, without a GPU: what they are for, what they are predicted to take, and their kernels.

The kernels are interpreted in a process of their own; test_aot.py compiles them.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tensorlayers import decision, machine
from tensorlayers.formats import BTT, CP, TT, Format, LowRank, Tucker
from tensorlayers.fused_khatri_rao import FusedKhatriRao, Side, candidate, sides
from tensorlayers.network import Mode, Network, linear_modes
from tensorlayers.program import Task

MODES = linear_modes((6, 7), (8, 9))


def test_sides_are_found_by_names() -> None:
    cores = (("i2", "r"), ("r", "o1"), ("o2", "r"), ("r", "i1"))
    assert sides(Network(cores, {"r": 5}, MODES)) == {
        "in": Side((8, 9), (3, 0), (True, False)),
        "out": Side((6, 7), (1, 2), (True, False)),
    }


@pytest.mark.parametrize("kind", [BTT(0.5), CP(3, order=1), CP(3, order=3), LowRank(3), TT(3), Tucker(0.5)], ids=str)
def test_other_formats_have_none(kind: Format) -> None:
    assert sides(kind.network(64, 64)) is None


def test_other_networks_have_none() -> None:
    two_bonds = (("o1", "r"), ("o2", "r"), ("i1", "s"), ("i2", "s"))
    shared = (("o1", "r"), ("o2", "r"), ("i1", "r"), ("i2", "i1", "r"))
    middle = (("o1", "r"), ("o2", "r"), ("i1", "r"), ("i2", "r"), ("r",))
    both = (("o1", "o2", "r"), ("i1", "r"), ("i2", "r"), ("r",))
    for cores in (two_bonds, shared, middle, both):
        bonds = {index: 3 for core in cores for index in core if index in "rs"}
        assert sides(Network(cores, bonds, MODES)) is None
    one_in = (*linear_modes((2, 3, 4), (5,)),)
    assert sides(Network(tuple((mode.name, "r") for mode in one_in), {"r": 3}, one_in)) is None
    grouped = (*linear_modes((2, 3), (5,)), Mode("g1", 2, "group"))
    assert sides(Network(tuple((mode.name, "r") for mode in grouped), {"r": 3}, grouped)) is None


@pytest.mark.parametrize("gradients", [False, True])
def test_it_wins_at_small_batch_and_loses_at_large(gradients: bool) -> None:
    network, on = CP(0.1).network(4096, 4096), machine.shipped("cuda")

    def ways(rows: int) -> dict[str, float]:
        """The predicted seconds, also of the ways that torch's operations make."""
        task = Task(rows, gradients, gradients, "bfloat16", 2, "sm_90")
        mine = candidate(network, task, on)
        assert mine is not None
        assert isinstance(mine.program, FusedKhatriRao)
        others = decision.options(network, replace(task, arch=""), on)
        return {one.name: one.seconds for one in others if one.seconds is not None} | {"mine": mine.seconds}

    for rows in (1, 4, 16):
        found = ways(rows)
        mine = found.pop("mine")
        assert mine < min(found.values())
        assert mine < 0.6 * found["merged"]  # the factors of both sides are formed
    found = ways(16384)
    assert min(found.values()) < 0.5 * found["mine"]


def test_no_gradient_holds_more_than_the_dense_weight() -> None:
    network, on = CP(0.1).network(4096, 4096), machine.shipped("cuda")
    for rows in (1, 16, 256):
        found = candidate(network, Task(rows, True, True, "bfloat16", 2, "sm_90"), on)
        assert found is not None
        assert found.largest <= 4096 * 4096
