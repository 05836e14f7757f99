"""explain(layer, x): what it says runs is what runs, and every alternative is there."""

import pytest
import torch
from torch import nn

import tensorlayers as tl
from tensorlayers import KernelError, NetworkError, decision, dispatch, explain, matmul, small
from tensorlayers.explain import FROZEN, STORED, duration
from tensorlayers.formats import available
from tests.engine.support import layer_of

every_format = pytest.mark.parametrize("cls", available().values(), ids=available())
LISTED = (*dispatch.NAMES, FROZEN)
ROWS = (1, 20, 300, 2000)


@pytest.fixture
def seen(monkeypatch):
    """What is carried out: (forward or gradients, the cores that meet the rows together, rows at a time)."""
    found = []
    for name in ("forward", "gradients"):
        original = getattr(matmul, name)

        def watched(program, *args, original=original, name=name):
            found.append((name, groups(program), args[-1]))
            return original(program, *args)

        monkeypatch.setattr(matmul, name, watched)
    return found


def groups(program):
    return tuple(step.group.cores for step in program.steps)


def by_name(rows):
    return {row.name: row for row in rows}


def expected(layer, rows, name, *, x=False, cores=False):
    """What is to be seen where an option is taken."""
    task = decision.task_for(torch.empty(rows, layer.in_features), x_gradient=x, core_gradients=cores)
    options = decision.options(layer.network, task, decision.machine_of(torch.empty(())), layer.implementation)
    (candidate,) = (option.candidate for option in options if option.name == name)
    return ("gradients" if x or cores else "forward", groups(candidate.program), candidate.chunk)


@pytest.mark.parametrize("forced", [None, *decision.NAMES])
@every_format
def test_what_it_says_is_what_runs(cls, forced, seen):
    layer = tl.FactorizedLinear(256, 192, format=cls(6), implementation=forced)
    for rows in ROWS:
        for of_x in (True, False):
            x = torch.randn(rows, 256, requires_grad=of_x)
            said = explain(layer, x)
            if said.chosen == small.NAME:
                continue
            seen.clear()
            layer(x).sum().backward()
            back = next(row.name for row in said.backward if not row.refusal)
            forward = expected(layer, rows, said.chosen)
            assert seen == [forward, expected(layer, rows, back, x=of_x, cores=True)]
            assert by_name(said.rows)[said.chosen].chunk == forward[2]


@pytest.mark.parametrize("rows", ROWS)
@every_format
def test_every_alternative_has_an_estimate_or_a_reason(cls, rows):
    said = explain(layer_of(cls, implementation="contraction"), torch.randn(rows, 64))
    for listed in (said.rows, said.backward):
        assert tuple(row.name for row in listed) == LISTED
        assert [row.name for row in listed if not row.refusal] == ["contraction"]
        for row in listed:
            assert row.refusal or row.seconds is not None
            assert (row.seconds is None) == (row.cost is None)
            assert row.seconds is None or row.seconds > 0
        dense = by_name(listed)[FROZEN]
        assert dense.cost.flops == 2 * rows * 64 * 48 * (1 if listed is said.rows else 2)


def test_estimates_are_of_the_rows_given():
    layer = layer_of(available()["tt"])
    for shape in ((1500, 64), (3, 500, 64)):
        row = by_name(explain(layer, torch.randn(shape)).rows)["contraction"]
        (option, *_) = decision.options_for(layer.network, decision.Task(1500), decision.machine_of(torch.empty(())))
        assert (row.seconds, row.cost) == (option.seconds, option.candidate.cost)
    one, many = (by_name(explain(layer, torch.randn(n, 64)).rows)["rebuild"].seconds for n in (600, 1500))
    assert one < many


def test_small_products(monkeypatch):
    layer = tl.FactorizedLinear(16, 10, format=tl.TT(2))
    x = torch.randn(4, 16)
    said = explain(layer, x)
    assert said.chosen == small.NAME
    assert by_name(said.rows)["contraction"].refusal == "small runs"
    ran = []
    held = vars(small.small(layer.network))
    monkeypatch.setitem(held, "run", lambda *operands: ran.append(len(operands)) or torch.zeros(4, 10))
    layer(x)
    assert ran == [3]
    monkeypatch.undo()
    assert explain(layer, torch.randn(2000, 16)).chosen != small.NAME
    layer.implementation = "rebuild"
    assert explain(layer, x).chosen == "rebuild"


def test_frozen_layers():
    layer = layer_of(tl.TT).freeze()
    said = explain(layer, torch.randn(40, 64, requires_grad=True))
    assert said.chosen == FROZEN
    assert said.backward
    assert all(row.refusal for row in said.rows if row.name != FROZEN)
    layer.unfreeze()
    assert explain(layer, torch.randn(40, 64)).chosen in decision.NAMES
    assert "freeze()" in by_name(explain(layer, torch.randn(40, 64)).rows)[FROZEN].refusal


@pytest.mark.parametrize(("mode", "stored"), [("recompute", False), ("auto", True), ("store", True)])
def test_stored_activations(mode, stored, seen):
    layer = tl.FactorizedLinear(256, 192, format=tl.LowRank(16), backward=mode)
    x = torch.randn(40, 256)
    assert (explain(layer, x).chosen == STORED) == stored
    with torch.no_grad():
        assert explain(layer, x).chosen != STORED
    layer(x)
    assert bool(seen) == (not stored)  # a plain chain is not carried out by `matmul`
    layer.implementation = "rebuild"
    assert explain(layer, x).chosen == "rebuild"


class TestGradients:
    def test_are_explained_where_they_are_recorded(self):
        layer, x = layer_of(tl.TT), torch.randn(40, 64)
        assert explain(layer, x).backward
        assert not explain(layer, x, training=False).backward
        with torch.no_grad():
            assert not explain(layer, x).backward
            assert explain(layer, x, training=True).backward
        layer.requires_grad_(False)
        assert not explain(layer, x).backward
        assert explain(layer, x.requires_grad_()).backward
        assert explain(layer, x.detach(), training=True).backward

    def test_are_of_what_needs_one(self):
        layer, x = layer_of(tl.TT), torch.randn(300, 64)
        both = by_name(explain(layer, x.clone().requires_grad_()).backward)["rebuild"]
        cores = by_name(explain(layer, x).backward)["rebuild"]
        layer.cores.requires_grad_(False)
        only_x = by_name(explain(layer, x.requires_grad_()).backward)["rebuild"]
        assert only_x.cost.flops < both.cost.flops > cores.cost.flops


class TestKernels:
    def test_listed_with_a_reason(self):
        layer = layer_of(tl.CP)
        for kernel in dispatch.KERNELS:
            row = by_name(explain(layer, torch.randn(40, 64)).rows)[kernel.name]
            assert row.refusal
            assert row.seconds is None

    def test_that_runs(self, monkeypatch):
        kernel = dispatch.Kernel("tt2", "tensorlayers.nowhere", lambda network, device, dtype: None)
        monkeypatch.setattr(dispatch, "KERNELS", (kernel,))
        monkeypatch.setattr(dispatch, "kernel_refusal", lambda *args: None)
        monkeypatch.setitem(dispatch._LOADED, "tt2", lambda rows, network, cores: rows.new_full((len(rows), 48), 7.0))
        layer, x = layer_of(tl.TT, bias=False), torch.randn(40, 64)
        assert explain(layer, x).chosen != "tt2"
        with tl.use_kernels("triton"):
            assert explain(layer, x).chosen == "tt2"
            assert layer(x).eq(7).all()
        layer.implementation = "tt2"
        assert explain(layer, x).chosen == "tt2"
        assert by_name(explain(layer, x).rows)["contraction"].refusal
        assert layer(x).eq(7).all()
        with tl.use_kernels("torch"):
            layer.implementation = None
            assert explain(layer, x).chosen in decision.NAMES

    def test_that_cannot_run_is_refused_as_by_the_layer(self):
        layer, x = layer_of(tl.CP), torch.randn(40, 64)
        with tl.use_kernels("triton"):
            for call in (layer, lambda x: explain(layer, x)):
                with pytest.raises(KernelError, match="tt2: "):
                    call(x)
        assert dispatch._mode == "auto"

    def test_the_mode_is_one_of_three_and_is_put_back(self):
        with pytest.raises(KernelError, match=r"use_kernels: .*; got 'cuda'"), tl.use_kernels("cuda"):
            pass
        with pytest.raises(NetworkError, match="in_features"), tl.use_kernels("torch"):
            layer_of(tl.TT)(torch.zeros(1))
        assert dispatch._mode == "auto"


def test_autocast_is_followed():
    layer, x = layer_of(tl.TT), torch.randn(300, 64)
    with torch.autocast("cpu", torch.bfloat16):
        said = explain(layer, x)
    assert "bfloat16" in said.title
    assert said.itemsize == 2


def test_it_prints():
    layer = tl.FactorizedLinear(768, 3072, format=tl.TT(8))
    said = explain(layer, torch.zeros(700, 768))
    lines = str(said).splitlines()
    assert lines[0] == said.title
    assert lines[0].startswith("FactorizedLinear(768, 3072), TT(rank=8), ranks 8; 700 rows, float32, ")
    assert len(lines) == 1 + 2 * (1 + len(LISTED))
    heads = [line.split()[0] for line in lines[1:]]
    assert heads == ["forward", *(name.split()[0] for name in LISTED), "gradients", *(n.split()[0] for n in LISTED)]
    assert sum(line.endswith("<- taken") for line in lines) == 2
    with torch.no_grad():
        assert len(str(explain(layer, torch.zeros(700, 768))).splitlines()) == 2 + len(LISTED)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.5e-6, "1.5 us"), (0.9999e-3, "1 ms"), (0.9994e-3, "999 us"), (0.0123, "12.3 ms"), (2.0, "2 s")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_empty_batches():
    assert explain(layer_of(tl.TT, implementation="rebuild"), torch.randn(0, 64)).chosen == "rebuild"


@pytest.mark.parametrize(
    ("layer", "x", "message"),
    [
        (nn.Linear(64, 48), torch.zeros(2, 64), "FactorizedLinear; got Linear"),
        (
            tl.FactorizedConv2d(4, 4, 3, format=tl.CP(2)),
            torch.zeros(1, 4, 8, 8),
            "FactorizedLinear; got FactorizedConv2d",
        ),
        (tl.FactorizedLinear(64, 48), torch.zeros(2, 63), r"in_features = 64; got \(2, 63\)"),
        (tl.FactorizedLinear(64, 48), torch.tensor(1.0), r"in_features = 64; got \(\)"),
        (tl.FactorizedLinear(64, 48), [[0.0] * 64], "in_features = 64; got list"),
        (tl.FactorizedLinear(64, 48), torch.zeros(2, 64, dtype=torch.float64), "torch.float32; got torch.float64"),
        (tl.FactorizedLinear(64, 48), torch.zeros(2, 64, dtype=torch.int64), "torch.float32; got torch.int64"),
    ],
    ids=["dense", "convolution", "features", "number", "list", "float64", "integers"],
)
def test_bad_input_is_refused(layer, x, message):
    with pytest.raises(NetworkError, match=message):
        explain(layer, x)
