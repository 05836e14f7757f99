"""What a layer leaves to its user: the implementation of its product, and what is kept for the backward pass."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn

import tensorlayers as tl
from tensorlayers import NetworkError, dispatch
from tensorlayers.layers import layer_type, layer_types
from tensorlayers.layers.dispatched import BACKWARDS, DispatchedLayer

KINDS = [cls.kind for cls in layer_types() if issubclass(cls, DispatchedLayer)]
OTHERS = [cls for cls in layer_types() if not issubclass(cls, DispatchedLayer)]
every_kind = pytest.mark.parametrize("kind", KINDS)
CHOICES = {"implementation": dispatch.NAMES[1], "backward": "store"}


def build(kind, **options):
    cls = layer_type(kind)
    if kind == "linear":
        return cls(256, 256, **options), torch.randn(3, 256)  # not small
    if kind in ("regression", "contraction"):
        layer = cls((4, 6), (3, 5))
        for name, value in options.items():
            setattr(layer, name, value)
        return layer, torch.randn(3, 4, 6)
    return cls(8, 6, 3, **options), torch.randn(2, 8, *[5] * cls.dimensions)


def chosen(layer):
    return {"implementation": layer.implementation, "backward": layer.backward}


def test_the_kinds():
    assert {"linear", "conv1d", "conv2d", "conv3d", "conv_transpose2d", "regression", "contraction"} <= set(KINDS)
    for cls in OTHERS:
        assert not hasattr(cls, "implementation")
        assert not hasattr(cls, "backward")


@every_kind
def test_choices_are_kept(kind):
    assert chosen(build(kind)[0]) == {"implementation": None, "backward": "recompute"}
    layer, _ = build(kind, **CHOICES)
    config = json.loads(json.dumps(layer.config()))
    for other in (copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert chosen(other) == CHOICES
    assert chosen(type(layer).from_config(config)) == CHOICES
    del config["implementation"], config["backward"]  # as files had it before
    assert chosen(type(layer).from_config(config)) == {"implementation": None, "backward": "recompute"}


@every_kind
def test_choices_are_handed_to_the_dispatcher(kind, monkeypatch):
    seen = []

    def watched(function):
        def call(*args, **kwargs):
            seen.append({name: kwargs.pop(name) for name in CHOICES})
            return function(*args, **kwargs)  # without them: whether they can be had is the dispatcher's business

        return call

    for name in ("linear", "conv"):
        monkeypatch.setattr(dispatch, name, watched(getattr(dispatch, name)))
    layer, x = build(kind, **CHOICES)
    layer(x)
    layer.implementation, layer.backward = None, "auto"
    layer(x)
    assert seen == [CHOICES, {"implementation": None, "backward": "auto"}]


@every_kind
def test_wrong_choices_are_refused(kind):
    layer, _ = build(kind)
    for name in ("dense", "fastest", 3, ["merged"]):
        with pytest.raises(NetworkError, match=r"implementation: None or one of contraction, .*; got"):
            layer.implementation = name
    for mode in ("keep", None, True, ["store"]):
        with pytest.raises(NetworkError, match=r"backward: one of recompute, store, auto; got"):
            layer.backward = mode
    assert chosen(layer) == {"implementation": None, "backward": "recompute"}
    for name in dispatch.NAMES:
        layer.implementation = name
    for mode in BACKWARDS:
        layer.backward = mode
    with pytest.raises(NetworkError, match="backward: "):
        build(kind, backward="keep")
    with pytest.raises(NetworkError, match="implementation: "):
        type(layer).from_config({**layer.config(), "implementation": "dense"})


def test_choices_are_saved(tmp_path):
    model = nn.Sequential(tl.FactorizedLinear(12, 10, **CHOICES), tl.FactorizedEmbedding(20, 12))
    tl.save_pretrained(model, tmp_path)
    loaded = tl.load_pretrained(tmp_path, nn.Sequential(nn.Linear(12, 10), nn.Embedding(20, 12)))
    assert chosen(loaded[0]) == CHOICES


def test_the_projections_of_an_attention_have_choices():
    model = tl.convert_model(nn.MultiheadAttention(16, 2), tl.LowRank(4), force=True)
    model.q_proj.implementation = CHOICES["implementation"]
    assert copy.deepcopy(model).q_proj.implementation == CHOICES["implementation"]
