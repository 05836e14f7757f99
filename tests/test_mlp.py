"""FactorizedMLP against dense layers in float64, and what it saves."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tensorlayers as tl
from tensorlayers import ConversionError, NetworkError
from tensorlayers.formats import available

FUNCTIONS = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "reglu": F.relu,
}


def dense(mlp, x, parameters):
    """The product with dense weights."""

    def linear(name, x):
        layer = getattr(mlp, name)
        cores = [parameters[f"{name}.cores.{k}"] for k in range(len(layer.cores))]
        bias = parameters.get(f"{name}.bias")
        y = tl.functional.contract_rows(x.flatten(0, -2), layer.network, cores)
        y = y.unflatten(0, x.shape[:-1])[..., : layer.out_features]
        return y if bias is None else y + bias

    act = FUNCTIONS[mlp.activation]
    hidden = act(linear("gate", x)) * linear("up", x) if mlp.is_gated else act(linear("up", x))
    return linear("down", hidden)


def reference(mlp, x):
    """The result in float64, and the leaves that it is differentiated by: x, then the parameters by name."""
    leaves = {name: p.detach().double().requires_grad_() for name, p in mlp.named_parameters()}
    rows = x.detach().double().requires_grad_()
    return dense(mlp, rows, leaves), {"x": rows, **leaves}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_forward_and_gradients(activation, bias):
    mlp = tl.FactorizedMLP(12, 30, 10, activation=activation, bias=bias, dtype=torch.float64)
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    expected, leaves = reference(mlp, x)
    y = mlp(x)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    exact = torch.autograd.grad(expected, list(leaves.values()), dy)
    found = torch.autograd.grad(y, [x, *mlp.parameters()], dy)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), expected.detach())


@pytest.mark.parametrize("cls", available().values(), ids=available())
def test_of_every_format(cls):
    mlp = tl.FactorizedMLP(24, 48, activation="swiglu", format=cls(2), dtype=torch.float64)
    x = torch.randn(5, 24, dtype=torch.float64)
    torch.testing.assert_close(mlp(x), reference(mlp, x)[0].detach(), check_dtype=True)


@pytest.mark.parametrize("activation", ["gelu", "relu", "swiglu"])
def test_saved_for_backward_is_x_alone(activation):
    """Of sizes at which a plain chain would not run: what is held after forward is the input and the parameters."""
    mlp = tl.FactorizedMLP(256, 512, activation=activation, format=tl.LowRank(32))
    x = torch.randn(256, 256, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = mlp(x)
    known = {t.untyped_storage().data_ptr() for t in (x, *mlp.parameters())}
    assert all(t.untyped_storage().data_ptr() in known for t in saved)
    y.sum().backward()


def test_the_last_product_is_not_computed_again(monkeypatch):
    mlp = tl.FactorizedMLP(256, 512, format=tl.LowRank(32))
    x = torch.randn(256, 256, requires_grad=True)
    features = []
    forward = tl.products.RowProduct.forward
    monkeypatch.setattr(
        tl.products.RowProduct,
        "forward",
        lambda self, x, *rest: features.append(self.network.features("out")) or forward(self, x, *rest),
    )
    y = mlp(x)
    assert features == [512, 256]
    y.sum().backward()
    assert features == [512, 256, 512]


def test_twice_differentiable_and_twice_used():
    mlp = tl.FactorizedMLP(6, 10, format=tl.TT(2), dtype=torch.float64)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(mlp, (x,))
    y = mlp(x).sum()
    first = torch.autograd.grad(y, x, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(y, x)[0], first)


def test_under_torch_func():
    mlp = tl.FactorizedMLP(6, 10, format=tl.TT(2), dtype=torch.float64)
    x = torch.randn(6, dtype=torch.float64)
    expected = torch.autograd.functional.jacobian(mlp, x)
    torch.testing.assert_close(torch.func.jacrev(mlp)(x), expected)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_compiled(activation):
    mlp = tl.FactorizedMLP(64, 128, activation=activation, format=tl.LowRank(8))
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (50, 70):
        x = torch.randn(rows, 64, requires_grad=True)
        y, expected = compiled(x), mlp(x)
        torch.testing.assert_close(y, expected)
        found, exact = (torch.autograd.grad(t.square().sum(), (x, *mlp.parameters())) for t in (y, expected))
        for one, other in zip(found, exact, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_autocast_and_dropout_are_followed_again():
    mlp = tl.FactorizedMLP(256, 512, format=tl.LowRank(32))
    x = torch.randn(256, 256, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = mlp(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    tl.rank_dropout(mlp, 0.5)
    plain = copy.deepcopy(mlp)
    plain.forward = plain._plain
    found = []
    for one in (mlp, plain):
        torch.manual_seed(1)
        found.append(torch.autograd.grad(one(x).square().sum(), list(one.parameters())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_what_layers_draw_is_drawn_again():
    up, down = nn.Sequential(nn.Linear(16, 64), nn.Dropout(0.5)), nn.Linear(64, 16)
    hooked = nn.Linear(16, 64)
    hooked.register_forward_hook(lambda module, args, output: F.dropout(output, 0.5))
    x = torch.randn(8, 16)
    for first in (up, hooked):
        mlp = tl.FactorizedMLP.from_layers(first, down)
        found = []
        for forward in (mlp, mlp._plain):
            torch.manual_seed(1)
            found.append(torch.autograd.grad(forward(x).square().sum(), list(mlp.parameters())))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other)
    assert not tl.FactorizedMLP(16, 64)._may_draw()  # whose forward a CUDA graph can capture


class _Scaled(tl.FactorizedLinear):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, input):
        return super().forward(input) * self.scale


def followed(kind):
    """An MLP whose last layer does more than its product: the layer after it saves that product."""
    up, down = (tl.FactorizedLinear(*sizes, format=tl.TT(3)) for sizes in ((16, 24), (24, 16)))
    if kind == "normed":
        down = nn.Sequential(down, nn.LayerNorm(16))
    elif kind == "activated":
        down = nn.Sequential(down, nn.GELU())
    elif kind == "subclass":
        up, down = _Scaled(16, 24, format=tl.TT(3)), _Scaled(24, 16, format=tl.TT(3))
    elif kind == "hooked":
        scale = nn.Parameter(torch.tensor(2.0))
        down.register_parameter("scale", scale)
        down.register_forward_hook(lambda module, args, output: output * scale)
    elif kind == "patched":
        for layer in (up, down):
            layer.forward = lambda input, forward=layer.forward: forward(input).sin()
    return tl.FactorizedMLP.from_layers(up, down)


@pytest.mark.parametrize("kind", ["normed", "activated", "subclass", "hooked", "patched"])
def test_layers_that_do_more_than_a_product(kind):
    mlp, x = followed(kind), torch.randn(8, 16, requires_grad=True)
    leaves = [x, *mlp.parameters()]
    found = torch.autograd.grad(mlp(x).square().sum(), leaves)
    for one, other in zip(found, torch.autograd.grad(mlp._plain(x).square().sum(), leaves), strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), mlp._plain(x))


def test_of_layers_that_there_are():
    up, down = nn.Linear(8, 12), tl.FactorizedLinear(12, 8)
    mlp = tl.FactorizedMLP.from_layers(up, down, activation="relu")
    x = torch.randn(3, 8, requires_grad=True)
    torch.testing.assert_close(mlp(x), down(F.relu(up(x))))
    mlp(x).sum().backward()
    assert up.weight.grad is not None
    with pytest.raises(ConversionError, match="gate: a layer where the activation has one"):
        tl.FactorizedMLP.from_layers(up, down, activation="swiglu")
    with pytest.raises(ConversionError, match="gate"):
        tl.FactorizedMLP.from_layers(up, down, up, activation="relu")
    with pytest.raises(ConversionError, match="up: as many out_features as down has in_features, 12; got 8"):
        tl.FactorizedMLP.from_layers(nn.Linear(8, 8), down)
    with pytest.raises(ConversionError, match="down: a layer; got None"):
        tl.FactorizedMLP.from_layers(up, None)
    with pytest.raises(NetworkError, match="hidden_features: at least 1; got 0"):
        tl.FactorizedMLP(8, 0)


@pytest.mark.parametrize("name", ["none", "tanh", "", None])
def test_the_activation_is_known(name):
    with pytest.raises(NetworkError, match="activation: one "):
        tl.FactorizedMLP(4, 8, activation=name)


def test_hooks_on_a_layer_are_called():
    mlp = tl.FactorizedMLP(8, 12)
    seen = []
    mlp.up.register_forward_hook(lambda *args: seen.append(1))
    with torch.no_grad():
        mlp(torch.randn(2, 8))
    assert seen
