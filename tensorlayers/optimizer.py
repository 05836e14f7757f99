"""Carrying an optimizer over to a converted model: its parameter groups mended, its state kept or dropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile

from torch import Tensor, nn
from torch.optim import Optimizer

from .errors import ConversionError


def check(optimizer: object, model: nn.Module) -> None:
    """Raise `ConversionError` where this is no optimizer of the model."""
    if not isinstance(optimizer, Optimizer):
        raise ConversionError(f"optimizer: a torch.optim.Optimizer; got {type(optimizer).__name__}")
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise ConversionError("optimizer: one of this model; none of its parameters are the model's")


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model under all of their names."""
    return dict(model.named_parameters(remove_duplicate=False))


def mend(optimizer: Optimizer, before: Mapping[str, nn.Parameter], model: nn.Module) -> None:
    """Let an optimizer train a converted model, in place.

    What was replaced gives its place in its group, with the group's settings, to what replaced it; its state
    (moments, step count) is dropped. Whatever has the same name in both models keeps its state. Parameters that were
    not the model's stay.

    Parameters
    ----------
    optimizer : Optimizer
        Of the model before the conversion.
    before : mapping
        `parameters_of` that model.
    model : nn.Module
        The converted model, the same or a copy.
    """
    after = parameters_of(model)
    heirs: dict[int, list[Tensor]] = {}
    for name, parameter in before.items():
        if name in after:
            heirs.setdefault(id(parameter), []).append(after[name])
    same = set(heirs)
    gone = [name for name, parameter in before.items() if id(parameter) not in heirs]
    for name in after:
        if name not in before and gone:
            ancestor = max(gone, key=lambda old: _kinship(old, name))
            heirs.setdefault(id(before[ancestor]), []).append(after[name])
    names = {id(parameter): name for name, parameter in reversed(after.items())}
    placed: set[int] = set()
    known = {id(parameter) for parameter in before.values()}
    for group in optimizer.param_groups:
        members: list[Tensor] = []
        for parameter in group["params"]:
            others: list[Tensor] = [] if id(parameter) in known else [parameter]
            for heir in heirs.get(id(parameter), others):
                if id(heir) not in placed:
                    placed.add(id(heir))
                    members.append(heir)
                if id(parameter) in same and heir is not parameter and parameter in optimizer.state:
                    optimizer.state[heir] = optimizer.state[parameter]
        if "param_names" in group:  # of an optimizer that was given named parameters
            old = dict(zip(map(id, group["params"]), group["param_names"], strict=True))
            group["param_names"] = [names.get(id(member)) or old[id(member)] for member in members]
        group["params"] = members
    kept = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for stale in [tensor for tensor in optimizer.state if id(tensor) not in kept]:
        del optimizer.state[stale]
    if hasattr(optimizer, "_params"):  # LBFGS: one flat history over all parameters
        optimizer.state.clear()
        optimizer._params = optimizer.param_groups[0]["params"]
        optimizer.__dict__["_numel_cache"] = None


def _kinship(old: str, new: str) -> tuple[int, bool, int]:
    """How near a new parameter is to an old one: the modules that they share, whether both are a bias or none, and
    how far the names agree in what follows."""
    ours, theirs = old.split("."), new.split(".")
    shared = _agreeing(ours, theirs)
    old, new = ".".join(ours[shared:]), ".".join(theirs[shared:])
    return shared, ("bias" in old) == ("bias" in new), _agreeing(old, new)


def _agreeing(first: Sequence[str], second: Sequence[str]) -> int:
    """In how many items two sequences agree before they first differ."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
