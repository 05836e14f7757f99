"""save_pretrained / load_pretrained: one safetensors file and one versioned JSON; no pickle, no decomposition on load.

A save writes new weights under a name of their own, and last replaces the JSON that points to them: whatever
interrupts it, the directory holds the old model whole or the new one whole.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import CheckpointError, TensorlayersError
from .layers import FactorizedLayer, layer_type
from .plan import ConversionPlan, entry_of

VERSION = 1
INDEX = "tensorlayers.json"
_WEIGHTS = "tensorlayers-*.safetensors"
_TEMPORARY = ".tensorlayers-*.tmp"

_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*preprocessor_config.json",
    "processor_config.json",
    "chat_template.*",
    "generation_config.json",
    "LICENSE*",
)
"""Files of a Hugging Face directory, beside its configuration and weights, that a converted model needs too."""


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
    config = getattr(model, "config", None)
    hugging_face = hasattr(config, "save_pretrained") and type(model).__module__.startswith("transformers.")
    if source is None and hugging_face:
        source = getattr(config, "name_or_path", None) or None
    directory.mkdir(parents=True, exist_ok=True)
    for stale in directory.glob(_TEMPORARY):
        shutil.rmtree(stale, ignore_errors=True)
    weights = f"tensorlayers-{uuid.uuid4().hex[:12]}.safetensors"
    index = {
        "version": VERSION,
        "weights": weights,
        "model": type(model).__name__,
        "library": "transformers" if hugging_face else None,
        "source": os.path.abspath(source) if source and os.path.isdir(source) else source,
        "layers": _layers(model),
        "tied": tied,
        "transient": transient,
    }
    text = json.dumps(index, indent=1)
    work = Path(tempfile.mkdtemp(prefix=".tensorlayers-", suffix=".tmp", dir=directory))
    committed = False
    try:
        save_file(tensors, work / weights, metadata={"format": "pt"})
        (work / INDEX).write_text(text, encoding="utf-8")
        files = [weights]
        if hugging_face:
            files += _companions(model, work, source)
        for name in [*files, INDEX]:
            with open(work / name, "rb") as file:
                os.fsync(file.fileno())
            os.replace(work / name, directory / name)
        committed = True
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if not committed:
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
    result = _with_layers(dense, layers)
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
    stored = sum(tensors[name].numel() for name in names)
    saved = sum(before - after for before, after in (entry.parameters for entry in entries))
    return ConversionPlan(entries, stored + saved, f"{index['model']} in {directory}")


def _state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """All tensors once, the aliases of those that are shared, and the names of buffers outside the state_dict."""
    state: dict[str, Any] = dict(model.state_dict(keep_vars=True))
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{name}: a state of tensors can be saved; got {type(value).__name__}")
        if value.is_meta:
            raise CheckpointError(f"{name}: it is on the meta device, without values to save")
    buffers = dict(model.named_buffers(remove_duplicate=False))
    # Values that are computed at construction, but follow the model's dtype: kept so that a reload is identical.
    transient = [name for name in buffers if name not in state and not buffers[name].is_meta]
    state.update({name: buffers[name] for name in transient})
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if id(value) in first:
            tied[name] = first[id(value)]
        else:
            first[id(value)] = name
            # A copy where memory is shared without the tensors being one: a file holds each on its own.
            tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return tensors, tied, transient


def _layers(model: nn.Module) -> dict[str, Any]:
    return {
        name: {"kind": module.kind, "error": module.error, **module.config()}
        for name, module in model.named_modules()
        if isinstance(module, FactorizedLayer)
    }


def _companions(model: nn.Module, work: Path, source: str | None) -> list[str]:
    """Write a Hugging Face model's configuration and its source's other files into `work`; their names."""
    config: Any = model.config
    written = copy.deepcopy(config)
    written.architectures = [type(model).__name__]
    written.save_pretrained(work)
    if getattr(model, "generation_config", None) is not None and model.can_generate():  # type: ignore[operator]
        model.generation_config.save_pretrained(work)  # type: ignore[union-attr, operator]
    if source and os.path.isdir(source):
        for pattern in _COMPANIONS:
            for file in Path(source).glob(pattern):
                if file.is_file() and not (work / file.name).exists():
                    shutil.copyfile(file, work / file.name)
    return sorted(file.name for file in work.iterdir() if file.name != INDEX and not file.match(_WEIGHTS))


def _read_index(directory: Path) -> dict[str, Any]:
    path = directory / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{directory}: what save_pretrained wrote has {INDEX}; it is missing") from None
    except NotADirectoryError:
        raise CheckpointError(f"{directory}: a directory; it is a file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: damaged, not JSON: {error}") from None
    if not isinstance(index, dict) or index.get("version") != VERSION:
        version = index.get("version") if isinstance(index, dict) else None
        raise CheckpointError(f"{path}: version {VERSION} is known; got {version!r}")
    expected = {"weights": str, "model": str, "layers": dict, "tied": dict, "transient": list}
    for key, kind in expected.items():
        if not isinstance(index.get(key), kind):
            raise CheckpointError(f"{path}: {key!r} is a {kind.__name__}; got {index.get(key)!r}")
    return index


def _read_tensors(directory: Path, index: Mapping[str, Any]) -> dict[str, Tensor]:
    name = index["weights"]
    path = directory / name
    if Path(name).name != name or path.resolve().parent != directory.resolve():
        raise CheckpointError(f"{directory / INDEX}: weights lie in the directory itself; got {name!r}")
    if not path.is_file():
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
        layer = layer_type(item.get("kind", "")).from_config(item)
    except TensorlayersError as error:
        raise CheckpointError(f"layer {name!r}: {error}") from None
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"layer {name!r}: malformed: {type(error).__name__}: {error}") from None
    stated = item.get("error")
    layer.error = float(stated) if isinstance(stated, (int, float)) else None
    return layer


def _architecture(directory: Path, index: Mapping[str, Any]) -> nn.Module:
    """Build a Hugging Face model from the directory's configuration."""
    if index.get("library") != "transformers":
        raise CheckpointError(f"{directory}: it holds a {index['model']}, not a Hugging Face model: pass `model`")
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise CheckpointError(f"{directory}: a Hugging Face model needs transformers to be installed") from None
    cls: Any = getattr(transformers, index["model"], None)
    found: object = cls
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise CheckpointError(f"{directory}: transformers has no model {index['model']!r}: pass `model`")
    try:
        config = cls.config_class.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory}: the model's config.json: {error}") from None
    with _no_initialization(), torch.device("cpu"):
        model: nn.Module = cls(config)
    return model


@contextlib.contextmanager
def _no_initialization() -> Iterator[None]:
    """Skip the random values that loading overwrites, where this version of transformers has a way to."""
    for place in ("transformers.initialization", "transformers.modeling_utils"):
        with contextlib.suppress(ImportError, AttributeError):
            skip = importlib.import_module(place).no_init_weights
            break
    else:
        skip = contextlib.nullcontext
    with skip():
        yield


def _with_layers(model: nn.Module, layers: Mapping[str, FactorizedLayer]) -> nn.Module:
    """A copy of `model` with its dense layers of these names replaced; their weights are not copied."""
    modules = dict(model.named_modules(remove_duplicate=False))
    memo: dict[int, object] = {}
    for name, layer in layers.items():
        if name not in modules:
            raise CheckpointError(f"layer {name!r}: the model has no module of this name")
        module = modules[name]
        dense = type(layer).matches(module) is not None
        shape = type(layer).dense_shape(module) if dense else getattr(module, "weight_shape", None)
        if shape != layer.weight_shape:
            found = f"the model has a {type(module).__name__} of shape {shape}"
            raise CheckpointError(f"layer {name!r}: its dense weight has shape {layer.weight_shape}; {found}")
        layer.train(module.training)
        memo[id(module)] = layer
    return memo[id(model)] if id(model) in memo else copy.deepcopy(model, memo)  # type: ignore[return-value]


def _assign(model: nn.Module, tensors: Mapping[str, Tensor], index: Mapping[str, Any]) -> None:
    """Put every tensor in its place, in the dtype of the file and on the device of the model; ties are kept."""
    tied = {str(alias): str(name) for alias, name in index["tied"].items()}
    transient = {str(name) for name in index["transient"]}
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
