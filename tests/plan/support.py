"""Small models and plans that the tests of plans share."""

from collections import OrderedDict

import pytest
from torch import nn

import tensorlayers as tl
from tensorlayers import LowRank, formats, plan_conversion

every_format = pytest.mark.parametrize("form", formats.available())


def _model():
    return nn.Sequential(
        OrderedDict(
            up=nn.Linear(256, 1024),
            gate=nn.Linear(256, 1024),
            down=nn.Linear(1024, 256),
            head=nn.Linear(256, 17),
            tiny=nn.Linear(64, 1),
            attention=nn.MultiheadAttention(64, 4),
            lazy=nn.LazyLinear(4),
        )
    )


def _small():
    return nn.Sequential(OrderedDict(first=nn.Linear(64, 96), second=nn.Linear(96, 64), third=nn.Linear(64, 64)))


HALF = LowRank(0.5)


def _plan(model=None, format=HALF, **kwargs):
    return plan_conversion(model or _small(), format, errors=False, **kwargs)


def _factorized(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, tl.FactorizedLinear)}
