"""Small models and damaged files that the tests of saving share."""

import json

import pytest
import torch
import transformers
from torch import nn

from tensorlayers import FactorizedLinear, LowRank, convert_model, formats

INDEX = "tensorlayers.json"


every_format = pytest.mark.parametrize("form", formats.available())


class Net(nn.Module):
    """Tied, shared, normalised, with buffers in and out of the state_dict."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.up = nn.Linear(16, 48)
        self.norm = nn.BatchNorm1d(48)
        self.down = nn.Linear(48, 16, bias=False)
        self.shared = nn.Linear(16, 16)
        self.again = self.shared
        self.head = nn.Linear(16, 32)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.rand(16))
        self.register_buffer("shift", torch.rand(16), persistent=False)

    def forward(self, ids):
        x = self.embed(ids) * self.scale + self.shift
        x = self.down(self.norm(self.up(x)))
        return self.head(self.again(self.shared(x)))


CONVERTED = {"up", "down", "shared"}


def _ids():
    return torch.arange(12)


def _chain():
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16, bias=False), nn.Linear(16, 4))


def _converted(build=_chain, format=None):
    keys = {"3": None, "*": format or formats.get("tt")(2)} if build is _chain else format or LowRank(4)
    return convert_model(build(), keys, force=True).eval()


def _bert(**kwargs):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, **kwargs}
    config = transformers.BertConfig(vocab_size=30, max_position_embeddings=16, **sizes)
    return transformers.BertForMaskedLM(config).eval()


def _tensors(model):
    return dict(model.state_dict(keep_vars=True)) | dict(model.named_buffers(remove_duplicate=False))


def _assert_same(actual, expected):
    """Bit for bit, dtype and device included."""
    actual, expected = _tensors(actual), _tensors(expected)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (actual[name].dtype, actual[name].device) == (tensor.dtype, tensor.device), name
        assert type(actual[name]) is type(tensor), name
        assert torch.equal(actual[name], tensor), name


def _is(model, other):
    ours, theirs = _tensors(model), _tensors(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def _factorized(model):
    return {name for name, module in model.named_modules() if isinstance(module, FactorizedLinear)}


def _index(directory):
    return json.loads((directory / INDEX).read_text())


def _write(directory, index):
    (directory / INDEX).write_text(json.dumps(index))


def _weights(directory):
    (path,) = directory.glob("*.safetensors")
    return path


def _files(directory):
    return sorted(path.name for path in directory.iterdir())
