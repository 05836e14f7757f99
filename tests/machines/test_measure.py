"""The constants that are measured: those that the clock runs by."""

import functools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorlayers import measure, measure_gemm
from tensorlayers.errors import CostModelError
from tensorlayers.machine import product_seconds
from tensorlayers.measure_gemm import Product
from tensorlayers.timing import fastest
from tests.machines.support import KNOWN


def test_what_is_measured_are_the_constants_that_the_clock_runs_by(clock):
    found = measure.measure(threads=1, quick=True, clock=clock)
    assert found.machine.constants() == pytest.approx(KNOWN.constants(), rel=0.2)
    assert found.machine.threads == 1
    assert found.error < 0.01


@pytest.mark.parametrize("quick", [False, True], ids=["", "quick"])
def test_the_products_measured_are_what_the_sampling_says_and_the_same_each_time(quick):
    sampling = measure._CPU.sampling
    found = measure_gemm.products(24 if quick else 64, sampling, 10**6)
    assert found == measure_gemm.products(len(found), sampling, 10**6)
    assert len(set(found)) == len(found)
    for product in found:
        assert sampling.flops[0] <= product.flops <= sampling.flops[1]
        assert 4 * max(product.parts) <= 10**6
        assert all(sampling.sizes[0] <= size <= sampling.sizes[1] for size in product[1:])


PRODUCTS = measure_gemm.products(96, measure._CPU.sampling, 10**7)
FITTED, OTHERS = PRODUCTS[:64], PRODUCTS[64:]


def seconds(product, on):
    """Of a product, by the constants of a machine or of a fit."""
    return 1e-6 + product_seconds(*product, on.flops, on.half) + 4 * product.elements / on.cached


def rates(flops, m, k, n, cached):
    return measure_gemm.Rates(flops, {"m": m, "k": k, "n": n}, cached, 0.0)


SIZE = st.floats(0.05, 64)


@settings(max_examples=10)
@given(st.floats(1e10, 1e13), SIZE, SIZE, SIZE, st.floats(0.05, 2.0))
def test_a_fit_predicts_the_products_that_it_has_not_seen(flops, m, k, n, cached):
    true = rates(flops, m, k, n, flops * cached)
    found = measure_gemm.fit(FITTED, [seconds(product, true) for product in FITTED], 1e-6, KNOWN)
    assert not found.kept
    for product in OTHERS:
        assert seconds(product, found) == pytest.approx(seconds(product, true), rel=0.1)


def test_a_fit_bears_noise_and_outliers():
    source, true = random.Random(1), rates(9e10, 0.5, 3.0, 20.0, 3e10)
    times = [seconds(product, true) * source.uniform(0.9, 1.1) for product in FITTED]
    for k in range(0, len(times), 12):
        times[k] *= 3
    found = measure_gemm.fit(FITTED, times, 1e-6, KNOWN)
    for product in OTHERS:
        assert seconds(product, found) == pytest.approx(seconds(product, true), rel=0.2)
    assert 0.02 < found.error < 0.15


UNTOLD = {"cached": rates(9e10, 0.5, 3.0, 20.0, 1e30), "half.n": rates(9e13, 0.5, 3.0, 1e6, 3e10)}
"""What the times do not tell: products that wait for no memory; sizes that all are next to nothing."""


@pytest.mark.parametrize("name", UNTOLD)
def test_a_constant_that_the_times_do_not_tell_is_the_known_one(name):
    found = measure_gemm.fit(FITTED, [seconds(product, UNTOLD[name]) for product in FITTED], 1e-6, KNOWN)
    assert name in found.kept
    values = {"cached": found.cached, **{f"half.{size}": value for size, value in found.half.items()}}
    assert {one for one in values if values[one] == KNOWN.constants()[one]} == set(found.kept)


def test_times_that_tell_no_rate_are_refused():
    for time in (1e-12, 1e12):
        with pytest.raises(CostModelError, match="do not tell how fast they are"):
            measure_gemm.fit(FITTED, [time] * len(FITTED), 1e-13, KNOWN)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_product_is_the_one_that_its_sizes_say(batch):
    product = Product(batch, 2, 3, 5)
    result = product.prepared(torch.device("cpu"), torch.float64)()
    assert result.shape == ((2, 5) if batch == 1 else (3, 2, 5))
    assert (product.flops, product.elements) == (batch * 60, batch * 31)
    assert product.parts == (batch * 6, batch * 15, batch * 10)
    assert result.dtype == torch.float64


def test_the_fastest_time_of_each_is_taken_all_in_turn():
    now, log = [0.0], []
    takes = {"a": iter([1, 1, 3, 2, 4]), "b": iter([0, 0, 1, 3, 2])}

    def case(name):
        log.append(name)
        now[0] += next(takes[name])

    cases = {name: functools.partial(case, name) for name in takes}
    assert fastest(cases, lambda: now[0], 3) == {"a": 2, "b": 1}
    assert log == ["a", "b"] * 5


def test_repeated_calls_are_divided_and_one_before_them_does_not_count():
    now = [0.0]
    takes = iter([4, 1, 0, 2] * 4)

    def case():
        now[0] += next(takes)

    assert fastest({"a": case}, lambda: now[0], 2, {"a": 3}) == {"a": 1}


def test_on_a_busy_machine_there_are_fewer_repeats():
    now, log = [0.0], []

    def case():
        log.append(now[0])
        now[0] += 15

    assert fastest({"a": case}, lambda: now[0], 25) == {"a": 15}
    assert len(log) == 3


def test_the_threads_are_as_before_whatever_happens(monkeypatch):
    seen = []

    def measured(*arguments, **settings):
        seen.append(torch.get_num_threads())
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "measure_launch", measured)
    monkeypatch.setattr(measure, "share_of_processors", lambda: 1.0)
    with pytest.raises(KeyboardInterrupt):
        measure.measure(threads=2)
    assert (seen, torch.get_num_threads()) == ([2], 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("tpu",), "'tpu'"), (("cpu", 0), "threads 0"), (("cpu", -1), "threads -1"), (("cuda", 2), "threads 2")],
    ids=str,
)
def test_what_cannot_be_measured_is_refused(arguments, message):
    with pytest.raises(CostModelError, match=message):
        measure.measure(*arguments)
