"""Folding: a layer whose weight is computed from other tensors (weight norm, pruning, ...) as a plain layer."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def computes_weight(hook: object) -> bool:
    """Whether a forward pre-hook is one of torch's that compute a weight anew at each forward."""
    return isinstance(hook, (WeightNorm, SpectralNorm, prune.BasePruningMethod))


def folded(module: nn.Module) -> nn.Module | None:
    """A plain copy of a layer whose weight is computed, that weight as its parameter.

    Parameters
    ----------
    module : nn.Module
        With parametrizations (``torch.nn.utils.parametrize``), or the hooks of the older weight norm, spectral norm
        or pruning.

    Returns
    -------
    nn.Module or None
        None where nothing of that kind is found.
    """
    hooks: list[Any] = [hook for hook in module._forward_pre_hooks.values() if computes_weight(hook)]
    if not hooks and not parametrize.is_parametrized(module):
        return None
    memo = computed_memo(module)
    # The hooks of others are not for the copy, and may hold what cannot be copied.
    others = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    others += [*module._backward_pre_hooks.values(), *module._backward_hooks.values()]
    memo |= {id(hook): hook for hook in others if not computes_weight(hook)}
    plain = copy.deepcopy(module, memo).eval()  # spectral norm iterates in training mode
    if parametrize.is_parametrized(plain):
        # Removing takes the property from the class, which the copy has in common with its source.
        own = {key: value for key, value in vars(type(plain)).items() if key not in ("__dict__", "__weakref__")}
        plain.__class__ = type(type(plain).__name__, type(plain).__bases__, own)
        for name in list(plain.parametrizations):  # type: ignore[arg-type]
            parametrize.remove_parametrizations(plain, name, leave_parametrized=True)
            value = plain._buffers.pop(name, None)  # what a frozen one becomes
            if value is not None:
                plain.register_parameter(name, nn.Parameter(value.detach(), requires_grad=False))
    for hook in reversed(hooks):  # a later one may compute what an earlier one reads
        if isinstance(hook, prune.BasePruningMethod):
            prune.remove(plain, hook._tensor_name)  # type: ignore[no-untyped-call]
            continue
        parts = [plain._parameters.get(f"{hook.name}_{part}") for part in ("g", "v", "orig")]
        trained = any(part is not None and part.requires_grad for part in parts)
        (remove_weight_norm if isinstance(hook, WeightNorm) else remove_spectral_norm)(plain, hook.name)
        getattr(plain, hook.name).requires_grad_(trained)
    return plain.train(module.training)


def computed_memo(model: nn.Module) -> dict[int, object]:
    """A memo for ``copy.deepcopy(model, memo)`` with the weights that hooks compute: it refuses what is no leaf."""
    memo: dict[int, object] = {}
    for module in model.modules():
        for value in module.__dict__.values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return memo
