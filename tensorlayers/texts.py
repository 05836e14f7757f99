"""Real text that is on every machine: the standard library's docstrings and sources, split by module."""

from __future__ import annotations

import ast
import hashlib
import itertools
import random
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import ConversionError

PARTS = ("calibration", "test")
_SHARE = 0.6
"""Of the modules whose text is for calibration and training; that of all others is for tests."""

_NOT_LIBRARY = {"site-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data", "encodings"}
"""Folders of other projects, and of tests and tables."""


def docstring_sentences(count: int | None = None, seed: int = 0, part: str | None = None) -> list[str]:
    """Real English sentences: from the docstrings of the standard library's top-level modules.

    Parameters
    ----------
    count : int, optional
        How many, at most; by default all.
    seed : int
        Of their order.
    part : {"calibration", "test"}, optional
        Those of some modules alone, chosen by a hash of their names: about 60 % and 40 %. A sentence of both is for
        tests.

    Returns
    -------
    list of str
        Distinct, 30 to 200 characters each, in a fixed order.

    Raises
    ------
    ConversionError
        If the part is neither.
    """
    _check(part)
    pairs = (
        (file.stem, sentence)
        for file in sorted(_library().glob("*.py"))
        for sentence in sentences_of(_docstrings(_read(file)))
    )
    chosen = _of_part(pairs, part)
    random.Random(seed).shuffle(chosen)
    return chosen[:count]


def library_sentences(part: str | None = None, seed: int = 0) -> list[str]:
    """Real English sentences: from docstrings and comments of the whole standard library, packages included.

    Parameters
    ----------
    part, seed
        As of `docstring_sentences`; with the same part, its sentences are among these.

    Returns
    -------
    list of str
        About 20,000 in all.
    """
    _check(part)
    texts = ((module, text) for module, source in _modules() for text in (*_docstrings(source), *_comments(source)))
    chosen = _of_part(((module, sentence) for module, text in texts for sentence in sentences_of([text])), part)
    random.Random(seed).shuffle(chosen)
    return chosen


def sources(part: str | None = None) -> list[str]:
    """The source code of the standard library, a module each.

    Parameters
    ----------
    part : {"calibration", "test"}, optional
        As of `docstring_sentences`: by a hash of the name of the top-level module or package. What stands in both is
        for tests.

    Returns
    -------
    list of str
        In the order of their paths; tests and tables of characters are left out.
    """
    _check(part)
    return _of_part(_modules(), part)


def _of_part(pairs: Iterable[tuple[str, str]], part: str | None) -> list[str]:
    """The distinct texts, of pairs of a module and a text, that are of a part; those of both are of the second."""
    found: dict[str, set[str]] = {}
    for module, text in pairs:
        found.setdefault(text, set()).add(part_of(module))
    return [text for text, parts in found.items() if part in (None, max(parts, key=PARTS.index))]


def part_of(module: str) -> str:
    """Which part a module belongs to, by a hash of its name."""
    return PARTS[hashlib.sha256(module.encode()).digest()[0] >= 256 * _SHARE]


def sentences_of(texts: Iterable[str]) -> Iterator[str]:
    """The English sentences of some texts, 30 to 200 characters each."""
    for text in texts:
        for sentence in re.split(r"(?<=[.!?])\s+", " ".join(text.split())):
            if 30 <= len(sentence) <= 200 and re.match(r"[A-Z].*[a-z]{3}.*[.!?]$", sentence):
                yield sentence


def _check(part: str | None) -> None:
    if part not in (None, *PARTS):
        raise ConversionError(f"part: one of {', '.join(PARTS)}, or None for all; got {part!r}")


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _modules() -> Iterator[tuple[str, str]]:
    """Name and source of all modules; of packages their name."""
    root = _library()
    for file in sorted(root.rglob("*.py")):
        place = file.relative_to(root)
        if _NOT_LIBRARY.isdisjoint(place.parts) and (source := _read(file)):
            yield place.parts[0].removesuffix(".py"), source


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def _docstrings(source: str) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(source)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""


def _comments(source: str) -> Iterator[str]:
    """Blocks of lines that are comments alone."""
    lines = (line.strip() for line in source.splitlines())
    for commented, block in itertools.groupby(lines, lambda line: line.startswith("#")):
        if commented:
            yield " ".join(line.lstrip("# ") for line in block)
