"""Tuning: the launch table of this machine's GPU, from the times of its rows' neighbours."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from . import backend, launch
from .errors import CostModelError
from .launch import Row, Table, Tiles
from .machine import measured

Timer = Callable[[Callable[[], None]], float]
"""A call -> its time, in any unit."""

_LARGE = 256
"""The size of what a row does not bound."""


def tune(
    device: torch.device | str = "cuda",
    timer: Timer | None = None,
    progress: Callable[[Iterable[Row]], Iterable[Row]] = iter,
) -> Table:
    """Measure the tiles next to those of each row for half precision, and keep the fastest.

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
        If there is no Triton or no GPU.
    """
    refusal = backend.refusal(torch.device(device).type, "float16")
    if timer is None and (torch.device(device).type != "cuda" or not torch.cuda.is_available()):
        refusal = refusal or "a GPU, and torch finds none"
    if refusal is not None:
        raise CostModelError(f"tune needs {refusal}")
    table = launch.shipped(launch.architecture(device))
    timer = timer or _device_time
    rows = [_fastest(row, table, device, timer) if row.dtype == "half" else row for row in progress(table.rows)]
    return replace(table, arch=launch.architecture(device), rows=tuple(rows))


def _fastest(row: Row, table: Table, device: torch.device | str, timer: Timer) -> Row:
    operands = _operands(row, device)
    times = {}
    for tiles in neighbours(row.tiles, is_shared=row.shared):
        only = replace(table, rows=(replace(row, tiles=tiles, inner=row.inner, n=None, m=None), *table.rows))
        try:
            times[tiles] = timer(lambda only=only: backend.load("chain").run(*operands, table=only))  # type: ignore[misc]
        except Exception as error:
            if not _is_too_large(error):
                raise
    return replace(row, tiles=min(times, key=times.__getitem__)) if times else row


def _is_too_large(error: Exception) -> bool:
    """Whether the chip lacks what a launch asks for; Triton is not imported to name its error."""
    return type(error).__name__ in ("OutOfResources", "PTXASError")


def neighbours(tiles: Tiles, *, is_shared: bool) -> Iterator[Tiles]:
    """The tiles themselves, and those with one number twice or half as large."""
    yield tiles
    changes = [("warps", 2, 8), ("stages", 1, 4)]
    changes += [("m", 16, 128), ("n", 16, 256)]
    if is_shared:
        changes.append(("heads", 1, 8))
    if not tiles.held:
        changes += [("p", 16, 128), ("q", 16, 128)]
    for name, least, most in changes:
        now = getattr(tiles, name)
        others = (now - 1, now + 1) if name == "stages" else (now // 2, now * 2)
        yield from (tiles._replace(**{name: other}) for other in others if least <= other <= most)


def _operands(row: Row, device: torch.device | str) -> list[Tensor]:
    """A large problem that the row is for: left, middle, right and out, as the kernel takes them."""
    inner, n, m = row.inner or _LARGE, row.n or 2 * 64, row.m or 64
    if not row.aligned:
        inner, n, m = inner - 1, n - 1, m - 1

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float16, device=device)

    if row.shared:
        heads, terms = (2048, 8) if row.held else (512, 4)
        left = drawn(1, 1, terms, m, inner).expand(heads, -1, -1, -1, -1)
        right = drawn(1, 1, terms, inner, n).expand(heads, -1, -1, -1, -1)
        middle = drawn(heads, 1, 1, inner, inner).expand(-1, -1, terms, -1, -1)
    else:
        heads, terms, m = 4, 4, row.m or 4096
        left = drawn(1, 1, terms, m, inner).expand(heads, -1, -1, -1, -1)
        right, middle = drawn(heads, 1, terms, 32, n), drawn(heads, 1, terms, inner, 32)
    return [left, middle, right, drawn(heads, 1, m, n)]


def _device_time(call: Callable[[], None]) -> float:
    from importlib import import_module

    found: float = import_module("triton.testing").do_bench(call, warmup=10, rep=30, return_mode="median")
    return found


def write(table: Table) -> Path:
    """Write a table where launches are taken from on this machine, whole or not at all.

    Raises
    ------
    CostModelError
        If there is no directory for it.
    OSError
        If it cannot be written.
    """
    directory = measured()
    if directory is None:
        raise CostModelError("tune: a directory to write to; set TENSORLAYERS_MACHINES")
    path = directory / f"{table.arch}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_text(to_json(table), encoding="utf-8")
        launch.read(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    launch.table.cache_clear()
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
