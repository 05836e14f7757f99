"""The factorized layer kinds by name, as plans and files know them."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import NetworkError
from .base import FactorizedLayer


def layer_types() -> tuple[type[FactorizedLayer], ...]:
    """The factorized layer kinds there are."""

    def below(cls: type[FactorizedLayer]) -> Iterator[type[FactorizedLayer]]:
        if "kind" in cls.__dict__:
            yield cls
        for child in cls.__subclasses__():
            yield from below(child)

    return tuple(below(FactorizedLayer))  # type: ignore[type-abstract]


def layer_type(kind: str) -> type[FactorizedLayer]:
    """The factorized layer of a kind, as plans and files name it."""
    for cls in layer_types():
        if cls.kind == kind:
            return cls
    raise NetworkError(f"layer kind {kind!r}: one of {', '.join(cls.kind for cls in layer_types())}")
