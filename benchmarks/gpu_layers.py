"""Layers of the package on a GPU beside torch's: embeddings, and two linear layers with an activation between."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import gpu_cases as cases
import torch
import torch.nn.functional as F
from gpu_cases import TOLERANCE, Record
from gpu_timing import both, tried
from torch import Tensor, nn

from tensorlayers import backend, gather, lookup


def module_times(ways: dict[str, nn.Module], x: Tensor, width: int) -> Record:
    """The times of modules of the same result."""
    dy = torch.randn(*x.shape[:1], width, device=cases.device, dtype=cases.dtype)
    return {
        name: tried(partial(both, partial(_called, module), x, list(module.parameters()), dy))
        for name, module in ways.items()
    }


def _called(module: nn.Module, x: Tensor, _: Any) -> Tensor:
    found: Tensor = module(x)
    return found


class _Forced(nn.Module):
    """A module under a mode of `use_kernels`."""

    def __init__(self, module: nn.Module, mode: str) -> None:
        super().__init__()
        self.module, self.mode = module, mode

    def forward(self, x: Tensor) -> Tensor:
        """As the module."""
        with backend.use_kernels(self.mode):
            found: Tensor = self.module(x)
        return found


@contextmanager
def as_captured() -> Iterator[None]:
    """Look rows up as where a CUDA graph is captured, where no shape depends on values: ids are not sorted first."""
    with (
        mock.patch.object(lookup, "_is_eager", return_value=False),
        mock.patch.object(gather, "_is_recorded", return_value=True),
    ):
        yield


def _right(module: nn.Module, reference: nn.Module, x: Tensor) -> Record:
    """How a module compares with the same in float64, and with itself."""
    first, again = (_results(module, x) for _ in range(2))
    exact = _results(reference.double(), x.double() if x.is_floating_point() else x)
    errors = cases.errors(first, exact)
    same = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    return {"errors": errors, "reruns_agree": same, "passed": same and max(errors) <= 2 * TOLERANCE[cases.dtype]}


def _results(module: nn.Module, x: Tensor) -> list[Tensor]:
    y = module(x)
    dy = torch.linspace(-1, 1, y.shape[-1], device=y.device, dtype=y.dtype).expand_as(y)
    return [y.detach(), *torch.autograd.grad(y, list(module.parameters()), dy)]


def lookups() -> list[Record]:
    """Embeddings: torch's of the dense table, and factorized ones, by the kernels and by torch's operations."""
    if importlib.util.find_spec("tensorly") is None:
        return []
    from tensorlayers.formats import TT
    from tensorlayers.layers.embedding import FactorizedEmbedding

    vocabulary, width, formats = (50257, 768, (TT(16), TT(64), TT(32, order=3)))
    counts: tuple[int, ...] = (4096, 65536)
    if cases.is_dry:
        vocabulary, width, formats, counts = 30, 12, (TT(2),), (3,)
    records = []
    for count in counts:
        ids = torch.randint(vocabulary, (count,), device=cases.device)
        like = {"device": cases.device, "dtype": cases.dtype}
        dense = nn.Embedding(vocabulary, width, **like)
        for format in formats:
            layer = FactorizedEmbedding(vocabulary, width, format=format, **like)
            record: Record = {"format": str(format), "rows": count}
            reference = _Forced(copy.deepcopy(layer), "torch")
            ways = {"dense": dense, **{mode: _Forced(layer, mode) for mode in ("triton", "torch")}}
            record["parity, eager"] = tried(partial(_right, ways["triton"], reference, ids))
            with as_captured():
                record["parity"] = tried(partial(_right, ways["triton"], reference, ids))
                records.append(record | module_times(ways, ids, width))
    return records


def mlps() -> list[Record]:
    """Two layers with an activation between: dense ones, and a FactorizedMLP."""
    if importlib.util.find_spec("tensorly") is None:
        return []
    from tensorlayers.formats import TT
    from tensorlayers.layers.mlp import FactorizedMLP

    rows, width, rank = (3, 16, 2) if cases.is_dry else (4096, 1024, 8)
    records = []
    for activation in ("gelu",) if cases.is_dry else ("gelu", "swiglu"):
        like = {"device": cases.device, "dtype": cases.dtype, "bias": False}
        mlp = FactorizedMLP(width, 4 * width, activation=activation, format=TT(rank), **like)
        sizes = [(width, 4 * width)] * (2 if mlp.is_gated else 1)
        up, *gate = (nn.Linear(*size, **like) for size in sizes)
        down = nn.Linear(4 * width, width, **like)
        dense = _Plain(up, gate, down)
        x = torch.randn(rows, width, device=cases.device, dtype=cases.dtype)
        record: Record = {"activation": activation, "rows": rows, "rank": rank}
        record["parity"] = tried(partial(_right, mlp, copy.deepcopy(mlp), x))
        records.append(record | module_times({"dense": dense, "factorized": mlp}, x.requires_grad_(), width))
    return records


class _Plain(nn.Module):
    """A dense MLP as it is written by hand."""

    def __init__(self, up: nn.Module, gate: list[nn.Module], down: nn.Module) -> None:
        super().__init__()
        self.up, self.gate, self.down = up, nn.ModuleList(gate), down

    def forward(self, x: Tensor) -> Tensor:
        """GELU, or SwiGLU."""
        hidden = F.silu(self.gate[0](x)) * self.up(x) if self.gate else F.gelu(self.up(x))
        found: Tensor = self.down(hidden)
        return found
