"""What compression keeps: a sentence encoder, a language model, a convolution network; all the tables of accuracy.

    python benchmarks/accuracy.py

That takes about three hours on two cores (twenty minutes of them to train the language model), and goes on where it was
interrupted: rows that stand in a file are not computed again. Any of the three alone: `encoder.py`, `language.py`,
`digits_budget.py`, each of which says what it does.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def commands(out: Path, model: Path) -> list[list[str]]:
    """The scripts with their arguments, in order."""
    return [
        ["encoder.py", "--out", str(out / "encoder.json")],
        ["language.py", "train", "--out", str(model)],
        ["language.py", "table", "--model", str(model), "--out", str(out / "language.json")],
        ["digits_budget.py", "--out", str(out / "digits_budget.json")],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="directory of the figures (default: benchmarks)")
    parser.add_argument("--model", type=Path, default=FOLDER.parent / "build" / "language", help="the language model's")
    arguments = parser.parse_args()
    for script, *rest in commands(arguments.out, arguments.model):
        subprocess.run([sys.executable, str(FOLDER / script), *rest], check=True)


if __name__ == "__main__":
    main()
