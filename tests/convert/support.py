"""Small models that the tests of the converter share."""

import warnings
from collections import OrderedDict
from itertools import pairwise

import pytest
import torch
from torch import nn

from tensorlayers import FactorizedLinear, LowRank, convert_model, formats, plan_conversion

FULL = LowRank(10**6)


HALF = LowRank(0.5)


every_format = pytest.mark.parametrize("form", formats.available())


both_ways = pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])


class Net(nn.Module):
    """One of everything that has to be copied: a norm's buffers, a tie, a shared module, a plain tensor, attention."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(96, 64)
        self.first = nn.Linear(64, 128)
        self.norm = nn.BatchNorm1d(128)
        self.second = nn.Linear(128, 64, bias=False)
        self.shared = nn.Linear(64, 64)
        self.twice = nn.ModuleList([self.shared, nn.Tanh(), self.shared])
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.head = nn.Linear(64, 96, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)
        self.constant = torch.ones(64)

    def forward(self, ids):
        x = self.embed(ids) * self.scale + self.constant
        x = self.norm(self.first(x).flatten(0, 1)).view(*ids.shape, 128)
        for module in [self.second, *self.twice]:
            x = module(x)
        x, _ = self.attention(x, x, x)
        return self.head(x)


ATTENTION = [f"attention.{part}" for part in ("q_proj", "k_proj", "v_proj", "out_proj")]


CONVERTED = {"first", "second", "shared", *ATTENTION}


def _ids():
    return torch.randint(0, 96, (3, 5))


def _chain(*features, **kwargs):
    return nn.Sequential(*(nn.Linear(i, o, **kwargs) for i, o in pairwise(features)))


def _named(**modules):
    return nn.Sequential(OrderedDict(modules))


def _factorized(model):
    return {name for name, module in model.named_modules() if isinstance(module, FactorizedLinear)}


def _reasons(model, format=HALF, **kwargs):
    plan = plan_conversion(model, format, errors=False, **kwargs)
    return {entry.name: entry.reason for entry in plan if not entry.converted}


def _state(model):
    """Every tensor of a model, copied: parameters, buffers in and out of the state_dict, gradients, attributes."""
    return {name: tensor.detach().clone() for name, tensor in _tensors(model).items()}


def _tensors(model):
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    tensors |= {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, module in model.named_modules():
        tensors |= {f"{name}.{key}": value for key, value in vars(module).items() if isinstance(value, torch.Tensor)}
    return tensors


def _storages(model):
    return {tensor.untyped_storage().data_ptr() for tensor in _tensors(model).values()}


def _assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def _quietly(model, format, **kwargs):
    """Convert, and fail at any warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return convert_model(model, format, **kwargs)
