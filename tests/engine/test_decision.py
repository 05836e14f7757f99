"""Which way is chosen: by predicted time, for a few numbers of rows, once."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensorlayers import (
    BTT,
    CP,
    TT,
    FactorizedLinear,
    KernelError,
    LowRank,
    Tucker,
    autograd,
    decision,
    dispatch,
    machine,
    orders,
    products,
)
from tensorlayers.decision import NAMES, ROWS, rows_class
from tensorlayers.formats import available
from tensorlayers.program import Task
from tests.engine.support import NETWORKS, large, layer_of, operands
from tests.machine import TYPICAL

LARGE = large()
every_network = pytest.mark.parametrize("network", LARGE.values(), ids=LARGE)


def taken(network, task, forced=None, on=TYPICAL):
    """The name of the option that is taken, of which there is one."""
    (name,) = (o.name for o in decision.options(network, task, on, forced) if o.candidate and not o.refusal)
    return name


class TestClasses:
    def test_every_number_of_rows_takes_the_nearest_as_a_factor(self):
        for rows in range(2, 20_000):
            best = min(ROWS[1:], key=lambda c: (abs(math.log(c / rows)), c))
            assert rows_class(rows) == best

    def test_one_row_has_its_own(self):
        assert [rows_class(rows) for rows in (0, 1, 2)] == [1, 1, 4]

    @pytest.mark.parametrize(
        ("rows", "expected"),
        [(8, 4), (9, 16), (32, 16), (33, 64), (128, 64), (129, 256), (512, 256), (513, 1024), (10**9, 16384)],
    )
    def test_thresholds(self, rows, expected):
        assert rows_class(rows) == expected


class TestCaching:
    def test_by_class_and_never_by_the_exact_batch(self):
        product = autograd.built(products.row_product(TT(7).network(210, 240)))
        before = decision._options.cache_info()
        chosen = set()
        for rows in range(1, 3000, 7):
            chosen.add(product._decided(torch.empty(rows, 240))[0])
        after = decision._options.cache_info()
        assert after.misses - before.misses == len(chosen) == len(ROWS) - 1  # 16384 is beyond

    def test_by_the_number_of_threads(self):
        network, task = TT(5).network(210, 240), Task(256)
        on = machine.shipped("cpu")
        one = decision.decide(network, task, on)
        try:
            torch.set_num_threads(2)
            two = decision.decide(network, task, on)
        finally:
            torch.set_num_threads(1)
        assert two.seconds < one.seconds
        assert decision.decide(network, task, on) is one
        assert not TYPICAL.threads  # a machine whose rates do not depend on them
        assert decision.decide(network, task, TYPICAL) is decision.decide(network, task, TYPICAL)

    def test_by_the_network_not_the_object(self):
        first, second = (TT(6).network(210, 240) for _ in range(2))
        assert first is not second
        assert decision.decide(first, Task(64), TYPICAL) is decision.decide(second, Task(64), TYPICAL)


class TestForced:
    @pytest.mark.parametrize("name", NAMES)
    @every_network
    def test_it_is_what_is_taken_where_it_exists(self, network, name):
        task = Task(4096)
        existing = {o.name for o in decision.options(network, task, TYPICAL) if o.candidate}
        if name not in existing:
            (vain,) = (o for o in decision.options(network, task, TYPICAL, name) if o.name == name)
            assert "in vain" in vain.refusal
        chosen = taken(network, task, name)
        assert chosen == (name if name in existing else taken(network, task))
        if name in existing:
            others = [o for o in decision.options(network, task, TYPICAL, name) if o.candidate and o.name != name]
            assert all(o.refusal == f"{name!r} is demanded" for o in others)

    def test_each_exists_for_some_network(self):
        found = {o.name for n in LARGE.values() for o in decision.options(n, Task(4096), TYPICAL) if o.candidate}
        assert found == set(NAMES)

    @pytest.mark.parametrize("name", ["dense", "", "Rebuild", "tt3"])
    def test_unknown_names_are_refused(self, name):
        layer = layer_of(TT)
        x, cores = torch.randn(4, 64), layer.own_cores()
        with pytest.raises(KernelError, match=f"implementation: .*; got {name!r}"):
            dispatch.linear(x, layer.network, cores, implementation=name)


class TestChoice:
    @every_network
    @pytest.mark.parametrize("task", [Task(256), Task(256, x=True), Task(256, True, True), Task(1)], ids=str)
    def test_the_least_estimate_is_taken_and_every_other_has_a_reason(self, network, task):
        options = decision.options(network, task, TYPICAL)
        assert tuple(o.name for o in options) == NAMES
        times = {o.name: o.seconds for o in options if o.candidate}
        assert taken(network, task) == min(times, key=times.__getitem__)
        assert decision.decide(network, task, TYPICAL).seconds == min(times.values())
        for option in options:
            assert (option.seconds is None) == (option.candidate is None)
            assert (option.refusal == "") == (option.name == taken(network, task))

    @pytest.mark.parametrize("name", LARGE)
    def test_more_than_the_dense_weight_is_not_held_between_steps(self, name):
        """Of small weights, more than what is cached."""
        network = LARGE[name]
        most = max(network.features("in") * network.features("out"), TYPICAL.cache // 4)
        for task in (Task(rows, *of) for rows in ROWS for of in ((), (True, True))):
            for option in decision.options(network, task, TYPICAL):
                held = 0
                if option.candidate and not option.candidate.chunk:
                    held = option.candidate.program.intermediate * task.rows
                assert held <= most or option.name != taken(network, task)
                said = f"{held * 4 / 1e6:.0f} MB between its steps"
                assert (option.refusal == said) == (held > most)

    @pytest.mark.parametrize("format", [TT(256), CP(2048), Tucker((64, 64, 64, 64)), BTT(128), LowRank(700)], ids=str)
    def test_of_more_flops_than_dense_the_weight_is_rebuilt_for_many_rows(self, format):
        network = format.network(768, 768)
        (contraction, *_) = decision.options(network, Task(16384), TYPICAL)
        assert contraction.candidate.cost.flops > 2 * 16384 * 768 * 768
        for task in (Task(16384), Task(16384, True, True)):
            assert taken(network, task) == "rebuild"

    @pytest.mark.parametrize("format", [TT(2), Tucker(4), LowRank(16), BTT(1)], ids=str)
    def test_of_few_flops_it_is_not(self, format):
        network = format.network(768, 768)
        for rows in ROWS:
            assert taken(network, Task(rows)) != "rebuild"

    def test_the_factors_of_cp_are_multiplied_for_many_rows(self):
        assert taken(CP(64).network(768, 768), Task(4096)) in ("merged", "chunks")
        program = decision.decide(CP(64).network(768, 768), Task(4096), TYPICAL).program
        assert len(program.steps) == 2


class TestEstimates:
    @every_network
    @pytest.mark.parametrize("flags", [(False, False), (True, False), (False, True), (True, True)])
    def test_more_rows_never_take_less_time(self, network, flags):
        rows = sorted({1, 2, 3, *(c + d for c in ROWS for d in (-1, 0, 1, c // 2, c)), 10**6} - {0})
        times = [decision.predicted(network, Task(n, *flags), machine.shipped("cpu")) for n in rows]
        assert times == sorted(times)

    @every_network
    def test_the_classes_have_their_own_estimate(self, network):
        for rows in ROWS:
            task = Task(rows)
            assert decision.predicted(network, task, TYPICAL) == decision.decide(network, task, TYPICAL).seconds

    def test_beyond_the_largest_class_in_proportion(self):
        network = LARGE["tt"]
        one, ten = (decision.predicted(network, Task(n * ROWS[-1]), TYPICAL) for n in (1, 10))
        assert ten == pytest.approx(10 * one)

    @given(st.integers(1, 40_000))
    def test_between_the_classes_around_it(self, rows):
        seconds = {n: float(n) ** 0.5 for n in ROWS}
        found = decision.interpolated(rows, seconds.__getitem__)
        below, above = max(n for n in ROWS if n <= rows), min((n for n in ROWS if n >= rows), default=ROWS[-1])
        assert seconds[below] <= found <= max(seconds[above], rows / ROWS[-1] * seconds[ROWS[-1]])

    @every_network
    def test_costs_of_any_number_of_rows(self, network):
        """FLOPs grow with the rows, but for those of products of cores."""
        for option in decision.options_for(network, Task(1500), TYPICAL):
            if option.candidate:
                classed = next(o for o in decision.options(network, Task(1024), TYPICAL) if o.name == option.name)
                fixed = classed.candidate.fixed
                per_row = (classed.candidate.cost.flops - fixed.flops) / 1024
                assert option.candidate.cost.flops == round(1500 * per_row) + fixed.flops

    def test_training_is_forward_backward_and_the_function(self):
        network = LARGE["tucker"]
        parts = [decision.predicted(network, task, TYPICAL) for task in (Task(100), Task(100, True, True))]
        assert decision.training_seconds(network, 100, TYPICAL) == pytest.approx(sum(parts) + TYPICAL.function)

    def test_other_dtypes_and_sizes(self):
        network = LARGE["tt"]
        half = decision.predicted(network, Task(1024, dtype="bfloat16", itemsize=2), TYPICAL)
        assert half < decision.predicted(network, Task(1024), TYPICAL)


class TestOrders:
    @pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
    def test_every_core_meets_the_rows_once(self, network):
        found = orders.orders(network, Task(64), TYPICAL).found
        count = len(network.cores)
        assert "contraction" in found
        assert ("rebuild" in found) == (count > 1)
        for variant, ranked in found.items():
            assert len(ranked) == len(set(ranked))
            for order in ranked:
                assert sorted(k for group in order for k in group) == list(range(count))
                merged = [len(group) for group in order if len(group) > 1]
                expected = {
                    "contraction": not merged,
                    "merged": 0 < len(order) > 1 and merged,
                    "rebuild": merged == [count],
                }
                assert expected[variant]

    def test_of_many_cores_a_few_sets_are_followed(self):
        """Whatever is left out, the best that is found for fewer cores is found so too."""
        network = Tucker(3, order=3).network(192, 256)
        exact = orders.Orders(network, Task(64), TYPICAL).found
        for name, value in (("_EXACT", 2), ("_GROUPED", 2)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(orders, name, value)
                beam = orders.Orders(network, Task(64), TYPICAL).found
            assert beam["contraction"][0] == exact["contraction"][0]


def test_the_product_runs_what_is_decided(monkeypatch):
    """Spied upon: the program and the chunk, forward and backward."""
    seen = []
    for name in ("forward", "gradients"):
        original = getattr(products.matmul, name)

        def watched(program, *args, original=original, name=name):
            seen.append((name, program, args[-2]))
            return original(program, *args)

        monkeypatch.setattr(products.matmul, name, watched)
    for forced in (None, *NAMES):
        layer = FactorizedLinear(256, 192, format=available()["tucker"](6), implementation=forced)
        x = torch.randn(300, 256, requires_grad=True)
        seen.clear()
        layer(x).sum().backward()
        on = machine.machine("cpu")
        tasks = Task(256), Task(256, True, True)
        expected = [decision.decide(layer.network, task, on, forced) for task in tasks]
        names = ("forward", "gradients")
        assert seen == [(name, c.program, c.chunk) for name, c in zip(names, expected, strict=True)]


def test_gradients_of_chunks_are_summed_in_the_order_of_the_rows():
    network = LARGE["tt"]
    x, cores, _ = operands(network, 100, torch.float32)
    dy, program = torch.randn(100, 192), decision.decide(network, Task(64, True, True), TYPICAL).program
    needs = [True] * (1 + len(cores))
    with torch.no_grad():
        whole = products.matmul.gradients(program, dy, x, cores, needs, 32)
        parts = [
            products.matmul.gradients(program, dy[k : k + 32], x[k : k + 32], cores, needs) for k in range(0, 100, 32)
        ]
    assert torch.equal(whole[0], torch.cat([part[0] for part in parts]))
