"""Machines that the tests predict times for: their constants depend neither on a measurement nor on what is shipped."""

from tensorlayers.machine import Machine

IDEAL = Machine(
    name="ideal",
    threads=0,
    flops={"float32": 1e12},
    half={"m": 1e-9, "k": 1e-9, "n": 1e-9},
    memory=1e18,
    cached=1e18,
    permuted=1e18,
    cache=10**15,
    launch=1e-15,
    function=1e-15,
)
"""Time is FLOPs alone."""

TYPICAL = Machine(
    name="typical",
    threads=0,
    flops={"float32": 1e11},
    half={"m": 0.2, "k": 3.0, "n": 16.0},
    memory=8e9,
    cached=4e10,
    permuted=1e10,
    cache=6 * 10**6,
    launch=4e-6,
    function=4e-5,
)
"""Much like a CPU: small products take longer than their FLOPs."""


def predict(monkeypatch, machine):
    """Let plans predict times by the constants of a machine, of small layers too."""
    monkeypatch.setattr("tensorlayers.entry.machine", lambda device: machine)
    monkeypatch.setattr("tensorlayers.entry.SMALL", 0)
    monkeypatch.setattr("tensorlayers.decide.TINY", 0)
