"""Measures how fast a device multiplies matrices: products of random shapes, and the constants that explain them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import CostModelError
from .machine import Machine, product_seconds
from .precision import name_of
from .timing import Clock, fastest

DTYPES = (torch.float64, torch.bfloat16, torch.float16)
"""Whose rates are measured after that of float32."""

_SLOW = 50  # times float32's: emulated rather than multiplied, and a probe is enough
_LARGE = ((2, 2, 2), (4, 1, 3), (1, 4, 3))  # times `side`
_CALLS = 100

# Bounds of what is fitted: (least, most).
_BOUNDS = {"flops": (1e8, 1e16), "m": (0.1, 1e3), "k": (0.1, 1e3), "n": (0.1, 1e3), "cached": (1e8, 1e14)}
_SIZES = "mkn"  # of `half`; at its least one makes no difference, which is a result
_AT_BOUND = 2.0  # a factor: next to a bound the search may stop, since nothing changes there
_OUTLIER = 0.2  # the error, as a fraction of the time, from which a product counts less


class Product(NamedTuple):
    """`batch` products of (m, k) and (k, n) matrices."""

    batch: int
    m: int
    k: int
    n: int

    @property
    def flops(self) -> int:
        """Of all."""
        return 2 * math.prod(self)

    @property
    def parts(self) -> tuple[int, int, int]:
        """Elements of the operands and of the result."""
        return self.batch * self.m * self.k, self.batch * self.k * self.n, self.batch * self.m * self.n

    @property
    def elements(self) -> int:
        """Read and written."""
        return sum(self.parts)

    def prepared(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Callable[[], object]:
        """What carries them out on random matrices, into memory that is there."""

        def random_(rows: int, columns: int) -> Tensor:
            shape = (rows, columns) if self.batch == 1 else (self.batch, rows, columns)
            return torch.randn(shape, device=device, dtype=torch.float32).to(dtype)

        a, b, c = random_(self.m, self.k), random_(self.k, self.n), random_(self.m, self.n)
        multiply = torch.mm if self.batch == 1 else torch.bmm
        return lambda: multiply(a, b, out=c)


class Sampling(NamedTuple):
    """Which products are measured on a device.

    Parameters
    ----------
    sizes : (int, int)
        The least and the largest dimension of a matrix.
    batches : int
        The most matrices in a stack.
    flops : (float, float)
        The least and the most FLOPs: so many that the launch is little of the time, so few that it is soon over.
    seconds : float
        For which a product is repeated between two readings of the clock.
    """

    sizes: tuple[int, int]
    batches: int
    flops: tuple[float, float]
    seconds: float


@dataclass(frozen=True)
class Rates:
    """What explains the times of products best.

    Parameters
    ----------
    flops, half, cached
        As in `Machine`, of float32.
    error : float
        The median of the error of a prediction, as a fraction of the time.
    kept : tuple of str
        The constants that the times do not tell, and that are those of the machine known before: "cached", "half.m".
    """

    flops: float
    half: Mapping[str, float]
    cached: float
    error: float
    kept: tuple[str, ...] = ()


_NOTHING = Product(1, 2, 2, 2)


def products(count: int, sampling: Sampling, largest: int) -> list[Product]:
    """Products of random sizes, half of them of stacks, of up to `largest` bytes an operand; the same at each call."""
    source = random.Random(0)

    def size(least: int, most: int) -> int:
        return round(math.exp(source.uniform(math.log(least), math.log(most))))

    found: list[Product] = []
    while len(found) < count:
        batch = size(2, sampling.batches) if len(found) % 2 else 1
        product = Product(batch, *(size(*sampling.sizes) for _ in range(3)))
        if sampling.flops[0] <= product.flops <= sampling.flops[1] and 4 * max(product.parts) <= largest:
            found.append(product)
    return found


def measure_launch(device: torch.device, clock: Clock, repeats: int) -> float:
    """Seconds of a step of a program with next to no arithmetic: a product, plain or of a stack, and a view of it."""
    a, stack = torch.ones(2, 2, device=device), torch.ones(2, 2, 2, device=device)
    cases: dict[str, Callable[[], object]] = {
        "plain": lambda: torch.mm(a, a).view(4),
        "stack": lambda: torch.bmm(stack, a.expand(2, -1, -1)).view(8),
    }
    times = fastest(cases, clock, repeats, dict.fromkeys(cases, _CALLS))
    return sum(times.values()) / len(times)


def measure_products(
    device: torch.device, clock: Clock, repeats: int, count: int, sampling: Sampling, largest: int, known: Machine
) -> Rates:
    """Time products of float32 and fit the constants to them.

    Parameters
    ----------
    device : torch.device
    clock : callable
        Gives seconds, when the device has done what it was told.
    repeats, count : int
        Of how many times of a product the fastest is taken; how many products.
    sampling : Sampling
    largest : int
        Bytes up to which what a product reads or writes counts as cached.
    known : Machine
        Where the times do not tell a constant, it is taken from here.
    """
    chosen = products(count, sampling, largest)
    cases = {product: product.prepared(device) for product in (_NOTHING, *chosen)}
    once = fastest(cases, clock, 1, dict.fromkeys(cases, 1))
    calls = {product: min(_CALLS, math.ceil(sampling.seconds / once[product])) for product in cases}
    times = fastest(cases, clock, repeats, calls)
    return fit(chosen, [times[product] for product in chosen], times[_NOTHING], known)


def fit(measured: Sequence[Product], seconds: Sequence[float], launch: float, known: Machine) -> Rates:
    """The constants by which products of float32 take these times.

    The squares of the logarithms of predicted over measured time are the least, but that outliers count less. A
    constant that ends on its bound is none that was measured: it is the known one, and the others are fitted again.

    Parameters
    ----------
    measured : sequence of Product
    seconds : sequence of float
        Of each.
    launch : float
        Seconds of a product without arithmetic, part of each time.
    known : Machine

    Raises
    ------
    CostModelError
        If the rate itself ends on its bound.
    """
    kept: dict[str, float] = {}
    while True:
        rates, error = _fit(measured, seconds, launch, kept)
        lost = [name for name in _BOUNDS if name not in kept and _is_at_bound(name, rates[name])]
        if "flops" in lost:
            raise CostModelError(f"the times of products do not tell how fast they are: {rates['flops']:.3g} FLOP/s")
        if not lost:
            break
        kept.update({name: known.half[name] if name in _SIZES else known.cached for name in lost})
    names = tuple(f"half.{name}" if name in _SIZES else name for name in kept)
    return Rates(rates["flops"], {name: rates[name] for name in _SIZES}, rates["cached"], error, names)


def _is_at_bound(name: str, value: float) -> bool:
    least, most = _BOUNDS[name]
    return value > most / _AT_BOUND or (name not in _SIZES and value < least * _AT_BOUND)


def _fit(
    measured: Sequence[Product], seconds: Sequence[float], launch: float, kept: Mapping[str, float]
) -> tuple[dict[str, float], float]:
    """The constants, `kept` among them, and the median of the error."""
    batch, m, k, n = torch.tensor(measured, dtype=torch.float64).T
    moved = torch.tensor([4.0 * product.elements for product in measured], dtype=torch.float64)
    times = torch.tensor(seconds, dtype=torch.float64)
    start = {
        "flops": max(product.flops / time for product, time in zip(measured, seconds, strict=True)),
        "cached": float((moved / times).max()),
        **dict.fromkeys(_SIZES, 4.0),
    }
    free = [name for name in _BOUNDS if name not in kept]
    least, most = torch.tensor([_BOUNDS[name] for name in free], dtype=torch.float64).log().T
    logs = torch.tensor([start[name] for name in free], dtype=torch.float64).log().requires_grad_()

    def errors() -> Tensor:
        now = {**kept, **dict(zip(free, logs.clamp(least, most).exp(), strict=True))}
        predicted: Tensor = launch + product_seconds(batch, m, k, n, now["flops"], now) + moved / now["cached"]
        return (predicted / times).log()

    def closure() -> Tensor:
        search.zero_grad()
        found = errors()
        loss = torch.nn.functional.huber_loss(found, torch.zeros_like(found), reduction="sum", delta=_OUTLIER)
        loss = loss + (logs - logs.clamp(least, most)).square().sum()  # which leads back into the bounds
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    search = torch.optim.LBFGS(
        [logs], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )
    with torch.enable_grad():
        search.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        rates = {**kept, **dict(zip(free, logs.clamp(least, most).exp().tolist(), strict=True))}
        return rates, errors().abs().median().item()


def measure_dtypes(device: torch.device, clock: Clock, repeats: int, on: Machine, side: int) -> dict[str, float]:
    """FLOP/s by dtype, of those in which the device multiplies; `on` has all other constants.

    Measured on products of matrices with sides of `side` and a few times that; a dtype that is very much slower than
    float32 is timed once.
    """
    found = dict(on.flops)
    probe = Product(1, 256, 256, 256)
    limit = _SLOW * fastest({probe: probe.prepared(device)}, clock, 1)[probe]
    for dtype in DTYPES:
        try:
            once = fastest({probe: probe.prepared(device, dtype)}, clock, 1)
        except RuntimeError:
            continue  # not on this device
        large = [Product(1, *(side * size for size in sizes)) for sizes in _LARGE]
        cases = {product: product.prepared(device, dtype) for product in large}
        times = once if once[probe] > limit else fastest(cases, clock, repeats)
        rates = sorted(_rate(product, time, on, dtype.itemsize) for product, time in times.items())
        found[name_of(dtype)] = rates[len(rates) // 2]
    return found


def _rate(product: Product, seconds: float, on: Machine, itemsize: int) -> float:
    """FLOP/s of large products that took so long."""
    beside = on.launch + itemsize * product.elements / on.cached
    fill: float = product_seconds(*product, 1.0, on.half)
    return fill / max(seconds - beside, 0.1 * seconds)
