"""What the tests of embeddings share: random layers and ids, and the comparison with nn.Embedding in float64."""

import math
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from tensorlayers import (
    FactorizedEmbedding,
    gather,
    lookup,
    tensorize,
)
from tensorlayers.formats import available
from tensorlayers.testing import assert_close

FORMATS = [pytest.param(cls(2), id=name) for name, cls in sorted(available().items())]
NAMES = sorted(available())


@contextmanager
def settings_of_the_lookup(wanted=True, sharing=False):
    """Ids are always sorted, and looked up in chunks: of a few rows, or of those that share a core's slice."""
    with pytest.MonkeyPatch.context() as patch:
        if wanted:
            patch.setattr(lookup, "_WORTH_SORTING", 0)
            patch.setattr(lookup, "_FEW_IDS", 0)
            patch.setattr(gather, "_CHUNK_BYTES", {"cpu": 0})
        if sharing:
            patch.setattr(gather, "_SHARED_SLICE", 0)
            patch.setattr(gather, "_SHARED_ROWS", 0)
        yield


def renormed(weight, max_norm, norm_type):
    """What torch's embedding_renorm_ makes of all rows, with the gradient of a constant factor."""
    if max_norm is None:
        return weight
    norms = weight.detach().norm(norm_type, dim=1, keepdim=True)
    return weight * torch.where(norms > max_norm, max_norm / (norms + 1e-7), torch.ones_like(norms))


def check_embedding(layer, ids):
    """Output and every gradient are those of the dense table, whose gradient goes on into the cores."""
    y = layer(ids)
    weight = renormed(layer.to_dense(), layer.max_norm, layer.norm_type)
    truth = F.embedding(ids, weight, layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq)
    assert y.shape == truth.shape
    assert_close(y, truth, y.dtype, "output")
    assert_close(y, layer.to_module()(ids), y.dtype, "nn.Embedding's output")
    probe = torch.randn_like(y)
    gradients = (torch.autograd.grad(out, list(layer.cores), probe) for out in (y, truth))
    for k, (ours, dense) in enumerate(zip(*gradients, strict=True)):
        assert_close(ours, dense, y.dtype, f"gradient of core {k}")


@st.composite
def layers(draw, name, cls=FactorizedEmbedding, **options):
    """A small table of any size and modes, with any options."""
    rows, columns = draw(st.integers(2, 60)), draw(st.integers(2, 12))
    kind = available()[name]
    changes = {"rank": draw(st.integers(1, 3))}
    if kind.order != 1:
        changes["order"] = draw(st.integers(2, 3))
        if draw(st.booleans()):
            first = draw(st.integers(1, 8))
            changes["in_modes"] = (first, -(-rows // first) + draw(st.integers(0, 2)))
            changes["out_modes"] = tensorize.balanced_modes(columns, draw(st.integers(1, 2)))
    format = kind(**changes)
    max_norm = draw(st.sampled_from([None, 0.7, 3]))
    return cls(
        rows,
        columns,
        padding_idx=draw(st.sampled_from([None, 0, -1, rows // 2])),
        max_norm=max_norm,
        norm_type=draw(st.sampled_from([1.0, 2.0, math.inf])),
        **{name: draw(values) for name, values in options.items()},
        dtype=torch.float64,
        format=format,
    )


def ids_of(draw, layer, shape):
    """Ids of a shape, with the last row and the padding row among them."""
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, layer.num_embeddings, shape, generator=generator)
    special = torch.randint(0, 5, shape, generator=generator)
    ids = torch.where(special == 0, layer.num_embeddings - 1, ids)
    return ids if layer.padding_idx is None else torch.where(special == 1, layer.padding_idx, ids)


def check_compiled(layer, backend, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=dynamic)
    for rows in (5, 12):
        ids = torch.randint(0, 17, (rows, 2))
        expected, actual = layer(ids), compiled(ids)
        assert_close(actual, expected, torch.float32)
        gradients = (torch.autograd.grad(y.sum(), list(layer.cores)) for y in (actual, expected))
        for ours, truth in zip(*gradients, strict=True):
            assert_close(ours, truth, torch.float32)
    for wrong in (17, -1):
        with pytest.raises(IndexError):
            compiled(torch.full((12, 2), wrong))
