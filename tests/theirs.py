"""TensorLy-Torch as the tests need it: imported without a trace, under its own backend, with values."""

import warnings

import pytest
import tensorly
import torch

__all__ = ["drawn", "their_backend", "tltorch"]

_BACKEND = tensorly.get_backend()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import tltorch
# Importing it switches TensorLy's backend for the whole process, and the other tests with it.
tensorly.set_backend(_BACKEND)


@pytest.fixture
def their_backend():
    """TensorLy's backend is torch, within a test."""
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        yield


def drawn(module, dtype=torch.float64):
    """All values replaced by normal ones (CP's weights are ones at first)."""
    module = module.to(dtype)
    with torch.no_grad():
        for value in module.state_dict().values():
            value.copy_(torch.randn(value.shape))
    return module
