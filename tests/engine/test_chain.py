"""Products of three tensors as sums of chains: every form that is found is the product; what a launch moves."""

import string
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensorlayers import fused, launch, launch_tables, machine
from tensorlayers.chain import best, chains
from tensorlayers.launch_tables import Problem
from tensorlayers.network import Network, linear_modes
from tensorlayers.program import Task

INDICES = "abcdefg"


@st.composite
def products(draw):
    """Three operands and a result; every index is on two of these four at least."""
    sizes, places = {}, {index: [] for index in range(4)}
    for index in INDICES[: draw(st.integers(1, len(INDICES)))]:
        sizes[index] = draw(st.integers(1, 3))
        for place in draw(st.lists(st.integers(0, 3), min_size=2, max_size=4, unique=True)):
            places[place].append(index)
    return sizes, [tuple(draw(st.permutations(indices))) for indices in places.values()]


def contracted(tensors, operands, result):
    """By einsum, in float64."""
    letters = dict(zip(dict.fromkeys(i for indices in operands for i in indices), string.ascii_letters, strict=False))
    written = ",".join("".join(letters[index] for index in indices) for indices in operands)
    return torch.einsum(f"{written}->{''.join(letters[index] for index in result)}", *tensors)


@given(products())
def test_every_form_is_the_product(product):
    sizes, (*operands, result) = product
    tensors = [torch.randn([sizes[i] for i in indices], dtype=torch.float64) for indices in operands]
    expected = contracted(tensors, operands, result)
    for chain in chains(operands, result):
        out = torch.empty(expected.shape, dtype=torch.float64)
        view = chain.as_result(out, result, sizes)
        assert view.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()  # written in place
        views = chain.views(tensors, sizes)
        view.copy_(torch.einsum("ghtmp,ghtpq,ghtqn->ghmn", *views))
        torch.testing.assert_close(out, expected)
        assert chain.problem(sizes, "half").flops >= 2 * expected.numel()


@pytest.mark.parametrize(
    ("operands", "result", "roles", "count"),
    [
        ((("o1", "i1", "r"), ("b", "i1", "i2"), ("r", "o2", "i2")), ("b", "o1", "o2"), "b||r|o1|o2|i1|i2", 6),
        ((("b", "o1", "o2"), ("r", "o2", "i2"), ("b", "i1", "i2")), ("o1", "i1", "r"), "r||b|o1|i1|o2|i2", 6),
        # Where blocks or rows are in the middle, three kinds of heads or terms would be left.
        (
            (("b", "i1", "i2"), ("i1", "i2", "o2", "r"), ("i1", "o1", "o2", "r")),
            ("b", "o1", "o2"),
            "|o2|i1|b|o1|i2|r",
            2,
        ),
    ],
    ids=["two cores of a train", "the gradient of a core", "blocks"],
)
def test_the_forms_of_known_products(operands, result, roles, count):
    found = {"|".join(",".join(role) for role in chain.roles) for chain in chains(operands, result)}
    assert roles in found
    assert len(found) == count


def test_none_of_an_index_that_is_alone():
    assert chains((("a", "b"), ("b", "c"), ("c", "d")), ("a",)) == []
    assert chains((("a", "b"), ("b", "c"), ("c",)), ("a", "z")) == []


@pytest.mark.parametrize("swapped", [False, True])
def test_the_fastest_form_is_taken(swapped):
    """Whether the rows' first mode is contracted first, or the second."""
    sizes = {"o1": 256, "i1": 64, "r": 4, "b": 4096, "i2": 64, "o2": 64}
    if swapped:
        sizes |= {"o1": 64, "o2": 256}
    operands, table = (("o1", "i1", "r"), ("b", "i1", "i2"), ("r", "o2", "i2")), launch_tables.shipped("sm_90")
    chain, found = best(operands, ("b", "o1", "o2"), sizes, "half", table)
    problems = [one.problem(sizes, "half") for one in chains(operands, ("b", "o1", "o2"))]
    assert found.seconds == min(launch.launch(problem, table).seconds for problem in problems)
    assert chain.problem(sizes, "half").flops == min(problem.flops for problem in problems)


@pytest.mark.parametrize(("dtype", "itemsize"), [("half", 2), ("tf32", 4), ("float32", 4)])
@pytest.mark.parametrize("processors", [1, 10**9], ids=["whole", "shared"])
def test_the_bytes_of_a_launch(dtype, itemsize, processors):
    """Parts are float32; the kernel that adds them reads them all and writes the result."""
    problem, table = Problem((2, 3), 20, 64, 48, 64, 64, False, True, dtype), launch_tables.shipped("sm_90")
    found = launch.launch(problem, replace(table, processors=processors, step=1e-12 if processors == 1 else 1.0))
    result = 2 * 3 * 64 * 48
    assert (found.parts > 1) == (processors > 1)
    assert found.stored == found.parts * result
    moved = found.stored * itemsize if found.parts == 1 else 2 * 4 * found.stored + result * itemsize
    assert found.cost.bytes(itemsize) == found.loaded * itemsize + moved
    assert found.cost.flops == found.flops


def test_a_program_counts_the_adding_of_parts():
    """At a single row the steps of TT(0.1) of 4096 x 4096 are shared."""
    operands, result = (("o1", "i1", "r"), ("r", "o2", "i2")), ("batch", "o1", "o2")
    network = Network(operands, {"r": 204}, linear_modes((64, 64), (64, 64)))
    rows, sizes = ("batch", "i1", "i2"), {**network.size, "batch": 1}
    _, found = best((rows, *operands), result, sizes, "half", launch_tables.table("sm_90"))
    task = Task(1, dtype="bfloat16", itemsize=2, arch="sm_90")
    made = fused.candidate(network, task, machine.shipped("cuda"))
    assert found.parts > 1
    assert made.launches == 2
    assert made.cost == found.cost
    assert made.seconds == found.seconds
    assert made.cost.bytes(2) == 2 * found.loaded + 8 * found.stored + 2 * 4096
