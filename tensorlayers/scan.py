"""Finding the layers of a model that can be factorized, and what stands in the way of the others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from .errors import ConversionError
from .formats import Format
from .layers import FactorizedLayer, Settings, layer_types
from .precision import DTYPES
from .surgery import overlapping

Choice = Mapping[str, "Format | None"]


@dataclass(frozen=True)
class Found:
    """A layer of a kind that can be factorized.

    Parameters
    ----------
    name : str
        Its first name in the model; `aliases` are the others, where the module is shared.
    aliases : tuple of str
    module : nn.Module
    kind : str
        The dense kind.
    layer : type
        The factorized layer that can replace it.
    obstacle : str
        Why it must stay dense all the same; empty if nothing does.
    """

    name: str
    aliases: tuple[str, ...]
    module: nn.Module
    kind: str
    layer: type[FactorizedLayer]
    obstacle: str

    @property
    def settings(self) -> Settings:
        """What the layer is built with; empty where it has no shape yet (lazy) or hides it (quantized)."""
        weight = getattr(self.module, "weight", None)
        if isinstance(self.module, LazyModuleMixin) or not isinstance(weight, Tensor):
            return {}
        return self.layer.settings_of(self.module)


def module_names(model: nn.Module) -> dict[int, list[str]]:
    """All names of each module, by its id; the first is the one that ``named_modules()`` gives."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return names


def scan(model: nn.Module) -> list[Found]:
    """List the layers of a model that are of a kind that can be factorized, in the order of its modules."""
    names = module_names(model)
    tied = _tied(model)
    read_by_torch = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    found = []
    for name, module in model.named_modules():
        for layer in layer_types():
            kind = layer.matches(module) or _quantized_kind(module)
            if kind is None:
                continue
            obstacle = _obstacle(name, module, layer, tied)
            if id(module) in read_by_torch:
                obstacle = obstacle or "nn.MultiheadAttention reads its weight itself"
            found.append(Found(name, tuple(names[id(module)][1:]), module, kind, layer, obstacle))
            break
    return found


def _obstacle(name: str, module: nn.Module, layer: type[FactorizedLayer], tied: Mapping[int, list[str]]) -> str:
    if isinstance(module, LazyModuleMixin):
        return "lazy: it has no shape before its first forward"
    if _quantized_kind(module):
        return "quantized"
    if parametrize.is_parametrized(module) or "weight" not in module._parameters or module._modules:
        return "parametrized: its weight is computed from other tensors"
    others = sorted(({*module._parameters} - {"weight", "bias"}) | {*module._buffers})
    if others:
        return f"parametrized: it has {', '.join(others)}"
    weight = module._parameters["weight"]
    if weight is None or weight.dtype not in DTYPES or type(weight.data) is not Tensor:
        return "quantized: its weight is no plain tensor of 16 to 64 floating-point bits"
    if not weight.numel():
        return "nothing saved: it has no weights"
    for key, parameter in module._parameters.items():
        if id(parameter) in tied:
            own_name = f"{name}.{key}" if name else key
            return f"tied with {', '.join(other for other in tied[id(parameter)] if other != own_name)}"
    own = type(module).forward
    replaced = any(isinstance(module, dense) and own is not dense.forward for dense in layer.dense_types)
    if "forward" in module.__dict__ or replaced:
        return f"parametrized: {type(module).__name__} replaces the forward"
    return layer.refusal(module)


def _quantized_kind(module: nn.Module) -> str | None:
    name = type(module).__name__
    quantized = re.search(r"\bquant|\bqat\b|\bao\b|bitsandbytes|gptq|awq", type(module).__module__)
    linear = "Linear" in name and "Quantizable" not in name and hasattr(module, "in_features")
    return name if quantized and linear else None


def _tied(model: nn.Module) -> dict[int, list[str]]:
    """Parameters that are used under several names or overlap in memory -> all names of what they are tied with.

    Names of one module that is itself shared do not count.
    """
    owners: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{prefix}.{name}" if prefix else name)
    tied = {key: names for key, names in owners.items() if len(names) > 1}
    for first, second in overlapping(model):
        names = owners[id(first)] + owners[id(second)]
        for parameter in (first, second):
            tied[id(parameter)] = list(dict.fromkeys(tied.get(id(parameter), []) + names))
    return tied


def choose(formats: Format | Choice, found: list[Found], model: nn.Module) -> dict[str, Format | str | None]:
    """Which format each layer gets: the first matching key of a mapping, ``"*"`` last; ``""`` where none matches.

    Parameters
    ----------
    formats : Format, or mapping
        Keys: an exact name, ``re:`` and a pattern that matches the whole name, or ``"*"``. Values: a format, or
        None to leave the layer dense.

    Raises
    ------
    ConversionError
        If a key matches no layer, a pattern is no regular expression, or a value is no format.
    """
    if isinstance(formats, Format):
        formats = {"*": formats}
    if not isinstance(formats, Mapping) or not formats:
        raise ConversionError(
            f"formats: a format such as LowRank(0.5), or a mapping of names to those; got {formats!r}"
        )
    for key, value in formats.items():
        if not isinstance(key, str) or not (value is None or isinstance(value, Format)):
            raise ConversionError(f"formats[{key!r}]: a string key, and a format or None; got {value!r}")
    keys = sorted(formats, key=lambda key: key == "*")
    used = {key: key == "*" for key in keys}
    chosen: dict[str, Format | str | None] = {}
    for layer in found:
        chosen[layer.name] = ""
        hits = [key for key in keys if any(_key_matches(key, name) for name in (layer.name, *layer.aliases))]
        used.update(dict.fromkeys(hits, True))
        if hits:
            chosen[layer.name] = formats[hits[0]]
    for key in keys:
        if not used[key]:
            modules = dict(model.named_modules(remove_duplicate=False))
            kind = f": {key!r} is a {type(modules[key]).__name__}" if key in modules else ""
            raise ConversionError(f"formats[{key!r}]: a key matches at least one layer that can be factorized{kind}")
    return chosen


def _key_matches(key: str, name: str) -> bool:
    if key == "*":
        return True
    if not key.startswith("re:"):
        return key == name
    try:
        return re.fullmatch(key[3:], name) is not None
    except re.error as error:
        raise ConversionError(f"formats[{key!r}]: not a regular expression: {error}") from None
