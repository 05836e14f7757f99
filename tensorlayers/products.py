"""The multilinear products of layers: rows times a network as `decision` chooses, and convolutions with one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import autograd, conv_chunks, convolution, decision, functional, matmul
from .contraction import constant_when_compiled
from .conv_maps import Window
from .convolution import ConvPlan
from .network import Mode, Network
from .precision import without_autocast
from .program import Candidate, Task


class RowProduct(autograd.Multilinear):
    """Rows times a network.

    Parameters
    ----------
    network : Network
    forced : str or None
        One of `decision.NAMES`, in place of the decision.
    """

    def __init__(self, network: Network, forced: str | None) -> None:
        self.network, self.forced = network, forced

    def shape(self, x: Sequence[int]) -> tuple[int, ...]:
        return x[0], self.network.features("out")

    def forward(self, x: Tensor, cores: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        if not x.shape[0]:
            return x.new_empty(self.shape(x.shape))
        chosen = self._chosen(decision.task_for(x), x)
        with without_autocast(x):
            return matmul.forward(chosen.program, x, cores, bias, chosen.chunk)

    def gradients(self, dy: Tensor, x: Tensor, cores: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
        if not x.shape[0]:
            return _zeros((x, *cores), needs)
        task = decision.task_for(x, x_gradient=needs[0], core_gradients=any(needs[1:]))
        chosen = self._chosen(task, x)
        with without_autocast(x):
            return matmul.gradients(chosen.program, dy, x, cores, needs, chosen.chunk)

    def plain(self, x: Tensor, cores: Sequence[Tensor]) -> Tensor:
        return functional.contract_rows(x, self.network, cores)

    def _chosen(self, task: Task, x: Tensor) -> Candidate:
        return decision.decide(self.network, task, decision.machine_of(x), self.forced)


class WindowProduct(autograd.Multilinear):
    """A convolution with a network."""

    def __init__(self, network: Network, window: Window) -> None:
        self.network, self.window = network, window

    def shape(self, x: Sequence[int]) -> tuple[int, ...]:
        channels = self.network.features("group") * self.network.features("out")
        return x[0], channels, *self.window.lengths(x[2:])

    def forward(self, x: Tensor, cores: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        with without_autocast(x):
            return conv_chunks.forward(self._plan(x), x, cores, self.window, bias)

    def gradients(self, dy: Tensor, x: Tensor, cores: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
        if not x.shape[0]:
            return _zeros((x, *cores), needs)
        with without_autocast(x):
            return conv_chunks.gradients(self._plan(x), dy, x, cores, self.window, needs)

    def plain(self, x: Tensor, cores: Sequence[Tensor]) -> Tensor:
        return convolution.execute(self._plan(x), x, cores, self.window)

    def _plan(self, x: Tensor) -> ConvPlan:
        return convolution.plan_for(self.network, self.window, x.shape[0] * math.prod(x.shape[2:]))


def _zeros(tensors: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [torch.zeros_like(t) if is_needed else None for t, is_needed in zip(tensors, needs, strict=True)]


@constant_when_compiled
def row_product(network: Network, forced: str | None = None) -> str:
    """The spec of a `RowProduct`."""
    return _row_product(network, forced)


@constant_when_compiled
def window_product(network: Network, window: Window) -> str:
    """The spec of a `WindowProduct`."""
    return _window_product(network, window)


@lru_cache(maxsize=4096)  # every forward asks for it
def _row_product(network: Network, forced: str | None) -> str:
    return autograd.describe("rows", network=_written(network), forced=forced)


@lru_cache(maxsize=4096)
def _window_product(network: Network, window: Window) -> str:
    return autograd.describe("window", network=_written(network), window=asdict(window))


def _written(network: Network) -> dict[str, Any]:
    modes = [(mode.name, mode.size, mode.role) for mode in network.modes]
    return {"cores": network.cores, "sizes": network.sizes, "modes": modes}


def _read(written: dict[str, Any]) -> Network:
    cores = tuple(tuple(core) for core in written["cores"])
    return Network(cores, tuple((k, n) for k, n in written["sizes"]), tuple(Mode(*mode) for mode in written["modes"]))


def _read_window(window: dict[str, Any]) -> Window:
    def plain(value: Any) -> Any:
        return tuple(plain(item) for item in value) if isinstance(value, list) else value

    return Window(**{name: plain(value) for name, value in window.items()})


autograd.register("rows", lambda network, forced: RowProduct(_read(network), forced))
autograd.register("window", lambda network, window: WindowProduct(_read(network), _read_window(window)))
