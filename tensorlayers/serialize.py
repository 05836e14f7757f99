"""save_pretrained / load_pretrained: one safetensors file and one versioned JSON; no pickle, no decomposition on load.

A save writes new weights under a name of their own, and last replaces the JSON that points to them: whatever
interrupts it, the directory holds the old model whole or the new one whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import hub
from .entry import entry_of
from .errors import MALFORMED, CheckpointError, TensorlayersError
from .layers import FactorizedLayer, ProjectedAttention, layer_type
from .plan import ConversionPlan
from .surgery import swap

VERSION = 2
INDEX = "tensorlayers.json"
_WEIGHTS = f"tensorlayers-{'[0-9a-f]' * 12}.safetensors"
_TEMPORARY = ".tensorlayers-*.tmp"


def save_pretrained(model: nn.Module, directory: str | os.PathLike[str], *, source: str | None = None) -> None:
    """Save a model with factorized layers.

    Parameters
    ----------
    model : nn.Module
        Of a Hugging Face model, the configuration is written too, and the tokenizer and generation files are
        copied from the directory that it was loaded from.
    directory : path
        Made where it is missing. Files that this function did not write are kept.
    source : path, optional
        The directory of the dense model, where the model itself does not know it; recorded for comparisons.

    Raises
    ------
    CheckpointError
        If `directory` is a file, or the model's state is not made of tensors.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory}: a directory; it is a file")
    tensors, tied, transient = _state(model)
    hugging_face = hub.is_hugging_face(model)
    if source is None and hugging_face:
        source = hub.source_of(model)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise CheckpointError(f"{directory}: a directory; a file is in its place") from None
    for stale in directory.glob(_TEMPORARY):
        shutil.rmtree(stale, ignore_errors=True)
    token = uuid.uuid4().hex[:12]
    weights = f"tensorlayers-{token}.safetensors"
    index = {
        "version": VERSION,
        "weights": weights,
        "model": type(model).__name__,
        "library": "transformers" if hugging_face else None,
        "source": _dense_source(source),
        # In the index too, so that it is replaced together with what it describes.
        "config": hub.configuration(model) if hugging_face else None,
        "generation": hub.generation(model) if hugging_face else None,
        "layers": _layers(model),
        "unpacked": [name for name, module in model.named_modules() if isinstance(module, ProjectedAttention)],
        "tied": tied,
        "transient": transient,
        "buffers": [name for name, _ in model.named_buffers()],
    }
    text = json.dumps(index, indent=1)
    work = directory / f".tensorlayers-{token}.tmp"
    try:
        work.mkdir()
        save_file(tensors, work / weights, metadata={"format": "pt"})
        (work / INDEX).write_text(text, encoding="utf-8")
        files = [weights]
        if hugging_face:
            files += hub.write_companions(model, work / "companions", source)
        for name in [*files, INDEX]:
            with open(work / name, "rb") as file:
                os.fsync(file.fileno())
            os.replace(work / name, directory / Path(name).name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if _current(directory) != weights:
            (directory / weights).unlink(missing_ok=True)
    for old in directory.glob(_WEIGHTS):
        if old.name != weights:
            old.unlink(missing_ok=True)


def load_pretrained(directory: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Load what `save_pretrained` wrote. Nothing is decomposed.

    Parameters
    ----------
    directory : path
    model : nn.Module, optional
        The dense (or converted) architecture, with any values, for a model that is not Hugging Face's. It is not
        changed: a copy is returned, of which the factorized layers replace the dense ones.

    Returns
    -------
    nn.Module
        In evaluation mode where it is a Hugging Face model, in the mode of `model` otherwise.

    Raises
    ------
    CheckpointError
        If a file is missing, damaged, of an unknown version or format, or outside the directory; if a tensor is
        missing, left over or of a wrong shape; or if a layer does not fit the model. The offender is named.
    """
    directory = Path(directory)
    index = _read_index(directory)
    tensors = _read_tensors(directory, index)
    layers = {name: _read_layer(name, item) for name, item in index["layers"].items()}
    training = model.training if model is not None else False
    dense = _architecture(directory, index) if model is None else model
    result = _with_layers(dense, layers, index["unpacked"], inplace=model is None)
    _assign(result, tensors, index)
    return result.train(training) if model is None else result


def read_index(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The validated JSON of a saved directory, as plain data.

    Raises
    ------
    CheckpointError
        As `load_pretrained`.
    """
    return _read_index(Path(directory))


def inspect(directory: str | os.PathLike[str]) -> ConversionPlan:
    """The factorized layers of a saved directory, without building the model.

    Returns
    -------
    ConversionPlan
        Its parameter counts are those of the whole model.

    Raises
    ------
    CheckpointError
        As `load_pretrained`.
    """
    directory = Path(directory)
    index = _read_index(directory)
    tensors = _read_tensors(directory, index)
    entries = [entry_of(name, _read_layer(name, item)) for name, item in index["layers"].items()]
    names = {name for name in tensors if name not in index["transient"]}
    stored = sum(tensors[name].numel() for name in names - set(index["buffers"]))
    saved = sum(before - after for before, after in (entry.parameters for entry in entries))
    return ConversionPlan(entries, stored + saved, f"{index['model']} in {directory}")


def _state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """All tensors once, the aliases of those that are shared, and the names of buffers outside the state_dict."""
    state: dict[str, Any] = dict(model.state_dict(keep_vars=True))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    known = {*buffers, *(name for name, _ in model.named_parameters(remove_duplicate=False))}
    for name, value in state.items():
        if name not in known or not isinstance(value, Tensor):
            raise CheckpointError(f"{name}: parameters and buffers can be saved; got {type(value).__name__}")
        if value.is_meta:
            raise CheckpointError(f"{name}: it is on the meta device, without values to save")
    # Values that are computed at construction, but follow the model's dtype: kept so that a reload is identical.
    transient = [name for name in buffers if name not in state and not buffers[name].is_meta]
    state.update({name: buffers[name] for name in transient})
    first: dict[object, str] = {}
    tied: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        # The same tensor, or another that is the same memory.
        where = (
            (value.device, value.data_ptr(), value.dtype, value.shape, value.stride(), type(value))
            if value.numel()
            else id(value)
        )
        if where in first:
            tied[name] = first[where]
        else:
            first[where] = name
            # A copy where memory is shared without the tensors being one: a file holds each on its own.
            tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return tensors, tied, transient


def _layers(model: nn.Module) -> dict[str, Any]:
    return {
        name: {
            "kind": module.kind,
            "error": module.error,
            "output_error": module.output_error,
            **module.config(),
        }
        for name, module in model.named_modules()
        if isinstance(module, FactorizedLayer)
    }


def _read_index(directory: Path) -> dict[str, Any]:
    path = directory / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{directory}: what save_pretrained wrote has {INDEX}; it is missing") from None
    except NotADirectoryError:
        raise CheckpointError(f"{directory}: a directory; it is a file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged, not JSON: {error}") from None
    if not isinstance(index, dict) or index.get("version") != VERSION:
        version = index.get("version") if isinstance(index, dict) else None
        raise CheckpointError(f"{path}: version {VERSION} is known; got {version!r}")
    expected = {"weights": str, "model": str, "layers": dict, "tied": dict}
    expected |= dict.fromkeys(["unpacked", "transient", "buffers"], list)
    for key, kind in expected.items():
        if not isinstance(index.get(key), kind):
            raise CheckpointError(f"{path}: {key!r} is a {kind.__name__}; got {index.get(key)!r}")
        if kind is list and not all(isinstance(name, str) for name in index[key]):
            raise CheckpointError(f"{path}: {key!r} lists names; got {index[key]!r}")
    return index


def _current(directory: Path) -> str | None:
    """The weights that the index on disk points to."""
    try:
        return str(_read_index(directory)["weights"])
    except CheckpointError:
        return None


def _dense_source(source: str | None) -> str | None:
    """The directory of the dense model: what `source` was converted from, where it is a converted model itself."""
    if not source or not os.path.isdir(source):
        return source
    with contextlib.suppress(CheckpointError):
        recorded: str | None = _read_index(Path(source)).get("source")
        return recorded
    return os.path.abspath(source)


def _read_tensors(directory: Path, index: Mapping[str, Any]) -> dict[str, Tensor]:
    name = index["weights"]
    path = directory / name
    try:
        inside = Path(name).name == name and path.resolve().parent == directory.resolve()
        present = path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        inside = present = False
    if not inside:
        raise CheckpointError(f"{directory / INDEX}: weights lie in the directory itself; got {name!r}")
    if not present:
        raise CheckpointError(f"{path}: the weights' file is missing")
    try:
        with safe_open(path, framework="pt") as file:
            # Cloned: the model must not depend on a file that the next save removes.
            return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged or truncated: {error}") from None


def _read_layer(name: str, item: Any) -> FactorizedLayer:
    if not isinstance(item, Mapping):
        raise CheckpointError(f"layer {name!r}: an object; got {item!r}")
    try:
        if "kind" not in item:
            raise KeyError("kind")
        layer = layer_type(item["kind"]).from_config(item)
        stated = [item.get(key) for key in ("error", "output_error")]
        layer.error, layer.output_error = (float(one) if isinstance(one, (int, float)) else None for one in stated)
    except TensorlayersError as error:
        raise CheckpointError(f"layer {name!r}: {error}") from None
    except MALFORMED as error:
        raise CheckpointError(f"layer {name!r}: malformed: {type(error).__name__}: {error}") from None
    return layer


def _architecture(directory: Path, index: Mapping[str, Any]) -> nn.Module:
    if index.get("library") != "transformers":
        raise CheckpointError(f"{directory}: it holds a {index['model']}, not a Hugging Face model: pass `model`")
    return hub.build(index["model"], index.get("config"), index.get("generation"), directory)


def _unpacked(modules: Mapping[str, nn.Module], names: list[str]) -> dict[int, tuple[nn.Module, nn.Module]]:
    """The attention modules of these names with what takes their place, where they are packed."""
    unpacked: dict[int, tuple[nn.Module, nn.Module]] = {}
    for name in names:
        module = modules.get(name)
        if type(module) is nn.MultiheadAttention:
            unpacked[id(module)] = (module, ProjectedAttention.unpack(module, copy_weights=False))
        elif not isinstance(module, ProjectedAttention):
            found = "nothing" if module is None else f"a {type(module).__name__}"
            raise CheckpointError(f"unpacked: an nn.MultiheadAttention was at {name!r}; the model has {found} there")
    return unpacked


def _with_layers(
    model: nn.Module, layers: Mapping[str, FactorizedLayer], unpacked: list[str], inplace: bool
) -> nn.Module:
    """The model, or a copy, with its attention of the names `unpacked` and its dense layers of these names replaced."""
    modules = dict(model.named_modules(remove_duplicate=False))
    attention = _unpacked(modules, unpacked)
    for name, module in list(modules.items()):
        if id(module) in attention:
            parts = attention[id(module)][1].named_children()
            modules |= {f"{name}.{part}" if name else part: child for part, child in parts}
    replacements: dict[int, tuple[nn.Module, nn.Module]] = {}
    for name, layer in layers.items():
        if name not in modules:
            raise CheckpointError(f"layer {name!r}: the model has no module of this name")
        module = modules[name]
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(weight, nn.parameter.UninitializedParameter):
            raise CheckpointError(f"layer {name!r}: the model's layer is lazy; it has no shape yet")
        dense = type(layer).matches(module) is not None
        alike = dense or isinstance(module, type(layer))
        settings = type(layer).settings_of(module) if alike else {}
        shape = type(layer).shape_of(settings) if alike else None
        if weight is None or shape != layer.weight_shape:
            found = f"the model has a {type(module).__name__} of shape {shape}"
            raise CheckpointError(f"layer {name!r}: its dense weight has shape {layer.weight_shape}; {found}")
        if (bias is None) != (layer.bias is None):
            has = "no bias; the model's layer has one" if layer.bias is None else "a bias; the model's layer has none"
            raise CheckpointError(f"layer {name!r}: it was saved with {has}")
        for key, value in layer.settings_of(layer).items():
            if settings[key] != value:
                values = f"{value!r}; in the model it is {settings[key]!r}"
                raise CheckpointError(f"layer {name!r}: it was saved with {key} {values}")
        if not weight.is_meta:
            layer.to_empty(device=weight.device)
        layer.cores.requires_grad_(weight.requires_grad)
        if layer.bias is not None and bias is not None:
            layer.bias.requires_grad_(bias.requires_grad)
        layer.train(module.training)
        replacements[id(module)] = (module, layer)
    return swap(model, replacements, inplace, attention)


def _assign(model: nn.Module, tensors: Mapping[str, Tensor], index: Mapping[str, Any]) -> None:
    """Put every tensor in its place, in the dtype of the file and on the device of the model; ties are kept."""
    tied = {str(alias): str(name) for alias, name in index["tied"].items()}
    transient = set(index["transient"])
    wanted = model.state_dict(keep_vars=True)
    have = (set(tensors) | set(tied)) - transient
    file = index["weights"]
    missing, extra = sorted(set(wanted) - have), sorted(have - set(wanted))
    if missing:
        raise CheckpointError(f"{file}: tensor {missing[0]!r} is missing ({len(missing)} in all)")
    if extra:
        raise CheckpointError(f"{file}: tensor {extra[0]!r} has no place in the model ({len(extra)} in all)")
    for name, target in wanted.items():
        source = tied.get(name, name)
        if source not in tensors:
            raise CheckpointError(f"{INDEX}: {name!r} is tied to {source!r}, which the file does not have")
        if tensors[source].shape != target.shape:
            shapes = f"{tuple(target.shape)}; the file has {tuple(tensors[source].shape)}"
            raise CheckpointError(f"tensor {name!r}: the model has shape {shapes}")
    placed: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        for slots in (module._parameters, module._buffers):
            for key, old in slots.items():
                name = f"{prefix}.{key}" if prefix else key
                name = tied.get(name, name)
                if old is None or name not in tensors or tensors[name].shape != old.shape:
                    continue
                if name not in placed:
                    value = tensors[name].to("cpu" if old.is_meta else old.device)
                    placed[name] = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
                slots[key] = placed[name]
