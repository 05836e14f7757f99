"""Finding the layers of a model that can be factorized, and what stands in the way of the others."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from .fold import folded
from .layers import PROJECTIONS, FactorizedLayer, FactorizedLinear, ProjectedAttention, Settings, layer_types
from .precision import DTYPES
from .surgery import overlapping

_Attention = tuple[nn.MultiheadAttention, "ProjectedAttention | None", str]

_ATTENTION = "nn.MultiheadAttention reads its weight itself"


@dataclass(frozen=True)
class Found:
    """A layer of a kind that can be factorized.

    Parameters
    ----------
    name : str
        Its first name in the model; `aliases` are the others, where the module is shared.
    aliases : tuple of str
    module : nn.Module
        Of a projection of attention a linear layer that shares the memory of the packed weight.
    kind : str
        The dense kind.
    layer : type
        The factorized layer that can replace it.
    obstacle : str
        Why it must stay dense all the same; empty if nothing does.
    folded : nn.Module or None
        Where the layer's weight is computed (weight norm, ...), the plain layer with that weight.
    unpacks : tuple of (nn.MultiheadAttention, ProjectedAttention)
        The attention modules that this layer is a projection of, with what takes their place where it is converted.
    """

    name: str
    aliases: tuple[str, ...]
    module: nn.Module
    kind: str
    layer: type[FactorizedLayer]
    obstacle: str
    unpacks: tuple[tuple[nn.MultiheadAttention, ProjectedAttention], ...] = ()
    folded: nn.Module | None = None

    @property
    def dense(self) -> nn.Module:
        """The plain layer whose weight is factorized."""
        return self.folded or self.module

    @property
    def settings(self) -> Settings:
        """What the layer is built with; empty where it has no shape yet (lazy) or hides it (quantized)."""
        # Asked of the class: reading a weight that is computed may change it (spectral norm iterates).
        if isinstance(self.module, LazyModuleMixin) or callable(getattr(type(self.module), "weight", None)):
            return {}
        return self.layer.settings_of(self.module)


def module_names(model: nn.Module) -> dict[int, list[str]]:
    """All names of each module, by its id; the first is the one that ``named_modules()`` gives."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return names


def scan(model: nn.Module, fold: bool = False) -> list[Found]:
    """List the layers of a model that are of a kind that can be factorized, in the order of its modules.

    The projections of an ``nn.MultiheadAttention`` are listed as the linear layers that they are. With `fold`, a
    layer whose weight is computed (weight norm, ...) is no obstacle: it is folded to a plain one.
    """
    names = module_names(model)
    tied = _tied(model)
    attention: dict[int, _Attention] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            obstacle = _attention_obstacle(name, module, tied)
            parts = None if obstacle else ProjectedAttention.unpack(module, copy_weights=False)
            attention[id(module)] = module, parts, obstacle
    found: list[Found] = []
    for name, module in model.named_modules():
        if id(module) in attention:
            found += _projections(names[id(module)], *attention[id(module)])
        for layer in layer_types():
            kind = layer.matches(module) or (_quantized_kind(module) if layer is FactorizedLinear else None)
            if kind is None:
                continue
            obstacle = _obstacle(name, module, layer, tied)
            plain = folded(module) if fold and obstacle else None
            if plain is not None:
                obstacle = _tie(name, dict(module.named_parameters()), tied) or _obstacle(name, plain, layer, tied)
            users = [user for user in attention.values() if user[0].out_proj is module]
            obstacle = obstacle or next((reason for _, _, reason in users if reason), "")
            unpacks = tuple((source, parts) for source, parts, _ in users if parts is not None)
            found.append(Found(name, tuple(names[id(module)][1:]), module, kind, layer, obstacle, unpacks, plain))
            break
    return found


def in_order(model: nn.Module, names: Collection[str]) -> list[str]:
    """Names of layers in the order of the model's modules; those of packed projections stand at their attention's."""
    position = {name: number for number, (name, _) in enumerate(model.named_modules())}
    return sorted(names, key=lambda name: position.get(name, position.get(name.rpartition(".")[0], 0)))


def _projections(
    names: list[str], module: nn.MultiheadAttention, parts: ProjectedAttention | None, obstacle: str
) -> Iterator[Found]:
    """The projections that an attention module holds as packed tensors."""
    if type(module) is not nn.MultiheadAttention and not parametrize.is_parametrized(module):
        return  # a subclass may hold them otherwise
    for part, features in zip(PROJECTIONS, (module.embed_dim, module.kdim, module.vdim), strict=True):
        name, *aliases = (f"{name}.{part}" if name else part for name in names)
        has_bias = module.in_proj_bias is not None
        linear = getattr(parts, part) if parts else nn.Linear(features, module.embed_dim, has_bias, device="meta")
        unpacks = ((module, parts),) if parts else ()
        yield Found(name, tuple(aliases), linear, "Linear", FactorizedLinear, obstacle, unpacks)


def _attention_obstacle(name: str, module: nn.MultiheadAttention, tied: Mapping[int, list[str]]) -> str:
    """Why an attention module must not be taken apart."""
    if parametrize.is_parametrized(module):
        return "parametrized: its weight is computed from other tensors"
    if type(module) is not nn.MultiheadAttention:
        return _ATTENTION
    keys = ["in_proj_weight"] if module._qkv_same_embed_dim else [f"{part}_weight" for part in PROJECTIONS]
    keys += [key for key in ("in_proj_bias", "bias_k", "bias_v") if getattr(module, key) is not None]
    if any(module._parameters.get(key) is None for key in keys):
        return "parametrized: its weight is computed from other tensors"
    others = sorted({key for key, value in module._parameters.items() if value is not None}.difference(keys))
    others += sorted({*module._buffers, *module._modules} - {"out_proj"})
    if others:
        return f"parametrized: it has {', '.join(others)}"
    if "forward" in module.__dict__:
        return "parametrized: MultiheadAttention replaces the forward"
    if not isinstance(module.out_proj, nn.Linear):
        return f"parametrized: its out_proj is a {type(module.out_proj).__name__}"
    return _parameters_obstacle(name, module, [key for key in keys if key.startswith(("in_", "q_", "k_", "v_"))], tied)


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
    obstacle = _parameters_obstacle(
        name, module, ["weight", *(key for key in module._parameters if key != "weight")], tied
    )
    if obstacle:
        return obstacle
    own = type(module).forward
    replaced = any(isinstance(module, dense) and own is not dense.forward for dense in layer.dense_types)
    if "forward" in module.__dict__ or replaced:
        return f"parametrized: {type(module).__name__} replaces the forward"
    return layer.refusal(module)


def _parameters_obstacle(name: str, module: nn.Module, keys: list[str], tied: Mapping[int, list[str]]) -> str:
    """What stands in the way in the parameters of these keys, the first of which is a weight."""
    weight = module._parameters[keys[0]]
    if weight is None or weight.dtype not in DTYPES or type(weight.data) is not Tensor:
        return "quantized: its weight is no plain tensor of 16 to 64 floating-point bits"
    if not weight.numel():
        return "nothing saved: it has no weights"
    return _tie(name, {key: module._parameters[key] for key in keys}, tied)


def _tie(name: str, parameters: Mapping[str, nn.Parameter | None], tied: Mapping[int, list[str]]) -> str:
    """What the first of a module's parameters that is tied is tied with; empty where none is."""
    for key, parameter in parameters.items():
        if id(parameter) in tied:
            own_name = f"{name}.{key}" if name else key
            return f"tied with {', '.join(other for other in tied[id(parameter)] if other != own_name)}"
    return ""


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
