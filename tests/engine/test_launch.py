"""Launch tables: what is shipped, what is chosen, and files that are no tables."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensorlayers import backend, dispatch, launch, launch_tables
from tensorlayers.errors import CostModelError, KernelError
from tensorlayers.launch_tables import Problem

DTYPES = ("half", "tf32", "float32")
every_table = pytest.mark.parametrize("arch", launch_tables.architectures())
sizes = st.integers(1, 300)


@st.composite
def problems(draw):
    heads = draw(st.integers(1, 5000)), draw(st.integers(1, 8))
    four = [draw(sizes) for _ in range(4)]
    flags = draw(st.booleans()), draw(st.booleans())
    return Problem(heads, draw(sizes), *four, *flags, draw(st.sampled_from(DTYPES)), *(draw(st.booleans()),) * 2)


@every_table
@given(problem=problems())
def test_every_problem_has_a_launch(arch, problem):
    found = launch.launch(problem, launch_tables.shipped(arch))
    tiles = found.tiles
    assert found.flops >= problem.flops
    assert found.share * found.parts >= found.steps > found.share * (found.parts - 1)
    assert 0 < found.seconds < math.inf
    assert tiles.heads == 1 or problem.shared
    assert not tiles.held or (problem.held and tiles.p >= problem.p and tiles.q >= problem.q)
    # What is stored and loaded is every element, at least once.
    assert found.stored >= math.prod(problem.heads) * problem.m * problem.n
    assert found.loaded >= launch._unique(problem)


def test_more_processors_take_no_longer():
    problem = Problem((64, 1), 205, 64, 64, 64, 64, shared=True, held=True)
    table = launch_tables.shipped("sm_90")
    found = [launch.launch(problem, replace(table, processors=count)) for count in (1, 16, 132, 1000)]
    assert [one.programs for one in found] == sorted(one.programs for one in found)
    assert found[0].parts == 1
    assert found[-1].parts > 1


@pytest.mark.parametrize(
    ("arch", "nearest"),
    [("sm_90", "sm_90"), ("sm_89", "sm_80"), ("sm_75", "sm_80"), ("sm_103", "sm_100"), ("sm_120", "sm_100"),
     ("gfx942", "gfx942"), ("gfx950", "gfx942"), ("gfx90a", "gfx942"), ("xpu", "sm_90")],
)  # fmt: skip
def test_an_architecture_without_a_table_has_that_of_an_older_one(arch, nearest):
    assert launch_tables.shipped(arch).arch == nearest


@pytest.mark.parametrize("arch", [*launch_tables.architectures(), "sm_103", "gfx940", "gfx941", "gfx950"])
def test_kernels_run_where_the_tiles_fit(arch):
    assert launch_tables.refusal(arch) is None


OTHERS = ["sm_75", "sm_86", "sm_87", "sm_88", "sm_89", "sm_110", "sm_120", "sm_121", "gfx90a", "gfx1100"]


@pytest.mark.parametrize("arch", OTHERS)
def test_kernels_are_refused_where_tiles_may_not_fit_until_there_is_a_table(arch, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORLAYERS_MACHINES", str(tmp_path))
    monkeypatch.setattr(launch_tables, "architecture", lambda device: arch)
    monkeypatch.setattr(backend, "is_present", lambda: True)
    launch_tables.table.cache_clear()
    reason = f"{arch} has no launch table, .*run `tensorlayers tune`"
    assert re.match(reason, backend.refusal("cuda", "float16"))
    with pytest.raises(KernelError, match=reason):
        dispatch._kernels_for("triton", "cuda", "float16", None)
    assert dispatch._kernels_for("auto", "cuda", "float16", None) == (None, False)
    text = launch_tables.SHIPPED.joinpath("gfx942.json").read_text()
    (tmp_path / f"{arch}.json").write_text(text)
    launch_tables.table.cache_clear()
    with pytest.warns(UserWarning, match=f"arch is '{arch}'; got 'gfx942'.*the shipped table is used"):
        assert backend.refusal("cuda", "float16") is not None  # another's, copied
    (tmp_path / f"{arch}.json").write_text(text.replace("gfx942", arch))
    launch_tables.table.cache_clear()
    assert backend.refusal("cuda", "float16") is None
    assert dispatch._kernels_for("auto", "cuda", "float16", None) == (None, True)
    launch_tables.table.cache_clear()


def test_on_the_cpu_it_is_the_default():
    assert launch_tables.architecture(torch.device("cpu")) == launch_tables.DEFAULT


@every_table
def test_what_is_measured_is_taken(arch, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORLAYERS_MACHINES", str(tmp_path))
    launch_tables.table.cache_clear()
    assert launch_tables.table(arch).rows == launch_tables.shipped(arch).rows
    text = (launch_tables.SHIPPED / f"{arch}.json").read_text()
    (tmp_path / f"{arch}.json").write_text(text.replace('"processors": ', '"processors": 1'))
    launch_tables.table.cache_clear()
    assert launch_tables.table(arch).processors > launch_tables.shipped(arch).processors
    (tmp_path / f"{arch}.json").write_text(text[:-20])
    launch_tables.table.cache_clear()
    with pytest.warns(UserWarning, match="no launch table .*; the shipped table is used"):
        assert launch_tables.table(arch).rows == launch_tables.shipped(arch).rows
    launch_tables.table.cache_clear()


def without_last_rows(content):
    content["rows"] = [row for row in content["rows"] if row["held"]]


def with_(name, value, *place):
    """A table in which one thing is another; with "rows" and an index before it, of a row."""

    def change(content):
        for part in place:
            content = content[part]
        content[name] = value

    return change


def without(name, *place):
    def change(content):
        for part in place:
            content = content[part]
        del content[name]

    return change


TILES = ("rows", 0, "tiles")
LOOKUP = ("kernels", "lookup", "half")
HUGE = 10**400


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_last_rows, "no row for"),
        (with_("m", 48, *TILES), "rows: 0: tiles: m is a power of two from 16 to 256; got 48"),
        (with_("n", 8, *TILES), "tiles: n is a power of two from 16 to 256; got 8"),
        (with_("q", 512, *TILES), "tiles: q is a power of two from 16 to 256; got 512"),
        (with_("heads", 0, *TILES), "tiles: heads is a power of two from 1 to 16; got 0"),
        (with_("heads", 3, *TILES), "tiles: heads is a power of two from 1 to 16; got 3"),
        (with_("heads", True, *TILES), "tiles: heads is a power of two from 1 to 16; got True"),
        (with_("warps", 4.0, *TILES), "tiles: warps is a power of two from 1 to 16; got 4.0"),
        (with_("warps", 32, *TILES), "tiles: warps is a power of two from 1 to 16; got 32"),
        (with_("stages", 9, *TILES), "tiles: stages is an integer from 1 to 8; got 9"),
        (with_("inner", 128, "rows", 0), "a middle that is held fits in its tile"),
        (with_("inner", 0, "rows", 0), "rows: 0: inner is null or an integer of at least 1; got 0"),
        (with_("n", "32", "rows", 0), "rows: 0: n is null or an integer of at least 1; got '32'"),
        (with_("m", True, "rows", 0), "rows: 0: m is null or an integer of at least 1; got True"),
        (with_("dtype", "bfloat16", "rows", 0), "rows: 0: dtype is half, tf32 or float32; got 'bfloat16'"),
        (with_("aligned", 1, "rows", 0), "rows: 0: aligned is true or false; got 1"),
        (with_("shared", False, "rows", 0), "several heads a program share left and right"),
        (with_("processors", 0), "processors is an integer from 1 to 1000000; got 0"),
        (with_("processors", True), "processors is an integer from 1 to 1000000; got True"),
        (with_("processors", HUGE), "processors is an integer from 1 to 1000000; got 1000"),
        (with_("shared_memory", 1e5), "shared_memory is an integer from 1 to .*; got 100000.0"),
        (with_("memory", "fast"), "memory is a positive number; got 'fast'"),
        (with_("launch", True), "launch is a positive number; got True"),
        (with_("step", math.nan), "step is a positive number; got nan"),
        (with_("cache", math.inf), "cache is a positive number; got inf"),
        (with_("cache", HUGE), "cache is a positive number; got 1000"),
        (with_("half", -1.0, "rates"), "rates: half is a positive number; got -1.0"),
        (with_("rates", {"half": 1.0}), "rates of half, tf32 and float32"),
        (with_("rates", None), "rates of half, tf32 and float32; got None"),
        (with_("kernels", []), "kernels has rebuild, .*; got \\[\\]"),
        (with_("kernels", {}), "kernels: rebuild: half: m is a power of two from 16 to 256; got None"),
        (with_("lookup", 3, "kernels"), "kernels: lookup: half: side is .*; got None"),
        (with_("half", [], "kernels", "cp_in"), "kernels: cp_in: half: rank is .*; got None"),
        (with_("warps", 0, "kernels", "cp_in", "tf32"), "cp_in: tf32: warps is a power of two from 1 to 16; got 0"),
        (with_("rows", 3, "kernels", "cp_out", "half"), "cp_out: half: rows is a power of two from 1 to 16; got 3"),
        (with_("warp", 1000, *LOOKUP), "kernels: lookup: half: warp is a power of two from 1 to 65536; got 1000"),
        (with_("ids", 0, *LOOKUP), "kernels: lookup: half: ids is an integer from 1 to .*; got 0"),
        (with_("arch", 90), "arch is a text; got 90"),
        (without("arch"), "arch"),
        (without("n", "rows", 0), "'n'"),
        (without("tiles", "rows", 0), "'tiles'"),
        (with_("rows", ["half"]), "TypeError"),
        (with_("speed", 1), "speed"),
        *((without(key, "kernels", name, dtype), f"kernels: {name}: {dtype}: {key} is .*; got None")
          for name, keys in launch_tables.KERNELS.items() for key in keys for dtype in DTYPES),
    ],
)  # fmt: skip
def test_files_that_are_no_tables(change, message, tmp_path):
    content = json.loads((launch_tables.SHIPPED / "sm_90.json").read_text())
    change(content)
    path = tmp_path / "sm_90.json"
    path.write_text(json.dumps(content))
    with pytest.raises(CostModelError, match=message) as caught:
        launch_tables.read(path)
    assert str(path) in str(caught.value)
    assert "tensorlayers tune" in str(caught.value)


def test_what_is_malformed_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORLAYERS_MACHINES", str(tmp_path))
    content = json.loads((launch_tables.SHIPPED / "sm_90.json").read_text())
    del content["kernels"]["lookup"]["half"]["ids"]
    (tmp_path / "sm_90.json").write_text(json.dumps(content))
    launch_tables.table.cache_clear()
    with pytest.warns(UserWarning, match="kernels: lookup: half: ids is .*; the shipped table is used"):
        assert launch_tables.table("sm_90").kernels == launch_tables.shipped("sm_90").kernels
    launch_tables.table.cache_clear()


def test_a_table_is_of_the_architecture_that_is_asked_for(tmp_path):
    assert launch_tables.read(launch_tables.SHIPPED / "sm_90.json", "sm_90").arch == "sm_90"
    with pytest.raises(CostModelError, match="arch is 'sm_86'; got 'sm_90'"):
        launch_tables.read(launch_tables.SHIPPED / "sm_90.json", "sm_86")


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"rows": 3}', "\x00", "[" * 100000])
def test_files_that_are_something_else(text, tmp_path):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(CostModelError, match="no launch table"):
        launch_tables.read(path)
    with pytest.raises(CostModelError, match="no launch table"):
        launch_tables.read(tmp_path / "missing.json")
