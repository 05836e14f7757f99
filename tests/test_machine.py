"""The constants of a machine: measured with a clock that runs by known ones, kept in a file, and read from there."""

import functools
import json
import os
import random
import re
import stat
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tensorlayers import FactorizedLinear, LowRank, autograd, cli, measure, measure_gemm
from tensorlayers.errors import CostModelError
from tensorlayers.machine import (
    SHIPPED,
    VARIABLE,
    Machine,
    machine,
    measured,
    product_seconds,
    read,
    read_measured,
    shipped,
    write,
)
from tensorlayers.measure import Measurement
from tensorlayers.measure_gemm import Product
from tensorlayers.timing import fastest, share_of_processors
from tests.machine import TYPICAL

KNOWN = Machine(
    name="cpu",
    threads=1,
    flops={"float32": 9e10, "float64": 4e10, "bfloat16": 3e11, "float16": 1e9},
    half={"m": 0.5, "k": 3.0, "n": 20.0},
    memory=6e9,
    cached=3e10,
    permuted=1e10,
    cache=7 * 10**6,
    launch=3e-6,
    function=6e-5,
    conv={"rate": 2e11, "launch": 5e-5},
)
"""What the clock of these tests runs by; float16 is so slow that it is only probed."""


class Clock(TorchDispatchMode):
    """Advances by what each operation of torch takes by the known constants, and mostly spares doing it."""

    def __init__(self):
        super().__init__()
        self.now = 0.0

    def __call__(self):
        return self.now

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self.now += self.product(*args[:2])
            return kwargs["out"] if kwargs else function(*args)
        if name == "clone" and args[0].nbytes > 10**6:
            self.now += KNOWN.launch + 2 * args[0].nbytes / (
                KNOWN.memory if args[0].is_contiguous() else KNOWN.permuted
            )
            return args[0]
        return function(*args, **kwargs or {})

    @staticmethod
    def product(a, b):
        batch, (m, k), n = a.shape[:-2].numel(), a.shape[-2:], b.shape[-1]
        parts = [batch * size * a.itemsize for size in (m * k, k * n, m * n)]
        rate = KNOWN.cached if max(parts) <= KNOWN.cache else KNOWN.memory
        return KNOWN.launch + KNOWN.product(batch, m, k, n, str(a.dtype).removeprefix("torch.")) + sum(parts) / rate


@pytest.fixture
def clock(monkeypatch):
    """The clock, by which a custom autograd function and the convolutions take what they are known to."""
    clock, product = Clock(), autograd.product

    def custom(*arguments):
        clock.now += KNOWN.function
        return product(*arguments)

    monkeypatch.setattr(autograd, "product", custom)
    monkeypatch.setattr(measure, "measure_conv", lambda clock, repeats: dict(KNOWN.conv))
    monkeypatch.setattr(measure, "share_of_processors", lambda: 1.0)
    with clock:
        yield clock


@pytest.fixture
def home(monkeypatch, tmp_path):
    """An empty directory that the constants are looked for in."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "machines"))
    machine.cache_clear()
    yield tmp_path / "machines"
    machine.cache_clear()


# -- measuring --------------------------------------------------------------------------------------------------------


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


# -- the file ---------------------------------------------------------------------------------------------------------


def test_a_file_is_read_as_it_was_written_and_used_from_then_on(home):
    assert machine("cpu").to_json() == shipped("cpu").to_json()
    write(TYPICAL, home / "cpu.json")
    assert os.listdir(home) == ["cpu.json"]
    assert read(home / "cpu.json").to_json() == TYPICAL.to_json() == machine("cpu").to_json()
    assert machine("cuda").to_json() == shipped("cuda").to_json()
    write(KNOWN, home / "cpu.json")
    assert machine("cpu").constants() == KNOWN.constants()
    (home / "cpu.json").unlink()
    machine.cache_clear()
    assert machine("cpu").to_json() == shipped("cpu").to_json()


def test_other_accelerators_take_the_constants_of_a_gpu(home):
    write(TYPICAL, home / "cuda.json")
    assert machine("mps").name == machine("cuda").name == "typical"
    assert machine("cpu").name == "cpu"
    assert shipped("mps").name == "cuda"


def test_without_the_variable_the_directory_is_that_of_caches(monkeypatch, home, tmp_path):
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write(TYPICAL, tmp_path / "tensorlayers" / "cpu.json")
    assert machine().name == "typical"


def test_without_a_home_directory_nothing_is_measured(monkeypatch, home, capsys):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    assert measured() is None
    assert machine().to_json() == shipped("cpu").to_json()
    assert cli.main(["calibrate"]) == 1
    assert f"no home directory: pass --out FILE, or name one in {VARIABLE}" in capsys.readouterr().err


def test_in_a_directory_that_may_not_be_searched_nothing_is_measured(monkeypatch, home):
    write(TYPICAL, home / "cpu.json")

    def denied(path):
        if path.is_relative_to(home):
            raise PermissionError(13, "Permission denied")
        return True

    monkeypatch.setattr(Path, "is_file", denied)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert machine().to_json() == shipped("cpu").to_json()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)], ids=oct)
def test_a_file_may_be_read_by_whom_the_umask_lets(home, umask, mode):
    before = os.umask(umask)
    try:
        write(TYPICAL, home / "cpu.json")
    finally:
        os.umask(before)
    assert stat.S_IMODE((home / "cpu.json").stat().st_mode) == mode


def test_a_file_that_cannot_be_written_stays_as_it_was(monkeypatch, home):
    write(TYPICAL, home / "cpu.json")

    def full(*paths):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write(KNOWN, home / "cpu.json")
    assert os.listdir(home) == ["cpu.json"]
    assert read(home / "cpu.json").name == "typical"


def test_all_shipped_files_are_sound():
    for path in SHIPPED.glob("*.json"):
        assert read(path).to_json() == path.read_text()


GOOD = json.loads(TYPICAL.to_json())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "no file of a machine's constants", id="empty"),
        pytest.param("[1]", "no file of a machine's constants", id="list"),
        pytest.param(TYPICAL.to_json()[:100], "no file of a machine's constants", id="cut"),
        pytest.param({**GOOD, "speed": 1}, "speed", id="unknown"),
        pytest.param({name: value for name, value in GOOD.items() if name != "launch"}, "launch", id="missing"),
        pytest.param({**GOOD, "flops": {"float64": 1e9}}, "flops.float32 is missing", id="no float32"),
        pytest.param({**GOOD, "flops": 1e9}, "flops.float32 is missing", id="flops"),
        pytest.param({**GOOD, "half": {"m": 1, "n": 1}}, "half.k is missing", id="half"),
        pytest.param({**GOOD, "memory": 0}, "memory is 0", id="zero"),
        pytest.param({**GOOD, "cache": -1}, "cache is -1", id="negative"),
        pytest.param({**GOOD, "cache": 6e6}, "cache is an integer, at most 10", id="float cache"),
        pytest.param({**GOOD, "cache": 1e300}, "cache is 1e+300", id="huge float cache"),
        pytest.param({**GOOD, "cache": 10**16}, "cache is an integer, at most 10", id="huge cache"),
        pytest.param({**GOOD, "launch": 10**400}, "launch is 1000", id="huge integer"),
        pytest.param({**GOOD, "memory": 1e-300}, "memory is 1e-300", id="tiny"),
        pytest.param({**GOOD, "half": {**GOOD["half"], "m": 1e300}}, "half.m is 1e+300", id="huge"),
        pytest.param({**GOOD, "cached": float("nan")}, "cached is nan", id="nan"),
        pytest.param({**GOOD, "cached": float("inf")}, "cached is inf", id="inf"),
        pytest.param({**GOOD, "launch": "fast"}, "launch is 'fast'", id="text"),
        pytest.param({**GOOD, "launch": True}, "launch is True", id="bool"),
        pytest.param({**GOOD, "conv": {"rate": None}}, "conv.rate is None", id="none"),
        pytest.param({**GOOD, "threads": -1}, "threads", id="threads"),
        pytest.param({**GOOD, "threads": "2"}, "threads", id="text threads"),
        pytest.param({**GOOD, "threads": 2.0}, "threads is an integer", id="float threads"),
        pytest.param({**GOOD, "threads": True}, "threads is an integer", id="bool threads"),
        pytest.param({**GOOD, "threads": 10**7}, "threads is an integer", id="many threads"),
        pytest.param({**GOOD, "name": 7}, "name", id="name"),
    ],
)
def test_a_bad_file_is_named_with_what_to_do(home, text, message):
    home.mkdir()
    path = home / "cpu.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    for reading in (lambda: read(path), read_measured):
        with pytest.raises(CostModelError) as error:
            reading()
        assert str(error.value).startswith(f"{path}: ")
        assert message in str(error.value)
        assert str(error.value).endswith("delete the file, or run `tensorlayers calibrate` again")
    # A forward does without it.
    with pytest.warns(UserWarning, match=re.escape(str(error.value))) as warned:
        assert machine("cpu").to_json() == machine("cpu").to_json() == shipped("cpu").to_json()
    assert len(warned) == 1


def test_a_file_that_is_no_text_is_refused(home):
    home.mkdir()
    (home / "cpu.json").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(CostModelError, match=r"cpu\.json"):
        read_measured()


def test_a_forward_warns_once_of_a_file_that_cannot_be_read(monkeypatch, home):
    write(TYPICAL, home / "cpu.json")
    original = Path.read_text

    def denied(path, *arguments, **options):
        if path.is_relative_to(home):
            raise PermissionError(13, "Permission denied")
        return original(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", denied)
    layer, x = FactorizedLinear(48, 56, format=LowRank(3)), torch.randn(900, 48)
    with pytest.warns(UserWarning, match=r"cpu\.json: .*Permission denied.*tensorlayers calibrate.*shipped") as warned:
        assert [len(layer(x[:rows])) for rows in (900, 300, 40)] == [900, 300, 40]
    assert len(warned) == 1


def test_the_command_refuses_to_plan_by_a_bad_file(home, capsys, tmp_path):
    home.mkdir()
    (home / "cpu.json").write_text("nonsense")
    for arguments in (["plan", str(tmp_path)], ["convert", str(tmp_path), "--out", str(tmp_path / "out")]):
        assert cli.main(arguments) == 1
        assert f"{home / 'cpu.json'}: no file of a machine's constants" in capsys.readouterr().err


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """What the command asks to be measured; the answer is at once `TYPICAL`, within 7 %."""
    asked = []

    def answer(device, threads, *, quick):
        asked.append((device, threads, quick))
        return Measurement(replace(TYPICAL, conv={"rate": 1e11}), 0.07)

    monkeypatch.setattr(cli, "measure", answer)
    return asked


def test_the_command_saves_where_the_constants_are_used(home, asked, capsys):
    assert cli.main(["calibrate"]) == 0
    assert asked == [("cpu", None, False)]
    assert machine("cpu").name == "typical"
    shown = capsys.readouterr().out
    lines = {line.split()[0]: line.split()[1:] for line in shown.splitlines()}
    assert lines["flops.float32"] == ["100G", "156G"]
    assert lines["cache"] == ["6M", "6M"]
    assert lines["flops.float64"][0] == lines["conv.moved"][0] == "-"
    assert "within 7%" in shown
    assert f"{home / 'cpu.json'}, used from now on; delete it" in shown


def test_the_command_says_which_constants_it_kept(home, monkeypatch, capsys):
    kept = ("cached", "half.n")
    monkeypatch.setattr(cli, "measure", lambda *_, **__: Measurement(TYPICAL, 0.07, kept))
    assert cli.main(["calibrate"]) == 0
    assert "as shipped, since the times do not tell: cached, half.n\n" in capsys.readouterr().out


def test_the_command_replaces_a_bad_file(home, asked):
    home.mkdir()
    (home / "cpu.json").write_text("nonsense")
    assert cli.main(["calibrate"]) == 0
    assert machine("cpu").name == "typical"


def test_the_command_saves_where_it_is_told(home, asked, capsys, tmp_path):
    out = tmp_path / "deep" / "mine.json"
    assert cli.main(["calibrate", "--device", "cuda", "--threads", "3", "--quick", "--out", str(out)]) == 0
    assert asked == [("cuda", 3, True)]
    assert read(out).name == "typical"
    assert not home.exists()
    assert f"{VARIABLE} names, as cuda.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("shares", "error", "message"),
    [
        ((0.5,), 0.1, "threads 1: they had a processor for 50%"),
        ((1.0, 0.8), 0.1, "for 80%"),
        ((1.0, 1.0), 0.6, "within 60%"),
    ],
    ids=["before", "after", "fit"],
)
def test_a_disturbed_measurement_is_not_saved(home, monkeypatch, capsys, shares, error, message):
    left = iter(shares)
    monkeypatch.setattr(measure, "share_of_processors", lambda: next(left))
    monkeypatch.setattr(measure, "_measure", lambda *_, **__: Measurement(TYPICAL, error))
    assert cli.main(["calibrate"]) == 1
    assert message in capsys.readouterr().err
    assert not list(left)
    assert not os.listdir(home)


def test_the_share_of_the_processors_is_measured():
    assert share_of_processors(0.05) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "threads 0"),
        (["--device", "cuda", "--threads", "2"], "threads 2"),
        (["--out", "."], "it is a directory"),
        (["--out", "file/cpu.json"], "file"),
    ],
    ids=" ".join,
)
def test_bad_arguments_are_one_plain_line_before_anything_is_measured(home, capsys, arguments, message, monkeypatch):
    monkeypatch.setattr(measure, "_measure", None)
    home.mkdir()
    (home / "file").touch()
    monkeypatch.chdir(home)
    assert cli.main(["calibrate", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize("arguments", [["--device", "tpu"], ["--threads", "two"], ["--nonsense"]], ids=" ".join)
def test_wrong_usage_exits_2(arguments):
    with pytest.raises(SystemExit) as error:
        cli.main(["calibrate", *arguments])
    assert error.value.code == 2
