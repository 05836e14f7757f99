"""What a measurement on a GPU says: ratios to dense, which targets hold, and the constants that predictions rest on."""

from __future__ import annotations

import json
import os
import statistics
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import gpu_cases as cases
from gpu_cases import ROOT, Record
from gpu_sections import TIMED

from tensorlayers import launch_tables, machine

WAYS = ("forward", "training")
FORWARD = {4: 3.3, 8: 1.9, 12: 1.25, 16: 0.95}
"""Of tensor trains at 4096 -> 4096 and 4096 rows, by rank: how many times as fast as dense they are to be."""
TRAINING = {8: 1.5}
DECODE = {"TT": {1: 2.0, 4: 1.4}, "LowRank": {1: 1.4, 4: 1.4, 16: 1.4}}
"""At a tenth of the parameters, by rows."""
SLOWEST = 1 / 1.15
"""Of any format from 1024 rows on, where to rebuild the weight takes this share of dense's FLOPs at most:"""
REBUILD_SHARE = 0.05
RATE = 0.5
"""Of the fastest GEMM's rate."""


def ratio(record: Record, name: str, what: str) -> float:
    """Dense's time over that of a way, above 1 where it is faster; 0.0 where it was not timed."""
    if "refused" in record[name]:
        return 0.0
    return float(record["dense"][what]["device_us"] / record[name][what]["device_us"])


def targets(report: Record) -> list[Record]:
    """Each target with what was measured."""
    return [
        {"target": name, "least": least, "measured": round(found, 3), "passed": found >= least}
        for name, least, found in _targets(report)
    ]


def _targets(report: Record) -> Iterator[tuple[str, float, float]]:
    for record in report["trains"]:
        named = f"{record['layer']}, TT({record['rank']}), {record['rows']} rows"
        if record["rows"] == 4096 and record["layer"] == "4096->4096":
            for what, wanted in (("forward", FORWARD), ("training", TRAINING)):
                if record["rank"] in wanted:
                    yield f"{named}, {what}", wanted[record["rank"]], ratio(record, "None", what)
            yield f"{named}, share of the GEMM rate", RATE, _rate(report, record)
        elif record["rows"] == 4096 and record["rank"] == 8:
            for what in WAYS:
                yield f"{named}, {what}", 1.0, ratio(record, "None", what)
    for record in report["formats"]:
        if record["rows"] in DECODE.get(record["format"], {}):
            least = DECODE[record["format"]][record["rows"]]
            yield f"decode, {record['format']}, {record['rows']} rows", least, ratio(record, "None", "forward")
    for section in ("trains", "formats", "others"):
        for record in report[section]:
            named = f"{section}: {_label(record)}"
            for what in WAYS:
                if record["rows"] >= 1024 and record["rebuild_share"] <= REBUILD_SHARE:
                    yield f"{named}, {what}, a cheap rebuild", SLOWEST, ratio(record, "None", what)
                if record["converted"][what]:
                    yield f"{named}, {what}, converted by plans", 1.0, ratio(record, "None", what)
            saved = record["None"].get("saved_bytes", float("inf"))
            yield f"{named}, bytes saved, dense / factorized", 1.0, record["dense"]["saved_bytes"] / saved


def _rate(report: Record, record: Record) -> float:
    kind = str(cases.dtype)
    best = max(gemm["tflop_per_s"] for gemm in report["roofline"]["gemms"] if gemm["dtype"] == kind)
    chosen = record["fused"].get("chosen", {}).get("forward", {})
    return float(chosen.get("tflop_per_s", 0.0) / best)


def _label(record: Record) -> str:
    return ", ".join(f"{k} {v}" for k, v in record.items() if not isinstance(v, dict))


def show(report: Record) -> None:
    """Ratios of dense's time to that of each way: above 1 it is faster; in brackets, of a training step."""
    for section in TIMED:
        print(f"\n{section}: dense / way, forward (training); device time; saved bytes")
        for record in report[section]:
            dense = record["dense"]
            print(f"  {_label(record)}; dense {dense['forward']['device_us']:.1f} us, {dense['saved_bytes']} bytes")
            for name, found in record.items():
                if isinstance(found, dict) and name != "dense" and ("forward" in found or "refused" in found):
                    print(f"    {name:18} {_line(record, name)}")
    print("\ntargets: measured, least; those that are missed last")
    for one in sorted(report["targets"], key=lambda one: not one["passed"]):
        print(
            f"  {'holds ' if one['passed'] else 'MISSED'} {one['measured']:8.2f} {one['least']:6.2f}  {one['target']}"
        )


def _line(record: Record, name: str) -> str:
    found = record[name]
    if "refused" in found:
        return str(found["refused"])
    if not isinstance(found["forward"], dict):
        return str(found)
    forward, training = (ratio(record, name, what) for what in WAYS)
    chosen = found.get("chosen", {}).get("forward", {})
    rate = f"{chosen['tflop_per_s']:.0f} TFLOP/s" if "tflop_per_s" in chosen else ""
    head = f"{forward:.2f} ({training:.2f})  {found['forward']['device_us']:.1f} us  {found['saved_bytes']} bytes"
    return f"{head}  {chosen.get('way', '')} {rate}"


def failures(report: Record) -> list[str]:
    """What is not right, in any section; a target that is missed is not wrong."""
    wrong = [f"{section}: {text}" for section, text in report.get("failed", {}).items()]
    wrong += [str(record) for record in (*report["parity"], *report["reruns"]) if not record["passed"]]
    for section in TIMED:
        for record in report[section]:
            for name, found in record.items():
                if isinstance(found, dict):
                    is_wrong = not found.get("passed", True) or any(
                        word in found.get("refused", "") for word in ("parity", "error")
                    )
                    wrong += [f"{section}: {_label(record)}: {name}: {found}"] * is_wrong
    return wrong


# -- constants --------------------------------------------------------------------------------------------------------


def constants(report: Record) -> Record:
    """What predictions rest on: of torch's operations, and of the kernels of this architecture."""
    roof = report["roofline"]
    most = max(record["rows"] for record in report["trains"])
    rates = [
        record["fused"]["chosen"]["forward"]["tflop_per_s"]
        for record in report["trains"]
        if "chosen" in record["fused"] and record["rows"] == most
    ]
    best = {
        name: max(gemm["tflop_per_s"] for gemm in roof["gemms"] if gemm["dtype"] == f"torch.{name}")
        for name in ("bfloat16", "float32")
    }
    return {
        "arch": launch_tables.architecture(cases.device),
        "gemm_tflop_per_s": best,
        "copy_bytes_per_s": roof["copy_bytes_per_s"],
        "launch_s": roof["launch_s"],
        "chain_tflop_per_s": statistics.median(rates) if rates else None,
    }


LIKELY = {"tflop_per_s": (0.1, 1e5), "copy_bytes_per_s": (1e9, 1e15), "launch_s": (1e-8, 1e-2)}
"""Between what a constant of a GPU is; what a name ends in counts."""


def adopt(report: Record, folder: Path = ROOT / "tensorlayers") -> list[Path]:
    """Write the constants of a report to both tables that predictions are read from, in the folder of the package, or
    to none.

    Raises
    ------
    ValueError
        If it is a report of a dry run, or one without likely constants; or no launch table is of its architecture.
    OSError
        If a table cannot be written.
    """
    found = adoptable(report)
    path = folder / "launches" / f"{found['arch']}.json"
    if path not in (folder / "launches").glob("*.json"):
        raise ValueError(f"an architecture that the package has a launch table for; got {found['arch']}")
    half = found["gemm_tflop_per_s"]["bfloat16"] * 1e12
    on = {
        "flops.bfloat16": half,
        "flops.float16": half,
        "flops.float32": found["gemm_tflop_per_s"]["float32"] * 1e12,
        "memory": found["copy_bytes_per_s"],
        "cached": found["copy_bytes_per_s"],
        "launch": found["launch_s"],
    }
    table = {"memory": found["copy_bytes_per_s"], "launch": found["launch_s"]}
    if found.get("chain_tflop_per_s") is not None:
        table["rates.half"] = found["chain_tflop_per_s"] * 1e12
    paths = [folder / "machines" / "cuda.json", path]
    texts = [_changed(one, changes) for one, changes in zip(paths, (on, table), strict=True)]
    _write_all(dict(zip(paths, texts, strict=True)), (machine.read, lambda new: launch_tables.read(new, found["arch"])))
    return paths


def adoptable(report: Record) -> Record:
    """The constants of a report, which are those of a GPU; a ValueError says why they are not."""
    if not isinstance(report, dict):
        raise ValueError(f"a report is a JSON object; got {type(report).__name__}")
    # Before dry runs were marked, they were those that name no GPU.
    if report.get("dry", "gpu" not in report.get("versions", ())) is not False:
        raise ValueError("a report of a GPU; this one is of a dry run, in the interpreter")
    found = report.get("constants")
    if not isinstance(found, dict):
        raise ValueError("a report with constants; this one has none: what they are made of was not measured")
    best = found.get("gemm_tflop_per_s")
    best = best if isinstance(best, dict) else {}
    numbers = {f"gemm_tflop_per_s: {name}": best.get(name) for name in ("bfloat16", "float32")}
    numbers |= {name: found.get(name) for name in ("copy_bytes_per_s", "launch_s", "chain_tflop_per_s")}
    for name, number in numbers.items():
        least, most = next(ends for end, ends in LIKELY.items() if end in name)
        if name == "chain_tflop_per_s" and number is None:
            continue  # no chain was measured
        if type(number) not in (int, float) or not least <= number <= most:
            raise ValueError(f"constants: {name} is a number from {least:g} to {most:g}; got {number!r}")
    if not isinstance(found.get("arch"), str):
        raise ValueError(f"constants: arch is a text; got {found.get('arch')!r}")
    return found


def _changed(path: Path, changes: Record) -> str:
    """The text of a table with other constants, named "key" or "part.key"."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for name, value in changes.items():
        place, _, key = name.rpartition(".")
        (content[place] if place else content)[key] = value
    rows = content.pop("rows", None)
    text = json.dumps(content, indent=1)
    if rows is not None:  # a row a line
        listed = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        text = f'{text[:-2]},\n "rows": [\n{listed}\n ]\n}}'
    return text + "\n"


def _write_all(texts: dict[Path, str], readers: Sequence[Callable[[Path], object]]) -> None:
    """Write all files or none: each to one beside it, which is read again, before the first takes its place."""
    new = {path: path.with_name(f".{path.name}.{uuid.uuid4().hex}") for path in texts}
    before, replaced = {path: path.read_bytes() for path in texts}, []
    try:
        for (path, text), read in zip(texts.items(), readers, strict=True):
            new[path].write_text(text, encoding="utf-8")
            read(new[path])
        for path, temporary in new.items():
            os.replace(temporary, path)
            replaced.append(path)
    except BaseException:
        for path in replaced:
            path.write_bytes(before[path])
        raise
    finally:
        for temporary in new.values():
            temporary.unlink(missing_ok=True)
