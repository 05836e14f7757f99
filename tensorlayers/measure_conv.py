"""Measures the constants of `conv_cost` on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from .conv_cost import VECTOR
from .conv_maps import Window, convolve, convolve_back, with_layout
from .timing import fastest

_CHANNELS, _SIZE, _BATCH = 128, 28, 8
_LAUNCHES = 20


def measure_conv(clock: Callable[[], float] = time.perf_counter, repeats: int = 9) -> dict[str, float]:
    """The rates of convolutions with the threads that torch has now, in float32; some seconds.

    Parameters
    ----------
    clock : callable
        Gives seconds.
    repeats : int
        The fastest of so many is taken, all kinds in turn: what else runs can only add to it.

    Returns
    -------
    dict of str to float
        See `conv_cost.rates`.
    """
    few, many = 8, _CHANNELS
    small = _case(few, few, spatial=3, batch=2)[0]
    kinds = {
        "wide": _case(many, many),
        "grouped": _case(many, many, 2),
        "depthwise": _case(many, many, many),
        "long": _case(many, many, many, size=7),
        "narrow": _case(many, many, many // few),
        "last": _case(64, 64, spatial=56, batch=4),
        "contiguous": _case(64, 64, spatial=56, batch=4, last=False),
    }
    cases: dict[str, Callable[[], object]] = {"launches": lambda: [small() for _ in range(_LAUNCHES)]}
    for name, (forward, back) in kinds.items():
        cases.update({name: forward, f"{name} back": back})
    times = fastest(cases, clock, repeats)
    flops = 2 * 9 * _BATCH * _SIZE**2  # of a pair of channels
    bytes_ = 2 * 4 * _BATCH * _SIZE**2 * many

    def left(kind: str, other: float) -> float:
        """Of the time of a kind, that which is not another's, and never next to nothing."""
        return max(times[kind] - other, 0.05 * times[kind])

    ratios = {kind: times[f"{kind} back"] / (2 * times[kind]) for kind in ("wide", "depthwise", "narrow")}
    back_narrow = (ratios["depthwise"] + ratios["narrow"]) / 2
    return {
        "rate": flops * many**2 / times["wide"],
        "grouped": max(1.0, 2 * times["grouped"] / times["wide"]),
        "narrow": flops * (many // few) * VECTOR**2 / left("narrow", times["depthwise"]),
        "moved": bytes_ / times["depthwise"],
        "copied": 2 * 4 * 4 * 56**2 * 64 / left("contiguous", times["last"]),
        "back": ratios["wide"],
        "back_narrow": back_narrow,
        "depthwise_back": flops * 49 / 9 * many / left("long back", 2 * back_narrow * times["depthwise"]),
        "launch": times["launches"] / _LAUNCHES,
    }


def _case(
    channels: int,
    new: int,
    groups: int = 1,
    *,
    size: int = 3,
    spatial: int = _SIZE,
    batch: int = _BATCH,
    last: bool = True,
) -> tuple[Callable[[], object], Callable[[], object]]:
    """A convolution, and its gradients."""
    window = Window((size, size), (1, 1), ((size // 2,) * 2,) * 2, (1, 1))
    x = with_layout(torch.randn(batch, channels, spatial, spatial), last)
    weight = torch.randn(new, channels // groups, *window.kernel_size)
    dy = torch.randn_like(convolve(x, weight, window, groups))

    def forward() -> object:
        return convolve(x, weight, window, groups)

    def back() -> object:
        return convolve_back(dy, x, weight, window, groups, (True, True))

    return forward, back
