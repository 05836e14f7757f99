"""Embeddings by the lookup kernels in Triton's interpreter, against the dense table in float64.

Not collected by itself: test_interpreted.py runs this file in a process of its own, with ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tensorlayers import TT, FactorizedEmbedding, FactorizedEmbeddingBag, LowRank, explain, fused_lookup, use_kernels
from tensorlayers.errors import KernelError
from tensorlayers.fused_lookup import found_chain
from tensorlayers.kernels import lookup, lookup_gradients
from tests.kernels.support import HALF, SINGLE, TOLERANCE, agree, error


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are looked up by the kernel, in few programs."""
    monkeypatch.setattr(fused_lookup, "kernels", lambda: "only")
    monkeypatch.setattr(lookup, "shares", lambda count, of, *_: (50, of.heads))
    monkeypatch.setattr(lookup_gradients, "share_of", lambda *_: 20)


LAYERS = {
    "two": (53, 12, TT(3)),
    "three": (53, 12, TT(3, order=3)),
    "two, padded": (50, 19, TT(4, in_modes=(6, 9), out_modes=(4, 5))),
    "three, padded": (50, 19, TT((2, 3), in_modes=(3, 4, 5), out_modes=(2, 3, 4))),
}


def dense_gradients(layer: FactorizedEmbedding, ids: Tensor, probe: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What the dense table gives in float64."""
    wide = copy.deepcopy(layer).double().requires_grad_()
    truth = F.embedding(ids, wide.to_dense(), wide.padding_idx)
    return truth, list(torch.autograd.grad(truth, list(wide.cores), probe.double()))


@pytest.mark.parametrize(
    ("name", "which"), [*((name, "repeated") for name in LAYERS), ("two", "Zipf"), ("three, padded", "Zipf")]
)
def test_a_layer_gives_what_the_dense_table_does(name: str, which: str, kernels: None) -> None:
    rows, columns, format = LAYERS[name]
    layer = FactorizedEmbedding(rows, columns, padding_idx=3, format=format)
    ids = {
        "repeated": torch.tensor([[0, 7, 7, rows - 1], [7, 3, 0, rows - 1]]),
        "Zipf": torch.rand(24).pow(-1.0).clamp(max=rows).long() - 1,
    }[which]
    y = layer(ids)
    probe = torch.randn_like(y)
    truth, gradients = dense_gradients(layer, ids, probe)
    found = torch.autograd.grad(y, list(layer.cores), probe)
    assert agree([y, *found], [truth, *gradients])
    for mine, theirs in zip(found, gradients, strict=True):
        assert not mine[(theirs == 0).all(tuple(range(1, mine.dim())))].any()


def test_half_precision_and_frozen_cores(kernels: None) -> None:
    layer = FactorizedEmbedding(53, 12, format=TT(3, order=3), dtype=HALF)
    layer.cores[1].requires_grad_(False)
    ids = torch.randint(53, (9,))
    y = layer(ids)
    assert y.dtype == HALF
    y.backward(torch.ones_like(y))
    assert layer.cores[1].grad is None
    truth, gradients = dense_gradients(layer, ids, torch.ones_like(y))
    found = [layer.cores[k].grad for k in (0, 2)]
    assert {gradient.dtype for gradient in found} == {HALF}
    assert agree([y, *found], [truth, *gradients[::2]], HALF)


@pytest.mark.parametrize("name", ["two", "three"])
def test_empty_ids_and_bags(name: str, kernels: None) -> None:
    rows, columns, format = LAYERS[name]
    layer = FactorizedEmbedding(rows, columns, format=format)
    y = layer(torch.empty(2, 0, dtype=torch.int64))
    assert y.shape == (2, 0, columns)
    for gradient in torch.autograd.grad(y.sum(), list(layer.cores)):
        assert not gradient.any()
    bags = FactorizedEmbeddingBag(rows, columns, mode="sum", format=format)
    ids = torch.tensor([[1, 5], [1, 1]])
    assert error(bags(ids).detach(), bags.to_dense()[ids].sum(1).detach().double()) < TOLERANCE[SINGLE]


def test_the_kernel_runs_where_it_is_to(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for module in (lookup, lookup_gradients):
        original = module.run
        monkeypatch.setattr(module, "run", lambda *given, run=original: called.append(run) or run(*given))
    layer = FactorizedEmbedding(53, 12, format=TT(3))
    for mode, times in (("none", 0), ("auto", 0), ("only", 2)):  # on the CPU
        monkeypatch.setattr(fused_lookup, "kernels", lambda mode=mode: mode)
        layer(torch.tensor([3])).sum().backward()
        assert len(called) == times
    for refused, reason in (
        (FactorizedEmbedding(53, 12, format=TT(3), dtype=torch.float64), "float64"),
        (FactorizedEmbedding(53, 12, format=LowRank(3)), "tensor train"),
    ):
        with pytest.raises(KernelError, match=f"no Triton kernel supports this lookup.*{reason}"):
            refused(torch.tensor([3]))


@pytest.mark.parametrize("name", ["two", "three, padded"])
def test_compiled_as_one_graph(name: str, kernels: None) -> None:
    rows, columns, format = LAYERS[name]
    layer = FactorizedEmbedding(rows, columns, padding_idx=1, format=format)
    torch._dynamo.reset()
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def kept(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            graphs.append(graph.code)
            return make_boxed_func(graph.forward)

        return aot_autograd(fw_compiler=kept, bw_compiler=kept)(graph, inputs)

    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    for count in (3, 8):
        ids = torch.randint(rows, (count,))
        y = compiled(ids)
        probe = torch.randn_like(y)
        truth, gradients = dense_gradients(layer, ids, probe)
        assert agree([y, *torch.autograd.grad(y, list(layer.cores), probe)], [truth, *gradients])
    assert ["ops.tensorlayers.lookup.default" in code for code in graphs] == [True, False]
    assert ["ops.tensorlayers.lookup_gradients.default" in code for code in graphs] == [False, True]


def test_what_it_cannot_do_torchs_operations_do(kernels: None) -> None:
    """Second derivatives, gradients of many, torch.func and exported graphs."""
    layer = FactorizedEmbedding(53, 12, format=TT(3))
    ids, cores = torch.tensor([3, 17, 3]), list(layer.cores)

    def second(y: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(y.square().sum(), cores, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), cores)

    truth = layer.to_dense()[ids]
    assert agree(second(layer(ids)), second(truth))
    probes = torch.randn(2, 3, 12)
    many = torch.autograd.grad(layer(ids), cores, probes, is_grads_batched=True)
    for k, probe in enumerate(probes):
        assert agree([mine[k] for mine in many], torch.autograd.grad(layer.to_dense()[ids], cores, probe))
    values = dict(layer.named_parameters())
    jacobian = torch.func.jacrev(lambda given: torch.func.functional_call(layer, given, (ids,)))(values)
    assert jacobian["cores.0"].shape == (3, 12, *cores[0].shape)
    exported = torch.export.export(layer, (ids,)).module()
    assert "tensorlayers" not in str(exported.graph)
    assert agree([exported(ids)], [truth])


def test_the_mode_is_that_of_use_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    table, ids = FactorizedEmbedding(50, 12, format=TT(3)), torch.tensor([3, 4, 4, 49])
    network = table.own_network
    assert found_chain(network, list(table.cores)) is None  # on the CPU only where it is demanded
    with use_kernels("triton"):
        assert found_chain(network, list(table.cores)) == lookup.train(network)
        assert error(table(ids), table.to_dense().double()[ids]) < TOLERANCE[SINGLE]
        with pytest.raises(KernelError, match="no Triton kernel supports this lookup"):
            FactorizedEmbedding(50, 12, format=LowRank(3))(ids)
    with use_kernels("torch"):
        assert found_chain(network, list(table.cores)) is None


def test_explained() -> None:
    ids = torch.tensor([3, 4, 4, 49])
    train, other = (FactorizedEmbedding(50, 12, format=format) for format in (TT(3), LowRank(3)))
    assert explain(train, ids).chosen == "contraction"
    assert "only where it is demanded" in explain(train, ids).rows[1].refusal
    assert "no tensor train" in explain(other, ids).rows[1].refusal
    with use_kernels("torch"):
        assert "switches it off" in explain(train, ids).rows[1].refusal
    with use_kernels("triton"):
        said = explain(train, ids)
        assert said.chosen == "lookup"
        assert [row.name for row in said.backward if not row.refusal] == ["lookup_gradients"]
        with pytest.raises(KernelError, match="no tensor train"):
            explain(other, ids)
