"""Swapping modules in a model or in a copy of it, and what such a copy has to mind."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from .fold import computed_memo, computes_weight

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_is_full_backward_hook",
    "_backward_pre_hooks",
)


def swap(
    model: nn.Module,
    replacements: Mapping[int, tuple[nn.Module, nn.Module]],
    inplace: bool,
    rebuilt: Mapping[int, tuple[nn.Module, nn.Module]] = MappingProxyType({}),
) -> nn.Module:
    """Swap modules, in the model or in a copy that never copies what is swapped out.

    Parameters
    ----------
    model : nn.Module
    replacements : mapping
        The id of each module to go -> (that module, the one that takes its place, its hooks included).
    inplace : bool
        A model that is itself replaced is not changed: use what is returned.
    rebuilt : mapping
        Likewise, of modules that are put together anew from parts of the old one: modules that may be among
        `replacements`, parameters, and modules that hold views of parameters.

    Returns
    -------
    nn.Module
        The model, or a copy that shares nothing with it.
    """
    memo: dict[int, object] = {} if inplace else copy_memo(model)
    everything = {**replacements, **rebuilt}
    memo |= {key: new for key, (_, new) in everything.items()}
    for old, new in rebuilt.values():
        _settle(old, new, replacements, inplace, memo)
    if id(model) in everything:
        result = everything[id(model)][1]
    elif inplace:
        result = model
        for parent in list(model.modules()):
            for name, child in parent._modules.items():
                if child is not None and id(child) in everything and id(parent) not in everything:
                    parent._modules[name] = everything[id(child)][1]
    else:
        # deepcopy takes what its memo already holds, wherever the model refers to it.
        result = copy.deepcopy(model, memo)
    for old, new in everything.values():
        for name in _HOOKS:
            if old.__dict__.get(name) is not None:  # False: backward hooks of the old kind
                # In place the handles that users hold must go on working; a copy must share nothing.
                new.__dict__[name] = old.__dict__[name] if inplace else copy.deepcopy(old.__dict__[name], memo)
        computing = [key for key, hook in new._forward_pre_hooks.items() if computes_weight(hook)]
        if computing and old is model:  # which stays as it is
            new.__dict__["_forward_pre_hooks"] = copy.copy(new._forward_pre_hooks)
        for key in computing:
            del new._forward_pre_hooks[key]
    return result


def _settle(
    old: nn.Module,
    new: nn.Module,
    replacements: Mapping[int, tuple[nn.Module, nn.Module]],
    inplace: bool,
    memo: dict[int, object],
) -> None:
    """Give a rebuilt module its final parts: the replacements, the old one's parts (or copies), and no views."""
    fresh = {id(module) for _, module in replacements.values()}
    for name, child in new._modules.items():
        if child is None or id(child) in fresh:
            continue
        if id(child) in replacements:
            new._modules[name] = replacements[id(child)][1]
        elif not (inplace and child in old._modules.values()):
            new._modules[name] = copy.deepcopy(child, memo)
    for name, parameter in new._parameters.items():
        if not inplace and any(parameter is own for own in old._parameters.values()):
            new._parameters[name] = copy.deepcopy(parameter, memo)


def overlapping(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Pairs of distinct parameters that have elements in common.

    Two weights that were loaded from one file, or are columns of one matrix, lie in one storage without that.
    """
    spans = []
    for parameter in model.parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter) or type(parameter.data) is not Tensor:
            continue
        if parameter.layout == torch.strided and not parameter.is_meta and parameter.numel():
            start = parameter.data_ptr()
            end = start + _extent(parameter) * parameter.element_size()
            spans.append((str(parameter.device), start, end, parameter))
    spans.sort(key=lambda span: span[:3])
    pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
    live: list[tuple[str, int, int, nn.Parameter]] = []
    for span in spans:
        live = [other for other in live if other[0] == span[0] and other[2] > span[1]]
        pairs += [(other[3], span[3]) for other in live if _share_elements(other[3], span[3])]
        live.append(span)
    return pairs


def _extent(tensor: Tensor) -> int:
    """Elements of memory from a tensor's first to its last."""
    return sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1


def _share_elements(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors whose address ranges overlap have an element in common."""
    if first.dtype != second.dtype or first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr():
        return True
    if first.is_contiguous() and second.is_contiguous():
        return True
    start = min(first.storage_offset(), second.storage_offset())
    end = max(tensor.storage_offset() + _extent(tensor) for tensor in (first, second))
    used = torch.zeros(end - start, dtype=torch.bool)
    used.as_strided(first.shape, first.stride(), first.storage_offset() - start).fill_(True)
    return bool(used.as_strided(second.shape, second.stride(), second.storage_offset() - start).any())


def copy_memo(model: nn.Module) -> dict[int, object]:
    """A memo for ``copy.deepcopy(model, memo)`` that holds what deepcopy itself gets wrong."""
    memo = computed_memo(model)
    # Parameters are cloned one by one, which would untie those that overlap; plain tensors keep their storage.
    for pair in overlapping(model):
        for parameter in pair:
            if id(parameter) not in memo:
                memo[id(parameter)] = nn.Parameter(copy.deepcopy(parameter.data, memo), parameter.requires_grad)
    return memo
