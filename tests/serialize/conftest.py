"""Fixtures of the tests of saving."""

import pytest

from tensorlayers import save_pretrained
from tests.serialize.support import _converted


@pytest.fixture
def saved(tmp_path):
    """A directory with a saved model: Sequential(TT, Tanh, TT, Linear)."""
    save_pretrained(_converted(), tmp_path / "saved")
    return tmp_path / "saved"
