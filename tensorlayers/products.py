"""The multilinear products of layers: rows times a network as `decision` chooses, and convolutions with one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import autograd, conv_chunks, convolution, decision, functional, matmul, slices
from .backend import readable
from .contraction import constant_when_compiled
from .conv_maps import Window
from .convolution import ConvPlan
from .network import Mode, Network
from .precision import without_autocast
from .program import Candidate, KernelProgram

_Decision = tuple[Candidate, tuple[slices.Slice, ...]]


class RowProduct(autograd.Multilinear):
    """Rows times a network; the rows may be shorter than its in modes hold.

    Parameters
    ----------
    network : Network
    forced : str or None
        One of `decision.NAMES` and `decision.KERNELS`, or `decision.TRITON`, in place of the decision.
    kernels : bool
        Whether Triton kernels may carry it out.
    """

    def __init__(self, network: Network, forced: str | None, kernels: bool = False) -> None:
        self.network, self.forced, self.kernels = network, forced, kernels
        # Asked at every call: to look them up by the network would take longer than a small product.
        self._decisions: dict[tuple[object, ...], _Decision] = {}

    def shape(self, x: Sequence[int]) -> tuple[int, ...]:
        return x[0], self.network.features("out")

    def forward(self, x: Tensor, cores: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        if not x.shape[0]:
            return x.new_empty(self.shape(x.shape))
        return self._forward(functional.padded(x, self.network), cores, bias)

    def activated(self, x: Tensor, cores: Sequence[Tensor], bias: Tensor | None, activation: str) -> Tensor:
        program = self._decided(x)[0].program if x.shape[0] else None
        if not isinstance(program, KernelProgram):
            return super().activated(x, cores, bias, activation)
        with without_autocast(x):
            return _by_kernel(program, functional.padded(x, self.network), cores, bias, activation)

    def _forward(self, x: Tensor, cores: Sequence[Tensor], bias: Tensor | None, added: Tensor | None = None) -> Tensor:
        chosen, pieces = self._decided(x)
        for piece in pieces:
            added = RowProduct(piece.network, self.forced, self.kernels)._forward(x, piece.cores(cores), bias, added)
            bias = None
        if pieces and added is not None:
            return added
        with without_autocast(x):
            if isinstance(chosen.program, KernelProgram):
                return _by_kernel(chosen.program, x, cores, bias)
            return matmul.forward(chosen.program, x, cores, bias, chosen.chunk, added)

    def gradients(self, dy: Tensor, x: Tensor, cores: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
        if not x.shape[0]:
            return _zeros((x, *cores), needs)
        padded = functional.padded(x, self.network)
        dx, *others = self._gradients(dy, padded, cores, needs)
        return [dx if dx is None or padded is x else dx[:, : x.shape[1]].contiguous(), *others]

    def _gradients(
        self, dy: Tensor, x: Tensor, cores: Sequence[Tensor], needs: Sequence[bool], added: Tensor | None = None
    ) -> list[Tensor | None]:
        chosen, pieces = self._decided(x, needs[0], any(needs[1:]))
        sums: list[Tensor | None] = [None] * len(cores)
        for piece in pieces:
            part = RowProduct(piece.network, self.forced, self.kernels)
            added, *found = part._gradients(dy, x, piece.cores(cores), needs, added)
            piece.add(found, sums, cores)
        if pieces:
            return [added, *sums]
        with without_autocast(x):
            if isinstance(chosen.program, KernelProgram):
                dy, x, *cores = map(readable, (dy, x, *cores))
                found = chosen.program.gradients(dy, x, cores, needs)
                return [None if gradient is None else gradient.contiguous() for gradient in found]
            return matmul.gradients(chosen.program, dy, x, cores, needs, chosen.chunk, added)

    def plain(self, x: Tensor, cores: Sequence[Tensor]) -> Tensor:
        return functional.contract_rows(x, self.network, cores)

    def _decided(self, x: Tensor, x_gradient: bool = False, core_gradients: bool = False) -> _Decision:
        machine = decision.machine_of(x)
        rows = decision.rows_class(x.shape[0])
        key = rows, x_gradient, core_gradients, x.dtype, machine, torch.get_num_threads(), x.device
        found = self._decisions.get(key)
        if found is None:
            task = decision.task_for(x, x_gradient=x_gradient, core_gradients=core_gradients, kernels=self.kernels)
            chosen = decision.decide(self.network, task, machine, self.forced)
            found = self._decisions[key] = chosen, slices.slices(self.network, chosen.program)
        return found


def _by_kernel(
    program: KernelProgram, x: Tensor, cores: Sequence[Tensor], bias: Tensor | None, activation: str = "none"
) -> Tensor:
    x, *cores = map(readable, (x, *cores))
    y = program.forward(x, cores, None if bias is None else readable(bias), activation).contiguous()
    # Not a view, of which autograd would forbid the user to change it in place.
    whole: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
    return whole


class WindowProduct(autograd.Multilinear):
    """A convolution with a network; the channels may be fewer than its in modes hold."""

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
def row_product(network: Network, forced: str | None = None, kernels: bool = False) -> str:
    """The spec of a `RowProduct`."""
    return _row_product(network, forced, kernels)


@constant_when_compiled
def window_product(network: Network, window: Window) -> str:
    """The spec of a `WindowProduct`."""
    return _window_product(network, window)


@lru_cache(maxsize=4096)  # every forward asks for it
def _row_product(network: Network, forced: str | None, kernels: bool) -> str:
    return autograd.describe("rows", network=_written(network), forced=forced, kernels=kernels)


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


autograd.register("rows", lambda network, forced, kernels: RowProduct(_read(network), forced, kernels))
autograd.register("window", lambda network, window: WindowProduct(_read(network), _read_window(window)))
