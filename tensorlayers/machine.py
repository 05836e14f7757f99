"""What a machine can do: the constants of the cost model, one JSON file a device class, or measured on this machine."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .errors import CostModelError

SHIPPED = Path(__file__).resolve().parent / "machines"
VARIABLE = "TENSORLAYERS_MACHINES"
"""The environment variable that names a directory of JSON files, looked into before those that are shipped."""


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
        fill = (1 + self.half["m"] / m) * (1 + self.half["k"] / k) * (1 + self.half["n"] / n)
        return 2 * batch * m * k * n * fill / self.rate(dtype)

    def to_json(self) -> str:
        """The constants as JSON text."""
        return json.dumps(asdict(self), indent=1) + "\n"


def read(path: Path) -> Machine:
    """Read a file of constants.

    Raises
    ------
    CostModelError
        If it is no JSON object of these fields, or a constant is not a positive number.
    """
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        machine = Machine(**data)
        numbers = [machine.memory, machine.cached, machine.permuted, machine.cache, machine.launch, machine.function]
        numbers += [*machine.flops.values(), *machine.half.values(), *machine.conv.values()]
        machine.flops["float32"], machine.half["m"], machine.half["k"], machine.half["n"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CostModelError(f"{path.name}: no file of a machine's constants: {error}") from None
    if not all(isinstance(number, (int, float)) and number > 0 for number in numbers):
        raise CostModelError(f"{path.name}: every constant is a positive number")
    return machine


@lru_cache
def machine(device: str = "cpu") -> Machine:
    """The constants for a device type ("cpu", "cuda", ...): measured on this machine if they were, else as shipped.

    `tensorlayers calibrate` measures them and says where they are kept.
    """
    places = [Path(os.environ[VARIABLE])] if os.environ.get(VARIABLE) else [measured()]
    for directory in (*places, SHIPPED):
        for name in (device, "cuda"):  # other accelerators are more like a GPU than like a CPU
            if (directory / f"{name}.json").is_file():
                return read(directory / f"{name}.json")
            if device == "cpu":
                break
    raise CostModelError(f"machine {device!r}: no constants in {SHIPPED}")


def measured() -> Path:
    """The directory where measured constants are kept: ``~/.cache/tensorlayers`` (or under ``XDG_CACHE_HOME``)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tensorlayers"
