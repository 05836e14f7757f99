"""Fixtures of the tests in Triton's interpreter, which run in a process of their own."""

from __future__ import annotations

import pytest
from triton.runtime import interpreter

from tests.kernels.support import Watch


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch = Watch(interpreter._interpreter)
    monkeypatch.setattr(interpreter, "_interpreter", watch)
    return watch
