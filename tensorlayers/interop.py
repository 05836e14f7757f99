"""Interchange with TensorLy-Torch (tltorch): its layers become ours with the same weight, and its states are read.

Nothing is decomposed: the factors are copied, their axes permuted. What has no place of its own here is multiplied into
a neighbour in float64: CP's weights, the factor of a mode that our format leaves whole, ranks beyond the largest useful
one. tltorch itself is never imported: its layers are recognised by their names.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConversionError, TensorlayersError
from .factors import Weight, fitted, named_cores
from .formats import CP, TT, Format, ModeProducts, Tucker
from .layers import (
    FactorizedConv1d,
    FactorizedConv2d,
    FactorizedConv3d,
    FactorizedEmbedding,
    FactorizedLayer,
    FactorizedLinear,
    Settings,
    TensorContraction,
    TensorRegression,
)
from .surgery import swap

_CONVOLUTIONS: dict[int, type[FactorizedLayer]] = {1: FactorizedConv1d, 2: FactorizedConv2d, 3: FactorizedConv3d}


def from_tltorch(module: nn.Module) -> nn.Module:
    """The layers of TensorLy-Torch in a model, or one such layer, as ours, with the same weights.

    Parameters
    ----------
    module : nn.Module
        A FactorizedLinear, FactorizedConv, FactorizedEmbedding, TRL or TCL of tltorch 0.5; or a model with such layers.
        Never changed. A tltorch tensor that a module of another kind holds is left as it is.

    Returns
    -------
    nn.Module
        A copy with those layers replaced, by `FactorizedLinear`, `FactorizedConv1d` to ``3d``, `FactorizedEmbedding`,
        `TensorRegression` and `TensorContraction`; device, dtype, training mode, requires_grad, hooks and tensor
        dropout are kept. CP and Tucker become `CP` and `Tucker`; BlockTT, and a convolution's TT, become `TT`; a
        weight that is dense there (Dense; a BlockTT of one core) becomes the dense layer. Layers that are parametrized
        jointly (``n_layers``) stay so: each ``main[k]`` becomes a layer that shares its cores with the others, and
        `main` itself an nn.ModuleList of these.

    Raises
    ------
    ConversionError
        If there is no tltorch layer, or one has no counterpart: complex weights, a joint layer that the model calls
        with an index, the tensor train of a TRL over more than one in and one out dimension, parameters that two layers
        share. The layer is named.

    Notes
    -----
    Weights equal tltorch's to rounding, and bit by bit where factors are only permuted. Ranks beyond the largest useful
    one are removed without loss. Outputs equal tltorch's where its forward is right; with an asymmetric stride, for
    instance, it is not, and the new layer computes what torch's own would with this weight. How tltorch computes
    (``implementation``, ``checkpointing``) is not taken over.

    Examples
    --------
    ::

        theirs = tltorch.FactorizedLinear((4, 4), (2, 8), factorization="cp", rank=3)
        ours = from_tltorch(theirs)  # FactorizedLinear(16, 16, format=CP(3, in_modes=(4, 4), out_modes=(2, 8)))
    """
    layers = {id(m): (name, m, kind) for name, m in module.named_modules() if (kind := _kind(m, name))}
    if not layers:
        raise ConversionError(f"from_tltorch: a layer of tltorch, or a model that has one; got {type(module).__name__}")
    mains = {key: _main(m) for key, (_, m, kind) in layers.items() if kind in _PARTS}
    owners = dict.fromkeys((id(parameter) for parameter in _outside(module, set(layers))), "another module")
    built: dict[int, list[nn.Module]] = {}
    replacements: dict[int, tuple[nn.Module, nn.Module]] = {}
    for key, (name, m, kind) in layers.items():
        if key in mains:
            continue
        where = f"layer {name!r}: " if name else ""
        for parameter in m.parameters():
            other = owners.setdefault(id(parameter), repr(name))
            if other != repr(name):
                raise ConversionError(f"{where}a layer with parameters of its own; it shares them with {other}")
        try:
            count = _count(m)
            built[key] = _replacements(m, kind, count)
        except TensorlayersError as error:
            raise ConversionError(f"{where}{error}") from None
        if count > 1 and m is not module and not any(main is m for main in mains.values()):
            raise ConversionError(f"{where}of {count} joint layers a model uses each as main[k]; this one uses none so")
        replacements[key] = m, nn.ModuleList(built[key]).train(m.training) if count > 1 else built[key][0]
    for key, main in mains.items():
        name, part, _ = layers[key]
        if not isinstance(part.indices, int):
            raise ConversionError(f"layer {name!r}: one of the joint layers; got {part.indices}")
        replacements[key] = part, built[id(main)][part.indices]
    return swap(module, replacements, inplace=False)


def load_tltorch_state(layer: FactorizedLayer, state_dict: Mapping[str, Tensor], prefix: str = "") -> None:
    """Read the state_dict of a tltorch layer into a layer of the fitting format.

    Parameters
    ----------
    layer : FactorizedLayer
        Of the kind and format that `from_tltorch` would give: `CP`, `Tucker`, or `TT` for BlockTT, with its modes and
        ranks (ranks beyond the largest useful one count as that). For a joint tltorch layer: one that was built with
        `stack`.
    state_dict : mapping
        Keys ``weight.factors.factor_0``, ``weight.core``, ``weight.weights``, ``bias``; of a TCL ``factor_0``. Factors
        are taken in the order of their numbers, which is not that of a transducted convolution: see `from_tltorch`.
    prefix : str
        What the layer's keys begin with, for instance ``"encoder.fc1."``; other keys are ignored.

    Raises
    ------
    ConversionError
        If a tensor is missing, left over, or does not fit the layer; the layer is then unchanged.
    """
    state = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    weight = Weight({name: state.pop(f"weight.{name}", None) for name in ("core", "weights")})
    stem = "factor_" if isinstance(layer, TensorContraction) else "weight.factors.factor_"
    numbers = sorted(int(name[len(stem) :]) for name in state if name.startswith(stem) and name[len(stem) :].isdigit())
    weight.factors.extend(state.pop(f"{stem}{number}") for number in numbers)
    bias = state.pop("bias", None)
    if state:
        raise ConversionError(f"state: factors, core, weights and bias; got {prefix + min(state)!r}")
    if not numbers:
        raise ConversionError(f"state: a factorized weight, {prefix + stem}0 and so on; got none")
    if (bias is None) != (layer.bias is None):
        raise ConversionError(f"bias: the layer has {'none' if layer.bias is None else 'one'}, unlike the state")
    if bias is not None and layer.stack is not None:
        bias = bias[layer.stack[1]]
    _load(layer, weight, bias)


# -- tltorch's side ----------------------------------------------------------------------------------------------------

_LAYERS = ("FactorizedLinear", "FactorizedConv", "FactorizedEmbedding", "TRL", "TCL")
_PARTS = {
    "SubFactorizedLinear": "main_linear",
    "SubFactorizedConv": "main_conv",
    "SubFactorizedEmbedding": "main_layer",
}


def _kind(module: nn.Module, name: str) -> str:
    """The name of the tltorch layer that a module is; empty for any other module."""
    for cls in type(module).__mro__:
        if cls.__module__.split(".")[0] == "tltorch" and cls.__name__ in (*_LAYERS, *_PARTS):
            if type(module).forward is not cls.__dict__["forward"]:
                raise ConversionError(f"layer {name!r}: {type(module).__name__} replaces the forward of {cls.__name__}")
            return cls.__name__
    return ""


def _outside(module: nn.Module, layers: set[int]) -> Iterator[nn.Parameter]:
    """The parameters that a model has elsewhere than in these layers."""
    if id(module) not in layers:
        yield from (parameter for parameter in module._parameters.values() if parameter is not None)
        for child in module.children():
            yield from _outside(child, layers)


def _main(part: nn.Module) -> Any:
    return getattr(part, next(_PARTS[cls.__name__] for cls in type(part).__mro__ if cls.__name__ in _PARTS))


def _count(module: Any) -> int:
    count = getattr(module, "n_layers", 1)
    if not isinstance(count, int):
        raise ConversionError(f"n_layers {count}: joint layers are numbered by one integer")
    return count


def _weight_of(module: Any, kind: str) -> Weight:
    if kind == "TCL":
        return Weight(factors=list(module.factors))
    held = module.weight
    if any(cls.__name__ == "ComplexHandler" for cls in type(held).__mro__):
        raise ConversionError(f"weight: real numbers; got {type(held).__name__}")
    for hook in held._forward_hooks.values():
        if "Lasso" in type(hook).__name__:
            warnings.warn(f"{type(hook).__name__} of a {kind} is not carried over", stacklevel=4)
    named = {name: getattr(held, name, None) for name in ("tensor", "core", "weights")}
    known = Weight(named, list(getattr(held, "factors", ())))
    if not known.factors and known.named["tensor"] is None:
        raise ConversionError(f"weight: CP, Tucker, TT, BlockTT or Dense; got {type(held).__name__}")
    return known


def _replacements(module: Any, kind: str, count: int) -> list[nn.Module]:
    """Our layers for a tltorch layer, one for each that it parametrizes."""
    weight = _weight_of(module, kind)
    ours, settings, modes = _READERS[kind](module)
    biases = [_bias_of(module, kind, position, count) for position in range(count)]
    settings = [
        ours.read_settings({**items, "bias": bias is not None} if "bias" in items else items)
        for items, bias in zip(settings, biases, strict=True)
    ]
    dense = weight.structure == "dense" or (weight.structure == "block train" and len(weight.factors) == 1)
    shared = not dense and weight.structure != "block train"  # joint BlockTT layers have no tensor in common
    format = None
    layers: list[nn.Module] = []
    for position, (items, bias) in enumerate(zip(settings, biases, strict=True)):
        own = weight if shared or count == 1 else _slice(weight, position)
        if dense:
            layers.append(_dense(ours, items, own, bias))
        else:
            stack = (count, position) if shared and count > 1 else None
            format = format or _format(ours, items, own, modes, stack and count)
            layer = ours(**items, device="meta", dtype=own.factors[0].dtype, format=format, stack=stack)
            layer.to_empty(device=own.factors[0].device)
            if stack and position:
                layer.cores = layers[0].cores  # type: ignore[assignment]
            learned = _load(layer, own, bias)
            for core, requires_grad in zip(layer.cores, learned, strict=True):
                core.requires_grad_(requires_grad)
            if layer.bias is not None and bias is not None:
                layer.bias.requires_grad_(bias.requires_grad)
            layer.rank_dropout = _dropout(module)
            layers.append(layer)
        layers[-1].train(module.training)
    return layers


def _bias_of(module: Any, kind: str, position: int, count: int) -> Tensor | None:
    bias: Tensor | None = getattr(module, "bias", None)
    if bias is None or count == 1:
        return bias
    # Of joint convolutions each says whether it has one; joint linear layers use it in any case.
    return bias[position] if kind != "FactorizedConv" or bool(module.has_bias[position]) else None


def _dropout(module: Any) -> float:
    """The probability of its tensor dropout."""
    hooks = getattr(getattr(module, "weight", None), "_forward_hooks", {}).values()
    return max((float(hook.proba) for hook in hooks if hasattr(hook, "proba")), default=0.0)


def _slice(weight: Weight, position: int) -> Weight:
    """One of several joint layers: of a dense weight, or of BlockTT, whose every factor has them as second axis."""
    if weight.structure == "dense":
        return Weight({"tensor": weight.tensor("tensor")[position]})
    return Weight(factors=[factor[:, position] for factor in weight.factors])


Reading = tuple[type[FactorizedLayer], list[Settings], dict[str, tuple[int, ...]]]


def _sizes(entry: Any) -> tuple[int, ...]:
    return (int(entry),) if isinstance(entry, int) else tuple(int(size) for size in entry)


def _read_linear(module: Any) -> Reading:
    out, into = (_sizes(entry) for entry in module.weight.tensorized_shape[-2:])
    settings = {"in_features": math.prod(into), "out_features": math.prod(out), "bias": True}
    return FactorizedLinear, [settings] * _count(module), {"in_modes": into, "out_modes": out}


def _read_embedding(module: Any) -> Reading:
    rows, columns = (_sizes(entry) for entry in module.weight.tensorized_shape[-2:])
    settings = {"num_embeddings": int(module.num_embeddings), "embedding_dim": int(module.embedding_dim)}
    return FactorizedEmbedding, [settings] * _count(module), {"in_modes": rows, "out_modes": columns}


def _read_conv(module: Any) -> Reading:
    count, order = _count(module), int(module.order)
    if order not in _CONVOLUTIONS:
        raise ConversionError(f"order {order}: a convolution over 1, 2 or 3 dimensions")
    settings: list[Settings] = []
    for position in range(count):
        items: Settings = {"in_channels": int(module.in_channels), "out_channels": int(module.out_channels)}
        items["kernel_size"] = tuple(int(size) for size in module.kernel_size)
        for name in ("stride", "padding", "dilation"):
            values = getattr(module, name)
            items[name] = tuple(int(size) for size in (values if count == 1 else values[position]))
        settings.append({**items, "bias": True})
    return _CONVOLUTIONS[order], settings, {}


def _read_regression(module: Any) -> Reading:
    shapes = {"in_shape": _sizes(module.input_shape), "out_shape": _sizes(module.output_shape)}
    if len(module.weight.shape) != sum(map(len, shapes.values())):
        raise ConversionError("n_layers: a TRL uses all of its weight at once; several joint ones have no forward")
    return TensorRegression, [{**shapes, "bias": True}], {}


def _read_contraction(module: Any) -> Reading:
    shapes = {"in_shape": _sizes(module.input_shape), "out_shape": _sizes(module.rank)}
    return TensorContraction, [{**shapes, "bias": True}], {}


_READERS: dict[str, Callable[[Any], Reading]] = {
    "FactorizedLinear": _read_linear,
    "FactorizedEmbedding": _read_embedding,
    "FactorizedConv": _read_conv,
    "TRL": _read_regression,
    "TCL": _read_contraction,
}


# -- from theirs to ours -----------------------------------------------------------------------------------------------


def _format(
    layer: type[FactorizedLayer],
    settings: Settings,
    weight: Weight,
    modes: Mapping[str, Any],
    stack: int | None,
) -> Format:
    """The format that has this weight, with its modes and ranks."""
    if weight.structure == "matrices":
        return ModeProducts()
    format: Format
    if weight.structure == "cp":
        format = CP(1, **modes)
    elif weight.structure == "tucker":
        axes = layer.axes_of(settings)
        kernels = sum(axis.role == "kernel" for axis in axes)
        # A factor that is square, or wider, restricts nothing: its mode is left whole.
        kept = [factor for factor in weight.factors if len(factor) > 1][-kernels:] if kernels else []
        format = Tucker(1, spatial=any(factor.shape[0] > factor.shape[1] for factor in kept), **modes)
    else:
        format = TT(1, **modes)
    network = layer.resolve(format, settings, stack)[0]
    cores = named_cores(weight, layer, settings, network)
    sizes = {name: size for names, core in cores for name, size in zip(names, core.shape, strict=True)}
    missing = [bond for bond in network.bonds if bond not in sizes]
    if missing:
        raise ConversionError(f"{type(format).__name__} of a {layer.__name__}: no bond {missing[0]} in the weight")
    format = replace(format, rank=tuple(sizes[bond] for bond in network.bonds))
    return replace(format, rank=layer.resolve(format, settings, stack)[0].ranks)


def _load(layer: FactorizedLayer, weight: Weight, bias: Tensor | None) -> list[bool]:
    """Copy a weight of the layer's structure; all is checked before. Returns which cores come from what is learned."""
    with torch.enable_grad():  # so that what is computed from a parameter is seen to require a gradient
        cores = fitted(named_cores(weight, type(layer), layer.settings_of(layer), layer.network), layer)
    if bias is not None and layer.bias is not None and bias.shape != layer.bias.shape:
        raise ConversionError(f"bias: shape {tuple(layer.bias.shape)}; got {tuple(bias.shape)}")
    with torch.no_grad():
        for core, values in zip(layer.cores, cores, strict=True):
            core.copy_(values)
        if bias is not None and layer.bias is not None:
            layer.bias.copy_(bias)
    layer.error = layer.output_error = None
    return [values.requires_grad for values in cores]


def _dense(layer: type[FactorizedLayer], settings: Settings, weight: Weight, bias: Tensor | None) -> nn.Module:
    """The dense layer of a weight that is dense in tltorch, a BlockTT of one core among them."""
    tensor = weight.factors[0][0, ..., 0] if weight.factors else weight.tensor("tensor")
    if issubclass(layer, TensorRegression):  # whose in dimensions come first there
        count = len(settings["in_shape"])
        tensor = tensor.permute([*range(count, tensor.dim()), *range(count)])
    module = layer.dense_types[0](**settings, device="meta")
    shape = layer.shape_of(settings)
    unpadded = tensor.detach()[tuple(slice(size) for size in shape)]
    module.weight = nn.Parameter(unpadded.clone(), tensor.requires_grad)
    if bias is not None:
        module.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return module
