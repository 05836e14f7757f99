"""What would pay where a format does not: a smaller rank, other modes, or another format."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from decimal import ROUND_DOWN, Context
from functools import cached_property, lru_cache
from typing import Any

import torch

from .entry import ROWS, Entry
from .errors import CostModelError, FormatError, TensorlayersError
from .formats import Format, available
from .layers import FactorizedLayer, FactorizedLinear, layer_type
from .layers.kind import check_sizes, plain
from .machine import Machine
from .machine import machine as machine_of
from .network import Network
from .tensorize import mode_choices

_ROUGH = 0.1  # of a rank: how far below the largest that pays the one that is named may be
_SAME = 0.9  # of the parameters: with no fewer than that another network counts as one of the same size
_EVEN = 4  # of a rank that is named: products of odd widths are slower than predicted
_TRIED = 2  # modes of the fewest MACs whose time is predicted
_THOROUGH = 6  # the same where a user asks for the fastest
_DIGITS = Context(prec=3, rounding=ROUND_DOWN)  # of a fraction that is named: it is read, and typed


@dataclass(frozen=True)
class Asked:
    """A layer, and the format that was asked for.

    Parameters
    ----------
    layer : str
        The layer kind.
    settings : tuple of (str, object)
    format : Format
    stack : int or None
        How many layers are factorized jointly.
    rows : int
    machine : Machine
    training : bool
        Whether a training step is to be no slower, besides a forward.
    by : str
        What decides: "time", as predicted; "MACs", where there is no estimate of it; "launches", where the layer is so
        small that none of its networks pays.
    dtype : str
        Of the products.
    """

    layer: str
    settings: tuple[tuple[str, Any], ...]
    format: Format
    stack: int | None
    rows: int
    machine: Machine
    training: bool
    by: str = "time"
    dtype: str = "float32"

    @classmethod
    def of(cls, entry: Entry, training: bool, by: str) -> Asked:
        """What was asked for a layer that is converted."""
        assert entry.format is not None
        stack = entry.stack[0] if entry.stack else None
        # What the costs do not depend on must not keep equal layers apart.
        settings = tuple(sorted((k, v) for k, v in entry.settings.items() if k != "bias"))
        return cls(
            entry.layer, settings, entry.format, stack, entry.rows, entry.work.machine, training, by, entry.work.dtype
        )

    @cached_property
    def kind(self) -> type[FactorizedLayer]:
        """The factorized layer kind."""
        return layer_type(self.layer)

    @cached_property
    def sizes(self) -> dict[str, Any]:
        """The settings."""
        return {"bias": False, **dict(self.settings)}

    def network(self, format: Format) -> Network:
        """The network of a format for this layer."""
        return self.kind.resolve(format, self.sizes, self.stack)[0]

    def macs(self, network: Network) -> float:
        """MACs of a network over those of the dense layer."""
        dense = self.kind.dense_cost(self.sizes, self.rows)
        return self.kind.factorized_cost(_own(network), self.sizes, self.rows).macs / dense.macs

    def cost(self, network: Network) -> float:
        """What decides, of a network over that of the dense layer; of a forward and a training step the slower."""
        if self.by != "time":
            return self.macs(network) if self.by == "MACs" else math.inf
        worst = 0.0
        for training in (False, True) if self.training else (False,):
            work = self.rows, self.machine, training, self.dtype
            dense = self.kind.dense_seconds(self.sizes, *work)
            own = self.kind.factorized_seconds(_own(network), self.sizes, *work)
            assert dense is not None
            assert own is not None
            worst = max(worst, own / dense)
        return worst

    def fraction(self, network: Network) -> float:
        """The parameters of a network over those of the dense weight, as a rank of three digits that gives no more."""
        size = math.prod(axis.size for axis in self.kind.axes_of(self.sizes)) * (self.stack or 1)
        exact = (network.num_parameters + 0.5) / size  # half a parameter, against rounding
        return min(1.0, float(_DIGITS.create_decimal_from_float(exact)))


def _own(network: Network) -> Network:
    return network.without(network.names("stack"))


def advise(asked: Asked) -> str:
    """One line: by how much a format is beyond the dense layer, and what would pay in its place.

    Parameters
    ----------
    asked : Asked
        It has more MACs than the dense layer, or is predicted slower.

    Returns
    -------
    str
        With the largest rank (within 10 %) that is predicted no slower than dense; the fastest modes, and the fastest
        other format, at the same parameters, where these are predicted faster than dense. Each is a format as Python
        reads it. Where MACs decide, by fewest MACs.
    """
    return _advise(asked, torch.get_num_threads())


@lru_cache(maxsize=1024)
def _advise(asked: Asked, threads: int) -> str:
    network = asked.network(asked.format)
    own = asked.cost(network)
    shape = "x".join(str(size) for size in asked.kind.shape_of(asked.sizes))
    head = f"{asked.format} at {shape}: {asked.macs(network):.2f} x the MACs of dense"
    head += f", {own:.2f} x the time" if asked.by == "time" else ""
    pays = []
    rank = _largest_rank(asked)
    if rank:
        format = replace(asked.format, rank=rank)
        pays.append(f"up to {format} ({asked.cost(asked.network(format)):.2f} x the {asked.by})")
    for found in (_fastest(asked, _other_modes(asked), _TRIED), _fastest(asked, _other_formats(asked))):
        if found is not None and found[0] < min(1.0, own):
            pays.append(f"{found[1]} ({found[0]:.2f} x the {asked.by})")
    return f"{head}; pays: {', or '.join(pays)}" if pays else f"{head}; no smaller rank, other modes or format pays"


def _largest_rank(asked: Asked) -> int:
    """The largest rank, the same for all bonds, that is predicted no slower than dense; 0 where there is none.

    From 8 on a multiple of 4, but where only the odd one pays.
    """

    def cost(rank: int) -> float:
        return asked.cost(asked.network(replace(asked.format, rank=rank)))

    def fewer_macs(rank: int) -> bool:
        return asked.macs(asked.network(replace(asked.format, rank=rank))) <= 1

    # Above the rank with the MACs of dense no network is faster: to predict its time is what takes long.
    high = max(asked.network(asked.format).ranks, default=0)
    found = _searched(_bisected(0, high, fewer_macs) if high and not fewer_macs(high) else high, cost)
    even = found - found % _EVEN
    return even if even >= 2 * _EVEN and cost(even) <= 1 else found


def _searched(high: int, cost: Callable[[int], float]) -> int:
    """The largest rank up to `high`, roughly, at a cost of at most 1; 0 where there is none."""
    low = 0
    over = cost(high) if high else 0.0
    if over <= 1 or not high:
        return high
    while high - low > max(1, _ROUGH * low):
        # Times are nearly linear in the rank where they are not those of the dense weight, rebuilt.
        guess = round(low + (high - low) * min(0.75, 1 / over))
        guess = min(max(guess, low + 1), high - 1)
        found = cost(guess)
        if found <= 1:
            low = guess
        else:
            high, over = guess, found
    return low


def _bisected(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The largest number from `low` for which a condition holds that holds at `low` and not at `high`."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _other_modes(asked: Asked) -> Iterator[Format]:
    """The format with other modes, at the same parameters; nothing where its axes are not split."""
    axes = {role: [a for a in asked.kind.axes_of(asked.sizes) if a.role == role] for role in ("out", "in")}
    if any(len(found) != 1 or not found[0].split for found in axes.values()):
        return
    network = asked.network(asked.format)
    own = {role: network.mode_sizes(role) for role in axes}
    rank = asked.format.rank if isinstance(asked.format.rank, float) else asked.fraction(network)
    choices = {role: mode_choices(axes[role][0].size, len(own[role])) for role in axes}
    for outs in choices["out"]:
        for ins in choices["in"]:
            if (outs, ins) != (own["out"], own["in"]):
                yield replace(asked.format, rank=rank, out_modes=outs, in_modes=ins)


def _other_formats(asked: Asked) -> Iterator[Format]:
    """The other registered formats at the same parameters."""
    fraction = asked.fraction(asked.network(asked.format))
    for cls in available().values():
        if cls is not type(asked.format):
            yield cls(fraction)


def _fastest(asked: Asked, formats: Iterable[Format], tried: int | None = None) -> tuple[float, Format] | None:
    """The format that is predicted fastest, among the `tried` of the fewest MACs, with its cost over that of dense."""
    own = asked.network(asked.format)
    fitting: dict[tuple[float, type[Format]], tuple[Format, Network]] = {}
    for format in formats:
        try:
            network = asked.network(format)
        except TensorlayersError:
            continue  # it cannot be that small, or not of this shape
        if network.num_parameters >= _SAME * own.num_parameters:
            # Of modes and their mirror image, which have the same MACs, the first.
            fitting.setdefault((asked.macs(network), type(format)), (format, network))
    fewest = sorted(fitting, key=lambda key: key[0])[:tried]
    costs = [(asked.cost(network), format) for format, network in map(fitting.__getitem__, fewest)]
    return min(costs, key=lambda pair: pair[0], default=None)


def fastest_modes(
    format: Format,
    out_features: int,
    in_features: int,
    rows: int = ROWS,
    machine: Machine | None = None,
    *,
    training: bool = True,
) -> Format:
    """The format with the modes that are predicted fastest for a linear layer, at about as many parameters.

    Parameters
    ----------
    format : Format
        Its modes say how many are wanted a side; its rank, how many parameters.
    out_features, in_features : int
    rows : int
        Rows in a batch.
    machine : Machine, optional
        The constants that the prediction rests on; by default those of this machine's CPU.
    training : bool
        Whether a training step counts too: what is compared is the worse of its time and that of a forward, each over
        the dense layer's.

    Returns
    -------
    Format
        With `in_modes` and `out_modes`. A rank that is a fraction is kept; others become the fraction that has their
        parameters, where the modes are not the format's own. Of the modes that `tensorize.mode_choices` lists and that
        give at least nine tenths of these parameters, those with the fewest MACs are compared with the format's own by
        their predicted time: it is never predicted slower than these.

    Raises
    ------
    NetworkError
        If a number of features or rows is no integer of at least 1.
    CostModelError
        If the machine is none.
    RankError, ModeError, FormatError
        If the format is none, or does not fit the shape.

    Notes
    -----
    At equal parameters skewed modes have fewer FLOPs: those of a tensor train of order 2 are
    :math:`r (1 / o_1 + 1 / i_2)` of dense. They have less to share between blocks of the weight, so that the error
    of a weight can be larger, or smaller: compare them by `plan_conversion`.

    Examples
    --------
    >>> from tensorlayers import TT
    >>> fast = fastest_modes(TT(0.1), 3072, 768)
    >>> fast.rank, len(fast.in_modes), len(fast.out_modes)
    (0.1, 2, 2)
    """
    out_features, in_features, rows = plain((out_features, in_features, rows))
    check_sizes(out_features=out_features, in_features=in_features, rows=rows)
    if not isinstance(format, Format):
        raise FormatError(f"format: a format such as TT(0.1); got {format!r}")
    if not (machine is None or isinstance(machine, Machine)):
        raise CostModelError(f"machine: a Machine or None; got {machine!r}")
    settings = (("in_features", in_features), ("out_features", out_features))
    asked = Asked(FactorizedLinear.kind, settings, format, None, rows, machine or machine_of("cpu"), training)
    network = asked.network(format)
    found = _fastest(asked, _other_modes(asked), _THOROUGH)
    if found is not None and found[0] < asked.cost(network):
        return found[1]
    return replace(format, in_modes=network.mode_sizes("in"), out_modes=network.mode_sizes("out"))
