"""Local Hugging Face directories: loading the dense model and its tokenizer. Nothing is downloaded."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from torch import nn

from .errors import CheckpointError


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
    if not (Path(directory) / "config.json").is_file():
        raise CheckpointError(f"{directory}: a local Hugging Face directory with a config.json; there is none")
    try:
        config = package.AutoConfig.from_pretrained(directory, local_files_only=True)
        names = getattr(config, "architectures", None) or []
        cls = getattr(package, names[0], package.AutoModel) if names else package.AutoModel
        model: nn.Module = cls.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{directory}: transformers cannot load it: {error}") from None
    return model.eval()


def load_tokenizer(directory: str | os.PathLike[str]) -> Any:
    """Load the tokenizer of a local directory.

    Raises
    ------
    CheckpointError
        If it has none.
    """
    try:
        return transformers().AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{directory}: no tokenizer: {error}") from None
