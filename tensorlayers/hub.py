"""Hugging Face models: local directories and what they hold beside weights. Nothing is downloaded."""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import CheckpointError

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


def transformers() -> Any:
    """The transformers package, or an error that says how to get it."""
    try:
        return importlib.import_module("transformers")
    except ImportError:
        message = "Hugging Face models need transformers: pip install 'tensorlayers[transformers]'"
        raise CheckpointError(message) from None


def load_model(directory: str | os.PathLike[str]) -> nn.Module:
    """Load the model of a local directory, as the class that its configuration names.

    Parameters
    ----------
    directory : path

    Returns
    -------
    nn.Module
        In evaluation mode.

    Raises
    ------
    CheckpointError
        If it is no directory with a config.json and weights that transformers can load.
    """
    package = transformers()
    directory = Path(directory)
    if (directory / "tensorlayers.json").is_file():
        raise CheckpointError(f"{directory}: a dense model; this one is converted already (see load_pretrained)")
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory}: a local Hugging Face directory with a config.json; there is none")
    try:
        config = package.AutoConfig.from_pretrained(directory, local_files_only=True)
        names = getattr(config, "architectures", None) or []
        cls = (_model_class(package, names[0]) if names else None) or package.AutoModel
        model: nn.Module = cls.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # whatever transformers makes of a damaged directory
        raise CheckpointError(f"{directory}: transformers cannot load it: {_first_line(error)}") from None
    return model.eval()


def _model_class(package: Any, name: str) -> Any:
    """The model of transformers of this name; None where there is none."""
    found: object = getattr(package, name, None)
    return found if isinstance(found, type) and issubclass(found, package.PreTrainedModel) else None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def load_tokenizer(directory: str | os.PathLike[str]) -> Any:
    """Load the tokenizer of a local directory.

    Raises
    ------
    CheckpointError
        If it has none.
    """
    try:
        return transformers().AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # whatever transformers makes of what it finds
        raise CheckpointError(f"{directory}: no tokenizer: {_first_line(error)}") from None


def is_hugging_face(model: nn.Module) -> bool:
    """Whether a model is one of transformers' own classes."""
    return hasattr(getattr(model, "config", None), "save_pretrained") and type(model).__module__.startswith(
        "transformers."
    )


def source_of(model: nn.Module) -> str | None:
    """The directory that a model was loaded from, where it knows it."""
    return getattr(model.config, "name_or_path", None) or None


def configuration(model: nn.Module) -> dict[str, Any]:
    """The model's configuration as plain data."""
    data: dict[str, Any] = json.loads(_config(model).to_json_string(use_diff=False))
    return data


def generation(model: Any) -> dict[str, Any] | None:
    """The generation settings as plain data; None where the model does not generate."""
    if getattr(model, "generation_config", None) is None or not model.can_generate():
        return None
    data: dict[str, Any] = json.loads(model.generation_config.to_json_string())
    return data


def write_companions(model: Any, folder: Path, source: str | None) -> list[str]:
    """Write a model's configuration, and its source's tokenizer and like files, into a new folder.

    Returns
    -------
    list of str
        Their paths from the folder's parent.
    """
    folder.mkdir()
    _config(model).save_pretrained(folder)
    if generation(model) is not None:
        model.generation_config.save_pretrained(folder)
    if source and os.path.isdir(source):
        for pattern in _COMPANIONS:
            for file in Path(source).glob(pattern):
                if file.is_file() and not (folder / file.name).exists():
                    shutil.copyfile(file, folder / file.name)
    return sorted(f"{folder.name}/{file.name}" for file in folder.iterdir())


def build(name: str, config: Any, generation: Any, directory: Path) -> nn.Module:
    """Build a model of transformers from plain data, without loading weights.

    Parameters
    ----------
    name : str
        Of a class in transformers.
    config, generation : dict
        As `configuration` and `generation` gave them.
    directory : path
        For errors, and as the model's ``config.name_or_path``.

    Raises
    ------
    CheckpointError
        If there is no such class, or it refuses the configuration.
    """
    package = transformers()
    cls = _model_class(package, name)
    if cls is None or not cls.config_class:
        raise CheckpointError(f"{directory}: transformers has no model {name!r}: pass `model`")
    try:
        settings = cls.config_class.from_dict(config)
        settings.name_or_path = str(directory)
        with _no_initialization(), torch.device("cpu"):
            model: nn.Module = cls(settings)
        if generation is not None:
            model.generation_config = package.GenerationConfig.from_dict(generation)
    except Exception as error:  # whatever transformers makes of a damaged configuration
        raise CheckpointError(f"{directory}: the model's configuration: {_first_line(error)}") from None
    return model


def _config(model: nn.Module) -> Any:
    config: Any = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    return config


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
