"""Writing files whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file beside another one, to be written within the block, that takes its place if all went well.

    Raises
    ------
    OSError
        If nothing can be written there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not by `tempfile`: its files are for one user alone, and these may be shared.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
