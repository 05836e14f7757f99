"""Programs: every one that the search can find computes the product and its gradients, in chunks of any size."""

import itertools
import math

import pytest
import torch
from hypothesis import given, reject
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tensorlayers import codegen, lowering, matmul
from tensorlayers.errors import FormatError
from tensorlayers.formats import available
from tensorlayers.machine import Machine
from tensorlayers.program import Task
from tensorlayers.testing import assert_close, relative_error
from tests.engine.support import NETWORKS, large, network_of, operands, truth
from tests.machine import TYPICAL

TASKS = [(False, False), (True, False), (False, True), (True, True)]
every_network = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
every_format = pytest.mark.parametrize("cls", available().values(), ids=available())


def found(network, rows=64, x=False, cores=False, machine=TYPICAL):
    """The candidates of a task, those that take the rows in chunks among them."""
    task = Task(rows, x, cores)
    pieces = [lowering.chunked(network, task, machine, variant) for variant in ("contraction", "merged", "rebuild")]
    return [*lowering.candidates(network, task, machine).values(), *(piece for piece in pieces if piece)]


def example(network, rows):
    """Operands, a gradient of the result, and the truth."""
    x, cores, bias = operands(network, rows)
    dy = torch.randn(rows, network.features("out"), dtype=torch.float64)
    return x, cores, bias, dy, *truth(network, x, cores, dy)


def check(program, given, chunk, needs=None):
    """Hold forward and gradients of a program to the reference, on an `example`."""
    x, cores, bias, dy, y, expected = given
    needs = [True] * (1 + len(cores)) if needs is None else needs
    with torch.no_grad():
        assert_close(matmul.forward(program, x, cores, None, chunk), y, torch.float64, "product")
        assert_close(matmul.forward(program, x, cores, bias, chunk), y + bias, torch.float64, "product and bias")
        actual = matmul.gradients(program, dy, x, cores, needs, chunk)
    for k, (ours, theirs, is_needed) in enumerate(zip(actual, expected, needs, strict=True)):
        assert (ours is not None) == is_needed
        if is_needed:
            assert ours.is_contiguous()
            assert_close(ours, theirs, torch.float64, f"gradient {k}")


@pytest.mark.parametrize("task", TASKS, ids=["forward", "dx", "cores", "both"])
@every_network
def test_every_variant_over_rows_and_chunks(network, task):
    programs = {candidate.program.steps: candidate.program for candidate in found(network, 64, *task)}
    for rows, chunks in {1: [0], 2: [3], 7: [1, 3], 33: [0, 3, 64]}.items():
        given = example(network, rows)
        for program, chunk in itertools.product(programs.values(), chunks):
            check(program, given, chunk)


@every_network
def test_programs_for_a_single_row(network):
    for candidate in found(network, 1):
        assert candidate.program.single
        check(candidate.program, example(network, 1), 0)


@every_network
def test_any_subset_of_the_gradients(network):
    candidate = lowering.candidates(network, Task(64, True, True), TYPICAL)["contraction"]
    given = example(network, 7)
    for needs in itertools.product([False, True], repeat=1 + len(network.cores)):
        check(candidate.program, given, 3, needs)


SECONDS = st.sampled_from([1e-12, 1e-6, 1e-3])
RATE = st.sampled_from([1e6, 1e9, 1e12])


@every_format
def test_whatever_the_machine_makes_the_search_prefer(cls):
    """The constants decide between layouts, copies and batches, so that all of these are tried."""

    @given(
        out_modes=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple),
        in_modes=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple),
        rank=st.integers(1, 3),
        constants=st.fixed_dictionaries(
            {"memory": RATE, "cached": RATE, "permuted": RATE, "launch": SECONDS, "cache": st.sampled_from([64, 10**6])}
        ),
        half=st.fixed_dictionaries({name: st.sampled_from([1e-6, 1.0, 100.0]) for name in "mkn"}),
        rows=st.sampled_from([1, 2, 64, 1024]),
        task=st.sampled_from(TASKS),
        given_rows=st.integers(1, 40),
        chunk=st.integers(0, 45),
        needed=st.sets(st.integers(0, 6)),
    )
    def check_one(out_modes, in_modes, rank, constants, half, rows, task, given_rows, chunk, needed):
        try:
            network = network_of(cls, out_modes, in_modes, rank)
        except FormatError:  # of a single core
            reject()
        machine = Machine("drawn", 0, {"float32": 1e9}, half, function=1e-5, **constants)
        for candidate in found(network, rows, *task, machine):
            program = candidate.program
            needs = [k in needed for k in range(1 + len(network.cores))]
            given = example(network, 1 if program.single else given_rows)
            check(program, given, 0 if program.single else chunk, needs)

    check_one()


@every_network
def test_what_is_generated_equals_what_is_carried_out(network):
    for candidate in [*found(network, 64), *found(network, 1)]:
        program, rows = candidate.program, 1 if candidate.program.single else 7
        x, cores, bias = operands(network, rows)
        dy = torch.randn(rows, network.features("out"), dtype=torch.float64)
        y, expected = truth(network, x, cores, dy)
        run = codegen.compiled(program)
        assert codegen.compiled(program) is run
        leaves = [tensor.requires_grad_() for tensor in (x, *cores)]
        for added in (None, bias):
            ours = run(x, cores, added)
            assert_close(ours, y if added is None else y + added, torch.float64)
            for gradient, theirs in zip(torch.autograd.grad(ours, leaves, dy), expected, strict=True):
                assert_close(gradient, theirs, torch.float64)


def test_a_large_core_meets_a_single_row_in_pieces():
    network = network_of(available()["lowrank"], (512,), (256,), 128)
    program = lowering.candidates(network, Task(1), TYPICAL)["contraction"].program
    assert any(codegen.rows_of_one(step) for step in program.steps)
    assert "linear_row" in codegen.source(program)
    check(program, example(network, 1), 0)


LARGE = large()


@pytest.mark.parametrize("network", LARGE.values(), ids=LARGE)
class TestStrides:
    def test_operands_that_are_not_contiguous(self, network):
        x, cores, _ = operands(network, 80)
        dy = torch.randn(80, 192, dtype=torch.float64)
        y, expected = truth(network, x, cores, dy)
        turned = [torch.stack([t, t], -1)[..., 0] for t in (x, *cores)]
        columns = [t.movedim(0, -1).contiguous().movedim(-1, 0) for t in (x, *cores)]
        for rows, *others in (turned, columns):
            assert not rows.is_contiguous()
            for candidate in found(network, 256, True, True):
                with torch.no_grad():
                    given = dy.T.contiguous().T
                    assert_close(matmul.forward(candidate.program, rows, others, None, 32), y, torch.float64)
                    needs = [True] * (1 + len(cores))
                    actual = matmul.gradients(candidate.program, given, rows, others, needs, candidate.chunk)
                for ours, theirs in zip(actual, expected, strict=True):
                    assert_close(ours, theirs, torch.float64)

    def test_a_gradient_without_memory_of_its_own(self, network):
        """That of a sum is one number seen as a tensor."""
        x, cores, _ = operands(network, 40)
        for dy in (torch.ones((), dtype=torch.float64).expand(40, 192), torch.randn(192).double().expand(40, 192)):
            expected = truth(network, x, cores, dy)[1]
            for candidate in found(network, 64, True, True):
                with torch.no_grad():
                    actual = matmul.gradients(candidate.program, dy, x, cores, [True] * (1 + len(cores)), 16)
                for ours, theirs in zip(actual, expected, strict=True):
                    assert_close(ours, theirs, torch.float64)

    def test_results_share_no_memory_with_what_is_given(self, network):
        x, cores, _ = operands(network, 8)
        dy = torch.randn(8, 192, dtype=torch.float64)
        with torch.no_grad():
            for candidate in [*found(network, 64), *found(network, 64, True, True)]:
                made = [matmul.forward(candidate.program, x, cores, None, chunk) for chunk in (0, 3)]
                made += matmul.gradients(candidate.program, dy, x, cores, [True] * (1 + len(cores)), 3)
                memory = [tensor.untyped_storage().data_ptr() for tensor in (x, dy, *cores, *made)]
                assert len(set(memory)) == len(memory)

    def test_the_same_bits_every_time(self, network):
        x, cores, bias = operands(network, 100, torch.float32)
        dy = torch.randn(100, 192)
        for candidate in found(network, 64, True, True):
            runs = []
            with torch.no_grad():
                for _ in range(2):
                    y = matmul.forward(candidate.program, x, cores, bias, 32)
                    runs.append([y, *matmul.gradients(candidate.program, dy, x, cores, [True] * (1 + len(cores)), 32)])
            assert all(map(torch.equal, *runs))

    def test_in_half_precision_chunks_are_summed_in_single(self, network):
        x, cores, _ = operands(network, 2048, torch.bfloat16)
        dy = torch.randn(2048, 192, dtype=torch.bfloat16)
        expected = truth(network, x.double(), [core.double() for core in cores], dy.double())[1]
        for candidate in found(network, 64, True, True):
            needs = [False] + [True] * len(cores)
            with torch.no_grad():
                actual = matmul.gradients(candidate.program, dy, x, cores, needs, 16)
                whole = matmul.gradients(candidate.program, dy, x, cores, needs)
            for ours, other, theirs in zip(actual[1:], whole[1:], expected[1:], strict=True):
                assert ours.dtype == torch.bfloat16
                assert_close(ours, theirs, torch.bfloat16)
                assert relative_error(ours, theirs) <= 1.5 * relative_error(other, theirs)

    def test_flops_are_those_that_torch_counts(self, network):
        """Elementwise products of cores are not among what torch counts."""
        x, cores, _ = operands(network, 64, torch.float32)
        dy = torch.randn(64, 192)
        for task in TASKS:
            for candidate in found(network, 64, *task):
                needs = [task[0]] + [task[1]] * len(cores)
                with torch.no_grad(), FlopCounterMode(display=False) as counter:
                    if any(task):
                        matmul.gradients(candidate.program, dy, x, cores, needs, candidate.chunk)
                    else:
                        matmul.forward(candidate.program, x, cores, None, candidate.chunk)
                assert candidate.cost.flops == counter.get_total_flops() + elementwise(candidate.program, task[1])


def elementwise(program, with_gradients):
    """The FLOPs of a program's products of cores that sum nothing."""
    merges = [step.group.merge for step in program.steps if step.group.merge]
    pairs = [list(zip(plan.steps, plan.step_costs(), strict=True)) for plan in merges]
    pairs += [again[:-1] for again in pairs if with_gradients]
    return sum(cost.flops for pair in pairs for step, cost in pair if step.is_product)


def test_chunks_of_intermediates_that_fit_the_cache():
    for name, network in large().items():
        for candidate in found(network, 16384):
            if candidate.chunk:
                assert candidate.chunk == 1 << (candidate.chunk.bit_length() - 1) >= 16, name
                assert candidate.largest * 4 <= TYPICAL.cache or candidate.chunk == 16
                whole = lowering.candidates(network, Task(16384), TYPICAL)["contraction"]
                assert candidate.largest <= whole.largest or candidate.program.steps != whole.program.steps


def test_order_of_ten_modes_is_searched_in_little_time():
    """Of many cores only the best few sets are followed: 2^21 of them would take hours."""
    network = network_of(available()["tucker"], (2,) * 10, (2,) * 10, 2)
    (program,) = {lowering.candidates(network, Task(4), TYPICAL)["contraction"].program}
    assert sorted(k for step in program.steps for k in step.group.cores) == list(range(21))
    assert math.prod(network.mode_sizes("in")) == 1024
    check(program, example(network, 2), 0, [True] + [False] * 21)
