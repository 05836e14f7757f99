"""What the benchmarks share: what is timed of a layer, and what a JSON says of its origin."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import tensorlayers  # noqa: E402


def forward(layer: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    """A forward without a graph."""

    def run() -> object:
        with torch.inference_mode():
            return layer(x)

    return run


def training(layer: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    """A forward and a backward, to the input too."""
    x = x.clone().requires_grad_()

    def run() -> object:
        layer.zero_grad()
        x.grad = None
        return layer(x).sum().backward()

    return run


def write(path: Path, **content: Any) -> None:
    """Write figures as JSON, with the commit, the versions and the threads that they belong to."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    versions = {"tensorlayers": tensorlayers.__version__, "torch": torch.__version__}
    about = {
        "commit": head.stdout.strip() or "unknown",
        "versions": {**versions, "python": platform.python_version()},
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    path.write_text(json.dumps({**about, **content}, indent=1) + "\n", encoding="utf-8")
