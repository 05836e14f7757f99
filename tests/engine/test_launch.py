"""Launch tables: what is shipped, what is chosen, and files that are no tables."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensorlayers import launch
from tensorlayers.errors import CostModelError
from tensorlayers.launch import Problem

DTYPES = ("half", "tf32", "float32")
every_table = pytest.mark.parametrize("arch", launch.architectures())
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
    found = launch.launch(problem, launch.shipped(arch))
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
    table = launch.shipped("sm_90")
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
    assert launch.shipped(arch).arch == nearest


def test_on_the_cpu_it_is_the_default():
    assert launch.architecture(torch.device("cpu")) == launch.DEFAULT


@every_table
def test_what_is_measured_is_taken(arch, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORLAYERS_MACHINES", str(tmp_path))
    launch.table.cache_clear()
    assert launch.table(arch).rows == launch.shipped(arch).rows
    text = (launch.SHIPPED / f"{arch}.json").read_text()
    (tmp_path / f"{arch}.json").write_text(text.replace('"processors": ', '"processors": 1'))
    launch.table.cache_clear()
    assert launch.table(arch).processors > launch.shipped(arch).processors
    (tmp_path / f"{arch}.json").write_text(text[:-20])
    launch.table.cache_clear()
    with pytest.warns(UserWarning, match="no launch table .*; the shipped table is used"):
        assert launch.table(arch).rows == launch.shipped(arch).rows
    launch.table.cache_clear()


def without_last_rows(content):
    content["rows"] = [row for row in content["rows"] if row["held"]]


def with_(name, value, place=None):
    def change(content):
        (content["rows"][0] if place is None else content["rows"][0][place] if place else content)[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_last_rows, "no row for"),
        (with_("m", 48, "tiles"), "powers of two"),
        (with_("n", 8, "tiles"), "at least 16"),
        (with_("heads", 0, "tiles"), "heads is an integer of at least 1; got 0"),
        (with_("warps", 4.0, "tiles"), "warps is an integer of at least 1; got 4.0"),
        (with_("heads", 3, "tiles"), "powers of two"),
        (with_("inner", 128), "a middle that is held fits in its tile"),
        (with_("shared", False), "several heads a program share left and right"),
        (with_("processors", 0, ""), "positive"),
        (with_("memory", "fast", ""), "positive"),
        (with_("rates", {"half": 1.0}, ""), "rates of half, tf32 and float32"),
        (with_("kernels", {}, ""), "kernels: rebuild has integers of at least 1 for half; got None"),
        (lambda content: content["kernels"]["cp_in"]["tf32"].update(warps=0), "kernels: cp_in has integers"),
        (lambda content: content["kernels"]["lookup"].pop("float32"), "kernels: lookup has integers"),
        (lambda content: content.pop("arch"), "arch"),
        (lambda content: content["rows"][0].pop("n"), "'n'"),
        (with_("speed", 1, ""), "speed"),
    ],
)
def test_files_that_are_no_tables(change, message, tmp_path):
    content = json.loads((launch.SHIPPED / "sm_90.json").read_text())
    change(content)
    path = tmp_path / "sm_90.json"
    path.write_text(json.dumps(content))
    with pytest.raises(CostModelError, match=message) as caught:
        launch.read(path)
    assert str(path) in str(caught.value)
    assert "tensorlayers tune" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"rows": 3}', "\x00", "[" * 100000])
def test_files_that_are_something_else(text, tmp_path):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(CostModelError, match="no launch table"):
        launch.read(path)
    with pytest.raises(CostModelError, match="no launch table"):
        launch.read(tmp_path / "missing.json")
