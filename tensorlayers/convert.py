"""convert_model: replace the dense layers of a model by factorized ones; and back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn
from tqdm import tqdm

from .cost import SLOWER
from .errors import ConversionError, RankError, TensorlayersError
from .formats import Format
from .layers import FactorizedLayer, layer_type
from .plan import ConversionPlan, Entry, entry_of
from .scan import Choice, Found, choose, module_names, scan
from .surgery import swap


def plan_conversion(
    model: nn.Module,
    formats: Format | Choice,
    *,
    where: Callable[[str, nn.Module], bool] | None = None,
    force: bool = False,
    errors: bool = True,
    progress: bool | None = None,
) -> ConversionPlan:
    """Say what `convert_model` would do to each layer, and what that costs. The model is not changed.

    Parameters
    ----------
    model : nn.Module
    formats : Format, or mapping of keys to Format or None
        One format for all layers; or keys, of which the first that matches wins: an exact name, ``re:`` and a
        pattern that matches the whole name, and ``"*"`` for all others. None leaves a layer dense.
    where : callable, optional
        (name, module) -> bool; layers for which it is false stay dense.
    force : bool
        Convert also the layers that this would make larger or slower.
    errors : bool
        Decompose each weight to state its relative error. Takes as long as the conversion.
    progress : bool, optional
        A progress bar; by default where the output is a terminal.

    Returns
    -------
    ConversionPlan

    Raises
    ------
    ConversionError
        If a key matches nothing or a value is no format.
    RankError, ModeError, FormatError
        If a format named for a layer does not fit its shape.
    """
    found = scan(model)
    chosen = choose(formats, found, model)
    entries = []
    for layer in found:
        exact = isinstance(formats, Mapping) and any(name in formats for name in (layer.name, *layer.aliases))
        entries.append(_decide(layer, chosen[layer.name], where, force, exact))
    if errors:
        modules = {layer.name: layer.module for layer in found}
        # The same random numbers as the conversion will draw, and none of the user's.
        with torch.random.fork_rng(devices=[]):
            for position, entry in _bar(entries, progress):
                if entry.converted and not any(p.is_meta for p in modules[entry.name].parameters()):
                    entries[position] = replace(entry, error=_factorize(modules[entry.name], entry).error)
    return ConversionPlan(entries, _parameters(model))


def convert_model(
    model: nn.Module,
    formats: Format | Choice | ConversionPlan,
    *,
    inplace: bool = False,
    where: Callable[[str, nn.Module], bool] | None = None,
    force: bool = False,
    progress: bool | None = None,
) -> nn.Module:
    """Replace dense layers by factorized ones.

    Tied weights stay tied (and dense); device, dtype, training mode, requires_grad, forward and backward hooks and
    a missing bias are kept. By default a layer stays dense where the cost model predicts more than 1.05 x its FLOPs,
    or where nothing would be saved; one warning says how many, and why.

    Parameters
    ----------
    model : nn.Module
    formats : Format, mapping, or ConversionPlan
        See `plan_conversion`; or an (edited) plan of this model.
    inplace : bool
        Replace the layers in `model` itself. Otherwise it is copied, and the copy shares nothing with it; the
        weights that are replaced are not copied. A model that itself is a dense layer is never changed: use what
        is returned. Only the module tree is mended: what else holds a layer (a plain list, a bound method) keeps the
        dense one.
    where, force, progress
        See `plan_conversion`. With a plan, `where` and `force` are already decided.

    Returns
    -------
    nn.Module

    Raises
    ------
    ConversionError
        If the plan does not fit the model, or a weight cannot be decomposed; the model is then unchanged.
    RankError, ModeError, FormatError
        See `plan_conversion`.
    """
    if isinstance(formats, ConversionPlan):
        if where is not None or force:
            raise ConversionError("convert_model: a plan is already decided; where and force go to plan_conversion")
        plan = formats
    else:
        plan = plan_conversion(model, formats, where=where, force=force, errors=False)
        if plan.advice:
            warnings.warn(f"{plan.advice}. force=True converts them all the same", stacklevel=2)
        asked = [entry for entry in plan if entry.blocked and isinstance(formats, Mapping) and formats.get(entry.name)]
        for entry in asked:
            warnings.warn(f"layer {entry.name!r} stays dense: {entry.reason}", stacklevel=2)
    found = {layer.name: layer for layer in scan(model)}
    for entry in plan:
        _check(entry, found)
    entries = [entry for entry in plan if entry.converted]
    replacements: dict[int, tuple[nn.Module, nn.Module]] = {}
    for _, entry in _bar(entries, progress):
        module = found[entry.name].module
        replacements[id(module)] = (module, _factorize(module, entry))
    return swap(model, replacements, inplace)


def to_dense(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Undo a conversion: replace every factorized layer by the dense layer that it stands for.

    Parameters
    ----------
    model : nn.Module
    inplace : bool
        As in `convert_model`.

    Returns
    -------
    nn.Module
        With layers of the kinds that were converted; outputs are the same up to rounding.
    """
    layers = [module for module in model.modules() if isinstance(module, FactorizedLayer)]
    return swap(model, {id(layer): (layer, layer.to_module()) for layer in layers}, inplace)


def summarize(model: nn.Module) -> ConversionPlan:
    """The layers of a model as they are: the factorized ones with what they save, and those that are dense.

    Returns
    -------
    ConversionPlan
        Prints as a table. `error` is that of the weight when it was decomposed, before any training.
    """
    entries: dict[str, Entry] = {}
    for layer in scan(model):
        entries[layer.name] = _entry(layer).dense(layer.obstacle or "not converted", bool(layer.obstacle))
    names = module_names(model)
    total = _parameters(model)
    for name, module in model.named_modules():
        if isinstance(module, FactorizedLayer):
            entries[name] = entry_of(name, module, tuple(names[id(module)][1:]))
            total += module.dense_parameters - module.network.num_parameters
    in_order = [entries[name] for name, _ in model.named_modules() if name in entries]
    return ConversionPlan(in_order, total, "summary")


def _entry(layer: Found) -> Entry:
    return Entry(layer.name, layer.kind, layer.layer.kind, layer.settings, aliases=layer.aliases)


def _decide(
    layer: Found,
    format: Format | str | None,
    where: Callable[[str, nn.Module], bool] | None,
    force: bool,
    exact: bool,
) -> Entry:
    entry = _entry(layer)
    if layer.obstacle:
        return entry.dense(layer.obstacle, blocked=True)
    if not isinstance(format, Format):
        return entry.dense("asked to stay dense" if format is None else "no key matches")
    if where is not None and not where(layer.name, layer.module):
        return entry.dense("asked to stay dense")
    try:
        converted = entry.with_format(format)
    except RankError as error:
        # A fraction that one small layer cannot reach must not stop the whole model, unless that layer was named.
        if not isinstance(format.rank, float) or exact or force:
            raise type(error)(f"layer {layer.name!r}: {error}") from None
        return entry.dense(f"nothing saved: {error}")
    except TensorlayersError as error:
        raise type(error)(f"layer {layer.name!r}: {error}") from None
    before, after = converted.parameters
    if after >= before and not force:
        return entry.dense(f"nothing saved: {after / before:.2f} x the parameters")
    dense, factorized = converted.macs
    if factorized > SLOWER * dense and not force:
        ratio = f"{factorized / dense:.2f} x the MACs" if dense else f"{factorized} MACs a row, dense has none"
        return entry.dense(f"predicted slower: {ratio}")
    return converted


def _check(entry: Entry, found: Mapping[str, Found]) -> None:
    layer = found.get(entry.name)
    if layer is None:
        raise ConversionError(f"plan: layer {entry.name!r} is not in this model, or not dense any more")
    if entry.converted and layer.obstacle:
        raise ConversionError(f"plan: layer {entry.name!r} cannot be converted: {layer.obstacle}")
    model = _entry(layer)
    if model.shape != entry.shape:
        raise ConversionError(
            f"plan: layer {entry.name!r} has shape {model.shape} in this model, {entry.shape} in the plan"
        )
    if model.settings != entry.settings:
        differing = [
            f"{key} {value!r} in this model, {entry.settings[key]!r} in the plan"
            for key, value in model.settings.items()
            if value != entry.settings[key]
        ]
        raise ConversionError(f"plan: layer {entry.name!r} has {differing[0]}")


def _factorize(module: nn.Module, entry: Entry) -> FactorizedLayer:
    assert entry.format is not None
    try:
        return layer_type(entry.layer).from_dense(module, entry.format)
    except TensorlayersError as error:
        raise ConversionError(f"layer {entry.name!r}: {error}") from error


def _parameters(model: nn.Module) -> int:
    uninitialized = nn.parameter.UninitializedParameter
    return sum(p.numel() for p in model.parameters() if not isinstance(p, uninitialized))


def _bar(entries: list[Entry], progress: bool | None) -> Iterator[tuple[int, Entry]]:
    """Enumerate entries under a bar that names the layer; shown on a terminal, once it takes over a second."""
    bar = tqdm(list(enumerate(entries)), disable=None if progress is None else not progress, delay=1, unit="layer")
    for position, entry in bar:
        # A refresh shows the bar whatever its delay.
        bar.set_postfix_str(entry.name, refresh=not bar.disable and bar.format_dict["elapsed"] >= bar.delay)
        yield position, entry
