"""Times on a GPU: of a call, of a layer's forward and training step, of a way to multiply; and what is saved."""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import gpu_cases as cases
import torch
import torch.nn.functional as F
from gpu_cases import TOLERANCE, Layer, Record
from torch import Tensor

from tensorlayers import decision

Run = Callable[[Tensor, Sequence[Tensor]], Tensor]
CALLS, REPLAYS = 10, 15  # of a graph; of it
FLUSHED = 2**27  # bytes that are read before each call: more than twice the L2 cache


def prepare() -> None:
    """Before anything is timed: what is captured runs on the stream that it ran on before, or autograd mixes two."""
    torch.manual_seed(0)
    if not cases.is_dry:
        torch.cuda.set_stream(torch.cuda.Stream())
    gc.collect()


@cache
def _flushing() -> Callable[[], Any]:
    """Fills the L2 cache with other data: by reading, since what is written would still have to leave it."""
    return torch.ones(FLUSHED // 4, device=cases.device).sum


@cache
def _flush_us() -> float:
    return statistics.median(_replayed(_flushing()))


def _replayed(*calls: Callable[[], Any]) -> list[float]:
    """Microseconds of each replay of a CUDA graph of some calls, over how often they are repeated in it."""
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(CALLS):
            for call in calls:
                call()
    for _ in range(REPLAYS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / CALLS)
    return times[2:]


def _eager(call: Callable[[], Any]) -> float:
    """Median microseconds from before a call to when the device is done."""
    times = []
    for _ in range(REPLAYS):
        _flushing()()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times)


def timed(call: Callable[[], Any]) -> Record:
    """Median times of a call, the L2 cache flushed before each; what flushing takes is measured apart."""
    if cases.is_dry:
        start = time.perf_counter()
        call()
        return {"device_us": 1e6 * (time.perf_counter() - start)}
    for _ in range(3):
        call()
    eager = _eager(call)
    low, median, high = torch.tensor(_replayed(_flushing(), call)).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    found = {"device": median - _flush_us(), "device_p20": low - _flush_us(), "device_p80": high - _flush_us()}
    return {f"{name}_us": round(us, 3) for name, us in {**found, "eager": eager}.items()}


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


def tried(measure: Callable[[], Record]) -> Record:
    """What is measured; or why it is not, whatever that is, so that all else is."""
    try:
        return measure()
    except Exception as error:
        return {"refused": f"error: {type(error).__name__}: {error}"}


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


def right_times(layer: Layer, run: Run) -> Record:
    """Of a product, which is compared with float64 first."""
    error = max(cases.errors(cases.results(run, layer), layer.exact()))
    if error > TOLERANCE[layer.dtype]:
        return {"refused": "parity failed, so it is not timed", "relative_rms_error": error}
    return {**both(run, layer.x, layer.cores, layer.dy), "relative_rms_error": error}


def way_times(layer: Layer, name: str | None) -> Record:
    """Of a way of `decision`; None: of the one that is decided for."""
    if name is not None and not cases.exists(layer, name):
        return {"refused": "there is no such way"}
    found = right_times(layer, cases.way(layer, name))
    if "refused" in found:
        return found
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
    return {**found, "chosen": chosen}


@contextmanager
def filled_with_nan() -> Iterator[None]:
    """What is allocated is NaN until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of cuBLAS, whose own results are compared with no others
            yield
    finally:
        torch.use_deterministic_algorithms(False)
