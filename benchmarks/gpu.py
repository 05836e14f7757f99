"""Measure the tt2 kernel on a GPU: parity, reruns, and its time beside dense, unfused and rebuilt; one JSON file.

    python benchmarks/gpu.py --out FILE.json

Needs torch, triton and a CUDA device; no network. Every operation is compared with float64 before it is timed, and is
not timed where that fails; the exit code is then 1. Every figure's key ends in its unit. `device_us` is the median
over replays of a CUDA graph, without launch gaps; `eager_us` the median over ordinary calls; both with a cold L2 cache.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
import types
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, no_type_check

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
# The package without its __init__: a machine with a GPU may lack what the decompositions and checkpoints import.
_package = types.ModuleType("tensorlayers")
_package.__path__ = [str(ROOT / "tensorlayers"), str(ROOT)]
sys.modules.setdefault("tensorlayers", _package)

from tensorlayers import contraction, functional  # noqa: E402
from tensorlayers.kernels import tt2  # noqa: E402
from tensorlayers.network import Network, linear_modes  # noqa: E402

DEVICE = "cuda"
LAYERS = {"4096->4096": ((64, 64), (64, 64)), "768->3072": ((24, 32), (48, 64)), "1024->4096": ((32, 32), (64, 64))}
RANKS = (4, 8, 12, 16, 32)
BATCHES = (1, 16, 1024, 4096)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # relative RMS error
RAGGED: tuple[tuple[Sequence[int], Sequence[int], int, int], ...] = (  # in modes, out modes, rank, batch
    ((1, 1), (1, 1), 1, 1), ((5, 7), (11, 3), 3, 13), ((41, 1), (1, 37), 5, 7), ((66, 127), (67, 131), 3, 257),
    ((131, 133), (70, 5), 2, 9), ((2, 2048), (2048, 2), 2, 300), ((48, 64), (24, 32), 8, 4097),
)  # fmt: skip

Record = dict[str, Any]
Operation = Callable[[Tensor, Network, Sequence[Tensor]], Tensor]


def dense_weight(network: Network, cores: Sequence[Tensor]) -> Tensor:  # (out features, in features)
    return contraction.to_dense(network, cores).reshape(network.features("out"), network.features("in"))


def rebuilt(x: Tensor, network: Network, cores: Sequence[Tensor]) -> Tensor:
    """Form the weight, then one GEMM."""
    return F.linear(x, dense_weight(network, cores))


def dense(x: Tensor, network: Network, cores: Sequence[Tensor]) -> Tensor:
    """The dense layer: its weight is all of `cores`."""
    return F.linear(x, cores[0])


OPERATIONS: dict[str, Operation] = {"dense": dense, "unfused": functional.contract_rows, "rebuilt": rebuilt}
OPERATIONS["tt2"] = tt2.linear


def draw(
    in_modes: Sequence[int], out_modes: Sequence[int], rank: int, batch: int, dtype: torch.dtype
) -> tuple[Network, list[Tensor], Tensor]:
    """A network, x and its cores, and the gradient of y; x and y of unit variance."""
    network = Network((("o1", "i1", "r1"), ("r1", "o2", "i2")), (("r1", rank),), linear_modes(out_modes, in_modes))
    std = network.core_std(network.features("in") ** -0.5)
    x = torch.randn(batch, network.features("in"), device=DEVICE)
    cores = [torch.randn(shape, device=DEVICE) * std for shape in network.core_shapes]
    dy = torch.randn(batch, network.features("out"), device=DEVICE)
    return network, [t.to(dtype).requires_grad_() for t in (x, *cores)], dy.to(dtype)


def results(operation: Operation, network: Network, tensors: Sequence[Tensor], dy: Tensor) -> list[Tensor]:
    """y and the gradients of x and of the cores."""
    y = operation(tensors[0], network, tensors[1:])
    return [y.detach(), *torch.autograd.grad(y, tensors, dy)]


def errors(actual: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Relative RMS errors; infinite where anything is not finite."""
    found = [float((a.double() - b).norm() / b.norm()) for a, b in zip(actual, exact, strict=True)]
    return [e if math.isfinite(e) else math.inf for e in found]


def exact_results(operation: Operation, network: Network, tensors: Sequence[Tensor], dy: Tensor) -> list[Tensor]:
    """`results` of a dense or rebuilt product, in float64."""
    return results(operation, network, [t.detach().double().requires_grad_() for t in tensors], dy.double())


def parity(dtype: torch.dtype) -> list[Record]:
    """Forward and gradients of tt2, and its output into NaN-filled memory, for ragged shapes and the timed layers."""
    shapes = [*RAGGED, *((*modes, 8, 300) for modes in LAYERS.values())]
    records = []
    for in_modes, out_modes, rank, batch in shapes:
        network, tensors, dy = draw(in_modes, out_modes, rank, batch, dtype)
        exact = exact_results(rebuilt, network, tensors, dy)
        poisoned = torch.full((batch, *out_modes), math.nan, dtype=dtype, device=DEVICE)
        with torch.no_grad():
            tt2.launch(tensors[0].reshape(batch, *in_modes), tensors[1], tensors[2], poisoned)
        found = errors([poisoned.flatten(1), *results(tt2.linear, network, tensors, dy)], [exact[0], *exact])
        record: Record = {"dtype": str(dtype), "in": in_modes, "out": out_modes, "rank": rank, "batch": batch}
        record |= dict(zip(("launch", "y", "dx", "da", "dg"), found, strict=True))
        records.append(record | {"passed": max(found) <= TOLERANCE[dtype]})
    return records


def reruns(times: int = 20) -> Record:
    """Whether y and each gradient are the same bits in every run."""
    network, tensors, dy = draw(*LAYERS["4096->4096"], 8, 4096, torch.bfloat16)
    first = results(tt2.linear, network, tensors, dy)
    same = [True] * len(first)
    for _ in range(times):
        again = results(tt2.linear, network, tensors, dy)
        same = [s and torch.equal(a, b) for s, a, b in zip(same, first, again, strict=True)]
    return {"runs": times + 1} | dict(zip(("y", "dx", "da", "dg"), same, strict=True))


def time_us(call: Callable[[], Any]) -> Record:
    """Median times of a call, with the L2 cache flushed before each: `device_us` (with quantiles) and `eager_us`."""
    eager = triton.testing.do_bench(call, warmup=10, rep=40, quantiles=[0.5])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    low, median, high = triton.testing.do_bench(graph.replay, warmup=10, rep=40, quantiles=[0.2, 0.5, 0.8])
    found = {"device": median, "device_p20": low, "device_p80": high, "eager": eager}
    return {f"{name}_us": round(ms * 1e3, 3) for name, ms in found.items()}


def rate(flops: int, timed: Record) -> float:  # TFLOP/s
    return round(flops / float(timed["device_us"]) / 1e6, 2)


@triton.jit
@no_type_check
def _store_one(out):
    tl.store(out, 1.0)


def launch_costs(calls: int = 2000) -> dict[str, float]:
    """Host time of one call in a long row of them, and the device's time of one small kernel in a graph."""
    network, tensors, _ = draw(*LAYERS["768->3072"], 4, 1, torch.bfloat16)
    x, a, g = (t.detach() for t in tensors)
    matrices, weight = x.reshape(1, 24, 32), torch.randn(3072, 768, device=DEVICE, dtype=torch.bfloat16)
    one = torch.zeros(1, device=DEVICE)
    candidates: dict[str, Callable[[], Any]] = {
        "triton_kernel": lambda: _store_one[(1,)](one),
        "torch_add": lambda: one.add_(1.0),
        "torch_linear": lambda: F.linear(x, weight),
        "unfused": lambda: functional.contract_rows(x, network, (a, g)),
        "tt2_operator": lambda: tt2.tt2(matrices, a, g),
        "tt2_linear": lambda: tt2.linear(x, network, (a, g)),
        "tt2_linear_with_grad": lambda: tt2.linear(tensors[0], network, tensors[1:]),
    }
    found = {}
    for name, call in candidates.items():
        for repeats in (20, calls):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            torch.cuda.synchronize()
            found[f"{name}_host_us"] = round((time.perf_counter() - start) / repeats * 1e6, 3)
    hundred = time_us(lambda: [candidates["triton_kernel"]() for _ in range(100)])
    return found | {"triton_kernel_in_graph_us": hundred["device_us"] / 100}


def products() -> list[Record]:
    """GEMM (batch of 1) and bmm rates."""
    shapes = [(1, n, n, n) for n in (1024, 2048, 4096, 8192)] + [(1, 16, 4096, 4096), (1, 4096, 3072, 768)]
    shapes += [(4096, 64, 64, 64), (4096, 64, 512, 64), (512, 256, 256, 256), (64, 1024, 1024, 1024)]
    records = []
    for dtype in (torch.bfloat16, torch.float32):
        for batch, m, n, k in shapes:
            a = torch.randn(batch, m, k, device=DEVICE, dtype=dtype).squeeze(0)
            b = torch.randn(batch, k, n, device=DEVICE, dtype=dtype).squeeze(0)
            timed = time_us(partial(torch.matmul, a, b))
            sizes = {"dtype": str(dtype), "batch": batch, "m": m, "n": n, "k": k}
            records.append(sizes | timed | {"tflop_per_s": rate(2 * batch * m * n * k, timed)})
    return records


def copy_rate(size: int = 2**31) -> Record:
    """Device-to-device copy: bytes read plus bytes written."""
    source, target = (torch.empty(size, dtype=torch.uint8, device=DEVICE).random_() for _ in range(2))
    timed = time_us(lambda: target.copy_(source))
    return {"bytes_moved": 2 * size, **timed, "gb_per_s": round(2 * size / timed["device_us"] / 1e3, 1)}


def layer_times(layer: str, rank: int, batch: int, dtype: torch.dtype, names: Sequence[str]) -> list[Record]:
    """Forward, and with backward (counted as 3 x its FLOPs), of the operations named; each compared with float64."""
    (i1, i2), (o1, o2) = LAYERS[layer]
    network, tensors, dy = draw((i1, i2), (o1, o2), rank, batch, dtype)
    weight = dense_weight(network, [t.detach().double() for t in tensors[1:]]).to(dtype).requires_grad_()
    records = []
    for name in names:
        operation, reference, operands = OPERATIONS[name], rebuilt, tensors
        macs = rank * min(o1 * i2 * (i1 + o2), i1 * o2 * (i2 + o1))  # of a token, in the cheaper order
        if name == "dense":
            reference, operands, macs = dense, [tensors[0], weight], i1 * i2 * o1 * o2
        expected = exact_results(reference, network, operands, dy)
        error = max(errors(results(operation, network, operands, dy), expected))
        forward = partial(operation, operands[0].detach(), network, [t.detach() for t in operands[1:]])
        training = partial(results, operation, network, operands, dy)
        for direction, passes, call in (("forward", 1, forward), ("forward+backward", 3, training)):
            record: Record = {"layer": layer, "rank": rank, "batch": batch, "dtype": str(dtype), "operation": name}
            record |= {"direction": direction, "relative_rms_error": error}
            if error > TOLERANCE[dtype]:
                records.append(record | {"refused": "parity failed, so it is not timed"})
            else:
                timed = time_us(call)
                records.append(record | timed | {"tflop_per_s": rate(2 * passes * batch * macs, timed)})
    return records


def all_layer_times() -> list[Record]:
    """bfloat16 over all layers, ranks and batches (the dense layer once a batch); float32 in a few places."""
    records = []
    for layer in LAYERS:
        for batch in BATCHES:
            for rank in RANKS:
                names = list(OPERATIONS) if rank == RANKS[0] else ["unfused", "rebuilt", "tt2"]
                records += layer_times(layer, rank, batch, torch.bfloat16, names)
            if batch in (16, 4096):
                records += layer_times(layer, 8, batch, torch.float32, list(OPERATIONS))
    return records


def show(report: Record) -> None:
    """The figures as tables."""
    print("same bits in every run:", report["reruns"])
    print("launch costs:", report["launch_costs"])
    for record in report["products"]:
        sizes = " x ".join(str(record[key]) for key in ("batch", "m", "n", "k"))
        print(f"{record['dtype']:15} {sizes:26} {record['device_us']:10.1f} us {record['tflop_per_s']:8.1f} TFLOP/s")
    print(f"copy: {report['copy']['gb_per_s']} GB/s\ndevice us (eager us); ratio: tt2 / dense, by device us")
    keys = ("layer", "dtype", "direction", "batch", "rank")
    print("".join(f"{cell:>18}" for cell in (*keys, *OPERATIONS, "tt2 TFLOP/s", "ratio")))
    rows: dict[tuple[Any, ...], dict[str, Record]] = {}
    for record in report["layers"]:
        rows.setdefault(tuple(record[key] for key in keys), {})[record["operation"]] = record
    baseline: Record = {}
    for key, row in sorted(rows.items()):
        baseline = row.setdefault("dense", baseline)  # measured at the lowest rank of a batch, which is sorted first
        found = [row[name] for name in OPERATIONS]
        cells = ["-" if "refused" in r else f"{r['device_us']:.1f} ({r['eager_us']:.0f})" for r in found]
        ratio = row["tt2"].get("device_us", math.nan) / baseline.get("device_us", math.nan)
        cells += [str(row["tt2"].get("tflop_per_s", "-")), f"{ratio:.2f}"]
        print("".join(f"{cell!s:>18}" for cell in (key[0], key[1].removeprefix("torch."), *key[2:], *cells)))


def output_of(*command: str) -> str:
    """What a command prints, or "unknown"."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() or "unknown"
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> int:
    """Measure, write the JSON and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    out = parser.parse_args().out
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA device, and torch finds none.", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "triton": triton.__version__}
    versions |= {"cuda": torch.version.cuda, "gpu": torch.cuda.get_device_name()}
    versions["driver"] = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    report: Record = {"commit": output_of("git", "rev-parse", "HEAD")}
    report |= {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "versions": versions}
    sections: dict[str, Callable[[], Any]] = {
        "parity": lambda: [record for dtype in TOLERANCE for record in parity(dtype)],
        "reruns": reruns, "launch_costs": launch_costs, "products": products, "copy": copy_rate,
        "layers": all_layer_times,
    }  # fmt: skip
    for name, measure in sections.items():
        start = time.perf_counter()
        report[name] = measure()
        report[f"{name}_section_s"] = round(time.perf_counter() - start, 1)
        out.write_text(json.dumps(report, indent=1) + "\n")  # what is measured is kept if a later section fails
        print(f"{name}: {report[f'{name}_section_s']} s", flush=True)
    show(report)
    failed = [r for r in (*report["parity"], *report["layers"]) if "refused" in r or not r.get("passed", True)]
    print(*(f"PARITY FAILED {record}" for record in failed), f"written to {out}", sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
