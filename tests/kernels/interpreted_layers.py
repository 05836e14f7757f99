"""Layers whose products run by Triton kernels, in the interpreter: differentiation, transforms, compilation, dispatch.

Run by test_interpreted.py in a process of its own, as interpreted_chain.py is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tensorlayers as tl
from tensorlayers import backend, decision, dispatch, functional
from tensorlayers.errors import KernelError
from tensorlayers.kernels import chain as kernel
from tests.kernels.support import HALF, SINGLE, TOLERANCE, error

FORMATS = {
    "TT": tl.TT(3),
    "TT, order 3": tl.TT(2, order=3),
    "BTT": tl.BTT(2, in_modes=(2, 10), out_modes=(6, 3)),
    "Tucker": tl.Tucker(3),
    "CP": tl.CP(4),
    "LowRank": tl.LowRank(5),
}


WAYS = {
    "TT": ("fused", "fused_rebuild"),
    "BTT": ("fused", "fused_rebuild"),
    "Tucker": ("fused", "fused_rebuild"),
    "CP": ("fused", "fused_khatri_rao"),
    "LowRank": ("fused",),
}


class _Watched:
    """A module of kernels, the calls of whose functions are noted."""

    def __init__(self, module: Any, calls: list[str]) -> None:
        self._module, self._calls = module, calls

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._module, name)
        return lambda *args, **options: (self._calls.append(name), function(*args, **options))[1]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of every function of a kernel module that is called."""
    calls: list[str] = []
    load = backend.load
    monkeypatch.setattr(backend, "load", lambda name: _Watched(load(name), calls))
    return calls


def layer_of(format: tl.Format, dtype: torch.dtype = SINGLE, bias: bool = True) -> tl.FactorizedLinear:
    torch.manual_seed(0)
    return tl.FactorizedLinear(20, 18, bias, format=format, dtype=dtype)


def exact(layer: tl.FactorizedLinear, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The dense product in float64, and what it is differentiated by: x, the cores and the bias."""
    leaves = [t.detach().double().requires_grad_() for t in (x, *layer.cores, layer.bias)]
    y: Tensor = functional.contract_rows(leaves[0].flatten(0, -2), layer.network, leaves[1:-1], None)
    return y.unflatten(0, x.shape[:-1])[..., : layer.out_features] + leaves[-1], leaves


@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
@pytest.mark.parametrize("way", decision.KERNELS)
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_forward_and_every_gradient(format: tl.Format, way: str, dtype: torch.dtype, launched: list[str]) -> None:
    layer = layer_of(format, dtype)
    layer.implementation = way
    x = torch.randn(2, 3, 20).to(dtype).requires_grad_()
    if way not in WAYS[type(format).__name__]:
        with pytest.raises(KernelError, match=f"no Triton kernel supports this call: {way}: "):
            layer(x)
        return
    expected, leaves = exact(layer, x)
    dy = torch.randn_like(expected).to(dtype)
    y = layer(x)
    y.backward(dy)
    assert launched
    # Half precision rounds what lies between several products once more.
    assert error(y, expected) < 2 * TOLERANCE[dtype]
    exacts = torch.autograd.grad(expected, leaves, dy.double())
    for tensor, reference in zip((x, *layer.cores, layer.bias), exacts, strict=True):
        assert tensor.grad is not None
        assert tensor.grad.dtype == dtype
        assert error(tensor.grad, reference) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_only_the_gradients_asked_for(wanted: tuple[int, ...], launched: list[str]) -> None:
    layer, x = layer_of(FORMATS["TT"]), torch.randn(3, 20)
    tensors = [x, *layer.cores]
    for k, tensor in enumerate(tensors):
        tensor.requires_grad_(k in wanted)
    with tl.use_kernels("triton"):
        layer(x).square().sum().backward()
    assert [k for k in range(3) if tensors[k].grad is not None] == list(wanted)
    assert len(launched) == 1 + len(wanted)


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_saved_for_backward_are_x_and_the_cores(format: tl.Format) -> None:
    layer, x = layer_of(format, bias=False), torch.randn(3, 20, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor), tl.use_kernels("triton"):
        layer(x)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (x, *layer.cores)}


def test_an_empty_batch() -> None:
    layer, x = layer_of(FORMATS["TT"]), torch.randn(0, 20, requires_grad=True)
    with tl.use_kernels("triton"):
        layer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 20)
    assert all(core.grad is not None and not core.grad.count_nonzero() for core in layer.cores)


def product(layer: tl.FactorizedLinear, mode: str) -> Callable[..., Tensor]:
    """x and cores -> y."""

    def run(x: Tensor, *cores: Tensor) -> Tensor:
        with tl.use_kernels(mode):
            return dispatch.linear(x, layer.network, cores)

    return run


def second_order(run: Callable[..., Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a scalar that depends on every first-order gradient, by coefficients of their own."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    first = torch.autograd.grad(run(*tensors).pow(3).sum(), tensors, create_graph=True)
    scalar = torch.stack([(grad * torch.linspace(-1, 1, grad.numel()).to(grad).view_as(grad)).sum() for grad in first])
    return list(torch.autograd.grad(scalar.sum(), tensors))


@pytest.mark.parametrize("format", ["TT", "BTT", "Tucker"])
def test_second_order_gradients(format: str) -> None:
    layer = layer_of(FORMATS[format])
    tensors = [torch.randn(3, 20), *layer.cores]
    actual = second_order(product(layer, "triton"), tensors)
    expected = second_order(product(layer, "torch"), [tensor.double() for tensor in tensors])
    for one, other in zip(actual, expected, strict=True):
        assert error(one, other) < 3 * TOLERANCE[SINGLE]


@pytest.mark.parametrize("stacked", [(0,), (1,), (0, 1, 2)])
def test_vmap_of_gradients(stacked: tuple[int, ...]) -> None:
    layer = layer_of(FORMATS["TT"])
    single = [torch.randn(2, 20), *(core.detach() for core in layer.cores)]
    tensors = [torch.stack([t, 2 * t, -t], dim=1) if k in stacked else t for k, t in enumerate(single)]
    in_dims = tuple(1 if k in stacked else None for k in range(3))

    def run(mode: str, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        forward = product(layer, mode)
        gradient = torch.func.grad(lambda *args: forward(*args).square().sum(), argnums=(0, 1, 2))
        found: tuple[Tensor, ...] = torch.func.vmap(gradient, in_dims=in_dims)(*given)
        return found

    for one, other in zip(run("triton", tensors), run("torch", [t.double() for t in tensors]), strict=True):
        assert error(one, other) < 2 * TOLERANCE[SINGLE]


def test_jacobians_forward_and_back() -> None:
    layer = layer_of(FORMATS["TT"], bias=False)
    run, x = product(layer, "triton"), torch.randn(20)
    cores = [core.detach() for core in layer.cores]
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        assert error(transform(lambda row: run(row[None], *cores)[0])(x), layer.to_dense().double()) < 2e-6


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_compiled_with_a_dynamic_batch(format: tl.Format, launched: list[str]) -> None:
    layer = layer_of(format)
    graphs: list[Any] = []

    def backend(module: Any, inputs: Any) -> Any:
        graphs.append(module)
        return module

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    with tl.use_kernels("triton"):
        for batch in (6, 11):  # equal to no other size: equal sizes share a symbol
            x = torch.randn(batch, 20, requires_grad=True)
            launched.clear()
            y = compiled(x)
            found = torch.autograd.grad(y.square().sum(), (x, *layer.cores, layer.bias))
            assert launched
            expected, leaves = exact(layer, x)
            exacts = torch.autograd.grad(expected.square().sum(), leaves)
            assert max(error(one, other) for one, other in zip(found, exacts, strict=True)) < 3 * TOLERANCE[SINGLE]
    assert len(graphs) == 1


def test_opcheck() -> None:
    layer = layer_of(FORMATS["TT"])
    spec = dispatch.row_product(layer.network, decision.TRITON, True)
    x, cores = torch.randn(3, 20), [core.detach() for core in layer.cores]
    for rows in (x, x[:0], torch.randn(20, 3).T):
        torch.library.opcheck(torch.ops.tensorlayers.product.default, (rows, cores, None, spec))
        torch.library.opcheck(torch.ops.tensorlayers.product.default, (rows, cores, torch.randn(18), spec))
        dy = torch.randn(len(rows), 18)
        operands = (dy, rows, cores, spec, [True] * 3)
        torch.library.opcheck(torch.ops.tensorlayers.gradients.default, operands)


def test_autocast() -> None:
    layer, x = layer_of(FORMATS["TT"]), torch.randn(3, 20)
    with torch.autocast("cpu", HALF), tl.use_kernels("triton"):
        y = layer(x)
        assert y.dtype == HALF
        y.sum().backward()
    assert error(y, exact(layer, x)[0]) < 3 * TOLERANCE[HALF]  # four operands are rounded as well
    assert all(core.grad is not None and core.grad.dtype == SINGLE for core in layer.cores)


def test_exported_graphs_have_operations_of_torch_alone() -> None:
    layer, x = layer_of(FORMATS["TT"]), torch.randn(4, 20)
    rows = torch.export.Dim("rows", min=2, max=64)
    with tl.use_kernels("triton"):
        program = torch.export.export(layer, (x,), dynamic_shapes={"input": {0: rows}})
    assert "tensorlayers" not in str(program.graph)
    for batch in (3, 7):
        x = torch.randn(batch, 20)
        assert error(program.module()(x), exact(layer, x)[0]) < 2 * TOLERANCE[SINGLE]


def test_fully_sharded(tmp_path: Any, launched: list[str]) -> None:
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        layer, x = layer_of(FORMATS["TT"]), torch.randn(3, 20)
        expected, leaves = exact(layer, x)
        exacts = torch.autograd.grad(expected.square().sum(), leaves)
        sharded = fully_shard(layer, mesh=distributed.init_device_mesh("cpu", (1,)))
        with tl.use_kernels("triton"):
            sharded(x).square().sum().backward()
        assert launched
        for parameter, reference in zip((*layer.cores, layer.bias), exacts[1:], strict=True):
            assert error(parameter.grad.full_tensor(), reference) < 3 * TOLERANCE[SINGLE]
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_an_mlp_applies_its_activation_in_the_kernel(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    mlp = tl.FactorizedMLP(20, 24, activation=activation, format=tl.TT(2))
    x, applied, run = torch.randn(3, 20), [], kernel.run
    monkeypatch.setattr(kernel, "run", lambda *args: (applied.append(args[5]), run(*args))[1])
    expected = copy.deepcopy(mlp).double()(x.double())
    with tl.use_kernels("triton"):
        with torch.no_grad():
            y = mlp(x)
        assert applied == (["gelu", "none"] if activation == "gelu" else ["silu", "none", "none"])
        assert error(y, expected) < 3 * TOLERANCE[SINGLE]
        applied.clear()
        y = mlp(x)
        assert error(y, expected) < 3 * TOLERANCE[SINGLE]
        y.sum().backward()
    # Forward; the layers before the activation again; the gradients, x of the first ones not among them.
    assert len(applied) == {"gelu": 2 + 1 + 3 + 2, "swiglu": 3 + 2 + 3 + 2 + 2}[activation]


# -- dispatch ---------------------------------------------------------------------------------------------------------


def test_the_modes(launched: list[str]) -> None:
    layer, x = layer_of(FORMATS["TT"]), torch.randn(2, 3, 20)
    expected = exact(layer, x)[0]
    assert error(layer(x), expected) < TOLERANCE[SINGLE]
    assert launched == []  # on the CPU only where they are demanded
    with tl.use_kernels("triton"):
        assert error(layer(x), expected) < 2 * TOLERANCE[SINGLE]
        assert error(layer(x[0, 0]), expected[0, 0]) < 2 * TOLERANCE[SINGLE]
    assert len(launched) == 2
    layer.implementation = "fused"
    assert error(layer(x), expected) < 2 * TOLERANCE[SINGLE]
    assert len(launched) == 3
    with tl.use_kernels("torch"):
        layer(x)
    assert len(launched) == 3


def test_explained() -> None:
    layer, x = layer_of(FORMATS["TT"]), torch.randn(3, 20)
    with tl.use_kernels("triton"):
        found = tl.explain(layer, x, training=True)
    assert found.chosen == "fused"
    for rows in (found.rows, found.backward):
        taken = next(row for row in rows if not row.refusal)
        assert taken.seconds is not None
        assert taken.cost is not None
    layer.implementation = "rebuild"
    with tl.use_kernels("triton"), pytest.raises(KernelError, match="'rebuild' is demanded"):
        layer(x)


def test_what_cannot_run_is_refused() -> None:
    layer = layer_of(FORMATS["TT"])
    for dtype, message in ((torch.double, "float64"), (torch.bfloat16, "bfloat16")):
        with tl.use_kernels("triton"), pytest.raises(KernelError, match=message):
            layer.to(dtype)(torch.randn(3, 20, dtype=dtype))
    single = tl.FactorizedLinear(20, 18, format=tl.TT(1, order=1, in_modes=(20,), out_modes=(18,)))
    if len(single.cores) == 1:
        with tl.use_kernels("triton"), pytest.raises(KernelError, match="no two cores"):
            single(torch.randn(3, 20))


def test_padded_features(launched: list[str]) -> None:
    torch.manual_seed(0)
    layer = tl.FactorizedLinear(19, 17, format=tl.TT(3, in_modes=(4, 5), out_modes=(3, 6)))
    x = torch.randn(4, 19, requires_grad=True)
    expected = F.linear(x.double(), layer.to_dense().double(), layer.bias.double())
    with tl.use_kernels("triton"):
        y = layer(x)
        y.sum().backward()
    assert launched
    assert error(y, expected) < 2 * TOLERANCE[SINGLE]
