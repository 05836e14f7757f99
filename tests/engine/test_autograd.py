"""The differentiable product of rows, and of windows: derivatives of every kind and order, held to plain operations."""

import pytest
import torch
from torch.autograd import forward_ad

from tensorlayers import FactorizedConv1d, autograd, convolution, decision, functional, products
from tensorlayers.formats import available
from tensorlayers.testing import assert_close
from tests.engine.support import network_of, operands

FORMATS = sorted(available())


class Rows:
    """Rows times a network: the product, and the same by plain operations."""

    def __init__(self, name, forced=None):
        self.network = network_of(available()[name], (2, 3), (2, 2), 2)
        self.spec = products.row_product(self.network, forced)
        self.x, self.cores, self.bias = operands(self.network, 3)

    def plain(self, x, bias, *cores):
        return functional.contract_rows(x, self.network, cores, bias)


class Windows:
    """A convolution with a network: the product, and the same by plain convolutions."""

    def __init__(self, name):
        layer = FactorizedConv1d(2, 3, 3, padding=1, stride=2, format=available()[name](2), dtype=torch.float64)
        self.network, self.window = layer.own_network, layer._window()
        self.spec = products.window_product(self.network, self.window)
        self.cores = [torch.randn_like(core) for core in layer.own_cores()]
        self.x, self.bias = torch.randn(2, 2, 4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)

    def plain(self, x, bias, *cores):
        plan = convolution.plan_for(self.network, self.window, 8)
        return convolution.execute(plan, x, cores, self.window, bias)


CASES = {f"{name} {kind.__name__.lower()}": (kind, name) for kind in (Rows, Windows) for name in FORMATS}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    kind, name = request.param
    return kind(name)


def product_of(case):
    def product(x, bias, *cores):
        return autograd.product(case.spec, x, cores, bias)

    return product


def leaves(case):
    return [tensor.clone().requires_grad_() for tensor in (case.x, case.bias, *case.cores)]


def assert_alike(ours, theirs):
    """Two nested sequences of tensors."""
    if isinstance(theirs, torch.Tensor):
        return assert_close(ours, theirs, torch.float64)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert_alike(one, other)
    return None


def test_first_derivatives(case):
    assert torch.autograd.gradcheck(product_of(case), leaves(case), check_forward_ad=True, check_batched_grad=True)


def test_second_derivatives(case):
    checks = {"check_fwd_over_rev": True, "check_rev_over_rev": True, "fast_mode": True}
    assert torch.autograd.gradgradcheck(product_of(case), leaves(case), **checks)


def nested(function, tensors, order):
    """All derivatives of a scalar up to an order, each of a square of the one before."""
    found, value = [], function(*tensors).square().sum()
    for _ in range(order):
        gradients = torch.autograd.grad(value, tensors, create_graph=True)
        found.append(gradients)
        value = sum(gradient.square().sum() for gradient in gradients)
    return found


def test_third_derivatives(case):
    tensors = leaves(case)
    assert_alike(nested(product_of(case), tensors, 3), nested(case.plain, tensors, 3))


@pytest.mark.parametrize("forced", decision.NAMES)
@pytest.mark.parametrize("name", FORMATS)
def test_every_implementation(name, forced):
    case = Rows(name, forced)
    tensors = leaves(case)
    assert_alike(product_of(case)(*tensors), case.plain(*tensors))
    assert_alike(nested(product_of(case), tensors, 2), nested(case.plain, tensors, 2))


def scalar(function):
    return lambda *tensors: function(*tensors).square().sum()


class TestTransforms:
    def test_gradients(self, case):
        tensors = (case.x, case.bias, *case.cores)
        every = tuple(range(len(tensors)))
        for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
            ours, theirs = (transform(scalar(f), every)(*tensors) for f in (product_of(case), case.plain))
            assert_alike(ours, theirs)

    def test_hessians(self, case):
        for argument in (0, 2):
            ours, theirs = (
                torch.func.hessian(scalar(f), argument)(case.x, case.bias, *case.cores)
                for f in (product_of(case), case.plain)
            )
            assert_alike(ours, theirs)

    def test_directional_derivatives(self, case):
        tensors = (case.x, case.bias, *case.cores)
        directions = tuple(torch.randn_like(tensor) for tensor in tensors)
        ours, theirs = (torch.func.jvp(f, tensors, directions) for f in (product_of(case), case.plain))
        assert_alike(ours, theirs)
        ours, theirs = (torch.func.vjp(f, *tensors)[1](theirs[0]) for f in (product_of(case), case.plain))
        assert_alike(ours, theirs)

    def test_gradients_of_each_sample(self, case):
        tensors = (torch.stack([case.x, 2 * case.x]), case.bias, *case.cores)
        every, dims = tuple(range(len(tensors))), (0, *(None for _ in tensors[1:]))
        ours, theirs = (
            torch.func.vmap(torch.func.grad(scalar(f), every), dims)(*tensors) for f in (product_of(case), case.plain)
        )
        assert_alike(ours, theirs)

    def test_batches_of_any_operand(self, case):
        tensors = (case.x, case.bias, *case.cores)
        for batched in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2), tuple(range(len(tensors)))):
            dims = tuple(1 if k in batched else None for k in range(len(tensors)))
            given = [torch.stack([t, -2 * t, t + 1], 1) if k in batched else t for k, t in enumerate(tensors)]
            ours, theirs = (torch.func.vmap(f, dims)(*given) for f in (product_of(case), case.plain))
            assert_alike(ours, theirs)

    def test_batches_in_batches(self, case):
        x = torch.randn(2, 3, *case.x.shape, dtype=torch.float64)
        ours, theirs = (
            torch.func.vmap(torch.func.vmap(lambda x: f(x, case.bias, *case.cores)))(x)  # noqa: B023
            for f in (product_of(case), case.plain)
        )
        assert_alike(ours, theirs)


def test_forward_mode_of_any_operand(case):
    tensors = (case.x, case.bias, *case.cores)
    for chosen in ({0}, {1}, {2}, set(range(len(tensors)))):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, torch.ones_like(t)) if k in chosen else t for k, t in enumerate(tensors)]
            ours, theirs = (forward_ad.unpack_dual(f(*duals)).tangent for f in (product_of(case), case.plain))
        assert_alike(ours, theirs)


def test_only_what_is_asked_for_is_computed(case, monkeypatch):
    asked, kind = [], type(autograd.built(case.spec))
    original = kind.gradients

    def watched(self, dy, x, cores, needs):
        asked.append(tuple(needs))
        return original(self, dy, x, cores, needs)

    monkeypatch.setattr(kind, "gradients", watched)
    tensors = leaves(case)
    expected = torch.autograd.grad(case.plain(*tensors).square().sum(), tensors)
    for k, tensor in enumerate(tensors):
        asked.clear()
        given = [t if t is tensor else t.detach() for t in tensors]
        y = product_of(case)(*given)
        assert_alike(torch.autograd.grad(y.square().sum(), [tensor]), [expected[k]])
        others = [place == k for place in range(len(tensors)) if place != 1]
        assert asked == ([tuple(others)] if k != 1 else [])


def test_nothing_that_needs_a_gradient_records_nothing(case):
    tensors = leaves(case)
    detached = [tensor.detach() for tensor in tensors]
    assert product_of(case)(*detached).grad_fn is None
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            y = product_of(case)(*tensors)
        assert not y.requires_grad
        assert_alike(y, case.plain(*detached))


def test_a_gradient_twice(case):
    tensors = leaves(case)
    y = product_of(case)(*tensors).square().sum()
    first = torch.autograd.grad(y, tensors, retain_graph=True)
    assert_alike(torch.autograd.grad(y, tensors), first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, tensors)


def test_a_write_to_what_is_saved_is_seen(case):
    for k in (0, 2):
        tensors = leaves(case)
        y = product_of(case)(*tensors).square().sum()
        with torch.no_grad():
            tensors[k].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(y, tensors)


def test_a_write_to_the_result_reaches_nothing_else(case):
    tensors = leaves(case)
    before = [tensor.detach().clone() for tensor in tensors]
    y = product_of(case)(*tensors)
    y.mul_(3).add_(1)
    assert_alike([tensor.detach() for tensor in tensors], before)
    assert_alike(
        torch.autograd.grad(y.square().sum(), tensors),
        torch.autograd.grad((3 * case.plain(*tensors) + 1).square().sum(), tensors),
    )


def test_no_rows(case):
    tensors = [tensor.requires_grad_() for tensor in (case.x[:0].clone(), case.bias, *case.cores)]
    y = product_of(case)(*tensors)
    assert y.shape == (0, *case.plain(*leaves(case)).shape[1:])
    assert all(not g.any() for g in torch.autograd.grad(y.sum(), tensors))
    with torch.no_grad():
        assert product_of(case)(*tensors).shape == y.shape


@pytest.mark.parametrize("kind", [Rows, Windows])
def test_the_operators_are_what_torch_demands_of_one(kind):
    case = kind("tt")
    x, bias, *cores = leaves(case)
    schema, fake = "test_schema", "test_faketensor"
    checks = {"test_utils": (schema, fake, "test_aot_dispatch_static", "test_aot_dispatch_dynamic")}
    detached = [t.detach() for t in (x, bias, *cores)]
    torch.library.opcheck(torch.ops.tensorlayers.product, (detached[0], detached[2:], detached[1], case.spec), **checks)
    dy = case.plain(*detached)
    for needs in ([True] * (1 + len(cores)), [False, True, *[False] * (len(cores) - 1)]):
        args = (dy, detached[0], detached[2:], case.spec, needs)
        torch.library.opcheck(torch.ops.tensorlayers.gradients, args, **checks)


def test_what_is_described_is_built_again(case):
    assert autograd.built(case.spec).network == case.network
    assert autograd.built(case.spec) is autograd.built(str(case.spec))
