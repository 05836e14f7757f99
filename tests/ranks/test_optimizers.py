"""truncate under an optimizer: no state is stale, hooks and graphs that are alive, training goes on."""

import copy

import pytest
import torch

from tensorlayers import CP, TT, FactorizedLinear, LowRank
from tensorlayers.testing import assert_close
from tests.ranks.support import FORMATS, OPTIMIZERS, is_tree, layer_of, step


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
    optimizer = torch.optim.Adam(layer.parameters(), amsgrad=True)
    step(layer, optimizer)
    before = {k: dict(optimizer.state[core]) for k, core in enumerate(layer.cores)}
    shapes = layer.network.core_shapes
    layer.truncate(2, optimizer)
    for k, (core, shape) in enumerate(zip(layer.cores, shapes, strict=True)):
        state = optimizer.state[core]
        assert state["step"] is before[k]["step"]
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert state[key].shape == core.shape
            assert (state[key] is before[k][key]) == (core.shape == shape)
            assert key == "exp_avg" or bool((state[key] >= 0).all())


def linear_loss(layer, direction):
    return (layer.to_dense() * direction).sum()


def moments_after(layer, direction, ranks):
    """The first moments of an optimizer that had seen one gradient, once ranks were lowered; and the gradients then."""
    optimizer = torch.optim.Adam(layer.cores, lr=0.0, betas=(0.0, 0.0))
    linear_loss(layer, direction).backward()
    optimizer.step()
    layer.truncate(ranks, optimizer)
    gradients = torch.autograd.grad(linear_loss(layer, direction), list(layer.cores))
    return [optimizer.state[core]["exp_avg"] for core in layer.cores], gradients


@pytest.mark.parametrize("format", [param for param in FORMATS if is_tree(layer_of(param.values[0]).network)])
def test_a_first_moment_is_that_of_the_smaller_cores(format):
    layer = layer_of(format, bias=False)
    direction = torch.randn(13, 11, dtype=torch.float64)
    for bond, rank in zip(layer.network.bonds, layer.network.ranks, strict=True):
        one = copy.deepcopy(layer)
        ranks = [max(rank - 1, 1) if name == bond else size for name, size in zip(one.network.bonds, one.network.ranks)]
        carriers = [bond in names for names in one.network.cores]
        got, wanted = moments_after(one, direction, tuple(ranks))
        for is_carrier, moment, gradient in zip(carriers, got, wanted, strict=True):
            if is_carrier and rank > 1:
                assert_close(moment, gradient, torch.float64)


@pytest.mark.parametrize("format", FORMATS)
def test_first_moments_are_nearly_so_where_all_bonds_are_lowered(format):
    layer = layer_of(format, bias=False)
    with torch.no_grad():  # values of very different weight, as training leaves them
        for names, core in zip(layer.network.cores, layer.cores, strict=True):
            for bond in set(names) & set(layer.network.bonds):
                shape = [-1 if name == bond else 1 for name in names]
                core.mul_(torch.logspace(0, -1, layer.network.size[bond], dtype=torch.float64).reshape(shape))
    got, wanted = moments_after(layer, torch.randn(13, 11, dtype=torch.float64), 3)
    for moment, gradient in zip(got, wanted, strict=True):
        cosine = (moment * gradient).sum() / (moment.norm() * gradient.norm())
        assert cosine > 0.99
        assert 0.9 < moment.norm() / gradient.norm() < 1.1


def test_a_component_that_vanishes_leaves_no_huge_moments():
    layer = layer_of(CP(4), bias=False)
    with torch.no_grad():
        for core in layer.cores:
            core[:, 1:] *= 1e-6
    optimizer = torch.optim.Adam(layer.cores, lr=0.0)
    step(layer, optimizer)
    largest = max(float(optimizer.state[core]["exp_avg"].abs().max()) for core in layer.cores)
    layer.truncate(3, optimizer)
    for core in layer.cores:
        assert float(optimizer.state.get(core, {}).get("exp_avg", torch.zeros(1)).abs().max()) < 1e4 * largest


def test_second_moments_are_mixed_by_squares():
    layer = FactorizedLinear(6, 5, bias=False, dtype=torch.float64, format=LowRank(4))
    optimizer = torch.optim.RMSprop(layer.cores, lr=0.0)
    linear_loss(layer, torch.randn(5, 6, dtype=torch.float64)).backward()
    optimizer.step()
    u, v = (core.detach().clone() for core in layer.cores)
    squares = [optimizer.state[core]["square_avg"] for core in layer.cores]
    layer.truncate(2, optimizer)
    # What the left core was multiplied with, the gradient of the right one is.
    left, right = (
        torch.linalg.lstsq(u, layer.cores[0].detach())[0],
        torch.linalg.lstsq(v.T, layer.cores[1].detach().T)[0],
    )
    assert_close(optimizer.state[layer.cores[0]]["square_avg"], squares[0] @ right.square(), torch.float64)
    assert_close(optimizer.state[layer.cores[1]]["square_avg"], left.square().T @ squares[1], torch.float64)


def test_state_of_a_kind_that_is_not_known_starts_anew():
    layer = layer_of(LowRank(4))
    optimizer = torch.optim.Adadelta(layer.parameters())
    step(layer, optimizer)
    layer.truncate(2, optimizer)
    assert all(core not in optimizer.state for core in layer.cores)
    assert layer.bias in optimizer.state
    step(layer, optimizer)
