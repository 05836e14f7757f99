"""Times on a GPU: of a call, of a layer's forward and training step, of a way to multiply; and what is saved."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import gpu_cases as cases
import torch
import torch.nn.functional as F
import triton
from gpu_cases import TOLERANCE, Layer, Record
from torch import Tensor

from tensorlayers import decision

Run = Callable[[Tensor, Sequence[Tensor]], Tensor]


def timed(call: Callable[[], Any]) -> Record:
    """Median times of a call, with the L2 cache flushed before each."""
    if cases.is_dry:
        start = time.perf_counter()
        call()
        return {"device_us": 1e6 * (time.perf_counter() - start)}
    eager = triton.testing.do_bench(call, warmup=10, rep=40, quantiles=[0.5])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    low, median, high = triton.testing.do_bench(graph.replay, warmup=10, rep=40, quantiles=[0.2, 0.5, 0.8])
    found = {"device": median, "device_p20": low, "device_p80": high, "eager": eager}
    return {f"{name}_us": round(ms * 1e3, 3) for name, ms in found.items()}


def trained(run: Run, x: Tensor, parameters: Sequence[Tensor], dy: Tensor) -> Any:
    """A forward and a backward of all gradients."""
    inputs = [x, *parameters] if x.is_floating_point() else list(parameters)
    return torch.autograd.grad(run(x, parameters), inputs, dy)


def both(run: Run, x: Tensor, parameters: Sequence[Tensor], dy: Tensor) -> Record:
    """The times of a forward and of a training step, and the bytes that are saved in between."""
    with torch.no_grad():
        forward = timed(partial(run, x.detach(), [parameter.detach() for parameter in parameters]))
    training = timed(partial(trained, run, x, parameters, dy))
    return {"forward": forward, "training": training, "saved_bytes": saved_bytes(run, x, parameters)}


def saved_bytes(run: Run, x: Tensor, parameters: Sequence[Tensor]) -> int:
    """Bytes kept for backward beside the parameters."""
    held: dict[int, int] = {}
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run(x, parameters)
    return sum(held.values())


def dense_times(layer: Layer, *, compiled: bool = False) -> Record:
    """Of the dense layer."""

    def run(x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        return F.linear(x, parameters[0])

    weight = layer.weight(layer.dtype).requires_grad_()
    return both(torch.compile(run, dynamic=False) if compiled else run, layer.x, [weight], layer.dy)


def way_times(layer: Layer, name: str | None) -> Record:
    """Of a way of `decision`, which is compared with float64 first; None: of the one that is decided for."""
    if name is not None and not cases.exists(layer, name):
        return {"refused": "there is no such way"}
    run = cases.way(layer, name)
    error = max(cases.errors(cases.results(run, layer), layer.exact()))
    if error > TOLERANCE[layer.dtype]:
        return {"refused": "parity failed, so it is not timed", "relative_rms_error": error}
    found = both(run, layer.x, layer.cores, layer.dy)
    chosen = {}
    for direction, gradients in (("forward", False), ("training", True)):
        task = decision.task_for(layer.x, x_gradient=gradients, core_gradients=gradients, kernels=True)
        listed = decision.options_for(layer.network, task, decision.machine_of(layer.x), name)
        taken = next(option for option in listed if not option.refusal)
        assert taken.candidate is not None
        chosen[direction] = {"way": taken.name, "predicted_us": 1e6 * taken.candidate.seconds}
        if name in decision.KERNELS and direction == "forward":
            flops, device_us = taken.candidate.cost.flops, found["forward"]["device_us"]
            chosen[direction] |= {"flops": flops, "tflop_per_s": flops / device_us / 1e6}
    return {**found, "chosen": chosen, "relative_rms_error": error}


@contextmanager
def filled_with_nan() -> Iterator[None]:
    """What is allocated is NaN until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
