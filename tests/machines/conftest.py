"""The clock of a known machine, and a place of its own for measured constants."""

import pytest

from tensorlayers import autograd, measure
from tensorlayers.machine import (
    VARIABLE,
    machine,
)
from tests.machines.support import KNOWN, Clock


@pytest.fixture
def clock(monkeypatch):
    """The clock, by which a custom autograd function and the convolutions take what they are known to."""
    clock, product = Clock(), autograd.product

    def custom(*arguments):
        clock.now += KNOWN.function
        return product(*arguments)

    monkeypatch.setattr(autograd, "product", custom)
    monkeypatch.setattr(measure, "measure_conv", lambda clock, repeats: dict(KNOWN.conv))
    monkeypatch.setattr(measure, "share_of_processors", lambda: 1.0)
    with clock:
        yield clock


@pytest.fixture
def home(monkeypatch, tmp_path):
    """An empty directory that the constants are looked for in."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "machines"))
    machine.cache_clear()
    yield tmp_path / "machines"
    machine.cache_clear()
