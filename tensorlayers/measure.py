"""Measures the constants of the cost model on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import autograd
from .errors import CostModelError
from .machine import Machine, shipped
from .measure_conv import measure_conv
from .measure_gemm import Sampling, measure_dtypes, measure_launch, measure_products
from .network import Mode, Network
from .products import row_product
from .timing import Clock, clock_of, fastest, share_of_processors

_KNEE = 1.4  # the time a byte, over the least, up to which an intermediate counts as cached
_CALLS = 100
_SHARE = 0.9  # of the time of the threads, below which what is measured is what else runs
_ERROR = 0.4  # of predicted times, above which it is that too
_LEAST_CACHE, _MOST_CACHE = 1_000_000, 16_000_000


@dataclass(frozen=True)
class _Sizes:
    """What is measured on a kind of device.

    Parameters
    ----------
    sampling : Sampling
    cached : int
        The most bytes of an operand of these products; of a CPU no more than its cache has.
    side : int
        Of the matrices that other dtypes are measured on.
    copied : int
        Elements of a tensor far above the cache.
    permuted : (int, int, int)
        The shape of a tensor that is permuted.
    """

    sampling: Sampling
    cached: int
    side: int
    copied: int
    permuted: tuple[int, int, int]


_CPU = _Sizes(Sampling((2, 1500), 256, (1e6, 1e9), 5e-4), _MOST_CACHE, 256, 1 << 24, (256, 48, 64))
_GPU = _Sizes(Sampling((16, 8192), 256, (1e9, 4e11), 5e-3), 1 << 26, 2048, 1 << 28, (1024, 768, 64))

_CACHES = tuple(int(1e6 * 2 ** (quarter / 4)) for quarter in range(-4, 21))  # 0.5 MB to 32 MB


@dataclass(frozen=True)
class Measurement:
    """The constants that were measured.

    Parameters
    ----------
    machine : Machine
    error : float
        The median error of the times that they predict for the products they were fitted to, as a fraction.
    kept : tuple of str
        The constants that the times do not tell, by the names of `Machine.constants`: these are the shipped ones.
    """

    machine: Machine
    error: float
    kept: tuple[str, ...] = ()


def measure(
    device: str = "cpu",
    threads: int | None = None,
    *,
    quick: bool = False,
    clock: Clock | None = None,
) -> Measurement:
    """Measure every constant of a `Machine`; half a minute on a CPU that does nothing else.

    Parameters
    ----------
    device : str
        "cpu" or "cuda".
    threads : int, optional
        Of a CPU; as many as torch has now.
    quick : bool
        Fewer products, and each fewer times.
    clock : callable, optional
        Gives seconds, when the device has done what it was told.

    Raises
    ------
    CostModelError
        If there is no such device, threads are given for another than the CPU, something else runs, or the times tell
        no rate.
    """
    if device not in ("cpu", "cuda"):
        raise CostModelError(f"device {device!r}: constants are measured for 'cpu' and 'cuda'")
    if threads is not None and (device != "cpu" or threads < 1):
        raise CostModelError(f"threads {threads}: a CPU is measured with 1 or more, another device without")
    if device == "cuda" and not torch.cuda.is_available():
        raise CostModelError("device 'cuda': torch finds none")
    with _threads(threads):
        _expect_free()
        found = _measure(torch.device(device), clock, repeats=5 if quick else 25, count=32 if quick else 64)
        _expect_free()
    if found.error > _ERROR:
        raise CostModelError(f"what was measured is predicted within {found.error:.0%} only: did something else run?")
    return found


def _expect_free() -> None:
    share = share_of_processors()
    if share < _SHARE:
        raise CostModelError(
            f"threads {torch.get_num_threads()}: they had a processor for {share:.0%} of the time; "
            "measure while nothing else runs, or with fewer threads"
        )


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measure(device: torch.device, clock: Clock | None, repeats: int, count: int) -> Measurement:
    clock = clock or clock_of(device)
    on_cpu = device.type == "cpu"
    sizes = _CPU if on_cpu else _GPU
    launch = measure_launch(device, clock, repeats)
    known = shipped(device.type)
    cache = _cache(clock, repeats) if on_cpu else known.cache
    rates = measure_products(device, clock, repeats, count, sizes.sampling, min(cache, sizes.cached), known)
    machine = Machine(
        name="cpu" if on_cpu else torch.cuda.get_device_name(device),
        threads=torch.get_num_threads() if on_cpu else 0,
        flops={"float32": rates.flops},
        half=rates.half,
        memory=_memory(device, clock, repeats, sizes.copied),
        cached=rates.cached,
        permuted=_permuted(device, clock, repeats, sizes.permuted),
        cache=cache,
        launch=launch,
        function=_function(device, clock, repeats, launch),
        conv=measure_conv(clock, repeats) if on_cpu else known.conv,
    )
    flops = measure_dtypes(device, clock, repeats, machine, sizes.side)
    return Measurement(replace(machine, flops=flops), rates.error, rates.kept)


def _memory(device: torch.device, clock: Clock, repeats: int, elements: int) -> float:
    """Bytes/s of a copy into fresh memory, far above the cache; read and written."""
    x = torch.ones(elements, device=device)
    return 2 * x.nbytes / fastest({"clone": x.clone}, clock, repeats)["clone"]


def _permuted(device: torch.device, clock: Clock, repeats: int, shape: tuple[int, int, int]) -> float:
    """Bytes/s of copies into other orders of the axes, half of which keep the last one in its place."""
    x = torch.ones(shape, device=device)
    orders = ((1, 0, 2), (2, 0, 1))
    times = fastest({order: x.permute(order).contiguous for order in orders}, clock, repeats)
    return 2 * x.nbytes * len(orders) / sum(times.values())


def _cache(clock: Clock, repeats: int) -> int:
    """Bytes of the largest intermediate between two products that still takes about the least time a byte."""
    few, many = 16, 256
    into, out_of = torch.ones(few, many), torch.ones(many, few)
    held = torch.empty(_CACHES[-1] // 4)

    def between(size: int) -> Any:
        rows = size // (4 * many)
        x, y, t = torch.ones(rows, few), torch.empty(rows, few), held[: rows * many].view(rows, many)

        def run() -> None:
            torch.mm(x, into, out=t)
            torch.mm(t, out_of, out=y)

        return run

    calls = {size: max(1, 4 * _LEAST_CACHE // size) for size in _CACHES}
    times = fastest({size: between(size) for size in _CACHES}, clock, repeats, calls)
    a_byte = {size: time / size for size, time in times.items()}
    knee = max(size for size in _CACHES if a_byte[size] <= _KNEE * min(a_byte.values()))
    return min(max(knee, _LEAST_CACHE), _MOST_CACHE)


# -- a custom autograd function ---------------------------------------------------------------------------------------


def _function(device: torch.device, clock: Clock, repeats: int, launch: float) -> float:
    """Seconds that forward and backward take as an autograd function more than their arithmetic by itself."""
    network = Network((("o1", "r"), ("r", "i1")), (("r", 4),), (Mode("o1", 8, "out"), Mode("i1", 8, "in")))
    spec = row_product(network)
    product = autograd.built(spec)
    x, *cores = (torch.ones(shape, device=device, requires_grad=True) for shape in ((8, 8), *network.core_shapes))
    dy = torch.ones(8, 8, device=device)

    @torch.enable_grad()
    def whole() -> object:
        return torch.autograd.grad(autograd.product(spec, x, cores), (x, *cores), dy)

    @torch.no_grad()
    def parts() -> object:
        return product.forward(x, cores, None), product.gradients(dy, x, cores, [True] * 3)

    cases = {"whole": whole, "parts": parts}
    times = fastest(cases, clock, repeats, dict.fromkeys(cases, _CALLS))
    return max(times["whole"] - times["parts"], launch)
