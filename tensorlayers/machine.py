"""What a machine can do: the constants of the cost model, one JSON file a device class, or measured on this machine."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .errors import CostModelError
from .files import replaced

SHIPPED = Path(__file__).resolve().parent / "machines"
VARIABLE = "TENSORLAYERS_MACHINES"
"""The environment variable that names the directory of measured constants; see `measured`."""

_LEAST, _MOST = 1e-30, 1e30  # of a constant: what is computed from such neither overflows nor vanishes
_MOST_INTEGERS = {"threads": 10**6, "cache": 10**15}


@dataclass(frozen=True)
class Machine:
    """The constants of a class of devices.

    Parameters
    ----------
    name : str
    threads : int
        That the rates below were measured with; 0: they do not depend on them (a GPU).
    flops : mapping
        FLOP/s of a large matrix product, by dtype ("float32", ...).
    half : mapping
        For each dimension of a matrix product, "m", "n" and "k" (contracted), the size at which it costs half the rate.
    memory, cached, permuted : float
        Bytes/s read and written: from main memory; within the cache; by a copy into another order of the axes.
    cache : int
        Bytes that intermediates may take to count as cached.
    launch : float
        Seconds that one operation of torch takes beside its arithmetic.
    function : float
        Seconds that a custom autograd function takes more than an operation of torch.
    conv : mapping
        The rates of convolutions; see `conv_cost`.
    """

    name: str
    threads: int
    flops: Mapping[str, float]
    half: Mapping[str, float]
    memory: float
    cached: float
    permuted: float
    cache: int
    launch: float
    function: float
    conv: Mapping[str, float] = field(default_factory=dict)

    # Compared and hashed by what it is, not by its values: decisions are cached on it.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def rate(self, dtype: str = "float32") -> float:
        """FLOP/s of a large matrix product with as many threads as torch has now."""
        rate = self.flops.get(dtype, self.flops["float32"])
        return rate * torch.get_num_threads() / self.threads if self.threads else rate

    def product(self, batch: int, m: int, k: int, n: int, dtype: str = "float32") -> float:
        """Seconds that `batch` products of (m, k) and (k, n) matrices take, beside the launch."""
        seconds: float = product_seconds(batch, m, k, n, self.rate(dtype), self.half)
        return seconds

    def alone(self, batch: int, m: int, k: int, n: int, dtype: str, itemsize: int) -> float:
        """Seconds of `product` by itself: what it reads and writes, and the launch, among them."""
        size = batch * (m * k + k * n + m * n) * itemsize
        return self.product(batch, m, k, n, dtype) + size / self.bandwidth(size) + self.launch

    def bandwidth(self, size: int) -> float:
        """Bytes/s at which so many bytes are written and read again."""
        return self.cached if size <= self.cache else self.memory

    def copy(self, size: int) -> float:
        """Seconds that a copy of this many bytes into another order takes, beside the launch."""
        waiting = 2 * size / self.memory if size > self.cache else 0.0
        return 2 * size / self.permuted + waiting

    def constants(self) -> dict[str, float]:
        """All numbers but the threads, by name: "flops.float32", ..., "half.m", ..., "memory", ..., "conv.rate", ..."""
        found = {}
        for name, value in asdict(self).items():
            if isinstance(value, Mapping):
                found.update({f"{name}.{key}": number for key, number in value.items()})
            elif name not in ("name", "threads"):
                found[name] = value
        return found

    def to_json(self) -> str:
        """The constants as JSON text."""
        return json.dumps(asdict(self), indent=1) + "\n"


def product_seconds(batch: Any, m: Any, k: Any, n: Any, flops: Any, half: Mapping[str, Any]) -> Any:
    """Seconds that products take by the constants; of numbers, or of tensors elementwise. See `Machine`."""
    fill = (1 + half["m"] / m) * (1 + half["k"] / k) * (1 + half["n"] / n)
    return 2 * batch * m * k * n * fill / flops


def read(path: Path) -> Machine:
    """Read a file of constants.

    Raises
    ------
    CostModelError
        If it is no JSON object of these fields, or a constant is not a positive number of its type.
    """
    remedy = "delete the file, or run `tensorlayers calibrate` again"
    try:
        found = Machine(**json.loads(path.read_text(encoding="utf-8")))
        constants = found.constants()
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CostModelError(f"{path}: no file of a machine's constants ({error}); {remedy}") from None
    missing = {"flops.float32", "half.m", "half.k", "half.n"} - constants.keys()
    if missing:
        raise CostModelError(f"{path}: {min(missing)} is missing; {remedy}")
    for name, value in constants.items():
        if not _is_number(value) or not _LEAST <= value <= _MOST:
            raise CostModelError(f"{path}: every constant is a positive number; {name} is {value!r}; {remedy}")
    for name, most in _MOST_INTEGERS.items():
        value = getattr(found, name)
        if type(value) is not int or not 0 <= value <= most:
            raise CostModelError(f"{path}: {name} is an integer, at most {most}; got {value!r}; {remedy}")
    if not isinstance(found.name, str):
        raise CostModelError(f"{path}: name is a text; got {found.name!r}; {remedy}")
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def write(constants: Machine, path: Path) -> None:
    """Write a file of constants, whole or not at all; its directory is made. `machine` reads it from then on.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    with replaced(path) as temporary:
        temporary.write_text(constants.to_json(), encoding="utf-8")
    machine.cache_clear()


@lru_cache
def machine(device: str = "cpu") -> Machine:
    """The constants for a device type ("cpu", "cuda", ...): measured on this machine if they were, else as shipped.

    `tensorlayers calibrate` measures them and says where they are kept. The file is read once a process. One that is
    malformed, or cannot be read, is not used, and a warning says so: on these constants rests how fast a layer is, not
    what it gives.
    """
    try:
        found = read_measured(device)
    except CostModelError as error:
        warnings.warn(f"{error}; the shipped constants are used", stacklevel=2)
        found = None
    return found or shipped(device)


def shipped(device: str) -> Machine:
    """The constants that come with the package for a device type, whatever was measured."""
    return read(SHIPPED / _names(device)[-1])


def read_measured(device: str = "cpu") -> Machine | None:
    """The constants that were measured for a device type; None where there is no file of them.

    Raises
    ------
    CostModelError
        If there is one that is malformed, or cannot be read.
    """
    directory = measured()
    if directory is None:
        return None
    for name in _names(device):
        path = directory / name
        try:
            is_there = path.is_file()
        except OSError:  # a directory that this user may not search
            is_there = False
        if is_there:
            return read(path)
    return None


def _names(device: str) -> tuple[str, ...]:
    """The files of a device type: other accelerators are more like a GPU than like a CPU."""
    return ("cpu.json",) if device == "cpu" else tuple(dict.fromkeys((f"{device}.json", "cuda.json")))


def measured() -> Path | None:
    """The directory of measured constants, one JSON file a device type; None where there is no home directory either.

    It is the one that the environment variable ``TENSORLAYERS_MACHINES`` names; without one ``~/.cache/tensorlayers``,
    or ``tensorlayers`` in the directory ``XDG_CACHE_HOME``.
    """
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tensorlayers"
    except RuntimeError:
        return None
