"""What the tests of plans predict times by: a machine, in place of this one."""

import pytest

from tests.machine import IDEAL, TYPICAL, predict


@pytest.fixture
def ideal(monkeypatch):
    predict(monkeypatch, IDEAL)


@pytest.fixture
def typical(monkeypatch):
    predict(monkeypatch, TYPICAL)
