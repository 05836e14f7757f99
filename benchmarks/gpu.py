"""Measure the Triton kernels on a GPU: parity, reruns, times beside dense, unfused and others' layers; one JSON file.

    python benchmarks/gpu.py --out FILE.json     measure; takes less than 8 minutes
    python benchmarks/gpu.py --adopt FILE.json   write the constants that were found to the tables of the package
    python benchmarks/gpu.py --dry --out FILE    small sizes in Triton's interpreter: tries this script, not the kernels

Needs torch, triton and a CUDA device; no network. Every way is compared with float64 before it is timed, and is not
timed where that fails; the exit code is then 1. Every figure's key ends in its unit. `device_us` is the median over
replays of a CUDA graph, without launch gaps; `eager_us` the median over ordinary calls; both with a cold L2 cache.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import gpu_cases as cases
import torch
import torch.nn.functional as F
import triton
from gpu_cases import FORMATS, ROOT, TOLERANCE, Layer, Record, blocks, train, tucker, with_parameters
from torch import Tensor, nn

from tensorlayers import decision, launch

Run = Callable[[], Any]
LAYERS = {"4096->4096": ((64, 64), (64, 64)), "768->3072": ((48, 64), (24, 32)), "1024->4096": ((64, 64), (32, 32))}
"""Modes out and in."""
RANKS = (4, 8, 12, 16)
BATCHES = (1024, 4096)
RAGGED = (  # modes out, modes in, rank, rows
    ((1, 1), (1, 1), 1, 1), ((11, 3), (5, 7), 3, 13), ((1, 37), (41, 1), 5, 7), ((67, 131), (66, 127), 3, 257),
    ((70, 5), (131, 133), 2, 9), ((24, 32), (48, 64), 8, 4097),
)  # fmt: skip
HALF = torch.bfloat16
is_dry = False


# -- time -------------------------------------------------------------------------------------------------------------


def timed(call: Run) -> Record:
    """Median times of a call, with the L2 cache flushed before each."""
    if is_dry:
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


def trained(run: Callable[..., Tensor], x: Tensor, parameters: list[Tensor], dy: Tensor) -> Any:
    """A forward and a backward of all gradients."""
    return torch.autograd.grad(run(x, parameters), [x, *parameters], dy)


def both(run: Callable[..., Tensor], layer: Layer, parameters: list[Tensor]) -> Record:
    """The times of a forward and of a training step."""
    x, held = layer.x.detach(), [parameter.detach() for parameter in parameters]
    with torch.no_grad():
        forward = timed(partial(run, x, held))
    return {"forward": forward, "training": timed(partial(trained, run, layer.x, parameters, layer.dy))}


def dense_times(layer: Layer, *, compiled: bool = False) -> Record:
    """Of the dense layer."""
    weight = layer.weight(layer.dtype).requires_grad_()

    def run(x: Tensor, parameters: list[Tensor]) -> Tensor:
        return F.linear(x, parameters[0])

    found = both(torch.compile(run, dynamic=False) if compiled else run, layer, [weight])
    return {**found, "saved_bytes": saved_bytes(run, layer.x, [weight])}


def saved_bytes(run: Callable[..., Tensor], x: Tensor, parameters: list[Tensor]) -> int:
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


def way_times(layer: Layer, name: str | None) -> Record:
    """Of a way of `decision`, which is compared with float64 first."""
    if name is not None and not cases.exists(layer, name):
        return {"refused": "there is no such way"}
    run = cases.way(layer, name)
    error = max(cases.errors(cases.results(run, layer), layer.exact()))
    if error > TOLERANCE[layer.dtype]:
        return {"refused": "parity failed, so it is not timed", "relative_rms_error": error}
    found = both(run, layer, layer.cores)
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
    saved = saved_bytes(run, layer.x, layer.cores)
    return {**found, "chosen": chosen, "relative_rms_error": error, "saved_bytes": saved}


# -- sections ---------------------------------------------------------------------------------------------------------


@contextmanager
def filled_with_nan() -> Iterator[None]:
    """What is allocated is NaN until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def parity() -> list[Record]:
    """The result and every gradient of every kernel, format and dtype, at ragged shapes."""
    records = []
    shapes = RAGGED[:2] if is_dry else RAGGED
    for dtype in TOLERANCE:
        if is_dry and dtype == torch.bfloat16:
            continue
        for format, make in {**FORMATS, "TT, order 3": train}.items():
            for out_modes, in_modes, rank, rows in shapes:
                if format == "TT, order 3":
                    out_modes, in_modes = (*out_modes, 3), (*in_modes, 2)
                layer = Layer(make(out_modes, in_modes, rank), rows, dtype)
                exact = layer.exact()
                for name in decision.KERNELS:
                    if not cases.exists(layer, name):
                        continue
                    with filled_with_nan():
                        found = cases.errors(cases.results(cases.way(layer, name), layer), exact)
                    record = {"dtype": str(dtype), "format": format, "kernel": name, "rows": rows, "rank": rank}
                    record |= {"out": out_modes, "in": in_modes, "errors": found}
                    records.append(record | {"passed": max(found) <= TOLERANCE[dtype]})
    return records


def reruns(times: int = 20) -> list[Record]:
    """Whether the result and each gradient are the same bits in every run."""
    records = []
    for format, make in FORMATS.items():
        layer = Layer(make((8, 8), (8, 8), 3) if is_dry else make((64, 64), (64, 64), 8), 8 if is_dry else 4096, kind())
        for name in decision.KERNELS:
            if not cases.exists(layer, name):
                continue
            run = cases.way(layer, name)
            first = cases.results(run, layer)
            same = [True] * len(first)
            for _ in range(2 if is_dry else times):
                again = cases.results(run, layer)
                same = [s and torch.equal(a, b) for s, a, b in zip(same, first, again, strict=True)]
            records.append({"format": format, "kernel": name, "passed": all(same)})
    return records


def kind() -> torch.dtype:
    """The dtype that is timed."""
    return torch.float16 if is_dry else HALF


def roofline() -> Record:
    """What the machine reaches: GEMMs, a copy, small kernels one after another."""
    if is_dry:
        return {"gemms": [], "copy_bytes_per_s": 1e12, "launch_s": 3e-6}
    gemms = []
    for dtype in (HALF, torch.float32):
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


def trains() -> list[Record]:
    """Tensor trains of two cores: dense, all ways, and what is decided for."""
    records = []
    for name, (out_modes, in_modes) in LAYERS.items():
        if is_dry:
            out_modes, in_modes = (4, 4), (4, 4)
        for rows in (8,) if is_dry else BATCHES:
            for rank in RANKS[:1] if is_dry else RANKS:
                layer = Layer(train(out_modes, in_modes, rank), rows, kind())
                record: Record = {"layer": name, "rows": rows, "rank": rank, "dense": dense_times(layer)}
                record |= {str(way): way_times(layer, way) for way in ("fused", "contraction", "rebuild", None)}
                if "fused_rebuild" in decision.KERNELS:
                    record["fused_rebuild"] = way_times(layer, "fused_rebuild")
                records.append(record)
    return records


def others() -> list[Record]:
    """The same product by other means: compiled, and by tensorly-torch."""
    records = []
    for name in ("4096->4096",) if is_dry else ("4096->4096", "768->3072"):
        out_modes, in_modes = ((4, 4), (4, 4)) if is_dry else LAYERS[name]
        layer = Layer(train(out_modes, in_modes, 8), 8 if is_dry else 4096, kind())
        record: Record = {"layer": name, "rows": layer.rows, "rank": 8, "dense": dense_times(layer)}
        if not is_dry:
            record["dense, compiled"] = dense_times(layer, compiled=True)
            record["einsum, compiled"] = both(torch.compile(cases.einsum(layer), dynamic=False), layer, layer.cores)
        record["fused"] = way_times(layer, "fused")
        record["tensorly-torch"] = tensorly_torch(layer)
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
    return both(lambda x, _: theirs(x), layer, parameters)


def formats() -> list[Record]:
    """Every format at a tenth of the parameters, from single rows to batches."""
    records = []
    for format in FORMATS:
        out_modes, in_modes = ((4, 4), (4, 4)) if is_dry else LAYERS["4096->4096"]
        dense = math.prod(out_modes) * math.prod(in_modes)
        network = with_parameters(format, out_modes, in_modes, (0.5 if is_dry else 0.1) * dense)
        for rows in (2,) if is_dry else (1, 4, 16, 256, 4096):
            layer = Layer(network, rows, kind())
            record: Record = {"format": format, "rows": rows, "ranks": network.ranks, "dense": dense_times(layer)}
            for name in (*decision.KERNELS, None):
                record[str(name)] = way_times(layer, name)
            records.append(record)
    return records


def fused() -> list[Record]:
    """The chain kernel over formats at the ranks where it is to pay."""
    records = []
    made = {
        "TT, order 3": train((16, 16, 16), (16, 16, 16), 8),
        "Tucker": tucker((64, 64), (64, 64), 32),
        "BTT, balanced": blocks((64, 64), (64, 64), 3),
        "BTT, skewed": blocks((512, 8), (8, 512), 25),
    }
    if is_dry:
        made = {"TT, order 3": train((2, 2, 2), (2, 2, 2), 2)}
    for name, network in made.items():
        layer = Layer(network, 8 if is_dry else 4096, kind())
        record: Record = {"network": name, "rows": layer.rows, "dense": dense_times(layer)}
        records.append(record | {str(way): way_times(layer, way) for way in ("fused", None)})
    return records


# -- constants --------------------------------------------------------------------------------------------------------


def constants(report: Record) -> Record:
    """What predictions rest on: of torch's operations, and of the kernels of this architecture."""
    roof = report["roofline"]
    rates = [
        record["fused"]["chosen"]["forward"]["tflop_per_s"]
        for record in report["trains"]
        if "chosen" in record["fused"] and record["rows"] == max(r["rows"] for r in report["trains"])
    ]
    best = {
        name: max((g["tflop_per_s"] for g in roof["gemms"] if g["dtype"] == f"torch.{name}"), default=None)
        for name in ("bfloat16", "float32")
    }
    return {
        "arch": launch.architecture(cases.device),
        "gemm_tflop_per_s": best,
        "copy_bytes_per_s": roof["copy_bytes_per_s"],
        "launch_s": roof["launch_s"],
        "chain_tflop_per_s": statistics.median(rates) if rates else None,
    }


def adopt(report: Record) -> list[Path]:
    """Write the constants of a report to the tables that predictions are read from."""
    found, written = report["constants"], []
    folder = ROOT / "tensorlayers"
    for path, changes in (
        (folder / "machines" / "cuda.json", _machine_changes(found)),
        (launch.SHIPPED / f"{found['arch']}.json", _table_changes(found)),
    ):
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        for name, value in changes.items():
            place, _, key = name.rpartition(".")
            (content[place] if place else content)[key] = value
        rows = content.pop("rows", None)
        text = json.dumps(content, indent=1)
        if rows is not None:  # a row a line
            listed = ",\n".join(f"  {json.dumps(row)}" for row in rows)
            text = f'{text[:-2]},\n "rows": [\n{listed}\n ]\n}}'
        path.write_text(text + "\n", encoding="utf-8")
        written.append(path)
    return written


def _machine_changes(found: Record) -> Record:
    half = found["gemm_tflop_per_s"]["bfloat16"] * 1e12
    return {
        "flops.bfloat16": half,
        "flops.float16": half,
        "flops.float32": found["gemm_tflop_per_s"]["float32"] * 1e12,
        "memory": found["copy_bytes_per_s"],
        "cached": found["copy_bytes_per_s"],
        "launch": found["launch_s"],
    }


def _table_changes(found: Record) -> Record:
    return {
        "rates.half": found["chain_tflop_per_s"] * 1e12,
        "memory": found["copy_bytes_per_s"],
        "launch": found["launch_s"],
    }


# -- the command ------------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[], Any]] = {
    "parity": parity,
    "reruns": reruns,
    "roofline": roofline,
    "trains": trains,
    "formats": formats,
    "fused": fused,
    "others": others,
}


def show(report: Record) -> None:
    """Ratios of dense's time to that of each way: above 1 it is faster; in brackets, of a training step."""
    for section in ("trains", "formats", "fused", "others"):
        print(f"\n{section}: dense / way, forward (training)")
        for record in report[section]:
            head = ", ".join(f"{k} {v}" for k, v in record.items() if not isinstance(v, dict))
            print(f"  {head}; dense {record['dense']['forward']['device_us']:.1f} us")
            for name, found in record.items():
                if isinstance(found, dict) and name != "dense":
                    print(f"    {name:18} {_ratios(record['dense'], found)}")


def _ratios(dense: Record, found: Record) -> str:
    if "refused" in found:
        return str(found["refused"])
    ratios = [dense[what]["device_us"] / found[what]["device_us"] for what in ("forward", "training")]
    chosen = found.get("chosen", {}).get("forward", {})
    rate = f"{chosen['tflop_per_s']:.0f} TFLOP/s" if "tflop_per_s" in chosen else ""
    return f"{ratios[0]:.2f} ({ratios[1]:.2f})  {found['forward']['device_us']:.1f} us  {chosen.get('way', '')} {rate}"


def failures(report: Record) -> list[str]:
    """What is not right, in any section."""
    wrong = [str(record) for record in (*report["parity"], *report["reruns"]) if not record["passed"]]
    for section in ("trains", "formats", "fused", "others"):
        for record in report[section]:
            wrong += [f"{section}: {name}: {found}" for name, found in record.items()
                      if isinstance(found, dict) and "parity" in found.get("refused", "")]  # fmt: skip
    return wrong


def output_of(*command: str) -> str:
    """What a command prints, or "unknown"."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() or "unknown"
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def about() -> Record:
    """What was measured, with what, when."""
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "triton": triton.__version__}
    if not is_dry:
        versions |= {"cuda": torch.version.cuda, "gpu": torch.cuda.get_device_name()}
        versions["driver"] = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"commit": output_of("git", "rev-parse", "HEAD"), "date": date, "versions": versions}


def main() -> int:
    """Measure, write the JSON and print the tables; or adopt what was measured."""
    global is_dry
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--adopt", type=Path, help="the JSON file whose constants the package is to use")
    parser.add_argument("--dry", action="store_true", help="in the interpreter, of small sizes")
    given = parser.parse_args()
    if given.adopt:
        print(*adopt(json.loads(given.adopt.read_text(encoding="utf-8"))), sep="\n")
        return 0
    if given.out is None:
        parser.error("--out or --adopt")
    is_dry = given.dry
    if is_dry:
        cases.device = "cpu"
    elif not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA device, and torch finds none.", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    report = about()
    for name, measure in SECTIONS.items():
        start = time.perf_counter()
        report[name] = measure()
        report[f"{name}_section_s"] = round(time.perf_counter() - start, 1)
        given.out.write_text(json.dumps(report, indent=1) + "\n")  # what is measured is kept if a later section fails
        print(f"{name}: {report[f'{name}_section_s']} s", flush=True)
    report["constants"] = constants(report)
    given.out.write_text(json.dumps(report, indent=1) + "\n")
    show(report)
    wrong = failures(report)
    print(*(f"FAILED {text}" for text in wrong), f"written to {given.out}", sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
