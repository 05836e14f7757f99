"""The kernels of Khatri-Rao products in Triton's interpreter, against float64; run by test_interpreted.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from tensorlayers import contraction, fused_khatri_rao, launch_tables
from tensorlayers.activation import activation
from tensorlayers.errors import KernelError
from tensorlayers.fused_khatri_rao import FusedKhatriRao, Launch, contract_launch, expand_launch
from tensorlayers.kernels import chain
from tensorlayers.kernels import khatri_rao as kernel
from tensorlayers.network import Network, linear_modes
from tests.kernels.support import HALF, SINGLE, TOLERANCE, Watch, error, within_nan

# batch, modes 1 and 2, rank
SIZES = {
    "ones": (1, 1, 1, 1),
    "primes": (7, 11, 5, 3),
    "a mode of size 1": (2, 1, 37, 19),
    "multiples of 16": (5, 32, 64, 128),
    "beyond one tile": (3, 67, 70, 71),
    "beyond what is held": (2, 65, 131, 3),
}
PRIMES = SIZES["primes"]


@pytest.fixture(params=["few programs", "as many as there can be"])
def processors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one processor a program takes many rows and all that is contracted; of many, as little as there is."""
    count, step = (1, 1e-12) if request.param == "few programs" else (10**9, 1.0)
    table = replace(launch_tables.shipped(launch_tables.DEFAULT), processors=count, step=step)
    monkeypatch.setattr(launch_tables, "table", lambda arch: table)
    monkeypatch.setattr(chain, "SIZE", 1024)  # fewer programs: in the interpreter each takes tens of milliseconds


def sizes_of(name: str, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """The sizes of a case: float32 has smaller tiles."""
    batch, m, n, rank = SIZES[name]
    if dtype == SINGLE and name.startswith("beyond"):
        return batch, min(m, 35), min(n, 67), min(rank, 37)
    return batch, m, n, rank


def drawn(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """Rows (batch, m, n), z (batch, rank), cores (m, rank) and (n, rank)."""
    batch, m, n, rank = sizes
    return [torch.randn(shape).to(dtype) for shape in ((batch, m, n), (batch, rank), (m, rank), (n, rank))]


def contracted(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return torch.einsum("bmn,mr,nr->br", x.double(), first.double(), second.double())


def expanded(z: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return torch.einsum("br,mr,nr->bmn", z.double(), first.double(), second.double())


def run_watched(watch: Watch, run: Callable[..., None], given: Sequence[Tensor], counted: Launch) -> Tensor:
    """Run a kernel on views within NaN; the fourth is the result, a fifth a bias. What it touches is as counted."""
    views, blocks = zip(*map(within_nan, given), strict=True)
    for view, around in zip(views, blocks, strict=True):
        watch.add(view, around)
    before = (*watch.counts(), watch.bytes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "_sums", lambda found, out: watch.sums((found.parts, *out.shape)))
        run(*views)
    after = (*watch.counts(), watch.bytes)
    loaded, stored, flops, moved = (end - start for end, start in zip(after, before, strict=True))
    out: Tensor = views[3]
    z = out if run is kernel.contract else views[0]
    added, whole = (0, 0) if counted.parts == 1 else (counted.stored, out.numel())
    assert flops == counted.flops
    of_bias = out.numel() if len(given) > 4 else 0
    assert loaded == counted.loaded + added + of_bias
    assert stored == counted.stored + whole
    if z.dtype == SINGLE:  # as it is between the two kernels
        assert moved == counted.cost.bytes(counted.itemsize) + of_bias * views[-1].element_size()
    assert blocks[3].isnan().sum() == blocks[3].numel() - out.numel()
    return out


@pytest.mark.usefixtures("processors")
@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_contract_within_its_own_memory_and_as_counted(watch: Watch, size: str, dtype: torch.dtype) -> None:
    sizes = sizes_of(size, dtype)
    x, z, u, v = drawn(sizes, dtype)
    counted = contract_launch(
        *sizes, "half" if dtype == HALF else "float32", launch_tables.table(launch_tables.DEFAULT)
    )
    for out_dtype in {dtype, SINGLE}:
        out = torch.full_like(z, math.nan, dtype=out_dtype)
        found = run_watched(watch, kernel.contract, (x, u, v, out), counted)
        assert error(found, contracted(x, u, v)) < TOLERANCE[out_dtype]


@pytest.mark.usefixtures("processors")
@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_expand_within_its_own_memory_and_as_counted(watch: Watch, size: str, dtype: torch.dtype) -> None:
    sizes = sizes_of(size, dtype)
    x, z, p, q = drawn(sizes, dtype)
    counted = expand_launch(*sizes, "half" if dtype == HALF else "float32", launch_tables.table(launch_tables.DEFAULT))
    out, bias = torch.full_like(x, math.nan), torch.randn(x.shape[1:]).to(dtype)
    found = run_watched(watch, kernel.expand, (z, p, q, out), counted)
    assert error(found, expanded(z, p, q)) < TOLERANCE[dtype]
    found = run_watched(watch, kernel.expand, (z.float(), p, q, out, bias), counted)
    assert error(found, expanded(z, p, q) + bias.double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
def test_shares_that_do_not_divide(watch: Watch, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_khatri_rao, "_shares", lambda most: [2])
    name, table = "half" if dtype == HALF else "float32", replace(launch_tables.shipped(launch_tables.DEFAULT))
    monkeypatch.setattr(launch_tables, "table", lambda arch: table)
    sizes = (3, 131, 17, 150) if dtype == HALF else (3, 67, 17, 70)
    x, z, first, second = drawn(sizes, dtype)
    counted = contract_launch(*sizes, name, table)
    assert (counted.steps, counted.share, counted.parts) == (3, 2, 2)
    found = run_watched(watch, kernel.contract, (x, first, second, torch.full_like(z, math.nan)), counted)
    assert error(found, contracted(x, first, second)) < TOLERANCE[dtype]
    counted = expand_launch(*sizes, name, table)
    assert counted.steps % counted.share
    assert counted.parts == 2
    found = run_watched(watch, kernel.expand, (z, first, second, torch.full_like(x, math.nan)), counted)
    assert error(found, expanded(z, first, second)) < TOLERANCE[dtype]


def moved(tensor: Tensor) -> Tensor:
    """Its last axis is no longer contiguous, its first one is."""
    return tensor.movedim(0, -1).contiguous().movedim(-1, 0)


def spread(tensor: Tensor) -> Tensor:
    """None of its axes is contiguous, and NaN lies between."""
    wide = torch.full((*tensor.shape, 2), math.nan, dtype=tensor.dtype)
    wide[..., 1] = tensor
    return wide[..., 1]


@pytest.mark.usefixtures("processors")
@pytest.mark.parametrize("layout", [moved, spread])
def test_operands_of_any_strides(layout: Callable[[Tensor], Tensor]) -> None:
    x, z, first, second = drawn(PRIMES, SINGLE)
    bias = torch.randn(x.shape[1:])
    for k in range(4):
        given = [layout(t) if j == k else t for j, t in enumerate((x, first, second, torch.full_like(z, math.nan)))]
        kernel.contract(*given)
        assert error(given[3], contracted(x, first, second)) < TOLERANCE[SINGLE]
    for k in range(5):
        tensors = (z, first, second, torch.full_like(x, math.nan), bias)
        given = [layout(t) if j == k else t for j, t in enumerate(tensors)]
        kernel.expand(*given)
        assert error(given[3], expanded(z, first, second) + bias.double()) < TOLERANCE[SINGLE]


def test_bfloat16_by_emulation() -> None:
    x, z, first, second = (tensor.float() for tensor in drawn(PRIMES, torch.bfloat16))
    out, y = torch.empty_like(z), torch.empty_like(x)
    kernel.contract(x, first, second, out)
    kernel.expand(z, first, second, y)
    assert error(out, contracted(x, first, second)) < TOLERANCE[SINGLE]
    assert error(y, expanded(z, first, second)) < TOLERANCE[SINGLE]


@pytest.mark.parametrize("empty", range(4))
def test_empty_operands(empty: int) -> None:
    sizes = [0 if k == empty else size for k, size in enumerate(PRIMES)]
    x, z, first, second = drawn((sizes[0], sizes[1], sizes[2], sizes[3]), SINGLE)
    out, y, bias = torch.full_like(z, math.nan), torch.full_like(x, math.nan), torch.randn(x.shape[1:])
    kernel.contract(x, first, second, out)
    assert out.eq(0).all()
    kernel.expand(z, first, second, y, bias, "relu")
    assert y.eq(bias.relu() if empty == 3 else 0).all()


@pytest.mark.usefixtures("processors")
@pytest.mark.parametrize("name", ["relu", "silu", "gelu", "gelu_tanh"])
def test_activations(name: str) -> None:
    x, z, p, q = drawn(PRIMES, SINGLE)
    bias = torch.randn(x.shape[1:])
    for along in (None, bias):
        y = torch.full_like(x, math.nan)
        kernel.expand(z, p, q, y, along, name)
        assert error(y, activation(name)(expanded(z, p, q) + (0 if along is None else along))) < TOLERANCE[SINGLE]


@pytest.mark.usefixtures("processors")
def test_two_runs_agree_bit_by_bit() -> None:
    x, z, first, second = drawn(sizes_of("beyond one tile", SINGLE), SINGLE)
    outs, ys = [torch.empty_like(z) for _ in range(2)], [torch.empty_like(x) for _ in range(2)]
    for out, y in zip(outs, ys, strict=True):
        kernel.contract(x, first, second, out)
        kernel.expand(z, first, second, y)
    assert torch.equal(*outs)
    assert torch.equal(*ys)


def test_more_parts_than_are_added_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "PARTS", 4)
    x, z, p, q = drawn((1, 3, 5, 300), SINGLE)
    table = replace(launch_tables.shipped(launch_tables.DEFAULT), processors=10**9, step=1.0)
    monkeypatch.setattr(launch_tables, "table", lambda arch: table)
    assert expand_launch(1, 3, 5, 300, "float32", table).parts == 10
    y = torch.empty_like(x)
    kernel.expand(z, p, q, y)
    assert error(y, expanded(z, p, q)) < TOLERANCE[SINGLE]


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_float32_is_rounded_where_torch_rounds_it(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    builder, found = interpreter.interpreter_builder, []
    multiply = builder.create_dot
    monkeypatch.setattr(builder, "create_dot", lambda *given: (found.append(given[3].name), multiply(*given))[1])
    x, z, first, second = drawn(PRIMES, SINGLE)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        kernel.contract(x, first, second, torch.empty_like(z))
        kernel.expand(z, first, second, torch.empty_like(x))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert set(found) == {precision.upper()}


def test_dtypes_are_refused() -> None:
    x, z, first, second = drawn(PRIMES, SINGLE)
    for rows, cores, others, message in (
        (SINGLE, HALF, SINGLE, "one dtype"),
        (HALF, SINGLE, HALF, "one dtype"),
        (SINGLE, SINGLE, HALF, "one dtype"),
        (*[torch.double] * 3, "float64"),
        (*[torch.bfloat16] * 3, "bfloat16"),
    ):
        with pytest.raises(KernelError, match=message):
            kernel.contract(x.to(rows), first.to(cores), second.to(cores), z.to(others))
        with pytest.raises(KernelError, match=message):
            kernel.expand(z.to(others), first.to(cores), second.to(cores), x.to(rows))


# -- a program --------------------------------------------------------------------------------------------------------


def cp(outs: tuple[int, int], ins: tuple[int, int], rank: int) -> Network:
    """CP, its cores in an order of their own and some of them transposed."""
    cores = (("i2", "r"), ("r", "o1"), ("o2", "r"), ("r", "i1"))
    return Network(cores, {"r": rank}, linear_modes(outs, ins))


def exact(network: Network, x: Tensor, cores: Sequence[Tensor]) -> Tensor:
    weight = contraction.to_dense(network, list(cores))
    return x @ weight.reshape(network.features("out"), network.features("in")).mT


@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
@pytest.mark.parametrize(
    ("outs", "ins", "rank", "batch"),
    [((5, 7), (11, 3), 19, 6), ((2, 3), (3, 2), 5, 13), ((1, 1), (1, 1), 1, 1), ((33, 35), (34, 2), 70, 2)],
    ids=["primes", "some ranks at a time", "ones", "beyond one tile"],
)
def test_forward_and_gradients_of_a_program(
    outs: tuple[int, int], ins: tuple[int, int], rank: int, batch: int, dtype: torch.dtype
) -> None:
    network = cp(outs, ins, rank)
    shapes = (batch, network.features("in")), (batch, network.features("out")), (network.features("out"),)
    x, dy, bias, *cores = (torch.randn(shape).to(dtype) for shape in (*shapes, *network.core_shapes))
    program = FusedKhatriRao(network)
    tensors = [tensor.double().requires_grad_() for tensor in (x, *cores)]
    y = exact(network, tensors[0], tensors[1:])
    y.backward(dy.double())
    expected = y.detach()
    assert error(program.forward(x, cores, None), expected) < TOLERANCE[dtype]
    assert error(program.forward(x, cores, bias), expected + bias.double()) < TOLERANCE[dtype]
    assert (
        error(program.forward(x, cores, bias, "gelu"), activation("gelu")(expected + bias.double())) < TOLERANCE[dtype]
    )
    found = program.gradients(dy, x, cores, [True] * 5)
    for gradient, tensor, reference in zip(found, (x, *cores), tensors, strict=True):
        assert gradient is not None
        assert reference.grad is not None
        assert gradient.dtype == dtype
        assert gradient.shape == tensor.shape
        assert error(gradient, reference.grad) < TOLERANCE[dtype]


def test_only_the_gradients_asked_for() -> None:
    network = cp((2, 3), (3, 2), 4)
    x, dy, *cores = (torch.randn(shape) for shape in ((3, 6), (3, 6), *network.core_shapes))
    program = FusedKhatriRao(network)
    every = program.gradients(dy, x, cores, [True] * 5)
    for needs in (*([k == j for k in range(5)] for j in range(5)), [True, False, True, True, False], [False] * 5):
        found = program.gradients(dy, x, cores, needs)
        for gradient, reference, is_needed in zip(found, every, needs, strict=True):
            assert (gradient is not None) == is_needed
            assert gradient is None or torch.equal(gradient, reference)


def test_no_rows() -> None:
    network = cp((2, 3), (3, 2), 4)
    x, dy, *cores = (torch.randn(shape) for shape in ((0, 6), (0, 6), *network.core_shapes))
    program = FusedKhatriRao(network)
    assert program.forward(x, cores, torch.randn(6)).shape == (0, 6)
    dx, *found = program.gradients(dy, x, cores, [True] * 5)
    assert dx is not None
    assert dx.shape == (0, 6)
    for gradient, core in zip(found, cores, strict=True):
        assert gradient is not None
        assert torch.equal(gradient, torch.zeros_like(core))
