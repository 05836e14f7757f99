"""Tuning: the launch table of a GPU of this machine, from the times of its rows' neighbours."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from . import backend, launch, launch_tables
from .errors import CostModelError
from .files import replaced
from .launch_tables import LEAST, Row, Table, Tiles
from .machine import VARIABLE, measured

Timer = Callable[[Callable[[], None]], float]
"""A call -> its time, in any unit."""

_LARGE = 256
"""The size of what a row does not bound: no smaller than the largest tile that is tried."""

_HEADS, _SMALL = 2048, 32
"""Of a problem whose heads share matrices; the largest tile of what is not timed, on a chip without a table."""


def tune(
    device: torch.device | str = "cuda",
    timer: Timer | None = None,
    progress: Callable[[Iterable[Row]], Iterable[Row]] = iter,
) -> Table:
    """Measure the tiles next to those of each half-precision row of the chain kernel, and keep the fastest.

    What a row is given was launched as it is written. Processors and shared memory are those of the GPU. All else is
    not measured: the rows for tf32 and float32, the entries of the other kernels and the rates are copied from the
    shipped table. Where its tiles may not fit (see `launch_tables.is_for`), those that are copied are cut to what any
    GPU holds.

    Parameters
    ----------
    device : torch.device or str
    timer : callable, optional
        By default the median of a call on a GPU, with a cold cache.
    progress : callable
        What goes over the rows.

    Returns
    -------
    Table
        The shipped one, with what was found; `write` makes it what launches are taken from.

    Raises
    ------
    CostModelError
        If there is no such device, no Triton or no GPU; or the GPU launches no tiles of a row, however small.
    """
    place = _checked(device, is_timed=timer is None)
    arch = launch_tables.architecture(place)
    table = replace(_of_any(launch_tables.shipped(arch), arch), arch=arch)
    if place.type == "cuda":
        properties = torch.cuda.get_device_properties(place)
        memory = getattr(properties, "shared_memory_per_block_optin", 0) or table.shared_memory
        table = replace(table, processors=properties.multi_processor_count, shared_memory=memory)
    timer = timer or _device_time
    with torch.cuda.device(place if place.type == "cuda" else -1):  # -1: none
        rows = [_fastest(row, table, place, timer) if row.dtype == "half" else row for row in progress(table.rows)]
    return replace(table, rows=tuple(rows))


def _checked(device: torch.device | str, *, is_timed: bool) -> torch.device:
    try:
        place = torch.device(device)
    except RuntimeError:
        raise CostModelError(f'a device as torch names it, such as "cuda" or "cuda:1"; got {device!r}') from None
    if place.type not in ("cpu", "cuda"):
        raise CostModelError(f"Triton kernels run on a GPU; got the device {place}")
    if not backend.is_present():
        raise CostModelError("Triton is needed, and it is not installed")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if is_timed and place.type == "cpu":
        raise CostModelError("times are measured on a GPU; got the device cpu")
    if place.type == "cuda" and (place.index or 0) >= count:
        raise CostModelError(f"a GPU is needed, and torch finds {count or 'none'}; got the device {place}")
    if place.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise CostModelError("on the CPU kernels run in Triton's interpreter alone: set TRITON_INTERPRET=1")
    return place


def _of_any(table: Table, arch: str) -> Table:
    """A table for an architecture: itself, or where its tiles may be too large with none that any GPU lacks memory for.

    Rows for half precision are as they were: these are timed.
    """
    if launch_tables.is_for(table, arch):
        return table

    def cut(entry: dict[str, int]) -> dict[str, int]:
        small = {"stages": 1, "heads": 1, "rows": 1, "warps": min(4, entry.get("warps", 4))}
        return {k: small.get(k, n if k in ("ids", "warp", "ragged_warp") else min(n, _SMALL)) for k, n in entry.items()}

    kernels = {name: {k: cut(entry) for k, entry in of.items()} for name, of in table.kernels.items()}
    rows = []
    for row in table.rows:
        if row.dtype != "half" and (not row.held or (row.inner or 0) <= _SMALL):
            tiles = {name: size for name, size in row.tiles._asdict().items() if name != "held"}
            row = replace(row, tiles=Tiles(held=row.held, **cut(tiles)))
        elif row.dtype != "half":
            continue  # the rows for any size take what it is for
        rows.append(row)
    return replace(table, kernels=kernels, rows=tuple(rows))


def _fastest(row: Row, table: Table, device: torch.device, timer: Timer) -> Row:
    operands = _operands(row, device)
    problem = backend.load("chain").problem(*operands)
    if row.shared:
        # The launch takes fewer heads a program than a row says where more programs are predicted to be faster. Where
        # they run one after another none is, and of so many heads a chip is full all the same.
        table = replace(table, processors=1)
    start: Tiles | None = _within(row)
    while start is not None:
        times = {}
        for tiles in neighbours(start, is_shared=row.shared):
            only = replace(table, rows=(replace(row, tiles=tiles, n=None, m=None), *table.rows))
            if launch.launch(problem, only).tiles != tiles:
                continue  # others would be timed: tiles are cut to the sizes that the row is for
            try:
                times[tiles] = timer(lambda only=only: backend.load("chain").run(*operands, table=only))  # type: ignore[misc]
            except Exception as error:
                if not _is_too_large(error):
                    raise
        if times:
            return replace(row, tiles=min(times, key=times.__getitem__))
        start = _smaller(start)
    raise CostModelError(f"the GPU launches no tiles of {row}, however small")


def _within(row: Row) -> Tiles:
    """The tiles of a row, none larger than the sizes that it is for."""
    tiles, inner = row.tiles, row.inner or _LARGE
    n = launch.fitted(row.n or _LARGE, tiles.n)
    return tiles._replace(n=n, p=launch.fitted(inner, tiles.p), q=launch.fitted(inner, tiles.q))


def _smaller(tiles: Tiles) -> Tiles | None:
    """Tiles that take less of a chip; None where there are none."""
    for name, least in (("stages", 1), ("heads", 1), ("n", LEAST), ("m", LEAST)):
        if getattr(tiles, name) > least:
            return tiles._replace(**{name: max(least, getattr(tiles, name) // 2)})
    if tiles.held or max(tiles.p, tiles.q) == LEAST:
        return None
    return tiles._replace(p=max(LEAST, tiles.p // 2), q=max(LEAST, tiles.q // 2))


def _is_too_large(error: Exception) -> bool:
    """Whether the chip lacks what a launch asks for; Triton is not imported to name its error."""
    return type(error).__name__ in ("OutOfResources", "PTXASError")


def neighbours(tiles: Tiles, *, is_shared: bool) -> Iterator[Tiles]:
    """The tiles themselves, and those with one number twice or half as large."""
    yield tiles
    changes = [("warps", 2, 8), ("stages", 1, 4)]
    changes += [("m", LEAST, 128), ("n", LEAST, _LARGE)]
    if is_shared:
        changes.append(("heads", 1, 8))
    if not tiles.held:
        changes += [("p", LEAST, 128), ("q", LEAST, 128)]
    for name, least, most in changes:
        now = getattr(tiles, name)
        others = (now - 1, now + 1) if name == "stages" else (now // 2, now * 2)
        yield from (tiles._replace(**{name: other}) for other in others if least <= other <= most)


def _operands(row: Row, device: torch.device | str) -> list[Tensor]:
    """A large problem that the row is for: left, middle, right and out, as the kernel takes them."""
    inner, n, m = row.inner or _LARGE, row.n or _LARGE, row.m or 64
    if not row.aligned:
        inner, n, m = inner - 1, n - 1, m - 1

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float16, device=device)

    if row.shared:
        heads, terms = (_HEADS, 8) if row.held else (_HEADS // 4, 4)
        left = drawn(1, 1, terms, m, inner).expand(heads, -1, -1, -1, -1)
        right = drawn(1, 1, terms, inner, n).expand(heads, -1, -1, -1, -1)
        middle = drawn(heads, 1, 1, inner, inner).expand(-1, -1, terms, -1, -1)
    else:
        # q, the rank of a train, is small: no larger than the largest of its tiles that is tried.
        heads, terms, m, q = 4, 4, row.m or 4096, 2 * row.tiles.q
        left = drawn(1, 1, terms, m, inner).expand(heads, -1, -1, -1, -1)
        right, middle = drawn(heads, 1, terms, q, n), drawn(heads, 1, terms, inner, q)
    return [left, middle, right, drawn(heads, 1, m, n)]


def _device_time(call: Callable[[], None]) -> float:
    from importlib import import_module

    found: float = import_module("triton.testing").do_bench(call, warmup=10, rep=30, return_mode="median")
    return found


def destination(device: torch.device | str = "cuda", out: Path | None = None) -> Path:
    """Where a table is to be written, found out before one is measured: a file can be made there.

    Parameters
    ----------
    device : torch.device or str
    out : Path, optional
        The file. By default the one that launches on this machine are taken from.

    Raises
    ------
    CostModelError
        If there is no such device, no directory for the table, or the file is a directory.
    OSError
        If no file can be written there.
    """
    path = _path(launch_tables.architecture(_checked(device, is_timed=True)), out)
    if path.is_dir():
        raise CostModelError(f"a file to write the table to; {path} is a directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    probe = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        probe.touch()
    finally:
        probe.unlink(missing_ok=True)
    return path


def _path(arch: str, out: Path | None) -> Path:
    directory = measured()
    if out is None and directory is None:
        raise CostModelError(f"a directory to write to: there is no home; set {VARIABLE}, or pass --out FILE")
    return out or cast(Path, directory) / f"{arch}.json"


def write(table: Table, out: Path | None = None) -> Path:
    """Write a table, by default where launches are taken from on this machine, whole or not at all.

    Raises
    ------
    CostModelError
        If there is no directory for it.
    OSError
        If it cannot be written.
    """
    path = _path(table.arch, out)
    with replaced(path) as temporary:
        temporary.write_text(to_json(table), encoding="utf-8")
        launch_tables.read(temporary, table.arch)
    launch_tables.table.cache_clear()
    return path


def to_json(table: Table) -> str:
    """A table as its file: a row a line."""
    content = {name: value for name, value in asdict(table).items() if name != "rows"}
    listed = []
    for row in table.rows:
        tiles = row.tiles._asdict()
        del tiles["held"]
        listed.append(json.dumps({**{k: v for k, v in asdict(row).items() if k != "tiles"}, "tiles": tiles}))
    head = json.dumps(content, indent=1)[:-2]
    return head + ',\n "rows": [\n' + ",\n".join(f"  {row}" for row in listed) + "\n ]\n}\n"
