"""Fixtures of the tests in Triton's interpreter, which run in a process of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from triton.runtime import interpreter

from tests.kernels.support import Watch


@pytest.fixture(autouse=True)
def _interpreter(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where kernels are interpreted, what they write to is NaN before."""
    is_interpreted = request.path.name.startswith("interpreted_")
    if is_interpreted:
        assert os.environ.get("TRITON_INTERPRET") == "1", f"{request.path.name}: to be run with TRITON_INTERPRET=1"
        torch.use_deterministic_algorithms(True)
    yield
    if is_interpreted:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch = Watch(interpreter._interpreter)
    monkeypatch.setattr(interpreter, "_interpreter", watch)
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "create_dot", partial(watch.dot, builder.create_dot))
    return watch
