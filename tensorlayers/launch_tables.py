"""Launch tables: the tiles that each kernel is launched with on an architecture, and what this does.

A table is a JSON file, in the directory ``launches`` of the package or as `tensorlayers tune` measured it. Nothing is
tried at run time: a launch depends on the sizes alone.
"""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .errors import CostModelError
from .machine import measured

SHIPPED = Path(__file__).resolve().parent / "launches"
DEFAULT = "sm_90"
"""The architecture that predictions are made for where there is no GPU; the interpreter takes its tiles too."""

LEAST = 16
"""The smallest tile of a matrix product."""

ALIKE = {"sm_100": ("sm_103",), "gfx942": ("gfx940", "gfx941", "gfx950")}
"""By what is shipped: the other architectures whose programs may have as much shared memory, so that its tiles fit."""

_DTYPES = ("half", "tf32", "float32")

KERNELS = {
    "rebuild": ("m", "n", "k", "warps", "stages"),
    "rebuild_ragged": ("m", "n", "k", "warps", "stages"),
    "cp_in": ("rank", "i1", "i2", "step", "warps", "stages"),
    "cp_out": ("rows", "o1", "o2", "rank", "warps", "stages"),
    "lookup": ("side", "rank", "warp", "ragged_rank", "ragged_warp", "stages", "ids"),
    "lookup_gradients": ("side", "rank", "warp", "ragged_rank", "ragged_warp", "stages", "ids"),
}
"""The entries that a table has beside the rows of the kernel of chains, with the numbers that each has of a dtype."""

# What such a number may be, at least and at most: a power of two ...
_POWERS = {
    **dict.fromkeys(("m", "n", "k", "p", "q", "rank", "ragged_rank", "side"), (LEAST, 256)),  # what is multiplied
    **dict.fromkeys(("i1", "i2", "o1", "o2", "step"), (LEAST, 256)),
    **dict.fromkeys(("heads", "rows", "warps"), (1, 16)),  # heads and rows are unrolled
    **dict.fromkeys(("warp", "ragged_warp"), (1, 2**16)),  # elements
}
# ... or any integer, as those of the chip are.
_INTEGERS = {"stages": (1, 8), "ids": (1, 2**20), "processors": (1, 10**6), "shared_memory": (1, 10**9)}
_REAL = ("cache", "memory", "launch", "step")


def itemsize(dtype: str) -> int:
    """Bytes an element of what tables call "half" (16 bits), "tf32" or "float32"."""
    return 2 if dtype == "half" else 4


class Problem(NamedTuple):
    """The sizes of a sum of chains, ``out[h, m, n] = sum_t left[h, t] (m, p) middle[h, t] (p, q) right[h, t] (q, n)``.

    `shared`: left and right are the same for all values of the first of the two indices of a head. `held`: the middle
    is the same for all terms. `dtype`: "half" (16 bits), "tf32" or "float32", which is multiplied in full precision.
    `aligned`: all are addressed in vectors. `activated`: an activation follows, which takes registers.
    """

    heads: tuple[int, int]
    terms: int
    m: int
    n: int
    p: int
    q: int
    shared: bool
    held: bool
    dtype: str = "half"
    aligned: bool = True
    activated: bool = False

    @property
    def flops(self) -> int:
        """FLOPs without what tiles waste."""
        return 2 * math.prod(self.heads) * self.terms * self.m * self.q * (self.p + self.n)

    @property
    def itemsize(self) -> int:
        """Bytes an element."""
        return itemsize(self.dtype)


class Tiles(NamedTuple):
    """A launch configuration: heads a program, the tile of each dimension, warps and pipeline stages.

    `held`: p and q fit in a tile each and the middle is the same for all terms, so that it is loaded once.
    """

    heads: int
    m: int
    n: int
    p: int
    q: int
    held: bool
    warps: int
    stages: int


@dataclass(frozen=True)
class Row:
    """A row of a table: the tiles of the problems that it is for; of several rows the first one counts.

    Parameters
    ----------
    dtype : str
    shared, held : bool
        As of a `Problem`, `held` where both p and q are at most `inner`.
    inner, n, m : int or None
        The largest sizes that it is for: of p and q, of n, of m; None: any.
    aligned : bool
        Whether it is for aligned problems alone.
    tiles : Tiles
    """

    dtype: str
    shared: bool
    held: bool
    inner: int | None
    n: int | None
    m: int | None
    aligned: bool
    tiles: Tiles

    def fits(self, problem: Problem) -> bool:
        """Whether it is for a problem."""
        sizes = (self.inner, max(problem.p, problem.q)), (self.n, problem.n), (self.m, problem.m)
        return (
            self.dtype == problem.dtype
            and self.shared <= problem.shared
            and self.held <= problem.held
            and self.aligned <= problem.aligned
            and all(most is None or size <= most for most, size in sizes)
        )


@dataclass(frozen=True)
class Table:
    """The launch table of an architecture, and what it does.

    Parameters
    ----------
    arch : str
        "sm_90", "gfx942", ...
    processors : int
    shared_memory : int
        Bytes that a program may have.
    rates : mapping
        FLOP/s that the kernels reach on the whole chip, by the dtype of a `Problem`.
    cache, memory : float
        Bytes/s between processors and cache, and of main memory.
    launch, step : float
        Seconds that a launch takes, in a row of them, and that one step of a program takes at least.
    kernels : mapping
        Of each kernel but that of chains, by the dtype of a `Problem`: its launch configuration.
    rows : tuple of Row
        Of the kernel of chains.
    """

    arch: str
    processors: int
    shared_memory: int
    rates: dict[str, float]
    cache: float
    memory: float
    launch: float
    step: float
    kernels: dict[str, dict[str, dict[str, int]]]
    rows: tuple[Row, ...]

    # Compared and hashed by what it is: launches are cached on it.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def row(self, problem: Problem) -> Row:
        """The first row that fits."""
        return next(row for row in self.rows if row.fits(problem))


def architecture(device: torch.device | str) -> str:
    """The name of a device's architecture, "sm_90" or "gfx942"; `DEFAULT` where it is no GPU."""
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return DEFAULT
    return _architecture(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache
def _architecture(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@lru_cache
def table(arch: str = DEFAULT) -> Table:
    """The table of an architecture: measured on this machine if it was, else as shipped; read once a process.

    An architecture without one has that of the nearest older one of its maker (without any, the oldest). Where this may
    ask for more than it has, `refusal` says so.
    """
    directory = measured()
    path = None if directory is None else directory / f"{arch}.json"
    try:
        if path is not None and path.is_file():
            return read(path, arch)
    except (CostModelError, OSError) as error:
        warnings.warn(f"{error}; the shipped table is used", stacklevel=2)
    return shipped(arch)


def device_table(device: torch.device | str) -> Table:
    """The table of a device's architecture."""
    return table(architecture(device))


def shipped(arch: str) -> Table:
    """The table that comes with the package, whatever was measured."""
    return read(SHIPPED / f"{_nearest(arch)}.json", _nearest(arch))


def is_for(made: Table, arch: str) -> bool:
    """Whether an architecture has the shared memory that a table asks for: it is its own, or one that is `ALIKE`."""
    return arch == made.arch or arch in ALIKE.get(made.arch, ())


def refusal(arch: str) -> str | None:
    """Why no kernel can be launched on an architecture, that there is no table for; None where there is one."""
    if is_for(table(arch), arch):
        return None
    return f"{arch} has no launch table, and others' tiles may not fit its shared memory: run `tensorlayers tune`"


def architectures() -> tuple[str, ...]:
    """Those that there are tables for."""
    return tuple(sorted((path.stem for path in SHIPPED.glob("*.json")), key=_version))


def _version(arch: str) -> tuple[str, int]:
    maker = arch.rstrip("0123456789abcdef") if arch.startswith("gfx") else "sm_"
    digits = "".join(character for character in arch if character.isdigit())
    return maker, int(digits or 0)


def _nearest(arch: str) -> str:
    known = architectures()
    older = [other for other in known if other[:2] == arch[:2] and _version(other) <= _version(arch)]
    same = [other for other in known if other[:2] == arch[:2]]
    return (older or same[:1] or [DEFAULT])[-1]


_ROW = ("dtype", "shared", "held", "inner", "n", "m", "aligned")


def read(path: Path, arch: str | None = None) -> Table:
    """Read a table; `arch`: the architecture that it is to be for.

    Raises
    ------
    CostModelError
        If it is no JSON object of these fields, or its last rows do not take whatever comes.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        rows = tuple(
            Row(**{name: row[name] for name in _ROW}, tiles=Tiles(held=row["held"], **row["tiles"]))
            for row in found.pop("rows")
        )
        made = Table(**found, rows=rows)
        check(made, arch)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        remedy = "delete the file, or run `tensorlayers tune` again"
        raise CostModelError(f"{path}: no launch table ({type(error).__name__}: {error}); {remedy}") from None
    return made


def check(made: Table, arch: str | None = None) -> None:
    """Whether a table is for an architecture and has a row for every problem, sound tiles and constants; a ValueError
    says what is wrong."""
    if not isinstance(made.arch, str) or arch not in (None, made.arch):
        raise ValueError(f"arch is {'a text' if arch is None else repr(arch)}; got {made.arch!r}")
    if not isinstance(made.rates, dict) or set(made.rates) != set(_DTYPES):
        raise ValueError(f"rates of half, tf32 and float32; got {made.rates!r}")
    if not isinstance(made.kernels, dict):
        raise ValueError(f"kernels has {', '.join(KERNELS)}; got {made.kernels!r}")
    _check_whole("", vars(made), ("processors", "shared_memory"))
    reals = [(name, getattr(made, name)) for name in _REAL]
    for name, number in (*reals, *((f"rates: {dtype}", rate) for dtype, rate in made.rates.items())):
        # Of these bounds nothing that is computed overflows; NaN is within none.
        if type(number) not in (int, float) or not 1e-30 <= number <= 1e30:
            raise ValueError(f"{name} is a positive number; got {number!r}")
    for name, dtype in itertools.product(KERNELS, _DTYPES):
        entry = made.kernels.get(name)
        found = entry.get(dtype) if isinstance(entry, dict) else None
        _check_whole(f"kernels: {name}: {dtype}: ", found if isinstance(found, dict) else {}, KERNELS[name])
    for index, row in enumerate(made.rows):
        _check_row(f"rows: {index}: ", row)
    for dtype in _DTYPES:
        large = 10**9
        problem = Problem((1, 1), 1, large, large, large, large, False, False, dtype, False)
        if not any(row.fits(problem) for row in made.rows):
            raise ValueError(f"no row for {problem}")


def _check_row(where: str, row: Row) -> None:
    if row.dtype not in _DTYPES:
        raise ValueError(f"{where}dtype is half, tf32 or float32; got {row.dtype!r}")
    for name in ("shared", "held", "aligned"):
        if type(getattr(row, name)) is not bool:
            raise ValueError(f"{where}{name} is true or false; got {getattr(row, name)!r}")
    for name in ("inner", "n", "m"):
        most = getattr(row, name)
        if most is not None and (type(most) is not int or most < 1):
            raise ValueError(f"{where}{name} is null or an integer of at least 1; got {most!r}")
    tiles = row.tiles._asdict()
    _check_whole(f"{where}tiles: ", tiles, [name for name in tiles if name != "held"])
    if row.held and (row.inner is None or min(row.tiles.p, row.tiles.q) < row.inner):
        raise ValueError(f"{where}a middle that is held fits in its tile; got {row}")
    if row.tiles.heads > 1 and not row.shared:
        raise ValueError(f"{where}several heads a program share left and right; got {row}")


def _check_whole(where: str, found: dict[str, Any], names: Sequence[str]) -> None:
    for name in names:
        number: Any = found.get(name)
        least, most = _POWERS.get(name) or _INTEGERS[name]
        is_whole = type(number) is int and least <= number <= most
        if not is_whole or (name in _POWERS and number.bit_count() > 1):
            what = "a power of two" if name in _POWERS else "an integer"
            raise ValueError(f"{where}{name} is {what} from {least} to {most}; got {number!r}")
