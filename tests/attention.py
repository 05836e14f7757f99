"""Attention with random biases, its conversion and its inputs: what the tests of attention share."""

import torch
from torch import nn

import tensorlayers as tl
from tensorlayers import FactorizedLinear, LowRank

FULL = 10**6
PARTS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def _attention(embed=16, heads=4, **options):
    module = nn.MultiheadAttention(embed, heads, **options)
    with torch.no_grad():
        for parameter in module.parameters():  # torch's biases are zero
            parameter.normal_(std=0.5)
    return module


def _convert(module, format=None, **options):
    return tl.convert_model(module, format or LowRank(FULL), force=True, **options)


def _factorized(model):
    return {name for name, module in model.named_modules() if isinstance(module, FactorizedLinear)}


def _inputs(module, rows=5, columns=6, batch=3, same=False, dtype=torch.float64):
    """Query, key and value; without batch where it is None."""
    sizes = [(rows, module.embed_dim), (columns, module.kdim), (columns, module.vdim)]
    if batch is not None:
        sizes = [(batch, n, e) if module.batch_first else (n, batch, e) for n, e in sizes]
    x = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in sizes]
    return [x[0]] * 3 if same else x
