"""What is measured on a GPU: networks, tensors, and the ways to multiply with them.

The package is loaded without its __init__: a machine with a GPU and no network may lack what decompositions and
checkpoints import.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

if "--dry" in sys.argv:  # before Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # others would run beside what is timed

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
if "tensorlayers" not in sys.modules:
    _package = types.ModuleType("tensorlayers")
    _package.__path__ = [str(ROOT / "tensorlayers"), str(ROOT)]
    sys.modules["tensorlayers"] = _package

from tensorlayers import autograd, contraction, decision, products  # noqa: E402
from tensorlayers.activation import activation as activation_of  # noqa: E402
from tensorlayers.network import Network, linear_modes  # noqa: E402

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}  # relative RMS error
TF32 = 3e-3  # that of float32 where it is multiplied so
Modes = tuple[int, ...]
Record = dict[str, Any]
is_dry = "--dry" in sys.argv
"""Whether all is tried in the interpreter, of small sizes."""
device = "cpu" if is_dry else "cuda"
dtype = torch.float16 if is_dry else torch.bfloat16
"""What is timed."""
Item, Result = TypeVar("Item"), TypeVar("Result")


def _sizes(**sizes: int) -> tuple[tuple[str, int], ...]:
    return tuple(sizes.items())


def train(out_modes: Modes, in_modes: Modes, rank: int) -> Network:
    """A tensor train, a core for each pair of modes."""
    count = len(out_modes)
    cores = []
    for k in range(1, count + 1):
        bonds = [f"r{j}" for j in (k - 1, k) if 0 < j < count]
        cores.append((*bonds[: k > 1], f"o{k}", f"i{k}", *bonds[k > 1 :]))
    return Network(tuple(cores), _sizes(**{f"r{k}": rank for k in range(1, count)}), linear_modes(out_modes, in_modes))


def blocks(out_modes: Modes, in_modes: Modes, rank: int) -> Network:
    """A block tensor train of two cores."""
    cores = ("i1", "i2", "o2", "r1"), ("i1", "o1", "o2", "r1")
    return Network(cores, _sizes(r1=rank), linear_modes(out_modes, in_modes))


def tucker(out_modes: Modes, in_modes: Modes, rank: int) -> Network:
    """A factor matrix for each of two modes a side, and a core."""
    names = ("o1", "o2", "i1", "i2")
    cores = (*((name, f"r_{name}") for name in names[:2]), tuple(f"r_{name}" for name in names))
    cores += tuple((f"r_{name}", name) for name in names[2:])  # type: ignore[assignment]
    return Network(cores, _sizes(**{f"r_{name}": rank for name in names}), linear_modes(out_modes, in_modes))


def cp(out_modes: Modes, in_modes: Modes, rank: int) -> Network:
    """A factor matrix for each mode."""
    cores = tuple((name, "r") for name in ("o1", "o2", "i1", "i2"))
    return Network(cores, _sizes(r=rank), linear_modes(out_modes, in_modes))


def low_rank(out_modes: Modes, in_modes: Modes, rank: int) -> Network:
    """Two matrices."""
    modes = linear_modes((math.prod(out_modes),), (math.prod(in_modes),))
    return Network((("o1", "r"), ("r", "i1")), _sizes(r=rank), modes)


FORMATS: dict[str, Callable[[Modes, Modes, int], Network]] = {
    "TT": train,
    "BTT": blocks,
    "Tucker": tucker,
    "CP": cp,
    "LowRank": low_rank,
}


def with_parameters(format: str, out_modes: Modes, in_modes: Modes, most: float) -> Network:
    """The network of the largest rank with no more parameters."""
    rank = 1
    while FORMATS[format](out_modes, in_modes, rank + 1).num_parameters <= most:
        rank += 1
    return FORMATS[format](out_modes, in_modes, rank)


@dataclass
class Layer:
    """A network with values, rows to multiply with it, and the gradient of the result.

    Parameters
    ----------
    network : Network
    rows : int
    dtype : torch.dtype
    """

    network: Network
    rows: int
    dtype: torch.dtype
    x: Tensor = field(init=False)
    cores: list[Tensor] = field(init=False)
    dy: Tensor = field(init=False)

    def __post_init__(self) -> None:
        columns, features = (self.network.features(role) for role in ("in", "out"))
        std = self.network.core_std(columns**-0.5)
        x, dy = (torch.randn(self.rows, n, device=device) for n in (columns, features))
        self.x, self.dy = x.to(self.dtype).requires_grad_(), dy.to(self.dtype)
        drawn = (torch.randn(shape, device=device) * std for shape in self.network.core_shapes)
        self.cores = [core.to(self.dtype).requires_grad_() for core in drawn]

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The dense weight, (out features, in features)."""
        dense = contraction.to_dense(self.network, [core.detach().double() for core in self.cores])
        return dense.reshape(self.network.features("out"), self.network.features("in")).to(dtype)

    @property
    def macs(self) -> int:
        """Of the dense layer."""
        return self.rows * self.network.features("out") * self.network.features("in")

    def exact(self) -> list[Tensor]:
        """The result and the gradients of x and the cores, in float64."""
        leaves = [t.detach().double().requires_grad_() for t in (self.x, *self.cores)]
        weight = contraction.to_dense(self.network, leaves[1:]).reshape(self.dy.shape[1], self.x.shape[1])
        y = F.linear(leaves[0], weight)
        return [y.detach(), *torch.autograd.grad(y, leaves, self.dy.double())]


def way(layer: Layer, name: str | None) -> Callable[[Tensor, Sequence[Tensor]], Tensor]:
    """The product of a layer by a way of `decision`; None: by what is decided for."""
    spec = products.row_product(layer.network, name, name is None or name in decision.KERNELS)
    return lambda x, cores: autograd.product(spec, x, cores)


def epilogue(layer: Layer, name: str, activation: str) -> float:
    """The relative RMS error of a way that adds a bias and applies an activation to what it stores."""
    bias = torch.randn(layer.dy.shape[1], device=device).to(layer.dtype)
    spec = autograd.built(products.row_product(layer.network, name, name in decision.KERNELS))
    with torch.no_grad():
        y = spec.activated(layer.x, layer.cores, bias, activation)
        exact = F.linear(layer.x.double(), layer.weight(torch.float64), bias.double())
        return errors([y], [activation_of(activation)(exact)])[0]


def einsum(layer: Layer) -> Callable[[Tensor, Sequence[Tensor]], Tensor]:
    """One call of torch.einsum, to be compiled."""
    letters: dict[str, str] = {}

    def written(indices: Sequence[str]) -> str:
        return "".join(letters.setdefault(index, chr(ord("a") + len(letters))) for index in indices)

    network = layer.network
    terms = [written(("batch", *network.names("in"))), *map(written, network.cores)]
    equation = f"{','.join(terms)}->{written(('batch', *network.names('out')))}"

    def run(x: Tensor, cores: Sequence[Tensor]) -> Tensor:
        rows = x.reshape(x.shape[0], *network.mode_sizes("in"))
        return torch.einsum(equation, rows, *cores).reshape(x.shape[0], network.features("out"))

    return run


def results(run: Callable[[Tensor, Sequence[Tensor]], Tensor], layer: Layer) -> list[Tensor]:
    """y and the gradients of x and of the cores."""
    y = run(layer.x, layer.cores)
    return [y.detach(), *torch.autograd.grad(y, [layer.x, *layer.cores], layer.dy)]


def errors(actual: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Relative RMS errors; infinite where anything is not finite."""
    found = [float((a.double() - b).norm() / b.norm()) for a, b in zip(actual, exact, strict=True)]
    return [e if math.isfinite(e) else math.inf for e in found]


def exists(layer: Layer, name: str) -> bool:
    """Whether a way is there for the network, forward and back."""
    machine = decision.machine_of(layer.x)
    for gradients in (False, True):
        task = decision.task_for(layer.x, x_gradient=gradients, core_gradients=gradients, kernels=True)
        listed = decision.options(layer.network, task, machine)
        if not any(option.name == name and option.candidate for option in listed):
            return False
    return True


def mapped(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """The results of a function of one module of these, in processes of their own: kernels are compiled in parallel.

    What they compile lies in Triton's cache, where this process finds it.
    """
    workers = 1 if is_dry else min(12, (os.cpu_count() or 2) - 1)
    if workers < 2:
        return list(map(function, items))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(function, items))
