"""What heal prepares: options that are checked, what is trained and at which rates, and which batches it is for."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .decompose import balance
from .errors import ConversionError
from .layers import FactorizedLayer
from .precision import at_least_single

_LEAST = 1e-2
"""The size that vectors, and cores of zeros, are taken to have at least, for their learning rate."""

_COUNTS = ("steps", "patience")
_SHARES = ("layerwise", "warmup", "held_out")
_POSITIVE = ("lr", "clip", "temperature")
_WEIGHTS = ("weight_decay", "hidden", "labels", "max_bytes")
_FUNCTIONS = ("train", "output", "loss")


def check_models(model: object, teacher: object) -> None:
    for what, one in (("model", model), ("teacher", teacher)):
        if not isinstance(one, nn.Module):
            raise ConversionError(f"heal: {what}: an nn.Module; got {type(one).__name__}")


def check_options(given: Mapping[str, Any]) -> None:
    """Raise `ConversionError` where an option of `heal` is out of its range."""
    whole, share = "an integer of at least 1", "a number of at least 0, below 1"
    positive, weight = "a number above 0", "a number of at least 0"
    function = "a callable, or None"
    rules: dict[str, tuple[str, bool]] = {
        **{name: (f"{whole}, or None", given[name] is None or _whole(given[name], 1)) for name in _COUNTS},
        "every": (whole, _whole(given["every"], 1)),
        "seed": ("an integer of at least 0", _whole(given["seed"], 0)),
        "minutes": (
            f"{positive}, or None",
            given["minutes"] is None or (_real(given["minutes"]) and given["minutes"] > 0),
        ),
        **{name: (share, _real(given[name]) and 0 <= given[name] < 1) for name in _SHARES},
        **{name: (positive, _real(given[name]) and given[name] > 0) for name in _POSITIVE},
        **{name: (weight, _real(given[name]) and given[name] >= 0) for name in _WEIGHTS},
        **{name: (function, given[name] is None or callable(given[name])) for name in _FUNCTIONS},
        "mask": ("a callable", callable(given["mask"])),
        "training": ("a bool", isinstance(given["training"], bool)),
    }
    for name, (rule, holds) in rules.items():
        if not holds:
            raise ConversionError(f"heal: {name}: {rule}; got {given[name]!r}")
    names = given["hidden_at"]
    if names is not None and (isinstance(names, str) or not all(isinstance(name, str) for name in names)):
        raise ConversionError(f"heal: hidden_at: names of modules; got {names!r}")
    for what in ("model", "teacher"):
        known = {name for name, _ in given[what].named_modules(remove_duplicate=False)}
        for name in names or ():
            if name not in known:
                raise ConversionError(f"heal: hidden_at: modules of both models; the {what} has no {name!r}")


def _real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def described(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that decide what a run comes to, as plain data; functions by their names."""
    chosen = ("layerwise", "lr", "temperature", "hidden", "labels", "held_out", "training", "hidden_at")
    functions = {name: getattr(given[name], "__qualname__", None) for name in (*_FUNCTIONS, "mask")}
    return {name: given[name] for name in chosen} | functions


def trained_parameters(
    model: nn.Module, teacher: nn.Module, train: Callable[[str, nn.Parameter], bool] | None
) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    cores = {id(core) for layer in factorized_layers(model) for core in layer.cores}

    def default(name: str, parameter: nn.Parameter) -> bool:
        return id(parameter) in cores or parameter.dim() == 1

    chosen = train or default
    found = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and chosen(name, parameter)
    }
    if not found or (train is None and not cores):
        what = "parameters to train" if train else "factorized layers (or train=, to say what is trained)"
        raise ConversionError(f"heal: a model with {what}; got none")
    shared = {id(parameter) for parameter in teacher.parameters()}
    for name, parameter in found.items():
        if parameter.is_meta:
            raise ConversionError(f"heal: parameters with values; {name!r} is on the meta device")
        if id(parameter) in shared:
            raise ConversionError(f"heal: a teacher that shares nothing that is trained; it shares {name!r}")
    return found


def factorized_layers(model: nn.Module) -> list[FactorizedLayer]:
    """Those of a model, each once."""
    return [module for module in model.modules() if isinstance(module, FactorizedLayer)]


def split(count: int, held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """The numbers of the batches to train on, and of those to measure by."""
    some = min(max(1, round(held_out * count)), count - 1) if held_out else 0
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[some:]), sorted(order[:some])


def balance_cores(model: nn.Module, trained: dict[str, nn.Parameter]) -> None:
    """Balance the cores of each layer all of whose cores are trained."""
    mine = {id(parameter) for parameter in trained.values()}
    done: set[int] = set()
    for layer in factorized_layers(model):
        if all(id(core) in mine and id(core) not in done for core in layer.cores):
            with torch.no_grad():
                found = balance(layer.network, [core.detach().double() for core in layer.cores])
                for core, values in zip(layer.cores, found, strict=True):
                    core.copy_(values)
        done |= {id(core) for core in layer.cores}


def learning_rates(model: nn.Module, trained: Mapping[str, nn.Parameter], lr: float) -> list[float]:
    """The learning rate of each parameter, in proportion to the root mean square of its entries."""
    cores = {id(core) for layer in factorized_layers(model) for core in layer.cores}
    rates = []
    for parameter in trained.values():
        values = parameter.detach().to(at_least_single(parameter.dtype))
        size = float(values.square().mean().sqrt()) if values.numel() else 0.0
        # The scale of a core says how much its entries must change; that of a bias may be 0 for no reason.
        rates.append(lr * (size if size and id(parameter) in cores else max(size, _LEAST)))
    return rates


def digest(batches: Sequence[Any]) -> str:
    """What batches are: their number, the shapes of all, and the entries of the first and last."""
    found = hashlib.sha256(str(len(batches)).encode())
    for k, batch in enumerate(batches):
        for leaf in tree_leaves(dict(batch) if hasattr(batch, "keys") else batch):
            if isinstance(leaf, Tensor):
                found.update(f"{tuple(leaf.shape)} {leaf.dtype}".encode())
                if k in (0, len(batches) - 1):
                    found.update(leaf.detach().cpu().double().numpy().tobytes())
    return found.hexdigest()[:16]
