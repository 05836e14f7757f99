"""What tests of factorized layers are made of: one table of tolerances, and the truth they are held against.

The truth is the dense layer in float64. `check_format` is a conformance suite: a new format inherits it.
"""

from __future__ import annotations

import copy
import math
import string
from collections.abc import Callable, Sequence

import numpy
import torch
from torch import Tensor

from . import contraction
from .formats import Format
from .layers import FactorizedLayer, FactorizedLinear
from .network import Network, modes_by_axis

TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}
"""Relative RMS error allowed, by the dtype that was computed in."""

EXACT = 1e-5
"""Relative error allowed of a float32 decomposition at full rank."""

INITIAL_STD = 0.01
"""Relative error allowed of the standard deviation of a drawn dense weight."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``||actual - expected|| / ||expected||`` in float64; the plain norm where the expected one is 0."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shapes: {tuple(actual.shape)} and {tuple(expected.shape)}")
    actual, expected = actual.detach().double(), expected.detach().double()
    norm = float(expected.norm())
    return float((actual - expected).norm()) / (norm or 1.0)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "", scale: float = 0.0) -> None:
    """Assert that two tensors agree to the tolerance of a dtype.

    Parameters
    ----------
    actual, expected : Tensor
    dtype : torch.dtype
        The one that was computed in.
    what : str
        For the message.
    scale : float
        The norm that the error is relative to, where it is larger than that of `expected`: where terms cancel,
        their size bounds the rounding error, not that of their sum.
    """
    actual, expected = actual.detach().double(), expected.detach().double()
    error = float((actual - expected).norm()) / (max(float(expected.norm()), scale) or 1.0)
    # Written so that NaN fails.
    if not (actual.shape == expected.shape and error <= TOLERANCE[dtype]):
        raise AssertionError(f"{what or 'tensor'}: relative error {error:.2e}, allowed {TOLERANCE[dtype]:.0e}")


def dense_by_hand(network: Network, cores: Sequence[Tensor]) -> Tensor:
    """The dense tensor in float64 by one NumPy einsum over all cores, independent of any plan of ours."""
    letters = dict(zip((index for index, _ in network.sizes), string.ascii_letters, strict=False))
    terms = ",".join("".join(letters[index] for index in names) for names in network.cores)
    output = "".join(letters[mode.name] for mode in network.modes)
    arrays = [core.detach().double().cpu().numpy() for core in cores]
    return torch.from_numpy(numpy.einsum(f"{terms}->{output}", *arrays, optimize="greedy"))


def check_linear(layer: FactorizedLinear, rows: int = 5) -> None:
    """`check_layer` of a linear layer, on random rows."""
    check_layer(layer, torch.randn(rows, layer.in_features, dtype=layer.cores[0].dtype, device=layer.cores[0].device))


def check_layer(layer: FactorizedLayer, x: Tensor) -> None:
    """Compare a layer's output and every gradient with those of torch's own layer in float64.

    Parameters
    ----------
    layer : FactorizedLayer
        In the dtype that is tested.
    x : Tensor
        A floating-point input; its gradient is compared too.
    """
    dtype = layer.cores[0].dtype
    x = x.detach().requires_grad_()
    y = layer(x)
    assert y.dtype == dtype
    probe = torch.randn_like(y)
    actual = [y, *torch.autograd.grad(y, [x, *layer.parameters()], probe)]
    expected = _dense_truth(layer, x, probe, torch.clone)
    sizes = _dense_truth(layer, x, probe, torch.abs)
    names = ["output", "gradient of input", *(f"gradient of {name}" for name, _ in layer.named_parameters())]
    for name, ours, truth, size in zip(names, actual, expected, sizes, strict=True):
        assert_close(ours, truth, dtype, name, scale=float(size.detach().norm()))


def _dense_truth(
    layer: FactorizedLayer, x: Tensor, probe: Tensor, on: Callable[[Tensor], Tensor]
) -> tuple[Tensor, ...]:
    """Output and gradients of the dense layer in float64, `on` applied to all that goes in (abs: the terms' size)."""
    wide = copy.deepcopy(layer).double()
    with torch.no_grad():
        for parameter in wide.parameters():
            parameter.copy_(on(parameter))
    x = on(x.detach().double()).requires_grad_()
    own = wide.own_network
    modes = [math.prod(mode.size for mode in modes) for modes in modes_by_axis(wide.axes, own)]
    weight = contraction.to_dense(own, wide.own_cores()).reshape(modes)[tuple(slice(a.size) for a in wide.axes)]
    values = {"weight": wide.from_axes(weight, wide.settings_of(wide)), "bias": wide.bias}
    dense = wide.to_module()
    y = torch.func.functional_call(dense, {name: value for name, value in values.items() if value is not None}, (x,))
    return y, *torch.autograd.grad(y, [x, *wide.parameters()], on(probe.double()))


def check_format(format: Format, out_features: int, in_features: int, dtype: torch.dtype = torch.float32) -> None:
    """Hold a format to what every format promises.

    The dense weight equals the product of the cores by hand; output and gradients equal the dense layer's; a drawn
    weight has nn.Linear's standard deviation; a decomposition states its true error, and is balanced.

    Parameters
    ----------
    format : Format
    out_features, in_features : int
    dtype : torch.dtype
    """
    layer = FactorizedLinear(in_features, out_features, dtype=dtype, format=format)
    network = layer.network
    assert tuple(tuple(core.shape) for core in layer.cores) == network.core_shapes
    by_hand = dense_by_hand(network, list(layer.cores)).reshape(network.features("out"), network.features("in"))
    assert_close(layer.to_dense(), by_hand[:out_features, :in_features], dtype, "dense weight")
    check_linear(layer)
    if out_features * in_features > 1 and dtype in (torch.float32, torch.float64):
        std = float(layer.to_dense().detach().double().std()) * math.sqrt(3 * in_features)
        assert abs(std - 1) <= INITIAL_STD, f"initial standard deviation is {std} of nn.Linear's"

    weight = torch.randn(out_features, in_features, dtype=dtype)
    decomposition = format.decompose(weight)
    assert decomposition.network == network
    assert all(core.dtype == dtype for core in decomposition.cores)
    rebuilt = dense_by_hand(network, decomposition.cores).reshape(by_hand.shape)[:out_features, :in_features]
    error = relative_error(rebuilt, weight)
    assert abs(error - decomposition.error) <= TOLERANCE[dtype], (error, decomposition.error)
    norms = [float(core.double().norm()) for core in decomposition.cores]
    assert max(norms) <= 1.5 * min(norms), f"cores are unbalanced: norms {norms}"
