"""The tt2 kernel in Triton's interpreter, against the dense product in float64.

Not collected by itself: Triton decides on import whether it interprets, so test_tt2.py runs this file in a process of
its own, with ``TRITON_INTERPRET=1``. The interpreter has no bfloat16 (it computes on bit patterns): inputs are rounded
to bfloat16 and multiplied in float32 instead, and test_tt2.py compiles the bfloat16 kernel.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from tensorlayers import TT, FactorizedLinear, dispatch, functional
from tensorlayers.errors import KernelError
from tensorlayers.kernels import tt2
from tensorlayers.network import Network
from tests.kernels.support import (
    CASES,
    HALF,
    NAMES,
    SHAPES,
    SINGLE,
    TOLERANCE,
    Watch,
    dense,
    draw,
    error,
    tt,
    within_nan,
)


@pytest.fixture(autouse=True)
def _interpreter() -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_tt2.py, with TRITON_INTERPRET=1"


@pytest.fixture(params=["one token a program", "several"])
def tokens(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small batches get one token a program; without the rule that sees to it, as many as a large batch."""
    monkeypatch.setattr(tt2, "PROGRAMS", 0 if request.param == "several" else tt2.PROGRAMS)


@pytest.mark.usefixtures("tokens")
@pytest.mark.parametrize(("dtype", "out_modes", "in_modes", "rank", "batch"), CASES, ids=NAMES)
def test_forward_and_input_gradient_touch_only_their_own_memory(
    watch: Watch, dtype: torch.dtype, out_modes: tuple[int, int], in_modes: tuple[int, int], rank: int, batch: int
) -> None:
    network = tt(out_modes, in_modes, rank)
    x, a, g = draw(network, batch, dtype)
    dy = torch.randn(batch, network.features("out")).to(dtype)
    weight = dense(network, (a, g))
    calls = [
        (x.reshape(batch, *in_modes), a, g, x.double() @ weight.T, out_modes),
        (dy.reshape(batch, *out_modes), a.transpose(0, 1), g.transpose(1, 2), dy.double() @ weight, in_modes),
    ]
    for *operands, expected, modes in calls:
        before = watch.touched
        operands += [torch.full((batch, *modes), math.nan, dtype=dtype)]
        (rows, left, right, out), blocks = zip(*map(within_nan, operands), strict=True)
        for view, block in zip((rows, left, right, out), blocks, strict=True):
            watch.add(view, block)
        tt2.launch(rows, left, right, out)
        assert error(out, expected.reshape(batch, *modes)) < TOLERANCE[dtype]
        assert watch.touched - before >= rows.numel() + out.numel()
        assert blocks[-1].isnan().sum() == blocks[-1].numel() - out.numel()


def test_bfloat16_by_emulation() -> None:
    network = tt((7, 13), (11, 5), 3)
    x, a, g = (tensor.float() for tensor in draw(network, 3, torch.bfloat16))
    assert error(tt2.linear(x, network, (a, g)), x.double() @ dense(network, (a, g)).T) < TOLERANCE[SINGLE]


def _strided(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=1)[:, ::2]


def _gap(x: Tensor) -> Tensor:
    return torch.cat([x, torch.full_like(x, math.nan)], dim=1)[:, : x.shape[1]]


def _transposed(x: Tensor) -> Tensor:
    return x.T.contiguous().T


def _reversed_twice(x: Tensor) -> Tensor:
    return x.flip(0)[torch.arange(x.shape[0] - 1, -1, -1)]


@pytest.mark.parametrize("layout", [_strided, _gap, _transposed, _reversed_twice])
def test_x_of_any_strides(layout: Callable[[Tensor], Tensor]) -> None:
    network = tt((7, 13), (11, 5), 3)
    x, a, g = draw(network, 3, SINGLE)
    assert error(tt2.linear(layout(x), network, (a, g)), x.double() @ dense(network, (a, g)).T) < TOLERANCE[SINGLE]


def test_cores_of_any_strides() -> None:
    network = tt((7, 13), (11, 5), 3)
    x, a, g = draw(network, 3, SINGLE)
    expected = x.double() @ dense(network, (a, g)).T
    for first, second in product((0, 1, 2), repeat=2):
        cores = (
            a.movedim(first, 0).contiguous().movedim(0, first),
            g.movedim(second, 0).contiguous().movedim(0, second),
        )
        assert error(tt2.linear(x, network, cores), expected) < TOLERANCE[SINGLE]


def test_an_empty_batch() -> None:
    network = tt((7, 13), (11, 5), 3)
    x, a, g = (tensor.requires_grad_() for tensor in draw(network, 0, SINGLE))
    y = tt2.linear(x, network, (a, g))
    assert y.shape == (0, 91)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 55)
    assert a.grad is not None
    assert g.grad is not None
    assert a.grad.count_nonzero() == g.grad.count_nonzero() == 0


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize(("out_modes", "in_modes", "rank", "batch"), [SHAPES["primes"], SHAPES["i2 first"]])
def test_gradients(
    dtype: torch.dtype, out_modes: tuple[int, int], in_modes: tuple[int, int], rank: int, batch: int
) -> None:
    network = tt(out_modes, in_modes, rank)
    tensors = [tensor.requires_grad_() for tensor in draw(network, batch, dtype)]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    dy = torch.randn(batch, network.features("out")).to(dtype)
    tt2.linear(tensors[0], network, tensors[1:]).backward(dy)
    (exact[0] @ dense(network, exact[1:]).T).backward(dy.double())
    for tensor, reference in zip(tensors, exact, strict=True):
        assert tensor.grad is not None
        assert reference.grad is not None
        assert tensor.grad.dtype == dtype
        assert error(tensor.grad, reference.grad) < TOLERANCE[dtype]


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_only_the_gradients_asked_for(wanted: tuple[int, ...]) -> None:
    network = tt((2, 3), (3, 2), 2)
    tensors = draw(network, 3, SINGLE)
    for k in wanted:
        tensors[k].requires_grad_()
    tt2.linear(tensors[0], network, tensors[1:]).square().sum().backward()
    assert [k for k in range(3) if tensors[k].grad is not None] == list(wanted)


def test_saved_for_backward_are_x_and_the_cores() -> None:
    network = tt((7, 13), (11, 5), 3)
    tensors = [tensor.requires_grad_() for tensor in draw(network, 3, SINGLE)]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        tt2.linear(tensors[0], network, tensors[1:])
    assert {tensor.data_ptr() for tensor in saved} == {tensor.data_ptr() for tensor in tensors}


def _second_order(linear: functional.Product, network: Network, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a scalar that depends on every first-order gradient, by finite coefficients of their own."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    y = linear(tensors[0], network, tensors[1:])
    first = torch.autograd.grad(y.pow(3).sum(), tensors, create_graph=True)
    scalar = torch.stack([(grad * torch.linspace(-1, 1, grad.numel()).to(grad).view_as(grad)).sum() for grad in first])
    return list(torch.autograd.grad(scalar.sum(), tensors))


def test_second_order_gradients() -> None:
    network = tt((3, 4), (5, 2), 2)
    tensors = draw(network, 3, SINGLE)
    expected = _second_order(functional.contract_rows, network, [tensor.double() for tensor in tensors])
    for actual, reference in zip(_second_order(tt2.linear, network, tensors), expected, strict=True):
        assert error(actual, reference) < TOLERANCE[SINGLE]


def _apply(linear: functional.Product, network: Network, x: Tensor, a: Tensor, g: Tensor) -> Tensor:
    return linear(x, network, (a, g)).square().sum()


@pytest.mark.parametrize("stacked", [(0,), (1,), (0, 2), (0, 1, 2)])
def test_vmap_of_gradients(stacked: tuple[int, ...]) -> None:
    network = tt((3, 4), (5, 2), 2)
    draws = [draw(network, 2, SINGLE, seed) for seed in range(3)]
    tensors = [torch.stack([one[k] for one in draws], dim=1) if k in stacked else draws[0][k] for k in range(3)]
    in_dims = tuple(1 if k in stacked else None for k in range(3))

    def run(linear: functional.Product, arguments: Sequence[Tensor]) -> tuple[Tensor, ...]:
        gradient = torch.func.grad(lambda *operands: _apply(linear, network, *operands), argnums=(0, 1, 2))
        gradients: tuple[Tensor, ...] = torch.func.vmap(gradient, in_dims=in_dims)(*arguments)
        return gradients

    expected = run(functional.contract_rows, [tensor.double() for tensor in tensors])
    for actual, reference in zip(run(tt2.linear, tensors), expected, strict=True):
        assert error(actual, reference) < TOLERANCE[SINGLE]


def test_jacrev() -> None:
    network = tt((2, 3), (3, 2), 2)
    x, a, g = draw(network, 1, SINGLE)
    jacobian = torch.func.jacrev(lambda row: tt2.linear(row[None], network, (a, g))[0])(x[0])
    assert error(jacobian, dense(network, (a, g))) < TOLERANCE[SINGLE]


@pytest.mark.parametrize("batch", [0, 3])
def test_opcheck(batch: int) -> None:
    x, a, g = draw(tt((3, 4), (5, 2), 2), batch, SINGLE)
    torch.library.opcheck(tt2.tt2, (x.reshape(batch, 5, 2), a, g))
    torch.library.opcheck(tt2.tt2, (x.reshape(batch, 2, 5).mT, a.transpose(0, 1).contiguous().transpose(0, 1), g))


def test_compiled_with_a_dynamic_batch() -> None:
    network = tt((3, 4), (5, 2), 2)
    _, a, g = (tensor.requires_grad_() for tensor in draw(network, 1, SINGLE))
    graphs: list[Any] = []

    def backend(module: Any, inputs: Any) -> Any:
        graphs.append(module)
        return module

    compiled = torch.compile(lambda x: tt2.linear(x, network, (a, g)), backend=backend, fullgraph=True, dynamic=True)
    for batch in (6, 11):  # equal to no other size: equal sizes share a symbol
        x = draw(network, batch, SINGLE, batch)[0].requires_grad_()
        actual = torch.autograd.grad(compiled(x).square().sum(), (x, a, g))
        exact = [tensor.detach().double().requires_grad_() for tensor in (x, a, g)]
        expected = torch.autograd.grad(_apply(functional.contract_rows, network, *exact), exact)
        assert max(error(one, other) for one, other in zip(actual, expected, strict=True)) < TOLERANCE[SINGLE]
    assert len(graphs) == 1


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of x of every launch."""
    launches: list[tuple[int, ...]] = []
    launch = tt2.launch

    def spy(x: Tensor, a: Tensor, g: Tensor, out: Tensor) -> None:
        launches.append(tuple(x.shape))
        launch(x, a, g, out)

    with monkeypatch.context() as patch:
        patch.setattr(tt2, "launch", spy)
        yield launches


def test_dispatch_reaches_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    network = tt((5, 4), (3, 7), 2)  # 20 <- 21
    _, a, g = draw(network, 1, SINGLE)
    x, bias = torch.randn(2, 3, 19), torch.randn(18)
    expected = torch.nn.functional.linear(x.double(), dense(network, (a, g))[:18, :19], bias.double())
    with counted(monkeypatch) as launches:
        assert error(dispatch.linear(x, network, (a, g), bias), expected) < TOLERANCE[SINGLE]
        assert launches == []
        with dispatch.use_kernels("triton"):
            assert error(dispatch.linear(x, network, (a, g), bias), expected) < TOLERANCE[SINGLE]
            assert error(dispatch.linear(x[0, 0], network, (a, g), bias), expected[0, 0]) < TOLERANCE[SINGLE]
        assert launches == [(6, 3, 7), (1, 3, 7)]
        with dispatch.use_kernels("torch"):
            dispatch.linear(x, network, (a, g), bias)
        assert len(launches) == 2


def test_dispatch_under_autocast() -> None:
    network = tt((5, 4), (3, 7), 2)
    x, a, g = draw(network, 3, SINGLE)
    with torch.autocast("cpu", HALF), dispatch.use_kernels("triton"):
        y = dispatch.linear(x, network, (a, g))
    assert y.dtype == HALF
    assert error(y, x.double() @ dense(network, (a, g)).T) < 3 * TOLERANCE[HALF]  # three operands rounded as well


def test_dtypes_are_refused() -> None:
    network = tt((2, 3), (3, 2), 2)
    x, a, g = draw(network, 3, SINGLE)
    with pytest.raises(KernelError, match="one dtype"):
        tt2.linear(x.half(), network, (a, g))
    with pytest.raises(KernelError, match="float64"):
        tt2.linear(x.double(), network, (a.double(), g.double()))
    with pytest.raises(KernelError, match="bfloat16"):
        tt2.linear(x.bfloat16(), network, (a.bfloat16(), g.bfloat16()))


def test_a_compiled_layer_calls_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = FactorizedLinear(12, 20, format=TT(3, in_modes=(3, 4), out_modes=(4, 5)))
    calls = []
    original = tt2.launch
    monkeypatch.setattr(tt2, "launch", lambda *tensors: (calls.append(1), original(*tensors))[1])
    with dispatch.use_kernels("triton"):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
        for rows in (2, 5):
            x = torch.randn(rows, 12)
            expected = functional.F.linear(x.double(), layer.to_dense().double(), layer.bias.double())
            assert error(compiled(x), expected) < TOLERANCE[SINGLE]
    assert calls
