"""Bytes that a layer keeps for its backward, and the most that a step allocates; measured where memory is limited.

Saved bytes are those of the storages that autograd packs in a forward, each storage once and whole, parameters and
views of them not counted. Peak memory is the parameters and the most that torch's CPU allocator has handed out at
once beside them, by the profiler's memory events: exact and repeatable, with outputs and gradients, and without what
a BLAS library keeps for itself.
"""

from __future__ import annotations

import multiprocessing
import pickle
import re
import resource
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import torch
from timing import Run, training
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from tensorlayers import KernelError

LIMIT = 8 << 30
"""Bytes of address space that a candidate may add to what the process has after its imports."""


@dataclass(frozen=True)
class Memory:
    """What a layer needs, in bytes; or, where it needs more than `LIMIT`, why it was stopped.

    Parameters
    ----------
    saved : int
        Kept from forward to backward.
    peak : int
        Of a forward and a backward; the parameters included, the input and the gradient of the output not.
    refused : str
        Why it did not run; empty where it did.
    failed : bool
        Whether that is an error of the layer, and no want of memory.
    """

    saved: int = 0
    peak: int = 0
    refused: str = ""
    failed: bool = False


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes that a forward saves for the backward."""
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # kept alive, so that no address is given twice

    def pack(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage

    def unpack(packed: None) -> Tensor:
        raise RuntimeError("there is no backward here")

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        layer(x.detach().requires_grad_())
    return sum(storage.nbytes() for storage in kept.values())


def peak_bytes(run: Run) -> int:
    """The most bytes that are allocated at once in a call, the result included, beside what was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    del result
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def needs(layer: nn.Module, x: Tensor) -> Memory:
    """Saved bytes and peak of a layer, in this process."""
    parameters = sum(parameter.nbytes for parameter in layer.parameters())
    saved = saved_bytes(layer, x)  # first: what is built once is not the step's
    return Memory(saved, parameters + peak_bytes(training(layer, x)))


def measure(layers: Mapping[str, nn.Module], x: Tensor) -> dict[str, Memory]:
    """`needs` of each layer, in a process whose memory is limited: what does not fit is refused, and harms nothing."""
    measured = {}
    pool = _pool()
    for name, layer in layers.items():
        try:
            # By pickle alone: torch would pass tensors through shared memory, of which there may be little.
            measured[name] = pool.submit(_attempt, pickle.dumps((needs, layer, x))).result()
        except BrokenProcessPool:
            measured[name] = Memory(refused="out of memory")
            pool = _pool()
    pool.shutdown()
    return measured


def _pool() -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=context, initializer=_confine, initargs=(LIMIT,))


def _confine(limit: int) -> None:
    """Limit the address space of this process, on Linux."""
    if not sys.platform.startswith("linux"):
        return
    with open("/proc/self/statm", encoding="ascii") as status:
        used = int(status.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _attempt(pickled: bytes) -> Memory:
    function: Callable[[nn.Module, Tensor], Memory]
    function, layer, x = pickle.loads(pickled)
    try:
        return function(layer, x)
    except Exception as error:
        text = str(error)
        asked = re.search(r"tried to allocate (\d+) bytes", text)
        if asked:
            return Memory(refused=f"out of memory: asks for {int(asked[1]) / 2**30:.1f} GB at once")
        if isinstance(error, MemoryError) or "bad_alloc" in text or "not enough memory" in text:
            return Memory(refused="out of memory")
        refused = isinstance(error, KernelError)  # an implementation that does not take this layer
        return Memory(refused=f"{type(error).__name__}: {text}", failed=not refused)
