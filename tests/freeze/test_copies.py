"""Copies, pickles and saved files are not frozen."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import tensorlayers as tl
from tensorlayers import TT
from tensorlayers.testing import assert_close
from tests.freeze.support import (
    build,
    check_thawed,
    each_kind,
    flags,
    spoil,
)


def pickled(layer):
    return pickle.loads(pickle.dumps(layer))


def saved(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = [copy.deepcopy, pickled, saved]


@each_kind
@pytest.mark.parametrize("duplicate", COPIES, ids=[duplicate.__name__ for duplicate in COPIES])
def test_copies_are_not_frozen_and_train_as_before(duplicate, kind):
    layer, args = build(kind)
    layer.cores[0].requires_grad_(False)
    before, expected = flags(layer), layer(*args)
    spoil(layer.freeze())
    other = duplicate(nn.ModuleList([layer]))[0]
    assert_close(other(*args), expected, torch.float32)
    check_thawed(other, args, before)
    assert layer.frozen


def test_a_shallow_copy_shares_the_parameters_as_they_are():
    layer, (x,) = build("linear-tt")
    expected = layer(x)
    spoil(layer.freeze())
    other = copy.copy(layer)
    assert not other.frozen
    assert_close(other(x), expected, torch.float32)
    assert layer.frozen
    assert not any(flags(other))
    layer.unfreeze()
    assert all(flags(other))


def test_states_and_pickles_hold_no_dense_weight():
    layer = tl.FactorizedLinear(64, 64, format=TT(2))
    keys, size = list(layer.state_dict()), len(pickle.dumps(layer))
    modules, tensors = list(layer.modules()), [*layer.parameters(), *layer.buffers()]
    layer.freeze()
    assert list(layer.state_dict()) == keys
    assert list(layer.modules()) == modules
    assert all(a is b for a, b in zip([*layer.parameters(), *layer.buffers()], tensors, strict=True))
    assert len(pickle.dumps(layer)) - size < 100


def test_a_saved_model_is_not_frozen(tmp_path):
    model = nn.Sequential(tl.FactorizedLinear(12, 10, format=TT(2)))
    x = torch.randn(3, 12)
    expected = model(x)
    tl.save_pretrained(tl.freeze(model), tmp_path)
    assert model[0].frozen
    loaded = tl.load_pretrained(tmp_path, nn.Sequential(nn.Linear(12, 10)))
    assert not loaded[0].frozen
    assert_close(loaded(x), expected, torch.float32)
