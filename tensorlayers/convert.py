"""convert_model: replace the dense layers of a model by factorized ones; and back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from . import optimizer as optimizers
from .batches import Mask, attention_mask
from .budget import Budget
from .calibrate import Calibration
from .decide import decide, entry_for
from .entry import ROWS, Entry, Work, entry_of
from .errors import ConversionError, TensorlayersError
from .formats import Format
from .keys import Choice, Shares, check_alike
from .layers import FactorizedLayer, ProjectedAttention, layer_type
from .plan import ConversionPlan
from .precision import DTYPES, multiplied_as
from .scan import Found, in_order, module_names, scan
from .sequential import Data
from .surgery import swap


def plan_conversion(
    model: nn.Module,
    formats: Format | Sequence[Format] | Choice | None = None,
    *,
    budget: Budget | None = None,
    calibration: Calibration | None = None,
    share: Shares | None = None,
    where: Callable[[str, nn.Module], bool] | None = None,
    force: bool = False,
    fold: bool = False,
    errors: bool = True,
    rows: int = ROWS,
    device: str | None = None,
    progress: bool | None = None,
) -> ConversionPlan:
    """Say what `convert_model` would do to each layer, and what that costs. The model is not changed.

    A layer stays dense where nothing would be saved, or where it is predicted to take more than 1.05 x the time of the
    dense layer: in a forward, or in a training step. Of a layer in evaluation mode without a parameter that requires a
    gradient only the forward counts. Of layers that are factorized jointly the sum counts; of a kind without an
    estimate of time, MACs; of lookups, which have none, the parameters alone. Where a format has more MACs than the
    dense layer, or is predicted slower, the plan says what would pay: a rank, other modes, another format.

    Parameters
    ----------
    model : nn.Module
    formats : Format, or mapping of keys to Format or None
        One format for all layers; or keys, of which the first that matches wins: an exact name, ``re:`` and a
        pattern that matches the whole name, and ``"*"`` for all others. None leaves a layer dense. Embeddings are
        converted only where a key other than ``"*"`` names them, or by `force`. With a budget there may be a list of
        formats in place of each, of which every layer gets the best; their ranks bound what it may get
        (``LowRank(1.0)`` bounds nothing).
    budget : Budget, optional
        What the layers to be converted may take in all, for instance ``Budget(params=0.5)``: each then gets the format
        and ranks, or stays dense, so that the model's output on the calibration data changes least. Layers that share
        cores are no part of it. Needs `calibration`.
    calibration : Calibration, optional
        What `collect` gathered: ranks are then spent where outputs on these data need them, and errors are stated of
        the outputs too. Where it has nothing of a layer, or little, a note says so.
    share : mapping of patterns to Format
        Layers to be factorized jointly, as one tensor with one more mode: they share the cores. A key is ``re:``
        and a pattern; layers for which it captures the same text are a group, for instance one a block by
        ``r"re:encoder\\.(\\d+)\\.(?:query|key)"``; without capturing parentheses all that match. Goes before `formats`.
    where : callable, optional
        (name, module) -> bool; layers for which it is false stay dense.
    force : bool
        Convert also the layers that this would make larger or slower; then no advice is given.
    fold : bool
        Convert also layers whose weight is computed from other tensors (weight norm, spectral norm, pruning, any
        parametrization): the weight as it is now is factorized, and the computation is gone.
    errors : bool
        Decompose each weight to state its relative error. Takes as long as the conversion.
    rows : int
        Rows in the batch that costs are stated and compared for: tokens, output positions of a convolution, lookups.
    device : str, optional
        The device type whose constants times are predicted by; by default that of the model's parameters.
    progress : bool, optional
        A progress bar; by default where the output is a terminal.

    Returns
    -------
    ConversionPlan

    Raises
    ------
    ConversionError
        If the model is none, a key matches nothing, a value is no format, layers that are to share cores are not
        alike, or rows or device are none.
        Also if there is a budget without a calibration, or one that cannot be kept.
    RankError, ModeError, FormatError
        If a format named for a layer does not fit its shape.
    """
    _check_model(model)
    if budget is not None and not isinstance(budget, Budget):
        raise ConversionError(f"budget: a Budget such as Budget(params=0.5); got {budget!r}")
    work = _work(model, rows, device)
    found = scan(model, fold)
    data = Data(model, {}, calibration)
    with torch.random.fork_rng(devices=[]):
        entries = decide(found, model, formats, share or {}, where, force, work, calibration, budget)
    if errors:
        known = {layer.name: layer for layer in found}
        meta = {layer.name for layer in found if any(p.is_meta for p in layer.module.parameters())}
        # The same random numbers as the conversion will draw, and none of the user's.
        with torch.random.fork_rng(devices=[]):
            made = {}
            for group in _together(entries, progress):
                if meta.isdisjoint(entry.name for entry in group):
                    for entry, layer in zip(group, _factorize(group, known, data), strict=True):
                        made[entry.name] = replace(entry, error=layer.error, output_error=layer.output_error)
        entries = [made.get(entry.name, entry) for entry in entries]
    return ConversionPlan(entries, _parameters(model), work=work)


def convert_model(
    model: nn.Module,
    formats: Format | Sequence[Format] | Choice | ConversionPlan | None = None,
    *,
    budget: Budget | None = None,
    share: Shares | None = None,
    inplace: bool = False,
    optimizer: Optimizer | None = None,
    where: Callable[[str, nn.Module], bool] | None = None,
    force: bool = False,
    fold: bool = False,
    rows: int = ROWS,
    device: str | None = None,
    progress: bool | None = None,
    calibration: Calibration | None = None,
    batches: Iterable[Any] | None = None,
    mask: Mask = attention_mask,
) -> nn.Module:
    """Replace dense layers by factorized ones.

    Tied weights stay tied (and dense); device, dtype, training mode, requires_grad, forward and backward hooks and
    a missing bias are kept. By default a layer stays dense where it is predicted to take more than 1.05 x the time of
    the dense layer, or where nothing would be saved (see `plan_conversion`); one warning says how many, why, and what
    would pay.

    The projections of an ``nn.MultiheadAttention`` are linear layers of their own, named ``q_proj``, ``k_proj``,
    ``v_proj`` and ``out_proj``: where one of them is converted, a `ProjectedAttention` takes the module's place.

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
    optimizer : torch.optim.Optimizer, optional
        What trains `model`. It is changed so that it trains the converted model: the cores take the places of their
        weights in the parameter groups, without their moments; all else keeps its state.
    budget, share, where, force, fold, rows, device, progress
        See `plan_conversion`. With a plan, all but `progress` are already decided.
    calibration : Calibration, optional
        What `collect` gathered: each layer then keeps its outputs on these data, as far as they matter to the model's,
        in place of its weight, and its bias makes good for their mean. Layers that never ran keep their weights.
    batches : iterable, optional
        Data to fit the layers on one after another, each to the dense model's outputs on the inputs that the layers
        before it, already converted, give; so that errors do not pile up. They are gone over twice for each layer or
        group of layers with the same input, and kept in a list. Best those that were calibrated with.
    mask : callable
        Of the batches, as of `collect`.

    Returns
    -------
    nn.Module

    Raises
    ------
    ConversionError
        If the model is none, the plan does not fit it, a weight cannot be decomposed, or the optimizer is not the
        model's; model and optimizer are then unchanged.
    RankError, ModeError, FormatError
        See `plan_conversion`.
    """
    _check_model(model)
    if optimizer is not None:
        optimizers.check(optimizer, model)
    if isinstance(formats, ConversionPlan):
        if where is not None or force or share or fold or device or budget or rows != ROWS:
            others = "budget, share, where, force, fold, rows and device"
            raise ConversionError(f"convert_model: a plan is already decided; {others} go to plan_conversion")
        plan = formats
    else:
        plan = plan_conversion(
            model,
            formats,
            budget=budget,
            calibration=calibration,
            share=share,
            where=where,
            force=force,
            fold=fold,
            errors=False,
            rows=rows,
            device=device,
        )
        if plan.advice or plan.alternatives:
            dense = f"{plan.advice}. force=True converts them all the same" if plan.advice else ""
            warnings.warn(". ".join(filter(None, (dense, plan.alternatives))), stacklevel=2)
        asked = [entry for entry in plan if entry.blocked and isinstance(formats, Mapping) and formats.get(entry.name)]
        for entry in asked:
            warnings.warn(f"layer {entry.name!r} stays dense: {entry.reason}", stacklevel=2)
    found = {layer.name: layer for layer in scan(model, fold=any(entry.fold for entry in plan))}
    for entry in plan:
        _check(entry, found)
    replacements: dict[int, tuple[nn.Module, nn.Module]] = {}
    unpacked: dict[int, tuple[nn.Module, nn.Module]] = {}
    chosen = {entry.name: found[entry.name] for entry in plan if entry.converted}
    data = Data(model, chosen, calibration, batches, mask)
    for group in _together(list(plan), progress, data):
        for entry, layer in zip(group, _factorize(group, found, data), strict=True):
            data.replace(entry.name, layer)
            module = found[entry.name].module
            replacements[id(module)] = (module, layer)
            unpacked |= {id(attention): (attention, parts) for attention, parts in found[entry.name].unpacks}
    before = optimizers.parameters_of(model)
    result = swap(model, replacements, inplace, unpacked)
    if optimizer is not None:
        optimizers.mend(optimizer, before, result)
    return result


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
        With layers of the kinds that were converted, attention packed again; outputs are the same up to rounding.

    Raises
    ------
    ConversionError
        If the model is none.
    """
    _check_model(model)
    replacements: dict[int, tuple[nn.Module, nn.Module]] = {}
    packed: dict[int, tuple[nn.Module, nn.Module]] = {}
    for module in model.modules():
        if isinstance(module, ProjectedAttention):
            whole = module.pack()
            packed[id(module)] = (module, whole)
            out = module.out_proj
            if isinstance(out, FactorizedLayer):  # once, where several attention modules share it
                whole.out_proj = replacements.setdefault(id(out), (out, whole.out_proj))[1]  # type: ignore[assignment]
    parents = [module for module in model.modules() if id(module) not in packed]
    for module in (model, *(child for parent in parents for child in parent.children())):
        if isinstance(module, FactorizedLayer) and id(module) not in replacements:
            replacements[id(module)] = (module, module.to_module())
    return swap(model, replacements, inplace, packed)


def summarize(model: nn.Module) -> ConversionPlan:
    """The layers of a model as they are: the factorized ones with what they save, and those that are dense.

    Returns
    -------
    ConversionPlan
        Prints as a table. `error` is that of the weight when it was decomposed, before any training. Of a frozen
        layer the dense weight counts, beside the cores.

    Raises
    ------
    ConversionError
        If the model is none.
    """
    _check_model(model)
    entries: dict[str, Entry] = {}
    work = _work(model)
    for layer in scan(model):
        entries[layer.name] = entry_for(layer, work).dense(layer.obstacle or "not converted", bool(layer.obstacle))
    names = module_names(model)
    sharing: dict[int, str] = {}
    total = _parameters(model)
    for name, module in model.named_modules():
        if isinstance(module, FactorizedLayer):
            share = sharing.setdefault(id(module.cores[0]), f"with {name}") if module.stack else ""
            entry = entries[name] = entry_of(name, module, tuple(names[id(module)][1:]), share, work)
            (size, held), cached = entry.parameters, entry.parameters[0] if entry.frozen else 0
            total += size - (held - cached)
    return ConversionPlan([entries[name] for name in in_order(model, entries)], total, "summary", work)


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ConversionError(f"model: an nn.Module; got {type(model).__name__}")


def _check(entry: Entry, found: Mapping[str, Found]) -> None:
    layer = found.get(entry.name)
    if layer is None:
        raise ConversionError(f"plan: layer {entry.name!r} is not in this model, or not dense any more")
    obstacle = layer.obstacle
    if layer.folded is not None and not entry.fold:
        obstacle = "parametrized: its weight is computed from other tensors"
    if entry.converted and obstacle:
        raise ConversionError(f"plan: layer {entry.name!r} cannot be converted: {obstacle}")
    model = entry_for(layer, entry.work)
    if model.layer != entry.layer:
        raise ConversionError(f"plan: layer {entry.name!r} is of kind {model.layer!r}; in the plan {entry.layer!r}")
    if model.shape != entry.shape:
        shapes = f"{model.shape} in this model, {entry.shape} in the plan"
        raise ConversionError(f"plan: layer {entry.name!r} has shape {shapes}")
    for key, value in model.settings.items():
        if value != entry.settings[key]:
            values = f"{value!r} in this model, {entry.settings[key]!r} in the plan"
            raise ConversionError(f"plan: layer {entry.name!r} has {key} {values}")


def _together(entries: Sequence[Entry], progress: bool | None, data: Data | None = None) -> Iterator[list[Entry]]:
    """The entries that are converted, those that share cores as one list, in the order of data; a progress bar."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.converted:
            groups.setdefault(f"share {entry.share}" if entry.share else f"layer {entry.name}", []).append(entry)
    for group in groups.values():
        if [entry.stack for entry in group] != [(len(group), k) for k in range(len(group))] and group[0].share:
            raise ConversionError(f"plan: share {group[0].share!r}: the layers of a stack are all there, in order")
        for entry in group:
            if entry.format != group[0].format:
                formats = f"{group[0].format} at {group[0].name!r} and {entry.format} at {entry.name!r}"
                raise ConversionError(f"plan: share {entry.share!r}: one format for all; got {formats}")
    first = {group[0].name: group for group in groups.values()}
    order = list(first) if data is None else data.order(list(first))
    yield from _bar([first[name] for name in order], progress)


def _factorize(group: Sequence[Entry], found: Mapping[str, Found], data: Data | None = None) -> list[FactorizedLayer]:
    """The layers that replace those of one group, which share their cores where they are several."""
    format = group[0].format
    assert format is not None
    if len(group) > 1:
        check_alike(group[0].share, [found[entry.name] for entry in group])
    modules = [found[entry.name].dense for entry in group]
    try:
        moments = None if data is None else data.moments([entry.name for entry in group])
        return list(layer_type(group[0].layer).from_dense_jointly(modules, format, moments))
    except TensorlayersError as error:
        raise ConversionError(f"layer {group[0].name!r}: {error}") from error


def _work(model: nn.Module, rows: int = ROWS, device: str | None = None) -> Work:
    """What costs are stated for; by default on the device of the model's first parameter."""
    first = next((p for p in model.parameters() if p.dtype in DTYPES), None)
    if first is None:
        return Work(rows, device or "cpu")
    on = device or first.device.type
    return Work(rows, on, multiplied_as(first.dtype, on))


def _parameters(model: nn.Module) -> int:
    uninitialized = nn.parameter.UninitializedParameter
    return sum(p.numel() for p in model.parameters() if not isinstance(p, uninitialized))


def _bar(groups: list[list[Entry]], progress: bool | None) -> Iterator[list[Entry]]:
    """Groups of entries under a bar that names the first layer; shown on a terminal, once it takes over a second."""
    bar = tqdm(groups, disable=None if progress is None else not progress, delay=1, unit="layer")
    for group in bar:
        # A refresh shows the bar whatever its delay.
        bar.set_postfix_str(group[0].name, refresh=not bar.disable and bar.format_dict["elapsed"] >= bar.delay)
        yield group
