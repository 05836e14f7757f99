"""explain(layer, x): what it says runs is what runs, and every alternative is there."""

import types
from functools import partial

import pytest
import torch
from torch import nn

import tensorlayers as tl
from tensorlayers import KernelError, NetworkError, backend, decision, dispatch, explain, lookup_plan, matmul, small
from tensorlayers.explain import FROZEN, STORED, duration
from tensorlayers.formats import available
from tensorlayers.slices import slices
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
            found.append((name, groups(program), args[3 if name == "forward" else 4]))
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
    said = explain(layer_of(cls, implementation="contraction"), torch.randn(rows, 64, requires_grad=True))
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
    (option,) = (row for row in said.rows if row.refusal == "small runs")
    for listed in (said.rows, said.backward):
        (option,) = (row for row in listed if row.refusal == "small runs")
        taken = by_name(listed)[small.NAME]
        assert (taken.seconds, taken.cost) == (option.seconds, option.cost)
        assert option.seconds == min(row.seconds for row in listed if row.name in decision.NAMES and row.cost)
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
    # No gradient of the weight, asked for or not.
    for x in (torch.randn(40, 64, requires_grad=True), torch.randn(40, 64)):
        for row in explain(layer, x, training=True).backward:
            assert row.name != FROZEN or row.cost.flops == 2 * 40 * 64 * 48
    layer.unfreeze()
    assert explain(layer, torch.randn(40, 64)).chosen in decision.NAMES
    assert "freeze()" in by_name(explain(layer, torch.randn(40, 64)).rows)[FROZEN].refusal


@pytest.mark.parametrize(("mode", "stored"), [("recompute", False), ("auto", True), ("store", True)])
def test_stored_activations(mode, stored, seen):
    layer = tl.FactorizedLinear(256, 192, format=tl.LowRank(16), backward=mode)
    x = torch.randn(40, 256)
    said = explain(layer, x)
    assert said.chosen == ("contraction" + STORED if stored else "contraction")
    if stored:
        for listed in map(by_name, (said.rows, said.backward)):
            taken, chain = listed["contraction" + STORED], listed["contraction"]
            assert (taken.seconds, taken.cost) == (chain.seconds, chain.cost)
    with torch.no_grad():
        assert explain(layer, x).chosen == "contraction"
    layer(x)
    assert bool(seen) == (not stored)  # a plain chain is not carried out by `matmul`
    layer.implementation = "rebuild"
    assert explain(layer, x).chosen == "rebuild"


@every_format
def test_what_is_stored_is_the_program_of_an_option(cls):
    layer, x = tl.FactorizedLinear(250, 190, format=cls(2), backward="store"), torch.randn(300, 250)
    said = explain(layer, x)
    stored = dispatch.stored_program(layer.network, x, None, "store")
    assert said.chosen.endswith(STORED) == (stored is not None)
    for listed in (said.rows, said.backward):
        assert len([row for row in listed if not row.refusal]) == 1
    if stored is not None:
        assert expected(layer, 300, said.chosen.removesuffix(STORED)) == ("forward", groups(stored), 0)


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

    def test_of_the_dense_layer_too(self):
        layer, on = layer_of(tl.TT), decision.machine_of(torch.empty(()))
        seconds = partial(decision.dense_seconds, 48, 64, 300, on)
        for x, weight in ((True, True), (True, False), (False, True)):
            layer.cores.requires_grad_(weight)
            row = by_name(explain(layer, torch.randn(300, 64, requires_grad=x)).backward)[FROZEN]
            assert row.cost.flops == 2 * 300 * 64 * 48 * (x + weight)
            assert row.seconds == pytest.approx(seconds(x=x, weight=weight) - seconds())


@pytest.mark.parametrize("cls", [tl.TensorRegression, tl.TensorContraction])
def test_maps_between_tensors(cls, seen):
    layer, x = cls((8, 6, 6), (7, 6, 4)), torch.randn(30, 5, 8, 6, 6)
    said = explain(layer, x)
    assert said.title.startswith(f"{cls.__name__}((8, 6, 6), (7, 6, 4)), ")
    assert "; 150 rows, " in said.title
    assert by_name(said.rows)[FROZEN].cost.flops == 2 * 150 * 288 * 168
    seen.clear()
    layer(x)
    (option,) = (
        o for o in decision.options(layer.network, decision.Task(256), decision.machine_of(x)) if not o.refusal
    )
    assert option.name == said.chosen
    assert seen == [("forward", groups(option.candidate.program), option.candidate.chunk)]
    for wrong in (torch.randn(5, 288), torch.randn(6, 6), torch.randn(())):
        with pytest.raises(NetworkError, match=r"dimensions are in_shape = \(8, 6, 6\)"):
            explain(layer, wrong)


def test_slices_are_told():
    """A Khatri-Rao product that is larger than the dense weight is formed some of the rank at a time."""
    layer = tl.FactorizedLinear(64, 48, format=tl.CP(600), implementation="merged")
    said = explain(layer, torch.randn(300, 64))
    for listed in (said.rows, said.backward):
        for row in listed:
            program = expected_program(layer, row.name, cores=listed is said.backward)
            count = len(slices(layer.network, program)) if row.name == "merged" else 0
            assert row.note == (f"in {count} slices of bond r" if count else "")
            assert (count > 1) == (row.name == "merged")
    assert str(said).count("<- taken, in ") == 2
    assert "slices" not in str(explain(layer_of(tl.CP, implementation="merged"), torch.randn(300, 64)))


def expected_program(layer, name, *, cores):
    task = decision.Task(256, cores=cores)
    options = decision.options(layer.network, task, decision.machine_of(torch.empty(())), layer.implementation)
    return next((o.candidate.program for o in options if o.name == name and o.candidate), None)


class TestKernels:
    def test_listed_with_a_reason(self):
        layer = layer_of(tl.CP)
        for name in decision.KERNELS:
            row = by_name(explain(layer, torch.randn(40, 64)).rows)[name]
            assert "interpreter" in row.refusal or "not installed" in row.refusal
            assert row.seconds is None
        for dtype in (torch.float64, torch.bfloat16):
            found = explain(layer.to(dtype), torch.randn(40, 64, dtype=dtype))
            assert str(dtype).removeprefix("torch.") in by_name(found.rows)["fused"].refusal

    def test_that_runs(self, monkeypatch):
        def filled(left, middle, right, out, *rest):
            out.fill_(7.0)

        monkeypatch.setattr(backend, "refusal", lambda device, dtype: None)
        monkeypatch.setattr(backend, "load", lambda name: types.SimpleNamespace(run=filled))
        layer, x = layer_of(tl.TT, bias=False), torch.randn(40, 64)
        assert explain(layer, x).chosen != "fused"
        with tl.use_kernels("triton"):
            assert explain(layer, x).chosen == "fused"
            assert layer(x).eq(7).all()
        layer.implementation = "fused"
        assert explain(layer, x).chosen == "fused"
        assert by_name(explain(layer, x).rows)["contraction"].refusal
        assert layer(x).eq(7).all()
        with tl.use_kernels("torch"):
            assert explain(layer, x).chosen in decision.NAMES
            assert not layer(x).eq(7).any()

    def test_that_cannot_run_is_refused_as_by_the_layer(self):
        layer, x = layer_of(tl.CP), torch.randn(40, 64)
        with tl.use_kernels("triton"):
            for call in (layer, lambda x: explain(layer, x)):
                with pytest.raises(KernelError, match="no Triton kernel supports this call: "):
                    call(x)
        assert backend.mode() == "auto"

    def test_the_mode_is_one_of_three_and_is_put_back(self):
        with pytest.raises(KernelError, match=r"use_kernels: .*; got 'cuda'"), tl.use_kernels("cuda"):
            pass
        with pytest.raises(NetworkError, match="in_features"), tl.use_kernels("torch"):
            layer_of(tl.TT)(torch.zeros(1))
        assert backend.mode() == "auto"

    def test_blocks_may_end_in_any_order(self):
        one, other = tl.use_kernels("triton"), tl.use_kernels("torch")
        one.__enter__()
        other.__enter__()
        one.__exit__(None, None, None)
        assert backend.mode() == "torch"
        other.__exit__(None, None, None)
        assert backend.mode() == "auto"


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


def test_one_of_a_kind():
    said = str(explain(layer_of(tl.TT), torch.zeros(1, 64)))
    assert "; 1 row, " in said
    assert "(1 thread)" in said
    assert "all rows fit into one chunk" in said


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.5e-6, "1.5 us"), (0.9999e-3, "1 ms"), (0.9994e-3, "999 us"), (0.0123, "12.3 ms"), (2.0, "2 s")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_empty_batches():
    assert explain(layer_of(tl.TT, implementation="rebuild"), torch.randn(0, 64)).chosen == "rebuild"


@pytest.mark.parametrize("table", [tl.FactorizedEmbedding, tl.FactorizedEmbeddingBag])
@every_format
def test_lookups(cls, table):
    layer, ids = table(100, 64, format=cls(2)), torch.zeros(3, 5, dtype=torch.int64)
    said = explain(layer, ids)
    assert said.chosen == "contraction"
    rows = by_name(said.rows)
    assert rows["contraction"].cost == lookup_plan.lookup_cost(layer.own_network, 15)
    assert rows[FROZEN].cost.elements == 2 * 15 * 64
    assert "on the CPU" in rows["lookup"].refusal
    assert [(row.name, row.refusal) for row in said.backward] == [
        ("contraction", ""),
        ("lookup_gradients", rows["lookup"].refusal),
    ]
    assert "15 rows" in str(said)
    assert not explain(layer, ids, training=False).backward
    assert explain(layer, ids[:0]).chosen == "contraction"
    assert explain(layer.requires_grad_(False), ids).backward == ()
    assert explain(layer.freeze(), ids).chosen == FROZEN


@pytest.mark.parametrize(
    ("layer", "x", "message"),
    [
        (nn.Linear(64, 48), torch.zeros(2, 64), "explain: linear products and lookups, .*; got Linear"),
        (
            tl.FactorizedConv2d(4, 4, 3, format=tl.CP(2)),
            torch.zeros(1, 4, 8, 8),
            "explain: linear products and lookups, .*; got FactorizedConv2d",
        ),
        (
            tl.FactorizedEmbedding(100, 64, format=tl.CP(2)),
            torch.zeros(2),
            "ids, int32 or int64; got torch.float32",
        ),
        (tl.FactorizedLinear(64, 48), torch.zeros(2, 63), r"in_features = 64; got \(2, 63\)"),
        (tl.FactorizedLinear(64, 48), torch.tensor(1.0), r"in_features = 64; got \(\)"),
        (tl.FactorizedLinear(64, 48), [[0.0] * 64], "in_features = 64; got list"),
        (tl.FactorizedLinear(64, 48), torch.zeros(2, 64, dtype=torch.float64), "torch.float32; got torch.float64"),
        (tl.FactorizedLinear(64, 48), torch.zeros(2, 64, dtype=torch.int64), "torch.float32; got torch.int64"),
    ],
    ids=["dense", "convolution", "embedding", "features", "number", "list", "float64", "integers"],
)
def test_bad_input_is_refused(layer, x, message):
    with pytest.raises(NetworkError, match=message):
        explain(layer, x)
