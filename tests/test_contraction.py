"""Plans: right, pairwise, cached, the cheapest there is; and what is computed with them."""

import itertools
import math
import string

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensorlayers import contraction, functional, testing
from tensorlayers.contraction import BATCH, batch_class, contract, dense_plan, execute, linear_plan, plan
from tensorlayers.cost import Cost, dense_linear
from tensorlayers.errors import NetworkError
from tensorlayers.formats import BTT, TT, LowRank, available
from tensorlayers.network import Mode, Network
from tensorlayers.tensorize import boxes

FORMATS = [pytest.param(cls, id=name) for name, cls in available().items()]
ORDERS = (2, 3, 4)
OUTS, INS = (3, 2, 4, 2), (2, 5, 2, 3)


def network_of(cls, rank, out_modes, in_modes):
    return cls(rank, out_modes=out_modes, in_modes=in_modes).network(math.prod(out_modes), math.prod(in_modes))


def draw_cores(network, dtype=torch.float64):
    return [torch.randn(shape, dtype=dtype) for shape in network.core_shapes]


def einsum(terms, output, operands):
    """The contraction in float64 by NumPy, all operands at once."""
    letters = dict(zip(dict.fromkeys(itertools.chain(*terms)), string.ascii_letters))
    equation = ",".join("".join(letters[index] for index in term) for term in terms)
    arrays = [operand.double().numpy() for operand in operands]
    return torch.from_numpy(numpy.asarray(numpy.einsum(f"{equation}->{''.join(letters[i] for i in output)}", *arrays)))


@st.composite
def problems(draw, min_operands=1, max_operands=5, indices=6):
    """Random terms, output and sizes: an index may sit on any number of operands, be kept or summed."""
    names = [f"n{k}" for k in range(indices)]
    terms = draw(
        st.lists(
            st.lists(st.sampled_from(names), min_size=0, max_size=4, unique=True).map(tuple),
            min_size=min_operands,
            max_size=max_operands,
        ).map(tuple)
    )
    used = list(dict.fromkeys(itertools.chain(*terms)))
    output = tuple(draw(st.permutations(used)))[: draw(st.integers(0, len(used)))]
    sizes = tuple((index, draw(st.integers(1, 4))) for index in used)
    return terms, output, sizes


def draw_operands(terms, sizes):
    size = dict(sizes)
    return [torch.randn([size[index] for index in term], dtype=torch.float64) for term in terms]


def score(left, right, result, size):
    volumes = [math.prod(size[index] for index in term) for term in (left, right, result, {*left, *right})]
    return 2 * volumes[3] + sum(volumes[:3])


def cheapest(terms, output, size):
    """The lowest score of all pairwise orders, one tried after the other."""
    if len(terms) == 1:
        return 0
    scores = []
    for left, right in itertools.combinations(range(len(terms)), 2):
        others = [term for k, term in enumerate(terms) if k not in (left, right)]
        needed = set(output).union(*others)
        result = {*terms[left], *terms[right]} & needed
        scores.append(score(terms[left], terms[right], result, size) + cheapest([*others, result], output, size))
    return min(scores)


# Correctness


@given(problems())
def test_execute_equals_einsum(problem):
    terms, output, sizes = problem
    operands = draw_operands(terms, sizes)
    truth = einsum(terms, output, operands)
    size = einsum(terms, output, [operand.abs() for operand in operands])
    testing.assert_close(execute(plan(terms, output, sizes), operands), truth, torch.float64, scale=float(size.norm()))


@given(problems(min_operands=10, max_operands=12, indices=8))
def test_more_operands_than_are_planned_exactly(problem):
    terms, output, sizes = problem
    sizes = tuple((index, min(size, 3)) for index, size in sizes)
    operands = draw_operands(terms, sizes)
    truth = einsum(terms, output, operands)
    size = einsum(terms, output, [operand.abs() for operand in operands])
    testing.assert_close(execute(plan(terms, output, sizes), operands), truth, torch.float64, scale=float(size.norm()))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("cls", FORMATS)
def test_to_dense(cls, order):
    network = network_of(cls, 3, OUTS[:order], INS[:order])
    cores = draw_cores(network)
    testing.assert_close(contraction.to_dense(network, cores), testing.dense_by_hand(network, cores), torch.float64)


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("cls", FORMATS)
def test_linear(cls, order, rows):
    network = network_of(cls, 3, OUTS[:order], INS[:order])
    cores = draw_cores(network)
    x = torch.randn(rows, network.features("in"), dtype=torch.float64)
    dense = testing.dense_by_hand(network, cores).reshape(network.features("out"), network.features("in"))
    testing.assert_close(functional.linear(x, network, cores), x @ dense.T, torch.float64)


def test_greedy_orders_of_long_trains():
    network = network_of(TT, 3, (2,) * 10, (2,) * 10)
    cores = draw_cores(network)
    x = torch.randn(3, 1024, dtype=torch.float64)
    weight = testing.dense_by_hand(network, cores).reshape(1024, 1024)
    assert len(linear_plan(network, 1).terms) == 11
    testing.assert_close(functional.linear(x, network, cores), x @ weight.T, torch.float64)
    testing.assert_close(contraction.squared_norm(network, cores), weight.square().sum(), torch.float64)
    # Along the train, and never by way of anything like the dense weight.
    assert linear_plan(network, 1).largest <= 4 * 1024 * 3


def test_contract_takes_sizes_by_name():
    a, b = torch.randn(2, 3, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    sizes = {"i": 2, "j": 3, "k": 4, "elsewhere": 9}
    testing.assert_close(contract((("i", "j"), ["j", "k"]), ["k", "i"], (a, b), sizes), (a @ b).T, torch.float64)


def test_plan_refuses_output_that_no_operand_carries():
    with pytest.raises(NetworkError, match=r"output \('n', 'z'\): every index sits on an operand; \['z'\]"):
        plan((("n", "i"),), ("n", "z"), (("n", 2), ("i", 3), ("z", 4)))


@pytest.mark.parametrize("cls", FORMATS)
def test_to_dense_refuses_cores_of_other_shapes(cls):
    network = network_of(cls, 2, (3, 4), (2, 5))
    cores = draw_cores(network)
    for wrong in (cores[:-1], [*cores, cores[0]], [cores[0][:-1], *cores[1:]], cores[::-1]):
        with pytest.raises(NetworkError, match=r"cores: shapes are .*; got "):
            contraction.to_dense(network, wrong)


# The batch


@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3), (), (1,), (2, 3)], ids=str)
@pytest.mark.parametrize("cls", FORMATS)
def test_any_leading_dimensions_and_none(cls, lead):
    network = network_of(cls, 2, (3, 4), (2, 5))
    cores = [core.requires_grad_() for core in draw_cores(network)]
    x = torch.randn(*lead, 10, dtype=torch.float64, requires_grad=True)
    y = functional.linear(x, network, cores, torch.ones(12, dtype=torch.float64))
    assert y.shape == (*lead, 12)
    gradients = torch.autograd.grad(y.sum(), [x, *cores])
    if 0 in lead:
        assert all(not gradient.any() for gradient in gradients)
    dense = testing.dense_by_hand(network, cores).reshape(12, 10)
    testing.assert_close(y, x.detach() @ dense.T + 1, torch.float64)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [(0, 1), (1, 1), (2, 16), (16, 16), (17, 256), (256, 256), (257, 4096), (4096, 4096), (10**9, 4096)],
)
def test_batch_class(batch, expected):
    assert batch_class(batch) == expected


def test_resized_is_the_same_order_with_other_counts():
    network = network_of(LowRank, 8, (32,), (48,))
    small = linear_plan(network, 16)
    large = small.resized(BATCH, 64)
    assert large.steps == small.steps
    assert large.flops == 4 * small.flops
    assert dict(large.sizes)[BATCH] == 64
    assert dict(small.sizes)[BATCH] == 16
    x, cores = torch.randn(64, 48, dtype=torch.float64), draw_cores(network)
    testing.assert_close(execute(large, (x, *cores)), execute(small, (x, *cores)), torch.float64)


# Pairwise, cached, optimal


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("cls", FORMATS)
def test_no_einsum_of_more_than_two_operands(monkeypatch, cls, order):
    counts = []
    original = torch.einsum

    def counted(equation, *operands):
        counts.append(len(operands))
        return original(equation, *operands)

    monkeypatch.setattr(torch, "einsum", counted)
    network = network_of(cls, 2, OUTS[:order], INS[:order])
    cores = draw_cores(network)
    for rows in (1, 16, 300):
        functional.linear(torch.randn(rows, network.features("in"), dtype=torch.float64), network, cores)
    contraction.to_dense(network, cores)
    contraction.squared_norm(network, cores)
    contraction.total(network, cores)
    # A step that sums nothing is an elementwise product instead.
    assert 0 < len(counts) <= 3 * len(cores) + 2 * (len(cores) - 1) + 2 * len(cores) - 1
    assert max(counts) <= 2


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("cls", FORMATS)
def test_plans_are_pairwise_and_end_in_the_output(cls, order):
    network = network_of(cls, 2, OUTS[:order], INS[:order])
    for made in (linear_plan(network, 16), dense_plan(network)):
        assert len(made.steps) == len(made.terms) - 1
        assert all(len(step.operands) == 2 for step in made.steps)
        assert made.steps[-1].result == made.output


@pytest.mark.parametrize("cls", FORMATS)
def test_plans_are_cached(cls):
    one, same = (network_of(cls, 2, (3, 4), (2, 5)) for _ in range(2))
    assert one is not same
    assert linear_plan(one, 16) is linear_plan(same, 16)
    assert dense_plan(one) is dense_plan(same)
    assert linear_plan(one, 16) is not linear_plan(one, 256)


@given(problems(min_operands=2, max_operands=4))
def test_no_pairwise_order_is_cheaper(problem):
    terms, output, sizes = problem
    assert plan(terms, output, sizes).cost.score == cheapest([set(term) for term in terms], output, dict(sizes))


@pytest.mark.parametrize("cls", FORMATS)
def test_no_pairwise_order_of_a_layer_is_cheaper(cls):
    network = network_of(cls, 4, (4, 12), (16, 2))
    for batch in contraction.BATCH_CLASSES:
        made = linear_plan(network, batch)
        terms = [set(term) for term in made.terms]
        assert made.cost.score == cheapest(terms, made.output, dict(made.sizes))


# Counts by hand


@pytest.mark.parametrize(
    ("outs", "ins", "rank"), [((16, 64), (32, 32), 4), ((64, 16), (32, 32), 4), ((2, 512), (512, 2), 8)]
)
def test_flops_of_tt_of_order_2(outs, ins, rank):
    network = network_of(TT, rank, outs, ins)
    made = linear_plan(network, 4096)
    dense = dense_linear(1024, 1024, 4096).flops
    orders = [
        rank * dense // outs[0] + rank * dense // ins[1],
        rank * dense // ins[0] + rank * dense // outs[1],
    ]
    assert made.flops == min(orders)
    assert made.macs == made.flops // 2


def test_flops_of_low_rank():
    made = linear_plan(network_of(LowRank, 8, (96,), (64,)), 256)
    assert [cost.flops for cost in made.step_costs()] == [2 * 256 * 8 * 64, 2 * 256 * 8 * 96]
    assert [cost.elements for cost in made.step_costs()] == [
        256 * 64 + 8 * 64 + 256 * 8,
        256 * 8 + 8 * 96 + 256 * 96,
    ]
    assert made.largest == 256 * 8


def test_flops_of_btt_fall_as_parameters_do():
    network = network_of(BTT, 3, (24, 4), (4, 16))
    made = linear_plan(network, 4096)
    assert made.flops == 2 * 4096 * network.num_parameters
    assert made.largest == 4096 * 3 * 4 * 4


def test_dense_linear_cost():
    assert dense_linear(12, 10, 7) == Cost(2 * 7 * 12 * 10, 12 * 10 + 7 * 10 + 7 * 12)


def test_cost_arithmetic():
    cost = Cost(10, 3) + Cost(4, 2)
    assert (cost, cost.macs, cost.bytes(), cost.bytes(2), cost.score) == (Cost(14, 5), 7, 20, 10, 19)


def test_a_lone_operand_is_read_once():
    made = plan((("a", "b"),), ("b", "a"), (("a", 3), ("b", 4)))
    assert made.cost.elements == 12 + 12
    assert made.largest == 0


def test_small_batches_may_take_another_order():
    # At one row it is cheapest to stay with the vector; at many, to multiply the cores first.
    network = network_of(TT, 64, (8, 8), (8, 8))
    assert [len(linear_plan(network, batch).steps) for batch in (1, 4096)] == [2, 2]
    first = [linear_plan(network, batch).steps[0].operands for batch in (1, 4096)]
    assert BATCH in first[0][0] + first[0][1]
    assert BATCH not in first[1][0] + first[1][1]


def test_plan_prints_every_step():
    made = linear_plan(network_of(TT, 4, (16, 64), (32, 32)), 4096)
    lines = str(made).splitlines()
    assert len(lines) == 1 + len(made.steps) + 1
    for number, (line, step, cost) in enumerate(zip(lines[1:-1], made.steps, made.step_costs(), strict=True), 1):
        shape = ", ".join(str(dict(made.sizes)[index]) for index in step.result)
        assert line.startswith(str(number))
        assert "  x  ".join(" ".join(operand) for operand in step.operands) in line
        assert f"-> {' '.join(step.result)}" in line
        assert f"({shape})" in line
        assert f"{cost.flops:,}" in line
        assert line.endswith(f"{4 * cost.elements:,}")
    assert f"{made.flops:,} FLOPs" in lines[-1]
    assert f"{made.cost.bytes():,} bytes" in lines[-1]
    assert f"largest intermediate: {made.largest:,} elements" in lines[-1]


def test_plan_prints_operands_without_indices():
    made = plan(((), ("a",)), ("a",), (("a", 3),))
    assert "1  x  a -> a" in str(made)


# Norms and sums of the dense weight


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("cls", FORMATS)
def test_squared_norm_and_total(cls, order):
    network = network_of(cls, 3, OUTS[:order], INS[:order])
    cores = draw_cores(network)
    dense = testing.dense_by_hand(network, cores)
    testing.assert_close(contraction.squared_norm(network, cores), dense.square().sum(), torch.float64)
    testing.assert_close(contraction.total(network, cores), dense.sum(), torch.float64, scale=float(dense.abs().sum()))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("cls", FORMATS)
def test_squared_norm_and_total_of_slices(cls, order):
    # What is left of the dense weight when padding is cut off: the sums over boxes of the modes.
    network = network_of(cls, 2, OUTS[:order], INS[:order])
    cores = draw_cores(network)
    rows, columns = network.features("out") - 1, network.features("in") - 3
    dense = testing.dense_by_hand(network, cores).reshape(rows + 1, columns + 3)[:rows, :columns]
    squares, entries = [], []
    for out_box, in_box in itertools.product(
        boxes(rows, network.mode_sizes("out")), boxes(columns, network.mode_sizes("in"))
    ):
        cut = dict(zip((*network.names("out"), *network.names("in")), (*out_box, *in_box), strict=True))
        sliced = [
            core[tuple(cut.get(index, slice(None)) for index in names)]
            for names, core in zip(network.cores, cores, strict=True)
        ]
        squares.append(contraction.squared_norm(network, sliced))
        entries.append(contraction.total(network, sliced))
    testing.assert_close(torch.stack(squares).sum(), dense.square().sum(), torch.float64)
    testing.assert_close(torch.stack(entries).sum(), dense.sum(), torch.float64, scale=float(dense.abs().sum()))


def test_squared_norm_is_differentiable():
    network = network_of(TT, 3, (3, 4), (2, 5))
    cores = [core.requires_grad_() for core in draw_cores(network)]
    assert torch.autograd.gradcheck(lambda *cores: contraction.squared_norm(network, cores), cores)


def test_a_hyperindex_on_three_cores():
    network = Network(
        (("o", "h", "r"), ("h", "k", "r"), ("k", "i", "h", "r")),
        {"r": 3, "k": 2},
        (Mode("o", 4, "out"), Mode("h", 2, "group"), Mode("i", 5, "in")),
    )
    cores = draw_cores(network)
    truth = torch.einsum("ohr,hkr,kihr->ohi", *cores)
    testing.assert_close(contraction.to_dense(network, cores), truth, torch.float64)
    testing.assert_close(contraction.squared_norm(network, cores), truth.square().sum(), torch.float64)
