"""Fixtures of the tests in Triton's interpreter, which run in a process of their own."""

from __future__ import annotations

from functools import partial

import pytest
from triton.runtime import interpreter

from tests.kernels.support import Watch


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch = Watch(interpreter._interpreter)
    monkeypatch.setattr(interpreter, "_interpreter", watch)
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "create_dot", partial(watch.dot, builder.create_dot))
    return watch
