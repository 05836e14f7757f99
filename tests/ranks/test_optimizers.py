"""truncate under an optimizer: no state is stale, hooks and graphs that are alive, training goes on."""

import pytest
import torch

from tensorlayers import CP, TT, LowRank
from tests.ranks.support import FORMATS, OPTIMIZERS, layer_of, step


def test_hooks_and_a_live_graph():
    layer = layer_of(TT(4))
    calls = []
    layer.cores[0].register_hook(lambda gradient: calls.append(tuple(gradient.shape)))
    layer.cores[0].register_post_accumulate_grad_hook(lambda core: calls.append(tuple(core.grad.shape)))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    loss = step(layer, optimizer)
    early = layer(torch.randn(2, 11, dtype=torch.float64)).sum()
    layer.truncate(2, optimizer)
    calls.clear()
    step(layer, optimizer)
    assert calls == [tuple(layer.cores[0].shape)] * 2
    assert loss.grad_fn is not None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        early.backward()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("format", [TT(4, 3), CP(4)], ids=["tt", "cp"])
def test_training_goes_on(format, make):
    layer = layer_of(format, torch.float32)
    optimizer = make(list(layer.parameters()))
    for _ in range(3):
        loss = step(layer, optimizer)
    bias_state = {key: value for key, value in optimizer.state[layer.bias].items() if key != "step"}
    layer.truncate(2, optimizer)
    state = optimizer.state[layer.bias]
    assert all(state[key] is value for key, value in bias_state.items())
    held = [core.detach().clone() for core in layer.cores]
    for _ in range(2):
        loss = step(layer, optimizer)
    assert torch.isfinite(loss)
    assert all(not torch.equal(core, old) for core, old in zip(layer.cores, held, strict=True))
    for core in layer.cores:
        state = optimizer.state[core]
        assert all(state[key].shape == core.shape for key in state if key in ("exp_avg", "momentum_buffer"))


def test_the_history_of_lbfgs_is_dropped():
    layer = layer_of(LowRank(4))
    optimizer = torch.optim.LBFGS(layer.parameters(), lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (layer.to_dense() - 1).square().mean() + layer.bias.square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    layer.truncate(2, optimizer)
    optimizer.step(closure)
    assert torch.isfinite(layer.to_dense()).all()


@pytest.mark.parametrize("format", FORMATS)
def test_no_state_is_stale(format):
    layer = layer_of(format)
    optimizer = torch.optim.Adam(layer.parameters())
    step(layer, optimizer)
    before = list(layer.network.core_shapes)
    layer.truncate(2, optimizer)
    for core, shape in zip(layer.cores, before, strict=True):
        assert (core in optimizer.state) == (tuple(core.shape) == shape)
