"""What the benchmarks share: where the package is, and what a JSON says of its origin."""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import tensorlayers  # noqa: E402


def write(path: Path, **content: Any) -> None:
    """Write figures as JSON, with the commit, the versions and the threads that they belong to."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    versions = {"tensorlayers": tensorlayers.__version__, "torch": torch.__version__}
    with contextlib.suppress(metadata.PackageNotFoundError):
        versions["tensorly-torch"] = metadata.version("tensorly-torch")
    about = {
        "commit": head.stdout.strip() or "unknown",
        "versions": {**versions, "python": platform.python_version()},
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    path.write_text(json.dumps({**about, **content}, indent=1) + "\n", encoding="utf-8")
