"""Linear layers against what others offer: tensorly-torch with the same cores, and torch.compile."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import cases
import torch
from cases import LOW, MIDDLE
from compare import KINDS, Candidate, Figure, Row, compare
from report import HEADS
from torch import Tensor, nn

from tensorlayers import CP, TT, FactorizedLinear, Format, Tucker, from_tltorch
from tensorlayers.testing import assert_close

IN, OUT, ROWS = 768, 3072, 1024


@dataclass(frozen=True)
class Peer:
    """A format's name in tensorly-torch, and how many times as fast ours must be, with opt_einsum and without."""

    name: str
    with_opt_einsum: float
    without: float = 5.0


STORE = 'backward="store"'
PEERS: dict[type[Format], Peer] = {TT: Peer("blocktt", 3.0), CP: Peer("cp", 1.0), Tucker: Peer("tucker", 1.0)}


class WithEinsum(nn.Module):
    """A layer of tensorly-torch. It contracts by torch.einsum, which takes its order from opt_einsum where allowed."""

    def __init__(self, layer: nn.Module, enabled: bool) -> None:
        super().__init__()
        self.layer, self.enabled = layer, enabled

    def forward(self, x: Tensor) -> Tensor:
        before = torch.backends.opt_einsum.enabled
        torch.backends.opt_einsum.enabled = self.enabled
        try:
            y: Tensor = self.layer(x)
            return y
        finally:
            torch.backends.opt_einsum.enabled = before


def run(seconds: float, quick: bool) -> Iterator[list[Row]]:
    """tensorly-torch at the shares of FLOPs and at a tenth of the parameters; then torch.compile."""
    if importlib.util.find_spec("tltorch") is None:
        yield [Row("tensorly-torch", "tltorch", note="not installed")]
    else:
        for wanted in (MIDDLE,) if quick else (LOW, MIDDLE):
            chosen = {format: cases.at_share(IN, OUT, wanted, format) for format in PEERS}
            least = {format: peer.with_opt_einsum for format, peer in PEERS.items()}
            yield tensorly_torch(f"about {wanted} of the FLOPs", chosen, least, seconds, storing=True)
        if not quick:
            chosen = {format: format(0.1) for format in PEERS}
            # opt_einsum builds the dense weight here, as we do: all that is left is to be no slower.
            yield tensorly_torch("0.1 of the parameters", chosen, dict.fromkeys(PEERS, 1.0), seconds)
    yield compiled(seconds, quick)


def tensorly_torch(
    what: str,
    chosen: Mapping[type[Format], Format],
    least: Mapping[type[Format], float],
    seconds: float,
    storing: bool = False,
) -> list[Row]:
    """The rows of layers with the same cores, ours and theirs.

    Parameters
    ----------
    what : str
        The size of the formats, for the heading.
    chosen : mapping
        The formats.
    least : mapping
        How many times as fast as theirs with opt_einsum ours must be.
    seconds : float
    storing : bool
        Whether ours has a second row, with ``backward="store"``: what it costs by default to recompute.
    """
    torch.manual_seed(0)
    dense = nn.Linear(IN, OUT)
    candidates, pairs = [], []
    least_work: dict[str, float] = {}
    for format, peer in PEERS.items():
        theirs = their_layer(chosen[format], peer.name)
        ours = from_tltorch(theirs)
        assert isinstance(ours, FactorizedLinear)
        name = cases.label(chosen[format])
        candidates.append(Candidate(name, ours, cases.check, cases.facts(ours, dense, ROWS), bounded=False))
        if storing:
            candidates.append(Candidate(f"  {name}, {STORE}", stored(ours), cases.check, bounded=False))
        for enabled in (True, False):
            other = f"  tensorly-torch, {'with' if enabled else 'without'} opt_einsum, {peer.name}"
            candidates.append(Candidate(other, WithEinsum(theirs, enabled), same_as(ours), bounded=False))
            pairs.append((name, other, least[format] if enabled else peer.without))
            if not enabled:
                least_work[other] = cases.least_work(ours, ROWS)
    title = f"tensorly-torch, {IN} -> {OUT}, {ROWS} rows, {what}"
    found = compare(title, dense, candidates, torch.randn(ROWS, IN), seconds)
    rows = {row.name: row for row in found}
    for name, other, factor in pairs:
        ours_at, theirs_at = rows[name].figures, rows[other].figures
        for kind, aim in (("forward", factor), ("training", factor), ("saved", 1.0)):
            if kind in ours_at and kind in theirs_at:
                quotient = theirs_at[kind].value / ours_at[kind].value
                theirs_at[f"{kind}_of_ours"] = Figure(quotient, aim, at_least=True)
        said = beyond(theirs_at, least_work[other], factor) if other in least_work else ""
        if said:
            rows[other].facts["remark"] = said
    for name, row in rows.items():
        keeping = rows.get(f"  {name}, {STORE}")
        if keeping and "saved" in keeping.figures and keeping.figures["saved"] == row.figures.get("saved"):
            keeping.facts["remark"] = "keeps no more than by default"  # there is too much to keep
    return found


def stored(layer: FactorizedLinear) -> FactorizedLinear:
    """A copy that keeps rank-sized activations for the backward, where it may."""
    layer = copy.deepcopy(layer)
    layer.backward = "store"
    return layer


def beyond(theirs: Mapping[str, Figure], work: float, factor: float) -> str:
    """What of a target no layer of ours can reach: its FLOPs alone, at the dense layer's own rate, take longer.

    Parameters
    ----------
    theirs : mapping of str to Figure
        Their times, as multiples of dense's.
    work : float
        Our FLOPs, of dense's.
    factor : float
        The target.

    Returns
    -------
    str
        Empty where the arithmetic allows the factor.
    """
    most = {HEADS[kind]: theirs[kind].value / work for kind in KINDS if kind in theirs}
    said = [f"{head} <= {times:.2f} x" for head, times in most.items() if times < factor]
    return f"{factor:g} x is beyond the arithmetic: at dense's rate {', '.join(said)}" if said else ""


def their_layer(format: Format, name: str) -> nn.Module:
    """A layer of tensorly-torch of our format's modes and ranks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tltorch = importlib.import_module("tltorch")
    network = format.network(OUT, IN)
    modes = network.mode_sizes("in"), network.mode_sizes("out")
    rank = network.ranks if len(network.ranks) > 1 else network.ranks[0]
    layer: nn.Module = tltorch.FactorizedLinear(*modes, factorization=name, rank=rank, implementation="factorized")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.2)  # what tensorly-torch draws may be so small that nothing is left to compare
    return layer


def same_as(reference: nn.Module) -> Callable[[nn.Module, Tensor], None]:
    """A check that a module gives the output of another, and its gradients of the input and of the bias."""

    def check(module: nn.Module, x: Tensor) -> None:
        x = x.detach().requires_grad_()
        probe, results = None, []
        for layer in (module, reference):
            y = layer(x)
            probe = torch.randn_like(y) if probe is None else probe
            bias = next(parameter for key, parameter in layer.named_parameters() if key.endswith("bias"))
            results.append((y, *torch.autograd.grad(y, [x, bias], probe)))
        names = ("output", "gradient of input", "gradient of bias")
        for what, actual, expected in zip(names, *results, strict=True):
            assert_close(actual, expected, x.dtype, what)

    return check


def compiled(seconds: float, quick: bool) -> list[Row]:
    """The rows of torch.compile: of the dense layer, and of ours."""
    torch.manual_seed(0)
    dense = nn.Linear(IN, OUT)
    candidates = [Candidate("torch.compile(dense)", compile_(dense), same_as(dense), memory=False)]
    for format in cases.FORMATS[: 1 if quick else None]:
        chosen = cases.at_share(IN, OUT, MIDDLE, format)
        eager = cases.linear(IN, OUT, chosen, ROWS)
        candidates.append(eager)
        name = f"torch.compile({eager.name})"
        candidates.append(Candidate(name, compile_(eager.module), same_as(eager.module), memory=False))
    return compare(f"torch.compile, {IN} -> {OUT}, {ROWS} rows", dense, candidates, torch.randn(ROWS, IN), seconds)


def compile_(module: nn.Module) -> nn.Module:
    torch._dynamo.config.recompile_limit = 64  # one forward stands for all formats, each compiled for itself
    result: nn.Module = torch.compile(module, dynamic=False)  # type: ignore[assignment]
    return result
