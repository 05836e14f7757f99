"""What is measured on a GPU, section by section: parity, reruns, what the machine reaches, times beside dense."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import gpu_cases as cases
import torch
from gpu_cases import TOLERANCE, Layer, Modes, Record, blocks, train, tucker, with_parameters
from gpu_layers import lookups, mlps
from gpu_timing import both, dense_times, filled_with_nan, right_times, timed, tried, way_times
from torch import nn

from tensorlayers import contraction, decision
from tensorlayers.activation import ACTIVATIONS
from tensorlayers.network import Network

LAYERS: dict[str, tuple[Modes, Modes]] = {
    "4096->4096": ((64, 64), (64, 64)),
    "768->3072": ((48, 64), (24, 32)),
    "1024->4096": ((64, 64), (32, 32)),
}
"""Modes out and in."""
RANKS = (4, 8, 12, 16)
SMALL: Modes = (4, 4)
RAGGED: tuple[tuple[Modes, Modes, int, int], ...] = (  # modes out, modes in, rank, rows
    ((11, 3), (5, 7), 3, 13), ((1, 1), (1, 1), 1, 1), ((1, 37), (41, 1), 5, 7), ((67, 131), (66, 127), 3, 257),
    ((70, 5), (131, 133), 2, 9), ((24, 32), (48, 64), 8, 4097),
)  # fmt: skip
TRAIN3 = "TT, order 3"
FORMATS = {name: cases.FORMATS[name] for name in (("TT", "CP") if cases.is_dry else cases.FORMATS)}


# -- parity -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A network and rows of a dtype, with what to call it; `tf32`: float32 is multiplied so."""

    labels: Record
    network: Network
    rows: int
    dtype: torch.dtype
    tf32: bool = False

    @property
    def layer(self) -> Layer:
        """With values."""
        return Layer(self.network, self.rows, self.dtype)

    @property
    def tolerance(self) -> float:
        """The largest relative RMS error."""
        return cases.TF32 if self.tf32 else TOLERANCE[self.dtype]


def parity_of(case: Case) -> list[Record]:
    """The result and every gradient of every kernel, and its result with a bias and an activation, against float64."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if case.tf32 else "ieee"
    try:
        return _compared(case)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _compared(case: Case) -> list[Record]:
    layer, records = case.layer, []
    exact = layer.exact()
    for name in decision.KERNELS:
        record = {**case.labels, "kernel": name}
        try:
            if not cases.exists(layer, name):
                continue
            with filled_with_nan():
                record["errors"] = cases.errors(cases.results(cases.way(layer, name), layer), exact)
                record["epilogue_error"] = cases.epilogue(layer, name, case.labels["activation"])
            record["passed"] = max(*record["errors"], record["epilogue_error"]) <= case.tolerance
        except Exception as error:
            record |= {"error": f"{type(error).__name__}: {error}", "passed": False}
        records.append(record)
    return records


def compiled_by(case: Case) -> list[Record]:
    """Let Triton compile what a case launches; what fails there fails again where it is timed."""
    layer = case.layer
    for name in (*decision.KERNELS, None):
        with suppress(Exception):
            if name is None or cases.exists(layer, name):
                cases.results(cases.way(layer, name), layer)
    return []


def _worked_on(job: tuple[bool, Case]) -> list[Record]:
    is_compared, case = job
    return parity_of(case) if is_compared else compiled_by(case)


def parity() -> list[Record]:
    """Of every kernel, format and dtype, at ragged shapes. All that is timed later is compiled beside it."""
    made, activations = [], itertools.cycle(ACTIVATIONS)
    dtypes = [(torch.float32, False)] if cases.is_dry else [(dtype, False) for dtype in TOLERANCE]
    for dtype, tf32 in (*dtypes, (torch.float32, True)):
        for format, make in {**FORMATS, TRAIN3: train}.items():
            for out_modes, in_modes, rank, rows in RAGGED[:1] if cases.is_dry else RAGGED:
                if format == TRAIN3:
                    out_modes, in_modes = (*out_modes, 3), (*in_modes, 2)
                labels = {"dtype": "tf32" if tf32 else str(dtype), "format": format, "rows": rows, "rank": rank}
                labels |= {"out": out_modes, "in": in_modes, "activation": next(activations)}
                made.append(Case(labels, make(out_modes, in_modes, rank), rows, dtype, tf32))
    jobs = [(True, case) for case in made]
    if not cases.is_dry:
        jobs += [(False, case) for some in (_reruns, _trains, _formats, _others) for case in some()]
    return [record for records in cases.mapped(_worked_on, jobs) for record in records]


def _reruns() -> list[Case]:
    if cases.is_dry:
        return [Case({"format": name}, make(SMALL, SMALL, 3), 4, cases.dtype) for name, make in FORMATS.items()]
    modes = (64, 64)
    return [Case({"format": name}, make(modes, modes, 8), 4096, cases.dtype) for name, make in FORMATS.items()]


def reruns() -> list[Record]:
    """Whether the result and each gradient are the same bits in every run."""
    records = []
    for case in _reruns():
        layer = case.layer
        for name in (name for name in decision.KERNELS if cases.exists(layer, name)):
            run = cases.way(layer, name)
            first = cases.results(run, layer)
            same = [True] * len(first)
            for _ in range(1 if cases.is_dry else 20):
                again = cases.results(run, layer)
                same = [s and torch.equal(a, b) for s, a, b in zip(same, first, again, strict=True)]
            records.append({**case.labels, "kernel": name, "passed": all(same)})
    return records


def roofline() -> Record:
    """What the machine reaches: GEMMs, a copy, small kernels one after another."""
    if cases.is_dry:
        gemms = [{"dtype": str(dtype), "tflop_per_s": 1.0} for dtype in (torch.bfloat16, torch.float32, cases.dtype)]
        return {"gemms": gemms, "copy_bytes_per_s": 1e12, "launch_s": 3e-6}
    gemms = []
    for dtype in (cases.dtype, torch.float32):
        for m, n, k in ((1024,) * 3, (4096,) * 3, (8192,) * 3, (4096, 3072, 768), (1, 4096, 4096), (16, 4096, 4096)):
            a, b = (torch.randn(shape, device=cases.device, dtype=dtype) for shape in ((m, k), (k, n)))
            found = timed(partial(torch.matmul, a, b))
            sizes = {"dtype": str(dtype), "m": m, "n": n, "k": k}
            gemms.append(sizes | found | {"tflop_per_s": 2 * m * n * k / found["device_us"] / 1e6})
    source, target = (torch.empty(2**30, dtype=torch.uint8, device=cases.device).random_() for _ in range(2))
    copy = timed(lambda: target.copy_(source))
    one = torch.zeros(1, device=cases.device)
    hundred = timed(lambda: [one.add_(1.0) for _ in range(100)])
    return {
        "gemms": gemms,
        "copy_bytes_per_s": 2 * source.numel() / copy["device_us"] * 1e6,
        "launch_s": hundred["device_us"] / 100 * 1e-6,
    }


# -- times of products ------------------------------------------------------------------------------------------------

ALL = (*decision.KERNELS, "contraction", "rebuild", None)
"""Ways; None: the one that is decided for."""


def measured(made: Sequence[Case], ways: Sequence[str | None]) -> list[Record]:
    """The times of cases, by some ways; with what plans say of each layer, and the rebuild's share of the FLOPs."""
    records = []
    for case in made:
        layer = case.layer
        record: Record = {**case.labels, "rows": case.rows, "dense": dense_times(layer)}
        record["rebuild_share"] = contraction.dense_plan(case.network).flops / (2 * layer.macs)
        record["converted"] = converted(layer)
        records.append(record | {str(way): tried(partial(way_times, layer, way)) for way in ways})
    return records


def converted(layer: Layer) -> Record:
    """Whether plans replace the dense layer, which they do where it is predicted to be faster."""
    on, outs, ins = decision.machine_of(layer.x), *(layer.network.features(role) for role in ("out", "in"))
    kind = str(layer.dtype).removeprefix("torch.")
    found = {}
    for direction, gradients in (("forward", False), ("training", True)):
        dense = decision.dense_seconds(outs, ins, layer.rows, on, x=gradients, weight=gradients, dtype=kind)
        seconds = decision.cautious_seconds(layer.network, layer.rows, on, training=gradients, dtype=kind)
        found[direction] = seconds < dense
    return found


def _trains() -> list[Case]:
    if cases.is_dry:
        return [Case({"layer": "4096->4096", "rank": RANKS[0]}, train(SMALL, SMALL, RANKS[0]), 8, cases.dtype)]
    return [
        Case({"layer": name, "rank": rank}, train(*modes, rank), rows, cases.dtype)
        for name, modes in LAYERS.items()
        for rows in (1024, 4096)
        for rank in RANKS
    ]


def _formats() -> list[Case]:
    out_modes, in_modes = (SMALL, SMALL) if cases.is_dry else LAYERS["4096->4096"]
    share = (0.5 if cases.is_dry else 0.1) * math.prod(out_modes) * math.prod(in_modes)
    networks = {format: with_parameters(format, out_modes, in_modes, share) for format in FORMATS}
    return [
        Case({"format": format, "ranks": network.ranks}, network, rows, cases.dtype)
        for format, network in networks.items()
        for rows in ((2,) if cases.is_dry else (1, 4, 16, 256, 4096))
    ]


def _others() -> list[Case]:
    made = {TRAIN3: train((2, 2, 2), (2, 2, 2), 2)}
    if not cases.is_dry:
        made = {
            TRAIN3: train((16, 16, 16), (16, 16, 16), 8),
            "Tucker": tucker((64, 64), (64, 64), 32),
            "BTT, balanced": blocks((64, 64), (64, 64), 3),
            "BTT, skewed": blocks((512, 8), (8, 512), 25),
        }
    return [Case({"network": name}, made[name], 8 if cases.is_dry else 4096, cases.dtype) for name in made]


def trains() -> list[Record]:
    """Tensor trains of two cores."""
    return measured(_trains(), ("fused", "fused_rebuild", "contraction", "rebuild", None))


def formats() -> list[Record]:
    """Every format at a tenth of the parameters, from single rows to batches."""
    return measured(_formats(), (*decision.KERNELS, None))


def others() -> list[Record]:
    """Networks of more cores, and blocks."""
    return measured(_others(), ("fused", None))


def peers() -> list[Record]:
    """The same product by other means: dense and einsum compiled, tensorly-torch."""
    records = []
    for name in ("4096->4096",) if cases.is_dry else ("4096->4096", "768->3072"):
        modes = (SMALL, SMALL) if cases.is_dry else LAYERS[name]
        layer = Layer(train(*modes, 8), 8 if cases.is_dry else 4096, cases.dtype)
        record: Record = {"layer": name, "rows": layer.rows, "rank": 8, "dense": dense_times(layer)}
        if not cases.is_dry:
            record["dense, compiled"] = tried(partial(dense_times, layer, compiled=True))
            run = torch.compile(cases.einsum(layer), dynamic=False)
            record["einsum, compiled"] = tried(partial(right_times, layer, run))
        record["fused"] = tried(partial(way_times, layer, "fused"))
        record["tensorly-torch"] = tried(partial(tensorly_torch, layer))
        records.append(record)
    return records


def tensorly_torch(layer: Layer) -> Record:
    """The layer of tensorly-torch, with opt_einsum where that is installed."""
    if importlib.util.find_spec("tltorch") is None:
        return {"refused": "tensorly-torch is not installed"}
    import tensorly
    import tltorch

    tensorly.set_backend("pytorch")
    if importlib.util.find_spec("opt_einsum") is not None:
        tensorly.plugins.use_opt_einsum()
    modes = layer.network.mode_sizes("in"), layer.network.mode_sizes("out")
    theirs: nn.Module = tltorch.FactorizedLinear(
        *modes, bias=False, factorization="blocktt", rank=8, device=cases.device, dtype=layer.dtype
    )
    parameters = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    return both(lambda x, _: theirs(x), layer.x, parameters, layer.dy)


SECTIONS: dict[str, Callable[[], Any]] = {
    "parity": parity,
    "reruns": reruns,
    "roofline": roofline,
    "trains": trains,
    "formats": formats,
    "others": others,
    "mlps": mlps,
    "lookups": lookups,
    "peers": peers,
}
TIMED = tuple(SECTIONS)[3:]
"""Those of records that have the times of dense and of other ways."""
