"""Layers as torch's own machinery uses them: autocast, checkpoints, transforms, threads, copies."""

import copy
import pickle
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import tensorlayers as tl
from tensorlayers.formats import available
from tensorlayers.testing import assert_close, check_layer
from tests.engine.support import layer_of

every_format = pytest.mark.parametrize("cls", available().values(), ids=available())


def image_layer(cls, dtype=None, **options):
    """A convolution that is no small product on 2 x 16 x 8 x 8."""
    return tl.FactorizedConv2d(16, 12, 3, padding=1, dtype=dtype, format=cls(3), **options)


KINDS = {"linear": (layer_of, (20, 64)), "conv": (image_layer, (2, 16, 8, 8))}


@pytest.fixture(params=[(kind, name) for kind in KINDS for name in sorted(available())], ids=" ".join)
def case(request):
    """A layer in float64 and an input."""
    kind, name = request.param
    build, shape = KINDS[kind]
    return build(available()[name], torch.float64), torch.randn(shape, dtype=torch.float64)


def reference(layer, x):
    """The output, and the gradients of its square, by the dense weight."""
    functions = {"FactorizedLinear": torch.nn.functional.linear, "FactorizedConv2d": torch.nn.functional.conv2d}
    options = {"padding": 1} if x.dim() == 4 else {}
    leaf = x.detach().clone().requires_grad_()
    y = functions[type(layer).__name__](leaf, layer.to_dense(), layer.bias, **options)
    return y.detach(), torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()])


def assert_gradients(layer, x, expected):
    for ours, theirs in zip([x.grad, *(p.grad for p in layer.parameters())], expected, strict=True):
        assert_close(ours, theirs, torch.float64)


def test_output_and_gradients(case):
    layer, x = case
    check_layer(layer, x)
    check_layer(layer, x.transpose(0, -1).contiguous().transpose(0, -1))


@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 0, 64), (3, 7, 64), (2, 3, 4, 64), (300, 64)], ids=str)
@every_format
def test_any_number_of_dimensions(cls, shape):
    check_layer(layer_of(cls, torch.float64), torch.randn(shape, dtype=torch.float64))


@every_format
def test_padded_features(cls):
    layer = tl.FactorizedLinear(61, 47, dtype=torch.float64, format=cls(3))
    check_layer(layer, torch.randn(30, 61, dtype=torch.float64))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints(case, reentrant):
    layer, x = case
    _, expected = reference(layer, x)
    x.requires_grad_()
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    assert_gradients(layer, x, expected)


class TestWhatIsTrained:
    def test_frozen_cores(self, case):
        layer, x = case
        _, expected = reference(layer, x)
        layer.cores.requires_grad_(False)
        x.requires_grad_()
        layer(x).square().sum().backward()
        assert_close(x.grad, expected[0], torch.float64)
        assert all(core.grad is None for core in layer.cores)
        assert layer.bias.grad is not None

    def test_the_bias_alone(self, case):
        layer, x = case
        _, expected = reference(layer, x)
        layer.cores.requires_grad_(False)
        layer(x).square().sum().backward()
        names = [name for name, _ in layer.named_parameters()]
        assert_close(layer.bias.grad, expected[1 + names.index("bias")], torch.float64)

    def test_one_core_alone(self, case):
        layer, x = case
        _, expected = reference(layer, x)
        names = [name for name, _ in layer.named_parameters()]
        for k in range(len(layer.cores)):
            layer.zero_grad()
            layer.requires_grad_(False)
            layer.cores[k].requires_grad_(True)
            layer(x).square().sum().backward()
            assert_close(layer.cores[k].grad, expected[1 + names.index(f"cores.{k}")], torch.float64)
            assert sum(p.grad is not None for p in layer.parameters()) == 1

    def test_nothing(self, case):
        layer, x = case
        assert layer.requires_grad_(False)(x).grad_fn is None

    def test_gradients_accumulate(self, case):
        layer, x = case
        _, expected = reference(layer, x)
        x.requires_grad_()
        for _ in range(2):
            layer(x).square().sum().backward()
        assert_gradients(layer, x, [2 * gradient for gradient in expected])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(case, context):
    layer, x = case
    with context():
        y = layer(x)
        assert not y.requires_grad
        assert_close(y, reference_values(layer, x), torch.float64)


def reference_values(layer, x):
    with torch.inference_mode(False):
        return reference(layer, x.clone())[0]


class TestAutocast:
    @pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
    def test_forward_and_backward(self, case, inside):
        layer, x = case
        layer, x = layer.float(), x.float().requires_grad_()
        probe = torch.randn_like(layer(x), dtype=torch.bfloat16)
        # Held to what is computed in bfloat16 without autocast.
        half = copy.deepcopy(layer).bfloat16()
        leaf = x.detach().bfloat16().requires_grad_()
        expected = torch.autograd.grad(half(leaf), [leaf, *half.parameters()], probe)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
            assert y.dtype == torch.bfloat16
            if inside:
                y.backward(probe)
        if not inside:
            y.backward(probe)
        for ours, theirs in zip([x, *layer.parameters()], expected, strict=True):
            assert ours.grad.dtype == torch.float32
            assert_close(ours.grad, theirs, torch.bfloat16)

    def test_half_precision_input(self, case):
        layer, x = case
        with torch.autocast("cpu", torch.bfloat16):
            assert layer.float()(x.bfloat16()).dtype == torch.bfloat16

    def test_switched_off_inside(self, case):
        layer, x = case
        layer, x = layer.float(), x.float()
        with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
            assert torch.equal(layer(x), layer(x))
            assert layer(x).dtype == torch.float32


@pytest.mark.parametrize("rows", [1, 20, 300])
@pytest.mark.parametrize(("given", "held"), [(torch.float32, torch.bfloat16), (torch.float64, torch.float32)], ids=str)
@every_format
def test_another_dtype_than_the_cores_is_refused_as_by_torch(cls, given, held, rows):
    x = torch.randn(rows, 64, dtype=given)
    for layer in (torch.nn.Linear(64, 48, dtype=held), layer_of(cls, held)):
        for needed in (True, False):
            with pytest.raises(RuntimeError, match=r"same dtype|expected scalar type|expected m1 and m2"):
                layer.requires_grad_(needed)(x)


class TestTransforms:
    def test_functional_call(self, case):
        layer, x = case
        others = {name: 2 * value.detach() for name, value in layer.named_parameters()}
        doubled = copy.deepcopy(layer)
        doubled.load_state_dict(others)
        assert_close(torch.func.functional_call(layer, others, (x,)), doubled(x), torch.float64)
        assert_close(layer(x), reference(layer, x)[0], torch.float64)

    def test_gradients_of_each_sample(self, case):
        layer, x = case
        parameters = {name: value.detach() for name, value in layer.named_parameters()}

        def loss(parameters, sample):
            return torch.func.functional_call(layer, parameters, (sample[None],)).square().sum()

        found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
        _, expected = reference(layer, x)
        for (name, _), theirs in zip(layer.named_parameters(), expected[1:], strict=True):
            assert found[name].shape[0] == len(x)
            assert_close(found[name].sum(0), theirs, torch.float64)

    def test_an_ensemble(self, case):
        layer, x = case
        members = [copy.deepcopy(layer) for _ in range(3)]
        for member in members:
            member.reset_parameters()
        stacked, _ = torch.func.stack_module_state(members)
        found = torch.func.vmap(torch.func.functional_call, (None, 0, None))(layer, stacked, (x,))
        for ours, member in zip(found, members, strict=True):
            assert_close(ours, member(x), torch.float64)

    def test_gradients_of_gradients(self, case):
        layer, x = case
        x.requires_grad_()
        found = []
        for apply in (layer, lambda x: dense(layer, x)):
            (penalty,) = torch.autograd.grad(apply(x).square().sum(), [x], create_graph=True)
            found.append(torch.autograd.grad(penalty.square().sum(), [x, *layer.cores]))
        for ours, theirs in zip(*found, strict=True):
            assert_close(ours, theirs, torch.float64)


def dense(layer, x):
    """The output by the dense weight, differentiable in all."""
    if x.dim() == 4:
        return torch.nn.functional.conv2d(x, layer.to_dense(), layer.bias, padding=1)
    return torch.nn.functional.linear(x, layer.to_dense(), layer.bias)


def test_threads_share_a_layer(case):
    layer, x = case
    inputs = [x * k for k in range(1, 4)]
    expected = [torch.autograd.grad(dense(layer, t).square().sum(), list(layer.parameters())) for t in inputs]
    found = {}

    def work(k):
        for _ in range(5):
            found[k] = torch.autograd.grad(layer(inputs[k]).square().sum(), list(layer.parameters()))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, theirs in enumerate(expected):
        for one, other in zip(found[k], theirs, strict=True):
            assert_close(one, other, torch.float64)


def test_copies_after_use(case):
    layer, x = case
    y = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), y)
        other.cores[0].data.zero_()
    assert torch.equal(layer(x), y)


def test_the_same_bits_every_time(case):
    layer, x = case
    layer, x = layer.float(), x.float().requires_grad_()
    runs = [torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()]) for _ in range(2)]
    assert all(map(torch.equal, *runs))


def test_a_write_to_the_output_leaves_the_input(case):
    layer, x = case
    for rows in (len(x), 1):
        part = x[:rows].clone()
        with torch.no_grad():
            layer(part).zero_()
        assert torch.equal(part, x[:rows])
    assert all(core.any() for core in layer.cores)
