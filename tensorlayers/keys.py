"""Which layers the keys of a mapping mean: an exact name, ``re:`` and a pattern, ``"*"``; and which go together."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from .errors import ConversionError
from .formats import Format
from .scan import Found

Formats = tuple[Format, ...]
"""What a layer may be converted to; without a budget one format."""

Choice = Mapping[str, "Format | Sequence[Format] | None"]
Shares = Mapping[str, Format]


@dataclass(frozen=True)
class Group:
    """Layers that are factorized jointly.

    Parameters
    ----------
    label : str
        The key, and what its pattern captured.
    format : Format
    members : tuple of Found
        At least two, in the order of the model.
    """

    label: str
    format: Format
    members: tuple[Found, ...]


def choose(
    formats: Format | Sequence[Format] | Choice, found: Sequence[Found], model: nn.Module, several: bool = False
) -> dict[str, tuple[str | None, Formats | None]]:
    """The first matching key of a mapping for each layer, ``"*"`` last, and its formats.

    Parameters
    ----------
    formats : Format, sequence of them, or mapping
        Keys: an exact name, ``re:`` and a pattern that matches the whole name, or ``"*"``. Values: a format, or
        None to leave the layer dense. A format alone is that of ``"*"``.
    several : bool
        Whether there may be several formats in place of one.

    Returns
    -------
    dict
        Layer name -> (key, formats); the key is None where none matches.

    Raises
    ------
    ConversionError
        If a key matches no layer, a pattern is no regular expression, or a value is no format.
    """
    if isinstance(formats, Format) or (several and isinstance(formats, (list, tuple))):
        formats = {"*": formats}
    if not isinstance(formats, Mapping) or not formats:
        raise ConversionError(
            f"formats: a format such as LowRank(0.5), or a mapping of names to those; got {formats!r}"
        )
    given: dict[str, Formats | None] = {}
    for key, value in formats.items():
        some = tuple(value) if several and isinstance(value, (list, tuple)) and value else (value,)
        if not isinstance(key, str) or not (value is None or all(isinstance(one, Format) for one in some)):
            what = "a format, several of them, or None" if several else "a format or None"
            raise ConversionError(f"formats[{key!r}]: a string key, and {what}; got {value!r}")
        given[key] = None if value is None else some
    keys = sorted(given, key=lambda key: key == "*")
    used = {key: key == "*" for key in keys}
    chosen: dict[str, tuple[str | None, Formats | None]] = {}
    for layer in found:
        chosen[layer.name] = (None, None)
        hits = [key for key in keys if any(_key_matches(key, name) for name in (layer.name, *layer.aliases))]
        used.update(dict.fromkeys(hits, True))
        if hits:
            chosen[layer.name] = (hits[0], given[hits[0]])
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
    return _full_match(key, name, "formats") is not None


def _full_match(key: str, name: str, where: str) -> re.Match[str] | None:
    try:
        return re.fullmatch(key[3:], name)
    except re.error as error:
        raise ConversionError(f"{where}[{key!r}]: not a regular expression: {error}") from None


def groups(shares: Shares, found: Sequence[Found]) -> list[Group]:
    """The groups of layers that are to be factorized jointly.

    Parameters
    ----------
    shares : mapping
        Keys: ``re:`` and a pattern that matches the whole name of each layer. Layers for which the pattern captures
        the same text are a group; without capturing parentheses all that match are one. Values: a format.

    Raises
    ------
    ConversionError
        If a key is no pattern or a value no format, a group has fewer than two layers, a layer is in two groups or
        cannot be converted, or the layers of a group are not alike. The offender is named.
    """
    if not isinstance(shares, Mapping):
        raise ConversionError(f"share: a mapping of 're:' patterns to formats; got {shares!r}")
    made: list[Group] = []
    taken: dict[str, str] = {}
    for key, format in shares.items():
        if not isinstance(key, str) or not key.startswith("re:") or not isinstance(format, Format):
            raise ConversionError(f"share[{key!r}]: a key is 're:' and a pattern, its value a format; got {format!r}")
        members: dict[tuple[str | None, ...], list[Found]] = {}
        for layer in found:
            matches = [_full_match(key, name, "share") for name in (layer.name, *layer.aliases)]
            captured = [match.groups() for match in matches if match is not None]
            if captured:
                if taken.setdefault(layer.name, key) != key:
                    raise ConversionError(f"share[{key!r}]: layer {layer.name!r} is in {taken[layer.name]!r} already")
                members.setdefault(captured[0], []).append(layer)
        if not members:
            raise ConversionError(f"share[{key!r}]: a key matches at least two layers that can be factorized; got none")
        for captured_text, layers in members.items():
            label = f"{key} {captured_text}" if captured_text else key
            check_alike(label, layers)
            made.append(Group(label, format, tuple(layers)))
    return made


def check_alike(label: str, layers: Sequence[Found]) -> None:
    """Raise `ConversionError` where these layers cannot share cores."""
    if len(layers) < 2:
        raise ConversionError(f"share[{label!r}]: at least two layers; got {layers[0].name!r} alone")
    for layer in layers:
        if layer.obstacle:
            raise ConversionError(f"share[{label!r}]: layer {layer.name!r} cannot be converted: {layer.obstacle}")
    first = layers[0]
    for layer in layers[1:]:
        ours, theirs = ({k: v for k, v in f.settings.items() if k != "bias"} for f in (layer, first))
        weights = [f.layer.weight_of(f.dense) for f in (layer, first)]
        if layer.layer is not first.layer or ours != theirs:
            raise ConversionError(f"share[{label!r}]: layers are alike; {layer.name!r} is unlike {first.name!r}")
        if weights[0].dtype != weights[1].dtype or weights[0].device != weights[1].device:
            raise ConversionError(
                f"share[{label!r}]: dtype and device are the same; {layer.name!r} differs from {first.name!r}"
            )
        if weights[0].requires_grad != weights[1].requires_grad:
            raise ConversionError(
                f"share[{label!r}]: all weights are frozen or none; {layer.name!r} differs from {first.name!r}"
            )
